"""
docs/kvm.md names every strategy, promise, workload and price, says what every search finds, and answers every item of
the threads with tests that there are.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from hwbpd_kvm.adaptive import balanced_bound, balanced_rent
from hwbpd_kvm.compare import MODELS, Model, Row, forty_percent, preset_rows
from hwbpd_kvm.costs import PRICED
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.promises import Promise
from hwbpd_kvm.steered import ADAPTIVE, terms
from hwbpd_kvm.surroundings import Case, cases
from hwbpd_kvm.workloads import CPUS, WORKLOADS

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "kvm.md").read_text(encoding="utf-8")
LINES = frozenset(TEXT.splitlines())
PROSE = " ".join(TEXT.split())
ITEMS = {1: 20, 2: 8, 3: 9, 4: 8, 5: 5}  # by thread
STAYS = 200  # in the guest, as the page says


def row(case: Case) -> str:
    broken = "; ".join(promise.value for promise in Promise if promise in case.breaks)
    return " ".join(f"| `{case.preset}` | {case.around} | {broken} |".split())


def test_every_strategy_is_listed_with_its_source() -> None:
    assert {f"| `{name}` | {preset.source} |" for name, preset in PRESETS.items()} <= LINES


def test_every_promise_is_listed() -> None:
    assert {f"- {promise.value}" for promise in Promise} <= LINES


def test_every_search_is_listed_with_what_it_breaks() -> None:
    assert {row(case) for case in cases()} <= LINES


def correct(model: Model, workload: str) -> list[Row]:
    """Return the rows of the presets that keep every promise, the cheapest first."""
    events = WORKLOADS[workload](model.layout, STAYS, random.Random(1))
    rows = preset_rows(model, workload, events, PRESETS.values(), [model.layout] * CPUS)
    return sorted((row for row in rows if not row.breaks), key=lambda row: row.cost)


def worth(model: Model) -> str:
    rows, exit_cost = correct(model, "idle"), model.prices.exit.amount
    everything = next(row.cost for row in rows if row.strategy.startswith("always"))
    best = rows[0]
    saved = (everything - best.cost) / exit_cost
    return f"| {model.name} | {exit_cost:.0f} | {everything:.0f} | {best.cost:.0f}, `{best.strategy}` | {saved:.0%} |"


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_saved_is_what_the_engine_says(model: Model) -> None:
    assert worth(model) in LINES


def test_a_guest_that_uses_its_registers_is_told_as_the_engine_says() -> None:
    rows = correct(MODELS["cortex-a15"], "saves-all")
    assert {f"| `{row.strategy}` | {row.cost:.0f} |" for row in rows} <= LINES


def test_a_partial_switch_is_worth_what_the_engine_says() -> None:
    found = {
        workload: {row.strategy: row.cost for row in correct(MODELS["cortex-a15"], workload)}
        for workload in ("both", "saves-all")
    }
    both, saves_all = ({name: f"{of[name]:.0f}" for name in ("partial", "four-cases")} for of in found.values())
    assert f"{both['partial']} cycles instead of {both['four-cases']} where both have one armed" in PROSE
    assert f"{saves_all['partial']} instead of {saves_all['four-cases']} where the guest's debugger" in PROSE


def test_forty_percent_are_told_as_computed() -> None:
    few, many, few_virtual, many_virtual = forty_percent()
    said = (
        f"With exits of {few.exit:.0f} cycles it is 40 % at {many.work_at_40:.0f} cycles of work if a switch takes "
        f"{many.accesses} accesses, and at {few.work_at_40:.0f} if it takes {few.accesses}; with exits of "
        f"{few_virtual.exit:.0f} cycles at {many_virtual.work_at_40:.0f} and at {few_virtual.work_at_40:.0f}."
    )
    assert said in PROSE
    left = [f"{each.share_untrapped * 100:.0f} %" for each in (many, few, many_virtual, few_virtual)]
    assert f"{left[0]} and {left[1]} are left, {left[2]} and {left[3]} where" in PROSE


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_bounds_are_told_as_they_follow_from_the_prices(model: Model) -> None:
    price = terms(ADAPTIVE[model.prices.architecture], [model.layout] * CPUS, model.prices)
    x, balanced = max(price) / min(price), balanced_bound(price)
    numbers = f"| {price.trap:.0f} | {price.switch:.0f} | {x:.1f} | {balanced_rent(price)} | {balanced:.2f} |"
    assert numbers in (ROOT / "docs" / "kvm-adaptive.md").read_text(encoding="utf-8")


def test_every_workload_is_listed_as_its_code_says() -> None:
    for name, workload in WORKLOADS.items():
        first = (workload.__doc__ or "").strip().split("\n")[0]
        assert f"| `{name}` | {first} |" in LINES


def test_every_price_is_listed_with_grade_and_source() -> None:
    for model in MODELS.values():
        for what in PRICED:
            price = getattr(model.prices, what)
            name = what.replace("_", " ")
            assert f"| {model.name} | {name} | {price.amount:.0f} | {price.grade.value} | {price.source} |" in LINES


def test_every_item_of_the_threads_is_answered_once() -> None:
    answered = re.findall(r"^\| (\d\.\d+) \|", TEXT, re.MULTILINE)
    assert answered == [f"{thread}.{number}" for thread, count in ITEMS.items() for number in range(1, count + 1)]


def test_every_test_and_file_that_is_named_is_there() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", TEXT)):
        assert f"def {name}(" in tests, name
    for name in set(re.findall(r"`(\w+\.py)`", TEXT)):
        assert (ROOT / "plugins" / "hwbpd_kvm" / name).exists(), name
