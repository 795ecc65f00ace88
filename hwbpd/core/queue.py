"""
Who waits, in which order, and whom they hold up.

Those who wait hold nothing. They stand by rank, the highest first, and among equals in the order in which they asked;
one that gave way later stands where it would have stood from the start. Some wait for things that have nothing to do
with each other, so the order alone would hold up many for nothing. The rule:

    W holds up N  iff  W stands before N, and on some CPU and task on which both would count, what is held
                       there, N's slots and W's slots of one pool together are more than there may be.

There may be what the pool has, less the reserve, which kgdb alone may use. "Some task" is any at all, those without
slots included; a CPU-wide claim counts for each of them, a claim for a task for that one. Of any one task on one CPU
the slots just add up, so this follows by itself:

1. Where a claim was granted past W, W's own slots still had room beside it. Whoever takes that room later stands
   before W, as the next one past it must leave it again.
2. Equals that want the same slots in the same number are granted in the order in which they asked: with room for the
   later and not for both, the rule holds the later up; without room for the later, there is none for the earlier.
3. Claims that never count on the same CPU for the same task do not hold each other up.
4. A grant releases nobody: who was held up by W finds W's slots held instead. So whoever waits needs to be looked at
   again only when room comes back, or somebody leaves the queue without taking room, on a target that meets its own.

We decided against the sum over all who wait ahead: it would leave room unused for claims that could never be armed at
the same time. The price is the second half of 1: W and an earlier one may both leave room to N, and then not both fit.

Those with the same target, pools and rank are one group, of which only the first is looked at. A claim for a thread
looks at groups for that thread, its process, and whole CPUs. One for a whole CPU concerns every group; it looks at them
from the first until one holds it up, and at none that is for a thread where even the busiest leaves room for both. Who
waits for a vCPU is in nobody's way but those who wait for the same one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush, merge

from hwbpd.core.admission import full_places
from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.model import CLASS, Claim, Kind, Piece, Plan, Pool, Process, Rank, Target, Task, Vcpu

_Footprint = tuple[Target, tuple[Pool, ...], Rank]
_Place = tuple[int, int, int]  # in the queue, the least first


class _Group:
    """Those who wait for the same, in order."""

    __slots__ = ("claim_ids", "first", "pieces", "rank", "target")

    def __init__(self, target: Target, pieces: Counter[Pool], rank: Rank) -> None:
        self.target = target
        self.pieces = pieces
        self.rank = rank
        self.claim_ids: list[int] = []  # ascending
        self.first: _Place = (0, 0, 0)  # the place of the first of them

    def before(self, place: _Place) -> int:
        """How many of them stand before that place."""
        rank = -place[0], -place[1]
        if self.rank != rank:
            return len(self.claim_ids) if self.rank > rank else 0
        return bisect_left(self.claim_ids, place[2])


_Row = list[tuple[_Place, _Group]]  # groups by their first; no two have the same place, so groups are never compared


class Queue:
    """
    The queue of one arbiter. It keeps the records it was given and changes none.

    ``len``, ``in`` (a claim id) and iteration (the records, in order) are those of everybody in it.
    """

    def __init__(self) -> None:
        self._records: dict[int, ClaimRecord] = {}
        self._groups: dict[_Footprint, _Group] = {}
        self._all: _Row = []  # of the host
        self._of: dict[Task | Process | Vcpu | None, _Row] = {}  # by whom they are for, vCPUs too; None: whole CPUs
        self._threads: dict[Process, dict[Task, None]] = {}  # per process: those of its threads that are keys of _of
        self._sizes: Counter[tuple[Pool, int]] = Counter()  # groups not for whole CPUs, by how much of a pool they want
        self._wanting: dict[tuple[Target, Piece], dict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, claim_id: int) -> bool:
        return claim_id in self._records

    def __iter__(self) -> Iterator[ClaimRecord]:
        return iter(_in_order(self._records.values()))

    def add(self, record: ClaimRecord) -> None:
        """Give a claim its place; the same one again if it had one before."""
        claim = record.claim
        assert claim.claim_id not in self._records, f"claim {claim.claim_id} waits already"
        self._records[claim.claim_id] = record
        for piece in record.plan.pieces:
            self._wanting.setdefault((claim.target, piece), {})[claim.claim_id] = None
        footprint = _footprint(record)
        group = self._groups.get(footprint)
        if group is None:
            group = self._groups[footprint] = _Group(claim.target, _pieces(record.plan), claim.rank)
            if _is_for_a_thread(claim.target):
                self._sizes.update(group.pieces.items())
        else:
            self._take_out(group)
        insort(group.claim_ids, claim.claim_id)
        self._put_in(group)

    def remove(self, claim_id: int) -> None:
        """Take a claim out: it is being armed, or it gave up."""
        record = self._records.pop(claim_id)
        for wanted in {(record.claim.target, piece) for piece in record.plan.pieces}:
            del self._wanting[wanted][claim_id]
            if not self._wanting[wanted]:
                del self._wanting[wanted]
        footprint = _footprint(record)
        group = self._groups[footprint]
        self._take_out(group)
        del group.claim_ids[bisect_left(group.claim_ids, claim_id)]
        if group.claim_ids:
            self._put_in(group)
            return
        del self._groups[footprint]
        if _is_for_a_thread(group.target):
            self._sizes -= Counter(group.pieces.items())  # which also forgets what nobody wants any more

    def _put_in(self, group: _Group) -> None:
        """List a group by its first."""
        group.first = _place(group.rank, group.claim_ids[0])
        whose = group.target.whose
        if isinstance(whose, Task) and whose.process is not None:
            self._threads.setdefault(whose.process, {})[whose] = None
        self._of.setdefault(whose, [])
        for row in self._rows(group):
            insort(row, (group.first, group))

    def _take_out(self, group: _Group) -> None:
        whose = group.target.whose
        for row in self._rows(group):
            del row[bisect_left(row, (group.first, group))]
        if self._of[whose]:
            return
        del self._of[whose]
        if isinstance(whose, Task) and whose.process is not None:
            del self._threads[whose.process][whose]
            if not self._threads[whose.process]:
                del self._threads[whose.process]

    def _rows(self, group: _Group) -> tuple[_Row, ...]:
        own = self._of[group.target.whose]
        return (own,) if group.target.vcpu is not None else (self._all, own)

    def blocker(
        self, books: Books, target: Target, plan: Plan, rank: Rank, claim_id: int, reserve: int = 0
    ) -> ClaimRecord | None:
        """
        Return the first who holds up ``plan`` on ``target``, or None; change nothing.

        :param claim_id: of the claim that asks, which may itself be in the queue.
        :param reserve: slots to be left free on each CPU beside those who wait, unless they are kgdb.
        """
        place, pieces = _place(rank, claim_id), _pieces(plan)
        for group in self._meeting(target, spare=self._room_beside_any_thread(books, target, pieces, reserve)):
            if group.first >= place:
                break
            if _too_many(books, target, pieces, group, reserve):
                return self._records[group.claim_ids[0]]
        return None

    def candidates(self, target: Target | None) -> Iterator[ClaimRecord]:
        """
        Who may profit from room on ``target`` (None: anywhere), in the order of the queue.

        Of each group the first. If that has left the queue when the next is asked for, the one behind it has its turn,
        too; otherwise its group has had it, as none of them needs less. Claims may be added meanwhile, and need not
        have a turn.
        """
        groups = self._groups.values() if target is None else self._meeting(target)
        due = [(group.first, number, group) for number, group in enumerate(groups)]
        heapify(due)
        while due:
            place, number, group = heappop(due)
            if not group.claim_ids:
                continue
            if group.first == place:
                claim_id = group.claim_ids[0]
                yield self._records[claim_id]
                if claim_id in self._records or not group.claim_ids:
                    continue
            heappush(due, (group.first, number, group))

    def wanting(self, target: Target, piece: Piece) -> list[ClaimRecord]:
        """
        Return those who wait for that very piece on that very target, in the order of the queue.

        Once it is armed they may share it, whoever stands before them, as that takes no room.
        """
        return _in_order(self._records[claim_id] for claim_id in self._wanting.get((target, piece), ()))

    def among(self, claim_ids: Iterable[int]) -> list[ClaimRecord]:
        """Return those of these claims that are in the queue, in its order."""
        return _in_order(self._records[claim_id] for claim_id in claim_ids if claim_id in self._records)

    def position(self, claim_id: int) -> int:
        """
        Return its place, from 1, among those who wait for slots of the same pools on targets that meet its own.

        CPUs that are offline count here: when they are back, so are those who wait for them.
        """
        record = self._records[claim_id]
        place, pieces = _place(record.claim.rank, claim_id), _pieces(record.plan)
        rivals = (group for group in self._meeting(record.claim.target) if pieces.keys() & group.pieces.keys())
        return 1 + sum(group.before(place) for group in rivals)

    def _meeting(self, target: Target, spare: bool = False) -> Iterator[_Group]:
        """
        The groups with which a claim on ``target`` could count on one CPU for one task, the first before the others.

        With ``spare`` only those for whole CPUs.
        """
        keys: list[Task | Process | Vcpu | None] = [None]
        if target.vcpu is not None:
            keys = [target.vcpu]
        elif target.process is not None:
            keys += [target.process, *self._threads.get(target.process, ())]
        elif target.task is not None:
            keys += [target.task] if target.task.process is None else [target.task, target.task.process]
        if target.is_cpu_wide and not spare:
            within: Iterable[tuple[_Place, _Group]] = self._all
        else:
            within = merge(*(self._of[key] for key in keys if key in self._of))
        for _, group in within:
            if target.cpus is None or group.target.cpus is None or not set(target.cpus).isdisjoint(group.target.cpus):
                yield group

    def _room_beside_any_thread(self, books: Books, target: Target, pieces: Counter[Pool], reserve: int) -> bool:
        """
        Whether one look tells that nobody who waits for a thread or a process holds up a claim for whole CPUs.

        That is so where even the busiest task would have room for the most that any of them wants.
        """
        if not target.is_cpu_wide:
            return False
        for pool, wanted in pieces.items():
            most = max((size for of_pool, size in self._sizes if of_pool is pool), default=0)
            if most and any(full_places(books.pools[pool], target, wanted + most + reserve)):
                return False
        return True


def _too_many(books: Books, target: Target, pieces: Counter[Pool], group: _Group, reserve: int) -> bool:
    """Whether there is a place for both, without room for both."""
    meet = _meet(books, target, group.target)
    # A claim for a task counts on every CPU there is, one for all CPUs only where it is armed.
    only_online = any(one.is_cpu_wide and one.cpus is None for one in (target, group.target))
    if group.rank[0] == CLASS[Kind.KGDB]:
        reserve = 0
    for pool in pieces.keys() & group.pieces.keys():
        counts = books.counts(pool, meet)
        wanted = pieces[pool] + group.pieces[pool] + reserve
        if any(not only_online or cpu in books.online for cpu, _ in full_places(counts, meet, wanted)):
            return True
    return False


def _meet(books: Books, one: Target, other: Target) -> Target:
    """Where two targets of ``_meeting`` groups both count, but for CPUs that are offline."""
    if one.cpus is None or other.cpus is None:
        cpus = other.cpus if one.cpus is None else one.cpus
    else:
        cpus = tuple(cpu for cpu in one.cpus if cpu in other.cpus)
    task = one.task or other.task
    return Target(task, cpus, None if task is not None else one.process or other.process, one.vcpu)


def _in_order(records: Iterable[ClaimRecord]) -> list[ClaimRecord]:
    return sorted(records, key=lambda one: _place(one.claim.rank, one.claim.claim_id))


def _place(rank: Rank, claim_id: int) -> _Place:
    return -rank[0], -rank[1], claim_id


def _is_for_a_thread(target: Target) -> bool:
    return target.task is not None or target.process is not None


def _pieces(plan: Plan) -> Counter[Pool]:
    return Counter(piece.pool for piece in plan.pieces)


def _footprint(record: ClaimRecord) -> _Footprint:
    claim: Claim = record.claim
    return claim.target, tuple(sorted(piece.pool for piece in record.plan.pieces)), claim.rank
