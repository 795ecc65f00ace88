"""
The one mutable object of the core: who holds what.

It keeps every claim and every held slot, and, per pool, the counts that the kernel's admission rule needs, arranged so
that nobody pays for what is not involved:

- C, the CPU-wide slots of a CPU: a count per CPU that has some, and one offset for all online CPUs;
- T, the slots of a task: one count for wherever it runs, and counts per CPU only for tasks that have CPU-bound ones; a
  process is one count for all its threads, however many there are;
- each of them also in buckets by value, so that the greatest is found in as many looks as a CPU has slots.

Linux keeps the same counts since commit ecdfb8896f2a ("perf/hw_breakpoint: Optimize toggle_bp_slot() for
CPU-independent task targets") (in v6.1), with per-CPU copies where we have the offset. We decided against
its per-CPU histograms of bound tasks on every possible CPU: a task with one bound claim would touch all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from hwbpd.core.lifecycle import ENDED, State
from hwbpd.core.model import ArmedBy, Claim, Delivery, Piece, Plan, Pool, Process, Resource, Target, Task
from hwbpd.core.story import Story

K = TypeVar("K", bound=Hashable)

ENDED_KEPT = 1000  # claims that are over, kept to answer "why?"


class Buckets(Generic[K]):
    """Keys by a small count: what ``dict[K, int]`` holds, and who has the greatest, both at once."""

    def __init__(self) -> None:
        self._count: dict[K, int] = {}
        self._having: list[dict[K, None]] = [{}]  # _having[n]: the keys with count n, for n >= 1, in order of arrival

    def __getitem__(self, key: K) -> int:
        return self._count.get(key, 0)

    def __len__(self) -> int:
        return len(self._count)

    def keys(self) -> Iterable[K]:
        return self._count.keys()

    def set(self, key: K, count: int) -> None:
        """Give ``key`` that count; nought forgets it."""
        before = self._count.get(key, 0)
        if before:
            del self._having[before][key]
        if count:
            while len(self._having) <= count:
                self._having.append({})
            self._count[key] = count
            self._having[count][key] = None
        elif before:
            del self._count[key]

    def greatest(self) -> int:
        """The greatest count, or 0."""
        for count in range(len(self._having) - 1, 0, -1):
            if self._having[count]:
                return count
        return 0

    def above(self, count: int) -> Iterable[K]:
        """The keys whose count is greater, the greatest counts first."""
        for level in range(len(self._having) - 1, max(count, 0), -1):
            yield from self._having[level]

    def as_dict(self) -> dict[K, int]:
        return dict(self._count)


class PoolBooks:
    """The counts of one pool."""

    def __init__(self, slots: int, online: set[int]) -> None:
        self.slots = slots
        self.online = online  # shared with the other pools
        self.everywhere = 0  # CPU-wide slots on each online CPU
        self.not_on: dict[int, int] = {}  # online CPUs that some of these have not come back to
        self.cpu_wide: Buckets[int] = Buckets()  # and those of single CPUs beside them
        self.process: Buckets[Process] = Buckets()  # per process: slots that each of its threads has
        self.own: dict[Task, int] = {}  # per task: slots of its own that follow it wherever it runs
        self.bound: dict[Task, dict[int, int]] = {}  # per task: slots for single CPUs beside them
        self.anywhere: Buckets[Task] = Buckets()  # tasks with slots of their own, by own and process's together
        self.on_cpu: dict[int, Buckets[Task]] = {}  # per CPU: tasks bound there, by all that counts for them there
        self.threads: dict[Process, dict[Task, None]] = {}  # per process: those of its tasks with slots of their own

    def held_cpu_wide(self, cpu: int) -> int:
        """C(cpu)."""
        everywhere = self.everywhere - self.not_on.get(cpu, 0) if cpu in self.online else 0
        return self.cpu_wide[cpu] + everywhere

    def most_cpu_wide(self) -> int:
        """A CPU with the greatest C(cpu)."""
        if self.not_on:
            return max({*self.cpu_wide.keys(), *self.online}, key=self.held_cpu_wide)
        return next(iter(self.cpu_wide.above(0)), next(iter(self.online)))

    def held_anywhere(self, task: Task) -> int:
        """What follows a task wherever it runs."""
        return self.own.get(task, 0) + (self.process[task.process] if task.process is not None else 0)

    def held_by_task(self, task: Task, cpu: int) -> int:
        """T(task, cpu)."""
        bound = self.bound.get(task)
        return self.held_anywhere(task) + (bound.get(cpu, 0) if bound else 0)

    def held_by_busiest(self, cpu: int) -> int:
        """The greatest T(task, cpu) of any task."""
        on_cpu = self.on_cpu.get(cpu)
        return max(self.anywhere.greatest(), self.process.greatest(), on_cpu.greatest() if on_cpu else 0)

    def busy_tasks(self, cpu: int, above: int) -> Iterable[Task]:
        """The tasks with slots of their own for which T(task, cpu) is greater than ``above``, each once."""
        seen = set()
        on_cpu = self.on_cpu.get(cpu)
        for task in on_cpu.above(above) if on_cpu else ():
            seen.add(task)
            yield task
        for task in self.anywhere.above(above):
            if task not in seen:
                yield task

    def add(self, target: Target, slots: int) -> None:
        """Count ``slots`` more (or fewer, below 0) for ``target``."""
        if target.process is not None:
            self.process.set(target.process, self.process[target.process] + slots)
            for task in tuple(self.threads.get(target.process, ())):
                self._recount(task, tuple(self.bound.get(task, ())))
        elif target.task is not None:
            if target.cpus is None:
                self.own[target.task] = self.own.get(target.task, 0) + slots
            else:
                bound = self.bound.setdefault(target.task, {})
                for cpu in target.cpus:
                    bound[cpu] = bound.get(cpu, 0) + slots
            self._recount(target.task, tuple(self.bound.get(target.task, ())))
        elif target.cpus is None:
            self.everywhere += slots
        else:
            for cpu in target.cpus:
                self.cpu_wide.set(cpu, self.cpu_wide[cpu] + slots)

    def _recount(self, task: Task, cpus: Iterable[int]) -> None:
        """Bring the buckets in line with what ``task`` holds; forget what it holds no more."""
        bound = self.bound.get(task, {})
        for cpu in cpus:
            on_cpu = self.on_cpu.setdefault(cpu, Buckets())
            if bound[cpu]:
                on_cpu.set(task, self.held_anywhere(task) + bound[cpu])
                continue
            del bound[cpu]
            on_cpu.set(task, 0)
            if not len(on_cpu):
                del self.on_cpu[cpu]
        if not bound:
            self.bound.pop(task, None)
        if not self.own.get(task):
            self.own.pop(task, None)
        has_own = task in self.own or task in self.bound
        self.anywhere.set(task, self.held_anywhere(task) if has_own else 0)
        if task.process is None:
            return
        if has_own:
            self.threads.setdefault(task.process, {})[task] = None
        elif task in self.threads.get(task.process, ()):
            del self.threads[task.process][task]
            if not self.threads[task.process]:
                del self.threads[task.process]

    def dump(self) -> dict[str, Any]:
        """Everything, as plain values that compare equal when nothing has changed."""
        return {
            "everywhere": self.everywhere,
            "not_on": dict(self.not_on),
            "cpu_wide": self.cpu_wide.as_dict(),
            "process": self.process.as_dict(),
            "own": dict(self.own),
            "bound": {task: dict(cpus) for task, cpus in self.bound.items()},
            "anywhere": self.anywhere.as_dict(),
            "on_cpu": {cpu: tasks.as_dict() for cpu, tasks in self.on_cpu.items()},
            "threads": {process: set(tasks) for process, tasks in self.threads.items()},
        }


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
    """Who holds what. Only the arbiter changes it."""

    def __init__(self, slots: Mapping[Pool, int], possible: Iterable[int], online: Iterable[int]) -> None:
        self.possible = frozenset(possible)
        self.online = set(online)
        self.pools = {pool: PoolBooks(count, self.online) for pool, count in slots.items()}
        self.resources: dict[int, Resource] = {}
        self.riders: dict[int, tuple[Claim, ...]] = {}  # per resource
        self.claims: dict[int, ClaimRecord] = {}  # those not over
        self.sessions: dict[int, dict[int, None]] = {}  # per session: its claims, oldest first
        self.ended: dict[int, ClaimRecord] = {}  # the last ENDED_KEPT, oldest first
        self._ended_order: deque[int] = deque()
        self._on_cpu: dict[int, dict[int, None]] = {}  # CPU -> resources CPU-wide on it alone
        self._everywhere: dict[int, None] = {}  # resources CPU-wide on all
        self.absent: dict[int, set[int]] = {}  # per CPU-wide resource: online CPUs where it has no slot
        self._of: dict[Task | Process, dict[int, None]] = {}
        self._alike: dict[Hashable, dict[int, None]] = {}  # what may be shared -> resources that are that

    # --- held slots --------------------------------------------------------------------------------------------------

    def take(self, resource: Resource, *riders: Claim) -> None:
        """Count a slot as held. The caller has asked ``admission.fits``."""
        assert resource.resource_id not in self.resources
        self.resources[resource.resource_id] = resource
        self.riders[resource.resource_id] = riders
        self.pools[resource.piece.pool].add(resource.target, 1)
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
        self.pools[resource.piece.pool].add(resource.target, -1)
        for place in self._places(resource.target):
            del place[resource_id]
        whose = resource.target.task or resource.target.process
        if whose is not None and not self._of[whose]:
            del self._of[whose]

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
            counts.cpu_wide.set(cpu, counts.cpu_wide[cpu] + slots)
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
            counts.not_on.pop(cpu, None)

    def come_online(self, cpu: int) -> None:
        """A CPU is back, and nobody has a slot there yet."""
        self.online.add(cpu)
        for resource_id in self._everywhere:
            self.leave(resource_id, cpu)

    def _places(self, target: Target) -> Iterable[dict[int, None]]:
        whose = target.task or target.process
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

    def of_process(self, process: Process, pool: Pool) -> list[int]:
        """The resources of a whole process."""
        return [
            resource_id
            for resource_id in self._of.get(process, ())
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
        }


def is_shareable(claim: Claim) -> bool:
    """Whether others may ride on its slots: not on those that its owner arms, or that are only held."""
    return claim.armed_by is ArmedBy.DAEMON and claim.mode.delivery is not Delivery.HOLD


def _what(resource: Resource) -> Hashable:
    """What has to be equal for two claims to share a slot."""
    mode = resource.mode
    seen = mode.user, mode.kernel, mode.delivery, mode.user_chain, mode.kernel_chain
    return resource.target, resource.piece, seen, mode.across_exec, mode.fuse_hits
