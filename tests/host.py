"""
May this test use real breakpoints, and is it alone with them?

A CPU has a handful of slots and the kernel hands them to whoever asks, so tests on real registers exclude each other
through one lock per host, and look whether somebody else has slots before they start. Whoever holds the lock may expect
every slot of every CPU to be free.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK_PATH = Path(tempfile.gettempdir()) / "hwbpd-hardware.lock"

_POLL_S = 0.05  # neither a lock with a time limit nor a slot that becomes free can be waited for
_SETTLE_S = 2.0  # for slots of threads that are exiting just now
_X86_SLOTS = 4
_READ_WRITE, _EXECUTE = 3, 4


class HostBusy(Exception):
    """Somebody else uses breakpoints on this host; the sentence says who, as far as can be seen."""


def breakpoints_missing() -> str | None:
    """Return what this host lacks for real breakpoints and how to get it, or ``None`` when they work."""
    if not sys.platform.startswith("linux"):
        return "hardware breakpoints are taken through Linux's perf_event_open: run this on Linux"
    from hwbpd_linux.readiness import what_is_missing

    return what_is_missing()


@contextmanager
def exclusive(timeout_s: float = 120) -> Iterator[None]:
    """
    Hold the host's breakpoints: no other test that asks does, and every slot of every CPU is free at the start.

    Not to be nested: the inner one would wait for the outer.

    :raises HostBusy: when another test keeps the lock for ``timeout_s``, or somebody outside the tests has slots.
    """
    deadline = time.monotonic() + timeout_s
    with _open_lock() as lock:
        while not _try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                raise HostBusy(f"another test has held {LOCK_PATH} for {timeout_s:.0f} s")
            time.sleep(_POLL_S)
        settled = time.monotonic() + _SETTLE_S
        while taken := slots_taken():
            if time.monotonic() > settled:
                raise HostBusy(f"{'; '.join(taken)}; {'; '.join(_suspects()) or 'nobody to be seen who has them'}")
            time.sleep(_POLL_S)
        yield


def slots_taken() -> list[str]:
    """Return a sentence for each CPU and pool on which fewer slots are free than there are."""
    free = free_slots()
    if os.uname().machine == "x86_64":
        most = {"any": _X86_SLOTS}
    else:
        # How many registers an Arm CPU has is told through ptrace only; the freest CPU is the measure, one the least.
        most = {pool: max(1, *(count for (_, other), count in free.items() if other == pool)) for _, pool in free}
    return [
        f"{count} of {most[pool]} slots free on cpu {cpu}" + ("" if pool == "any" else f" ({pool})")
        for (cpu, pool), count in free.items()
        if count < most[pool]
    ]


def free_slots() -> dict[tuple[int, str], int]:
    """
    Return how many CPU-wide breakpoints each CPU still takes, by (CPU, pool).

    The kernel counts the most demanding task of the whole host against every CPU it may run on, so slots of a single
    thread show on every CPU.
    """
    from hwbpd_linux.cpus import online_cpus

    x86 = os.uname().machine == "x86_64"
    pools = {"any": _READ_WRITE} if x86 else {"inst": _EXECUTE, "data": _READ_WRITE}
    return {(cpu, pool): _probe(cpu, bp_type) for cpu in online_cpus() for pool, bp_type in pools.items()}


def _probe(cpu: int, bp_type: int) -> int:
    from hwbpd_linux import perf_event

    address, _word = perf_event.own_word()
    held: list[int] = []
    try:
        while True:
            held.append(perf_event.open_breakpoint(address, 4, bp_type, tid=-1, cpu=cpu))
    except OSError as refusal:
        if refusal.errno != errno.ENOSPC:
            raise
        return len(held)
    finally:
        for fd in held:
            os.close(fd)


def _suspects() -> list[str]:
    """Return whom /proc shows with perf descriptors or as a tracer. Slots in the kernel itself cannot be seen."""
    suspects = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            comm = (process / "comm").read_text().strip()
            events = sum(_is_event(fd) for fd in (process / "fd").iterdir())
            tracers = {_tracer(task) for task in (process / "task").iterdir()} - {0}
        except OSError:
            continue  # it has exited meanwhile
        if events:
            suspects.append(f"{comm}[{process.name}] has {events} perf descriptors")
        suspects.extend(f"{comm}[{process.name}] is traced by {tracer}" for tracer in sorted(tracers))
    return suspects


def _is_event(fd: Path) -> bool:
    try:
        return "perf_event" in os.readlink(fd)
    except FileNotFoundError:
        return False  # closed meanwhile, as the one that lists the directory of this very process


def _tracer(task: Path) -> int:
    lines = (task / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("TracerPid:"))


def _open_lock() -> IO[bytes]:
    try:
        # Without O_CREAT first: in a sticky directory the kernel may refuse it for a file of another user.
        return LOCK_PATH.open("rb+")
    except FileNotFoundError:
        # In two steps, as the mask for new files would take the right to lock away from other users.
        fd = os.open(LOCK_PATH, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.fchmod(fd, 0o666)
        return os.fdopen(fd, "rb+")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
