"""
The oracle's own way to the kernel: one system call, and nothing of what it judges.

It shares no line with the machine plugin, so that a mistake there cannot hide here. An event is created disabled,
without a ring, on a word of this process's own: it takes its slot and never reports.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Protocol

X86_64_PERF_EVENT_OPEN = 298  # the only architecture this judge knows

PERF_TYPE_BREAKPOINT = 5
HW_BREAKPOINT_RW = 3
PERF_FLAG_FD_CLOEXEC = 8
DISABLED = 1 << 0
EXCLUDE_KERNEL = 1 << 5  # then a debugger's rights are enough for a task
# type, size, config, sample_period, sample_type, read_format, flags, wakeup, bp_type, bp_addr, bp_len
ATTRIBUTES = struct.Struct("=IIQQQQQIIQQ")  # PERF_ATTR_SIZE_VER1, the first with bp_len


class Opener(Protocol):
    """Who answers for the kernel."""

    def open(self, tid: int, cpu: int) -> int:
        """
        Take one slot, of a thread (or -1 for CPU-wide) on a CPU (or -1 for wherever the thread runs).

        :return: what to ``close``.
        :raises OSError: with the kernel's errno.
        """
        ...

    def close(self, held: int) -> None:
        """Give the slot back; it is free on return."""
        ...


class KernelOpener:
    """The running kernel."""

    def __init__(self) -> None:
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._watched = ctypes.c_uint64()
        self._attributes = ATTRIBUTES.pack(
            PERF_TYPE_BREAKPOINT,
            ATTRIBUTES.size,
            0,
            1,
            0,
            0,
            DISABLED | EXCLUDE_KERNEL,
            0,
            HW_BREAKPOINT_RW,
            ctypes.addressof(self._watched),
            1,
        )

    def open(self, tid: int, cpu: int) -> int:
        arguments = (tid, cpu, -1, PERF_FLAG_FD_CLOEXEC)
        fd: int = self._call(
            ctypes.c_long(X86_64_PERF_EVENT_OPEN), self._attributes, *(ctypes.c_long(value) for value in arguments)
        )
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"perf_event_open(tid {tid}, cpu {cpu}): {errno.errorcode.get(number, number)}")
        return fd

    def close(self, held: int) -> None:
        os.close(held)
