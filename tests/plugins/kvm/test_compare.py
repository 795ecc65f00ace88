"""The table: its figures, and what can be said of it without looking at any price."""

from __future__ import annotations

import random
from itertools import groupby

import pytest

from hwbpd_kvm.adaptive import CEILING
from hwbpd_kvm.compare import (
    MODELS,
    Row,
    all_standings,
    compare,
    dr_exit_share,
    forty_percent,
    model_of,
    random_intervals,
    replay,
    seed_figures,
    standings,
)
from hwbpd_kvm.costs import from_value
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.registers import CORTEX_A15, X86
from hwbpd_kvm.rental import Terms
from hwbpd_kvm.state import Enter, Exit, GuestWrite, Load
from hwbpd_kvm.traces import Trace
from hwbpd_kvm.workloads import WORKLOADS


def rows(model: str, workload: str, *strategies: str, count: int = 100) -> dict[str, Row]:
    presets = [PRESETS[name] for name in strategies]
    return {row.strategy: row for row in compare([MODELS[model]], [workload], presets, count)}


def test_the_figures_of_the_threads_come_out() -> None:
    for figure in seed_figures():
        assert figure.computed == figure.said, figure.claim


def test_a_guest_that_nobody_debugs_costs_nothing_but_looks() -> None:
    found = rows("cortex-a15", "idle", "always", "arm-dirty-bit", "four-cases")
    assert (found["always"].reads, found["always"].writes) == (42, 42)
    assert found["arm-dirty-bit"].cost == 0
    assert found["four-cases"].reads == found["four-cases"].writes == 0


def test_mdbgen_undoes_the_dirty_bit() -> None:
    """Dall's objection: a guest that has set MDBGEN at boot is switched as if there were no dirty bit."""
    found = rows("cortex-a15", "master-set", "always", "arm-dirty-bit", "four-cases", count=500)
    assert found["arm-dirty-bit"].reads > 0.99 * found["always"].reads
    assert found["four-cases"].cost < found["always"].cost / 5


def test_an_access_costs_one_exit_in_an_interval_and_not_one_each() -> None:
    """What "Allow the guest to run with dirty debug registers" is for."""
    found = rows("x86", "saves-all", "x86-2009-all-told", "x86-wont-exit")
    assert found["x86-wont-exit"].traps == 1
    assert found["x86-2009-all-told"].traps == 36  # 6 registers, read and written, at 3 task switches


@pytest.mark.parametrize("each", forty_percent(), ids=lambda each: f"{each.source}, {each.accesses} accesses")
def test_forty_percent_are_lost_at_the_work_that_is_said(each: object) -> None:
    # Given the work between two task switches at which the claim holds, when it is half as much or twice, then more
    # or less is lost.
    assert isinstance(each, type(forty_percent()[0]))
    assert dr_exit_share(each.exit, each.accesses, each.work_at_40) == pytest.approx(0.4)
    assert dr_exit_share(each.exit, each.accesses, each.work_at_40 / 2) == pytest.approx(4 / 7)
    assert dr_exit_share(each.exit, each.accesses, each.work_at_40 * 2) == pytest.approx(0.25)
    assert each.share_untrapped < 0.4


def test_every_workload_has_every_strategy_of_its_architecture_and_the_adaptive_one() -> None:
    found = list(compare(MODELS.values(), WORKLOADS, count=4))
    for (model, workload), own in groupby(found, key=lambda row: (row.model, row.workload)):
        architecture = MODELS[model].prices.architecture
        expected = {name for name, strategy in PRESETS.items() if strategy.architecture == architecture}
        assert {row.strategy for row in own} == expected | {f"adaptive-{architecture}"}, workload
    assert {row.workload for row in found} == set(WORKLOADS)


def test_the_policies_keep_their_bounds_on_workloads_and_random_histories() -> None:
    seed = random.randrange(2**32)
    for model, own in all_standings(MODELS.values(), count=12, seed=seed, length=30):
        for standing in own:
            assert standing.histories >= 12
            if standing.policy != "lottery":
                assert standing.worst <= standing.bound + 1e-9, f"{model.name}, {standing}, seed {seed}"
            assert 1 <= standing.mean <= standing.worst


def test_learning_does_better_in_the_mean() -> None:
    """Over prices near and far apart, both ways; where a trap costs a hundred switches, there is nothing to learn."""
    chance = random.Random(1)
    histories = [random_intervals(200, chance) for _ in range(40)]
    for price in (Terms(3, 1), Terms(4, 3), Terms(1, 4), Terms(7433, 10964)):
        means = {standing.policy: standing.mean for standing in standings(price, histories)}
        assert means["learning"] < means["balanced"], price
        assert means["learning"] < CEILING


def test_a_recorded_history_is_priced_by_every_model_that_has_such_registers() -> None:
    # Given a recorded history of an x86 guest,
    trace = Trace((X86, X86), (Load(1), Enter(), GuestWrite("DR0", 0x1000), Exit(), Enter(), Exit()))

    # when it is replayed with one strategy,
    found = list(replay(trace, "mine", [PRESETS["x86-wont-exit"], PRESETS["always"]], MODELS.values()))

    # then both price lists of x86 have a row for that strategy, and one for the adaptive one.
    assert [(row.model, row.strategy) for row in found] == [
        ("x86", "x86-wont-exit"), ("x86", "adaptive-x86"),
        ("x86-virtual", "x86-wont-exit"), ("x86-virtual", "adaptive-x86"),
    ]  # fmt: skip
    assert {(row.intervals, row.traps) for row in found} == {(2, 0.5)}


def test_a_history_that_cannot_have_happened_is_refused() -> None:
    for events, sentence in (
        ((Enter(),), "cannot have happened"),
        ((Load(0),), "never entered"),
    ):
        with pytest.raises(ValueError, match=sentence):
            list(replay(Trace((X86,), events), "mine", PRESETS.values(), MODELS.values()))
    with pytest.raises(ValueError, match="no price list for CPUs like cortex-a15"):
        list(replay(Trace((CORTEX_A15,), (Enter(),)), "mine", PRESETS.values(), [MODELS["x86"]]))


def test_prices_of_ones_own_are_a_model() -> None:
    value = {"name": "here", "unit": "ns", "source": "us", "prices": {"write_register": 2, "exit": 3}}
    model = model_of(from_value(value))
    (row, _) = compare([model], ["both"], [PRESETS["x86-wont-exit"]], 50)
    assert (row.model, row.unit) == ("here", "ns")
    assert row.cost > 0
