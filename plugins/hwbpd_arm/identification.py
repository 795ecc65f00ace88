"""
What a CPU says of its debug registers: how many there are, and after which version of the architecture they behave.

DBGDIDR, the Debug ID Register of ARMv7, read with CP14:

     31..28|27..24|23..20   |19..16 |15     |14     |13|12
    [WRPs  |BRPs  |CTX_CMPs |Version|DEVID  |nSUHD  |  |SE| ...]

ID_AA64DFR0_EL1, the AArch64 Debug Feature Register 0:

     31..28   |27..24|23..20|19..16|15..12|11..8 |7..4    |3..0
    [CTX_CMPs |      |WRPs  |      |BRPs  |PMUVer|TraceVer|DebugVer]

The rules:

1. Each count is one less than the number of registers. Those aware of a context are the BRPs with the highest numbers.
2. Version and DebugVer number the same sequence of architectures (``DebugVersion``); numbers only grow, and what a
   version brought, later ones have. The one exception is 4: v7 again, with registers in memory and none in CP14.
3. ARMv7 has 2 to 16 BRPs and 1 to 16 WRPs; Armv8 has 2 to 16 of either.

Not decoded: the fields that say something about tracing and counting, and ID_AA64DFR1_EL1, which counts beyond 16 on
CPUs whose debug registers come in banks (FEAT_Debugv8p9). Linux uses no more than 16.

Arm Architecture Reference Manual, ARMv7-A and ARMv7-R edition, "DBGDIDR, Debug ID Register"; Arm Architecture Reference
Manual for A-profile, "ID_AA64DFR0_EL1, AArch64 Debug Feature Register 0".
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd.fields import Field, by_name


class DebugVersion(enum.IntEnum):
    """The versions of the debug architecture, as both registers number them (rule 2)."""

    V6 = 1
    V6_1 = 2
    V7 = 3
    V7_MEMORY_MAPPED = 4
    V7_1 = 5
    V8 = 6
    V8_1 = 7  # FEAT_VHE
    V8_2 = 8
    V8_4 = 9
    V8_8 = 10
    V8_9 = 11


REGISTERS_MAX = 16  # BRPs, and WRPs, that either register can count

DBGDIDR: tuple[Field, ...] = (
    Field("SE", 12, 1, "the Security Extensions are implemented"),
    Field("PCSR", 13, 1, "the PC can be sampled at its old place"),
    Field("nSUHD", 14, 1, "secure user halting debug is not implemented"),
    Field("DEVID", 15, 1, "there is a DBGDEVID register"),
    Field("Version", 16, 4, "the version of the debug architecture"),
    Field("CTX_CMPs", 20, 4, "how many BRPs are aware of a context, minus one"),
    Field("BRPs", 24, 4, "how many breakpoint register pairs there are, minus one"),
    Field("WRPs", 28, 4, "how many watchpoint register pairs there are, minus one"),
)

ID_AA64DFR0: tuple[Field, ...] = (
    Field("DebugVer", 0, 4, "the version of the debug architecture"),
    Field("TraceVer", 4, 4, "trace registers"),
    Field("PMUVer", 8, 4, "the version of the performance monitors"),
    Field("BRPs", 12, 4, "how many breakpoint register pairs there are, minus one; 0 is reserved"),
    Field("WRPs", 20, 4, "how many watchpoint register pairs there are, minus one; 0 is reserved"),
    Field("CTX_CMPs", 28, 4, "how many BRPs are aware of a context, minus one"),
)

_DIDR = by_name(DBGDIDR)
_DFR0 = by_name(ID_AA64DFR0)


class Identification(Struct, frozen=True):
    """What there is: raw numbers of registers, whatever an operating system then makes of them."""

    breakpoints: int  # BRPs
    watchpoints: int  # WRPs
    context_aware: int  # of the BRPs, the highest so many
    version: int  # a DebugVersion, or one that came after


def decode_dbgdidr(word: int) -> Identification:
    """Return what DBGDIDR says (rule 1)."""
    return Identification(
        breakpoints=_DIDR["BRPs"].read(word) + 1,
        watchpoints=_DIDR["WRPs"].read(word) + 1,
        context_aware=_DIDR["CTX_CMPs"].read(word) + 1,
        version=_DIDR["Version"].read(word),
    )


def encode_dbgdidr(value: Identification) -> int:
    """Return the word that says so; every other field is zero."""
    return (
        _DIDR["BRPs"].place(value.breakpoints - 1)
        | _DIDR["WRPs"].place(value.watchpoints - 1)
        | _DIDR["CTX_CMPs"].place(value.context_aware - 1)
        | _DIDR["Version"].place(value.version)
    )


def decode_id_aa64dfr0(word: int) -> Identification:
    """Return what ID_AA64DFR0_EL1 says (rule 1)."""
    return Identification(
        breakpoints=_DFR0["BRPs"].read(word) + 1,
        watchpoints=_DFR0["WRPs"].read(word) + 1,
        context_aware=_DFR0["CTX_CMPs"].read(word) + 1,
        version=_DFR0["DebugVer"].read(word),
    )


def encode_id_aa64dfr0(value: Identification) -> int:
    """Return the word that says so; every other field is zero."""
    return (
        _DFR0["BRPs"].place(value.breakpoints - 1)
        | _DFR0["WRPs"].place(value.watchpoints - 1)
        | _DFR0["CTX_CMPs"].place(value.context_aware - 1)
        | _DFR0["DebugVer"].place(value.version)
    )
