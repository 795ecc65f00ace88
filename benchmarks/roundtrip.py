"""
What a client waits for: ``slots``, and claim with release, against a daemon in a process of its own.

Each is measured through the client library and as bare frames. The difference between the two is the library; the
difference between bare frames and the epoll echo is the daemon; the floor, in the same rounds, is a blocking echo of
equally many bytes, which for a claim also makes the system calls that arming it takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import zmq

import hwbp
from benchmarks.bare_breakpoint import BareBreakpoint
from benchmarks.floor import ARM, DISARM, EchoClient, echo
from benchmarks.harness import Row, Subject, compare, median_ns
from tests.host import breakpoints_missing, exclusive

OPERATIONS_PER_ROUND = 200
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class Missing(Exception):
    """This host cannot run these; the sentence says what it lacks."""


class BareSession:
    """The protocol without the library: the client's work is one msgpack map each way."""

    def __init__(self, client: EchoClient) -> None:
        self._client = client
        self._ids = itertools.count(1)
        self._epoch = 0
        welcome = self.ask("hello", version=1)
        self._epoch = welcome["epoch"]

    def encode(self, op: str, **fields: Any) -> bytes:
        session = {} if op == "hello" else {"epoch": self._epoch}
        return bytes(msgpack.packb({"op": op, "id": next(self._ids)} | session | fields))

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        reply: dict[str, Any] = msgpack.unpackb(self._client.exchange(self.encode(op, **fields)))
        if reply["op"] == "error":
            raise RuntimeError(reply["sentence"])
        return reply


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[Path]:
    """Run a daemon of its own on the real machine, all settings at their defaults; yields its socket."""
    path = folder / "hwbpd.sock"
    settings = folder / "hwbpd.toml"
    settings.touch()  # an empty one, so that the host's own is not read
    with (folder / "hwbpd.log").open("w+") as log:
        command = [sys.executable, "-m", "hwbpd", "--config", str(settings), "--socket", str(path)]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                _await_welcome(path, process, log.name)
                yield path
            finally:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # The measurements stand, but nobody shall think that all is well.
        print(f"roundtrip: the daemon had to be killed, {STOP_TIMEOUT_S:g} s after SIGTERM", file=sys.stderr)
        process.kill()


def _await_welcome(path: Path, process: subprocess.Popen[bytes], log: str) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up:
        try:
            hwbp.connect(path).close()
            return
        except hwbp.NotReachable:
            time.sleep(0.02)
    raise RuntimeError(f"the daemon did not start:\n{Path(log).read_text()}")


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """
    Return a titled table for each kind of round trip.

    :raises Missing: where real breakpoints do not work.
    :raises HostBusy: while others use them.
    """
    if missing := breakpoints_missing():
        raise Missing(missing)
    with exclusive(), tempfile.TemporaryDirectory() as name, zmq.Context() as context, contextlib.ExitStack() as stack:
        folder = Path(name)
        path = stack.enter_context(daemon(folder))
        client = stack.enter_context(hwbp.connect(path))
        frames = EchoClient(context, path)
        stack.callback(frames.close)
        bare = BareSession(frames)

        def floor(shape: str, reply_bytes: int, breakpoint_of: tuple[int, int, int] | None = None) -> EchoClient:
            socket = folder / f"{shape}-{reply_bytes}{'-arms' if breakpoint_of else ''}.sock"
            return stack.enter_context(echo(context, socket, shape, reply_bytes, breakpoint_of))

        return [
            ("slots: one round trip", compare(slots_subjects(client, frames, bare, floor), rounds)),
            ("claim and release: two round trips", compare(claim_subjects(client, bare, floor), rounds)),
        ]


Floor = Callable[..., EchoClient]


def timed(operation: Callable[[], object]) -> Callable[[], float]:
    return lambda: median_ns(operation, OPERATIONS_PER_ROUND)


def slots_subjects(client: hwbp.Client, frames: EchoClient, bare: BareSession, floor: Floor) -> list[Subject]:
    request = bare.encode("slots")
    reply_bytes = len(frames.exchange(request))
    blocking = floor("blocking", reply_bytes)
    polling = floor("epoll", reply_bytes)
    lowest = f"blocking echo, {len(request)} and {reply_bytes} bytes"
    return [
        Subject(lowest, timed(lambda: blocking.exchange(request))),
        Subject("epoll echo", timed(lambda: polling.exchange(request)), lowest),
        Subject("slots, bare frames", timed(lambda: bare.ask("slots")), lowest),
        Subject("slots, hwbp", timed(client.slots), lowest),
    ]


def claim_subjects(client: hwbp.Client, bare: BareSession, floor: Floor) -> list[Subject]:
    """A watchpoint on 8 bytes of this very thread, which nobody touches meanwhile."""
    watched = ctypes.c_uint64()
    address, tid = ctypes.addressof(watched), threading.get_native_id()
    what: dict[str, Any] = {"address": address, "length": 8, "access": "w", "tid": tid, "kernel": False}
    granted = bare.ask("claim", **what)
    bare.ask("release", claim=granted["claim"])
    ring_bytes = granted["ring_bytes"]
    request, reply_bytes = bare.encode("claim", **what), len(msgpack.packb(granted))
    arm, disarm = ARM.ljust(len(request), b"."), DISARM.ljust(len(bare.encode("release", claim=1)), b".")
    blocking = floor("blocking", reply_bytes, (tid, address, ring_bytes))
    polling = floor("epoll", reply_bytes, (tid, address, ring_bytes))
    here = BareBreakpoint(tid, address, ring_bytes)

    def by_echo(server: EchoClient) -> None:
        server.exchange(arm)
        server.exchange(disarm)

    def by_system_calls() -> None:
        here.arm()
        here.disarm()

    def by_frames() -> None:
        bare.ask("release", claim=bare.ask("claim", **what)["claim"])

    def by_library(**fields: Any) -> None:
        # The name binding keeps the buffer alive for as long as anybody may watch it.
        assert ctypes.addressof(watched) == address
        with client.claim(**what, **fields):
            pass

    calls = f"system calls alone, ring of {ring_bytes // 1024} KiB"
    lowest = "blocking echo with these system calls"
    return [
        Subject(calls, timed(by_system_calls)),
        Subject(lowest, timed(lambda: by_echo(blocking))),
        Subject("epoll echo with these system calls", timed(lambda: by_echo(polling)), lowest),
        Subject("claim and release, bare frames", timed(by_frames), lowest),
        Subject("claim and release, hwbp", timed(by_library), lowest),
        Subject("claim and release, hwbp, counted only", timed(lambda: by_library(delivery="count")), lowest),
    ]
