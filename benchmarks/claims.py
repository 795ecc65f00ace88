"""
What it costs to claim a watchpoint and release it, two round trips, beside two echoes that make the system calls.

The kernel's part depends on whether hits are delivered: then the event has a ring. So each way to be served has its own
floor, one that opens and closes what the daemon has to open and close, at the same size of the ring. The watchpoint is
on a word of this very thread, which nobody touches meanwhile.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import msgpack

import hwbp
from benchmarks.bare_breakpoint import BareBreakpoint
from benchmarks.floor import ARM, DISARM
from benchmarks.harness import Row, Subject, compare, median_ns
from benchmarks.stand import BareSession, Stand, real_stand

OPERATIONS_PER_ROUND = 100


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """
    Return a titled table for each way to be served.

    :raises Missing: where real breakpoints do not work; ``HostBusy`` while others use them.
    """
    with real_stand() as stand:
        client, frames = stand.library(), BareSession(stand.frames())
        return [
            ("claim and release, hits delivered", compare(list(subjects(stand, client, frames, "hits")), rounds)),
            ("claim and release, hits counted", compare(list(subjects(stand, client, frames, "count")), rounds)),
            ("claim and release, held only", compare(list(subjects(stand, client, frames, "hold")), rounds)),
        ]


def subjects(stand: Stand, client: hwbp.Client, frames: BareSession, delivery: str) -> Iterator[Subject]:
    watched = ctypes.c_uint64()
    address, tid = ctypes.addressof(watched), threading.get_native_id()
    what: dict[str, Any] = {"address": address, "length": 8, "access": "w", "tid": tid, "kernel": False}
    what["delivery"] = delivery
    granted = frames.ask("claim", **what)
    released = frames.ask("release", claim=granted["claim"])
    ring_bytes = granted["ring_bytes"]
    arm = ARM.ljust(len(frames.encode("claim", **what)), b".")
    disarm = DISARM.ljust(len(frames.encode("release", claim=granted["claim"])), b".")
    # The floor answers both alike, so with the mean of the two.
    reply_bytes = (len(msgpack.packb(granted)) + len(msgpack.packb(released))) // 2
    breakpoint_of = (tid, address, ring_bytes)
    blocking, polling = (stand.floor(shape, reply_bytes, breakpoint_of) for shape in ("blocking", "epoll"))
    here = BareBreakpoint(*breakpoint_of)

    def by_system_calls() -> None:
        here.arm()
        here.disarm()

    def by_frames() -> None:
        frames.ask("release", claim=frames.ask("claim", **what)["claim"])

    def by_library() -> None:
        # The name binding keeps the buffer alive for as long as anybody may watch it.
        assert ctypes.addressof(watched) == address
        with client.claim(**what):
            pass

    calls = f"open, mmap of {ring_bytes // 1024} KiB, munmap, close" if ring_bytes else "open, close"
    lowest = "blocking echo with these system calls"
    yield timed(f"system calls alone: {calls}", by_system_calls)
    yield timed(lowest, lambda: (blocking.exchange(arm), blocking.exchange(disarm)))
    yield timed(
        "epoll echo with these system calls", lambda: (polling.exchange(arm), polling.exchange(disarm)), lowest
    )
    yield timed("claim and release, bare frames", by_frames, lowest)
    yield timed("claim and release, hwbp", by_library, lowest)


def timed(name: str, operation: Any, floor: str = "") -> Subject:
    return Subject(name, lambda: median_ns(operation, OPERATIONS_PER_ROUND), floor)
