"""``hwbpctl kvm compare`` and ``replay``: what they print, and what they refuse."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hwbpctl.__main__ import app
from hwbpd_kvm.registers import X86
from hwbpd_kvm.state import Enter, Event, Exit, GuestRead, GuestWrite, Load
from hwbpd_kvm.traces import Trace, dump

EVENTS: tuple[Event, ...] = (Load(0), Enter(), GuestWrite("DR7", 2), GuestRead("DR6"), Exit(), Enter(), Exit())


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["kvm", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "guest.jsonl"
    file.write_text("\n".join(dump(Trace((X86,), EVENTS))))
    return file


def test_the_overview_has_a_line_for_each_strategy_and_a_column_for_each_workload() -> None:
    # Given an ARMv7 CPU, when its strategies are compared,
    lines = run("compare", "-m", "cortex-a15", "-n", 10).splitlines()

    # then each has a line, the adaptive one too, with a cost for each workload,
    heads = lines[1].split()
    costs = {line.split()[0]: line.split()[1:] for line in lines[2:] if line.startswith(("always ", "adaptive"))}
    assert costs.keys() == {"always", "adaptive-armv7"}
    assert {len(of) for of in costs.values()} == {len(heads)}
    # what everybody pays who always switches is there,
    assert costs["always"][heads.index("idle")] == "546"
    # a strategy that is wrong is marked, and the mark explained,
    assert any(line.startswith("four-cases-loops !") for line in lines)
    assert not any(line.startswith("four-cases !") for line in lines)
    assert any(line.startswith("! breaks promises") for line in lines)
    # the prices say how well they are known,
    assert any(line.startswith("cortex-a15, cycles") and "8 published" in line for line in lines)
    assert any(line.startswith("cortex-a15, cycles") and "5326 reported" in line for line in lines)
    # and below are the figures that were argued with.
    assert any(line.startswith("D01: cycles to save") and line.split()[-2:] == ["260", "260"] for line in lines)
    assert any(line.startswith("40 %") for line in lines)


def test_a_workload_is_told_in_detail_the_cheapest_first() -> None:
    text = run("compare", "-m", "x86", "-w", "saves-all", "-s", "always-x86", "-s", "x86-wont-exit", "-n", 10)
    table = text.split("\n\n")[0].splitlines()
    assert table[0] == "x86, saves-all: cycles for an interval of the guest, 10 intervals"
    totals = [int(line.split()[5]) for line in table[2:]]
    assert len(totals) == 3
    assert totals == sorted(totals)


def test_programs_get_every_figure() -> None:
    words = ("-m", "x86", "-w", "both", "-s", "x86-wont-exit", "-n", 10, "--optimum", 2, "--json")
    value = json.loads(run("compare", *words))
    assert {row["strategy"] for row in value["rows"]} == {"x86-wont-exit", "adaptive-x86"}
    assert {row["strategy"]: row["breaks"] for row in value["rows"]}["x86-wont-exit"] == []
    (prices,) = value["prices"]
    assert (prices["model"], prices["unit"]) == ("x86", "cycles")
    assert prices["prices"]["trap"]["grade"] == "reported"
    assert "ARM Virtualization" in prices["prices"]["trap"]["source"]
    assert [figure["computed"] for figure in value["figures"]] == [20, 260, 22]
    assert {each["exit"] for each in value["forty_percent"]} == {1300, 7425}
    assert {each["policy"] for each in value["optimum"]} == {"balanced", "lottery", "learning"}


def test_a_recorded_history_is_replayed_at_prices_of_ones_own(trace: Path, tmp_path: Path) -> None:
    # Given a trace and a price list, in which exits cost a million times as much as anything else,
    prices = tmp_path / "prices.json"
    amounts = {"read_register": 0, "write_register": 1e-4, "toggle_traps": 0, "exit": 100}
    prices.write_text(json.dumps({"name": "here", "unit": "ns", "source": "us", "prices": amounts}))

    # when it is replayed,
    words = ("replay", trace, "--prices", prices, "-s", "x86-2009-all-told", "-s", "x86-wont-exit", "--json")
    rows = {row["strategy"]: row for row in json.loads(run(*words))}

    # then each strategy pays for the accesses that it traps, over two intervals.
    assert rows["x86-2009-all-told"]["cost"] == pytest.approx(2 * 100 / 2, rel=1e-3)
    assert rows["x86-wont-exit"]["cost"] == pytest.approx(100 / 2, rel=1e-3)


def test_the_picture_has_a_bar_for_each_strategy(trace: Path, tmp_path: Path) -> None:
    # Given a trace, when what it costs is drawn,
    picture = tmp_path / "costs.svg"
    run("replay", trace, "-s", "x86-wont-exit", "-s", "always-x86", "--plot", picture)

    # then the picture is whole, and names all that it shows, for both price lists.
    texts = [element.text for element in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    for name in ("always-x86", "x86-wont-exit", "adaptive-x86"):
        assert texts.count(name) == 2
    assert "x86-virtual, guest.jsonl: cycles for an interval" in texts


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("compare", "-m", "vax"), 2, "no model 'vax'"),
        (("compare", "-w", "sleep"), 2, "no workload 'sleep'"),
        (("compare", "-s", "best"), 2, "no strategy 'best'"),
        (("compare", "--prices", "nowhere.json"), 1, "nowhere.json"),
        (("compare", "-m", "x86", "--prices", "mine.json"), 2, "leave --model out"),
        (("compare", "--plot", "/nowhere/costs.svg"), 1, "cannot write /nowhere/costs.svg: No such file"),
        (("replay", "nowhere.jsonl"), 1, "nowhere.jsonl: No such file or directory"),
        (("replay", "guest.jsonl", "--tracepoints", "z80"), 2, "no tracepoints 'z80'"),
        (("replay", __file__), 1, "line 1: "),
        (("replay", __file__, "--tracepoints", "x86"), 1, "no kvm_entry of vcpu 0"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(words: tuple[str, ...], status: int, sentence: str) -> None:
    result = CliRunner().invoke(app, ["kvm", *words])
    assert result.exit_code == status
    assert sentence in " ".join(result.output.replace("│", "").split())
