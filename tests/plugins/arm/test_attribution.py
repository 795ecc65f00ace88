"""Which watchpoint Linux reports, against a model that measures the distance to each byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.model import Pool
from hwbpd_arm.attribution import distance, reported_slots
from hwbpd_arm.bcr import Privilege
from hwbpd_arm.plan import Contents
from hwbpd_arm.v8_unit import Arm64DebugUnit, decode_esr
from hwbpd_arm.wcr import LoadStore, Wcr, encode, watched
from tests.plugins.arm.units import R, W, armed, carry_out, update, write

HERE = 0x1000


def watch(address: int, length: int, kind: LoadStore = LoadStore.STORE) -> Contents:
    """The registers for bytes of one doubleword."""
    offset = address % 8
    select = ((1 << length) - 1) << offset
    return Contents(address - offset, encode(Wcr(True, Privilege.USER, kind, select)))


PLACES = st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 8)).map(
    lambda place: watch(HERE + 8 * place[0] + place[1], min(place[2], 8 - place[1]))
)


@given(st.dictionaries(st.integers(0, 3), PLACES, min_size=1), st.integers(HERE - 20, HERE + 90))
def test_the_exact_ones_are_reported_and_else_the_nearest(watchpoints: dict[int, Contents], reported: int) -> None:
    away = {}
    for number, held in watchpoints.items():
        control = Wcr(byte_select=held.control >> 5 & 0xFF)
        span = watched(control, held.address)
        assert span is not None
        away[number] = min(abs(reported - byte) for byte in range(span.address, span.address + span.length_bytes))
        assert distance(held, reported) == away[number]

    found = reported_slots(watchpoints, reported, write=True)
    if 0 in away.values():
        assert set(found) == {number for number in away if away[number] == 0}
    else:
        nearest = {number for number in away if away[number] == min(away.values())}
        assert found == (min(nearest),)


def test_only_the_direction_counts_that_is_known() -> None:
    watchpoints = {0: watch(HERE, 8, LoadStore.LOAD), 1: watch(HERE, 8, LoadStore.STORE)}
    assert reported_slots(watchpoints, HERE, write=True) == (1,)
    assert reported_slots(watchpoints, HERE, write=False) == (0,)
    assert reported_slots(watchpoints, HERE, write=None) == (0, 1)
    assert reported_slots({0: watchpoints[0]}, HERE, write=True) == ()


def test_without_an_address_it_was_the_only_one() -> None:
    assert reported_slots({0: watch(HERE, 4)}, None) == (0,)
    with pytest.raises(AssertionError, match="one watchpoint"):
        reported_slots({0: watch(HERE, 4), 1: watch(HERE + 8, 4)}, None)


def test_a_tag_does_not_matter() -> None:
    assert distance(watch(HERE, 8), 0xAB << 56 | HERE + 3) == 0


def test_a_kernel_address_is_measured_as_it_is() -> None:
    kernel = 0xFFFF_8000_0000_1000
    held = Contents(kernel, watch(HERE, 8).control)
    assert (distance(held, kernel + 7), distance(held, kernel - 2)) == (0, 2)


# --- with the debug unit: what is right, and what is known to go wrong -----------------------------------------------


def report(unit: Arm64DebugUnit, wanted: dict[int, tuple[int, int]], instruction: str, address: int, length: int) -> (
    tuple[set[int], tuple[int, ...]]
):
    """The watchpoints that one instruction meets, and those that Linux then reports."""
    slots = {(Pool.DATA, number): armed(W, *place) for number, place in wanted.items()}
    file = carry_out(unit, unit.reset(), slots)
    access = write(address, length) if instruction == "store" else update(address, length)
    trap = unit.check(file, [access])
    assert trap is not None
    syndrome = decode_esr(trap.status["ESR_EL1"])
    assert syndrome is not None
    held = {number: Contents(file[f"DBGWVR{number}_EL1"], file[f"DBGWCR{number}_EL1"]) for number in wanted}
    found = reported_slots(held, trap.status["FAR_EL1"], write=syndrome.write)
    return {number for _, number in trap.slots}, found


EXACT = Arm64DebugUnit(6, 4)
IMPRECISE = Arm64DebugUnit(6, 4, reports_start=True)


@pytest.mark.parametrize("unit", [EXACT, IMPRECISE], ids=["exact", "start"])
@given(st.integers(-15, 7))
def test_a_single_watchpoint_gets_its_hit_wherever_the_access_begins(unit: Arm64DebugUnit, offset: int) -> None:
    if offset + 16 > 4:
        met, found = report(unit, {2: (HERE + 4, 4)}, "store", HERE + offset, 16)
        assert (met, found) == ({2}, (2,))


def test_known_to_go_wrong_an_access_over_two_watchpoints_reports_one() -> None:
    met, found = report(EXACT, {0: (HERE, 4), 1: (HERE + 8, 4)}, "store", HERE, 16)
    assert (met, found) == ({0, 1}, (0,))


def test_known_to_go_wrong_an_imprecise_address_may_be_nearer_to_another() -> None:
    # Watchpoint 0 ends three bytes before the store, which meets watchpoint 1 eight bytes on.
    met, found = report(IMPRECISE, {0: (HERE + 4, 1), 1: (HERE + 16, 4)}, "store", HERE + 8, 16)
    assert (met, found) == ({1}, (0,))


def test_known_to_go_wrong_an_atomic_leaves_out_the_watchpoint_for_writes() -> None:
    file = carry_out(EXACT, EXACT.reset(), {(Pool.DATA, 0): armed(R, HERE, 4), (Pool.DATA, 1): armed(W, HERE, 4)})
    trap = EXACT.check(file, [update(HERE, 4)])
    assert trap is not None
    assert {number for _, number in trap.slots} == {0, 1}
    held = {number: Contents(file[f"DBGWVR{number}_EL1"], file[f"DBGWCR{number}_EL1"]) for number in (0, 1)}
    syndrome = decode_esr(trap.status["ESR_EL1"])
    assert syndrome is not None
    assert reported_slots(held, trap.status["FAR_EL1"], write=syndrome.write) == (0,)
