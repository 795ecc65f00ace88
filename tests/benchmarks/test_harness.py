"""What the benchmarks make of what they measure: ratios within a round, rates, percentiles, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.harness import Row, Sampled, Spread, Subject, as_json, compare, compare_percentiles, percentile, table


def one_after_the_other(*values: float) -> Callable[[], float]:
    """A measurement that brings these, the first of them in the round that does not count."""
    left: Iterator[float] = iter(values)
    return lambda: next(left)


def test_a_ratio_is_taken_within_a_round() -> None:
    # Given a host that is ten times slower in the second round, for floor and subject alike,
    floor = Subject("floor", one_after_the_other(1, 100, 1000))
    subject = Subject("subject", one_after_the_other(1, 150, 1500), "floor")

    # when they are compared,
    rows = compare([floor, subject], rounds=2)

    # then the times differ by ten and the ratio not at all; the first round is not in it.
    assert rows[0].ratio is None
    assert rows[1].ratio == Spread(1.5, 1.5, 1.5)
    assert rows[1].spread == Spread(487.5, 825, 1162.5)


def test_every_subject_is_measured_once_in_each_round_and_nobody_is_always_first() -> None:
    # Given three subjects that note when they are measured,
    order: list[str] = []

    def noting(name: str) -> Callable[[], float]:
        def measure_ns() -> float:
            order.append(name)
            return 1.0

        return measure_ns

    # when they are compared over three rounds,
    compare([Subject(name, noting(name)) for name in "abc"], rounds=3)

    # then each round has all of them and begins with another.
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_a_rate_that_is_half_the_floors_has_a_ratio_of_a_half() -> None:
    # Given a subject that takes 20 us for what its floor does in 10,
    subjects = [Subject("floor", lambda: 10_000.0), Subject("subject", lambda: 20_000.0, "floor")]

    # when they are compared as rates,
    rows = compare(subjects, rounds=2, per_second=True)

    # then it does half as many a second, and is shown so.
    assert rows[1].ratio == Spread(0.5, 0.5, 0.5)
    assert rows[1].spread.median == 50_000
    assert "50.0 k/s" in table("rates", rows)
    assert as_json(rows)[1]["per_s"] == [50_000, 50_000, 50_000]


def test_percentiles_come_from_the_same_rounds() -> None:
    # Given a subject of whose hundred operations one is slow, and a floor that is always the same,
    samples = [10.0] * 99 + [1000.0]
    subjects = [Sampled("floor", lambda: [10.0] * 100), Sampled("subject", lambda: samples, "floor")]

    # when halves and hundredths are compared,
    halves, hundredths = compare_percentiles(subjects, 2, (50, 99))

    # then only the hundredth tells.
    assert halves[1].ratio == Spread(1, 1, 1)
    assert hundredths[1].ratio == Spread(100, 100, 100)


def test_the_greatest_percentile_is_the_greatest_sample() -> None:
    assert percentile([3.0, 1.0, 2.0], 100) == 3.0
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0) == 1.0


def test_values_are_shown_in_the_unit_that_fits_them_with_their_notes() -> None:
    # Given rows of every unit,
    def row(value: float, unit: str, note: str = "") -> Row:
        return Row(f"{value} {unit}", Spread(value, value, value), "", None, unit, note)

    rows = [
        row(9_999, "ns"),
        row(123_456, "ns"),
        row(38_912, "bytes"),
        row(116 * 2**20, "bytes"),
        row(2_193, "us_per_s", "asked nothing"),
    ]

    # when they are shown,
    lines = table("all of them", rows).splitlines()

    # then each has its unit, and a note stands at the end of its line.
    for text, line in zip(("9999 ns", "123 us", "38.0 KiB", "116 MiB", "2193 us/s"), lines[2:], strict=True):
        assert text in line
    assert lines[-1].endswith("asked nothing")
