"""
Threads and processes by number, and what tells one from a later one with the same number: the tick at which it started.

A thread counts as gone from the moment it has begun to exit. Its events end a little later, so whoever sees them end
and the thread alive knows that it was an exec that took them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

from hwbpd.core.errors import TargetGone
from hwbpd.core.model import Process, Task

_STATE, _FLAGS, _START = 3, 9, 22  # fields of /proc/TID/stat, counted from one as proc(5) does
_STAT_BYTES: Final = 4096  # 52 numbers and a short name
_DEAD: Final = "ZXx"
_ASLEEP: Final = "STtI"  # not D: a thread that makes another one may wait so
_PF_EXITING: Final = 0x4  # include/linux/sched.h


class Stat(NamedTuple):
    """What /proc/TID/stat says that matters here."""

    state: str
    flags: int
    start_ticks: int

    @property
    def is_gone(self) -> bool:
        return self.state in _DEAD or bool(self.flags & _PF_EXITING)

    @property
    def is_asleep(self) -> bool:
        """Whether it waits, or is stopped, where it can be interrupted: so not in the midst of making a thread."""
        return self.state in _ASLEEP


def find(tid: int) -> Task:
    """Return the live thread with that number; raises ``TargetGone`` when there is none, or it is exiting."""
    stat = read(tid)
    if stat is None:
        raise TargetGone(f"there is no thread {tid}")
    if stat.is_gone:
        raise TargetGone(f"thread {tid} has exited")
    return Task(tid, stat.start_ticks, Process(tid, stat.start_ticks) if _is_first(tid) else _process_of(tid))


def find_process(pid: int) -> Process:
    """Return the process with that number, one thread of which is alive at least; raises ``TargetGone``."""
    stat = read(pid)
    if stat is None:
        raise TargetGone(f"there is no process {pid}")
    if not _is_first(pid):
        of = _process_of(pid).pid
        if of != pid:
            raise TargetGone(f"there is no process {pid}: that is a thread of process {of}")
    process = Process(pid, stat.start_ticks)
    if stat.is_gone and not any(is_alive(tid) for tid in tids(process)):
        raise TargetGone(f"process {pid} has exited")
    return process


def tids(process: Process) -> tuple[int, ...]:
    """The threads of a process, ascending, those that exit just now included; none when it is gone."""
    try:
        found = tuple(sorted(int(name) for name in os.listdir(f"/proc/{process.pid}/task")))
    except (FileNotFoundError, ProcessLookupError):
        return ()
    stat = read(process.pid)
    return found if stat is not None and stat.start_ticks == process.start_ticks else ()


def is_alive(tid: int, start_ticks: int | None = None) -> bool:
    """Whether a thread has that number and is not exiting; if told when it started, whether it is that one."""
    stat = read(tid)
    return stat is not None and not stat.is_gone and start_ticks in (None, stat.start_ticks)


def may_have_slots(tid: int, start_ticks: int) -> bool:
    """Whether that thread is there and has not exited so far that its debug registers are nobody's any more."""
    stat = read(tid)
    return stat is not None and stat.start_ticks == start_ticks and stat.state not in _DEAD


def read(tid: int) -> Stat | None:
    """Look at a thread; None when there is none."""
    try:
        fd = os.open(f"/proc/{tid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        return parse(os.read(fd, _STAT_BYTES).decode(errors="replace"))
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)


def parse(stat: str) -> Stat:
    """
    Read a line of /proc/TID/stat.

    The name, field 2, is in parentheses and may hold any of them itself: the last one closes it.
    """
    fields = stat[stat.rindex(")") + 1 :].split()
    return Stat(fields[_STATE - 3], int(fields[_FLAGS - 3]), int(fields[_START - 3]))


def _is_first(tid: int) -> bool:
    """Whether it is the first thread of its process, for which a third of the time of a look at "status" is enough."""
    try:
        os.close(os.pidfd_open(tid))
    except OSError:
        return False  # or it cannot be told so; "status" says it for all
    return True


def _process_of(tid: int) -> Process:
    try:
        lines = Path(f"/proc/{tid}/status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGone(f"thread {tid} has exited") from None
    pid = next(int(line.split()[1]) for line in lines if line.startswith("Tgid:"))
    first = read(pid)
    if first is None:
        raise TargetGone(f"thread {tid} has exited")
    return Process(pid, first.start_ticks)
