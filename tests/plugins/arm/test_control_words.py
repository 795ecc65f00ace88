"""DBGBCR, DBGWCR, DBGDSCR, MDSCR_EL1 and the identification registers: words and values, and what registers keep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.fields import Field, mask_of
from hwbpd_arm import bcr, dscr, identification, mdscr, wcr
from hwbpd_arm.bcr import Bcr, BreakpointType, Privilege
from hwbpd_arm.dscr import Dscr, MethodOfEntry
from hwbpd_arm.identification import DebugVersion, Identification
from hwbpd_arm.mdscr import Mdscr
from hwbpd_arm.wcr import LoadStore, Wcr

WORDS = st.integers(0, 2**32 - 1)
NIBBLES = st.integers(0, 15)
BITS = st.booleans()
PRIVILEGES = st.sampled_from([Privilege(n) for n in range(4)])
BCRS = st.builds(
    Bcr,
    BITS,
    PRIVILEGES,
    NIBBLES,
    BITS,
    st.integers(0, 3),
    NIBBLES,
    st.sampled_from(BreakpointType),
    st.integers(0, 31),
)
WCRS = st.builds(
    Wcr,
    BITS,
    PRIVILEGES,
    st.sampled_from([LoadStore(n) for n in range(4)]),
    st.integers(0, 255),
    BITS,
    st.integers(0, 3),
    NIBBLES,
    BITS,
    st.integers(0, 31),
)
VERSIONS = [version for version in DebugVersion if version != DebugVersion.V7_MEMORY_MAPPED]


# --- DBGBCR ----------------------------------------------------------------------------------------------------------


@given(BCRS)
def test_a_breakpoints_value_survives_the_way_through_a_word(value: Bcr) -> None:
    assert bcr.decode(bcr.encode(value)) == value


@given(WORDS)
def test_a_breakpoints_word_comes_back_without_its_reserved_bits(word: int) -> None:
    assert bcr.encode(bcr.decode(word)) == word & mask_of(bcr.FIELDS)


BCR_RESERVED = {3, 4, 9, 10, 11, 12, 29, 30, 31}  # of all versions
MASK_BITS = {24, 25, 26, 27, 28}


@pytest.mark.parametrize(
    ("version", "reserved"),
    [
        (DebugVersion.V7, BCR_RESERVED | {13, 23}),
        (DebugVersion.V7_1, BCR_RESERVED),
        (DebugVersion.V8, BCR_RESERVED | MASK_BITS),
        (DebugVersion.V8_9, BCR_RESERVED | MASK_BITS),
    ],
)
def test_each_bit_of_a_breakpoints_word_is_kept_or_reserved(version: DebugVersion, reserved: set[int]) -> None:
    copies = {5: {5, 6}, 6: set[int](), 7: {7, 8}, 8: set[int]()} if version >= DebugVersion.V8 else {}
    for bit in range(32):
        expected = copies.get(bit, {bit} - reserved)
        assert bcr.stored(1 << bit, version) == sum(1 << one for one in expected), f"bit {bit}"


@given(WORDS, st.sampled_from(VERSIONS))
def test_storing_what_was_read_of_a_breakpoint_changes_nothing(word: int, version: DebugVersion) -> None:
    read = bcr.stored(word, version)
    assert bcr.stored(read, version) == read


def test_what_linux_programs_of_breakpoints_is_kept_by_every_version() -> None:
    for version in VERSIONS:
        for select in (bcr.WHOLE_WORD, bcr.FIRST_HALF, bcr.SECOND_HALF):
            for privilege in (Privilege.KERNEL, Privilege.USER, Privilege.KERNEL | Privilege.USER):
                word = bcr.encode(Bcr(enabled=True, privilege=privilege, byte_select=select))
                assert bcr.stored(word, version) == word


def test_the_word_of_a_mismatch_breakpoint_is_the_one_linux_steps_with() -> None:
    value = Bcr(enabled=True, privilege=Privilege.USER, byte_select=0xF, type=BreakpointType.MISMATCH)
    assert bcr.encode(value) == 1 << 22 | 0xF << 5 | 2 << 1 | 1


@given(BCRS)
def test_only_unlinked_address_comparisons_are_simulated(value: Bcr) -> None:
    assert value.is_simulated == (value.security == 0 and value.type in (0b0000, 0b0100))


# --- DBGWCR ----------------------------------------------------------------------------------------------------------


@given(WCRS)
def test_a_watchpoints_value_survives_the_way_through_a_word(value: Wcr) -> None:
    assert wcr.decode(wcr.encode(value)) == value


@given(WORDS)
def test_a_watchpoints_word_comes_back_as_the_register_stores_it(word: int) -> None:
    assert wcr.encode(wcr.decode(word)) == wcr.stored(word, DebugVersion.V8)


WCR_RESERVED = {21, 22, 23, 29, 30, 31}


@pytest.mark.parametrize(
    ("version", "lanes", "reserved"),
    [
        (DebugVersion.V7, 4, WCR_RESERVED | {9, 10, 11, 12, 13}),
        (DebugVersion.V7, 8, WCR_RESERVED | {13}),
        (DebugVersion.V7_1, 8, WCR_RESERVED),
        (DebugVersion.V8, 8, WCR_RESERVED),
    ],
)
def test_each_bit_of_a_watchpoints_word_is_kept_or_reserved(version: int, lanes: int, reserved: set[int]) -> None:
    for bit in range(32):
        assert wcr.stored(1 << bit, version, lanes=lanes) == (0 if bit in reserved else 1 << bit), f"bit {bit}"


def slow_watched(control: Wcr, address: int) -> set[int]:
    """Each byte by itself, from a list of those that a register pair names. Small masks only."""
    if control.mask:
        size = 2**control.mask
        return {byte for byte in range(2**12) if byte // size == address // size} if control.mask > 2 else set()
    base, lanes = (address, 4) if address % 8 == 4 else (address - address % 8, 8)
    return {base + lane for lane in range(lanes) if control.byte_select & 2**lane}


@given(st.builds(Wcr, byte_select=st.integers(0, 255), mask=st.integers(0, 12)), st.integers(0, 2**10 - 1))
def test_a_watchpoint_takes_in_the_bytes_that_its_registers_name(control: Wcr, word: int) -> None:
    address = 4 * word
    taken = slow_watched(control, address)
    assert {byte for byte in range(2**12) if wcr.watches(control, address, byte)} == taken
    span = wcr.watched(control, address)
    if not taken:
        assert span is None
    else:
        assert span is not None
        assert (span.address, span.address + span.length_bytes - 1) == (min(taken), max(taken))


@pytest.mark.parametrize(
    ("select", "mask", "address", "rule"),
    [
        (0b0001_1100, 0, 0x1000, None),
        (0b1111_1111, 0, 0x1000, None),
        (0b0001_0100, 0, 0x1000, "neighbours"),
        (0b0000_1111, 0, 0x1004, None),
        (0b1111_0000, 0, 0x1004, "upper word"),
        (0b1111_1111, 4, 0x1010, None),
        (0b1111_1111, 4, 0x1018, "masked bits"),
        (0b0000_1111, 4, 0x1010, "all bytes"),
        (0b1111_1111, 2, 0x1010, "reserved"),
    ],
)
def test_what_must_not_be_programmed_is_named(select: int, mask: int, address: int, rule: str | None) -> None:
    control = Wcr(privilege=Privilege.USER, byte_select=select, mask=mask)
    found = wcr.unpredictable(control, address)
    assert (found is None) if rule is None else (found is not None and rule in found)


def test_a_watchpoint_for_nobody_must_not_be_programmed() -> None:
    assert wcr.unpredictable(Wcr(byte_select=1), 0x1000) == "PAC 0 is reserved"


# --- DBGDSCR ---------------------------------------------------------------------------------------------------------


@given(st.builds(Dscr, NIBBLES, BITS, BITS, BITS))
def test_a_status_value_survives_the_way_through_a_word(value: Dscr) -> None:
    assert dscr.decode(dscr.encode(value)) == value


def test_the_status_register_is_where_linux_looks_for_it() -> None:
    assert dscr.encode(Dscr(monitor=True)) == 1 << 15
    assert dscr.encode(Dscr(halting=True)) == 1 << 14
    assert dscr.decode(0x28).entry == MethodOfEntry.SYNCHRONOUS_WATCHPOINT


@given(WORDS, WORDS)
def test_software_changes_only_the_bits_that_are_its_own(held: int, written: int) -> None:
    changed = dscr.stored(held, written) ^ held
    assert changed & ~sum(1 << bit for bit in (10, 11, 12, 14, 15)) == 0
    assert dscr.stored(held, written) & dscr.WRITABLE == written & dscr.WRITABLE


@given(WORDS, WORDS)
def test_monitor_mode_stays_off_where_the_cpus_signals_forbid_it(held: int, written: int) -> None:
    assert not dscr.decode(dscr.stored(held, written, permitted=False)).monitor


@given(BITS, BITS)
def test_exceptions_need_monitor_mode_and_no_halting(monitor: bool, halting: bool) -> None:
    assert Dscr(monitor=monitor, halting=halting).takes_exceptions == (monitor and not halting)


# --- MDSCR_EL1 -------------------------------------------------------------------------------------------------------


@given(st.builds(Mdscr, BITS, BITS, BITS, BITS))
def test_a_monitor_value_survives_the_way_through_a_word(value: Mdscr) -> None:
    assert mdscr.decode(mdscr.encode(value)) == value


def test_the_monitor_register_is_where_linux_looks_for_it() -> None:
    assert mdscr.encode(Mdscr(monitor=True)) == 1 << 15
    assert mdscr.encode(Mdscr(kernel=True)) == 1 << 13
    assert mdscr.encode(Mdscr(single_step=True)) == 1


@given(WORDS, st.integers(0, 2**64 - 1), BITS)
def test_what_an_external_debugger_owns_is_written_under_the_os_lock_only(
    held: int, written: int, locked: bool
) -> None:
    always = sum(1 << bit for bit in (0, 12, 13, 15))
    held &= mask_of(mdscr.FIELDS)
    stored = mdscr.stored(held, written, locked=locked)
    assert stored & always == written & always
    others = mask_of(mdscr.FIELDS) & ~always
    assert stored & others == (written if locked else held) & others
    assert stored & ~mask_of(mdscr.FIELDS) == 0


# --- identification --------------------------------------------------------------------------------------------------


IDENTIFICATIONS = st.builds(
    Identification, st.integers(1, 16), st.integers(1, 16), st.integers(1, 16), st.integers(0, 15)
)


@given(IDENTIFICATIONS)
def test_an_identification_survives_the_way_through_either_register(value: Identification) -> None:
    assert identification.decode_dbgdidr(identification.encode_dbgdidr(value)) == value
    assert identification.decode_id_aa64dfr0(identification.encode_id_aa64dfr0(value)) == value


def test_known_identifications_are_read_as_the_manuals_say() -> None:
    """UG1087, Zynq UltraScale+ Devices Register Reference, has ID_AA64DFR0_EL1 of its Cortex-A53."""
    a53 = identification.decode_id_aa64dfr0(0x1030_5106)
    assert a53 == Identification(breakpoints=6, watchpoints=4, context_aware=2, version=DebugVersion.V8)
    a15 = identification.decode_dbgdidr(0x3515_F000)
    assert a15 == Identification(breakpoints=6, watchpoints=4, context_aware=2, version=DebugVersion.V7_1)


@pytest.mark.parametrize(
    "fields", [bcr.FIELDS, wcr.FIELDS, dscr.FIELDS, mdscr.FIELDS, identification.DBGDIDR, identification.ID_AA64DFR0]
)
def test_the_fields_of_a_register_do_not_overlap_and_are_in_order(fields: tuple[Field, ...]) -> None:
    bits = [bit for field in fields for bit in range(field.first_bit, field.first_bit + field.width)]
    assert bits == sorted(set(bits))
    assert bits[-1] < 32
