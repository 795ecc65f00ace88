"""Who looks for the histories on which a policy does worst: all the short ones, and longer ones by climbing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from hwbpd_kvm.optimum import optimum
from hwbpd_kvm.rental import Interval, Policy, Terms, bill

# Both prices above, equal, below; whole and not; near and far apart.
TERMS = (
    Terms(1, 1), Terms(2, 1), Terms(5, 2), Terms(4, 3), Terms(10, 1), Terms(5366, 546),
    Terms(1, 2), Terms(2, 5), Terms(3, 4), Terms(1, 10), Terms(7433, 10964),
)  # fmt: skip
ROUNDING = 1e-9

NewPolicy = Callable[[Terms], Policy]


def factor(new_policy: NewPolicy, history: Sequence[Interval], terms: Terms) -> float:
    """What the policy pays over the optimum; 1 where nobody pays."""
    least = optimum(history, terms)
    paid = bill(new_policy(terms), history, terms).cost
    assert least > 0 or paid == 0, f"{paid} for what costs nothing: {history}"
    return paid / least if least else 1.0


def short_histories(intervals: int, accesses: Sequence[int]) -> Iterator[list[Interval]]:
    """All of so many intervals, where every access shows, where none does, and where that of every other one does."""
    for counts in itertools.product(accesses, repeat=intervals):
        for shows in ((True, True), (False, False), (True, False)):
            yield [Interval(count, shows[number % 2]) for number, count in enumerate(counts)]


def climb(new_policy: NewPolicy, terms: Terms, chance: random.Random, steps: int) -> tuple[float, list[Interval]]:
    """Return the worst history found by changing one again and again, and its factor."""
    worst = [_an_interval(terms, chance) for _ in range(chance.randint(2, 30))]
    height = factor(new_policy, worst, terms)
    for _ in range(steps):
        tried = list(worst)
        match chance.randrange(5):
            case 0:
                tried.insert(chance.randint(0, len(tried)), _an_interval(terms, chance))
            case 1 if len(tried) > 1:
                del tried[chance.randrange(len(tried))]
            case 2 if len(tried) < 200:
                first, last = sorted(chance.choices(range(len(tried) + 1), k=2))
                tried[last:last] = tried[first:last]
            case 3:
                gap = [Interval(0)] * chance.randint(1, round(2 * terms.trap / terms.switch) + 2)
                place = chance.randint(0, len(tried))
                tried[place:place] = gap[:50]
            case _:
                tried[chance.randrange(len(tried))] = _an_interval(terms, chance)
        reached = factor(new_policy, tried, terms)
        if reached >= height:
            worst, height = tried, reached
    return height, worst


def _an_interval(terms: Terms, chance: random.Random) -> Interval:
    near = round(terms.switch / terms.trap)
    accesses = chance.choice((0, 0, 1, 1, 2, max(1, near - 1), near, near + 1, near + 2))
    return Interval(accesses, chance.random() < 1 / 2, chance.random() < 1 / 20)
