"""
Puts the parts together; lock file, signals, readiness, orderly stop.

A second bind() to an ipc path succeeds and steals it, so the daemon holds a lock on ``PATH.lock`` for as long as it
lives, and binds only with the lock in hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import structlog

from hwbpd.clock import MonotonicClock
from hwbpd.core.arbiter import Arbiter
from hwbpd.network import RouterNetwork
from hwbpd.outbox import Outbox
from hwbpd.plugins import Plugins
from hwbpd.server import Server
from hwbpd.sessions import Sessions
from hwbpd.settings import Settings, socket_path

log = structlog.get_logger("hwbpd")

SOCKET_MODE = 0o600  # root only, as long as only root is served


class AlreadyRunning(Exception):
    """Another daemon serves that socket; the message says which."""


def run(settings: Settings, plugins: Plugins | None = None) -> None:
    """
    Serve until SIGTERM or SIGINT.

    :raises AlreadyRunning: when the socket is another daemon's; :raises NotSupported: when this host has no breakpoints
        to give; :raises OSError: when the socket cannot be made.
    """
    plugins = Plugins() if plugins is None else plugins
    path = socket_path(settings.socket)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_daemon_on(path))
        machine = plugins.machine(settings.machine, {})
        stack.callback(machine.close)
        backend = plugins.backend(machine.facts)
        topology = machine.topology()
        network = RouterNetwork(path, settings.limits, SOCKET_MODE)
        stack.callback(network.close)
        stop_fd = stack.enter_context(_stop_signals())
        server = Server(
            network=network,
            arbiter=Arbiter(backend.slots(), topology.possible, topology.online),
            machine=machine,
            backend=backend,
            sessions=Sessions(),
            outbox=Outbox(
                network,
                messages_max=settings.limits.messages_queued_per_session,
                hits_bytes_max=settings.limits.hits_bytes_queued_per_session,
            ),
            settings=settings,
            clock=MonotonicClock(),
            epoch=secrets.randbits(63),
        )
        log.info("ready", socket=str(path), machine=machine.name, backend=backend.name, cpus=len(topology.online))
        server.run(stop_fd)
        log.info("stopped", socket=str(path))


@contextlib.contextmanager
def _only_daemon_on(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    lock_path = path.with_name(path.name + ".lock")
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise AlreadyRunning(f"pid {pid} serves {path} already; stop it, or give another --socket") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)  # the file stays: removing it would let two daemons lock two files of one name


@contextlib.contextmanager
def _stop_signals() -> Iterator[int]:
    """A descriptor that becomes readable at SIGTERM or SIGINT."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader.fileno()
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
