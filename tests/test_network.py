"""
The ROUTER as it is bound by the daemon, and what real peers, honest or not, can make it say.

Nothing here waits for a time to pass: each wait is for something to arrive, and gives up after ``WAIT_S``.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from hwbpd import peers
from hwbpd.clock import MonotonicClock
from hwbpd.network import SO_PASSRIGHTS, Incoming, RouterNetwork, Unreadable
from hwbpd.peers import Connection
from hwbpd.settings import Limits
from tests.raw_zmtp import RawPeer

WAIT_S = 30.0
MESSAGE_BYTES = 4096
GREETING_BYTES = 64

# Sends one message, and stays until its input ends.
CLIENT = """
import sys, zmq
dealer = zmq.Context().socket(zmq.DEALER)
dealer.connect(sys.argv[1])
dealer.send(b"from another process")
sys.stdin.read()
"""


class HungUp(Exception):
    """A connection was lost where a message was awaited."""


class Door:
    """A network on a bound ROUTER, and peers of it."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        limits = Limits(message_bytes=MESSAGE_BYTES, messages_queued_per_session=10)
        self.path = path
        self.network = RouterNetwork(path, limits, 0o600, MonotonicClock())
        stack.callback(self.network.close)
        self._context = stack.enter_context(zmq.Context())
        self._stack = stack

    def dealer(self, **options: Any) -> zmq.Socket[bytes]:
        dealer = self._stack.enter_context(self._context.socket(zmq.DEALER))
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        for name, value in options.items():
            dealer.setsockopt(getattr(zmq, name), value)
        dealer.connect(f"ipc://{self.path}")
        return dealer

    def raw(self) -> RawPeer:
        return self._stack.enter_context(RawPeer(str(self.path)))

    def shake_hands(self, peer: RawPeer, **properties: bytes) -> None:
        """Let a raw peer in: the handshake is answered by us, in this very thread."""
        peer.offer_hand(**properties)
        while not self._has_answered(peer):  # it may be heard of before it is ready to shake hands
            self._until_something_comes(0.01)
            assert self.network.receive() is None
            assert not list(self.network.lost_connections())
        peer.take_hand()

    @staticmethod
    def _has_answered(peer: RawPeer) -> bool:
        """Whether more than the greeting has come: READY follows once the handshake was answered."""
        if not select.select([peer.socket], [], [], 0)[0]:
            return False
        return len(peer.socket.recv(GREETING_BYTES + 1, socket.MSG_PEEK)) > GREETING_BYTES

    def _until_something_comes(self, wait_s: float = WAIT_S) -> None:
        poller = select.poll()
        for fd in self.network.descriptors():
            poller.register(fd, select.POLLIN)
        if self.network.has_news():
            return
        ready = poller.poll(wait_s * 1000)
        assert ready or wait_s < WAIT_S, "nothing came"
        for fd, _ in ready:
            self.network.woke(fd)

    def next(self) -> Incoming:
        """The next message; raises ``Unreadable`` for what cannot be one, ``HungUp`` when a connection is lost."""
        while (incoming := self.network.receive()) is None:
            self._until_something_comes()
            if list(self.network.lost_connections()):
                raise HungUp
        return incoming

    def lost(self) -> int:
        """The descriptor of the next connection that is lost."""
        while True:
            for fd in self.network.lost_connections():
                return fd
            while self.network.receive() is not None:
                pass
            self._until_something_comes()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with ExitStack() as stack:
        yield Door(tmp_path / "s", stack)


def connection_of(incoming: Incoming) -> Connection:
    assert incoming.connection is not None
    return incoming.connection


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_message_and_its_answer_pass(door: Door) -> None:
    # given a peer
    dealer = door.dealer()
    assert not door.network.has_news()
    assert door.network.receive() is None

    # when it sends something
    dealer.send(b"question")
    incoming = door.next()

    # then it comes as it was sent, and an answer goes back
    assert incoming.data == b"question"
    assert incoming.routing_id[:1] == b"\0"
    assert door.network.receive() is None
    assert not door.network.has_news()
    assert door.network.send(incoming.routing_id, b"answer")
    assert dealer.recv_multipart() == [b"answer"]


def test_peers_have_routes_of_their_own(door: Door) -> None:
    first, second = door.dealer(), door.dealer()
    first.send(b"first")
    a = door.next()
    second.send(b"second")
    b = door.next()
    first.send(b"first again")

    assert door.next().routing_id == a.routing_id != b.routing_id
    assert connection_of(a).fd != connection_of(b).fd
    door.network.send(b.routing_id, b"for the second")
    assert second.recv() == b"for the second"


def test_a_message_of_several_frames_is_refused(door: Door) -> None:
    dealer = door.dealer()

    dealer.send_multipart([b"one", b"two"])

    with pytest.raises(Unreadable) as refused:
        door.next()
    assert str(refused.value.why) == "a message is one frame, not 2"
    assert door.network.send(refused.value.routing_id, b"no")
    assert dealer.recv() == b"no"

    dealer.send(b"one")
    assert door.next().data == b"one"


