"""
The system calls behind a breakpoint: perf_event_open, its ioctls, its counts and its ring mapping.

This is the only file of the plugin that uses ctypes. It decides nothing: every function is one call to the kernel, and
a refusal is an ``OSError`` with the kernel's errno.

Rings are mapped through libc, not through ``mmap.mmap``: that one duplicates the descriptor, and an event keeps its
slot until the last copy is closed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from typing import Final, NamedTuple

PAGE_BYTES: Final = mmap.PAGESIZE

# The numbers belong to the ABI this Python was built for: 32-bit programs on the same kernels have others.
_SYSCALL: Final = {"x86_64": 298, "aarch64": 241}.get(os.uname().machine) if sys.maxsize > 2**32 else None

_FLAG_FD_CLOEXEC: Final = 8

TYPE_SOFTWARE: Final = 1
TYPE_BREAKPOINT: Final = 5
_CONFIG_DUMMY: Final = 9  # PERF_COUNT_SW_DUMMY: counts nothing

# perf_event_attr.sample_type
SAMPLE_IP: Final = 1 << 0
SAMPLE_TID: Final = 1 << 1
SAMPLE_TIME: Final = 1 << 2
SAMPLE_ADDR: Final = 1 << 3
SAMPLE_CALLCHAIN: Final = 1 << 5
SAMPLE_CPU: Final = 1 << 7

# perf_event_attr.read_format, and what read() then returns. PERF_FORMAT_LOST came with Linux commit 119a784c8127
# ("perf/core: Add a new read format to get a number of lost samples") (in v6.0).
_FORMAT_TIME_ENABLED: Final = 1 << 0
_FORMAT_TIME_RUNNING: Final = 1 << 1
_FORMAT_LOST: Final = 1 << 4
_COUNTS: Final = struct.Struct("=QQQQ")

# The one-bit fields of perf_event_attr, after read_format.
DISABLED: Final = 1 << 0
INHERIT: Final = 1 << 1  # by whatever the thread clones or forks
PINNED: Final = 1 << 2
EXCLUDE_USER: Final = 1 << 4
EXCLUDE_KERNEL: Final = 1 << 5
EXCLUDE_HV: Final = 1 << 6
BIRTHS: Final = 1 << 13  # "task": a record for each thread or process that is born, or ends
EXCLUDE_CALLCHAIN_KERNEL: Final = 1 << 21
EXCLUDE_CALLCHAIN_USER: Final = 1 << 22
_USE_CLOCKID: Final = 1 << 25
INHERIT_THREAD: Final = 1 << 35  # inherit by threads only, not by processes
REMOVE_ON_EXEC: Final = 1 << 36

# struct perf_event_attr up to config3 (PERF_ATTR_SIZE_VER8).
_ATTR: Final = struct.Struct("=IIQQQQQIIQQQQIiQIHHIIQQ")
assert _ATTR.size == 136

_IOC_ENABLE: Final = 0x2400
_IOC_DISABLE: Final = 0x2401
_IOC_REFRESH: Final = 0x2402
_IOC_SET_OUTPUT: Final = 0x2405

_MEMORY_ORDER_SEQ_CST: Final = 5

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class Counts(NamedTuple):
    """What read() says of an event: hits, nanoseconds enabled and running, and hits its ring had no room for."""

    hits: int
    enabled_ns: int
    running_ns: int
    lost: int


def open_breakpoint(
    address: int,
    length_bytes: int,
    bp_type: int,
    *,
    tid: int,
    cpu: int,
    flags: int = DISABLED | PINNED,
    sample_type: int = 0,
    overflows: bool = False,
    read_lost: bool = True,
) -> int:
    """
    Take a slot and return the descriptor that holds it.

    :param bp_type: ``HW_BREAKPOINT_R/W/X``, which are the bits of ``Access``.
    :param tid: a thread, 0 for the calling one, or -1 for whatever runs on ``cpu``.
    :param cpu: a CPU, or -1 for wherever ``tid`` runs.
    :param sample_type: what a record holds; 0 for an event that only counts.
    :param overflows: whether each hit overflows the event, as ``refresh`` needs it; with records it always does.
    :param read_lost: whether to ask for the count of lost hits; only the search for what a host lacks does without.
    :raises OSError: ENOSPC without a free slot; a malformed request gets that too when no slot is free.

    Each record asks for a wake-up, and is stamped with CLOCK_MONOTONIC: the default clock cannot be compared with any
    that user space reads. perf_event_open(2).
    """
    read_format = _FORMAT_TIME_ENABLED | _FORMAT_TIME_RUNNING | (_FORMAT_LOST if read_lost else 0)
    period = 1 if overflows or sample_type else 0
    attr = _ATTR.pack(
        *(TYPE_BREAKPOINT, _ATTR.size, 0, period, sample_type, read_format, flags | _USE_CLOCKID, 1),
        *(bp_type, address, length_bytes, 0, 0, 0, time.CLOCK_MONOTONIC, 0, 0, 0, 0, 0, 0, 0, 0),
    )
    return _perf_event_open(attr, tid, cpu)


def open_dummy(tid: int, *, cpu: int = -1, flags: int = DISABLED) -> int:
    """
    Return an event that counts nothing and takes no slot; what ``flags`` ask for it still reports.

    :param tid: a thread, or -1 for whatever runs on ``cpu``.
    :param cpu: a CPU, or -1 for wherever ``tid`` runs.
    :raises OSError: with the kernel's errno.
    """
    read_format = _FORMAT_TIME_ENABLED | _FORMAT_TIME_RUNNING | _FORMAT_LOST
    attr = _ATTR.pack(
        *(TYPE_SOFTWARE, _ATTR.size, _CONFIG_DUMMY, 0, 0, read_format, flags | _USE_CLOCKID, 1),
        *(0, 0, 0, 0, 0, 0, time.CLOCK_MONOTONIC, 0, 0, 0, 0, 0, 0, 0, 0),
    )
    return _perf_event_open(attr, tid, cpu)


def _perf_event_open(attr: bytes, tid: int, cpu: int) -> int:
    if _SYSCALL is None:
        raise OSError(errno.ENOSYS, "perf_event_open is known for 64-bit x86 and Arm only")
    # Arguments beyond the prototype go to a variadic function: each is widened by hand, or its upper half is left over.
    arguments = (ctypes.c_long(number) for number in (tid, cpu, -1, _FLAG_FD_CLOEXEC))
    fd = int(_libc.syscall(ctypes.c_long(_SYSCALL), attr, *arguments))
    if fd < 0:
        raise _last_error()
    return fd


def enable(fd: int) -> None:
    """Let the event count; raises ``OSError``."""
    fcntl.ioctl(fd, _IOC_ENABLE, 0)


def disable(fd: int) -> None:
    """Stop the event. When this returns its CPU has stopped it: no record is still being written."""
    fcntl.ioctl(fd, _IOC_DISABLE, 0)


def refresh(fd: int, hits: int) -> None:
    """
    Let the event report so many more hits than it may already, and enable it; it stops by itself after them.

    :raises OSError: EINVAL for an event that is inherited or does not overflow.

    On some kernels an event that has stopped so stays silent, whatever is asked of it.
    """
    fcntl.ioctl(fd, _IOC_REFRESH, hits)


def set_output(fd: int, into: int) -> None:
    """
    Write the event's records into another event's ring.

    :raises OSError: EINVAL unless both are bound to the same CPU, or to the same thread and no CPU.
    """
    fcntl.ioctl(fd, _IOC_SET_OUTPUT, into)


def read_counts(fd: int) -> Counts:
    """
    Return the counts of an event so far. An event that is active on another CPU is asked there, by an interrupt.

    :raises OSError: EIO when the kernel could not keep the event on its CPU, which its own accounting rules out.
    """
    data = os.read(fd, _COUNTS.size)
    if len(data) != _COUNTS.size:
        raise OSError(errno.EIO, "the kernel has given this event up")
    return Counts._make(_COUNTS.unpack(data))


class Mapping:
    """
    The shared pages of an event: a control page, and ``data_bytes`` of ring after it.

    ``memory`` covers both. Release every view of it before ``unmap``: nothing else would keep a later access from
    reading memory that is no longer there.
    """

    def __init__(self, fd: int, data_bytes: int) -> None:
        """:raises OSError: EPERM above the limit of locked memory, ENOMEM; EINVAL unless a power of two of pages."""
        self._bytes = PAGE_BYTES + data_bytes
        # Readable and writable: with a read-only mapping the kernel would overwrite what was not yet read.
        address = _libc.mmap(None, self._bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            raise _last_error()
        self._address = address
        self.memory = memoryview((ctypes.c_ubyte * self._bytes).from_address(address)).cast("B")

    def unmap(self) -> None:
        """Give the pages back."""
        self.memory.release()
        if _libc.munmap(self._address, self._bytes) != 0:
            raise _last_error()


def _find_fence() -> Callable[[], None] | None:
    try:
        atomic = ctypes.CDLL("libatomic.so.1")
    except OSError:
        return None
    return functools.partial(atomic.atomic_thread_fence, _MEMORY_ORDER_SEQ_CST)


# x86 keeps loads in order, and a store behind the loads before it; plain accesses to a ring are enough there. Arm does
# neither: a reader needs a fence after loading data_head, and one before storing data_tail. None where there is none.
FENCE_IS_NEEDED: Final = os.uname().machine != "x86_64"
fence: Final = _find_fence() if FENCE_IS_NEEDED else None


def own_word() -> tuple[int, memoryview]:
    """Return the address of an aligned 64-bit word of this process, and the word: ``view[0] = 1`` is a single store."""
    word = (ctypes.c_uint64 * 1)()
    return ctypes.addressof(word), memoryview(word).cast("B").cast("Q")


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
