"""
The queue against ``slow_queue``: at random, in every state of a small world, and what follows from its rule.

Whoever drives the queue here does what the arbiter does: a claim goes at once if it fits, leaves the reserve free and
nobody holds it up, and waits otherwise; when room comes back, or somebody stops waiting, the candidates are tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations_with_replacement, product
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from hwbpd.core import queue as queue_file
from hwbpd.core.admission import fits, full_places
from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.counts import PoolBooks
from hwbpd.core.errors import CpuOffline, NoFreeSlot
from hwbpd.core.model import CLASS, Delivery, Kind, Mode, Plan, Pool, Rank, Resource, Target, Task
from hwbpd.core.queue import Queue
from tests import strategies
from tests.slow_model import SlowBooks
from tests.slow_queue import SlowQueue, Waiter
from tests.strategies import World

T0, T1, T2 = (strategies.task(number) for number in range(3))  # T0 and T1 are of one process
P0 = T0.process
PERF: Rank = (CLASS[Kind.PERF], 0)
KINDS = (Kind.BACKGROUND, Kind.PERF, Kind.PERF, Kind.KGDB)


def one(pool: Pool = Pool.ANY, pieces: int = 1) -> Plan:
    return Plan((strategies.piece(pool),) * pieces)


def record(
    claim_id: int, target: Target, plan: Plan | None = None, kind: Kind = Kind.PERF, priority: int = 0
) -> ClaimRecord:
    claim = replace(strategies.claim(claim_id, strategies.owner(0), target, kind), priority=priority)
    return ClaimRecord(claim, one() if plan is None else plan)


def waiter(asking: ClaimRecord) -> Waiter:
    return Waiter(asking.claim.claim_id, asking.claim.target, asking.plan, asking.claim.rank)


class Ask(NamedTuple):
    """A new claim."""

    target: Target
    plan: Plan
    kind: Kind
    priority: int


class Leave(NamedTuple):
    """A claim is over: the ``nth``, modulo how many there are, those waiting included."""

    nth: int


class GiveWay(NamedTuple):
    """A claim that holds something goes back into the queue."""

    nth: int


Operation = Ask | Leave | GiveWay


class Hall:
    """The real queue and the slow one in one world, doing the same."""

    def __init__(self, world: World, reserve: int) -> None:
        self.reserve = reserve
        self.books = Books(world.slots, world.possible, world.online, world.slots_on)
        self.queue = Queue()
        slow = SlowBooks(world.slots, world.possible, world.online, world.slots_on)
        self.slow = SlowQueue(slow, world.tasks, reserve)
        self.claims: dict[int, ClaimRecord] = {}
        self.held: dict[int, list[int]] = {}  # claim -> its resources
        self._last_claim = 0
        self._last_resource = 0

    def play(self, operation: Operation) -> None:
        match operation:
            case Ask(target, plan, kind, priority):
                self._last_claim += 1
                asking = record(self._last_claim, target, plan, kind, priority)
                self.claims[asking.claim.claim_id] = asking
                if self.may_go(asking):
                    self.grant(asking)
                else:
                    self.wait(asking)
            case Leave(nth):
                if self.claims:
                    gone = self.claims.pop(sorted(self.claims)[nth % len(self.claims)])
                    if gone.claim.claim_id in self.queue:
                        self.stop_waiting(gone)
                    else:
                        self.give_back(gone)
                    self.try_those_behind(gone.claim.target)
            case GiveWay(nth):
                if self.held:
                    giving = self.claims[sorted(self.held)[nth % len(self.held)]]
                    self.give_back(giving)
                    self.wait(giving)
                    self.try_those_behind(giving.claim.target)

    def may_go(self, asking: ClaimRecord) -> bool:
        """Ask both; they agree, and asking has changed nothing."""
        claim, before, waiting = asking.claim, self.books.dump(), list(self.queue)
        blocker = self.queue.blocker(
            self.books, claim.target, asking.plan, claim.rank, claim.claim_id, self.reserve
        )
        assert (None if blocker is None else waiter(blocker)) == self.slow.blocker(waiter(asking))
        answer = blocker is None and self.has_room(asking)
        assert answer == self.slow.may_go(waiter(asking))
        assert (self.books.dump(), list(self.queue)) == (before, waiting)
        return answer

    def has_room(self, asking: ClaimRecord) -> bool:
        target = asking.claim.target
        try:
            fits(self.books, target, asking.plan)
        except (NoFreeSlot, CpuOffline):
            return False
        reserve = 0 if asking.claim.kind is Kind.KGDB else self.reserve
        pieces = Counter(piece.pool for piece in asking.plan.pieces)
        pools = {pool: self.books.pools[pool] for pool in pieces}
        return not any(
            list(full_places(counts, target, pieces[pool], reserve))
            for pool, counts in pools.items()
        )

    def grant(self, asking: ClaimRecord) -> None:
        ids = self.held[asking.claim.claim_id] = []
        for piece in asking.plan.pieces:
            self._last_resource += 1
            resource = Resource(self._last_resource, piece, asking.claim.target, Mode(delivery=Delivery.COUNT))
            self.books.take(resource, asking.claim)
            self.slow.books.take(resource)
            ids.append(resource.resource_id)
        # What the rule promises to those who stood before it: their own room is still there where it has taken some.
        for passed in self.slow.ahead_of(waiter(asking)):
            for place in self.slow.places():
                if self.slow.counts_on(asking.claim.target, *place):
                    self.still_has_room(passed, asking.plan, *place)

    def still_has_room(self, passed: Waiter, granted: Plan, cpu: int, task: Task) -> None:
        if not self.slow.counts_on(passed.target, cpu, task):
            return
        for pool in {piece.pool for piece in granted.pieces}:
            wanted = sum(piece.pool is pool for piece in passed.plan.pieces)
            held = self.books.pools[pool].held_cpu_wide(cpu) + self.books.pools[pool].held_by_task(task, cpu)
            assert not wanted or held + wanted <= self.slow.limit(passed.rank, cpu, pool)

    def give_back(self, giving: ClaimRecord) -> None:
        for resource_id in self.held.pop(giving.claim.claim_id):
            self.books.give_back(resource_id)
            self.slow.books.give_back(resource_id)

    def wait(self, asking: ClaimRecord) -> None:
        self.queue.add(asking)
        self.slow.waiting.append(waiter(asking))

    def stop_waiting(self, gone: ClaimRecord) -> None:
        self.queue.remove(gone.claim.claim_id)
        self.slow.waiting.remove(waiter(gone))

    def try_those_behind(self, target: Target) -> None:
        """Grant what may go now; then, as the slow one says who looks at everybody, nobody else may."""
        for tried in self.queue.candidates(target):
            if self.may_go(tried):
                first = next(one for one in self.slow.in_order() if self.slow.may_go(one))
                assert first == waiter(tried)
                self.stop_waiting(tried)
                self.grant(tried)
        assert [one for one in self.slow.in_order() if self.slow.may_go(one)] == []

    def check(self) -> None:
        """Who is in it, in which order and places."""
        waiting = self.slow.in_order()
        assert [waiter(one) for one in self.queue] == waiting
        assert len(self.queue) == len(waiting)
        assert {claim_id for claim_id in self.claims if claim_id in self.queue} == {one.claim_id for one in waiting}
        for asking in waiting:
            assert self.queue.position(asking.claim_id) == self.slow.position(asking)


@st.composite
def stories(draw: st.DrawFn) -> tuple[World, int, list[Operation]]:
    """A small world, a reserve, and what happens there: three claims for two ends, so that a queue forms."""
    counts = st.integers(1, 4)
    two_pools = st.fixed_dictionaries({Pool.INST: counts, Pool.DATA: counts})
    slots = draw(st.one_of(st.fixed_dictionaries({Pool.ANY: counts}), two_pools))
    possible = tuple(range(draw(st.integers(1, 3))))
    online = tuple(sorted(draw(st.sets(st.sampled_from(possible), min_size=1))))
    tasks = tuple(map(strategies.task, range(draw(st.integers(1, 3)))))
    world = World(slots, possible, online, tasks, draw(strategies.differing(slots, possible)))
    cpus = st.one_of(st.none(), st.sets(st.sampled_from(possible), min_size=1).map(lambda some: tuple(sorted(some))))
    targets = st.one_of(
        st.builds(Target, st.none(), cpus),
        st.builds(Target, st.sampled_from(world.tasks), cpus),
        st.builds(Target, process=st.sampled_from([task.process for task in world.tasks])),
    )
    asks = st.builds(Ask, targets, strategies.plans(world, most=2), st.sampled_from(KINDS), st.integers(-1, 1))
    leaves = st.builds(Leave, st.integers(0, 63))
    ways = st.builds(GiveWay, st.integers(0, 63))
    length = draw(st.sampled_from((4, 12, 24)))
    operations = draw(st.lists(st.one_of(asks, asks, asks, leaves, ways), min_size=length, max_size=length))
    return world, draw(st.integers(0, 2)), operations


@given(stories())
def test_at_random_it_agrees_with_the_slow_queue_and_nobody_loses_room_to_who_was_granted_past_it(
    story: tuple[World, int, list[Operation]],
) -> None:
    world, reserve, operations = story
    hall = Hall(world, reserve)

    for operation in operations:
        hall.play(operation)

        hall.check()


@given(stories())
def test_a_queue_that_all_have_left_keeps_nothing(story: tuple[World, int, list[Operation]]) -> None:
    world, reserve, operations = story
    hall = Hall(world, reserve)
    for operation in operations:
        hall.play(operation)

    for asking in list(hall.queue):
        hall.queue.remove(asking.claim.claim_id)

    assert vars(hall.queue) == vars(Queue())


# --- every state of a small world ------------------------------------------------------------------------------------

EVERY_TARGET = (
    *(Target(task, cpus) for task, cpus in product((None, T0), (None, (0,), (1,), (0, 1)))),
    Target(T1),
    Target(T2),
    Target(process=P0),
)


@pytest.mark.parametrize("online", [(0, 1), (0,)])
def test_whatever_is_held_it_says_of_any_two_claims_whether_one_holds_up_the_other(online: tuple[int, ...]) -> None:
    holdable = [target for target in EVERY_TARGET if not target.is_cpu_wide or set(target.cpus or ()) <= set(online)]
    slots, held_up = 3, Counter[bool]()
    for held in (held for count in range(4) for held in combinations_with_replacement(holdable, count)):
        books = Books({Pool.ANY: slots}, (0, 1), online)
        slow = SlowQueue(SlowBooks({Pool.ANY: slots}, (0, 1), online), (T0, T1, T2))
        for number, target in enumerate(held):
            books.take(strategies.resource(number, target, Pool.ANY))
            slow.books.take(strategies.resource(number, target, Pool.ANY))
        for ahead, behind in product(EVERY_TARGET, EVERY_TARGET):
            queue, first = Queue(), record(1, ahead)
            queue.add(first)

            blocker = queue.blocker(books, behind, one(), PERF, 2)

            expected = not slow.room_beside(waiter(first), waiter(record(2, behind)))
            assert (blocker is first) == expected, (held, ahead, behind)
            held_up[expected] += 1
    assert min(held_up[True], held_up[False]) > 1000  # both answers were asked for


# --- the rule, case by case ------------------------------------------------------------------------------------------


def full_on(target: Target, slots: int = 4) -> Books:
    """Two CPUs, and nothing left on ``target``."""
    books = Books({Pool.ANY: slots}, (0, 1), (0, 1))
    for number in range(slots):
        books.take(strategies.resource(number, target, Pool.ANY))
    return books


def waiting(*records: ClaimRecord) -> Queue:
    queue = Queue()
    for asking in records:
        queue.add(asking)
    return queue


def blocker_of(
    queue: Queue, books: Books, target: Target, claim_id: int = 99, rank: Rank = PERF, reserve: int = 0
) -> int | None:
    found = queue.blocker(books, target, one(), rank, claim_id, reserve)
    return None if found is None else found.claim.claim_id


def test_the_queue_stands_by_rank_and_among_equals_by_who_asked_first() -> None:
    queue = waiting(
        record(5, Target(T0)),
        record(2, Target(T1)),
        record(7, Target(T0), kind=Kind.PTRACE),
        record(9, Target(T2), kind=Kind.PERF, priority=1),
        record(1, Target(T2), kind=Kind.BACKGROUND, priority=100),
    )

    assert [asking.claim.claim_id for asking in queue] == [7, 9, 2, 5, 1]


def test_one_that_gave_way_stands_where_it_would_have_stood_from_the_start() -> None:
    queue = waiting(record(2, Target(T0)), record(3, Target(T0)))

    queue.add(record(1, Target(T0)))

    assert [queue.position(claim_id) for claim_id in (1, 2, 3)] == [1, 2, 3]
    assert [asking.claim.claim_id for asking in queue.candidates(Target(T0))] == [1]


def test_a_later_claim_for_the_same_slot_stands_behind_those_who_wait_for_it() -> None:
    queue = waiting(record(1, Target(T0)), record(2, Target(T0)))
    books = full_on(Target(T0))

    books.give_back(0)

    assert blocker_of(queue, books, Target(T0)) == 1
    assert blocker_of(queue, books, Target(T0), claim_id=2) == 1
    assert blocker_of(queue, books, Target(T0), claim_id=1) is None


def test_where_there_is_room_for_both_a_later_claim_goes_first() -> None:
    # Given a claim that waits for CPU 0 and has room on CPU 1,
    queue = waiting(record(1, Target()))
    books = full_on(Target(cpus=(0,)))

    # when others ask for CPU 1, then they get what it does not need, and no more.
    for number in range(3):
        assert blocker_of(queue, books, Target(cpus=(1,))) is None
        books.take(strategies.resource(10 + number, Target(cpus=(1,)), Pool.ANY))
    assert blocker_of(queue, books, Target(cpus=(1,))) == 1


def test_claims_for_other_threads_are_never_held_up() -> None:
    queue = waiting(record(1, Target(T0)), record(2, Target(process=P0)), record(3, Target(cpus=(0,))))
    books = full_on(Target(T0))

    assert blocker_of(queue, books, Target(T2, (1,))) is None
    assert blocker_of(queue, books, Target(T1)) is None


def test_a_claim_for_a_cpu_is_not_kept_out_for_ever_by_threads_that_follow_each_other() -> None:
    # Given a claim for a CPU that waits for the only slot, which thread 0 has,
    queue = waiting(record(1, Target(cpus=(0,))))
    books = full_on(Target(T0), slots=1)

    # when another thread asks, on which the kernel would find room as threads do not compete,
    fits(books, Target(T2), one())

    # then it is held up all the same: with its slot the CPU would not be free when thread 0 is done.
    assert blocker_of(queue, books, Target(T2)) == 1
    assert blocker_of(queue, books, Target(T2, (1,))) is None


def test_who_stands_higher_is_held_up_by_nobody_below() -> None:
    queue = waiting(record(1, Target(T0)))
    books = full_on(Target(T0))

    assert blocker_of(queue, books, Target(T0), rank=(CLASS[Kind.PERF], 1)) is None
    assert blocker_of(queue, books, Target(T0), rank=(CLASS[Kind.BACKGROUND], 100)) == 1


def test_a_later_one_of_higher_rank_holds_up_an_earlier_one() -> None:
    queue = waiting(record(1, Target(T0)), record(2, Target(T0), kind=Kind.PTRACE))
    books = full_on(Target(T0))

    assert blocker_of(queue, books, Target(T0), claim_id=1) == 2


def test_of_several_in_the_way_the_first_is_named() -> None:
    queue = waiting(
        record(1, Target()), record(2, Target(process=P0)), record(3, Target(T0)), record(4, Target(T0), priority=1)
    )
    books = full_on(Target(T0))

    assert blocker_of(queue, books, Target(T0)) == 4
    assert blocker_of(queue, books, Target(T0, (1,)), rank=(CLASS[Kind.PERF], 1), claim_id=5) == 4


@pytest.mark.parametrize(("kind", "holds_up"), [(Kind.PERF, True), (Kind.KGDB, False)])
def test_the_reserve_is_left_free_beside_those_who_wait_unless_they_are_kgdb(kind: Kind, holds_up: bool) -> None:
    # Given one of four slots held, and one who waits for another,
    queue = waiting(record(1, Target(T0), kind=kind))
    books = Books({Pool.ANY: 4}, (0,), (0,))
    books.take(strategies.resource(1, Target(T0), Pool.ANY))

    # when somebody asks for a third, then that leaves one, which may be enough or not.
    assert blocker_of(queue, books, Target(T0), reserve=1) is None
    assert (blocker_of(queue, books, Target(T0), reserve=2) == 1) == holds_up


def test_pools_do_not_meet() -> None:
    queue = waiting(record(1, Target(T0), one(Pool.INST)))
    books = Books({Pool.INST: 1, Pool.DATA: 1}, (0,), (0,))

    assert queue.blocker(books, Target(T0), one(Pool.INST), PERF, 2) is not None
    assert queue.blocker(books, Target(T0), one(Pool.DATA), PERF, 2) is None


@pytest.mark.parametrize("full", [Pool.INST, Pool.DATA])
def test_of_claims_for_both_pools_one_holds_up_the_other_for_want_of_room_in_either(full: Pool) -> None:
    both = Plan((strategies.piece(Pool.INST), strategies.piece(Pool.DATA)))
    queue = waiting(record(1, Target(T0), both))
    books = Books({Pool.INST: 2, Pool.DATA: 2}, (0,), (0,))

    assert queue.blocker(books, Target(T0), both, PERF, 2) is None
    books.take(strategies.resource(1, Target(T0), full))
    assert queue.blocker(books, Target(T0), both, PERF, 2) is not None


def test_a_claim_for_a_cpu_is_held_up_by_the_one_thread_claim_of_many_that_wants_more() -> None:
    queue = waiting(record(1, Target(T2)), record(2, Target(T0), one(pieces=2)))
    books = Books({Pool.ANY: 4}, (0,), (0,))
    for number in range(2):
        books.take(strategies.resource(number, Target(T0), Pool.ANY))

    assert blocker_of(queue, books, Target(cpus=(0,))) == 2


@pytest.mark.parametrize("full", [Pool.INST, Pool.DATA])
def test_a_claim_for_a_cpu_in_both_pools_is_held_up_for_want_of_room_in_either(full: Pool) -> None:
    both = Plan((strategies.piece(Pool.INST), strategies.piece(Pool.DATA)))
    queue = waiting(record(1, Target(T0), one(Pool.INST)), record(2, Target(T0), one(Pool.DATA)))
    books = Books({Pool.INST: 2, Pool.DATA: 2}, (0,), (0,))
    books.take(strategies.resource(1, Target(T0), full))

    blocker = queue.blocker(books, Target(cpus=(0,)), both, PERF, 3)

    assert blocker is not None
    assert blocker.plan == one(full)


# --- whose turn it is ------------------------------------------------------------------------------------------------


def tried(candidates: Iterator[ClaimRecord]) -> list[int]:
    return [asking.claim.claim_id for asking in candidates]


def test_of_those_who_want_the_same_the_next_has_its_turn_when_the_first_has_left() -> None:
    queue = waiting(*(record(claim_id, Target(T0)) for claim_id in (1, 2, 4)), record(3, Target(T0, (0,))))
    turns = []

    for asking in queue.candidates(Target(T0)):
        turns.append(asking.claim.claim_id)
        if asking.claim.claim_id < 2:
            queue.remove(asking.claim.claim_id)

    assert turns == [1, 2, 3]


def test_whoever_wants_more_slots_than_another_has_a_turn_of_its_own_and_the_order_of_pieces_is_nothing() -> None:
    pools = Pool.INST, Pool.DATA
    both, the_same = (Plan(tuple(map(strategies.piece, order))) for order in (pools, pools[::-1]))
    queue = waiting(
        record(1, Target(T0), one(Pool.DATA, pieces=2)),
        record(2, Target(T0), one(Pool.DATA)),
        record(3, Target(T0), both),
        record(4, Target(T0), the_same),
    )

    assert tried(queue.candidates(Target(T0))) == [1, 2, 3]


def test_all_of_them_have_their_turn_while_the_first_leaves_each_time() -> None:
    queue = waiting(*(record(claim_id, Target(T0)) for claim_id in range(1, 6)))

    for asking in queue.candidates(Target(T0)):
        queue.remove(asking.claim.claim_id)

    assert len(queue) == 0


def test_one_that_left_before_its_turn_has_none_and_the_one_behind_it_has_its_own() -> None:
    # Given two who want the same, one between them in the queue, and one more by itself,
    both, between, alone = Target(T0, (0,)), Target(T0, (1,)), Target(T0, (0, 1))
    queue = waiting(record(1, Target(T0)), record(2, both), record(3, between), record(4, both), record(5, alone))
    turns = []

    # when the first of the two and the one by itself leave before it is their turn,
    for asking in queue.candidates(Target(T0)):
        turns.append(asking.claim.claim_id)
        if asking.claim.claim_id == 1:
            queue.remove(2)
            queue.remove(5)

    # then the others have theirs in the order of the queue.
    assert turns == [1, 3, 4]


def test_room_is_offered_only_to_those_who_could_use_it() -> None:
    queue = waiting(
        record(1, Target(T0)),
        record(2, Target(T1, (1,))),
        record(3, Target(process=P0)),
        record(4, Target(cpus=(0,))),
        record(5, Target(T2)),
        record(6, Target()),
        record(7, Target(T0, (1,)), kind=Kind.PTRACE),
    )

    assert tried(queue.candidates(Target(T0))) == [7, 1, 3, 4, 6]
    assert tried(queue.candidates(Target(T0, (0,)))) == [1, 3, 4, 6]
    assert tried(queue.candidates(Target(process=P0))) == [7, 1, 2, 3, 4, 6]
    assert tried(queue.candidates(Target(cpus=(0,)))) == [1, 3, 4, 5, 6]
    assert tried(queue.candidates(Target())) == [7, 1, 2, 3, 4, 5, 6]
    assert tried(queue.candidates(None)) == [7, 1, 2, 3, 4, 5, 6]


def test_whoever_waits_for_the_very_same_is_found_wherever_it_stands() -> None:
    same, other = strategies.piece(Pool.ANY, 1), strategies.piece(Pool.ANY, 2)
    queue = waiting(
        record(1, Target(T0), Plan((other,))),
        record(2, Target(T0), Plan((same,))),
        record(3, Target(T0), Plan((other, same)), kind=Kind.PTRACE),
        record(4, Target(T1), Plan((same,))),
        record(5, Target(T0), Plan((same, same))),
    )

    assert tried(iter(queue.wanting(Target(T0), same))) == [3, 2, 5]

    queue.remove(2)
    queue.remove(5)
    assert tried(iter(queue.wanting(Target(T0), same))) == [3]
    assert queue.wanting(Target(T2), same) == []


def test_of_some_claims_those_in_the_queue_are_found_in_its_order() -> None:
    queue = waiting(record(1, Target(T0)), record(2, Target(T1)), record(3, Target(T0), kind=Kind.PTRACE))

    assert tried(iter(queue.among({1, 3, 7}))) == [3, 1]


def test_a_position_counts_those_ahead_who_compete_with_it() -> None:
    queue = waiting(
        record(1, Target(T0)),
        record(2, Target(T2)),
        record(3, Target(T0, (0,))),
        record(4, Target(T0, (1,))),
        record(5, Target(T0), kind=Kind.PTRACE),
        record(6, Target(T0), kind=Kind.BACKGROUND),
    )

    assert {claim_id: queue.position(claim_id) for claim_id in range(1, 7)} == {1: 2, 2: 1, 3: 3, 4: 3, 5: 1, 6: 5}


def test_those_who_want_other_pools_do_not_count() -> None:
    queue = waiting(record(1, Target(T0), one(Pool.INST)), record(2, Target(T0), one(Pool.DATA)))

    assert queue.position(2) == 1


# --- what it costs ---------------------------------------------------------------------------------------------------


class Looks:
    """How often places are looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(queue_file, "full_places", self._full_places)

    def _full_places(self, counts: PoolBooks, target: Target, pieces: int) -> Iterator[tuple[int, Task | None]]:
        self.count += 1
        return full_places(counts, target, pieces)


