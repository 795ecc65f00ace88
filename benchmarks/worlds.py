"""
How many world switches a second the switch engine goes through, by its table and without it.

One operation is one world switch: an entry or an exit, with its share of whatever else is in the history. The floor is
the least that plain Python does with a history, looking up each event in a dictionary and counting. Nothing here needs
registers, a daemon or root.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from benchmarks.harness import Row, Subject, compare
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.fast import Table, scalar
from hwbpd_kvm.presets import PRESETS, USUAL
from hwbpd_kvm.state import Enter, Event
from hwbpd_kvm.workloads import CPUS, WORKLOADS

INTERVALS = 20_000
ASKED = 500  # intervals, where every step is asked of the engine
SHOWN = ("arm-dirty-bit", "arm64-owner", "x86-wont-exit")
HISTORIES = ("idle", "host-on-one-cpu", "guest-debugger")


def _switches(events: Sequence[Event]) -> int:
    return 2 * sum(isinstance(event, Enter) for event in events)


def by_table(table: Table, events: Sequence[Event]) -> Callable[[], float]:
    """Return what measures one run of a table that is complete, in nanoseconds for a world switch."""
    encoded, switches = table.encode(events), _switches(events)
    table.run(encoded)

    def measure_ns() -> float:
        start = time.perf_counter_ns()
        table.run(encoded)
        return (time.perf_counter_ns() - start) / switches

    return measure_ns


def by_engine(engine: Engine, events: Sequence[Event]) -> Callable[[], float]:
    """The same, every step asked of the engine."""
    switches = _switches(events)

    def measure_ns() -> float:
        start = time.perf_counter_ns()
        scalar(engine, events)
        return (time.perf_counter_ns() - start) / switches

    return measure_ns


def least_work(encoded: Sequence[int], switches: int) -> Callable[[], float]:
    """The floor."""
    row = dict.fromkeys(encoded, 0)

    def measure_ns() -> float:
        counts = [0]
        start = time.perf_counter_ns()
        for number in encoded:
            counts[row[number]] += 1
        return (time.perf_counter_ns() - start) / switches

    return measure_ns


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """Return a table for each history."""
    tables = []
    for history in HISTORIES:
        subjects = []
        for name in SHOWN:
            layout = USUAL[PRESETS[name].architecture]
            engine = Engine(PRESETS[name], [layout] * CPUS)
            table = Table(engine)
            events = WORKLOADS[history](layout, INTERVALS, random.Random(1))
            few = WORKLOADS[history](layout, ASKED, random.Random(1))
            floor = f"{name}: a look and a count"
            subjects += [
                Subject(floor, least_work(table.encode(events), _switches(events))),
                Subject(f"{name}: by table", by_table(table, events), floor),
                Subject(f"{name}: by engine", by_engine(engine, few), floor),
            ]
        tables.append((f"world switches a second, {history}", compare(subjects, rounds, per_second=True)))
    return tables
