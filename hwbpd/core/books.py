"""
The one mutable object of the core: who holds what.

It keeps every claim and every held slot, and, per pool, the counts that the kernel's admission rule needs, arranged so
that nobody pays for what is not involved:

- C, the CPU-wide slots of a CPU: a count per CPU that has some, and one offset for all online CPUs;
- T, the slots of a task: one count for wherever it runs, and counts per CPU only for tasks that have CPU-bound ones;
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
from hwbpd.core.model import Claim, Plan, Pool, Resource, Target, Task
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
        self.cpu_wide: Buckets[int] = Buckets()  # and those of single CPUs beside them
        self.anywhere: Buckets[Task] = Buckets()  # per task: slots that follow it wherever it runs
        self.bound: dict[Task, dict[int, int]] = {}  # per task: slots for single CPUs beside them
        self.on_cpu: dict[int, Buckets[Task]] = {}  # per CPU: tasks bound there, by all that counts for them there

    def held_cpu_wide(self, cpu: int) -> int:
        """C(cpu)."""
        return self.cpu_wide[cpu] + (self.everywhere if cpu in self.online else 0)

    def held_by_task(self, task: Task, cpu: int) -> int:
        """T(task, cpu)."""
        bound = self.bound.get(task)
        return self.anywhere[task] + (bound.get(cpu, 0) if bound else 0)

    def held_by_busiest(self, cpu: int) -> int:
        """The greatest T(task, cpu) of any task."""
        on_cpu = self.on_cpu.get(cpu)
        return max(self.anywhere.greatest(), on_cpu.greatest() if on_cpu else 0)

    def busy_tasks(self, cpu: int, above: int) -> Iterable[Task]:
        """The tasks for which T(task, cpu) is greater than ``above``, each once."""
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
        if target.task is None:
            if target.cpus is None:
                self.everywhere += slots
            else:
                for cpu in target.cpus:
                    self.cpu_wide.set(cpu, self.cpu_wide[cpu] + slots)
        elif target.cpus is None:
            self.anywhere.set(target.task, self.anywhere[target.task] + slots)
            self._recount(target.task, tuple(self.bound.get(target.task, ())))
        else:
            bound = self.bound.setdefault(target.task, {})
            for cpu in target.cpus:
                bound[cpu] = bound.get(cpu, 0) + slots
            self._recount(target.task, target.cpus)

    def _recount(self, task: Task, cpus: Iterable[int]) -> None:
        """Bring ``on_cpu`` in line with what ``task`` holds on ``cpus``; forget CPUs where it is bound no more."""
        bound = self.bound.get(task)
        if bound is None:
            return
        for cpu in cpus:
            on_cpu = self.on_cpu.setdefault(cpu, Buckets())
            if bound[cpu]:
                on_cpu.set(task, self.anywhere[task] + bound[cpu])
            else:
                del bound[cpu]
                on_cpu.set(task, 0)
                if not len(on_cpu):
                    del self.on_cpu[cpu]
        if not bound:
            del self.bound[task]

    def dump(self) -> dict[str, Any]:
        """Everything, as plain values that compare equal when nothing has changed."""
        return {
            "everywhere": self.everywhere,
            "cpu_wide": self.cpu_wide.as_dict(),
            "anywhere": self.anywhere.as_dict(),
            "bound": {task: dict(cpus) for task, cpus in self.bound.items()},
            "on_cpu": {cpu: tasks.as_dict() for cpu, tasks in self.on_cpu.items()},
        }


class ClaimRecord:
    """A claim in the books: what was asked, where it stands, and its story."""

    __slots__ = ("claim", "hits", "lost", "plan", "resource_ids", "state", "story")

    def __init__(self, claim: Claim, plan: Plan) -> None:
        self.claim = claim
        self.plan = plan
        self.state = State.REQUESTED
        self.resource_ids: tuple[int, ...] = ()
        self.story = Story()
        self.hits = 0  # reported so far
        self.lost = 0  # of these, in rings


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
        self._of_task: dict[Task, dict[int, None]] = {}

    # --- held slots --------------------------------------------------------------------------------------------------

    def take(self, resource: Resource, *riders: Claim) -> None:
        """Count a slot as held. The caller has asked ``admission.fits``."""
        assert resource.resource_id not in self.resources
        self.resources[resource.resource_id] = resource
        self.riders[resource.resource_id] = riders
        self.pools[resource.piece.pool].add(resource.target, 1)
        for place in self._places(resource.target):
            place[resource.resource_id] = None

    def give_back(self, resource_id: int) -> None:
        """Count it as free again."""
        resource = self.resources.pop(resource_id)
        del self.riders[resource_id]
        self.pools[resource.piece.pool].add(resource.target, -1)
        for place in self._places(resource.target):
            del place[resource_id]
        task = resource.target.task
        if task is not None and not self._of_task[task]:
            del self._of_task[task]

    def _places(self, target: Target) -> Iterable[dict[int, None]]:
        if target.task is not None:
            return (self._of_task.setdefault(target.task, {}),)
        if target.cpus is None:
            return (self._everywhere,)
        return tuple(self._on_cpu.setdefault(cpu, {}) for cpu in target.cpus)

    def cpu_wide_on(self, cpu: int, pool: Pool) -> list[int]:
        """The resources that are CPU-wide on that CPU."""
        return [
            resource_id
            for resource_id in (*self._everywhere, *self._on_cpu.get(cpu, ()))
            if self.resources[resource_id].piece.pool is pool
        ]

    def of_task(self, task: Task, cpu: int, pool: Pool) -> list[int]:
        """The resources of a task that count on that CPU."""
        found = []
        for resource_id in self._of_task.get(task, ()):
            resource = self.resources[resource_id]
            if resource.piece.pool is pool and (resource.target.cpus is None or cpu in resource.target.cpus):
                found.append(resource_id)
        return found

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
            of_session = self.sessions[claim.owner.session_id]
            del of_session[claim.claim_id]
            if not of_session:
                del self.sessions[claim.owner.session_id]
        self.ended[claim.claim_id] = record
        self._ended_order.append(claim.claim_id)
        if len(self._ended_order) > ENDED_KEPT:
            del self.ended[self._ended_order.popleft()]

    def dump(self) -> dict[str, Any]:
        """What is held and claimed, as plain values that compare equal when nothing has changed."""
        return {
            "resources": dict(self.resources),
            "riders": dict(self.riders),
            "claims": {claim_id: record.state for claim_id, record in self.claims.items()},
            "sessions": {session_id: list(claims) for session_id, claims in self.sessions.items()},
            "pools": {pool: counts.dump() for pool, counts in self.pools.items()},
        }
