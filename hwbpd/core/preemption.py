"""
Who has to give way, so that a claim fits that does not fit now.

1. Only those give way whom the claim may displace, and whose slots we can take back. Both are for the caller to say.
2. A slot comes free when everybody who rides on it gives way; one who gives way gives up all its slots.
3. The fewest give way. Among equally many it is the set without the oldest of those in which two sets differ: who came
   first is spared first. Ages are claim ids.

Which places lack room, and how much of it, is admission's arithmetic; to suspend a claim only takes slots away, so no
other place comes to lack any. What is left is a covering problem: from each place with k slots too few, k have to come
free. A set of claims is one integer with a bit for each, the oldest's the highest, so that of two sets of one size the
better is the smaller number. The search is branch and bound; the books are read once, before it, and never touched.

Covering is hard in general, and a peer chooses the problem. So the search ends after ``LOOKS_MOST`` looks at a place,
with the best set found: within that bound the answer is exact, beyond it only enough, with nobody in it who could be
spared alone. It starts from a greedy set: place by place the slots that cost fewest claims for the places they serve;
then everybody is spared, the oldest first, who is not needed after all. What shares nothing is searched apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from msgspec import Struct

from hwbpd.core.admission import check_cpus, full_places, kept_free
from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.counts import PoolBooks
from hwbpd.core.model import Claim, Plan, Pool, Target, Task

LOOKS_MOST = 5_000  # at a place, in one search; some 10 ms

_Claims = int  # a set of them, a bit for each


class _Place(Struct, frozen=True):
    """A place without room: so many slots too few, and the riders of each that could come free there."""

    lacking: int
    slots: tuple[_Claims, ...]

    def lacks(self, displaced: _Claims) -> int:
        """How many slots are too few there when these have given way; no more than 0 when it has room."""
        return self.lacking - sum(not riders & ~displaced for riders in self.slots)


def victims(
    books: Books,
    target: Target,
    plan: Plan,
    reserve: int,
    may_displace: Callable[[Claim], bool],
    is_ours: Callable[[ClaimRecord], bool],
) -> tuple[int, ...] | None:
    """
    Return who must give way so that ``plan`` on ``target`` fits and leaves the reserve; change nothing.

    :param reserve: slots to be left free per CPU and pool, as for ``admission.check_reserve``.
    :param may_displace: whether the claim outranks that one, and its owner has the right.
    :param is_ours: whether we can take back what that one holds, as it stands now.
    :return: claim ids, ascending; () if it fits already; None if it would not fit even without all of them.
    :raises CpuOffline: for a target that nothing can be armed on, whoever gives way.
    """
    check_cpus(books, target)
    allowed: dict[int, bool] = {}

    def gives_way(claim: Claim) -> bool:
        if claim.claim_id not in allowed:
            allowed[claim.claim_id] = may_displace(claim) and is_ours(books.claims[claim.claim_id])
        return allowed[claim.claim_id]

    places: list[tuple[int, list[tuple[Claim, ...]]]] = []
    for lacking, resource_ids in _without_room(books, target, plan, reserve):
        ridden = (books.riders[resource_id] for resource_id in resource_ids)
        free = [riders for riders in ridden if riders and all(map(gives_way, riders))]
        if len(free) < lacking:
            return None
        places.append((lacking, free))

    youngest_first = sorted((claim_id for claim_id, may in allowed.items() if may), reverse=True)
    bit = {claim_id: 1 << age for age, claim_id in enumerate(youngest_first)}
    chosen = _choose(
        _Place(lacking, tuple(sum(bit[claim_id] for claim_id in {one.claim_id for one in riders}) for riders in free))
        for lacking, free in places
    )
    return tuple(sorted(youngest_first[age] for age in _bits(chosen)))


def _without_room(books: Books, target: Target, plan: Plan, reserve: int) -> Iterator[tuple[int, list[int]]]:
    """Each place where the plan lacks room: how many slots are too few, and the resources that count there."""
    for pool, pieces in Counter(piece.pool for piece in plan.pieces).items():
        counts = books.counts(pool, target)
        seen = set()
        for cpu, only in full_places(counts, target, pieces, reserve):
            wanted = pieces + kept_free(counts, reserve, cpu)
            for task in _tasks_in_the_way(counts, cpu, wanted) if only is None else (only,):
                if (cpu, task) not in seen:
                    seen.add((cpu, task))
                    yield _lacking(books, pool, target, cpu, task, wanted)


def _tasks_in_the_way(counts: PoolBooks, cpu: int, wanted: int) -> Iterator[Task | None]:
    """The tasks whose slots and the CPU-wide ones together are too many there, or None if it takes no task for that."""
    above = counts.slots_on(cpu) - wanted - counts.held_cpu_wide(cpu)
    if above < 0:
        yield None
    for process in counts.process.above(above):
        yield Task(tid=0, start_ticks=0, process=process)  # stands for its threads without slots of their own
    yield from counts.busy_tasks(cpu, above)


def _lacking(
    books: Books, pool: Pool, target: Target, cpu: int, task: Task | None, wanted: int
) -> tuple[int, list[int]]:
    counts = books.counts(pool, target)
    held = counts.held_cpu_wide(cpu)
    vcpu = target.vcpu
    resource_ids = books.cpu_wide_on(cpu, pool) if vcpu is None else books.of_whole(vcpu, pool)
    if task is not None:
        held += counts.held_by_task(task, cpu)
        resource_ids += books.of_task(task, cpu, pool)
    return held + wanted - counts.slots_on(cpu), resource_ids


# --- the covering problem --------------------------------------------------------------------------------------------


def _choose(places: Iterable[_Place]) -> _Claims:
    """The best set after which no place lacks anything; each can be helped."""
    chosen = 0
    looks_left = LOOKS_MOST
    for together in _apart(places):
        best = _greedy(together)
        best, looks_left = _search(together, best, looks_left)
        chosen |= best
    return chosen


def _apart(places: Iterable[_Place]) -> Iterator[list[_Place]]:
    """The places in groups that have no claim in common."""
    parts: dict[int, list[_Place]] = {}  # by their number
    part_of: dict[int, int] = {}  # claim -> number
    for number, place in enumerate(dict.fromkeys(places)):
        ages = set(_bits(_union(place.slots)))
        joined = sorted({part_of[age] for age in ages if age in part_of}, key=lambda one: len(parts[one]))
        part = joined.pop() if joined else number
        together = parts.setdefault(part, [])
        for other in joined:
            for moved in parts[other]:
                ages.update(_bits(_union(moved.slots)))
            together += parts.pop(other)
        together.append(place)
        part_of.update(dict.fromkeys(ages, part))
    yield from parts.values()


def _greedy(places: Sequence[_Place]) -> _Claims:
    """A set after which no place lacks anything, and of which nobody can be spared alone."""
    serves = Counter(riders for place in places for riders in place.slots)
    chosen = 0
    for place in places:
        while place.lacks(chosen) > 0:
            held = [riders for riders in place.slots if riders & ~chosen]
            chosen |= min(held, key=lambda riders: ((riders & ~chosen).bit_count() / serves[riders], riders))
    at: dict[int, list[_Place]] = {}
    for place in places:
        for age in _bits(_union(place.slots) & chosen):
            at.setdefault(age, []).append(place)
    for age in sorted(at, reverse=True):
        without = chosen & ~(1 << age)
        if all(place.lacks(without) <= 0 for place in at[age]):
            chosen = without
    return chosen


def _search(places: Sequence[_Place], best: _Claims, looks_left: int) -> tuple[_Claims, int]:
    """
    Return the best set there is, or the best that was found before there were no looks left.

    A branch has some claims in, and some slots that stay held. It parts at the place with least choice: one of the
    slots there has to come free, and in the branch where it is the n-th those before it stay held.
    """
    branches: list[tuple[_Claims, frozenset[_Claims]]] = [(0, frozenset())]
    while branches and looks_left > 0:
        chosen, kept = branches.pop()
        looks_left -= len(places)
        choices = _least_choice(places, chosen, kept, best)
        if choices is None:
            continue
        if not choices:
            best = chosen
            continue
        ahead = [(chosen | riders, kept | set(choices[:number])) for number, riders in enumerate(choices)]
        branches += reversed(ahead)  # the first is looked into first
    return best, looks_left


def _least_choice(
    places: Sequence[_Place], chosen: _Claims, kept: frozenset[_Claims], best: _Claims
) -> list[_Claims] | None:
    """
    The slots of which one has to come free, fewest new riders first; [] if all is well; None if nothing better follows.

    The bound: each place that lacks k slots needs at least as many more claims as one claim's slots go into k, and as
    the least slot has riders; of places without a claim in common that adds up, and so do their youngest claims.
    """
    choices: list[_Claims] = []
    size, least, counted = chosen.bit_count(), chosen, 0
    for place in places:
        lacks = place.lacks(chosen)
        if lacks <= 0:
            continue
        free = [riders & ~chosen for riders in place.slots if riders & ~chosen and riders not in kept]
        if len(free) < lacks:
            return None
        distinct = {riders for riders in place.slots if riders & ~chosen and riders not in kept}
        if not choices or len(distinct) < len(choices):
            choices = list(distinct)
        concerned = _union(free)
        if not concerned & counted:
            counted |= concerned
            most = max(sum(riders >> age & 1 for riders in free) for age in _bits(concerned))
            more = max(-(-lacks // most), min(riders.bit_count() for riders in free))
            size += more
            least |= sum(1 << age for age in islice(_bits(concerned), more))
    if (size, least) >= (best.bit_count(), best):
        return None
    return sorted(choices, key=lambda riders: ((riders & ~chosen).bit_count(), riders))


def _union(sets: Iterable[_Claims]) -> _Claims:
    union = 0
    for one in sets:
        union |= one
    return union


def _bits(claims: _Claims) -> Iterator[int]:
    """The numbers of those in a set, the youngest first."""
    while claims:
        lowest = claims & -claims
        yield lowest.bit_length() - 1
        claims ^= lowest
