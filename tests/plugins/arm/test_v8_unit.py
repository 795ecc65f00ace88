"""arm64's debug unit, against a slow model that lists every byte, and rule by rule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from hwbpd.core.model import Access, Piece, Pool, Span
from hwbpd.debug_unit import Armed, DebugUnit, MemoryAccess, RegisterFile, Trap
from hwbpd_arm import v8_unit
from hwbpd_arm.v8_unit import Arm64DebugUnit, Syndrome
from tests.plugins.arm.units import R, W, X, armed, carry_out, check_plan, execute, read, slots_of, update, write

UNIT = Arm64DebugUnit(6, 4)
VHE = Arm64DebugUnit(6, 4, kernel_el=2)
HERE = 0x40_1000  # data
CODE = 0x40_0000
KERNEL = 0xFFFF_8000_0000_1000

MDE, KDE = 1 << 15, 1 << 13


def file_of(**registers: int) -> RegisterFile:
    """A file with the OS Lock clear and both MDE and KDE set, and these registers written."""
    file: RegisterFile = UNIT.write(UNIT.reset(), "OSLAR_EL1", 0)
    for register, value in {"MDSCR_EL1": MDE | KDE, **registers}.items():
        file = UNIT.write(file, register, value)
    return file


# --- against a slow model --------------------------------------------------------------------------------------------


def slow_check(file: RegisterFile, accesses: list[MemoryAccess]) -> tuple[set[tuple[Pool, int]], int | None]:
    """
    The slots of the first access that meets any, and the lowest byte watched; every byte is looked at by itself.

    Made for a kernel at EL1, words and addresses below 2^48.
    """
    if file["OSLSR_EL1"] >> 1 & 1 or not file["MDSCR_EL1"] >> 15 & 1:
        return set(), None
    for access in accesses:
        if access.kernel and not file["MDSCR_EL1"] >> 13 & 1:
            continue
        bit = 1 if access.kernel else 2
        met: set[tuple[Pool, int]] = set()
        lowest: list[int] = []
        for n in range(6):
            control, address = file[f"DBGBCR{n}_EL1"], file[f"DBGBVR{n}_EL1"]
            starts = {address + lane for lane in range(4) if control >> 5 + lane & 1}
            counts = control & 1 and control >> 1 & bit and not control >> 14 & 0b11_1111_1111
            reserved = control >> 13 & 1 and not control >> 1 & 1
            if X in access.access and counts and not reserved and access.address in starts:
                met.add((Pool.INST, n))
        for n in range(4):
            control, address = file[f"DBGWCR{n}_EL1"], file[f"DBGWVR{n}_EL1"]
            mask, select = control >> 24 & 31, control >> 5 & 255
            if mask:
                taken = {byte for byte in touched(access) if byte >> mask == address >> mask and mask > 2}
            elif address % 8 == 4:
                taken = {address + lane for lane in range(4) if select >> lane & 1} & touched(access)
            else:
                taken = {address // 8 * 8 + lane for lane in range(8) if select >> lane & 1} & touched(access)
            kinds = {1: {R}, 2: {W}, 3: {R, W}, 0: set()}[control >> 3 & 3]
            counts = control & 1 and control >> 1 & bit and not control >> 14 & 0b111_1111
            reserved = control >> 13 & 1 and not control >> 1 & 1
            if counts and not reserved and any(kind in access.access for kind in kinds) and taken:
                met.add((Pool.DATA, n))
                lowest.append(min(taken))
        if met:
            # A fetch stops the instruction before its data is accessed.
            fetched = {slot for slot in met if slot[0] == Pool.INST}
            return (fetched, None) if fetched else (met, min(lowest))
    return set(), None


def touched(access: MemoryAccess) -> set[int]:
    return set(range(access.address, access.address + access.length_bytes))


def control_words(draw: DrawFn, masks: list[int]) -> int:
    word = draw(st.sampled_from([1, 1, 1, 0])) | draw(st.integers(0, 3)) << 1 | draw(st.integers(0, 3)) << 3
    word |= draw(st.integers(0, 255)) << 5 | draw(st.sampled_from([0, 0, 0, 1])) << 13
    rare = draw(st.sampled_from([0, 0, 0, 0, 1, 1 << 6]))  # SSC, WT or BT
    return word | rare << 14 | draw(st.sampled_from(masks)) << 24


@st.composite
def files(draw: DrawFn) -> RegisterFile:
    registers = {}
    for n in range(6):
        registers[f"DBGBVR{n}_EL1"] = CODE + draw(st.integers(0, 7))
        registers[f"DBGBCR{n}_EL1"] = control_words(draw, [0])
    for n in range(4):
        registers[f"DBGWVR{n}_EL1"] = HERE + draw(st.integers(0, 31))
        registers[f"DBGWCR{n}_EL1"] = control_words(draw, [0, 0, 0, 1, 2, 3, 4, 5])
    registers["MDSCR_EL1"] = draw(st.sampled_from([MDE | KDE, MDE | KDE, MDE, KDE, 0]))
    file = file_of(**registers)
    return UNIT.write(file, "OSLAR_EL1", draw(st.sampled_from([0, 0, 0, 0, 1])))


@st.composite
def instructions(draw: DrawFn) -> list[MemoryAccess]:
    kernel = draw(st.booleans())
    fetch = execute(CODE + draw(st.integers(0, 5)) * 2, kernel=kernel)
    data = [
        MemoryAccess(
            draw(st.sampled_from([R, W, R | W])),
            HERE + draw(st.integers(-4, 40)),
            draw(st.sampled_from([1, 2, 4, 8, 16, 64])),
            kernel,
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    return [fetch, *data]


@given(files(), instructions())
def test_it_traps_as_a_model_that_lists_every_byte(file: RegisterFile, accesses: list[MemoryAccess]) -> None:
    trap = UNIT.check(file, accesses)
    met, lowest = slow_check(file, accesses)

    assert slots_of(trap) == met
    if trap is not None:
        assert trap.before
        assert trap.status.get("FAR_EL1") == lowest


# --- rule by rule ----------------------------------------------------------------------------------------------------


def with_slots(unit: DebugUnit, **wanted: Armed) -> RegisterFile:
    """The registers after a reset and a plan for slots named ``inst0`` or ``data2``."""
    named = {(Pool(name[:4]), int(name[4:])): slot for name, slot in wanted.items()}
    return carry_out(unit, unit.reset(), named)


@pytest.mark.parametrize(("kernel", "watch", "brk"), [(False, 0x34, 0x30), (True, 0x35, 0x31)])
def test_the_syndrome_says_what_it_was_and_where_from(kernel: bool, watch: int, brk: int) -> None:
    data, code = (KERNEL, KERNEL + 0x100) if kernel else (HERE, CODE)
    file = with_slots(UNIT, data0=armed(R | W, data, 8), inst0=armed(X, code, 4))

    stored = UNIT.check(file, [write(data + 4, 4, kernel=kernel)])
    loaded = UNIT.check(file, [read(data + 4, 4, kernel=kernel)])
    fetched = UNIT.check(file, [execute(code, kernel=kernel), write(data, 4, kernel=kernel)])

    il, status = 1 << 25, 0x22
    here = {"FAR_EL1": data + 4}
    data_slot, inst_slot = ((Pool.DATA, 0),), ((Pool.INST, 0),)
    assert stored == Trap(data_slot, before=True, status={"ESR_EL1": watch << 26 | il | 1 << 6 | status, **here})
    assert loaded == Trap(data_slot, before=True, status={"ESR_EL1": watch << 26 | il | status, **here})
    assert fetched == Trap(inst_slot, before=True, status={"ESR_EL1": brk << 26 | il | status})


@given(st.builds(Syndrome, st.booleans(), st.booleans(), st.booleans()))
def test_a_syndrome_survives_the_way_through_a_word(value: Syndrome) -> None:
    assert v8_unit.decode_esr(v8_unit.encode_esr(value)) == value or (value.write and not value.watchpoint)


def test_other_syndromes_are_not_taken_for_debug_exceptions() -> None:
    for exception in set(range(64)) - {0x30, 0x31, 0x34, 0x35}:
        assert v8_unit.decode_esr(exception << 26 | 0x22) is None


def test_an_atomic_is_a_read_where_its_read_would_have_been_reported() -> None:
    for access, is_write in ((R, 0), (W, 1), (R | W, 0)):
        file = with_slots(UNIT, data1=armed(access, HERE, 4))
        trap = UNIT.check(file, [update(HERE, 4)])
        assert trap is not None
        assert trap.status["ESR_EL1"] >> 6 & 1 == is_write


def test_the_first_access_that_is_met_is_the_only_one() -> None:
    file = with_slots(UNIT, data0=armed(W, HERE + 8, 8), data1=armed(W, HERE + 16, 8))
    trap = UNIT.check(file, [write(HERE, 8), write(HERE + 16, 8), write(HERE + 8, 8)])
    assert slots_of(trap) == {(Pool.DATA, 1)}


def test_a_wide_access_meets_every_watchpoint_it_touches() -> None:
    file = with_slots(UNIT, data0=armed(W, HERE + 13, 1), data3=armed(W, HERE + 2, 3))
    trap = UNIT.check(file, [write(HERE, 16)])
    assert slots_of(trap) == {(Pool.DATA, 0), (Pool.DATA, 3)}
    assert trap is not None
    assert trap.status["FAR_EL1"] == HERE + 2


def test_some_cores_report_where_the_access_starts() -> None:
    unit = Arm64DebugUnit(6, 4, reports_start=True)
    trap = unit.check(with_slots(unit, data0=armed(W, HERE + 13, 1)), [write(HERE, 16)])
    assert trap is not None
    assert trap.status["FAR_EL1"] == HERE


def test_the_top_byte_of_a_user_address_does_not_matter() -> None:
    file = with_slots(UNIT, data0=armed(W, HERE, 8))
    trap = UNIT.check(file, [write(0xAB << 56 | HERE, 8)])
    assert trap is not None
    assert trap.status["FAR_EL1"] == 0xAB << 56 | HERE, "it is reported as it was accessed"


@pytest.mark.parametrize("unit", [UNIT, VHE], ids=["el1", "vhe"])
@pytest.mark.parametrize(("user", "kernel"), [(True, False), (False, True), (True, True)])
def test_a_slot_counts_for_whom_it_is_armed(unit: Arm64DebugUnit, user: bool, kernel: bool) -> None:
    slot = Armed(Piece(Span(HERE, 8), W, Pool.DATA), user=user, kernel=kernel)
    file = with_slots(unit, data0=slot)
    assert (unit.check(file, [write(HERE, 1)]) is not None) == user
    assert (unit.check(file, [write(HERE, 1, kernel=True)]) is not None) == kernel


def test_a_kernel_at_el2_is_not_seen_without_hmc() -> None:
    # Given the words of a kernel at EL1 on a CPU whose kernel runs at EL2,
    file = with_slots(UNIT, data0=armed(W, KERNEL, 8, user=False, kernel=True))

    # then nothing is met there, and with HMC it is.
    assert VHE.check(file, [write(KERNEL, 8, kernel=True)]) is None
    file = VHE.write(file, "DBGWCR0_EL1", file["DBGWCR0_EL1"] | 1 << 13)
    assert slots_of(VHE.check(file, [write(KERNEL, 8, kernel=True)])) == {(Pool.DATA, 0)}


def test_a_t32_breakpoint_is_at_one_half_of_a_word() -> None:
    file = with_slots(UNIT, inst0=armed(X, CODE + 2, 2))
    assert UNIT.check(file, [execute(CODE)]) is None
    assert slots_of(UNIT.check(file, [execute(CODE + 2, 2)])) == {(Pool.INST, 0)}


def test_a_greater_block_is_watched_by_a_mask() -> None:
    file = with_slots(UNIT, data0=armed(W, HERE, 64))
    assert [n for n in range(-8, 80, 8) if UNIT.check(file, [write(HERE + n, 8)])] == list(range(0, 64, 8))


def test_nothing_traps_after_a_reset_until_the_lock_is_cleared_and_mde_set() -> None:
    # Given a watchpoint armed by hand after a reset,
    file: RegisterFile = UNIT.reset()
    for register, value in (("DBGWVR0_EL1", HERE), ("DBGWCR0_EL1", 0x1FF5), ("MDSCR_EL1", MDE)):
        file = UNIT.write(file, register, value)

    # then it does nothing under the OS Lock, traps without, and does nothing without MDE.
    assert UNIT.check(file, [write(HERE, 8)]) is None
    file = UNIT.write(file, "OSLAR_EL1", 0)
    assert UNIT.check(file, [write(HERE, 8)]) is not None
    assert UNIT.check(UNIT.write(file, "MDSCR_EL1", 0), [write(HERE, 8)]) is None
    assert UNIT.check(UNIT.write(file, "OSLAR_EL1", 1), [write(HERE, 8)]) is None


def test_the_kernels_own_accesses_trap_with_kde_only() -> None:
    file = with_slots(UNIT, data0=armed(W, HERE, 8, user=True, kernel=True))
    file = UNIT.write(file, "MDSCR_EL1", MDE)
    assert UNIT.check(file, [write(HERE, 8, kernel=True)]) is None
    assert UNIT.check(file, [write(HERE, 8)]) is not None
    file = UNIT.write(file, "MDSCR_EL1", MDE | KDE)
    assert UNIT.check(file, [write(HERE, 8, kernel=True)]) is not None


def test_what_is_not_there_or_read_only_is_undefined() -> None:
    for register in ("DBGBCR6_EL1", "DBGWVR4_EL1", "DR7", "OSLSR_EL1"):
        with pytest.raises(ValueError, match="UNDEFINED"):
            UNIT.write(UNIT.reset(), register, 0)


def test_address_registers_keep_word_addresses_with_a_sign() -> None:
    file = UNIT.write(UNIT.reset(), "DBGBVR0_EL1", 0x0001_0000_0000_1003)
    assert file["DBGBVR0_EL1"] == 0xFFFF_0000_0000_1000
    file = UNIT.write(file, "DBGWVR0_EL1", 0xFFFE_8000_0000_1007)
    assert file["DBGWVR0_EL1"] == 0x0000_8000_0000_1004


# --- plans -----------------------------------------------------------------------------------------------------------

IN_WORD = st.builds(
    lambda word, offset, length: Span(HERE + 8 * word + offset, min(length, 8 - offset)),
    st.integers(0, 3),
    st.integers(0, 7),
    st.integers(1, 8),
)
DATA_PIECES = st.builds(Piece, IN_WORD, st.sampled_from([R, W, R | W]), st.just(Pool.DATA))
BLOCK_PIECES = st.builds(
    lambda bits, access: Piece(Span(HERE, 1 << bits), access, Pool.DATA), st.integers(4, 12), st.sampled_from([R, W])
)
INST_PIECES = st.builds(lambda word: Piece(Span(CODE + 4 * word, 4), Access.EXECUTE, Pool.INST), st.integers(0, 3))
LEVELS = st.sampled_from([(True, True), (True, False), (False, True), (False, False)])


@st.composite
def wanted(draw: DrawFn) -> dict[tuple[Pool, int], Armed]:
    slots = {}
    for number in draw(st.sets(st.integers(0, 3))):
        slots[Pool.DATA, number] = Armed(draw(DATA_PIECES | BLOCK_PIECES), *draw(LEVELS))
    for number in draw(st.sets(st.integers(0, 5))):
        slots[Pool.INST, number] = Armed(draw(INST_PIECES), *draw(LEVELS))
    return slots


@pytest.mark.parametrize("unit", [UNIT, VHE, Arm64DebugUnit(16, 16)], ids=["el1", "vhe", "max"])
def test_a_plan_leads_there_in_a_safe_order(unit: Arm64DebugUnit) -> None:
    @settings(max_examples=60 if unit is UNIT else 20)
    @given(wanted(), wanted())
    def leads(first: dict[tuple[Pool, int], Armed], second: dict[tuple[Pool, int], Armed]) -> None:
        check_plan(unit, first, second)

    leads()


def test_a_plan_leaves_an_external_debuggers_bits_alone() -> None:
    file: RegisterFile = UNIT.write(UNIT.reset(), "MDSCR_EL1", 1 << 14)  # HDE, under the OS Lock
    file = carry_out(UNIT, file, {(Pool.DATA, 0): armed(W, HERE, 8)})
    assert file["MDSCR_EL1"] == 1 << 14 | MDE


@pytest.mark.parametrize(
    "piece",
    [
        Piece(Span(HERE + 4, 8), W, Pool.DATA),
        Piece(Span(HERE + 8, 16), W, Pool.DATA),
        Piece(Span(HERE, 2**32), W, Pool.DATA),
        Piece(Span(HERE, 4), X, Pool.DATA),
        Piece(Span(CODE + 2, 4), X, Pool.INST),
        Piece(Span(CODE, 4), W, Pool.INST),
    ],
    ids=str,
)
def test_no_plan_is_made_for_what_a_slot_cannot_hold(piece: Piece) -> None:
    with pytest.raises(ValueError, match="can hold"):
        UNIT.plan(UNIT.reset(), {(piece.pool, 0): Armed(piece)})
