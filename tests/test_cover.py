"""Blocks cover a span exactly, or no wider than allowed, and no other way takes fewer slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.model import Span
from hwbpd.cover import Blocks, Cost, aligned
from tests.slow_cover import SlowPlanner, arm64_blocks, armv7_blocks, x86_blocks

EVERYWHERE = Span(0, 2**64)
LONGEST = 64

_NEIGHBOURS = frozenset((offset, length) for offset in range(8) for length in range(1, 9 - offset))
_OF_A_WORD = frozenset(
    (word + offset, length) for word in (0, 4) for length in (1, 2, 4) for offset in range(5 - length)
)
FAMILIES = {
    "x86-64": (aligned((1, 2, 4, 8)), x86_blocks(8, has_masks=False)),
    "i686": (aligned((1, 2, 4)), x86_blocks(4, has_masks=False)),
    "address masks": (aligned(2**n for n in range(33)), x86_blocks(8, has_masks=True)),
    "any neighbours of a doubleword": (Blocks(_NEIGHBOURS), arm64_blocks()),
    "1, 2 and 4 of a word, and 8": (Blocks(_OF_A_WORD | {(0, 8)}), armv7_blocks()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_span_of_up_to_64_bytes_at_every_offset_is_covered_with_the_fewest_blocks(name: str) -> None:
    family, listed = FAMILIES[name]
    slow = SlowPlanner(listed)
    held_by_one = {Span(first, end - first) for first, end in listed}
    for first in range(LONGEST):
        least = slow.exact(first, LONGEST)
        for length in range(1, LONGEST + 1):
            span = Span(first, length)

            pieces = list(family.cover(span))

            # Each is something that a slot can hold, they follow each other without a gap, and none could be spared.
            assert held_by_one.issuperset(pieces)
            assert [one.address for one in pieces] == [first, *(end_of(one) for one in pieces[:-1])], span
            assert end_of(pieces[-1]) == first + length
            assert family.cost(span) == Cost(len(pieces), length) == Cost(least[length], length), span


@pytest.mark.parametrize("name", FAMILIES)
def test_where_bytes_beside_the_span_are_welcome_they_save_slots_and_are_as_few_as_that_allows(name: str) -> None:
    family, listed = FAMILIES[name]
    slow = SlowPlanner(listed)
    held_by_one = {Span(first, end - first) for first, end in listed}
    for first in range(LONGEST):
        for length in range(1, LONGEST + 1):
            span = Span(first, length)
            best = Cost(*slow.wide(first, first + length))

            pieces = list(family.cover(span, EVERYWHERE))

            assert held_by_one.issuperset(pieces)
            assert covers(pieces, span)
            assert family.cost(span, EVERYWHERE) == best, span
            assert Cost(len(pieces), sum(one.length_bytes for one in pieces)) == best
            exact = family.cost(span)
            assert exact is not None
            assert best.slots < exact.slots or best == exact, "wider than asked for, and nothing is saved"


@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 300), st.integers(1, 300), st.integers(0, 300), st.data())
def test_no_block_reaches_further_than_it_may(
    name: str, first: int, length: int, low: int, data: st.DataObject
) -> None:
    # Given a span, and a border on each side of it,
    family, span = FAMILIES[name][0], Span(first, length)
    low = min(low, first)
    high = data.draw(st.integers(first + length, first + length + 300))

    # when it is covered, then all blocks are within the borders,
    pieces = list(family.cover(span, Span(low, high - low)))
    assert covers(pieces, span)
    assert all(low <= one.address and end_of(one) <= high for one in pieces)

    # and it takes no more than without leave, and no less than without borders.
    costs = [family.cost(span, EVERYWHERE), family.cost(span, Span(low, high - low)), family.cost(span)]
    slots = [cost.slots for cost in costs if cost is not None]
    assert len(slots) == 3
    assert slots == sorted(slots)


@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 2**64 - 2**20), st.integers(1, 2**20), st.integers(0, 20))
def test_the_same_span_elsewhere_takes_the_same(name: str, first: int, length: int, moved: int) -> None:
    # What decides is how the span lies to the longest block that fits into it.
    family, unit = FAMILIES[name][0], 1 << (2 + length.bit_length())
    assert family.cost(Span(first % unit, length)) == family.cost(Span(first % unit + moved * unit, length))


def test_the_longest_spans_there_are_cost_no_more_time_than_short_ones() -> None:
    # Given a span with far more blocks than anybody could list, then they are counted, not listed.
    assert aligned((1, 2, 4, 8)).cost(Span(1, 2**63)) == Cost(2**60 + 3, 2**63)
    assert aligned(2**n for n in range(33)).cost(Span(0, 2**64)) == Cost(2**32, 2**64)


@pytest.mark.parametrize(
    ("span", "slots", "expected"),
    [
        (Span(1, 100), 4, Span(8, 32)),  # the whole words, not the bytes before them
        (Span(1, 7), 4, Span(1, 7)),
        (Span(1, 7), 2, Span(2, 6)),
        (Span(5, 6), 2, Span(6, 4)),
        (Span(1, 2**31), 4, Span(8, 32)),
        (Span(3, 1), 1, Span(3, 1)),
    ],
)
def test_the_longest_part_that_some_slots_hold_is_found(span: Span, slots: int, expected: Span) -> None:
    assert aligned((1, 2, 4, 8)).most_of(span, slots) == expected


@pytest.mark.parametrize("slots", [1, 3])
def test_no_part_that_some_slots_hold_is_longer(slots: int) -> None:
    for name, (family, _) in FAMILIES.items():
        for first in (0, 1, 3, 6):
            for length in (*range(1, 20), 31):
                parts = (Span(at, n) for n in range(length, 0, -1) for at in range(first, first + length - n + 1))
                costs = ((part, family.cost(part)) for part in parts)
                longest = next(part for part, cost in costs if cost is not None and cost.slots <= slots)
                most = family.most_of(Span(first, length), slots)
                assert most is not None
                assert most.length_bytes == longest.length_bytes, f"{name}: {length} bytes at {first}"


def test_what_no_blocks_cover_is_said_to_be_so() -> None:
    # Given blocks of whole words only,
    words = Blocks(frozenset({(0, 4), (4, 4)}))

    # then what is not whole words has no cover, unless blocks may reach beyond it.
    assert words.cost(Span(4, 8)) == Cost(2, 8)
    assert words.cost(Span(2, 8)) is None
    assert words.most_of(Span(2, 8), 4) is None
    assert words.cost(Span(2, 8), EVERYWHERE) == Cost(3, 12)


def end_of(span: Span) -> int:
    return span.address + span.length_bytes


def covers(pieces: list[Span], span: Span) -> bool:
    """Whether each byte of the span is in exactly one of them."""
    return all(
        sum(one.address <= byte < end_of(one) for one in pieces) == 1 for byte in range(span.address, end_of(span))
    )
