"""
The one mutable object of the core: who holds what.

It keeps every claim and every held slot, and per pool how many there are where (``counts.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from hwbpd.core.counts import PoolBooks
from hwbpd.core.lifecycle import ENDED, State
from hwbpd.core.model import ArmedBy, Claim, Delivery, Piece, Plan, Pool, Process, Resource, Target, Task, Vcpu
from hwbpd.core.story import Story

ENDED_KEPT = 1000  # claims that are over, kept to answer "why?"


class ClaimRecord:
    """A claim in the books: what was asked, where it stands, and its story."""

    __slots__ = (
        "claim",
        "contended_ns",
        "displacers",
        "guard_per_s",
        "has_displaced",
        "hits",
        "lost",
        "plan",
        "rearm_at_ns",
        "resource_ids",
        "retry_at_ns",
        "reused",
        "state",
        "story",
        "victims",
        "was_guarded",
        "yield_by_ns",
    )

    def __init__(self, claim: Claim, plan: Plan) -> None:
        self.claim = claim
        self.plan = plan
        self.state = State.REQUESTED
        self.resource_ids: tuple[int, ...] = ()
        self.story = Story()
        self.guard_per_s = 0
        self.rearm_at_ns = 0  # of a guarded claim, if it reports again by itself
        self.hits = 0  # reported so far
        self.lost = 0  # of these, in rings
        self.victims: set[int] = set()  # claims that have still to give way to it
        self.has_displaced = False
        self.displacers: set[int] = set()  # the claims it has to give way to
        self.yield_by_ns = 0
        self.was_guarded = False  # when it was asked to give way
        self.retry_at_ns = 0  # of a queued claim that the kernel had no room for
        self.contended_ns = 0  # when its owner was last told that others want the room
        self.reused: tuple[int, ...] = ()  # of a tracer's resources, those that the thread had already


class Books:
    """
    Who holds what. Only the arbiter changes it.

    :param slots: how many each pool has on a CPU; :param slots_on: on those CPUs that have other numbers.
    """

    def __init__(
        self,
        slots: Mapping[Pool, int],
        possible: Iterable[int],
        online: Iterable[int],
        slots_on: Mapping[int, Mapping[Pool, int]] | None = None,
    ) -> None:
        self.possible = frozenset(possible)
        self.online = set(online)
        others = slots_on or {}
        self.pools = {
            pool: PoolBooks({cpu: others.get(cpu, slots).get(pool, count) for cpu in self.possible}, self.online)
            for pool, count in slots.items()
        }
        # Each a world of its own, with the counts of a machine that has one CPU and no tasks.
        self.vcpus: dict[Vcpu, dict[Pool, PoolBooks]] = {}
        self._closing: set[Vcpu] = set()  # those that are over and still have slots to give back
        self.resources: dict[int, Resource] = {}
        self.riders: dict[int, tuple[Claim, ...]] = {}  # per resource
        self.claims: dict[int, ClaimRecord] = {}  # those not over
        self.sessions: dict[int, dict[int, None]] = {}  # per session: its claims, oldest first
        self.ended: dict[int, ClaimRecord] = {}  # the last ENDED_KEPT, oldest first
        self._ended_order: deque[int] = deque()
        self._on_cpu: dict[int, dict[int, None]] = {}  # CPU -> resources CPU-wide on it alone
        self._everywhere: dict[int, None] = {}  # resources CPU-wide on all
        self.absent: dict[int, set[int]] = {}  # per CPU-wide resource: online CPUs where it has no slot
        self._of: dict[Task | Process | Vcpu, dict[int, None]] = {}
        self._alike: dict[Hashable, dict[int, None]] = {}  # what may be shared -> resources that are that

    # --- worlds ------------------------------------------------------------------------------------------------------

    def counts(self, pool: Pool, target: Target) -> PoolBooks:
        """The counts of the world that a target is in: the host's, or its vCPU's."""
        return self.pools[pool] if target.vcpu is None else self.vcpus[target.vcpu][pool]

    def open_world(self, vcpu: Vcpu, slots: Mapping[Pool, int]) -> None:
        """A vCPU has come, with nothing armed."""
        assert vcpu not in self.vcpus
        self.vcpus[vcpu] = {pool: PoolBooks({0: count}, {0}) for pool, count in slots.items()}

    def close_world(self, vcpu: Vcpu) -> None:
        """A vCPU is over; nobody gets anything of it any more, and it is forgotten once its slots are given back."""
        self._closing.add(vcpu)
        self._forget_if_empty(vcpu)

    def has_world(self, target: Target) -> bool:
        """Whether there is anything to be had there: always, but for a vCPU that is over."""
        return target.vcpu is None or (target.vcpu in self.vcpus and target.vcpu not in self._closing)

    def _forget_if_empty(self, vcpu: Vcpu) -> None:
        if vcpu in self._closing and vcpu not in self._of:
            self._closing.remove(vcpu)
            del self.vcpus[vcpu]

    # --- held slots --------------------------------------------------------------------------------------------------

    def take(self, resource: Resource, *riders: Claim) -> None:
        """Count a slot as held. The caller has asked ``admission.fits``."""
        assert resource.resource_id not in self.resources
        self.resources[resource.resource_id] = resource
        self.riders[resource.resource_id] = riders
        self.counts(resource.piece.pool, resource.target).add(resource.target, 1)
        for place in self._places(resource.target):
            place[resource.resource_id] = None
        if riders and is_shareable(riders[0]):
            self._alike.setdefault(_what(resource), {})[resource.resource_id] = None

    def give_back(self, resource_id: int) -> None:
        """Count it as free again."""
        resource = self.resources[resource_id]
        for cpu in tuple(self.absent.get(resource_id, ())):
            self.come_to(resource_id, cpu)
        del self.resources[resource_id]
        riders = self.riders.pop(resource_id)
        if riders and is_shareable(riders[0]):
            what = _what(resource)
            del self._alike[what][resource_id]
            if not self._alike[what]:
                del self._alike[what]
        self.counts(resource.piece.pool, resource.target).add(resource.target, -1)
        for place in self._places(resource.target):
            del place[resource_id]
        whose = resource.target.whose
        if whose is not None and not self._of[whose]:
            del self._of[whose]
            if resource.target.vcpu is not None:
                self._forget_if_empty(resource.target.vcpu)

    # --- sharing -----------------------------------------------------------------------------------------------------

    def alike(self, claim: Claim, piece: Piece) -> int | None:
        """
        The resource that a claim may ride on for one of its pieces: armed, for the same target, with the same mode.

        A hit does not say which byte was touched nor how, so nothing looser could be told apart. What is filtered for
        each rider by itself, and the size of the ring, may differ.
        """
        if not is_shareable(claim):
            return None
        for resource_id in self._alike.get(_what(Resource(0, piece, claim.target, claim.mode)), ()):
            if all(self.claims[rider.claim_id].state is State.ARMED for rider in self.riders[resource_id]):
                return resource_id
        return None

    def ride(self, resource_id: int, claim: Claim) -> None:
        """One claim more has that slot."""
        self.riders[resource_id] += (claim,)

    def get_off(self, resource_id: int, claim_id: int) -> None:
        """One claim less; others stay."""
        self.riders[resource_id] = tuple(claim for claim in self.riders[resource_id] if claim.claim_id != claim_id)
        assert self.riders[resource_id]

    def is_shared(self, resource_id: int) -> bool:
        return len(self.riders[resource_id]) > 1

    # --- what tracers leave behind -----------------------------------------------------------------------------------

    def residue_of(self, task: Task, pool: Pool) -> list[int]:
        """The slots that a thread has kept of tracers that are gone, oldest first."""
        return [
            resource_id
            for resource_id in self._of.get(task, ())
            if self.resources[resource_id].piece.pool is pool
            and self.claims[self.riders[resource_id][0].claim_id].state is State.RESIDUE
        ]

    def taken_of(self, task: Task, pool: Pool) -> int:
        """How many slots of that thread are known to be tracers'."""
        states = {State.TAKEN, State.RESIDUE}
        return sum(
            self.resources[resource_id].piece.pool is pool
            and self.claims[self.riders[resource_id][0].claim_id].state in states
            for resource_id in self._of.get(task, ())
        )

    def pass_on(self, resource_id: int, claim: Claim) -> None:
        """What one left behind is another's now."""
        self.riders[resource_id] = (claim,)

    # --- CPUs --------------------------------------------------------------------------------------------------------

    def leave(self, resource_id: int, cpu: int) -> None:
        """A CPU-wide resource has no slot on that CPU any more."""
        self.absent.setdefault(resource_id, set()).add(cpu)
        self._count_on(resource_id, cpu, -1)

    def come_to(self, resource_id: int, cpu: int) -> None:
        """It has one there again."""
        self.absent[resource_id].remove(cpu)
        if not self.absent[resource_id]:
            del self.absent[resource_id]
        self._count_on(resource_id, cpu, 1)

    def _count_on(self, resource_id: int, cpu: int, slots: int) -> None:
        resource = self.resources[resource_id]
        counts = self.pools[resource.piece.pool]
        if resource.target.cpus is not None:
            counts.add_on(cpu, slots)
            return
        not_on = counts.not_on.pop(cpu, 0) - slots
        if not_on:
            counts.not_on[cpu] = not_on

    def resources_on(self, cpu: int) -> list[int]:
        """The CPU-wide resources that belong on that CPU, whether or not they have a slot there, oldest first."""
        return sorted((*self._everywhere, *self._on_cpu.get(cpu, ())))

    def go_offline(self, cpu: int) -> None:
        """A CPU is gone; those who were everywhere are everywhere else now."""
        self.online.discard(cpu)
        for resource_id in self._everywhere:
            absent = self.absent.get(resource_id, set())
            absent.discard(cpu)
            if not absent:
                self.absent.pop(resource_id, None)
        for counts in self.pools.values():
            counts.is_offline(cpu)

    def come_online(self, cpu: int) -> None:
        """A CPU is back, and nobody has a slot there yet."""
        self.online.add(cpu)
        for counts in self.pools.values():
            counts.is_online(cpu)
        for resource_id in self._everywhere:
            self.leave(resource_id, cpu)

    def _places(self, target: Target) -> Iterable[dict[int, None]]:
        whose = target.whose
        if whose is not None:
            return (self._of.setdefault(whose, {}),)
        if target.cpus is None:
            return (self._everywhere,)
        return tuple(self._on_cpu.setdefault(cpu, {}) for cpu in target.cpus)

    def cpu_wide_on(self, cpu: int, pool: Pool) -> list[int]:
        """The resources that are CPU-wide on that CPU."""
        everywhere = self._everywhere if cpu in self.online else ()
        return [
            resource_id
            for resource_id in (*everywhere, *self._on_cpu.get(cpu, ()))
            if self.resources[resource_id].piece.pool is pool and cpu not in self.absent.get(resource_id, ())
        ]

    def of_task(self, task: Task, cpu: int, pool: Pool) -> list[int]:
        """The resources of a task, and of its process, that count on that CPU."""
        found = []
        of_process = self._of.get(task.process, ()) if task.process is not None else ()
        for resource_id in (*self._of.get(task, ()), *of_process):
            resource = self.resources[resource_id]
            if resource.piece.pool is pool and (resource.target.cpus is None or cpu in resource.target.cpus):
                found.append(resource_id)
        return found

    def of_whole(self, whose: Process | Vcpu, pool: Pool) -> list[int]:
        """The resources of a whole process, or of a vCPU."""
        return [
            resource_id
            for resource_id in self._of.get(whose, ())
            if self.resources[resource_id].piece.pool is pool
        ]

    # --- claims ------------------------------------------------------------------------------------------------------

    def open_claim(self, record: ClaimRecord) -> None:
        """Enter a claim."""
        claim = record.claim
        self.claims[claim.claim_id] = record
        self.sessions.setdefault(claim.owner.session_id, {})[claim.claim_id] = None

    def close_claim(self, record: ClaimRecord) -> None:
        """Take a claim that is over, or was refused, out of the way; its story is kept for a while."""
        assert record.state in ENDED
        claim = record.claim
        if self.claims.pop(claim.claim_id, None) is not None:
            self.leave_session(record)
        self.ended[claim.claim_id] = record
        self._ended_order.append(claim.claim_id)
        if len(self._ended_order) > ENDED_KEPT:
            del self.ended[self._ended_order.popleft()]

    def leave_session(self, record: ClaimRecord) -> None:
        """Nobody owns it any more, but it may still hold something."""
        claim = record.claim
        of_session = self.sessions.get(claim.owner.session_id, {})
        of_session.pop(claim.claim_id, None)
        if not of_session:
            self.sessions.pop(claim.owner.session_id, None)

    def dump(self) -> dict[str, Any]:
        """What is held and claimed, as plain values that compare equal when nothing has changed."""
        return {
            "resources": dict(self.resources),
            "riders": dict(self.riders),
            "absent": {resource_id: set(cpus) for resource_id, cpus in self.absent.items()},
            "claims": {claim_id: record.state for claim_id, record in self.claims.items()},
            "sessions": {session_id: list(claims) for session_id, claims in self.sessions.items()},
            "pools": {pool: counts.dump() for pool, counts in self.pools.items()},
            "vcpus": {
                vcpu: {pool: counts.dump() for pool, counts in pools.items()} for vcpu, pools in self.vcpus.items()
            },
        }


def is_shareable(claim: Claim) -> bool:
    """Whether others may ride on its slots: not on those that its owner arms, or that are only held."""
    return claim.armed_by is ArmedBy.DAEMON and claim.mode.delivery is not Delivery.HOLD


def _what(resource: Resource) -> Hashable:
    """What has to be equal for two claims to share a slot."""
    mode = resource.mode
    seen = mode.user, mode.kernel, mode.delivery, mode.user_chain, mode.kernel_chain
    return resource.target, resource.piece, seen, mode.across_exec, mode.fuse_hits
