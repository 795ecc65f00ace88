"""
The bucket of a guard: a flood is stopped after a second's worth, a stream below the rate never is, and time is exact.

``SlowGuard`` is the same bucket in fractions: it keeps the moment at which each hit was earned, and rounds nothing but
that moment, up to the next whole nanosecond.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwbpd.core.guard import NS_PER_S, Guard

START_NS = 5_000_000_000

rates = st.one_of(st.integers(1, 20), st.integers(1, 10**9), st.sampled_from([1, 3, 7, 1000, 10_000, 10**9]))
pauses = st.one_of(st.integers(0, 10), st.integers(0, 10**6), st.integers(0, 5 * NS_PER_S))


class SlowGuard:
    """What ``Guard`` says, reckoned with fractions."""

    def __init__(self, per_s: int, now_ns: int) -> None:
        self.per_s = per_s
        self.left = per_s
        self.earned_up_to_ns = now_ns

    def count(self, hits: int, now_ns: int) -> int | None:
        if hits >= self.left:
            return None
        self.left -= hits
        per_ns = Fraction(self.per_s, NS_PER_S)
        earned = int((now_ns - self.earned_up_to_ns) * per_ns)
        if earned:
            self.earned_up_to_ns += ceil(earned / per_ns)
        refill = min(earned, self.per_s - self.left)
        self.left += refill
        return refill


@given(rates, st.lists(st.tuples(pauses, st.integers(0, 30)), max_size=40))
def test_refills_are_those_of_a_model_in_fractions(per_s: int, drains: list[tuple[int, int]]) -> None:
    guard, slow = Guard(per_s, START_NS), SlowGuard(per_s, START_NS)
    now_ns = START_NS

    for pause_ns, hits in drains:
        now_ns += pause_ns
        assert guard.count(hits, now_ns) == slow.count(hits, now_ns)


@given(rates, st.lists(st.tuples(pauses, st.integers(0, 2 * 10**9)), max_size=40))
def test_no_more_is_let_through_than_a_seconds_worth_and_what_time_has_earned(
    per_s: int, drains: list[tuple[int, int]]
) -> None:
    # given a machine with a fuse that is what the guard has left: it stops by itself, however many hits would come
    guard = Guard(per_s, START_NS)
    now_ns, fuse, through = START_NS, per_s, 0

    for pause_ns, wanted in drains:
        # when a flood comes, it lets through what the fuse lets through
        now_ns += pause_ns
        hits = min(wanted, fuse)
        through += hits
        fuse -= hits

        # then that is never more than a second's worth and what was earned since, and a blown fuse is noticed
        assert through <= per_s + (now_ns - START_NS) * per_s // NS_PER_S
        refill = guard.count(hits, now_ns)
        assert (refill is None) == (fuse == 0)
        if refill is None:
            break
        fuse += refill
        assert 0 < fuse <= per_s, "the fuse never holds more than a second's worth"


@given(st.integers(10, 10**6), st.integers(1, 99), st.lists(st.integers(10**6, NS_PER_S // 2), max_size=60))
def test_a_steady_stream_below_the_rate_passes_for_ever(per_s: int, percent: int, pauses_ns: list[int]) -> None:
    # given a stream of so many per cent of the rate, looked at twice a second at least
    guard = Guard(per_s, START_NS)
    now_ns, hits_so_far = START_NS, 0

    for pause_ns in pauses_ns:
        now_ns += pause_ns
        hits = (now_ns - START_NS) * per_s * percent // (100 * NS_PER_S) - hits_so_far
        hits_so_far += hits

        assert guard.count(hits, now_ns) is not None


@given(rates, st.integers(1, 10), pauses)
def test_a_burst_of_a_seconds_worth_is_a_flood_and_one_hit_less_is_not(per_s: int, times: int, pause_ns: int) -> None:
    assume(pause_ns < NS_PER_S)
    now_ns = START_NS + pause_ns

    assert Guard(per_s, START_NS).count(per_s, now_ns) is None
    assert Guard(per_s, START_NS).count(per_s * times, now_ns) is None
    assert Guard(per_s, START_NS).count(per_s - 1, now_ns) is not None


@pytest.mark.parametrize("per_s", [3, 1000])
def test_a_full_bucket_earns_nothing_and_loses_no_fraction(per_s: int) -> None:
    # given a bucket that is full and stays so for a while
    guard = Guard(per_s, 0)
    assert guard.count(0, 7 * NS_PER_S) == 0

    # when hits come, they are given back as time earns them, a fraction that was left over included
    assert guard.count(2, 7 * NS_PER_S) == 0
    assert guard.count(0, 7 * NS_PER_S + NS_PER_S // per_s - 1) == 0
    assert guard.count(0, 7 * NS_PER_S + ceil(Fraction(NS_PER_S, per_s))) == 1


def test_a_guard_of_nothing_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Guard(0, 0)
