"""
DR6, the debug status register: why the last debug exception came.

     31 30 29 28 27 26 25 24 23 22 21 20 19 18 17  16 15 14 13 12  11 10  9  8  7  6  5  4  3  2  1  0
    [ 1  1  1  1  1  1  1  1  1  1  1  1  1  1  1|RTM|BT|BS|BD| 0|BLD| 1  1  1  1  1  1  1|B3|B2|B1|B0]

The rules that hold for every word:

1. Bits 4 to 10 and 17 to 31 are reserved and read as one; bit 12 is reserved and reads as zero.
2. RTM (bit 16) and BLD (bit 11) came later, in place of reserved ones, so they are active low: zero says it happened.
   On a CPU without the feature the bit is reserved and reads as one. The same goes for whatever will be defined next.
3. Bits 32 to 63 exist in 64-bit mode only and must be written as zero: a one there raises #GP(0), and nothing changes.
4. The CPU sets bits and, but for B0-B3 at some exceptions, never clears them; nor does it set BLD back to one. Whoever
   handles a #DB writes the register back to ``RESET``, or the next one has two reasons.
5. A B bit says that the slot's condition was met, and may say so although the slot is not armed. So B bits count only
   together with the L and G bits of DR7, as they were when the exception came.

Because of rule 2 there are two forms of the word. The **hardware** form is what MOV reads and writes. The **positive**
form has every bit active high and the reserved ones zero; there an empty word says that nothing happened, and words can
be merged with OR. Linux works with the positive form inside, and shows the hardware form to tracers (u_debugreg[6]).

Intel SDM Vol. 3B, "Debug Status Register (DR6)" and "Debug Registers and Intel 64 Processors"; AMD64 APM Vol. 2,
"Debug-Status Register (DR6)".
"""

from __future__ import annotations

from msgspec import Struct

from hwbpd.fields import Field, by_name, mask_of

RESET = 0xFFFF_0FF0  # in the hardware form; in the positive form this is 0
UPPER_HALF = 0xFFFF_FFFF_0000_0000  # rule 3


class Dr6(Struct, frozen=True):
    """DR6 as a value, every reason active high; the reserved bits are not part of it. The default: nothing happened."""

    hit: tuple[bool, bool, bool, bool] = (False, False, False, False)  # B0-B3; see rule 5
    bus_lock: bool = False  # BLD
    register_access: bool = False  # BD
    single_step: bool = False  # BS
    task_switch: bool = False  # BT
    transaction: bool = False  # RTM


FIELDS: tuple[Field, ...] = (
    *(Field(f"B{n}", n, 1, f"the condition of slot {n} was met") for n in range(4)),
    Field("BLD", 11, 1, "a bus lock was taken outside ring 0, where DEBUGCTL asks for a trap; active low"),
    Field("BD", 13, 1, "the next instruction would access a debug register while DR7.GD was set"),
    Field("BS", 14, 1, "an instruction was single-stepped (EFLAGS.TF)"),
    Field("BT", 15, 1, "a task switch in hardware went to a task whose TSS has the T flag set"),
    Field("RTM", 16, 1, "the exception came inside a transactional region that is being debugged; active low"),
)

_FIELD = by_name(FIELDS)


def to_positive(hardware: int) -> int:
    """Return the positive form of a word in the hardware form."""
    return hardware ^ RESET


def to_hardware(positive: int) -> int:
    """Return the hardware form of a word in the positive form. One exclusive-or leads both ways."""
    return positive ^ RESET


def encode(value: Dr6) -> int:
    """Return the word for ``value`` in the hardware form, reserved bits as they read (rule 1)."""
    positive = _FIELD["BLD"].place(value.bus_lock)
    for n, hit in enumerate(value.hit):
        positive |= _FIELD[f"B{n}"].place(hit)
    positive |= _FIELD["BD"].place(value.register_access)
    positive |= _FIELD["BS"].place(value.single_step)
    positive |= _FIELD["BT"].place(value.task_switch)
    positive |= _FIELD["RTM"].place(value.transaction)
    return to_hardware(positive)


def decode(hardware: int) -> Dr6:
    """Return what a word in the hardware form says; reserved bits are dropped."""
    positive = to_positive(hardware)
    first, second, third, fourth = (bool(_FIELD[f"B{n}"].read(positive)) for n in range(4))
    return Dr6(
        hit=(first, second, third, fourth),
        bus_lock=bool(_FIELD["BLD"].read(positive)),
        register_access=bool(_FIELD["BD"].read(positive)),
        single_step=bool(_FIELD["BS"].read(positive)),
        task_switch=bool(_FIELD["BT"].read(positive)),
        transaction=bool(_FIELD["RTM"].read(positive)),
    )


def faults(written: int) -> bool:
    """Whether writing this 64-bit word raises #GP(0): rule 3."""
    return written & UPPER_HALF != 0


def stored(written: int, *, rtm: bool, bus_lock: bool) -> int:
    """
    Return what the register holds, and reads as, after ``written`` was moved to it: rules 1 and 2.

    :param written: a word in the hardware form that does not fault.
    :param rtm: whether the CPU has RTM.
    :param bus_lock: whether the CPU can trap on bus locks.
    """
    assert not faults(written), f"writing {written:#x} to DR6 raises #GP(0)"
    kept = mask_of(FIELDS)
    if not rtm:
        kept &= ~_FIELD["RTM"].mask
    if not bus_lock:
        kept &= ~_FIELD["BLD"].mask
    return (written & kept) | (RESET & ~kept)
