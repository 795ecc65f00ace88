"""A story keeps its beginning and its end, and counts what it leaves out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.story import FIRST_KEPT, LAST_KEPT, Story


def test_nothing_happened_yet() -> None:
    assert list(Story().lines()) == []


@given(st.integers(1, 3 * (FIRST_KEPT + LAST_KEPT)))
def test_a_story_is_bounded_and_misses_only_its_middle(told: int) -> None:
    # given a story of that many sentences, a second apart
    story = Story()
    for number in range(told):
        story.tell(5_000_000_000 + number * 1_000_000_000, f"sentence {number}")

    # when it is read
    lines = list(story.lines())

    # then each line has the time since the first, and what is left out is one line that says how much
    everything = [f"+{number}.000000 s  sentence {number}" for number in range(told)]
    if told <= FIRST_KEPT + LAST_KEPT:
        assert lines == everything
    else:
        left_out = told - FIRST_KEPT - LAST_KEPT
        assert lines == [*everything[:FIRST_KEPT], f"... {left_out} more ...", *everything[-LAST_KEPT:]]


def test_times_are_told_to_the_microsecond() -> None:
    story = Story()
    story.tell(1_000, "first")
    story.tell(1_234_567, "second")

    assert list(story.lines())[1] == "+0.001234 s  second"
