"""
How Linux gets past a hit that it has reported itself, which registers that takes, and what is missed meanwhile.

Both exceptions come before the instruction, so it would meet the slot again for ever.

ARMv7 has no single step. A **mismatch breakpoint** at the instruction traps at any other one, in user mode:

1. A breakpoint that was hit is turned into one, in its own BRP.
2. A watchpoint that was hit is taken out of its WRP, and the **reserved BRP** holds the mismatch breakpoint: the BRP
   after the usable ones, which Linux hands to nobody for this sake.
3. At the next instruction the breakpoint exception comes. Linux puts back whatever it was stepping, unless that
   exception is at the same address.

Where the kernel keeps book of rule 2 has changed, and with it what ``hw_breakpoint_enabled`` has to look at:

- ``Bookkeeping.TABLE``, the first kernels: the event being stepped is moved to ``bp_on_reg[core_num_brps]``, beyond the
  usable ones. A query that looks at ``core_num_brps`` entries, and at the watchpoints, sees nothing while it is there.
- ``Bookkeeping.REGISTER``, since: it stays in ``wp_on_reg``, and only the registers of BRP ``core_num_brps`` are
  written. A query of the tables sees it. But code that saves, disables or restores ``core_num_brps`` *registers* leaves
  the mismatch breakpoint live, in whatever runs next: a guest would trap at its first instruction.

``looks_at`` says which entries a query must read, and ``pairs_to_switch`` which registers a switch must.

arm64 steps by MDSCR_EL1.SS, and needs no register for it:

4. All breakpoints of the level (user mode's, or the kernel's) are switched off if it was a breakpoint, all watchpoints
   if it was a watchpoint; then one instruction is stepped, and they are switched on again. A hit of one slot so covers
   up the others. At a watchpoint hit in the kernel, user mode's are switched off, too.

What is missed meanwhile:

- ARMv7, T32 code: the mismatch breakpoint selects a word. A second instruction of two bytes in the same word is
  executed before it traps, and its accesses to the watched bytes are not seen.
- ARMv7, in the kernel: a user watchpoint met by copying to or from user memory is stepped without a report. The
  mismatch breakpoint is for user mode, so the watchpoint stays off until the kernel returns there.
- ARMv7: there is one reserved BRP. A second watchpoint that is hit by the same instruction rewrites it with the same
  contents, and both are put back together.
- ARMv7: the event is put back into the lowest WRP, or BRP, that is free then, which need not be the one it was in. We
  put it back where it was.
- Both: a signal that arrives first is where the step ends; after its handler the instruction is executed again, and
  reports once more.
- arm64: what another slot of the same sort would have reported of that instruction.

Linux, arch/arm/kernel/hw_breakpoint.c, enable_single_step(), watchpoint_single_step_handler(); arch/arm64/kernel/
hw_breakpoint.c, toggle_bp_registers(), try_step_suspended_breakpoints().
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from msgspec import Struct

from hwbpd.core.model import Pool
from hwbpd.debug_unit import RegisterFile, Write
from hwbpd_arm import bcr, wcr
from hwbpd_arm.bcr import WHOLE_WORD, Bcr, BreakpointType, Privilege
from hwbpd_arm.mdscr import Mdscr
from hwbpd_arm.mdscr import encode as encode_mdscr
from hwbpd_arm.plan import ARMED, Contents, Pair
from hwbpd_arm.v7_unit import Armv7DebugUnit
from hwbpd_arm.v8_unit import Arm64DebugUnit

_SS = encode_mdscr(Mdscr(single_step=True))


class Bookkeeping(enum.Enum):
    """Where a 32-bit kernel notes a watchpoint that is being stepped."""

    TABLE = "bp_on_reg[core_num_brps]"
    REGISTER = "the register alone"


class Step(Struct, frozen=True):
    """A slot that ARMv7 Linux is stepping past: what was in its registers, and at which instruction."""

    slot: tuple[Pool, int]
    put_back: Contents
    address: int  # of the instruction


class OnReg(Struct, frozen=True):
    """The kernel's tables of one CPU: which entries of ``bp_on_reg`` and ``wp_on_reg`` have an event."""

    breakpoints: frozenset[int] = frozenset()
    watchpoints: frozenset[int] = frozenset()


