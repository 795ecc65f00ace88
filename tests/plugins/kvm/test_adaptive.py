"""The policies keep their bounds, whoever the guest is, and the bounds are not idle."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from hwbpd_kvm.adaptive import (
    CEILING,
    Balanced,
    Learning,
    Lottery,
    balanced_bound,
    lottery,
    lottery_bound,
)
from hwbpd_kvm.optimum import optimum
from hwbpd_kvm.rental import Interval, Policy, Terms, bill
from tests.plugins.kvm.adversary import ROUNDING, TERMS, NewPolicy, climb, factor, short_histories

BOUNDED: tuple[tuple[str, NewPolicy], ...] = (("balanced", Balanced), ("learning", Learning))


def bound(policy: str, terms: Terms) -> float:
    return balanced_bound(terms) if policy == "balanced" else CEILING


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize(("name", "new_policy"), BOUNDED, ids=[name for name, _ in BOUNDED])
def test_no_short_history_breaks_the_bound(name: str, new_policy: NewPolicy, terms: Terms) -> None:
    near = math.ceil(terms.switch / terms.trap)
    for history in short_histories(5, sorted({0, 1, near, near + 1})[:4]):
        assert factor(new_policy, history, terms) <= bound(name, terms) + ROUNDING, history


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize(("name", "new_policy"), BOUNDED, ids=[name for name, _ in BOUNDED])
def test_no_history_that_is_searched_for_breaks_the_bound(name: str, new_policy: NewPolicy, terms: Terms) -> None:
    seed = random.randrange(2**32)
    height, worst = climb(new_policy, terms, random.Random(seed), steps=120)
    assert height <= bound(name, terms) + ROUNDING, f"seed {seed}: {height} on {worst}"


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_a_history_reaches_the_bound_of_the_balanced_policy(terms: Terms) -> None:
    """So the constant of the proof is that of the policy, and not merely above it."""
    # Given a guest that knows the policy and the prices: it comes back as soon as the policy has given up,
    x = max(terms) / min(terms)
    lengths = range(1, math.ceil(x) + 2)
    if terms.switch <= terms.trap:
        shapes = [[Interval(1, False), *[Interval(0)] * (gap - 1)] * 200 for gap in lengths]
    else:
        # or has no more accesses in an interval than make the policy switch.
        shapes = [[Interval(count, False)] * 200 for count in lengths]

    # when it goes on for long,
    height = max(factor(Balanced, history, terms) for history in shapes)

    # then nothing but the first trap is missing.
    assert height == pytest.approx(balanced_bound(terms), rel=0.02)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_bound_is_near_two_and_at_most_one_plus_the_root_of_two(terms: Terms) -> None:
    x = max(terms) / min(terms)
    k = math.floor(x)
    assert 2 - ROUNDING <= balanced_bound(terms) <= 1 + math.sqrt((k + 1) / k) + ROUNDING


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_a_guest_that_betrays_what_was_learnt_does_not_break_the_ceiling(terms: Terms) -> None:
    # Given guests that behave in one way for long,
    near = round(max(terms) / min(terms))
    habits = [
        [Interval(1, True), *[Interval(0)] * gap] * 40 for gap in (0, 1, near, near + 1, near + 3)
    ] + [[Interval(count, True)] * 40 for count in (1, near, near + 3)]

    # when they change to another habit from then on, at any point of it,
    for before, after in itertools.product(habits, repeat=2):
        height = factor(Learning, [*before, *after], terms)

        # then the ceiling holds.
        assert height <= CEILING + ROUNDING


# --- by lot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_lottery_keeps_its_bound_in_the_mean_against_every_gap(terms: Terms) -> None:
    # Given the chances of each number of rents,
    factor_, chances = lottery(terms)
    rent, buy = min(terms), max(terms)
    assert sum(chances) == pytest.approx(1)
    assert min(chances) >= 0

    # when the guest comes back after any number of rents,
    for gap in range(1, len(chances) + 3):
        # (whoever has bought before pays that and the rents until then, and who rents on pays the rents)
        mean = sum(
            chance * (gap * rent if gap < bought else bought * rent + buy)
            for bought, chance in enumerate(chances, start=1)
        )
        if terms.switch <= terms.trap:  # the gap's last entry is paid in any case, and so is told with the purchase
            mean = sum(
                chance * (gap * rent if gap <= bought - 1 else (bought - 1) * rent + buy + rent)
                for bought, chance in enumerate(chances, start=1)
            )

        # then the mean is at most so many times what it costs anybody.
        assert mean <= factor_ * min(gap * rent, buy) + ROUNDING * buy


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_lottery_is_better_in_the_mean_than_the_balanced_policy_at_its_worst(terms: Terms) -> None:
    assert math.e / (math.e - 1) - ROUNDING <= lottery_bound(terms) <= 2 + ROUNDING
    assert lottery_bound(terms) <= balanced_bound(terms) + ROUNDING
    # The first trap of all is paid by the optimum, too, and the switch with it only by us.
    assert lottery_bound(terms) * max(terms) >= sum(terms) - ROUNDING * max(terms)


def test_the_lottery_draws_as_it_says() -> None:
    # Given a history that is the worst for the balanced policy, in which every access shows,
    terms = Terms(10, 1)
    history = [Interval(1), *[Interval(0)] * 9] * 400

    # when the lottery plays it many times,
    means = [bill(Lottery(terms, random.Random(seed)), history, terms).cost for seed in range(5)]
    mean = sum(means) / len(means) / optimum(history, terms)

    # then the mean is at its bound: far from what the balanced policy pays.
    assert mean == pytest.approx(lottery_bound(terms), rel=0.05)
    assert factor(Balanced, history, terms) == pytest.approx(2, rel=0.01)


# --- in the mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "history"),
    [
        (Terms(10, 1), [Interval(1), *[Interval(0)] * 14] * 60),
        (Terms(10, 1), [Interval(1), *[Interval(0)] * 10] * 60),
        (Terms(4, 3), [Interval(1), Interval(0)] * 200),
        (Terms(1, 5), [Interval(9), Interval(0)] * 200),
        (Terms(1, 5), [Interval(9)] * 200),
    ],
    ids=["rare", "just too rare", "in turn", "long bursts", "bursts without a pause"],
)
def test_what_repeats_is_learnt(terms: Terms, history: list[Interval]) -> None:
    # Given a guest of habit, when both play it, then learning pays at least a tenth less.
    learnt, balanced = (factor(policy, history, terms) for policy in (Learning, Balanced))
    assert learnt < 0.9 * balanced


def test_a_price_of_nothing_is_refused() -> None:
    policies: list[type[Policy]] = [Balanced, Learning]
    for policy in policies:
        for terms in (Terms(0, 1), Terms(1, 0)):
            with pytest.raises(AssertionError, match="cannot cost 0"):
                policy(terms)  # type: ignore[call-arg]
