"""
Puts the parts together; lock file, signals, readiness, orderly stop.

A second bind() to an ipc path succeeds and steals it, so the daemon holds a lock on ``PATH.lock`` for as long as it
lives, and binds only with the lock in hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import structlog
import zmq

from hwbpd.attribution import Attribution
from hwbpd.clock import MonotonicClock
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.errors import NotSupported
from hwbpd.network import RouterNetwork
from hwbpd.outbox import Outbox
from hwbpd.plugins import Plugins
from hwbpd.rights import Rights
from hwbpd.server import Server
from hwbpd.sessions import Sessions
from hwbpd.settings import Settings, socket_path
from hwbpd.warden import Warden

log = structlog.get_logger("hwbpd")


DESCRIPTORS_SPARE = 3000  # for claims, and for connections that are about to be hung up on


class CannotListen(Exception):
    """The socket, or the lock beside it, cannot be made; the message says why."""


class AlreadyRunning(Exception):
    """Another daemon serves that socket; the message says which."""


def run(settings: Settings, plugins: Plugins | None = None) -> None:
    """
    Serve until SIGTERM or SIGINT.

    :raises AlreadyRunning: when the socket is another daemon's; :raises NotSupported: when this host has no breakpoints
        to give; :raises CannotListen: when the socket cannot be made.
    """
    plugins = Plugins() if plugins is None else plugins
    path = socket_path(settings.socket)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_daemon_on(path))
        _raise_descriptor_limit(settings.limits.sessions)
        machine = plugins.machine(settings.machine, {})
        stack.callback(machine.close)
        backend = plugins.backend(machine.facts)
        warden = Warden()
        stack.callback(warden.close)
        topology = machine.topology()
        clock = MonotonicClock()
        try:
            network = RouterNetwork(path, settings.limits, int(settings.socket_mode, 8), clock)
        except zmq.ZMQError as why:
            raise CannotListen(f"cannot listen on {path}: {why}") from None
        stack.callback(network.close)
        stop_fd = stack.enter_context(_stop_signals())
        server = Server(
            network=network,
            arbiter=Arbiter(
                backend.slots(),
                topology.possible,
                topology.online,
                rearm_after_ns=int(settings.guard.rearm_after_s * 1e9),
            ),
            machine=machine,
            backend=backend,
            sessions=Sessions(),
            rights=Rights(warden, machine),
            attribution=Attribution(machine, clock),
            outbox=Outbox(
                network,
                messages_max=settings.limits.messages_queued_per_session,
                hits_bytes_max=settings.limits.hits_bytes_queued_per_session,
            ),
            settings=settings,
            clock=clock,
            epoch=secrets.randbits(63),
        )
        log.info("ready", socket=str(path), machine=machine.name, backend=backend.name, cpus=len(topology.online))
        _tell_service_manager("READY=1")
        server.run(stop_fd)
        log.info("stopped", socket=str(path))


@contextlib.contextmanager
def _only_daemon_on(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock_path = path.with_name(path.name + ".lock")
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as why:
        raise CannotListen(f"cannot listen on {path}: {why}") from None
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


def _raise_descriptor_limit(sessions: int) -> None:
    """
    Take as many descriptors as the host gives, and refuse to live with too few.

    libzmq ends the process when accept() finds none left, and a crowd may come between two looks at it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < sessions + DESCRIPTORS_SPARE:
        needed = f"{sessions} (limits.sessions) and {DESCRIPTORS_SPARE} more"
        raise NotSupported(f"{hard} descriptors are too few for {needed}: raise LimitNOFILE=, or `ulimit -Hn`")


def _tell_service_manager(state: str) -> None:
    """sd_notify(3), where a service manager asked for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.send(state.encode())


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
