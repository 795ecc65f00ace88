"""
The least that takes a slot and gives it back: open, mmap, munmap, close, on one thread.

It shares no code with the daemon or its plugins, so that a mistake of theirs cannot hide in the floor: the event is the
plainest one with a record per hit, it is armed from the start, and nobody reads it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_CLOSE_ON_EXEC = 8
_SAMPLE_IP_TID_TIME_ADDR_CPU = 0x8F
_EXCLUDE_KERNEL_AND_HV = 1 << 5 | 1 << 6
_WRITE = 2
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class BareBreakpoint:
    """A watchpoint on 8 bytes that can be armed and disarmed; ``ring_bytes`` 0 is an event that only counts."""

    def __init__(self, tid: int, address: int, ring_bytes: int) -> None:
        period, sample_type = (1, _SAMPLE_IP_TID_TIME_ADDR_CPU) if ring_bytes else (0, 0)
        head = struct.pack("=IIQQQQQ", 5, 112, 0, period, sample_type, 0, _EXCLUDE_KERNEL_AND_HV)
        self._attr = (head + struct.pack("=IIQQ", 1, _WRITE, address, 8)).ljust(112, b"\0")
        self._number = ctypes.c_long(_PERF_EVENT_OPEN[os.uname().machine])
        self._arguments = tuple(ctypes.c_long(value) for value in (tid, -1, -1, _CLOSE_ON_EXEC))
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
