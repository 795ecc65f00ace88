"""The sentence in which a backend says no: each part of it, and what is left out where it would help nobody."""

from __future__ import annotations

import pytest

from hwbpd.core.model import Access, Mode, Span
from hwbpd.refusals import Asked, sentence

READ_WRITE = Access.READ | Access.WRITE


def asked(address: int, length: int, access: Access = Access.WRITE, *, user: bool = True, kernel: bool = True) -> Asked:
    return Asked(Span(address, length), access, Mode(user=user, kernel=kernel))


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (asked(0x404040, 8), "mem:0x404040/8:w"),
        (asked(0x404040, 8, READ_WRITE, kernel=False), "mem:0x404040/8:rw:u"),
        (asked(0x404040, 8, Access.EXECUTE, user=False), "mem:0x404040/8:x:k"),
        (asked(0x404040, 8, user=False, kernel=False), "mem:0x404040/8:w:h"),
        (asked(0x404040, 8, Access(0)), "mem:0x404040/8"),
    ],
)
def test_a_request_is_written_as_perf_writes_it(request_: Asked, text: str) -> None:
    assert str(request_) == text


@pytest.mark.parametrize(
    ("nearest", "ending"),
    [
        # All of the bytes, and no more to be said;
        (asked(0x1000, 16, READ_WRITE), "; nearest: mem:0x1000/16:rw"),
        # some of them;
        (asked(0x1008, 8), "; nearest: mem:0x1008/8:w, 8 of the 16 bytes"),
        (asked(0xFFC, 8), "; nearest: mem:0xffc/8:w, 4 of the 16 bytes"),
        # a breakpoint, which holds an instruction and no bytes;
        (asked(0x1000, 8, Access.EXECUTE), "; nearest: mem:0x1000/8:x"),
        # none of them, right beside.
        (asked(0x1010, 8), ""),
        (asked(0xFF8, 8), ""),
    ],
)
def test_what_comes_near_is_said_with_what_it_leaves_out(nearest: Asked, ending: str) -> None:
    said = sentence(asked(0x1000, 16), "no slot is that long", nearest)

    assert said == f"mem:0x1000/16:w: no slot is that long{ending}"


def test_near_to_no_byte_at_all_is_one() -> None:
    said = sentence(asked(0x1000, 0), "a slot holds at least one byte", asked(0x1000, 1))

    assert said == "mem:0x1000/0:w: a slot holds at least one byte; nearest: mem:0x1000/1:w"
