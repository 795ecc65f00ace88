"""Bytes from a terminal as keys, in whatever pieces they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpctl.keys import Keys


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"jk?", ["j", "k", "?"]),
        (b"\x1b[A\x1b[B", ["up", "down"]),
        (b"\x1bOA\x1bOB", ["up", "down"]),
        (b"\x1b[5~q\x1b[6~", ["page up", "q", "page down"]),
        (b"\x1b[H\x1b[F", ["home", "end"]),
        (b"\r", ["enter"]),
        (b"\x1b\x1b[A", ["escape", "up"]),
        (b"\x1b[15~x", ["x"]),
        (b"\x1b[1;5Ax", ["x"]),
        (b"\x1bfx", ["x"]),
        ("\u00e9".encode(), ["\u00e9"]),
    ],
)
def test_keys_are_recognised_whole_and_in_pieces(data: bytes, keys: list[str]) -> None:
    assert Keys().feed(data) == keys
    piecemeal = Keys()
    assert [key for index in range(len(data)) for key in piecemeal.feed(data[index : index + 1])] == keys


def test_the_escape_key_is_known_only_when_nothing_follows() -> None:
    # Given an escape, which begins other keys too,
    keys = Keys()
    assert keys.feed(b"\x1b") == []
    assert keys.is_waiting

    # then it is itself when whoever reads has waited long enough, and the next key is read as it is.
    assert keys.flush() == ["escape"]
    assert not keys.is_waiting
    assert keys.feed(b"[") == ["["]
    assert keys.flush() == []


@given(st.binary(max_size=200))
def test_no_bytes_stop_the_keys_that_come_after_them(garbage: bytes) -> None:
    keys = Keys()
    for key in [*keys.feed(garbage), *keys.flush()]:
        assert key
    keys.feed(b"~~")  # ends a character or a sequence that was cut short
    keys.flush()
    assert keys.feed(b"q") == ["q"]
