"""
DBGDSCR, the debug status and control register of ARMv7: whether any slot of the CPU may trap, and why one did.

     31|30    |29    |28..16|15    |14    |13   |12     |11    |10    |9|8..6   |5..2|1        |0
    [  |RXfull|TXfull|  ... |MDBGen|HDBGen|ITRen|UDCCdis|INTdis|DBGack| |aborts |MOE |RESTARTED|HALTED]

The rules:

1. Breakpoints and watchpoints raise exceptions only in **monitor debug-mode**: MDBGen set, HDBGen clear. With HDBGen,
   an external debugger's, they halt the CPU instead. With neither, nothing happens.
2. MDBGen can be written only where the CPU's debug signals allow it (DBGEN, or SPIDEN in the secure world); elsewhere
   it stays clear. Linux reads it back after setting it: "Failed to enable monitor mode".
3. MOE, the method of entry, is set by every debug event: 1 a breakpoint, 2 an asynchronous watchpoint, 3 a BKPT
   instruction, 5 a vector catch, 10 a synchronous watchpoint. It tells what an abort with the fault status "debug
   event" was; there is no other place that does. It does not say which slot.
4. The bits that tell of the CPU's state are read only; software writes MDBGen, HDBGen, UDCCdis, INTdis and DBGack.
5. While the OS Lock is set (DBGOSLSR.OSLK; where there is one, always since v7.1), no slot traps. Writing 0xC5ACCE55 to
   DBGOSLAR sets it, writing anything else clears it.

Not decoded further: the bits of the communication channel (TXfull, RXfull and their latches) and of the pipeline.

Arm Architecture Reference Manual, ARMv7-A and ARMv7-R edition, "DBGDSCR, Debug Status and Control Register", "Debug
event prioritization" and "DBGOSLAR, OS Lock Access Register".
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd.fields import Field, by_name, mask_of


class MethodOfEntry(enum.IntEnum):
    """MOE: what the last debug event was (rule 3)."""

    HALT_REQUEST = 0
    BREAKPOINT = 1
    ASYNCHRONOUS_WATCHPOINT = 2
    BKPT = 3
    EXTERNAL_REQUEST = 4
    VECTOR_CATCH = 5
    OS_UNLOCK = 8
    SYNCHRONOUS_WATCHPOINT = 10


class Dscr(Struct, frozen=True):
    """The part of DBGDSCR that an operating system reads and sets. The default is the register after reset."""

    entry: int = MethodOfEntry.HALT_REQUEST  # MOE; a number, for there are reserved ones
    channel_disabled: bool = False  # UDCCdis
    halting: bool = False  # HDBGen
    monitor: bool = False  # MDBGen

    @property
    def takes_exceptions(self) -> bool:
        """Rule 1."""
        return self.monitor and not self.halting


FIELDS: tuple[Field, ...] = (
    Field("HALTED", 0, 1, "the CPU is halted by an external debugger"),
    Field("RESTARTED", 1, 1, "the CPU has left that state"),
    Field("MOE", 2, 4, "why the last debug event came"),
    Field("SDABORT_l", 6, 1, "a synchronous data abort while halted"),
    Field("ADABORT_l", 7, 1, "an asynchronous data abort while halted"),
    Field("UND_l", 8, 1, "an undefined instruction while halted"),
    Field("DBGack", 10, 1, "behave to the outside as if halted"),
    Field("INTdis", 11, 1, "interrupts are disabled"),
    Field("UDCCdis", 12, 1, "user mode may not use the debug communication channel"),
    Field("ITRen", 13, 1, "an external debugger may feed instructions"),
    Field("HDBGen", 14, 1, "debug events halt the CPU"),
    Field("MDBGen", 15, 1, "debug events raise exceptions"),
    Field("SPIDdis", 16, 1, "no invasive debugging of secure privileged modes"),
    Field("SPNIDdis", 17, 1, "no other debugging of them either"),
    Field("NS", 18, 1, "the CPU is in the non-secure world"),
    Field("ADAdiscard", 19, 1, "asynchronous data aborts are discarded while halted"),
    Field("ExtDCCmode", 20, 2, "how an external debugger accesses the communication channel"),
    Field("InstrCompl_l", 24, 1, "the last instruction that was fed is complete"),
    Field("PipeAdv", 25, 1, "the pipeline has moved since this bit was cleared"),
    Field("TXfull_l", 26, 1, "TXfull, as an external debugger last saw it"),
    Field("RXfull_l", 27, 1, "RXfull, as an external debugger last saw it"),
    Field("TXfull", 29, 1, "the transmit register is full"),
    Field("RXfull", 30, 1, "the receive register is full"),
)

_FIELD = by_name(FIELDS)

WRITABLE = mask_of(tuple(_FIELD[name] for name in ("DBGack", "INTdis", "UDCCdis", "HDBGen", "MDBGen")))  # rule 4
OS_LOCK_KEY = 0xC5ACCE55  # written to DBGOSLAR
OSLK = 1 << 1  # of DBGOSLSR
OSLM = 1 << 3  # of DBGOSLSR: there is an OS Lock, and no register that saves the others


def encode(value: Dscr) -> int:
    """Return the word for ``value``; what an operating system has no use for is zero."""
    return (
        _FIELD["MOE"].place(value.entry)
        | _FIELD["UDCCdis"].place(value.channel_disabled)
        | _FIELD["HDBGen"].place(value.halting)
        | _FIELD["MDBGen"].place(value.monitor)
    )


def decode(word: int) -> Dscr:
    """Return what ``word`` says; what an operating system has no use for is dropped."""
    return Dscr(
        entry=_FIELD["MOE"].read(word),
        channel_disabled=bool(_FIELD["UDCCdis"].read(word)),
        halting=bool(_FIELD["HDBGen"].read(word)),
        monitor=bool(_FIELD["MDBGen"].read(word)),
    )


def stored(held: int, written: int, *, permitted: bool = True) -> int:
    """
    Return what the register holds after ``written`` was moved to it by software: rules 2 and 4.

    :param held: what it held before.
    :param permitted: whether the CPU's debug signals allow monitor debug-mode.
    """
    kept = held & ~WRITABLE | written & WRITABLE
    return kept if permitted else kept & ~_FIELD["MDBGen"].mask
