"""
Who is at the other end is what the kernel says of the connected socket, and nothing else.

Plain sockets stand for those that the transport accepted; what libzmq adds is in ``test_network.py``.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from hwbpd import peers
from hwbpd.core.errors import NotPermitted
from hwbpd.peers import Connection

NOBODY = 65534
WAIT_S = 30

# Connects, says who it is, and stays until its input ends.
CLIENT = """
import ctypes, os, socket, sys
path, namespace = sys.argv[1], int(sys.argv[2])
if namespace and ctypes.CDLL(None, use_errno=True).unshare(namespace):
    sys.exit(os.strerror(ctypes.get_errno()))
if namespace and os.fork():  # a process enters a new pid namespace with its first child
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
print("connected", flush=True)
sys.stdin.read()
"""
NEW_USER, NEW_PID = 0x10000000, 0x20000000  # CLONE_NEWUSER, CLONE_NEWPID


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(tmp_path / "door"))
        listening.listen()
        listening.settimeout(WAIT_S)
        yield listening


def address_of(uid: int, gid: int, pid: int) -> str:
    """What libzmq says of such a peer."""
    return f"localhost:{uid}:{gid}:{pid}"


def our_address() -> str:
    return address_of(os.geteuid(), os.getegid(), os.getpid())


def descriptors_open() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def connected(listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection from this process, ours first."""
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(WAIT_S)
        client.connect(listener.getsockname())
        ours, _ = listener.accept()
        with closing(ours):
            yield ours, client


