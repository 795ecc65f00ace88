"""
How everything here is compared: interleaved rounds, medians, and ratios to a floor.

The same echo moves by a third between two runs on one host, so numbers from different runs say little. Here every
subject is measured once per round, in an order that moves on with each round, and a ratio is taken within a round,
where subject and floor met the same host. What is shown is the median over the rounds, with the quartiles as spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar


class Subject(NamedTuple):
    """
    One thing to measure.

    ``measure_ns`` runs one round and returns nanoseconds per operation. ``floor`` is the name of the subject that does
    the least that could do the same; empty for a floor itself.
    """

    name: str
    measure_ns: Callable[[], float]
    floor: str = ""


class Sampled(NamedTuple):
    """As ``Subject``, for what is told by more than its median: one round returns the time of every operation."""

    name: str
    sample_ns: Callable[[], Sequence[float]]
    floor: str = ""


class Spread(NamedTuple):
    """Median and quartiles over the rounds."""

    low: float
    median: float
    high: float


class Row(NamedTuple):
    """
    One line of the result.

    ``unit`` is a key of ``UNITS``. ``ratio`` is to the floor in the same unit, so a time should have a small one and a
    rate a large one. ``note`` is for people, and may be empty.
    """

    name: str
    spread: Spread
    floor: str
    ratio: Spread | None
    unit: str = "ns"
    note: str = ""


# Unit -> how it is shown: from that value on, divided by that, under that name.
UNITS: Mapping[str, Sequence[tuple[float, float, str]]] = {
    "ns": ((10_000, 1e3, "us"), (0, 1, "ns")),  # per operation
    "per_s": ((10_000, 1e3, "k/s"), (0, 1, "/s")),  # operations
    "bytes": ((10 * 2**20, 2**20, "MiB"), (10 * 2**10, 2**10, "KiB"), (0, 1, "bytes")),
    "us_per_s": ((0, 1, "us/s"),),  # of processor time
}


def compare(subjects: Sequence[Subject], rounds: int, per_second: bool = False) -> list[Row]:
    """
    Measure every subject once per round, after one round that does not count; ``rounds`` is at least 2.

    :param per_second: tell rates instead of times.
    """
    times = _interleaved([subject.measure_ns for subject in subjects], rounds)
    if per_second:
        times = [[1e9 / time_ns for time_ns in own] for own in times]
    floors = {subject.name: subject.floor for subject in subjects}
    return rows_of(floors, times, "per_s" if per_second else "ns")


def compare_percentiles(subjects: Sequence[Sampled], rounds: int, percentiles: Sequence[int]) -> list[list[Row]]:
    """As ``compare``; return the rows of each percentile, all of them from the same rounds."""
    samples = _interleaved([subject.sample_ns for subject in subjects], rounds)
    floors = {subject.name: subject.floor for subject in subjects}
    return [
        rows_of(floors, [[percentile(of_round, percent) for of_round in own] for own in samples], "ns")
        for percent in percentiles
    ]


def percentile(samples: Sequence[float], percent: int) -> float:
    """Return the sample below which that many of a hundred lie."""
    return sorted(samples)[min(len(samples) - 1, len(samples) * percent // 100)]


Measured = TypeVar("Measured")


def _interleaved(measures: Sequence[Callable[[], Measured]], rounds: int) -> list[list[Measured]]:
    """Return what each brought, a list over the rounds for each."""
    for measure in measures:
        measure()
    found: list[list[Measured]] = [[] for _ in measures]
    for number in range(rounds):
        for step in range(len(measures)):
            index = (number + step) % len(measures)
            found[index].append(measures[index]())
    return found


def rows_of(floors: Mapping[str, str], values: Sequence[Sequence[float]], unit: str) -> list[Row]:
    """
    Return the rows for what was found otherwise.

    :param floors: subject -> its floor, or "".
    :param values: of each subject, in that order, one value in ``unit`` for each round.
    """
    of_subject = dict(zip(floors, values, strict=True))
    rows = []
    for name, floor in floors.items():
        own = of_subject[name]
        ratio = None
        if floor:
            ratio = _spread([value / of_floor for value, of_floor in zip(own, of_subject[floor], strict=True)])
        rows.append(Row(name, _spread(own), floor, ratio, unit))
    return rows


def _spread(samples: Sequence[float]) -> Spread:
    return Spread(*statistics.quantiles(samples, n=4, method="inclusive"))


def median_ns(operation: Callable[[], object], count: int) -> float:
    """Run ``operation`` so often, timing each; return the median. For what another process may delay now and then."""
    clock = time.perf_counter_ns
    samples = []
    for _ in range(count):
        start = clock()
        operation()
        samples.append(clock() - start)
    return statistics.median(samples)


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows as text, a floor and those measured against it side by side."""
    cells = [(row.name, *_value_cells(row), *_ratio_cells(row)) for row in rows]
    heads = ("", "median", "quartiles", "ratio", "quartiles", "to the floor")
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(len(heads))]
    lines = [title]
    for line, note in zip([heads, *cells], ["", *(row.note for row in rows)], strict=True):
        aligned = [text.ljust(width) if column in (0, 5) else text.rjust(width)
                   for column, (text, width) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join([*aligned, note]).rstrip())
    return "\n".join(lines)


def _value_cells(row: Row) -> tuple[str, str]:
    scale, shown = next((scale, shown) for least, scale, shown in UNITS[row.unit] if abs(row.spread.median) >= least)
    digits = 0 if row.spread.median >= 100 * scale else 1
    low, median, high = (f"{value / scale:.{digits}f}" for value in row.spread)
    return f"{median} {shown}", f"{low}-{high}"


def _ratio_cells(row: Row) -> tuple[str, str, str]:
    if row.ratio is None:
        return "", "", "(a floor)"
    return f"{row.ratio.median:.2f}", f"{row.ratio.low:.2f}-{row.ratio.high:.2f}", row.floor


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values; every spread is ``[lower quartile, median, upper quartile]``."""
    return [
        {
            "name": row.name,
            row.unit: list(row.spread),
            "floor": row.floor or None,
            "ratio": row.ratio and list(row.ratio),
            **({"note": row.note} if row.note else {}),
        }
        for row in rows
    ]
