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

from hwbpd.core.model import Pool

X86_64_PERF_EVENT_OPEN = 298
PERF_EVENT_OPEN = {"x86_64": X86_64_PERF_EVENT_OPEN, "aarch64": 241}  # of 64-bit programs; others are not known here

PERF_TYPE_BREAKPOINT = 5
HW_BREAKPOINT_RW, HW_BREAKPOINT_X = 3, 4
PERF_FLAG_FD_CLOEXEC = 8
DISABLED = 1 << 0
EXCLUDE_KERNEL = 1 << 5  # then a debugger's rights are enough for a task
# type, size, config, sample_period, sample_type, read_format, flags, wakeup, bp_type, bp_addr, bp_len
ATTRIBUTES = struct.Struct("=IIQQQQQIIQQ")  # PERF_ATTR_SIZE_VER1, the first with bp_len


class Opener(Protocol):
    """Who answers for the kernel."""

    def open(self, tid: int, cpu: int, pool: Pool = Pool.DATA) -> int:
        """
        Take one slot, of a thread (or -1 for CPU-wide) on a CPU (or -1 for wherever the thread runs).

        :param pool: INST for a breakpoint; every other for a watchpoint, which x86 takes from the same slots.
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
        self._number = PERF_EVENT_OPEN[os.uname().machine]
        self._watchpoint = self._attributes(HW_BREAKPOINT_RW, 1)
        self._breakpoint = self._attributes(HW_BREAKPOINT_X, 4)  # on Arm; x86 has one pool, and this is not asked for

    def _attributes(self, bp_type: int, length_bytes: int) -> bytes:
        what = (bp_type, ctypes.addressof(self._watched), length_bytes)
        flags = DISABLED | EXCLUDE_KERNEL
        return ATTRIBUTES.pack(PERF_TYPE_BREAKPOINT, ATTRIBUTES.size, 0, 1, 0, 0, flags, 0, *what)

    def open(self, tid: int, cpu: int, pool: Pool = Pool.DATA) -> int:
        attributes = self._breakpoint if pool is Pool.INST else self._watchpoint
        arguments = (tid, cpu, -1, PERF_FLAG_FD_CLOEXEC)
        fd: int = self._call(ctypes.c_long(self._number), attributes, *(ctypes.c_long(value) for value in arguments))
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"perf_event_open(tid {tid}, cpu {cpu}): {errno.errorcode.get(number, number)}")
        return fd

    def close(self, held: int) -> None:
        os.close(held)
