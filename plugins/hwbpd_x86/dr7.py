"""
DR7, the debug control register: which of DR0-DR3 are armed, for which accesses, and over how many bytes.

     31 30 29 28 27 26 25 24 23 22 21 20 19 18 17 16 15 14 13 12  11 10  9  8  7  6  5  4  3  2  1  0
    [LEN3 |R/W3 |LEN2 |R/W2 |LEN1 |R/W1 |LEN0 |R/W0 | 0  0|GD| 0|RTM| 1|GE|LE|G3|L3|G2|L2|G1|L1|G0|L0]

The rules that hold for every word:

1. Bit 10 is reserved and reads as one, whatever was written.
2. Bits 12, 14 and 15 are reserved and read as zero; so does bit 11 on a CPU without RTM.
3. Bits 32 to 63 exist in 64-bit mode only and must be written as zero: a one there raises #GP(0), and nothing changes.
4. A slot is armed when L or G is set. A task switch in hardware clears every L; Linux does not use those, arms with G
   alone, and takes either bit for armed in what a tracer writes.
5. R/W 2 (I/O) means ports only while CR4.DE is set; otherwise it is undefined, and Linux never uses it.
6. With R/W 0 (execution) LEN must be 0; other values are undefined.
7. The address register's low bits, as many as LEN covers, do not take part in the comparison. So a slot watches a
   block that is aligned to its length, and nothing else.

Intel SDM Vol. 3B, "Debug Control Register (DR7)", "Breakpoint Field Recognition" and "Debug Registers and Intel 64
Processors"; AMD64 APM Vol. 2, "Debug-Control Register (DR7)".
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd.fields import Field, by_name, mask_of

SLOTS = 4


class RW(enum.IntEnum):
    """R/Wn: the access that slot n reports. There is no code for reads alone."""

    EXECUTE = 0
    WRITE = 1
    IO = 2  # rule 5
    READ_WRITE = 3


class Len(enum.IntEnum):
    """LENn: the length of slot n. Eight was fitted in when addresses grew to 64 bits, hence the order."""

    ONE = 0
    TWO = 1
    EIGHT = 2
    FOUR = 3

    @property
    def length_bytes(self) -> int:
        return _LENGTH_BYTES[self]


_LENGTH_BYTES = {Len.ONE: 1, Len.TWO: 2, Len.EIGHT: 8, Len.FOUR: 4}


class SlotControl(Struct, frozen=True):
    """What DR7 says of one slot. The default is the slot after reset: not armed."""

    local: bool = False  # Ln
    global_: bool = False  # Gn
    access: RW = RW.EXECUTE
    length: Len = Len.ONE

    @property
    def armed(self) -> bool:
        """Rule 4."""
        return self.local or self.global_


class Dr7(Struct, frozen=True):
    """DR7 as a value; the reserved bits are not part of it. The default is the register after reset."""

    slots: tuple[SlotControl, SlotControl, SlotControl, SlotControl] = (SlotControl(),) * 4
    exact_local: bool = False  # LE
    exact_global: bool = False  # GE
    transactions: bool = False  # RTM
    general_detect: bool = False  # GD


FIELDS: tuple[Field, ...] = (
    *(
        field
        for n in range(SLOTS)
        for field in (
            Field(f"L{n}", 2 * n, 1, f"slot {n} is armed until the next task switch in hardware"),
            Field(f"G{n}", 2 * n + 1, 1, f"slot {n} is armed, whatever the task"),
        )
    ),
    Field("LE", 8, 1, "report data accesses at the very instruction, locally; without effect since the P6 family"),
    Field("GE", 9, 1, "report data accesses at the very instruction; without effect since the P6 family"),
    Field("RTM", 11, 1, "let transactional regions be debugged, where DEBUGCTL.RTM is set too; reserved without RTM"),
    Field("GD", 13, 1, "trap the next access to a debug register; cleared on entry to the handler of any #DB"),
    *(
        field
        for n in range(SLOTS)
        for field in (
            Field(f"R/W{n}", 16 + 4 * n, 2, f"what slot {n} reports: 0 execution, 1 writes, 2 I/O, 3 reads and writes"),
            Field(f"LEN{n}", 18 + 4 * n, 2, f"how much slot {n} watches: 0 for 1 byte, 1 for 2, 2 for 8, 3 for 4"),
        )
    ),
)

_FIELD = by_name(FIELDS)

FIXED_ONE = 1 << 10  # rule 1
RESET = FIXED_ONE
UPPER_HALF = 0xFFFF_FFFF_0000_0000  # rule 3


def encode(value: Dr7) -> int:
    """Return the word for ``value``, with rules 1 and 2 kept, so that a read-back compares equal."""
    word = FIXED_ONE
    for n, slot in enumerate(value.slots):
        word |= _FIELD[f"L{n}"].place(slot.local)
        word |= _FIELD[f"G{n}"].place(slot.global_)
        word |= _FIELD[f"R/W{n}"].place(slot.access)
        word |= _FIELD[f"LEN{n}"].place(slot.length)
    word |= _FIELD["LE"].place(value.exact_local)
    word |= _FIELD["GE"].place(value.exact_global)
    word |= _FIELD["RTM"].place(value.transactions)
    word |= _FIELD["GD"].place(value.general_detect)
    return word


def decode(word: int) -> Dr7:
    """Return what ``word`` says, whether it was read or is about to be written; reserved bits are dropped."""
    first, second, third, fourth = (
        SlotControl(
            local=bool(_FIELD[f"L{n}"].read(word)),
            global_=bool(_FIELD[f"G{n}"].read(word)),
            access=RW(_FIELD[f"R/W{n}"].read(word)),
            length=Len(_FIELD[f"LEN{n}"].read(word)),
        )
        for n in range(SLOTS)
    )
    return Dr7(
        slots=(first, second, third, fourth),
        exact_local=bool(_FIELD["LE"].read(word)),
        exact_global=bool(_FIELD["GE"].read(word)),
        transactions=bool(_FIELD["RTM"].read(word)),
        general_detect=bool(_FIELD["GD"].read(word)),
    )


def faults(written: int) -> bool:
    """Whether writing this 64-bit word raises #GP(0): rule 3."""
    return written & UPPER_HALF != 0


def stored(written: int, *, rtm: bool) -> int:
    """
    Return what the register holds, and reads as, after ``written`` was moved to it: rules 1 and 2.

    This is the register itself. A tracer that reads offsetof(struct user, u_debugreg[7]) back from Linux sees the word
    it wrote, reserved bits and all: Linux keeps it beside the register.

    :param written: a word that does not fault.
    :param rtm: whether the CPU has RTM.
    """
    assert not faults(written), f"writing {written:#x} to DR7 raises #GP(0)"
    kept = written & mask_of(FIELDS)
    if not rtm:
        kept &= ~_FIELD["RTM"].mask
    return kept | FIXED_ONE
