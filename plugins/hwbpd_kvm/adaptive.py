"""
When to stop trapping, and when to stop switching: three policies and what each never exceeds.

All three are one rent-or-buy problem, seen from its two ends. Let r be the smaller of the two prices, b the greater,
x = b / r and k the whole part of x.

- A switch is the cheaper one (r = switch): switch at the first trap. Rented is every interval that stays switched
  though nothing shows that the guest goes on; bought is the trap that stopping too early costs.
- A trap is the cheaper one (r = trap): stop switching at every exit. Rented is every trap in an interval; bought is the
  switch that ends them.

``Balanced`` rents k times, or one time more or less, whichever is better at this x, and is never worse than
``balanced_bound(terms)`` times the optimum: at most 1 + sqrt(2), and near 2 where the prices are far apart.
``Lottery`` draws how often, and stays in the mean below ``lottery_bound(terms)``: 2 for equal prices, towards
e / (e - 1) = 1.58 where they are far apart. ``Learning`` does what would have been best lately, but stakes only what
it has saved: it is never worse than ``CEILING`` times the optimum. docs/kvm-adaptive.md has the proofs.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable
from typing import Final

from hwbpd_kvm.rental import Terms

CEILING: Final = 3.0


def balanced_bound(terms: Terms) -> float:
    """What ``Balanced`` never exceeds, as a multiple of the optimum."""
    return 1 + min(_underpaid(terms), _overpaid(terms))


def _ratio(terms: Terms) -> tuple[float, int]:
    trap, switch = terms
    assert trap > 0, f"a trap cannot cost {trap}"
    assert switch > 0, f"a switch cannot cost {switch}"
    x = max(terms) / min(terms)
    return x, math.floor(x)


def _underpaid(terms: Terms) -> float:
    """What we pay for a rent of k in all, over the least that it costs: bought a little early."""
    x, k = _ratio(terms)
    return x / k


def _overpaid(terms: Terms) -> float:
    """The same for a rent of k + 1."""
    x, k = _ratio(terms)
    return (k + 1) / x


def balanced_rent(terms: Terms) -> int:
    """How many rents, the one that is paid in any case among them, ``Balanced`` pays before it buys: k or k + 1."""
    _, k = _ratio(terms)
    return k if _underpaid(terms) <= _overpaid(terms) else k + 1


class Balanced:
    """The deterministic policy. It looks at nothing but traps, and where a switch is the cheaper one at changes."""

    def __init__(self, terms: Terms) -> None:
        rent = balanced_rent(terms)
        cheap_switch = terms.switch <= terms.trap
        self._trap_limit = 1 if cheap_switch else rent
        self._hold_limit = rent - 1 if cheap_switch else 0
        self._traps = 0
        self._held = 0

    def switch_now(self) -> bool:
        self._traps += 1
        self._held = 0
        return self._traps >= self._trap_limit

    def keep_switching(self, changed: bool) -> bool:
        self._traps = 0
        if changed:
            self._held = 0
        self._held += 1
        return self._held <= self._hold_limit

    def interval_trapped(self) -> None:
        self._traps = 0


# --- by lot ----------------------------------------------------------------------------------------------------------


def _shares(x: float, count: int) -> tuple[float, list[float]]:
    """
    Return the factor, and for each number of rents from 1 to ``count`` how likely it is bought right then.

    The chances are such that every adversary gets the same factor: the g-th rent raises our mean cost by the factor
    times what it raises the optimum by, which is one rent, or less for the one in which the optimum reaches x.
    """
    growth = 1 + 1 / x
    raises = [min(g, x) - min(g - 1, x) for g in range(1, count + 1)]
    factor = growth**count / sum(raised / x * growth ** (count - g) for g, raised in enumerate(raises, start=1))
    chances = []
    left = 1.0
    for raised in raises:
        chances.append((factor * raised - left) / x)
        left -= chances[-1]
    return factor, chances


def lottery(terms: Terms) -> tuple[float, list[float]]:
    """Return what the lottery never exceeds in the mean, and the chance of each number of rents, from 1 on."""
    x, k = _ratio(terms)
    found = [_shares(x, count) for count in (k, k + 1)]
    return min(((factor, chances) for factor, chances in found if min(chances) >= 0), key=lambda entry: entry[0])


def lottery_bound(terms: Terms) -> float:
    """What ``Lottery`` never exceeds in the mean, as a multiple of the optimum, whatever the guest does beforehand."""
    return lottery(terms)[0]


class Lottery:
    """``Balanced`` with another number of rents each time, drawn so that no guest can be prepared for it."""

    def __init__(self, terms: Terms, chance: random.Random) -> None:
        _, self._chances = lottery(terms)
        self._cheap_switch = terms.switch <= terms.trap
        self._chance = chance
        self._traps = 0
        self._held = 0
        self._rent = self._draw()

    def _draw(self) -> int:
        (rent,) = self._chance.choices(range(1, len(self._chances) + 1), self._chances)
        return rent

    def switch_now(self) -> bool:
        self._traps += 1
        if self._cheap_switch:
            self._held, self._rent = 0, self._draw()
            return True
        return self._traps >= self._rent

    def keep_switching(self, changed: bool) -> bool:
        self._traps = 0
        if not self._cheap_switch:
            self._rent = self._draw()
            return False
        if changed:
            self._held, self._rent = 0, self._draw()
        self._held += 1
        return self._held < self._rent

    def interval_trapped(self) -> None:
        self._traps = 0
        if not self._cheap_switch:
            self._rent = self._draw()


# --- by history ------------------------------------------------------------------------------------------------------

REMEMBERED: Final = 32  # gaps, or intervals
ENOUGH: Final = 4  # of them to go by
FADES: Final = 0.95  # what a candidate has saved counts that much less with every decision
LOOK_AGAIN: Final = 16  # every so many decisions


class Learning:
    """
    What would have been cheapest over the last ``REMEMBERED`` decisions, as long as it cannot break the ceiling.

    The policy keeps the account of both sides: what it has paid, and the least that anybody must have paid for what it
    has seen. It leaves ``Balanced`` only for a choice after which ``Balanced`` could take over, whatever the guest does
    next, and stay within ``CEILING`` times that least. So a guest that stops being what it was costs at most what it
    helped to save before.
    """

    def __init__(self, terms: Terms) -> None:
        self._decide: _Gaps | _Bursts = _Gaps(terms) if terms.switch <= terms.trap else _Bursts(terms)

    def switch_now(self) -> bool:
        return self._decide.switch_now()

    def keep_switching(self, changed: bool) -> bool:
        return self._decide.keep_switching(changed)

    def interval_trapped(self) -> None:
        self._decide.interval_trapped()


class _Gaps:
    """
    Where a switch is the cheaper one: for how many entries to stay switched after an access that was seen.

    A gap is the number of entries between two accesses seen. One of g entries costs anybody g switches or one trap.
    """

    def __init__(self, terms: Terms) -> None:
        self._trap, self._switch = terms
        self._balanced = balanced_rent(terms) - 1
        self._gaps: deque[int] = deque(maxlen=REMEMBERED)
        self._gap: int | None = None  # so far; None before the first access
        self._paid = 0.0  # with the whole interval that we are in
        self._least = 0.0
        self._hold = self._candidate = self._balanced
        self._lead = 0.0  # what the candidates would have saved lately

    def switch_now(self) -> bool:
        self._paid += self._trap + self._switch
        self._seen()
        return True

    def keep_switching(self, changed: bool) -> bool:
        assert self._gap is not None, "nothing is switched before an access has trapped"
        if changed and self._gap:
            self._seen()
        self._gap += 1
        if self._gap > self._hold:
            return False
        self._paid += self._switch
        return True

    def interval_trapped(self) -> None:
        if self._gap is not None:
            self._gap += 1

    def _seen(self) -> None:
        if self._gap is None:
            self._least = self._trap
        else:
            self._learn(self._gap)
            self._least += self._at_least(self._gap)
        self._gap = 0
        follows = self._lead > 0 and self._is_safe(self._candidate)
        self._hold = self._candidate if follows else self._balanced

    def _learn(self, gap: int) -> None:
        """Take in one more gap: whether the candidate would have been better, and which is the next one."""
        saved = self._cost(self._balanced, gap) - self._cost(self._candidate, gap)
        self._lead = FADES * self._lead + saved
        self._gaps.append(gap)
        if len(self._gaps) >= ENOUGH:
            holds = {0, self._balanced, *self._gaps}
            self._candidate = min(holds, key=lambda hold: (sum(self._cost(hold, gap) for gap in self._gaps), hold))

    def _at_least(self, gap: int) -> float:
        return min(gap * self._switch, self._trap)

    def _cost(self, hold: int, gap: int) -> float:
        """What a gap costs whoever stays switched for so many entries."""
        return gap * self._switch if gap <= hold else (hold + 1) * self._switch + self._trap

    def _is_safe(self, hold: int) -> bool:
        """
        Whether we stay within the ceiling if the guest is never seen again, if it is when we have just stopped, and if
        it is just before; in the last two cases with what ``Balanced`` may then pay until it sees the guest.
        """
        paid, reserve = self._paid + hold * self._switch, self._balanced * self._switch
        never = paid <= CEILING * self._least
        after = paid + self._trap + self._switch + reserve <= CEILING * (self._least + self._at_least(hold + 1))
        before = paid + reserve <= CEILING * (self._least + self._at_least(hold))
        return never and after and before


class _Bursts:
    """
    Where a trap is the cheaper one: to switch at the first trap of an interval already, or to stay switched after it.

    An interval with n accesses costs anybody n traps or one switch.
    """

    def __init__(self, terms: Terms) -> None:
        self._trap, self._switch = terms
        self._balanced = balanced_rent(terms)
        self._bursts: deque[int] = deque(maxlen=REMEMBERED)  # accesses of an interval, as far as anybody saw
        self._traps = 0  # in this interval
        self._paid = 0.0
        self._least = 0.0  # for the intervals before this one
        self._decisions = 0

    def switch_now(self) -> bool:
        self._traps += 1
        self._paid += self._trap
        at_once = self._traps == 1 and self._switches_at_once()
        if at_once or self._traps >= self._balanced:
            self._paid += self._switch
            return True
        return False

    def keep_switching(self, changed: bool) -> bool:
        # How many accesses did not trap, nobody knows; if there were any, call it a long burst.
        self._ended(self._balanced if changed else self._traps, int(changed and not self._traps))
        if self._stays():
            self._paid += self._switch
            return True
        return False

    def interval_trapped(self) -> None:
        self._ended(self._traps)

    def _ended(self, burst: int, untrapped: int = 0) -> None:
        self._least += min((self._traps + untrapped) * self._trap, self._switch)
        self._bursts.append(burst)
        self._traps = 0

    def _switches_at_once(self) -> bool:
        """Now and then it does not, for who always switches at once sees no short burst any more."""
        self._decisions += 1
        busy = [burst for burst in self._bursts if burst]
        if len(busy) < ENOUGH or self._decisions % LOOK_AGAIN == 0:
            return False
        is_cheaper = len(busy) * (self._trap + self._switch) < self._lately(busy)
        return is_cheaper and self._paid + self._switch <= CEILING * (self._least + self._trap)

    def _stays(self) -> bool:
        if len(self._bursts) < ENOUGH:
            return False
        is_cheaper = len(self._bursts) * self._switch < self._lately(self._bursts)
        return is_cheaper and self._paid + self._switch <= CEILING * self._least

    def _lately(self, bursts: Iterable[int]) -> float:
        """What these would have cost, without staying or switching at once."""
        too_many = self._balanced * self._trap + self._switch
        return sum(burst * self._trap if burst < self._balanced else too_many for burst in bursts)
