"""
The least that takes a slot and gives it back: open, mmap, munmap, close, on one thread; and the least that reads hits.

It shares no code with the daemon or its plugins, so that a mistake of theirs cannot hide in the floor: the event is the
plainest one with a record per hit, and it is armed from the start.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

RECORD_BYTES = 48

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_CLOSE_ON_EXEC = 8
_SAMPLE_IP_TID_TIME_ADDR_CPU = 0x8F
_FORMAT_LOST = 1 << 4
_EXCLUDE_KERNEL_AND_HV = 1 << 5 | 1 << 6
_WRITE = 2
_MAP_FAILED = ctypes.c_void_p(-1).value
_POSITIONS = slice(1024, 1040)  # data_head and data_tail in struct perf_event_mmap_page

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class BareBreakpoint:
    """A watchpoint on 8 bytes that can be armed and disarmed; ``ring_bytes`` 0 is an event that only counts."""

    def __init__(self, tid: int, address: int, ring_bytes: int) -> None:
        period, sample_type = (1, _SAMPLE_IP_TID_TIME_ADDR_CPU) if ring_bytes else (0, 0)
        head = struct.pack("=IIQQQQQ", 5, 112, 0, period, sample_type, _FORMAT_LOST, _EXCLUDE_KERNEL_AND_HV)
        self._attr = (head + struct.pack("=IIQQ", 1, _WRITE, address, 8)).ljust(112, b"\0")
        self._number = ctypes.c_long(_PERF_EVENT_OPEN[os.uname().machine])
        self._arguments = tuple(ctypes.c_long(value) for value in (tid, -1, -1, _CLOSE_ON_EXEC))
        self._ring_bytes = ring_bytes
        self._bytes = ring_bytes + mmap.PAGESIZE if ring_bytes else 0
        self._fd = -1
        self._ring: int | None = None

    def arm(self) -> None:
        """Take a slot; raises ``OSError``."""
        self._fd = _libc.syscall(self._number, self._attr, *self._arguments)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "perf_event_open")
        if self._bytes:
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            self._ring = _libc.mmap(None, self._bytes, protection, mmap.MAP_SHARED, self._fd, 0)
            if self._ring == _MAP_FAILED:
                raise OSError(ctypes.get_errno(), "mmap of the ring")

    def disarm(self) -> None:
        """Give it back."""
        if self._bytes:
            _libc.munmap(self._ring, self._bytes)
        os.close(self._fd)

    def fileno(self) -> int:
        """Readable when hits have come."""
        return self._fd

    def counts(self) -> tuple[int, int]:
        """How many hits there were, and how many of them found no room in the ring."""
        hits, lost = struct.unpack("=QQ", os.read(self._fd, 16))
        return hits, lost

    def reader(self) -> RingReader:
        """Read the ring, from when it is armed until it is disarmed."""
        assert self._ring is not None, "an event that only counts has no ring"
        return RingReader(self._ring, self._ring_bytes)


class RingReader:
    """Takes everything out of a ring as it is, to be called whenever it has become readable."""

    def __init__(self, ring: int, ring_bytes: int) -> None:
        memory = memoryview((ctypes.c_char * (mmap.PAGESIZE + ring_bytes)).from_address(ring)).cast("B")
        self._positions = memory[_POSITIONS].cast("Q")
        self._data = memory[mmap.PAGESIZE :]
        self._size = ring_bytes

    def take(self) -> bytes:
        """Return what is in the ring: records back to back."""
        head, tail = self._positions
        start, count = tail % self._size, head - tail
        records = bytes(self._data[start : start + count])
        if len(records) < count:
            records += bytes(self._data[: count - len(records)])
        self._positions[1] = head
        return records
