"""
One that reads hits, in a process of its own, in one of four ways.

``ring`` and ``paced`` are floors without a daemon: they have the event and its ring to themselves and take records out
as they are, one whenever the ring wakes it, the other every millisecond. ``frames`` is a client without the library: it
unpacks each message and counts its records. ``hwbp`` is a client that decodes every hit.

``python -m benchmarks.reader WAY SOCKET RING_BYTES`` reads two lines again and again: ``TID ADDRESS`` has it take a
slot and answer ``ready``; ``end`` has it read what is left, give the slot back, and answer with a ``Report`` as JSON.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import zmq

import hwbp
from benchmarks.bare_breakpoint import RECORD_BYTES, BareBreakpoint
from benchmarks.floor import EchoClient
from benchmarks.stand import BareSession

READY = "ready"
TIMES_MAX = 1_000
PACE_S = 0.001


class Report(NamedTuple):
    """
    What one reader met between taking its slot and giving it back.

    ``received``: hits that arrived here; ``last_ns``: when the last one did; ``times_ns``: when each of the first
    ``TIMES_MAX`` did (CLOCK_MONOTONIC). The rest is what the kernel and the daemon say of them.
    """

    received: int
    last_ns: int
    times_ns: list[int]
    hits: int
    delivered: int
    lost: int
    dropped: int


class Tally:
    """Notes what arrives, and when."""

    def __init__(self) -> None:
        self.received = 0
        self.last_ns = 0
        self.times_ns: list[int] = []

    def arrived(self, count: int) -> None:
        self.last_ns = time.monotonic_ns()
        if self.received < TIMES_MAX:
            self.times_ns.extend([self.last_ns] * min(count, TIMES_MAX - self.received))
        self.received += count

    def report(self, hits: int, delivered: int, lost: int, dropped: int) -> Report:
        return Report(self.received, self.last_ns, self.times_ns, hits, delivered, lost, dropped)


# A way takes a slot, calls its last argument, reads until standard input has a line, and gives the slot back.
Way = Callable[[int, int, Callable[[], None]], Report]


def ring_reader(ring_bytes: int, pace_s: float | None = None) -> Way:
    """:param pace_s: how often to look; None to be woken."""

    def read(tid: int, address: int, ready: Callable[[], None]) -> Report:
        tally = Tally()
        event = BareBreakpoint(tid, address, ring_bytes)
        event.arm()
        ring = event.reader()
        with select.epoll() as epoll:
            epoll.register(sys.stdin, select.EPOLLIN)
            if pace_s is None:
                epoll.register(event, select.EPOLLIN)
            ready()
            over = False
            while not over:
                over = any(fd == sys.stdin.fileno() for fd, _ in epoll.poll(pace_s))
                if records := ring.take():
                    tally.arrived(len(records) // RECORD_BYTES)
        hits, lost = event.counts()
        event.disarm()
        # A loss leaves a record of its own in the ring, so after one the kernel's account is the exact one.
        tally.received = hits - lost
        return tally.report(hits, hits - lost, lost, 0)

    return read


def frames_reader(context: zmq.Context[zmq.Socket[bytes]], path: Path, ring_bytes: int) -> Way:
    connection = EchoClient(context, path)
    session = BareSession(connection)
    poller = zmq.Poller()
    poller.register(connection.socket, zmq.POLLIN)
    poller.register(sys.stdin, zmq.POLLIN)

    def read(tid: int, address: int, ready: Callable[[], None]) -> Report:
        tally = Tally()
        event = {"address": address, "length": 8, "access": "w", "kernel": False}
        claim = session.ask("claim", **event, tid=tid, ring_bytes=ring_bytes, guard=0)["claim"]
        ready()
        reply: dict[str, Any] | None = None
        asked = False
        while reply is None:
            readable = dict(poller.poll())
            if sys.stdin.fileno() in readable and not asked:
                connection.socket.send(session.encode("release", claim=claim))
                asked = True
            if connection.socket not in readable:
                continue
            message = msgpack.unpackb(connection.socket.recv())
            if message["op"] == "hits":
                tally.arrived(message["count"])
            else:
                reply = message
        return tally.report(*(reply[name] for name in ("hits", "delivered", "lost", "dropped")))

    return read


def library_reader(client: hwbp.Client, ring_bytes: int) -> Way:
    def read(tid: int, address: int, ready: Callable[[], None]) -> Report:
        tally = Tally()
        event = {"address": address, "length": 8, "access": "w", "kernel": False}
        watch = client.claim(**event, tid=tid, ring_bytes=ring_bytes, guard=0)  # type: ignore[arg-type]
        ready()

        def take_in() -> None:
            while watch.unread:
                tally.arrived(sum(1 for _ in watch.read_message()))

        while client.wait(until=sys.stdin.fileno()):
            take_in()
        counts = watch.release()
        take_in()
        return tally.report(counts.hits, counts.delivered, counts.lost, counts.dropped)

    return read


def main(arguments: list[str]) -> None:
    """Read, again and again, until the end of the input."""
    name, path, ring_bytes = arguments[0], Path(arguments[1]), int(arguments[2])
    with zmq.Context() as context:
        ways: dict[str, Callable[[], Way]] = {
            "ring": lambda: ring_reader(ring_bytes),
            "paced": lambda: ring_reader(ring_bytes, PACE_S),
            "frames": lambda: frames_reader(context, path, ring_bytes),
            "hwbp": lambda: library_reader(hwbp.connect(path, transport="zmq"), ring_bytes),
        }
        read = ways[name]()
        while line := sys.stdin.readline():
            tid, address = (int(word) for word in line.split())
            report = read(tid, address, lambda: print(READY, flush=True))
            sys.stdin.readline()
            print(json.dumps(report), flush=True)


class Reader:
    """One of them, as a subprocess."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self, tid: int, address: int) -> None:
        """Have it take a slot; return when it has."""
        self._tell(f"{tid} {address}")
        if (answer := self._hear()) != READY:
            raise RuntimeError(f"a reader did not become ready: {answer!r}")

    def finish(self) -> None:
        """Ask it for its report."""
        self._tell("end")

    def report(self) -> Report:
        """Return what it met; raises ``RuntimeError`` when it has failed."""
        answer = self._hear()
        if not answer:
            raise RuntimeError("a reader has failed; what it said is above")
        return Report(*json.loads(answer))

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def reader(way: str, socket: Path, ring_bytes: int) -> Iterator[Reader]:
    """Run a reader; nothing of it is left behind."""
    command = [sys.executable, "-m", "benchmarks.reader", way, str(socket), str(ring_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            yield Reader(process)
        finally:
            process.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
