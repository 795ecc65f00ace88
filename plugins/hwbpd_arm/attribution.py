"""
Which watchpoint it was: Linux works it out from the address and the direction that the exception left.

The rules:

1. Only watchpoints that count accesses of the direction are looked at. ARMv7 does not know it (``write`` None), and
   looks at all.
2. The distance of a watchpoint is 0 if the address lies from its lowest selected byte to its highest, and otherwise how
   many bytes it is away from the nearer of them. MASK is not looked at, since Linux does not use it.
3. All watchpoints at distance 0 are reported. If there is none the nearest is, of several the one with the least
   number. So a hit is always somebody's: the address may be lower than what is watched (a wide store that begins before
   it), or higher (DC ZVA).
4. Before v7.1 there is no address (``reported`` None), and only one watchpoint, which it was.

What this gets wrong, and nobody can tell afterwards:

- An access that touches two watchpoints has one address. The one that does not hold it is not reported on arm64, which
  switches all watchpoints off for the step. ARMv7 switches only the reported one off; the other is hit at the next try.
- With an address that is not exact, the nearest watchpoint need not be the one that was met.
- An atomic instruction that reads and writes may be reported as a read; a watchpoint for writes is then left out.
- Privilege is not looked at: a user's watchpoint may be taken for a kernel's that is not there.

Linux, arch/arm64/kernel/hw_breakpoint.c, do_watchpoint(); arch/arm/kernel/hw_breakpoint.c, watchpoint_handler().
"""

from __future__ import annotations

from collections.abc import Mapping

from hwbpd_arm import wcr
from hwbpd_arm.plan import Contents
from hwbpd_arm.wcr import LoadStore

_TOP_BYTE = 56


def reported_slots(
    watchpoints: Mapping[int, Contents], reported: int | None, *, write: bool | None = None
) -> tuple[int, ...]:
    """
    Return the numbers of the watchpoints that Linux reports a hit of, ascending.

    :param watchpoints: what the registers of each slot in use hold, by its number.
    :param reported: FAR_EL1 or DFAR; None where it is not defined.
    :param write: the direction; None where it is not known.
    """
    if reported is None:
        assert len(watchpoints) <= 1, "before v7.1 Linux uses one watchpoint"
        return tuple(watchpoints)
    distances = {}
    for number, held in sorted(watchpoints.items()):
        control = wcr.decode(held.control)
        kind = LoadStore.STORE if write else LoadStore.LOAD
        if write is None or kind & control.load_store:
            distances[number] = distance(held, reported)
    if not distances:
        return ()
    exact = tuple(number for number, away in distances.items() if away == 0)
    return exact or (min(distances, key=lambda number: distances[number]),)


def distance(held: Contents, reported: int) -> int:
    """Return how many bytes a reported address is away from what a pair of registers watches: rule 2."""
    selected = wcr.decode(held.control).byte_select
    assert selected, "Linux arms no watchpoint without a byte"
    lowest = held.address + (selected & -selected).bit_length() - 1
    highest = held.address + selected.bit_length() - 1
    address = _untagged(reported)
    return max(lowest - address, address - highest, 0)


def _untagged(address: int) -> int:
    """The address with the sign that bit 55 gives in place of its top byte; one of 32 bits stays as it is."""
    kept = address & (1 << _TOP_BYTE) - 1
    return kept | ((0xFF << _TOP_BYTE) if kept >> _TOP_BYTE - 1 else 0)
