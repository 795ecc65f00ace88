"""What docs/registers-x86.md shows."""

from __future__ import annotations

import inspect
import re

from hwbpd.core.model import Access, Piece, Pool, Span
from hwbpd.debug_unit import Armed, MemoryAccess
from hwbpd.hookspecs import CpuFacts
from hwbpd_x86 import dr6, dr7, linux, profiles, ptrace_view
from hwbpd_x86.debug_unit import X86DebugUnit
from hwbpd_x86.dr7 import RW, Dr7, Len, SlotControl
from hwbpd_x86.fit import X86Backend
from hwbpd_x86.registers import cpu_of
from tests.registers.writing import (
    Fields,
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

READ, WRITE, EXECUTE = Access.READ, Access.WRITE, Access.EXECUTE
READ_WRITE = READ | WRITE
STATUS = {"DR6": dr6.FIELDS[:4] + dr6.FIELDS[5:8]}  # of the active-low ones a one says nothing

UNIT = X86DebugUnit(cpu_of(CpuFacts("x86_64")))
SLOT = {n: (Pool.ANY, n) for n in range(dr7.SLOTS)}
FIRST = Armed(Piece(Span(0x404040, 8), WRITE, Pool.ANY))
SECOND = Armed(Piece(Span(0x404048, 4), READ_WRITE, Pool.ANY))
THIRD = Armed(Piece(Span(0x401000, 8), EXECUTE, Pool.ANY))


def fields_of(register: str) -> Fields:
    return dr7.FIELDS if register == "DR7" else ()


def dr7_picture() -> list[str]:
    return picture(dr7.FIELDS, reserved=dr7.RESET)


def dr7_fields() -> list[str]:
    return field_table(dr7.FIELDS)


def dr6_picture() -> list[str]:
    return picture(dr6.FIELDS, reserved=dr6.RESET)


def dr6_fields() -> list[str]:
    return field_table(dr6.FIELDS)


def codes() -> list[str]:
    meaning = {RW.EXECUTE: "execution", RW.WRITE: "writes", RW.IO: "ports", RW.READ_WRITE: "reads and writes"}
    rows = [
        (str(code.value), meaning[code], f"{Len(code.value).length_bytes} byte" + "s" * (code.value > 0)) for code in RW
    ]
    return table(("code", "R/W", "LEN"), rows)


def plan_first() -> list[str]:
    return code(write_lines(UNIT.plan(UNIT.reset(), {SLOT[0]: FIRST}), fields_of))


def plan_move() -> list[str]:
    """Slot 0 goes from one span to another, and slot 1 stays."""
    file = carry_out(UNIT, UNIT.reset(), UNIT.plan(UNIT.reset(), {SLOT[0]: FIRST, SLOT[1]: SECOND}))
    moved = Armed(Piece(Span(0x601000, 4), READ_WRITE, Pool.ANY))
    return code(write_lines(UNIT.plan(file, {SLOT[0]: moved, SLOT[1]: SECOND}), fields_of))


def accesses() -> list[str]:
    file = UNIT.reset()
    file = carry_out(UNIT, file, UNIT.plan(file, {SLOT[0]: FIRST, SLOT[1]: SECOND, SLOT[2]: THIRD}))
    fetch = MemoryAccess(EXECUTE, 0x401010, 4)
    cases = {
        "writes 8 bytes at 0x404040": [fetch, MemoryAccess(WRITE, 0x404040, 8)],
        "reads them": [fetch, MemoryAccess(READ, 0x404040, 8)],
        "writes 1 byte at 0x404047": [fetch, MemoryAccess(WRITE, 0x404047, 1)],
        "writes 8 bytes at 0x404044, across both": [fetch, MemoryAccess(WRITE, 0x404044, 8)],
        "reads 8 bytes at 0x404044": [fetch, MemoryAccess(READ, 0x404044, 8)],
        "adds to 4 bytes at 0x404048": [fetch, MemoryAccess(READ_WRITE, 0x404048, 4)],
        "is at 0x401000, and writes at 0x404040": [
            MemoryAccess(EXECUTE, 0x401000, 4),
            MemoryAccess(WRITE, 0x404040, 8),
        ],
    }
    rows = [(name, *trap_cells(UNIT.check(file, does), STATUS)) for name, does in cases.items()]
    both = cases["is at 0x401000, and writes at 0x404040"]
    rows.append(("the same again, with RF", *trap_cells(UNIT.check(file, both, resume=True), STATUS)))
    stepped = UNIT.check(file, cases["writes 8 bytes at 0x404040"], single_step=True)
    rows.append(("writes 8 bytes at 0x404040, stepped", *trap_cells(stepped, STATUS)))
    return table(("an instruction that", "#DB", "slots", "DR6"), rows)


def accepted() -> list[str]:
    """Every type and length, at address 0, to which all of them are aligned."""
    kinds = {"W, RW": linux.WRITE, "X": linux.EXECUTE, "R": 1, "R and X, or W and X": 5}
    kernels = {
        "64-bit": linux.Kernel(),
        "64-bit with bpext (AMD)": linux.Kernel(has_masks=True),
        "32-bit": linux.Kernel(word_bytes=4, user_top=linux.USER_TOP_32),
    }
    rows = (
        (kind, name, by_errno({n: linux.open_errno(kernel, linux.Request(bp_type, 0, n)) for n in range(1, 65)}))
        for kind, bp_type in kinds.items()
        for name, kernel in kernels.items()
    )
    return table(("type", "kernel", "lengths from 1 to 64"), alike(rows))


def pokes() -> list[str]:
    """A tracer's way to two watchpoints, with a free slot too few for what it wants last."""
    kernel, view, free = linux.Kernel(), ptrace_view.FRESH, 3
    armed = SlotControl(local=True, access=RW.WRITE, length=Len.EIGHT)
    off = SlotControl()
    steps = [
        ("DR0", 0, 0x404040),
        ("DR7", 7, dr7.encode(Dr7((armed, off, off, off)))),
        ("DR0", 0, 0x404044),
        ("DR1", 1, 0x404048),
        ("DR7", 7, dr7.encode(Dr7((armed, armed, armed, armed)))),
        ("DR7", 7, 0),
        ("DR4", 4, 0),
    ]
    rows = []
    for name, number, value in steps:
        view, errno = ptrace_view.poke(kernel, view, number, value, free_slots=free - view.slots_held)
        reads = f"{ptrace_view.peek(view, number):#x}"
        rows.append((f"{name} = {value:#x}", errno_name(errno), reads, f"{view.slots_held} of {free}"))
    return table(("POKEUSER", "taken", "it then reads as", "slots held"), rows)


def fits() -> list[str]:
    backends = {"x86-64": "x86-64", "AMD with masks": "bulldozer"}
    cases = [
        (Span(0x404040, 8), WRITE, False),
        (Span(0x404041, 3), WRITE, False),
        (Span(0x404041, 3), WRITE, True),
        (Span(0x404044, 16), READ_WRITE, False),
        (Span(0x404040, 64), WRITE, False),
        (Span(0x404042, 64), WRITE, False),
        (Span(0x401003, 8), EXECUTE, False),
        (Span(0x404040, 4), READ, False),
    ]
    rows = (
        (
            asked(span, access) + ", over-report" * over_report,
            name,
            fitted(X86Backend(profiles.PROFILES[cpu]), span, access, over_report=over_report),
        )
        for span, access, over_report in cases
        for name, cpu in backends.items()
    )
    return table(("request", "CPU", "slots: pieces"), alike(rows))


def cpus() -> list[str]:
    rows = []
    for name, profile in profiles.TABLE.items():
        features = ", ".join(sorted(profile.facts.features)) or "none of these"
        rows.append((f"`{name}`", profile.facts.architecture, features, profile.stands_for))
    return table(("name", "kernel", "features", "stands for"), rows)


def cpu_sources() -> list[str]:
    """The paragraph of profiles.py that says where this is from."""
    told = inspect.getdoc(profiles) or ""
    found = re.search(r"Sources: .*", told, re.DOTALL)
    assert found is not None
    return found[0].splitlines()


BLOCKS = (
    dr7_picture,
    dr7_fields,
    dr6_picture,
    dr6_fields,
    codes,
    plan_first,
    plan_move,
    accesses,
    accepted,
    pokes,
    fits,
    cpus,
    cpu_sources,
)
