"""What docs/registers-arm64.md shows."""

from __future__ import annotations

from hwbpd.core.model import Pool, Span
from hwbpd.debug_unit import MemoryAccess
from hwbpd_arm import bcr, linux, mdscr, profiles, wcr
from hwbpd_arm.attribution import reported_slots
from hwbpd_arm.fit import Arm64Backend
from hwbpd_arm.identification import ID_AA64DFR0, DebugVersion
from hwbpd_arm.linux import Kernel, Request
from hwbpd_arm.plan import Contents
from hwbpd_arm.ptrace_view import FRESH, Regset
from hwbpd_arm.stepping import switch_off, switch_on
from hwbpd_arm.v8_unit import ESR, Arm64DebugUnit
from tests.registers import arm
from tests.registers.arm import EXECUTE, READ, READ_WRITE, TYPES, WRITE, fields_of, user, within
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

UNIT = Arm64DebugUnit(6, 4)
BREAKPOINTS = bcr.fields_of(DebugVersion.V8)
WATCHED, BESIDE, STOPPED = user(WRITE, 0x404040, 8), user(READ, 0x404048, 3), user(EXECUTE, 0x401000, 4)
FIRST, SECOND, BREAKPOINT = (Pool.DATA, 0), (Pool.DATA, 1), (Pool.INST, 0)


def id_picture() -> list[str]:
    return picture(ID_AA64DFR0)


def id_fields() -> list[str]:
    return field_table(ID_AA64DFR0)


def bcr_picture() -> list[str]:
    return picture(BREAKPOINTS)


def bcr_fields() -> list[str]:
    return field_table(BREAKPOINTS)


def wcr_picture() -> list[str]:
    return picture(wcr.FIELDS)


def wcr_fields() -> list[str]:
    return field_table(wcr.FIELDS)


def mdscr_picture() -> list[str]:
    return picture(within(mdscr.FIELDS, 16), 16)


def mdscr_fields() -> list[str]:
    return field_table(mdscr.FIELDS)


def esr_picture() -> list[str]:
    return picture(ESR)


def esr_fields() -> list[str]:
    return field_table(ESR)


def plan_first() -> list[str]:
    return code(write_lines(UNIT.plan(UNIT.reset(), {FIRST: WATCHED}), fields_of))


def plan_move() -> list[str]:
    """The first watchpoint goes elsewhere, the second one stays."""
    file = carry_out(UNIT, UNIT.reset(), UNIT.plan(UNIT.reset(), {FIRST: WATCHED, SECOND: BESIDE}))
    moved = user(READ_WRITE, 0x601003, 5)
    return code(write_lines(UNIT.plan(file, {FIRST: moved, SECOND: BESIDE}), fields_of))


def accesses() -> list[str]:
    slots = {FIRST: WATCHED, SECOND: BESIDE, BREAKPOINT: STOPPED}
    file = carry_out(UNIT, UNIT.reset(), UNIT.plan(UNIT.reset(), slots))
    fetch = MemoryAccess(EXECUTE, 0x401010, 4)
    cases = {
        "writes 8 bytes at 0x404040": [fetch, MemoryAccess(WRITE, 0x404040, 8)],
        "reads them": [fetch, MemoryAccess(READ, 0x404040, 8)],
        "writes 16 bytes at 0x404038": [fetch, MemoryAccess(WRITE, 0x404038, 16)],
        "reads 8 bytes at 0x404044": [fetch, MemoryAccess(READ, 0x404044, 8)],
        "reads 1 byte at 0x40404b": [fetch, MemoryAccess(READ, 0x40404B, 1)],
        "reads and writes 16 bytes at 0x404040 at once": [fetch, MemoryAccess(READ_WRITE, 0x404040, 16)],
        "is at 0x401000, and writes at 0x404040": [
            MemoryAccess(EXECUTE, 0x401000, 4),
            MemoryAccess(WRITE, 0x404040, 8),
        ],
        "writes 8 bytes at 0x404040, in the kernel": [
            MemoryAccess(EXECUTE, 2**64 - 2**47, 4, kernel=True),
            MemoryAccess(WRITE, 0x404040, 8, kernel=True),
        ],
    }
    rows = [(name, *trap_cells(UNIT.check(file, does), {"ESR_EL1": ESR})) for name, does in cases.items()]
    return table(("an instruction that", "exception", "slots", "status"), rows)


def stepped() -> list[str]:
    """What Linux writes to get past a hit of the first of two watchpoints."""
    file = carry_out(UNIT, UNIT.reset(), UNIT.plan(UNIT.reset(), {FIRST: WATCHED, SECOND: BESIDE}))
    off = switch_off(UNIT, file, Pool.DATA, kernel=False)
    on = switch_on(UNIT, file, carry_out(UNIT, file, off))
    return code([*write_lines(off, fields_of), "(one instruction)", *write_lines(on, fields_of)])


