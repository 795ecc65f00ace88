"""
The search finds what is wrong and nothing where nothing is; ``python -m hwbpd_kvm.isolation`` has every case.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
from typer.testing import CliRunner

from hwbpctl.__main__ import app
from hwbpd_kvm import isolation
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.isolation import Found, Search, event_told
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.promises import Owner, Promise, broken, owned, owner_of
from hwbpd_kvm.state import Enter, Load
from hwbpd_kvm.surroundings import ASKED_BOTH, ASKED_PINNED, ASKED_SETTLED, UNTOLD, Case, Surroundings, at_home, cases
from tests.plugins.kvm.steps import Steps

# Searched to the end here, a few of each architecture; `make isolation` has all.
QUICK = {"always-least", "arm-dirty-bit-20", "four-cases", "partial", "arm64-lazy", "x86-2009-saved"}
FEW = 500  # worlds; the search is breadth first, so short histories are found among them


@cache
def searched(preset: str, around: Surroundings | None = None, *, states_max: int = 1_000_000) -> Found:
    return Search(PRESETS[preset], around or at_home(preset)).run(states_max=states_max)


def history(found: Found, promise: Promise) -> list[str]:
    return [event_told(event) for event, _ in found.histories[promise]]


@pytest.mark.parametrize(
    "case",
    [case for case in cases() if case.preset in QUICK and case.around == at_home(case.preset)],
    ids=lambda case: case.preset,
)
def test_a_complete_search_finds_what_is_known_and_nothing_else(case: Case) -> None:
    found = searched(case.preset)

    assert found.complete
    assert found.edges > found.states > 500
    assert found.histories.keys() == case.breaks


def test_every_promise_is_broken_by_somebody() -> None:
    assert {promise for case in cases() for promise in case.breaks} == set(Promise)


def test_every_strategy_is_searched() -> None:
    assert {case.preset for case in cases()} == set(PRESETS)


# --- the arguments of the field, as shortest histories ---------------------------------------------------------------


def test_a_loop_that_stops_at_core_num_brps_leaves_the_mismatch_breakpoint_in_force_in_the_guest() -> None:
    for preset in ("four-cases-loops", "disable-bitmap-loops"):
        assert history(searched(preset, states_max=FEW), Promise.HOST_QUIET) == [
            "the vCPU is loaded on CPU 0",
            "the host arms slot 1 of CPU 0 (step)",
            "entry",
        ]


def test_a_mismatch_breakpoint_in_no_slot_is_seen_only_in_the_hardware() -> None:
    assert searched("disable-bitmap", UNTOLD, states_max=FEW).histories.keys() == {Promise.HOST_QUIET}
    assert not searched("disable-bitmap-hardware", UNTOLD).histories


def test_the_dirty_bit_leaves_the_hosts_breakpoints_in_force_in_an_idle_guest() -> None:
    assert history(searched("arm-dirty-bit", states_max=FEW), Promise.HOST_QUIET) == [
        "the vCPU is loaded on CPU 0",
        "the host arms slot 0 of CPU 0 (kernel)",
        "entry",
    ]


def test_a_record_that_kgdb_goes_past_does_not_bring_its_breakpoint_back() -> None:
    assert history(searched("x86-2009-layer-cache", states_max=FEW), Promise.HOST_RESTORED) == [
        "the vCPU is loaded on CPU 0",
        "the host arms slot 1 of CPU 0 (kgdb)",
        "entry",
        "exit",
    ]


def test_an_answer_asked_before_the_entry_holds_only_where_nothing_arms_and_nobody_moves() -> None:
    # Given the question some time before the entry, and a host that may arm meanwhile, then it may be late;
    late = searched("disable-bitmap", ASKED_PINNED, states_max=FEW)
    assert history(late, Promise.HOST_QUIET)[-3:] == [
        "hw_breakpoint_enabled is asked",
        "the host arms slot 0 of CPU 0 (kernel)",
        "entry",
    ]

    # with a thread that may move, it may be another CPU's;
    elsewhere = searched("disable-bitmap", ASKED_SETTLED, states_max=FEW)
    assert history(elsewhere, Promise.HOST_QUIET)[-4:] == [
        "hw_breakpoint_enabled is asked",
        "the vCPU is put",
        "the vCPU is loaded on CPU 1",
        "entry",
    ]

    # nothing else breaks on the way; and with neither nothing does at all.
    assert late.histories.keys() == elsewhere.histories.keys() == {Promise.HOST_QUIET}
    settled_and_pinned = searched("disable-bitmap", ASKED_BOTH)
    assert settled_and_pinned.complete
    assert not settled_and_pinned.histories


# --- the judge itself ------------------------------------------------------------------------------------------------


def test_a_value_tells_whose_it_is() -> None:
    assert owner_of(owned(Owner.GUEST, 0xFFFF)) is Owner.GUEST
    assert owner_of(0xFFFF0FF0) is Owner.NOBODY


def test_a_world_that_is_well_breaks_nothing_and_a_lost_write_is_seen() -> None:
    steps = Steps("x86-wont-exit", loaded=False)
    engine: Engine = steps.engine
    steps.do(Load(0), Enter())

    assert not list(broken(engine, steps.world, engine.reset))
    assert list(broken(engine, steps.world, (owned(Owner.GUEST), *engine.reset[1:]))) == [Promise.NO_WRITE_LOST]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_shortest_history_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert isolation.main(["disable-bitmap-loops", "--histories"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].strip() == "broken: no breakpoint of the host is in force in the guest"
    assert [line.strip() for line in lines[2:-1]][:3] == [
        "the vCPU is loaded on CPU 0",
        "the host arms slot 1 of CPU 0 (step)",
        "entry",
    ]
    assert lines[-1].startswith("searches=1 states=1984 edges=14016 complete=1 unexpected=0 ")


def test_the_command_fails_where_something_else_breaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "cases", lambda: (Case("arm-dirty-bit-20", Surroundings()),))

    assert isolation.main([]) == 1
    assert "UNEXPECTED" in capsys.readouterr().out


def test_the_command_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert isolation.main(["arm-dirty-bit-20", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert (found["complete"], found["as_expected"], found["surroundings"]) == (True, True, "as usual")
    assert found["broken"][Promise.HOST_QUIET.value][-1] == {"event": "entry", "actions": []}


def test_hwbpctl_has_the_same_command() -> None:
    result = CliRunner().invoke(app, ["kvm", "check", "arm-dirty-bit-20"])

    assert result.exit_code == 0
    assert "broken: no breakpoint of the host is in force in the guest" in result.output
    assert CliRunner().invoke(app, ["kvm", "check", "sometimes"]).exit_code == 2


def test_an_unknown_strategy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        isolation.main(["sometimes"])
    assert "no strategy sometimes" in capsys.readouterr().err