def begin(
    unit: Armv7DebugUnit, file: RegisterFile, slot: tuple[Pool, int], address: int
) -> tuple[Step, Sequence[Write]]:
    """
    Return what is being stepped, and the writes that begin it: rules 1 and 2.

    :param slot: one that was hit, and is armed.
    :param address: of the instruction that hit it.
    """
    pool, number = slot
    pair = (unit.breakpoints if pool == Pool.INST else unit.watchpoints)[number]
    held = Contents(file[pair.address], file[pair.control])
    if pool == Pool.INST:
        stepping, privilege = pair, bcr.decode(held.control).privilege
    else:
        reserved = unit.reserved
        assert reserved is not None, "Linux lets nobody without a handler set a watchpoint where it cannot step past it"
        stepping, privilege = reserved, wcr.decode(held.control).privilege
    mismatch = Bcr(enabled=True, privilege=privilege, byte_select=WHOLE_WORD, type=BreakpointType.MISMATCH)
    return Step(slot, held, address), [
        Write(pair.control, 0),
        Write(stepping.address, address & ~0b11),
        Write(stepping.control, bcr.encode(mismatch)),
    ]


def ends(step: Step, address: int) -> bool:
    """Whether a breakpoint exception at ``address`` ends the step: rule 3."""
    return address != step.address


def end(unit: Armv7DebugUnit, step: Step) -> Sequence[Write]:
    """Return the writes that put a slot back."""
    pool, number = step.slot
    if pool == Pool.INST:
        pair = stepping = unit.breakpoints[number]
    else:
        reserved = unit.reserved
        assert reserved is not None
        pair, stepping = unit.watchpoints[number], reserved
    return [
        Write(stepping.control, 0),
        Write(pair.address, step.put_back.address),
        Write(pair.control, step.put_back.control),
    ]


def noted(bookkeeping: Bookkeeping, tables: OnReg, slot: tuple[Pool, int], usable: int) -> OnReg:
    """
    Return the kernel's tables while a slot is stepped.

    :param usable: ``core_num_brps``.
    """
    pool, number = slot
    if pool == Pool.INST or bookkeeping is Bookkeeping.REGISTER:
        return tables
    return OnReg(tables.breakpoints | {usable}, tables.watchpoints - {number})


def looks_at(bookkeeping: Bookkeeping, usable: int) -> range:
    """Return which entries of ``bp_on_reg`` a query has to read, besides all of ``wp_on_reg``."""
    return range(usable + 1 if bookkeeping is Bookkeeping.TABLE else usable)


def hw_breakpoint_enabled(tables: OnReg, entries: range) -> bool:
    """Whether a query that reads these entries of ``bp_on_reg`` sees a breakpoint installed on the CPU."""
    return any(entry in tables.breakpoints for entry in entries) or bool(tables.watchpoints)


def pairs_to_switch(unit: Armv7DebugUnit) -> tuple[Pair, ...]:
    """Return the registers that a switch of worlds has to save, disable and restore: all, the reserved one included."""
    return (*unit.breakpoints, *unit.watchpoints)


# --- arm64 -----------------------------------------------------------------------------------------------------------


def switch_off(unit: Arm64DebugUnit, file: RegisterFile, pool: Pool, *, kernel: bool) -> Sequence[Write]:
    """
    Return the writes with which arm64 Linux begins to step past a hit of its own: rule 4.

    The instruction is then stepped by PSTATE.SS, which is not a debug register.

    :param pool: of the slot that was hit.
    :param kernel: whether the kernel was running.
    """
    off = Privilege.KERNEL if kernel else Privilege.USER
    if pool == Pool.DATA:
        off |= Privilege.USER
    writes = [Write(pair.control, file[pair.control] & ~ARMED) for pair in _armed_pairs(unit, file, pool, off)]
    return [*writes, Write("MDSCR_EL1", file["MDSCR_EL1"] | _SS)]


def switch_on(unit: Arm64DebugUnit, before: RegisterFile, file: RegisterFile) -> Sequence[Write]:
    """
    Return the writes after the step: what was armed ``before`` it is armed again.

    :param file: the registers now.
    """
    pairs = (*unit.breakpoints, *unit.watchpoints)
    off = [pair.control for pair in pairs if before[pair.control] & ~file[pair.control] & ARMED]
    writes = [Write(control, before[control]) for control in off]
    return [*writes, Write("MDSCR_EL1", file["MDSCR_EL1"] & ~_SS)]


def _armed_pairs(unit: Arm64DebugUnit, file: RegisterFile, pool: Pool, privilege: Privilege) -> list[Pair]:
    pairs = unit.breakpoints if pool == Pool.INST else unit.watchpoints
    # PMC and PAC stand in the same place.
    return [
        pair for pair in pairs if file[pair.control] & ARMED and bcr.decode(file[pair.control]).privilege & privilege
    ]
