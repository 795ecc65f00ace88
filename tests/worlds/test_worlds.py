"""
Every history of a small world, three acts deep; ``make worlds DEPTH=5`` goes further.
"""

from __future__ import annotations

import pytest

from hwbpd.core import placing
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Pool
from tests.simulation import acts
from tests.simulation.acts import Act, Place
from tests.worlds import small

DEPTH, ENDS_DEPTH = 3, 2


def test_no_history_of_a_small_world_breaks_a_promise() -> None:
    found = small.search(DEPTH, ENDS_DEPTH)

    assert found.broken is None, found.broken
    assert found.states > 5_000
    assert found.edges > found.states


def claims(number: int, owner: int, priority: int = 0, wait_ns: int = 0) -> Act:
    return acts.Claims(
        number, owner, Place(cpus=(0,)), Pool.ANY, address=number, priority=priority, wait_ns=wait_ns
    )


def test_histories_that_lead_to_the_same_are_one_state() -> None:
    # given one slot on CPU 0 that somebody has, in a world where more has happened before, and in one where it has not
    short = (claims(1, owner=1),)
    long = (claims(1, owner=3), acts.Releases(owner=3, number=1), claims(3, owner=1))

    # then what may follow is the same
    assert small.state_of(small.played(short)) == small.state_of(small.played(long))

    # and it is not where somebody else has it, or at another rank, or another was there first
    others = [(claims(1, owner=3),), (claims(1, owner=1, priority=-1),), (claims(1, owner=3), claims(2, owner=1))]
    states = {small.state_of(small.played(history)) for history in (short, *others)}
    assert len(states) == 4


def test_what_is_due_next_is_an_act_like_others() -> None:
    # given a full CPU and a claim of root, of higher rank, that waits for one of the holders to give way
    history = (claims(1, 1, priority=-1), claims(2, 3, priority=-1), claims(3, 0))
    here = small.played(history)
    assert [record.state for record in here.shell.arbiter.books.claims.values()] == [
        State.ARMED,
        State.YIELDING,
        State.DISPLACING,
    ]

    # then it may yield, or be made to
    following = [act for act in small.next_acts(here, 4) if isinstance(act, acts.Yields | acts.Waits)]
    assert following == [acts.Yields(2), acts.Waits(here.shell.arbiter.policy.revoke_grace_ns)]
    for act in following:
        after = small.played((*history, act)).shell.arbiter.books.claims.values()
        assert [record.state for record in after] == [State.ARMED, State.SUSPENDED, State.ARMED]


def test_a_mistake_in_a_policy_is_found() -> None:
    # given a core in which equals displace each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "_may_displace", lambda claim, other: other.rank <= claim.rank)

        # when the small world is searched
        found = small.search(DEPTH, 0)

    # then a history of three acts shows it: two of equal rank have both slots, and a third comes
    assert found.broken is not None
    history, sentence = found.broken
    assert "gives way to" in sentence
    assert len(history) == 3
