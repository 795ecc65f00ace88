"""
DCTL, the one control register of the PDQ-1: which slots are armed, for which accesses and for whom.

     31 30 29 28 27 26 25 24 23 22 21 20 19 18 17 16 15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    [ 0  0  0  0  0  0  0  0  0  0  0  0  0  0  0  1|UI|SI|U2|S2|W2|R2|U1|S1|W1|R1|U0|S0|W0|R0| 0  0]

The rules that hold for every word:

1. Bits 0 and 1 and 17 to 31 are reserved and read as zero, bit 16 as one.
2. Watchpoint n is armed while R or W is set, and reports those accesses. The breakpoint has no such bits.
3. U and S say for whom: user mode, and the supervisor. A slot without either is disarmed.
4. The bits of watchpoints that a CPU does not have are reserved, too, and read as zero.
"""

from __future__ import annotations

from collections.abc import Iterable

from hwbpd.core.model import Pool
from hwbpd.fields import Field, by_name, mask_of

WATCHPOINTS_MAX = 3
FIXED_ONE = 1 << 16  # rule 1


def _watchpoint(n: int) -> tuple[Field, ...]:
    return (
        Field(f"R{n}", 2 + 4 * n, 1, f"watchpoint {n} reports reads"),
        Field(f"W{n}", 3 + 4 * n, 1, f"watchpoint {n} reports writes"),
        Field(f"S{n}", 4 + 4 * n, 1, f"watchpoint {n} is armed for the supervisor"),
        Field(f"U{n}", 5 + 4 * n, 1, f"watchpoint {n} is armed for user mode"),
    )


FIELDS: tuple[Field, ...] = (
    *(field for n in range(WATCHPOINTS_MAX) for field in _watchpoint(n)),
    Field("SI", 14, 1, "the breakpoint is armed for the supervisor"),
    Field("UI", 15, 1, "the breakpoint is armed for user mode"),
)

FIELD = by_name(FIELDS)


def name_of(slot: tuple[Pool, int]) -> str:
    """Return how the fields of a slot end: "0", "1" and "2" are the watchpoints, "I" is the breakpoint."""
    pool, number = slot
    return "I" if pool == Pool.INST else str(number)


def slot_mask(name: str) -> int:
    """Return every bit of the slot whose fields end so."""
    return mask_of(tuple(field for field in FIELDS if field.name.endswith(name)))


def stored(written: int, watchpoints: int) -> int:
    """Return what the register of a CPU with so many watchpoints holds after a write: rules 1 and 4."""
    kept = slot_mask("I")
    for n in range(watchpoints):
        kept |= slot_mask(str(n))
    return written & kept | FIXED_ONE


def stored_without(held: int, slots: Iterable[tuple[Pool, int]]) -> int:
    """Return the word with these slots disarmed, and the others as they are."""
    for slot in slots:
        held &= ~slot_mask(name_of(slot))
    return held
