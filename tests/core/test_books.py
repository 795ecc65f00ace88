"""
The books: what is counted, who is found where, and what is kept of claims that are over.

Whether more fits is ``test_admission.py``'s question.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.books import ENDED_KEPT, Books, ClaimRecord
from hwbpd.core.counts import Buckets
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Owner, Plan, Pool, Target, Task
from tests import strategies
from tests.slow_model import SlowBooks, cpu_wide, of_busiest, of_task
from tests.strategies import GiveBack, History, Take

T0, T1 = strategies.task(0), strategies.task(1)
OWNER, OTHER = strategies.owner(0), strategies.owner(1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=40))
def test_buckets_say_what_a_plain_dictionary_says(assignments: list[tuple[int, int]]) -> None:
    buckets: Buckets[int] = Buckets()
    plain: dict[int, int] = {}

    for key, count in assignments:
        buckets.set(key, count)
        plain[key] = count
        held = {kept: most for kept, most in plain.items() if most}

        assert buckets.as_dict() == held
        assert (len(buckets), set(buckets.keys())) == (len(held), set(held))
        assert buckets.greatest() == max(held.values(), default=0)
        for level in range(-1, 5):
            above = list(buckets.above(level))
            assert sorted(above) == sorted(kept for kept, most in held.items() if most > level)
            assert [held[kept] for kept in above] == sorted((held[kept] for kept in above), reverse=True)


def both_after(history: History) -> tuple[Books, SlowBooks]:
    """Take everything in a history whether it fits or not: what is counted does not depend on it."""
    world = history.world
    books = Books(world.slots, world.possible, world.online, world.slots_on)
    slow = SlowBooks(world.slots, world.possible, world.online, world.slots_on)
    for number, operation in enumerate(history.operations):
        match operation:
            case Take(_, target, plan):
                resource = strategies.resource(number, target, plan.pieces[0].pool)
                books.take(resource)
                slow.take(resource)
            case GiveBack(nth):
                if slow.held:
                    resource_id = sorted(slow.held)[nth % len(slow.held)]
                    books.give_back(resource_id)
                    slow.give_back(resource_id)
    return books, slow


@given(strategies.histories(stray=False))
def test_counts_and_lists_are_those_of_the_kernels_events(history: History) -> None:
    books, slow = both_after(history)

    events = slow.events()
    for pool, counts in books.pools.items():
        for cpu in history.world.online:
            assert counts.held_cpu_wide(cpu) == len(books.cpu_wide_on(cpu, pool)) == cpu_wide(events, cpu, pool)
            assert counts.held_by_busiest(cpu) == of_busiest(events, cpu, pool)
            for task in history.world.tasks:
                held = of_task(events, task, cpu, pool)
                assert counts.held_by_task(task, cpu) == len(books.of_task(task, cpu, pool)) == held
            with_own = {event.task for event in events if event.pool is pool}
            demanding = [
                task for task in history.world.tasks if task in with_own and of_task(events, task, cpu, pool) > 1
            ]
            assert sorted(counts.busy_tasks(cpu, above=1), key=lambda task: task.tid) == demanding


def test_resources_are_found_where_they_count() -> None:
    books = Books({Pool.ANY: 4}, (0, 1), (0, 1))
    targets = [Target(), Target(cpus=(1,)), Target(T0), Target(T0, (1,)), Target(T1)]
    for resource_id, target in enumerate(targets):
        books.take(strategies.resource(resource_id, target, Pool.ANY))

    assert books.cpu_wide_on(0, Pool.ANY) == [0]
    assert books.cpu_wide_on(1, Pool.ANY) == [0, 1]
    assert books.of_task(T0, 0, Pool.ANY) == [2]
    assert books.of_task(T0, 1, Pool.ANY) == [2, 3]
    assert books.of_task(T1, 0, Pool.ANY) == [4]


def test_a_thread_number_used_again_is_another_task() -> None:
    books = Books({Pool.ANY: 4}, (0,), (0,))
    books.take(strategies.resource(1, Target(Task(812, start_ticks=5)), Pool.ANY))

    assert books.of_task(Task(812, start_ticks=9), 0, Pool.ANY) == []
    assert books.pools[Pool.ANY].held_by_task(Task(812, start_ticks=9), 0) == 0


def record(claim_id: int, owner: Owner, state: State = State.ARMED) -> ClaimRecord:
    entered = ClaimRecord(strategies.claim(claim_id, owner, Target(T0)), Plan((strategies.piece(Pool.ANY),)))
    entered.state = state
    return entered


def test_a_session_has_its_claims_oldest_first_until_they_are_over() -> None:
    books = Books({Pool.ANY: 4}, (0,), (0,))
    records = [record(3, OWNER), record(5, OTHER), record(8, OWNER)]
    for entered in records:
        books.open_claim(entered)

    assert list(books.sessions[OWNER.session_id]) == [3, 8]

    for over in records:
        over.state = State.RELEASED
        books.close_claim(over)

    assert books.claims == {}
    assert books.sessions == {}
    assert list(books.ended) == [3, 5, 8]


def test_a_claim_that_was_refused_at_once_is_kept_for_its_story() -> None:
    books = Books({Pool.ANY: 4}, (0,), (0,))

    books.close_claim(record(1, OWNER, State.REFUSED))

    assert list(books.ended) == [1]
    assert books.sessions == {}


def test_of_claims_that_are_over_only_the_latest_are_kept() -> None:
    books = Books({Pool.ANY: 4}, (0,), (0,))

    for claim_id in range(ENDED_KEPT + 5):
        books.close_claim(record(claim_id, OWNER, State.REFUSED))

    assert list(books.ended) == list(range(5, ENDED_KEPT + 5))


def test_what_is_asked_of_an_empty_machine_is_not_written_into_it() -> None:
    books = Books({Pool.ANY: 4}, (0, 1), (0, 1))
    empty = books.dump()

    assert books.cpu_wide_on(1, Pool.ANY) == []
    assert books.of_task(T0, 1, Pool.ANY) == []
    assert list(books.pools[Pool.ANY].busy_tasks(1, above=0)) == []

    assert books.dump() == empty