@contextmanager
def another_process(
    listener: socket.socket, namespace: int = 0
) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A process that has connected, and our end."""
    command = [sys.executable, "-S", "-c", CLIENT, listener.getsockname(), str(namespace)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as client:
        assert client.stdout is not None
        assert client.stderr is not None
        try:
            if not client.stdout.readline():
                pytest.skip(f"no new namespace for a test: {client.stderr.read().strip()}; run as root")
            ours, _ = listener.accept()
            with closing(ours):
                yield client, ours
        finally:
            client.kill()


def test_a_peer_is_the_process_that_connected(listener: socket.socket) -> None:
    # given a connection from this process
    with connected(listener) as (ours, _):
        # when the kernel is asked
        peer = peers.identify(Connection(ours.fileno(), our_address()))

    # then it is us, by number, rights and name, and pinned
    try:
        assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())
        assert peer.comm == Path("/proc/self/comm").read_text().strip()
        assert not peers.is_gone(peer.pidfd)
        assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{peer.pidfd}").read_text()
    finally:
        peers.close(peer)


def test_another_process_is_told_apart_and_its_end_is_seen(listener: socket.socket) -> None:
    with another_process(listener) as (client, ours):
        peer = peers.identify(Connection(ours.fileno(), address_of(os.geteuid(), os.getegid(), client.pid)))
        try:
            assert peer.pid == client.pid
            assert not peers.is_gone(peer.pidfd)

            client.kill()

            assert select.select([peer.pidfd], [], [], WAIT_S)[0] == [peer.pidfd]
            assert peers.is_gone(peer.pidfd)
        finally:
            peers.close(peer)


@pytest.mark.skipif(os.geteuid() != 0, reason="to connect as another user takes root: run the tests as root")
def test_a_peer_is_who_it_was_at_the_moment_of_connecting() -> None:
    # given a connection made as nobody, by a process that is root again
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{folder}/door")
        listener.listen()
        for path in (folder, f"{folder}/door"):
            Path(path).chmod(0o777)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            client.connect(f"{folder}/door")
        finally:
            os.seteuid(0)
            os.setegid(0)
        ours = stack.enter_context(listener.accept()[0])

        # when the kernel is asked
        peer = peers.identify(Connection(ours.fileno(), address_of(NOBODY, NOBODY, os.getpid())))

    # then it is nobody; what nobody may do is not decided here
    peers.close(peer)
    assert (peer.uid, peer.gid) == (NOBODY, NOBODY)


@pytest.mark.parametrize(
    "address",
    [
        address_of(os.geteuid(), os.getegid(), os.getpid() + 1),
        address_of(os.geteuid(), os.getegid() + 1, os.getpid()),
        address_of(os.geteuid() + 1, os.getegid(), os.getpid()),
        "",
        "localhost",
        "127.0.0.1",
    ],
    ids=["another process", "another group", "another user", "no address", "a name", "an address of a network"],
)
def test_a_connection_that_is_not_the_one_the_message_came_through_is_refused(
    listener: socket.socket, address: str
) -> None:
    with connected(listener) as (ours, _):
        before = descriptors_open()
        with pytest.raises(NotPermitted, match="changed hands"):
            peers.identify(Connection(ours.fileno(), address))
        assert descriptors_open() == before


def test_a_descriptor_that_is_closed_or_no_socket_is_refused() -> None:
    reader, writer = os.pipe()
    before = descriptors_open()
    with pytest.raises(NotPermitted, match="does not say who you are"):
        peers.identify(Connection(reader, our_address()))
    assert descriptors_open() == before

    os.close(reader)
    os.close(writer)
    with pytest.raises(NotPermitted, match="does not say who you are"):
        peers.identify(Connection(reader, our_address()))


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "not reaped yet"])
def test_a_process_that_is_gone_is_not_let_in(listener: socket.socket, reaped: bool) -> None:
    with another_process(listener) as (client, ours):
        pidfd = os.pidfd_open(client.pid)
        client.kill()
        assert select.select([pidfd], [], [], WAIT_S)[0]
        os.close(pidfd)
        if reaped:
            client.wait()
        before = descriptors_open()

        with pytest.raises(NotPermitted):
            peers.identify(Connection(ours.fileno(), address_of(os.geteuid(), os.getegid(), client.pid)))

        assert descriptors_open() == before


def test_a_process_that_cannot_be_looked_at_is_not_let_in(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, **_: str) -> None:
        raise PermissionError(path)

    with connected(listener) as (ours, _):
        before = descriptors_open()
        with monkeypatch.context() as patched:
            patched.setattr(peers, "open", refuse, raising=False)
            with pytest.raises(NotPermitted, match="cannot be looked at"):
                peers.identify(Connection(ours.fileno(), our_address()))
        assert descriptors_open() == before


@pytest.mark.parametrize("namespace", [NEW_USER, NEW_PID], ids=["user", "pid"])
def test_a_process_of_another_namespace_is_known_by_its_numbers_in_ours(
    listener: socket.socket, namespace: int
) -> None:
    """It is let in on purpose: what it may do is asked of the kernel, which knows about namespaces."""
    with another_process(listener, namespace) as (_, ours):
        credentials = ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * ctypes.sizeof(ctypes.c_int))
        pid, uid, gid = memoryview(credentials).cast("I")

        peer = peers.identify(Connection(ours.fileno(), address_of(uid, gid, pid)))

        try:
            assert (peer.pid, peer.uid, peer.gid) == (pid, uid, gid)
            assert f"Pid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{peer.pidfd}").read_text()
        finally:
            peers.close(peer)


def test_to_ask_keeps_nothing_of_the_connection_open(listener: socket.socket) -> None:
    # given a peer that was identified
    with connected(listener) as (ours, client):
        peers.close(peers.identify(Connection(ours.fileno(), our_address())))

        # when our end is closed
        ours.close()

        # then the other end sees it
        assert client.recv(1) == b""


def test_to_let_go_closes_what_pinned_the_process_and_twice_does_no_harm(listener: socket.socket) -> None:
    with connected(listener) as (ours, _):
        before = descriptors_open()
        peer = peers.identify(Connection(ours.fileno(), our_address()))
        assert len(descriptors_open()) == len(before) + 1

        peers.close(peer)

        assert descriptors_open() == before
    peers.close(peer)