def test_descriptors_sent_along_are_refused_where_the_kernel_can(door: Door, tmp_path: Path) -> None:
    # To drop somebody else's lingering socket would hold up everybody.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            pytest.skip("this kernel cannot refuse descriptors: it takes Linux 6.16")
    with RawPeer(str(tmp_path / "s")) as peer, socket.socket() as theirs, pytest.raises(PermissionError):
        socket.send_fds(peer.socket, [b"x"], [theirs.fileno()])


def test_an_oversize_message_costs_the_connection_and_nobody_elses(door: Door) -> None:
    # given two peers
    large, other = door.dealer(), door.dealer()
    large.send(bytes(MESSAGE_BYTES))
    connection = connection_of(door.next())

    # when one sends a byte too many
    large.send(bytes(MESSAGE_BYTES + 1))

    # then its connection is lost, and the other is served
    assert door.lost() == connection.fd
    other.send(b"still here")
    assert door.next().data == b"still here"


def test_where_there_is_no_room_nothing_is_sent_and_nothing_waits(door: Door) -> None:
    # given a peer that takes few messages and reads none
    dealer = door.dealer(RCVHWM=1)
    dealer.send(b"hello")
    route = door.next().routing_id

    # when it is sent more than anybody buffers
    sent = 0
    while door.network.send(route, b"%6d" % sent + bytes(10_000)):
        sent += 1
        assert sent < 100_000

    # then what was said to be sent arrives, and no more
    assert [int(dealer.recv()[:6]) for _ in range(sent)] == list(range(sent))
    assert dealer.poll(0) == 0


def test_to_a_peer_that_is_gone_everything_counts_as_sent(door: Door) -> None:
    dealer = door.dealer()
    dealer.send(b"hello")
    route = door.next().routing_id
    dealer.close()
    door.lost()

    assert door.network.send(route, b"anybody there?")
    assert door.network.send(b"\0never", b"anybody there?")


# --- who it is -------------------------------------------------------------------------------------------------------


def test_the_identity_of_a_peer_is_the_kernels(door: Door) -> None:
    dealer = door.dealer()
    dealer.send(b"hello")

    peer = door.network.identify(connection_of(door.next()))

    peers.close(peer)
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())


def test_a_process_that_dies_is_seen_by_its_connection_and_by_its_end(door: Door) -> None:
    command = [sys.executable, "-c", CLIENT, f"ipc://{door.path}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as client:
        # given a peer in another process
        connection = connection_of(door.next())
        peer = door.network.identify(connection)
        try:
            assert peer.pid == client.pid

            # when it is killed
            client.kill()

            # then both ways to know tell
            assert door.lost() == connection.fd
            assert select.select([peer.pidfd], [], [], WAIT_S)[0]
        finally:
            peers.close(peer)


def test_a_connection_that_ends_is_told_before_the_next_on_its_descriptor_speaks(door: Door) -> None:
    # given connections that come and go, so that descriptors are used again
    seen: list[int] = []
    for _ in range(5):
        dealer = door.dealer()
        dealer.send(b"hello")
        fd = connection_of(door.next()).fd
        seen.append(fd)
        dealer.close()
        assert door.lost() == fd

    assert len(set(seen)) < len(seen), "a descriptor was used again, or this shows nothing"


def test_what_a_peer_says_of_itself_is_not_believed(door: Door) -> None:
    # given a peer that claims to be another process, on another descriptor, and root by name
    peer = door.raw()
    door.shake_hands(peer, Peer_Address=b"localhost:12:34:56", __fd=b"0", User_Id=b"root")

    # when it sends something
    peer.send(b"I am somebody else")
    connection = connection_of(door.next())

    # then it is still us
    assert connection.address.rsplit(":", 3)[1:] == [str(os.geteuid()), str(os.getegid()), str(os.getpid())]
    assert connection.fd != 0
    identified = door.network.identify(connection)
    peers.close(identified)
    assert identified.pid == os.getpid()


def test_a_peer_of_an_old_version_has_no_identity(door: Door) -> None:
    # given a peer of ZMTP 2.0, which has no metadata
    peer = door.raw()
    try:
        peer.shake_hands_v2()
        peer.send(b"hello")

        # when its message comes, then nothing is known of its connection; or it is hung up on before it can speak
        incoming = door.next()
    except (EOFError, HungUp):
        return
    assert (incoming.data, incoming.connection) == (b"hello", None)


@pytest.mark.parametrize("chosen", [b"gdb", b"\1\0\0\0\1", b"\xff" * 255, b"\0chosen"])
def test_a_routing_id_that_a_client_chose_is_refused(door: Door, chosen: bytes) -> None:
    dealer = door.dealer(ROUTING_ID=chosen)

    dealer.send(b"hello")

    with pytest.raises(Unreadable, match="do not set ZMQ_ROUTING_ID") as refused:
        door.next()
    assert refused.value.routing_id == chosen


def test_a_name_that_looks_like_the_routers_own_ids_brings_no_other_connection_with_it(door: Door) -> None:
    honest, forger = door.dealer(), door.dealer(ROUTING_ID=b"\0\0\0\0\7")

    honest.send(b"honest")
    forger.send(b"forged")

    first, second = connection_of(door.next()), connection_of(door.next())
    assert first != second
