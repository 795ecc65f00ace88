"""
Which processes have descriptors of breakpoint events, found by looking through /proc.

/proc tells that a descriptor is a perf event, and nothing else of it. What sort of event it is, is asked through a copy
of it (pidfd_getfd), which is closed at once: PERF_EVENT_IOC_MODIFY_ATTRIBUTES is called with a type, and answers

- EINVAL when the event is of another type,
- EOPNOTSUPP when it is of that type, and the type cannot be modified.

Only breakpoints can be modified, so their type is never asked for: it would stop and start the event, and change it.
An event that is of none of all other types is a breakpoint. Since Linux commit 32ff77e8cc9e ("perf/core: Implement
fast breakpoint modification via _IOC_MODIFY_ATTRIBUTES") (in v4.17), and how it answers is tried on an event of our
own first. The event goes on counting. Should its owner close it while we have the copy, its slot is free a few
microseconds later than it would have been.

An event has a number of its own, and one that several processes have, after a fork for instance, counts once.

Not seen: an event whose descriptors are all closed and which lives on in a ring that is mapped; one on its way through
a socket; and a descriptor in a table that only one thread of a process has.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from hwbpd_linux import perf_event
from hwbpd_linux.processes import Process, describe, process_ids

FDS_MAX: Final = 20_000

_LINK: Final = "anon_inode:[perf_event]"
_PMUS: Final = Path("/sys/bus/event_source/devices")
_TYPES_LEAST: Final = 64  # types are given out from 6 upwards; so many are asked for, whether sysfs lists them or not
_TYPE_SOFTWARE: Final = perf_event.TYPE_SOFTWARE
_TYPE_HARDWARE: Final = 0

_IOC_ID: Final = 0x80082407
_IOC_MODIFY_ATTRIBUTES: Final = 0x4008240B
_ATTRIBUTES: Final = struct.Struct("=II56x")  # type and size; the first published size will do

_PIDFD_GETFD: Final = 438  # one number for every architecture
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Holder(NamedTuple):
    """A process, and the numbers of its events that are breakpoints, or that could not be told from one."""

    process: Process
    breakpoints: frozenset[int]
    unknown: frozenset[int]  # descriptor numbers, where the event's own could not be had


class Holders(NamedTuple):
    """All that were found; ``complete`` is false when some process or descriptor could not be looked at."""

    holders: tuple[Holder, ...]
    complete: bool


NOBODY: Final = Holders((), complete=True)


def find_holders(ours: Collection[int], until_s: float, before: Holders = NOBODY) -> Holders:
    """
    Return who else has breakpoint events.

    :param ours: descriptors of this process; wherever else their events turn up, they are passed over.
    :param until_s: when to stop looking, by ``time.monotonic()``.
    :param before: what an earlier search found; the kinds of those events are not asked for again.

    No event of this process itself counts, whether it is among ``ours`` or not.
    """
    seen = {event for fd in ours if (event := _event_number(fd)) is not None}
    kinds = _Kinds(_types_to_ask() if _answers_as_expected() else (), before, until_s)
    holders: list[Holder] = []
    complete = True
    looked_at = 0
    for pid in process_ids():
        if pid == os.getpid():
            continue
        try:
            fds, count = _perf_fds(pid)
        except PermissionError:
            complete = False
            continue
        looked_at += count
        if fds and (holder := _look_at(pid, fds, kinds, seen)) is not None:
            holders.append(holder)
        if looked_at > FDS_MAX or time.monotonic() > until_s:
            return Holders(tuple(holders), complete=False)
    return Holders(tuple(holders), complete)


def _perf_fds(pid: int) -> tuple[list[int], int]:
    """Return the descriptors of a process that are perf events, and how many were looked at."""
    folder = f"/proc/{pid}/fd"
    names = _names(folder)
    if not names:
        # A leader that has exited shows none, though the other threads of its process still have them.
        for task in _names(f"/proc/{pid}/task")[1:2]:
            folder = f"/proc/{pid}/task/{task}/fd"
            names = _names(folder)
    return [int(name) for name in names[:FDS_MAX] if _is_event(f"{folder}/{name}")], len(names)


def _names(folder: str) -> list[str]:
    """The entries of a folder of /proc; none when its process is gone. Raises ``PermissionError``."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return []


