"""The optimum, held to one that tries every decision."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as draw

from hwbpd_kvm.optimum import Optimum, optimum, slowly
from hwbpd_kvm.rental import Interval, Terms
from tests.plugins.kvm.adversary import TERMS

intervals = draw.lists(draw.builds(Interval, draw.integers(0, 4), draw.booleans(), draw.booleans()), max_size=7)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_it_is_the_least_over_all_decisions_of_every_short_history(terms: Terms) -> None:
    for counts in itertools.product((0, 1, 2, 5), repeat=4):
        history = [Interval(count) for count in counts]
        assert optimum(history, terms) == pytest.approx(slowly(history, terms)), counts


@given(intervals, draw.integers(1, 9), draw.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_it_is_the_least_over_all_decisions(history: list[Interval], trap: int, switch: int) -> None:
    terms = Terms(trap, switch)
    assert optimum(history, terms) == slowly(history, terms)


@given(intervals, draw.integers(1, 9), draw.integers(1, 9), draw.integers(0, 6))
@settings(max_examples=80, deadline=None)
def test_it_never_falls_with_more_accesses(history: list[Interval], trap: int, switch: int, where: int) -> None:
    """The proofs count only the accesses that a policy sees, and need this."""
    terms = Terms(trap, switch)
    more = [
        interval._replace(accesses=interval.accesses + 1) if number == where else interval
        for number, interval in enumerate(history)
    ]
    assert optimum(history, terms) <= optimum(more, terms)


def test_it_may_be_told_piece_by_piece() -> None:
    # Given a history,
    history = [Interval(count) for count in (1, 0, 0, 3, 1, 0, 2)]

    # when it is told in two pieces,
    piecewise = Optimum(Terms(5, 2))
    piecewise.after(history[:3])

    # then that makes no difference.
    assert piecewise.after(history[3:]) == optimum(history, Terms(5, 2))
