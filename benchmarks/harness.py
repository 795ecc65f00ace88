"""
How everything here is compared: interleaved rounds, medians, and ratios to a floor.

The same echo moves by a third between two runs on one host, so numbers from different runs say little. Here every
subject is measured once per round, in an order that moves on with each round, and a ratio is taken within a round,
where subject and floor met the same host. What is shown is the median over the rounds, with the quartiles as spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Subject(NamedTuple):
    """
    One thing to measure.

    ``measure_ns`` runs one round and returns nanoseconds per operation. ``floor`` is the name of the subject that does
    the least that could do the same; empty for a floor itself.
    """

    name: str
    measure_ns: Callable[[], float]
    floor: str = ""


class Spread(NamedTuple):
    """Median and quartiles over the rounds."""

    low: float
    median: float
    high: float


class Row(NamedTuple):
    """One line of the result; times in nanoseconds per operation."""

    name: str
    time_ns: Spread
    floor: str
    ratio: Spread | None


def compare(subjects: Sequence[Subject], rounds: int) -> list[Row]:
    """Measure every subject once per round, after one round that does not count; ``rounds`` is at least 2."""
    for subject in subjects:
        subject.measure_ns()
    times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for number in range(rounds):
        first = number % len(subjects)
        for subject in [*subjects[first:], *subjects[:first]]:
            times[subject.name].append(subject.measure_ns())
    return [_row(subject, times) for subject in subjects]


def _row(subject: Subject, times: dict[str, list[float]]) -> Row:
    own = times[subject.name]
    ratio = None
    if subject.floor:
        ratio = _spread([time_ns / floor_ns for time_ns, floor_ns in zip(own, times[subject.floor], strict=True)])
    return Row(subject.name, _spread(own), subject.floor, ratio)


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
    cells = [(row.name, *_time_cells(row.time_ns), *_ratio_cells(row)) for row in rows]
    heads = ("", "median", "quartiles", "ratio", "quartiles", "to the floor")
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(len(heads))]
    lines = [title]
    for line in [heads, *cells]:
        aligned = [text.ljust(width) if column in (0, 5) else text.rjust(width)
                   for column, (text, width) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _time_cells(spread: Spread) -> tuple[str, str]:
    scale, unit = (1.0, "ns") if spread.median < 10_000 else (1e3, "us")
    digits = 0 if spread.median >= 100 * scale else 1
    low, median, high = (f"{value / scale:.{digits}f}" for value in spread)
    return f"{median} {unit}", f"{low}-{high}"


def _ratio_cells(row: Row) -> tuple[str, str, str]:
    if row.ratio is None:
        return "", "", "(a floor)"
    return f"{row.ratio.median:.2f}", f"{row.ratio.low:.2f}-{row.ratio.high:.2f}", row.floor


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values; every spread is ``[lower quartile, median, upper quartile]``."""
    return [
        {"name": row.name, "ns": list(row.time_ns), "floor": row.floor or None, "ratio": row.ratio and list(row.ratio)}
        for row in rows
    ]
