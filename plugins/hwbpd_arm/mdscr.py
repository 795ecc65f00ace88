"""
MDSCR_EL1, the monitor debug system control register of arm64, and the OS Lock: whether any slot of the CPU may trap.

     31     30     29   27     26      23..19    15  14  13  12   6   0
    [RES0 |RXfull|TXfull|RXO |TXU |..|INTdis,..|MDE|HDE|KDE|TDCC|ERR|SS]

The rules:

1. A breakpoint or watchpoint exception is taken only while MDE is set. A slot that is armed without it does nothing.
2. The kernel's own accesses trap only while KDE is set as well, and while PSTATE.D is clear. Linux clears PSTATE.D but
   for the few instructions of exception entry and exit; our model does not know it.
3. User mode's exceptions go to the level above, and KDE plays no part in them. Where the kernel runs at EL2 (VHE) the
   same register and the same bits serve.
4. While the OS Lock is set (OSLSR_EL1.OSLK), no slot traps. It is set when a CPU is powered up, so that a debugger
   outside can restore the registers first; writing 0 to bit 0 of OSLAR_EL1 clears it, 1 sets it.
5. SS asks for a software step of user mode: with PSTATE.SS one instruction runs, then an exception is taken. It has no
   part in breakpoints and watchpoints, except that Linux uses it to get past them.
6. HDE (halting debug), the RX, TX, INTdis and other bits belong to an external debugger; unless the OS Lock is set,
   they are read only and writes to them are ignored. SS, TDCC, KDE and MDE are always written. ERR and bit 31 are
   kept, too, with the lock.

Arm Architecture Reference Manual for A-profile, "MDSCR_EL1, Monitor Debug System Control Register", "OSLAR_EL1, OS Lock
Access Register" and "Enabling debug exceptions from the current Exception level".
"""

from __future__ import annotations

from msgspec import Struct

from hwbpd.fields import Field, by_name, mask_of


class Mdscr(Struct, frozen=True):
    """The part of MDSCR_EL1 that an operating system sets. The default is the register after reset."""

    single_step: bool = False  # SS
    trap_channel: bool = False  # TDCC
    kernel: bool = False  # KDE
    monitor: bool = False  # MDE


FIELDS: tuple[Field, ...] = (
    Field("SS", 0, 1, "step user mode by one instruction"),
    Field("ERR", 6, 1, "for an external debugger: an error has been logged"),
    Field("TDCC", 12, 1, "trap user mode's accesses to the debug communication channel"),
    Field("KDE", 13, 1, "the kernel's own accesses trap, too"),
    Field("HDE", 14, 1, "for an external debugger: halt instead of taking an exception"),
    Field("MDE", 15, 1, "breakpoints and watchpoints trap"),
    Field("INTdis", 22, 2, "for an external debugger: interrupts are disabled"),
    Field("TXU", 26, 1, "for an external debugger: underrun of the transmit register"),
    Field("RXO", 27, 1, "for an external debugger: overrun of the receive register"),
    Field("TXfull", 29, 1, "for an external debugger: the transmit register is full"),
    Field("RXfull", 30, 1, "for an external debugger: the receive register is full"),
)

_FIELD = by_name(FIELDS)
_ALWAYS_WRITTEN = _FIELD["SS"].mask | _FIELD["TDCC"].mask | _FIELD["KDE"].mask | _FIELD["MDE"].mask

RESET = 0
OS_LOCK = 1  # of OSLAR_EL1 as written
OSLK = 1 << 1  # of OSLSR_EL1 as read
OSLM = 1 << 3  # of OSLSR_EL1: there is an OS Lock


def encode(value: Mdscr) -> int:
    """Return the word for ``value``; what belongs to an external debugger is zero."""
    return (
        _FIELD["SS"].place(value.single_step)
        | _FIELD["TDCC"].place(value.trap_channel)
        | _FIELD["KDE"].place(value.kernel)
        | _FIELD["MDE"].place(value.monitor)
    )


def decode(word: int) -> Mdscr:
    """Return what ``word`` says; what belongs to an external debugger is dropped."""
    return Mdscr(
        single_step=bool(_FIELD["SS"].read(word)),
        trap_channel=bool(_FIELD["TDCC"].read(word)),
        kernel=bool(_FIELD["KDE"].read(word)),
        monitor=bool(_FIELD["MDE"].read(word)),
    )


def stored(held: int, written: int, *, locked: bool) -> int:
    """
    Return what the register holds after ``written`` was moved to it: rule 6.

    :param held: what it held before.
    :param locked: the OS Lock.
    """
    writable = mask_of(FIELDS) if locked else _ALWAYS_WRITTEN
    return (held & ~writable | written & writable) & mask_of(FIELDS)
