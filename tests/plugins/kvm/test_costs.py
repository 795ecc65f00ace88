"""Prices: the figures of the threads, and price lists from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hwbpd_kvm.actions import HOST_TRAP, TRAP, TRAPS_OFF, TRAPS_ON, Action, Kind, Place, look
from hwbpd_kvm.costs import ARM64, D01, PRICE_LISTS, PRICED, Grade, Tally, from_value, load, tally, total, with_price
from hwbpd_kvm.registers import CORTEX_A15

CALIBRATED: dict[str, Any] = {
    "name": "here",
    "unit": "ns",
    "source": "measured on a bench",
    "prices": {"write_register": 340, "exit": 2750.5},
}


def test_actions_are_counted_by_kind() -> None:
    actions = [
        Action(Kind.READ, "DR0", Place.GUEST), Action(Kind.READ, "DR1", Place.NOWHERE), Action(Kind.WRITE, "DR0"),
        TRAPS_ON, TRAPS_OFF, look("slot 0"), TRAP, TRAP, HOST_TRAP,
    ]  # fmt: skip
    assert tally(actions) == Tally(reads=2, writes=1, toggles=2, looks=1, traps=2, host_traps=1)
    assert total([tally(actions), tally(actions)]) == Tally(4, 2, 4, 2, 4, 2)
    assert total([]) == Tally()


def test_a_world_switch_of_a_cortex_a15_costs_what_was_measured_on_a_d01() -> None:
    # Given the 20 registers of 6 breakpoints and 4 watchpoints,
    registers = len(CORTEX_A15.slot_registers)
    assert registers == 20

    # when the host's are saved and the guest's loaded,
    one_way = Tally(reads=registers, writes=registers)

    # then it takes 20 * 8 + 20 * 5 cycles.
    assert D01.of(one_way) == 260


def test_directions_have_prices_of_their_own() -> None:
    assert D01.of(Tally(reads=1)) == 8
    assert D01.of(Tally(writes=1)) == 5
    assert D01.of(Tally(1, 1, 1, 1, 1, 1)) == sum(
        getattr(D01, name).amount for name in PRICED if name != "exit"
    )


@pytest.mark.parametrize("prices", PRICE_LISTS.values(), ids=PRICE_LISTS)
def test_every_figure_says_where_it_is_from(prices: Any) -> None:
    for name in PRICED:
        price = getattr(prices, name)
        assert price.amount >= 0
        assert price.source, name
    assert any(getattr(prices, name).grade is not Grade.ASSUMED for name in PRICED), "a list of guesses"


def test_another_amount_may_be_put_in_and_is_marked() -> None:
    dearer = with_price(ARM64, trap=9000)
    assert dearer.of(Tally(traps=2)) == 18000
    assert dearer.trap.grade is Grade.ASSUMED
    assert dearer.read == ARM64.read


def test_a_calibration_is_loaded_and_what_it_lacks_is_stood_in_for(tmp_path: Path) -> None:
    # Given a file that tells only what a calibration always can,
    file = tmp_path / "prices.json"
    file.write_text(json.dumps(CALIBRATED))

    # when it is loaded,
    prices = load(file)

    # then what was measured is graded so, and the rest says what stands in for it.
    assert (prices.name, prices.unit, prices.architecture) == ("here", "ns", "x86")
    assert (prices.write.amount, prices.write.grade) == (340, Grade.MEASURED)
    assert (prices.read.amount, prices.read.grade) == (340, Grade.ASSUMED)
    assert (prices.trap.amount, prices.trap.source) == (2750.5, "not measured; as exit")
    assert prices.look.amount == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prices": None}, "an object with"),
        ({"name": ""}, "texts, and not empty"),
        ({"unit": "s"}, "the unit of a price list is"),
        ({"prices": {"write_register": 1}}, 'needs "exit"'),
        ({"prices": {"exit": 1}}, 'needs "write_register"'),
        ({"prices": {"exit": -1, "write_register": 1}}, '"exit" is a number from 0 on, not -1'),
        ({"prices": {"exit": 1, "write_register": True}}, '"write_register" is a number'),
        ({"prices": {"exit": 1, "write_register": 1, "trap": "much"}}, "not 'much'"),
        ({"prices": {"exit": 1, "write_register": 0}}, '"write_register" cannot be free'),
        ({"prices": {"exit": 1, "write_register": 1, "trap": 0}}, '"trap" cannot be free'),
        ({"architecture": "vax"}, "architecture"),
    ],
)
def test_what_is_no_price_list_is_refused_with_a_reason(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_value(CALIBRATED | change)


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    for content in (b"{", b"[]", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"prices\.json: "):
            load(file)
