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

import msgspec
import structlog
import zmq

from hwbpd.attribution import Attribution
from hwbpd.clock import MonotonicClock
from hwbpd.core.errors import BadClaim, NotSupported
from hwbpd.hookspecs import Backend, CpuFacts, Machine
from hwbpd.journal import Begin, Journal
from hwbpd.metered import MeteredServer
from hwbpd.networks import listening
from hwbpd.outbox import Outbox
from hwbpd.plugins import Plugins
from hwbpd.rights import Rights
from hwbpd.server import Server
from hwbpd.sessions import Sessions
from hwbpd.settings import Settings, socket_path
from hwbpd.simulated_rights import SimulatedPermission
from hwbpd.status_page import CannotMakePage, StatusPage, map_page, page_path
from hwbpd.warden import Permission, Warden

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
        to give; :raises CannotListen: when the socket cannot be made; :raises CannotJournal: when the journal cannot.
    """
    plugins = Plugins() if plugins is None else plugins
    path = socket_path(settings.socket)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_daemon_on(path))
        _raise_descriptor_limit(settings.limits.sessions)
        machine = plugins.machine(settings.machine, _machine_options(settings, plugins))
        stack.callback(machine.close)
        backend = plugins.backend(machine.facts)
        backend_on = _backend_on(machine, plugins)
        permission = stack.enter_context(_permission(plugins.is_real(settings.machine)))
        topology = machine.topology()
        clock = MonotonicClock()
        try:
            network = stack.enter_context(listening(path, settings, clock))
        except (zmq.ZMQError, OSError) as why:
            raise CannotListen(f"cannot listen on {path}: {why}") from None
        epoch = secrets.randbits(63)
        page = _page(path, epoch)
        stack.callback(page.stop)
        stop_fd = stack.enter_context(_stop_signals())
        begin = Begin(
            dict(backend.slots()),
            tuple(topology.possible),
            tuple(topology.online),
            settings.policy.for_core(),
            rearm_after_ns=int(settings.guard.rearm_after_s * 1e9),
            slots_on={cpu: dict(of_cpu.slots()) for cpu, of_cpu in backend_on.items()},
        )
        arbiter = begin.arbiter()
        journal = None
        if settings.journal:
            journal = stack.enter_context(Journal(Path(settings.journal), begin, arbiter, settings.journal_max_bytes))
        make_server = MeteredServer if settings.metrics.listen else Server
        server = make_server(
            network=network,
            arbiter=arbiter,
            machine=machine,
            backend=backend,
            backend_on=backend_on,
            sessions=Sessions(),
            rights=Rights(permission, machine),
            attribution=Attribution(machine, clock),
            outbox=Outbox(
                network,
                messages_max=settings.limits.messages_queued_per_session,
                hits_bytes_max=settings.limits.hits_bytes_queued_per_session,
                hits_bytes_per_message=settings.rings.bytes_per_message,
            ),
            page=page,
            settings=settings,
            clock=clock,
            epoch=epoch,
            journal=journal,
            profiles=lambda name: _profile(name, plugins),
        )
        if isinstance(server, MeteredServer):
            stack.enter_context(_metrics_of(server, settings))
        log.info("ready", socket=str(path), machine=machine.name, backend=backend.name, cpus=len(topology.online))
        _tell_service_manager("READY=1")
        server.run(stop_fd)
        log.info("stopped", socket=str(path))


def _backend_on(machine: Machine, plugins: Plugins) -> dict[int, Backend]:
    """The backends of those CPUs that have other slots than all have in common; one for all that are alike."""
    common = plugins.backend(machine.facts).slots()
    of_facts: dict[CpuFacts, Backend] = {}
    for cpu in machine.topology().possible:
        facts = machine.cpu_facts(cpu)
        if facts not in of_facts:
            of_facts[facts] = plugins.backend(facts)
    cpus = ((cpu, of_facts[machine.cpu_facts(cpu)]) for cpu in machine.topology().possible)
    return {cpu: backend for cpu, backend in cpus if backend.slots() != common}


def _machine_options(settings: Settings, plugins: Plugins) -> dict[str, object]:
    """What a machine is made from. A real one is what it is; a simulated one gets its CPUs from the backends."""
    return {**msgspec.structs.asdict(settings.sim), "backend": plugins.backend, "profiles": plugins.profiles}


def _profile(name: str, plugins: Plugins) -> Backend:
    if name not in plugins.profiles:
        raise BadClaim(f"there is no cpu {name!r}; there are {', '.join(sorted(plugins.profiles))}")
    return plugins.backend(plugins.profiles[name])


def _page(socket: Path, epoch: int) -> StatusPage:
    try:
        return StatusPage(map_page(page_path(socket)), epoch)
    except CannotMakePage as why:
        raise CannotListen(str(why)) from None


@contextlib.contextmanager
def _permission(is_real: bool) -> Iterator[Permission]:
    """Who decides what a peer may claim: the running kernel, which knows nothing of simulated threads."""
    if not is_real:
        log.warning("this machine is simulated: its hits say nothing about this host")
        yield SimulatedPermission()
        return
    with contextlib.closing(Warden()) as warden:
        yield warden


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


@contextlib.contextmanager
def _metrics_of(server: MeteredServer, settings: Settings) -> Iterator[None]:
    """What the server counts, to be had where the settings say."""
    where = settings.metrics.listen
    try:
        from hwbpd.metrics_endpoint import Endpoint  # here, because it needs what not everybody has installed

        endpoint = Endpoint(where, int(settings.socket_mode, 8), server.window)
    except ImportError as why:
        missing = f"metrics.listen takes prometheus-client ({why}): pip install 'hwbpd[metrics]'"
        raise CannotListen(missing) from None
    except OSError as why:
        raise CannotListen(f"cannot listen on {where} (metrics.listen): {why}") from None
    try:
        log.info("metrics", listen=endpoint.address)
        yield
    finally:
        endpoint.close()


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
