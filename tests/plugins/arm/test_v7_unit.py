"""ARMv7's debug unit: what traps, what is known of it, and what is not; and the plans that arm it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from hwbpd.core.model import Pool
from hwbpd.debug_unit import Armed, MemoryAccess, RegisterFile, Trap
from hwbpd_arm.identification import DebugVersion
from hwbpd_arm.v7_unit import Armv7DebugUnit
from tests.plugins.arm.units import R, W, X, armed, carry_out, check_plan, execute, read, slots_of, update, write

A15 = Armv7DebugUnit(6, 4)
A9 = Armv7DebugUnit(6, 4, version=DebugVersion.V7)
AARCH32 = Armv7DebugUnit(6, 4, version=DebugVersion.V8)
HERE, CODE = 0x1_1000, 0x1_0000
MDBGEN, HDBGEN = 1 << 15, 1 << 14
MISMATCH = 1 << 22


def file_of(unit: Armv7DebugUnit, **registers: int) -> RegisterFile:
    """A file with the OS Lock clear and MDBGen set, and these registers written."""
    file: RegisterFile = unit.reset()
    if "DBGOSLSR" in file:
        file = unit.write(file, "DBGOSLAR", 0)
    for register, value in {"DBGDSCR": MDBGEN, **registers}.items():
        file = unit.write(file, register, value)
    return file


# --- against a slow model --------------------------------------------------------------------------------------------


def slow_slots(file: RegisterFile, access: MemoryAccess) -> set[tuple[Pool, int]]:
    """The slots that one access meets on v7.1, every byte by itself; registers and addresses small."""
    bit, met = (1 if access.kernel else 2), set()
    for n in range(6):
        control, address = file[f"DBGBCR{n}"], file[f"DBGBVR{n}"]
        kind, mask, whose = control >> 20 & 15, control >> 24 & 31, control >> 1 & 3
        if not control & 1 or X not in access.access or control >> 14 & 3 or mask in (1, 2):
            continue
        starts = {address + lane for lane in range(4) if control >> 5 + lane & 1}
        if mask:
            starts = set(range(address >> mask << mask, (address >> mask << mask) + 2**mask))
        inside = access.address in starts
        if whose in (0, bit, 3) and ((kind == 0 and inside) or (kind == 4 and not inside and not access.kernel)):
            met.add((Pool.INST, n))
    touched = set(range(access.address, access.address + access.length_bytes))
    for n in range(4):
        control, address = file[f"DBGWCR{n}"], file[f"DBGWVR{n}"]
        mask, select = control >> 24 & 31, control >> 5 & 255
        if not control & 1 or control >> 14 & 3 or control >> 20 & 1 or mask in (1, 2) or not control >> 1 & bit:
            continue
        base, lanes = (address, 4) if address % 8 == 4 else (address // 8 * 8, 8)
        taken = {base + lane for lane in range(lanes) if select >> lane & 1}
        if mask:
            taken = {byte for byte in touched if byte >> mask == address >> mask}
        kinds = {access for code, access in ((1, R), (2, W)) if control >> 3 & code}
        if taken & touched and any(kind in access.access for kind in kinds):
            met.add((Pool.DATA, n))
    return met


@st.composite
def files(draw: DrawFn) -> RegisterFile:
    registers = {}
    for n in range(6):
        kind = draw(st.sampled_from([0, 0, 0, 4, 1]))
        word = draw(st.integers(0, 2**9 - 1)) | 1 | kind << 20 | draw(st.sampled_from([0, 0, 0, 1, 2, 3, 4])) << 24
        # A mismatch breakpoint meets nearly everything; mostly without.
        registers[f"DBGBCR{n}"] = draw(st.sampled_from([word, word, word & ~MISMATCH, 0]))
        registers[f"DBGBVR{n}"] = CODE + 4 * draw(st.integers(0, 3))
    for n in range(4):
        word = draw(st.integers(0, 2**13 - 1)) | 1 | draw(st.sampled_from([0, 0, 0, 1 << 14, 1 << 20]))
        registers[f"DBGWCR{n}"] = word | draw(st.sampled_from([0, 0, 0, 1, 2, 3, 4])) << 24
        registers[f"DBGWVR{n}"] = HERE + 4 * draw(st.integers(0, 7))
    return file_of(A15, **registers)


ACCESSES = st.one_of(
    st.builds(MemoryAccess, st.just(X), st.integers(0, 9).map(lambda n: CODE + 2 * n), st.just(2), st.booleans()),
    st.builds(
        MemoryAccess,
        st.sampled_from([R, W, R | W]),
        st.integers(-4, 40).map(lambda n: HERE + n),
        st.sampled_from([1, 2, 4, 8]),
        st.booleans(),
    ),
)


@given(files(), ACCESSES)
def test_it_traps_as_a_model_that_lists_every_byte(file: RegisterFile, access: MemoryAccess) -> None:
    assert slots_of(A15.check(file, [access])) == slow_slots(file, access)


# --- what is known of a trap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "status"),
    [
        (A9, {"DBGDSCR.MOE": 10}),
        (A15, {"DBGDSCR.MOE": 10, "DFAR": HERE + 2}),
        (AARCH32, {"DBGDSCR.MOE": 10, "DFAR": HERE + 2, "DFSR.WnR": 1}),
    ],
    ids=["v7", "v7.1", "v8"],
)
def test_each_version_knows_more_of_a_watchpoint(unit: Armv7DebugUnit, status: dict[str, int]) -> None:
    file = carry_out(unit, unit.reset(), {(Pool.DATA, 0): armed(R | W, HERE + 2, 2)})
    assert unit.check(file, [write(HERE, 4)]) == Trap(((Pool.DATA, 0),), before=True, status=status)


def test_a_breakpoint_leaves_its_method_of_entry_only() -> None:
    file = carry_out(A15, A15.reset(), {(Pool.INST, 4): armed(X, CODE, 4), (Pool.DATA, 0): armed(R | W, HERE, 4)})
    trap = A15.check(file, [execute(CODE), write(HERE, 4)])
    assert trap == Trap(((Pool.INST, 4),), before=True, status={"DBGDSCR.MOE": 1})


def test_a_swap_is_a_read_to_aarch32_where_its_read_would_have_been_reported() -> None:
    for access, is_write in ((R, 0), (W, 1), (R | W, 0)):
        file = carry_out(AARCH32, AARCH32.reset(), {(Pool.DATA, 0): armed(access, HERE, 4)})
        trap = AARCH32.check(file, [update(HERE, 4)])
        assert trap is not None
        assert trap.status["DFSR.WnR"] == is_write


# --- modes and locks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dscr", "traps"), [(MDBGEN, True), (0, False), (MDBGEN | HDBGEN, False), (HDBGEN, False)])
def test_only_monitor_debug_mode_raises_exceptions(dscr: int, traps: bool) -> None:
    file = file_of(A15, DBGWVR0=HERE, DBGWCR0=0x1F | 0xF << 5, DBGDSCR=dscr)
    assert (A15.check(file, [read(HERE, 1)]) is not None) == traps


def test_monitor_mode_cannot_be_had_where_the_cpus_signals_forbid_it() -> None:
    unit = Armv7DebugUnit(6, 4, permitted=False)
    file = carry_out(unit, unit.reset(), {(Pool.DATA, 0): armed(R | W, HERE, 4)})
    assert not file["DBGDSCR"] & MDBGEN
    assert unit.check(file, [write(HERE, 4)]) is None


def test_the_os_lock_takes_its_key_and_opens_to_anything_else() -> None:
    file = file_of(A15, DBGWVR0=HERE, DBGWCR0=0x1F | 0xF << 5)
    locked = A15.write(file, "DBGOSLAR", 0xC5ACCE55)
    assert A15.check(locked, [read(HERE, 1)]) is None
    assert A15.check(A15.write(locked, "DBGOSLAR", 1), [read(HERE, 1)]) is not None


def test_there_is_no_os_lock_before_v7_1() -> None:
    assert "DBGOSLSR" not in A9.reset()
    with pytest.raises(ValueError, match="UNDEFINED"):
        A9.write(A9.reset(), "DBGOSLAR", 0)


def test_what_is_not_there_or_read_only_is_undefined() -> None:
    for register in ("DBGBCR6", "DBGWVR4", "DBGOSLSR", "MDSCR_EL1"):
        with pytest.raises(ValueError, match="UNDEFINED"):
            A15.write(A15.reset(), register, 0)


# --- slots and plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "breakpoints", "watchpoints"),
    [(A15, 5, 4), (A9, 5, 1), (AARCH32, 5, 4), (Armv7DebugUnit(3, 2, version=DebugVersion.V7), 2, 1)],
)
def test_linux_hands_out_all_but_what_it_keeps(unit: Armv7DebugUnit, breakpoints: int, watchpoints: int) -> None:
    assert unit.slots() == {Pool.INST: breakpoints, Pool.DATA: watchpoints}
    assert unit.reserved == unit.breakpoints[breakpoints]


def test_what_is_kept_cannot_be_planned_for() -> None:
    for slot in ((Pool.INST, 5), (Pool.DATA, 4), (Pool.ANY, 0)):
        with pytest.raises(ValueError, match="no slot"):
            A15.plan(A15.reset(), {slot: armed(X if slot[0] == Pool.INST else R | W, HERE, 4)})


PIECES = st.builds(
    lambda word, offset, length: armed(R | W, HERE + 8 * word + offset, min(length, 8 - offset)),
    st.integers(0, 3),
    st.integers(0, 7),
    st.integers(1, 8),
)


@st.composite
def wanted(draw: DrawFn) -> dict[tuple[Pool, int], Armed]:
    slots = {(Pool.DATA, number): draw(PIECES) for number in draw(st.sets(st.integers(0, 3)))}
    code = st.builds(lambda n, length: armed(X, CODE + 4 * n, length), st.integers(0, 3), st.sampled_from([2, 4]))
    return slots | {(Pool.INST, number): draw(code) for number in draw(st.sets(st.integers(0, 4)))}


@given(wanted(), wanted())
def test_a_plan_leads_there_in_a_safe_order(
    first: dict[tuple[Pool, int], Armed], second: dict[tuple[Pool, int], Armed]
) -> None:
    check_plan(A15, first, second)


def test_a_plan_disarms_the_reserved_breakpoint() -> None:
    file = file_of(A15, DBGBVR5=CODE, DBGBCR5=MISMATCH | 0xF << 5 | 2 << 1 | 1)
    file = carry_out(A15, file, {(Pool.INST, 0): armed(X, CODE, 4)})
    assert not file["DBGBCR5"] & 1


def test_the_words_are_those_that_linux_writes() -> None:
    # Given slots that one word, half a word and a doubleword are to be watched by,
    slots = {
        (Pool.DATA, 0): armed(R | W, HERE + 4, 4),
        (Pool.DATA, 1): armed(R | W, HERE + 6, 2),
        (Pool.DATA, 2): armed(R | W, HERE, 8),
        (Pool.INST, 0): armed(X, CODE + 2, 2),
    }

    # when they are planned, then address and BAS are split as Linux splits them.
    file = carry_out(A15, A15.reset(), slots)
    user_rw = 2 << 1 | 3 << 3 | 1
    assert [(file[f"DBGWVR{n}"], file[f"DBGWCR{n}"]) for n in range(3)] == [
        (HERE + 4, 0x0F << 5 | user_rw),
        (HERE + 4, 0x0C << 5 | user_rw),
        (HERE, 0xFF << 5 | user_rw),
    ]
    assert (file["DBGBVR0"], file["DBGBCR0"]) == (CODE, 0xC << 5 | 2 << 1 | 1)


def test_a_cpu_that_selects_four_bytes_holds_no_doubleword_but_a_masked_one() -> None:
    unit = Armv7DebugUnit(6, 4, version=DebugVersion.V7, lanes=4)
    file = carry_out(unit, unit.reset(), {(Pool.DATA, 0): armed(R | W, HERE, 8)})
    assert file["DBGWCR0"] >> 24 == 3
    assert [n for n in range(-2, 12) if unit.check(file, [read(HERE + n, 1)])] == list(range(8))
