"""
Reads /proc for the search for others: which processes there are, who they are, and who traces whom.

Everything may vanish while it is read; then it is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import NamedTuple


class Process(NamedTuple):
    """A process, as it can be shown to people."""

    pid: int
    comm: str
    uid: int  # the real one

    def __str__(self) -> str:
        return f"{self.comm}[{self.pid}]"


class Tracers(NamedTuple):
    """Who traces which thread, by thread; ``complete`` is false when there was no time to look at all threads."""

    of_thread: Mapping[int, Process]
    complete: bool

    def of(self, tid: int) -> Process | None:
        return self.of_thread.get(tid)


def process_ids() -> list[int]:
    """Every process there is, ascending."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def thread_ids(pid: int) -> list[int]:
    """The threads of a process, ascending; none when it is gone or may not be looked at."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return []


def child_ids(pid: int) -> list[int]:
    """The children of a process; none when it is gone or the kernel keeps no list (CONFIG_PROC_CHILDREN)."""
    children: list[int] = []
    for tid in thread_ids(pid):
        children += map(int, _read(f"/proc/{pid}/task/{tid}/children").split())
    return children


def describe(pid: int) -> Process | None:
    """Return who a process is, by the number of any of its threads; ``None`` when it is gone."""
    group = _field(_read(f"/proc/{pid}/status"), b"Tgid:")
    comm = _read(f"/proc/{group}/comm").removesuffix(b"\n").decode(errors="replace")
    uid = _field(_read(f"/proc/{group}/status"), b"Uid:")
    return None if group is None or uid is None else Process(group, comm, uid)


def find_tracers(until_s: float) -> Tracers:
    """Return who traces whom; looks no longer than ``time.monotonic()`` is before ``until_s``."""
    of_thread: dict[int, Process] = {}
    for pid in process_ids():
        for tid in thread_ids(pid):
            # TracerPid is the number of the thread that traces, which need not be the first of its process.
            tracer = _field(_read(f"/proc/{pid}/task/{tid}/status"), b"TracerPid:")
            if tracer and (process := describe(tracer)) is not None:
                of_thread[tid] = process
        if time.monotonic() > until_s:
            return Tracers(of_thread, complete=False)
    return Tracers(of_thread, complete=True)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""


def _field(status: bytes, name: bytes) -> int | None:
    """
    Return the first number of a line of /proc/PID/status.

    The first line holds the name of the process; what could end it early, the kernel escapes.
    """
    start = status.find(b"\n" + name)
    return None if start < 0 else int(status[start + 1 + len(name) :].split(maxsplit=1)[0])
