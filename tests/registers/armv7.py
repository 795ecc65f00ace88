"""What docs/registers-armv7.md shows."""

from __future__ import annotations

from hwbpd.core.model import Pool, Span
from hwbpd.debug_unit import MemoryAccess
from hwbpd_arm import bcr, dscr, linux, profiles, stepping, wcr
from hwbpd_arm.dscr import MethodOfEntry
from hwbpd_arm.fit import Armv7Backend
from hwbpd_arm.identification import DBGDIDR, DebugVersion
from hwbpd_arm.linux import Kernel, Request
from hwbpd_arm.ptrace_view import FRESH, Numbered
from hwbpd_arm.stepping import Bookkeeping, OnReg
from hwbpd_arm.v7_unit import Armv7DebugUnit
from tests.registers import arm
from tests.registers.arm import EXECUTE, READ, READ_WRITE, WRITE, fields_of, user, within
from tests.registers.writing import (
    alike,
    asked,
    by_errno,
    carry_out,
    code,
    errno_name,
    field_table,
    fitted,
    picture,
    table,
    trap_cells,
    write_lines,
)

UNIT = Armv7DebugUnit(6, 4)
WATCHED, BESIDE, STOPPED = user(READ_WRITE, 0x404040, 8), user(READ_WRITE, 0x404048, 2), user(EXECUTE, 0x10400, 4)
FIRST, SECOND, BREAKPOINT = (Pool.DATA, 0), (Pool.DATA, 1), (Pool.INST, 0)
KERNEL = Kernel(arm64=False, version=DebugVersion.V7_1, user_top=linux.USER_TOP_32)


def didr_picture() -> list[str]:
    return picture(DBGDIDR)


def didr_fields() -> list[str]:
    return field_table(DBGDIDR)


def bcr_picture() -> list[str]:
    return picture(bcr.FIELDS)


def bcr_fields() -> list[str]:
    return field_table(bcr.FIELDS)


def wcr_picture() -> list[str]:
    return picture(wcr.FIELDS)


def wcr_fields() -> list[str]:
    return field_table(wcr.FIELDS)


def dscr_picture() -> list[str]:
    return picture(within(dscr.FIELDS, 16), 16)


def dscr_fields() -> list[str]:
    return field_table(within(dscr.FIELDS, 16))


def entries() -> list[str]:
    return table(("MOE", "what it was"), [(str(entry.value), f"`{entry.name}`") for entry in MethodOfEntry])


def plan_first() -> list[str]:
    return code(write_lines(UNIT.plan(UNIT.reset(), {FIRST: WATCHED}), fields_of))


def plan_breakpoint() -> list[str]:
    """Beside that watchpoint, a breakpoint on a T32 instruction in the middle of a word."""
    file = carry_out(UNIT, UNIT.reset(), UNIT.plan(UNIT.reset(), {FIRST: WATCHED}))
    return code(write_lines(UNIT.plan(file, {FIRST: WATCHED, BREAKPOINT: user(EXECUTE, 0x10402, 2)}), fields_of))


def accesses() -> list[str]:
    fetch = MemoryAccess(EXECUTE, 0x10410, 4)
    cases = {
        "writes 4 bytes at 0x404044": [fetch, MemoryAccess(WRITE, 0x404044, 4)],
        "reads 8 bytes at 0x404046": [fetch, MemoryAccess(READ, 0x404046, 8)],
        "reads 1 byte at 0x40404a": [fetch, MemoryAccess(READ, 0x40404A, 1)],
        "is at 0x10400": [MemoryAccess(EXECUTE, 0x10400, 4)],
    }
    rows = []
    units = {
        "v7.1": (UNIT, {FIRST: WATCHED, SECOND: BESIDE, BREAKPOINT: STOPPED}),
        "v7": (Armv7DebugUnit(6, 4, version=DebugVersion.V7), {FIRST: WATCHED, BREAKPOINT: STOPPED}),
    }
    for name, does in cases.items():
        for version, (unit, slots) in units.items():
            file = carry_out(unit, unit.reset(), unit.plan(unit.reset(), slots))
            rows.append((name, version, *trap_cells(unit.check(file, does), {})))
    return table(("an instruction that", "on", "exception", "slots", "status"), rows)


def stepped() -> list[str]:
    """Past a hit of the first watchpoint, by an instruction at 0x10410."""
    file = carry_out(UNIT, UNIT.reset(), UNIT.plan(UNIT.reset(), {FIRST: WATCHED, BREAKPOINT: STOPPED}))
    step, begins = stepping.begin(UNIT, file, FIRST, 0x10410)
    ends = stepping.end(UNIT, step)
    between = "(the instruction; the next one traps)"
    return code([*write_lines(begins, fields_of), between, *write_lines(ends, fields_of)])


