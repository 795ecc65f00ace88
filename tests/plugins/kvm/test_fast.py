"""The table agrees with the engine, for every preset on everything."""

from __future__ import annotations

import random

import pytest

from hwbpd_kvm.engine import Engine, NotNow
from hwbpd_kvm.fast import Table, scalar
from hwbpd_kvm.presets import PRESETS, USUAL
from hwbpd_kvm.state import Enter, Event, Exit, Load, Put
from hwbpd_kvm.strategy import Strategy
from hwbpd_kvm.workloads import CPUS, WORKLOADS, random_history


@pytest.mark.parametrize("strategy", PRESETS.values(), ids=PRESETS)
def test_a_table_counts_what_the_engine_orders(strategy: Strategy) -> None:
    # Given an engine and its table,
    layout = USUAL[strategy.architecture]
    engine = Engine(strategy, [layout] * CPUS)
    table = Table(engine)
    seed = random.randrange(2**32)

    # when both take the same histories, one after the other with the same table,
    for workload in (*random.Random(seed).sample(sorted(WORKLOADS), 2), "random"):
        events = WORKLOADS.get(workload, random_history)(layout, 40, random.Random(seed))

        # then they count the same, for each kind of event.
        assert table.run(table.encode(events)) == scalar(engine, events), f"{workload}, seed {seed}"


def test_a_table_is_soon_complete() -> None:
    # Given a table that has seen a history,
    layout = USUAL["x86"]
    table = Table(Engine(PRESETS["x86-wont-exit"], [layout] * CPUS))
    table.run(table.encode(WORKLOADS["guest-debugger"](layout, 500, random.Random(1))))
    known = table.worlds

    # when ten times as much of the same comes, with addresses of its own,
    table.run(table.encode(WORKLOADS["guest-debugger"](layout, 5000, random.Random(2))))

    # then it has hardly anything to ask: worlds do not differ by addresses.
    assert table.worlds <= known + 5 < 50


def test_what_the_engine_refuses_the_table_does() -> None:
    table = Table(Engine(PRESETS["x86-wont-exit"], [USUAL["x86"]] * CPUS))
    impossible: list[list[Event]] = [[Enter()], [Load(0), Exit()], [Put()]]
    for events in impossible:
        with pytest.raises(NotNow):
            table.run(table.encode(events))
