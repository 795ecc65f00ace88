"""
How many small questions a second the daemon answers when a client does not wait for each reply.

The client keeps ``WINDOW`` requests under way. It sends bytes that were encoded once and reads replies without decoding
them, so that what is compared is the daemon with an echo of as many bytes each way, and not one client with another.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.floor import EchoClient
from benchmarks.harness import Row, Subject, compare
from benchmarks.stand import BareSession, Stand, read, real_stand

WINDOW = 64
REQUESTS_PER_ROUND = 2_000


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """
    Return a titled table for each question.

    :raises Missing: where real breakpoints do not work; ``HostBusy`` while others use them.
    """
    with real_stand() as stand:
        frames = BareSession(stand.frames())
        watched = ctypes.c_uint64()
        event = {"address": ctypes.addressof(watched), "length": 8, "access": "w", "kernel": False}
        tid = threading.get_native_id()
        claim = frames.ask("claim", **event, tid=tid, delivery="count")["claim"]
        questions: list[tuple[str, dict[str, Any]]] = [
            ("enabled", {"tid": tid, "cpu": 0}),
            ("counts", {"claim": claim}),
            ("slots", {"most": 1}),
        ]
        return [
            (
                f"{op}: questions a second, {WINDOW} under way",
                compare(list(subjects(stand, frames, op, fields)), rounds, per_second=True),
            )
            for op, fields in questions
        ]


def subjects(stand: Stand, frames: BareSession, op: str, fields: dict[str, Any]) -> Iterator[Subject]:
    request = frames.encode(op, **fields)
    reply = frames.exchange(request)
    blocking, polling = stand.floor("blocking", len(reply)), stand.floor("epoll", len(reply))
    lowest = f"blocking echo, {len(request)} and {len(reply)} bytes"
    yield Subject(lowest, streamed(blocking, request))
    yield Subject("epoll echo", streamed(polling, request), lowest)
    yield Subject(f"{op}, bare frames", streamed(frames, request, read), lowest)


def streamed(
    server: EchoClient | BareSession, request: bytes, check: Callable[[bytes], object] = len
) -> Callable[[], float]:
    """Return the measurement of one round: nanoseconds per request; ``check`` looks at the last reply."""

    def measure_ns() -> float:
        start = time.perf_counter_ns()
        last = server.stream(request, REQUESTS_PER_ROUND, WINDOW)
        elapsed = time.perf_counter_ns() - start
        check(last)
        return elapsed / REQUESTS_PER_ROUND

    return measure_ns
