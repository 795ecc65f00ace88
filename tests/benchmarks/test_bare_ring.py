"""The floor's reader of rings, on memory of our own."""

from __future__ import annotations

import ctypes
import mmap
import struct

from benchmarks.bare_breakpoint import RingReader

RING_BYTES = 256
HEAD, TAIL = 1024, 1032  # in the control page


class Memory:
    """A control page and a ring behind it, and a kernel that writes records."""

    def __init__(self) -> None:
        self.buffer = (ctypes.c_char * (mmap.PAGESIZE + RING_BYTES))()
        self.written = 0

    def write(self, record: bytes) -> None:
        for byte in record:
            self.buffer[mmap.PAGESIZE + self.written % RING_BYTES] = bytes([byte])
            self.written += 1
        struct.pack_into("=Q", self.buffer, HEAD, self.written)

    @property
    def tail(self) -> int:
        return int(struct.unpack_from("=Q", self.buffer, TAIL)[0])


def test_what_was_written_is_read_once() -> None:
    # Given a ring with two records,
    memory = Memory()
    reader = RingReader(ctypes.addressof(memory.buffer), RING_BYTES)
    memory.write(b"a" * 48)
    memory.write(b"b" * 48)

    # when it is read twice,
    first, second = reader.take(), reader.take()

    # then the first time brings both, the second nothing, and the kernel has the room again.
    assert (first, second) == (b"a" * 48 + b"b" * 48, b"")
    assert memory.tail == 96


def test_a_record_that_goes_round_the_end_is_read_whole() -> None:
    # Given a ring that was read up to near its end,
    memory = Memory()
    reader = RingReader(ctypes.addressof(memory.buffer), RING_BYTES)
    for letter in b"abcde":
        memory.write(bytes([letter]) * 48)
    reader.take()

    # when a record goes round the end,
    memory.write(bytes(range(48)))

    # then it is read in one piece.
    assert reader.take() == bytes(range(48))
