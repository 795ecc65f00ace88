"""
Takes hits out of the memory an event shares with the kernel.

The kernel writes records behind ``data_head``, the reader takes them from ``data_tail``; both only grow. A full ring
loses hits, and announces nothing more, until the reader has moved ``data_tail``: whoever was woken drains until
``more`` is false.

Rules kept here:

- What is handed over is whole samples and nothing else, byte for byte as the kernel wrote them (docs/protocol.md, "Hit
  records"). Nothing is decoded on the way: a stretch of samples without call chains is recognised by looking at every
  48th byte, which costs a few nanoseconds per hit; walking from header to header would cost a hundred.
- A record is never split, even where one alone exceeds the budget.
- A loss is never missed: ``loss_possible`` is true whenever the kernel may have found no room. The exact number is the
  event's own (``Counts.lost``); to read it at every drain would interrupt the CPU of every leg.

``data_head`` and ``data_tail`` are accessed as native 64-bit words, a single load or store each. What else Arm needs is
said at ``perf_event.fence``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from hwbpd_linux.perf_event import PAGE_BYTES, fence

PLAIN_BYTES: Final = 48  # a sample without a call chain
SAMPLE_BYTES_MAX: Final = 0xFFF8  # what the 16 bits for a record's size allow

_HEADER: Final = struct.Struct("=IHH")  # type, misc, size
_SAMPLE: Final = 9  # PERF_RECORD_SAMPLE
_LOST_BYTES: Final = 24  # PERF_RECORD_LOST, which the kernel writes before the next record after a loss
_POSITIONS: Final = slice(1024, 1040)  # data_head and data_tail in struct perf_event_mmap_page

# The bytes of a plain sample's header that never vary, by offset: type and size, little-endian. The rest is "misc".
_PLAIN_HEADER: Final = ((0, _SAMPLE), (6, PLAIN_BYTES), (1, 0), (2, 0), (3, 0), (7, 0))


class Chunk(NamedTuple):
    """What one visit to a ring brought."""

    records: bytes  # whole samples, oldest first
    hits: int  # how many
    loss_possible: bool  # the kernel may have found no room since the last visit
    more: bool  # the budget ended first


_NOTHING: Final = Chunk(b"", 0, False, False)


class Ring:
    """
    The reader's side of one ring.

    :param memory: the control page and the data after it, a power of two in size.
    :param sample_bytes_max: the longest sample that the event writes.
    """

    def __init__(self, memory: memoryview, sample_bytes_max: int) -> None:
        self._memory = memory
        self._positions = memory[_POSITIONS].cast("Q")
        self._data = memory[PAGE_BYTES:]
        self._size = len(self._data)
        self._scarce_bytes = sample_bytes_max + _LOST_BYTES

    def take(self, budget_bytes: int) -> Chunk:
        """Take records up to about ``budget_bytes``; at least one, if there is one."""
        head, tail = self._positions
        waiting = head - tail
        if not waiting:
            return _NOTHING
        if fence is not None:
            fence()  # no byte of a record is read before the head that announced it
        _, _, first_bytes = _HEADER.unpack_from(self._data, tail % self._size)
        records, hits, taken_bytes, losses = split(self._copy(tail, min(waiting, max(budget_bytes, first_bytes))))
        if fence is not None:
            fence()  # no byte is read after the kernel was told that it may overwrite it
        self._positions[1] = tail + taken_bytes
        # The head is read again, after the store: until it, the kernel had no more room than this. It wants one byte
        # to stay empty.
        room = self._size - (self._positions[0] - tail)
        return Chunk(records, hits, losses or room <= self._scarce_bytes, taken_bytes < waiting)

    def others(self) -> Iterator[bytes]:
        """Take every record out, and return those that are no samples."""
        head, tail = self._positions
        if fence is not None:
            fence()
        data = self._copy(tail, head - tail)
        if fence is not None:
            fence()
        self._positions[1] = head
        at = 0
        while at < len(data):
            record_type, _, size = _HEADER.unpack_from(data, at)
            if record_type != _SAMPLE:
                yield data[at : at + size]
            at += size

    def close(self) -> None:
        """Let go of the memory; it may be unmapped then."""
        self._positions.release()
        self._data.release()

    def _copy(self, start: int, count: int) -> bytes:
        at = start % self._size
        if at + count <= self._size:
            return bytes(self._data[at : at + count])
        return b"".join((self._data[at:], self._data[: at + count - self._size]))


def split(data: bytes) -> tuple[bytes, int, int, bool]:
    """
    Sort out what a ring held.

    :param data: records back to back; the last one may be cut off.
    :return: the samples, how many they are, the bytes of all whole records, and whether there were records of losses.
    """
    runs: list[bytes] = []
    hits = at = 0
    losses = False
    while True:
        plain = (len(data) - at) // PLAIN_BYTES
        if plain and _are_plain(data, at, plain):
            end = other_end = at + plain * PLAIN_BYTES
            count = plain
        else:
            end, other_end, count = _walk(data, at)
            losses = losses or other_end > end
        if other_end == at:
            # One run is the rule, and the whole of ``data``: then nothing is copied.
            return (runs[0] if len(runs) == 1 else b"".join(runs)), hits, at, losses
        if count:
            runs.append(data if end - at == len(data) else data[at:end])
        hits += count
        at = other_end


def _are_plain(data: bytes, at: int, count: int) -> bool:
    """
    Whether the next ``count`` records are samples without call chains.

    It holds by induction: the first header is one, and if it says 48 bytes the next header is 48 bytes on.
    """
    end = at + count * PLAIN_BYTES
    return all(data[at + offset : end : PLAIN_BYTES] == bytes((value,)) * count for offset, value in _PLAIN_HEADER)


def _walk(data: bytes, at: int) -> tuple[int, int, int]:
    """
    Step over the samples from ``at`` on, and over the record of another sort that ends them, if one does.

    :return: where the samples end, where that record ends, and how many samples there were.
    """
    count = 0
    while at + _HEADER.size <= len(data):
        record_type, _, size = _HEADER.unpack_from(data, at)
        assert size >= _HEADER.size, "the kernel writes no record without a header"
        if at + size > len(data):
            break
        if record_type != _SAMPLE:
            return at, at + size, count
        at += size
        count += 1
    return at, at, count