@pytest.mark.parametrize("waiters", [10, 10_000])
def test_however_many_wait_for_the_same_a_claim_costs_one_look(
    waiters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = waiting(*(record(claim_id, Target(T0)) for claim_id in range(waiters)))
    books, looks = full_on(Target(T0)), Looks(monkeypatch)

    assert blocker_of(queue, books, Target(T0), claim_id=waiters) == 0
    assert tried(queue.candidates(Target(T0))) == [0]
    assert queue.position(waiters - 1) == waiters

    assert looks.count == 1


def test_a_claim_for_a_cpu_looks_no_further_than_to_the_first_who_holds_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = waiting(*(record(number, Target(strategies.task(number))) for number in range(10_000)))
    books, looks = full_on(Target(T0)), Looks(monkeypatch)

    assert blocker_of(queue, books, Target(cpus=(1,)), claim_id=99_999) == 0

    assert looks.count == 2


def test_one_with_room_beside_the_busiest_thread_looks_at_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given ten thousand claims for as many threads, all waiting because CPU 0 is full,
    queue = waiting(*(record(number, Target(strategies.task(number))) for number in range(10_000)))
    books, looks = full_on(Target(cpus=(0,))), Looks(monkeypatch)

    # when somebody asks for the other CPU, then one look tells that there is room for all.
    assert blocker_of(queue, books, Target(cpus=(1,)), claim_id=99_999) is None

    assert looks.count == 1


def test_a_claim_for_a_cpu_looks_for_no_more_room_beside_threads_than_they_want_of_its_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given threads that want much of one pool and little of another, and one slot of three held there,
    queue = waiting(record(1, Target(cpus=(0,)), one(Pool.DATA)))
    books = Books({Pool.INST: 4, Pool.DATA: 3}, (0, 1), (0, 1))
    books.take(strategies.resource(1, Target(T0), Pool.DATA))
    looks = Looks(monkeypatch)

    # when nobody waits for a thread, then there is one look, at the claim for the CPU;
    assert queue.blocker(books, Target(cpus=(0,)), one(Pool.DATA, pieces=2), PERF, 9) is not None
    assert looks.count == 1

    # when some do, then one more tells that there is room beside all of them.
    queue.add(record(2, Target(T0), one(Pool.INST, pieces=3)))
    queue.add(record(3, Target(T1), one(Pool.DATA)))
    assert queue.blocker(books, Target(cpus=(1,)), one(Pool.DATA), PERF, 9) is None
    assert looks.count == 2


def test_whoever_waits_for_other_threads_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    others = (record(number, Target(strategies.task(number))) for number in range(2, 10_002))
    queue = waiting(record(0, Target(cpus=(0,))), record(1, Target(T0)), *others)
    books, looks = Books({Pool.ANY: 4}, (0, 1), (0, 1)), Looks(monkeypatch)

    assert blocker_of(queue, books, Target(T0), claim_id=99_999) is None
    assert tried(queue.candidates(Target(T0))) == [0, 1]
    assert queue.position(1) == 2

    assert looks.count == 2
