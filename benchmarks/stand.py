"""
What is measured and what it is measured against, side by side: a daemon of one's own, sessions with it, floors.

A session is either the client library's or bare frames, the protocol without the library. The difference between the
two is what the library costs.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import zmq

import hwbp
from benchmarks.floor import EchoClient, echo
from benchmarks.packet_floor import PacketClient, packet_echo
from benchmarks.placement import ANY_CPUS, CLIENT_CPUS, SERVER_CPUS, on
from tests.host import breakpoints_missing, exclusive

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class Missing(Exception):
    """This host cannot run these; the sentence says what it lacks."""


class Daemon(NamedTuple):
    """One that runs."""

    socket: Path
    pid: int


class BareSession:
    """The protocol without the library: the client's work is one msgpack map each way."""

    def __init__(self, client: EchoClient | PacketClient) -> None:
        self._client = client
        self._ids = itertools.count(1)
        self._epoch = 0
        welcome = self.ask("hello", version=1)
        self._epoch = welcome["epoch"]

    def encode(self, op: str, **fields: Any) -> bytes:
        session = {} if op == "hello" else {"epoch": self._epoch}
        return bytes(msgpack.packb({"op": op, "id": next(self._ids)} | session | fields))

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return its reply, when no notices are under way; raises ``RuntimeError`` if refused."""
        return read(self.exchange(self.encode(op, **fields)))

    def exchange(self, request: bytes) -> bytes:
        """Send an encoded request and return the reply as it came."""
        return self._client.exchange(request)

    def stream(self, request: bytes, count: int, window: int) -> bytes:
        """Send an encoded request so often, ``window`` of them under way at a time; return the last reply."""
        return self._client.stream(request, count, window)


def read(frame: bytes) -> dict[str, Any]:
    """Return a reply; raises ``RuntimeError`` for a refusal."""
    reply: dict[str, Any] = msgpack.unpackb(frame)
    if reply["op"] == "error":
        raise RuntimeError(reply["sentence"])
    return reply


class Stand:
    """A daemon, and whatever is connected to it or runs beside it; all of it ends with ``real_stand``."""

    def __init__(self, daemon: Daemon, folder: Path, stack: contextlib.ExitStack) -> None:
        self.daemon = daemon
        self._folder = folder
        self._stack = stack
        self._context = stack.enter_context(zmq.Context())
        self._floors = itertools.count(1)

    def library(self, transport: str = "zmq") -> hwbp.Client:
        """A session through the client library."""
        return self._stack.enter_context(hwbp.connect(self.daemon.socket, transport=transport))

    def frames(self) -> EchoClient:
        """A connection that has not said hello."""
        client = EchoClient(self._context, self.daemon.socket)
        self._stack.callback(client.close)
        return client

    @property
    def packet_path(self) -> Path:
        """Where the daemon listens for SEQPACKET, if this kernel is up to it."""
        return self.daemon.socket.with_name(self.daemon.socket.name + ".seq")

    def packets(self) -> PacketClient:
        """As ``frames``, by SEQPACKET."""
        return self._stack.enter_context(contextlib.closing(PacketClient(self.packet_path)))

    def packet_floor(self, reply_bytes: int) -> PacketClient:
        """A connection to a new server of ``benchmarks.packet_floor``."""
        return self._stack.enter_context(packet_echo(self._folder / f"floor-{next(self._floors)}.sock", reply_bytes))

    def floor(self, shape: str, reply_bytes: int, breakpoint_of: tuple[int, int, int] | None = None) -> EchoClient:
        """A connection to a new server of ``benchmarks.floor``."""
        path = self._folder / f"floor-{next(self._floors)}.sock"
        return self._stack.enter_context(echo(self._context, path, shape, reply_bytes, breakpoint_of))


@contextlib.contextmanager
def real_stand(program: Sequence[str] = ("hwbpd",), apart: bool = True) -> Iterator[Stand]:
    """
    Hold the host's breakpoints, and run a daemon on them.

    :param program: as of ``daemon``; :param apart: whether clients and servers have CPUs of their own, or run anywhere.
    :raises Missing: where real breakpoints do not work.
    :raises HostBusy: while others use them.
    """
    if missing := breakpoints_missing():
        raise Missing(missing)
    with exclusive(), contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hwbpd-bench-")))
        stack.enter_context(on(CLIENT_CPUS if apart else ANY_CPUS))
        cpus = SERVER_CPUS if apart else ANY_CPUS
        yield Stand(stack.enter_context(daemon(folder, program=program, cpus=cpus)), folder, stack)


@contextlib.contextmanager
def daemon(
    folder: Path,
    settings: str = "",
    options: Sequence[str] = (),
    program: Sequence[str] = ("hwbpd",),
    cpus: frozenset[int] = SERVER_CPUS,
) -> Iterator[Daemon]:
    """
    Run a daemon of its own, by default on the real machine with all settings at their defaults, but without a reserve.

    :param folder: an empty one, for its socket, settings and log.
    :param settings: what its settings file says, TOML.
    :param options: further ones of its command line.
    :param program: the module that is run as the daemon, and what it takes before the daemon's own options.
    :param cpus: on which it runs.
    """
    path = folder / "hwbpd.sock"
    file = folder / "hwbpd.toml"
    if "[policy]" not in settings:
        settings += "\n[policy]\nreserve_slots = 0\n"
    file.write_text(settings)  # always, so that the host's own is not read
    with (folder / "hwbpd.log").open("w+") as log:
        command = [sys.executable, "-m", *program, "--config", str(file), "--socket", str(path), *options]
        with on(cpus):
            process = subprocess.Popen(command, stdout=log, stderr=log)
        with process:
            try:
                _await_welcome(path, process, log.name)
                yield Daemon(path, process.pid)
            finally:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # The measurements stand, but nobody shall think that all is well.
        print(f"the daemon had to be killed, {STOP_TIMEOUT_S:g} s after SIGTERM", file=sys.stderr)
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