def _is_event(path: str) -> bool:
    try:
        return os.readlink(path) == _LINK
    except OSError:
        return False  # closed meanwhile


def _look_at(pid: int, fds: list[int], kinds: _Kinds, seen: set[int]) -> Holder | None:
    """Return what the process has of events that nobody had before it; adds them to ``seen``."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None  # it is gone, and its descriptors with it
    breakpoints: set[int] = set()
    unknown: set[int] = set()
    try:
        process = describe(pid)
        for fd in fds:
            try:
                with _Copy(pidfd, fd) as event:
                    number = _event_number(event)
                    if number is None or number in seen:
                        continue
                    seen.add(number)
                    is_breakpoint = kinds.is_breakpoint(event, number)
                    if is_breakpoint is None:
                        unknown.add(fd)
                    elif is_breakpoint:
                        breakpoints.add(number)
            except OSError as refusal:
                if refusal.errno != errno.EBADF:  # it was closed meanwhile
                    unknown.add(fd)
        if process is None or _is_readable(pidfd):
            return None  # it has exited; what was read may be about the next process with its number
    finally:
        os.close(pidfd)
    return Holder(process, frozenset(breakpoints), frozenset(unknown)) if breakpoints or unknown else None


class _Copy:
    """A descriptor of another process, copied into this one for a moment; raises ``OSError``."""

    def __init__(self, pidfd: int, fd: int) -> None:
        arguments = (ctypes.c_long(number) for number in (_PIDFD_GETFD, pidfd, fd, 0))
        self._fd = int(_libc.syscall(*arguments))
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _event_number(fd: int) -> int | None:
    """The number that the kernel gave an event; ``None`` for a descriptor of anything else."""
    if not _is_event(f"/proc/self/fd/{fd}"):
        return None  # the number has been used again, and that call might mean something else there
    try:
        (number,) = struct.unpack("=Q", fcntl.ioctl(fd, _IOC_ID, bytes(8)))
    except OSError:
        return None
    return int(number)


def _types_to_ask() -> tuple[int, ...]:
    """Every type of event but breakpoints; those first that are met most."""
    listed = max(_listed_types(), default=0)
    most_met = (_TYPE_SOFTWARE, _TYPE_HARDWARE, 2, 3, 4)
    rest = range(perf_event.TYPE_BREAKPOINT + 1, max(_TYPES_LEAST, listed + 1))
    return (*most_met, *rest)


def _listed_types() -> Iterator[int]:
    for file in _PMUS.glob("*/type"):
        try:
            yield int(file.read_text())
        except (OSError, ValueError):
            continue


class _Kinds:
    """
    Tells breakpoints from other events.

    :param types: every other type; none where the kernel does not tell.
    :param before: events whose kind is known: the kernel uses no number again.
    """

    def __init__(self, types: Collection[int], before: Holders, until_s: float) -> None:
        self._types = types
        self._known = frozenset[int]().union(*(holder.breakpoints for holder in before.holders))
        self._until_s = until_s

    def is_breakpoint(self, event: int, number: int) -> bool | None:
        """Whether an event is a breakpoint, ``None`` when that cannot be told, or not in time; raises ``OSError``."""
        if number in self._known:
            return True
        if not self._types or time.monotonic() > self._until_s:
            return None
        return all(_ask(event, other) == errno.EINVAL for other in self._types)


def _answers_as_expected() -> bool:
    """Whether this kernel tells the type of an event as described above; tried on one that takes no slot."""
    try:
        event = perf_event.open_dummy(0)
    except OSError:
        return False
    try:
        return (_ask(event, _TYPE_SOFTWARE), _ask(event, _TYPE_HARDWARE)) == (errno.EOPNOTSUPP, errno.EINVAL)
    except OSError:
        return False
    finally:
        os.close(event)


def _ask(event: int, number: int) -> int:
    assert number != perf_event.TYPE_BREAKPOINT, "that would change somebody else's breakpoint"
    try:
        fcntl.ioctl(event, _IOC_MODIFY_ATTRIBUTES, _ATTRIBUTES.pack(number, _ATTRIBUTES.size))
    except OSError as refusal:
        if refusal.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return refusal.errno or 0
    raise OSError(errno.EPROTO, "an event let itself be modified that is no breakpoint")


def _is_readable(fd: int) -> bool:
    """With poll(), because select() knows no descriptor above 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