def attributed() -> list[str]:
    """Two watchpoints for writes, and what is taken for a hit of which."""
    spans = {0: Span(0x404040, 8), 1: Span(0x404058, 2)}
    kernel = Kernel()
    requests = {n: Request(linux.WRITE, span.address, span.length_bytes) for n, span in spans.items()}
    watching: dict[int, Contents] = {n: linux.contents(kernel, request) for n, request in requests.items()}
    writes, reads = (0x404043, 0x404038, 0x404050, 0x404054, 0x404059), (0x404043,)
    cases = [*((far, True) for far in writes), *((far, False) for far in reads)]
    rows = [
        (
            f"{far:#x}",
            "a write" if write else "a read",
            ", ".join(map(str, reported_slots(watching, far, write=write))) or "none",
        )
        for far, write in cases
    ]
    return table(("FAR_EL1", "ESR_EL1 says", "Linux reports slot"), rows)


def accepted() -> list[str]:
    tasks = {"AArch64 task": False, "AArch32 task": True}
    rows = (
        (
            f"{kind}, {name}",
            str(offset),
            by_errno(
                {
                    length: linux.open_errno(
                        Kernel(), Request(bp_type, 0x404040 + offset, length, compat=compat), free_slots=1
                    )
                    for length in range(1, 10)
                }
            ),
        )
        for kind, bp_type in {"X": linux.EXECUTE, "R, W, RW": linux.WRITE}.items()
        for offset in range(8)
        for name, compat in tasks.items()
    )
    return table(("type", "address modulo 8", "lengths from 1 to 9"), alike(rows))


def written() -> list[str]:
    """What Linux makes of requests that it takes."""
    rows = []
    for kind, address, length in (
        ("W", 0x404040, 8),
        ("W", 0x404041, 3),
        ("RW", 0x404044, 8),
        ("R", 0x404047, 4),
        ("X", 0x401000, 1),
    ):
        held = linux.contents(Kernel(), Request(TYPES[kind], address, length))
        select = wcr.decode(held.control).byte_select
        rows.append((f"{kind}, length {length}, at {address:#x}", f"{held.address:#x}", f"{select:#010b}"))
    return table(("taken", "address register", "BAS"), rows)


def regsets() -> list[str]:
    """A tracer's way to a watchpoint."""
    tracer = Regset(Kernel(), linux.usable_v8(6, 4), {Pool.INST: 6, Pool.DATA: 4})
    armed = wcr.encode(wcr.Wcr(True, load_store=wcr.LoadStore.STORE, byte_select=0b11))
    header = bytes(8)
    one = (0x404042).to_bytes(8, "little") + armed.to_bytes(8, "little")
    cases = {
        "slot 0: 0x404042, two bytes, stores": header + one,
        "the same again": header + one,
        "only the control word of slot 0, cleared": header + (0x404042).to_bytes(8, "little") + bytes(8),
        "five slots": header + 5 * one,
        "slot 0 with BAS 0b101": header + one[:8] + (armed & ~(0xFF << 5) | 0b101 << 5).to_bytes(8, "little"),
    }
    view, rows = FRESH, []
    for name, raw in cases.items():
        view, errno = tracer.write(view, Pool.DATA, raw)
        read = tracer.read(view, Pool.DATA)
        address, control = int.from_bytes(read[8:16], "little"), int.from_bytes(read[16:20], "little")
        rows.append((name, errno_name(errno), f"{address:#x}, {control:#x}", f"{view.slots_held(Pool.DATA)} of 4"))
    return table(("PTRACE_SETREGSET", "taken", "slot 0 then reads as", "slots held"), rows)


def fits() -> list[str]:
    backend = Arm64Backend(profiles.ARM64["cortex-a72"])
    cases = (
        (Span(0x404040, 8), WRITE, False),
        (Span(0x404041, 7), WRITE, False),
        (Span(0x404045, 8), READ, False),
        (Span(0x404040, 32), WRITE, False),
        (Span(0x404041, 32), READ_WRITE, False),
        (Span(0x401002, 2), EXECUTE, False),
        (Span(0x401002, 4), EXECUTE, False),
    )
    rows = [(asked(span, access), fitted(backend, span, access, over_report=wide)) for span, access, wide in cases]
    return table(("request", "slots: pieces"), rows)


def cpus() -> list[str]:
    usable = {
        name: linux.usable_v8(facts.breakpoints or 0, facts.watchpoints or 0) for name, facts in profiles.ARM64.items()
    }
    return arm.cpus(profiles.ARM64_TABLE, usable)


BLOCKS = (
    id_picture,
    id_fields,
    bcr_picture,
    bcr_fields,
    wcr_picture,
    wcr_fields,
    mdscr_picture,
    mdscr_fields,
    esr_picture,
    esr_fields,
    plan_first,
    plan_move,
    accesses,
    stepped,
    attributed,
    accepted,
    written,
    regsets,
    fits,
    cpus,
)
