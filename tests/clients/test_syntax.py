"""Events and CPU lists are read as perf reads them, and what is wrong is pointed at."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from hwbp.syntax import BadSyntax, Event, format_cpus, parse_cpus, parse_event

EVENTS = st.builds(
    Event,
    address=st.integers(0, 2**64 - 1),
    length=st.none() | st.integers(1, 2**32),
    access=st.sampled_from(["r", "w", "rw", "x"]),
).flatmap(
    lambda event: st.sampled_from([(True, True), (True, False), (False, True)]).map(
        lambda modes: Event(event.address, event.length, event.access, *modes)
    )
)


# From tests/parse-events.c of perf, as far as they mean something to a debug register.
@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("mem:0", Event(0, None, "rw")),
        ("mem:0:x", Event(0, None, "x")),
        ("mem:0:r", Event(0, None, "r")),
        ("mem:0:w", Event(0, None, "w")),
        ("mem:0:u", Event(0, None, "rw", kernel=False)),
        ("mem:0:x:k", Event(0, None, "x", user=False)),
        ("mem:0:rw", Event(0, None, "rw")),
        ("mem:0/1", Event(0, 1, "rw")),
        ("mem:0/2:w", Event(0, 2, "w")),
        ("mem:0/4:rw:u", Event(0, 4, "rw", kernel=False)),
        ("mem:0:wr", Event(0, None, "rw")),
        ("mem:0:uk", Event(0, None, "rw")),
        ("mem:0xffffffffffffffff/8:w", Event(2**64 - 1, 8, "w")),
        ("mem:0XfF", Event(255)),
        ("mem:4210752/8:w", Event(0x404040, 8, "w")),
    ],
)
def test_an_event_is_read_as_perf_reads_it(text: str, event: Event) -> None:
    assert parse_event(text) == event


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0),
        ("cycles", 0),
        ("mem:", 4),
        ("mem:main", 4),
        ("mem:0x", 4),
        ("mem:0x12345678123456781", 4),  # 17 digits
        ("mem:18446744073709551616", 4),
        ("mem:12ab", 4),
        ("mem:0/", 6),
        ("mem:0/0", 6),
        ("mem:0/4294967297", 6),  # one more than any slot can hold
        ("mem:0/99999999999", 6),
        ("mem:0/0x8", 6),
        ("mem:0/8/", 7),
        ("mem:0:w/8", 7),  # the order perf once had
        ("mem:0:", 6),
        ("mem:0:w:", 8),
        ("mem:0:q", 6),
        ("mem:0:wq", 7),
        ("mem:0:ww", 7),
        ("mem:0:rx", 7),
        ("mem:0:xw", 7),
        ("mem:0:rwx", 8),
        ("mem:0:w:uu", 9),
        ("mem:0:u:w", 7),
        # perf knows these; a debug register does not:
        ("mem:0:r:hp", 8),
        ("mem:0:w:up", 9),
        ("mem:0:rw:kp", 10),
        ("mem:0/1/name=breakpoint/", 7),
        ("mem:0/2:w/name=breakpoint/", 9),
        ("mem:0:rw/name=breakpoint/kp", 8),
    ],
)
def test_what_is_no_event_is_pointed_at(text: str, position: int) -> None:
    with pytest.raises(BadSyntax) as caught:
        parse_event(text)
    problem, shown, mark, form = str(caught.value).split("\n")
    assert caught.value.position == position
    assert shown == f"  {text}"
    assert mark == " " * (2 + position) + "^"
    assert problem
    assert "mem:ADDRESS[/LENGTH][:ACCESS][:MODIFIERS]" in form


@hypothesis.given(EVENTS)
def test_an_event_is_read_back_as_it_was_written(event: Event) -> None:
    assert parse_event(str(event)) == event


@hypothesis.given(st.text(alphabet="mem:0x/rwkup19,- \n", max_size=20))
def test_any_text_is_an_event_or_bad_syntax_within_it(text: str) -> None:
    outcome: Event | BadSyntax
    try:
        outcome = parse_event(text)
    except BadSyntax as error:
        outcome = error
    if isinstance(outcome, Event):
        assert parse_event(str(outcome)) == outcome
    else:
        assert 0 <= outcome.position <= len(text)


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", (0,)), ("0,2-3", (0, 2, 3)), ("3,1-2,2", (1, 2, 3)), ("8191", (8191,)), ("4-4", (4,))]
)
def test_cpus_are_read_as_perf_and_taskset_write_them(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize(
    ("text", "position"), [("", 0), ("a", 0), ("0,", 2), ("0,3-2", 2), ("0-", 0), ("-1", 0), ("1,8192", 2), ("0 1", 0)]
)
def test_what_is_no_list_of_cpus_is_pointed_at(text: str, position: int) -> None:
    with pytest.raises(BadSyntax) as caught:
        parse_cpus(text)
    assert caught.value.position == position


@hypothesis.given(st.sets(st.integers(0, 8191), min_size=1, max_size=40))
def test_cpus_are_read_back_as_they_were_written(cpus: set[int]) -> None:
    assert parse_cpus(format_cpus(sorted(cpus))) == tuple(sorted(cpus))
