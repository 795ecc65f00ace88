"""
Trap the guest's accesses, or switch the registers? The question as a game with two prices, and its rules.

The guest runs in intervals: from an entry to the next exit that no debug register caused. In an interval it accesses
debug registers some number of times. The hypervisor is in one of two modes.

1. Trapping: every access costs ``trap``, and nothing else costs anything.
2. Switching: the interval costs ``switch`` (the host's registers saved and the guest's loaded on entry, and the reverse
   on exit), and its accesses cost nothing.
3. Trapping is left only at an access that has just trapped; the rest of that interval then costs ``switch``.
4. Switching is left only between two intervals, and for nothing.
5. It starts trapping.
6. A forced interval, in which registers must be switched whatever anybody prefers, because breakpoints of the guest or
   of the host are armed, costs everybody the same and leaves the mode alone. It stands outside: neither paid nor
   looked at.

Rule 3 holds for the best possible history as well as for us. Against one that may switch before an access that nobody
has seen coming, no policy has a bound that is independent of the prices: whenever we trap, the guest accesses once, and
we pay ``trap`` where that history pays ``switch``; whenever we switch, it does not, and we pay for nothing. For the
same reason rule 6 lets nobody keep for nothing what a forced interval has loaded.

What a policy may see is what a hypervisor sees: each access that traps, and after a switched interval whether the
registers came back changed. Reads that do not trap, and writes of what was there already, stay unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Terms(NamedTuple):
    """The two prices, both above zero and in one unit."""

    trap: float  # for an access that traps, from the guest and back to it
    switch: float  # for an interval with the registers switched, both ways together


class Interval(NamedTuple):
    """What the guest does from an entry to an exit."""

    accesses: int  # to debug registers
    changes: bool = True  # whether some of them leave another value behind; without accesses of no meaning
    forced: bool = False  # rule 6


class Policy(Protocol):
    """Who decides. Asked in the order of events; forced intervals are not told."""

    def switch_now(self) -> bool:
        """An access has trapped: switch from here on?"""
        ...

    def keep_switching(self, changed: bool) -> bool:
        """A switched interval has ended, with registers changed or not: switch in the next one, too?"""
        ...

    def interval_trapped(self) -> None:
        """An interval has ended that was trapping to its end."""
        ...


class Bill(NamedTuple):
    """What a history cost."""

    traps: int
    switched: int  # intervals, forced ones aside
    forced: int  # intervals, costing the same whoever decides; not part of ``cost``
    cost: float


def bill(policy: Policy, intervals: Iterable[Interval], terms: Terms) -> Bill:
    """Let ``policy`` decide, by the rules above."""
    traps = switched = forced = 0
    switching = False
    for interval in intervals:
        if interval.forced:
            forced += 1
            continue
        to_come = interval.accesses
        while to_come and not switching:
            to_come -= 1
            traps += 1
            switching = policy.switch_now()
        if switching:
            switched += 1
            switching = policy.keep_switching(to_come > 0 and interval.changes)
        else:
            policy.interval_trapped()
    return Bill(traps, switched, forced, traps * terms.trap + switched * terms.switch)


def free(intervals: Sequence[Interval]) -> list[Interval]:
    """Return the intervals that are decided about: those not forced."""
    return [interval for interval in intervals if not interval.forced]
