"""
The least a history of intervals can cost to somebody who knows it beforehand, by the rules of ``rental``.

Rule 3 ties this optimum as it ties us: it leaves trapping only at an access that traps. Two numbers are carried from
one interval to the next: the least cost of everything so far that ends trapping, and that ends switching. ``slowly``
tries every decision at every access instead, and is the judge of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hwbpd_kvm.rental import Interval, Terms, free


def optimum(intervals: Iterable[Interval], terms: Terms) -> float:
    """Return the least cost, forced intervals aside; linear in the number of intervals."""
    return Optimum(terms).after(intervals)


class Optimum:
    """The least cost of what was told so far."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._trapping = 0.0
        self._switching = math.inf  # rule 5

    def after(self, intervals: Iterable[Interval]) -> float:
        """Take more intervals; return the least cost of all so far."""
        trap, switch = self._terms
        for interval in intervals:
            if interval.forced:
                continue
            switching = self._switching + switch
            if interval.accesses:
                # Whoever is going to switch in this interval does so at its first trap: a later one only adds traps.
                switching = min(switching, self._trapping + trap + switch)
            # Rule 4: to come out of an interval trapping, one may also drop what was switched in it.
            self._trapping = min(self._trapping + interval.accesses * trap, switching)
            self._switching = switching
        return min(self._trapping, self._switching)


def slowly(intervals: Sequence[Interval], terms: Terms) -> float:
    """Return the same by trying everything: at every trap to switch or not, after every interval to keep on or not."""
    deciding = free(intervals)

    def from_here(number: int, access: int, switching: bool) -> float:
        """The least cost from this access of this interval on; the interval itself is paid for if it is switched."""
        if number == len(deciding):
            return 0
        if switching or access == deciding[number].accesses:
            entered = [from_here(number + 1, 0, False)]
            if switching and number + 1 < len(deciding):
                entered.append(terms.switch + from_here(number + 1, 0, True))
            return min(entered)
        trapping_on = from_here(number, access + 1, False)
        return terms.trap + min(trapping_on, terms.switch + from_here(number, access, True))

    return from_here(0, 0, False)