def enabled() -> list[str]:
    """hw_breakpoint_enabled while the only watchpoint is stepped past, by where the kernel notes it."""
    rows = []
    usable = UNIT.slots()[Pool.INST]
    armed = OnReg(watchpoints=frozenset({0}))
    for bookkeeping in Bookkeeping:
        during = stepping.noted(bookkeeping, armed, FIRST, usable)
        right = stepping.looks_at(bookkeeping, usable)
        for looks_at in dict.fromkeys((range(usable), right)):
            answer = stepping.hw_breakpoint_enabled(during, looks_at)
            rows.append((bookkeeping.value, f"{len(looks_at)} entries", "yes" if answer else "**no**"))
    return table(("noted in", "a query that reads of bp_on_reg", "enabled?"), rows)


def usable() -> list[str]:
    """What Linux hands out of six BRPs and four WRPs."""
    rows = []
    for version in DebugVersion:
        if version <= DebugVersion.V8:
            found = linux.usable_v7(6, 4, version)
            rows.append((arm.version_name(version), str(int(version)), str(found.breakpoints), str(found.watchpoints)))
    return table(("debug version", "DBGDIDR.Version", "breakpoints", "watchpoints"), rows)


def accepted() -> list[str]:
    callers = {"perf": Request(0, 0, 0), "ptrace": Request(0, 0, 0, own_handler=True)}
    kinds = {"X": linux.EXECUTE, "RW": linux.READ_WRITE, "R or W": linux.WRITE}
    rows = (
        (
            f"{kind}, {name}",
            str(offset),
            by_errno(
                {
                    length: linux.open_errno(
                        KERNEL,
                        Request(bp_type, 0x404040 + offset, length, own_handler=caller.own_handler),
                        free_slots=1,
                    )
                    for length in range(1, 10)
                }
            ),
        )
        for kind, bp_type in kinds.items()
        for offset in range(8)
        for name, caller in callers.items()
    )
    return table(("type", "address modulo 8", "lengths from 1 to 9"), alike(rows))


def pokes() -> list[str]:
    """A 32-bit tracer's way to a watchpoint, and the surprises on it."""
    tracer = Numbered(KERNEL, linux.usable_v7(6, 4, DebugVersion.V7_1), {Pool.INST: 5, Pool.DATA: 4})
    armed = wcr.encode(wcr.Wcr(True, bcr.Privilege.USER, wcr.LoadStore.STORE, 0b11))
    steps = [(-1, 0x404042), (-2, armed), (-1, 0x404042), (-2, 0), (-2, armed & ~1), (33, 0x10400), (65, 0x10400)]
    view, rows = FRESH, []
    for number, value in steps:
        view, errno = tracer.poke(view, number, value)
        read, _ = tracer.peek(view, number)
        held = f"{view.slots_held(Pool.INST)} + {view.slots_held(Pool.DATA)}"
        rows.append((f"register {number} = {value:#x}", errno_name(errno), f"{read:#x}", held))
    return table(("PTRACE_SETHBPREGS", "taken", "it then reads as", "slots held, x + data"), rows)


def fits() -> list[str]:
    backend = Armv7Backend(profiles.ARMV7["cortex-a15"])
    old = Armv7Backend(profiles.ARMV7["cortex-a9"])
    rows = (
        (asked(span, access) + ", over-report" * wide, name, fitted(cpu, span, access, over_report=wide))
        for span, access, wide in (
            (Span(0x404040, 8), READ_WRITE, False),
            (Span(0x404041, 3), READ_WRITE, False),
            (Span(0x404041, 3), READ_WRITE, True),
            (Span(0x404040, 32), READ_WRITE, False),
            (Span(0x404040, 4), WRITE, False),
            (Span(0x10402, 2), EXECUTE, False),
        )
        for name, cpu in {"Cortex-A15": backend, "Cortex-A9": old}.items()
    )
    return table(("request", "CPU", "slots: pieces"), alike(rows))


def cpus() -> list[str]:
    handed_out = {
        name: linux.usable_v7(facts.breakpoints or 0, facts.watchpoints or 0, facts.debug_version or 0)
        for name, facts in profiles.ARMV7.items()
    }
    return arm.cpus(profiles.ARMV7_TABLE, handed_out)


BLOCKS = (
    didr_picture,
    didr_fields,
    bcr_picture,
    bcr_fields,
    wcr_picture,
    wcr_fields,
    dscr_picture,
    dscr_fields,
    entries,
    plan_first,
    plan_breakpoint,
    accesses,
    stepped,
    enabled,
    usable,
    accepted,
    pokes,
    fits,
    cpus,
)
