"""Both ways in at once: what comes by each goes back by the same, and neither is in the other's way."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import zmq
from structlog.testing import capture_logs

from hwbpd import peers, seqpacket
from hwbpd.clock import MonotonicClock
from hwbpd.network import Incoming, Network, RouterNetwork, Unreadable
from hwbpd.networks import Networks, listening
from hwbpd.settings import Limits, Settings

WAIT_S = 30.0


class Door:
    """Both sockets of a daemon, and peers of each."""

    def __init__(self, path: Path, stack: ExitStack, settings: Settings) -> None:
        self.path = path
        self.network: Network = stack.enter_context(listening(path, settings, MonotonicClock()))
        self._context = stack.enter_context(zmq.Context())
        self._stack = stack

    def dealer(self, **options: bytes) -> zmq.Socket[bytes]:
        dealer = self._stack.enter_context(self._context.socket(zmq.DEALER))
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        for name, value in options.items():
            dealer.setsockopt(getattr(zmq, name), value)
        dealer.connect(f"ipc://{self.path}")
        return dealer

    def packets(self) -> socket.socket:
        peer = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer.settimeout(WAIT_S)
        peer.connect(f"{self.path}.seq")
        return peer

    def wake(self) -> None:
        """Wait for something, as the server does at the beginning of each turn."""
        wait_s = 0 if self.network.has_news() else WAIT_S
        ready = select.select(self.network.descriptors(), [], [], wait_s)[0]
        assert ready or not wait_s, "nothing came"
        for fd in ready:
            self.network.woke(fd)

    def next(self) -> Incoming:
        while (incoming := self.network.receive()) is None:
            self.wake()
        return incoming

    def lost(self) -> int:
        while True:
            for lost in self.network.lost_connections():
                return lost
            assert self.network.receive() is None
            self.wake()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def door(tmp_path: Path, stack: ExitStack) -> Door:
    return Door(tmp_path / "s", stack, Settings())


def test_what_comes_by_one_way_is_answered_by_the_same(door: Door) -> None:
    # given a peer on each
    dealer, packets = door.dealer(), door.packets()
    for _ in range(3):
        # when they ask
        dealer.send(b"by ZeroMQ")
        packets.send(b"by SEQPACKET")
        came = [door.next(), door.next()]

        # then each gets its own answer
        assert {incoming.data for incoming in came} == {b"by ZeroMQ", b"by SEQPACKET"}
        for incoming in came:
            assert door.network.send(incoming.routing_id, b"so you came " + incoming.data)
        assert dealer.recv() == b"so you came by ZeroMQ"
        assert packets.recv(100) == b"so you came by SEQPACKET"


def test_neither_starves_the_other(door: Door) -> None:
    # given both of them known, and much waiting from each
    dealer, packets = door.dealer(), door.packets()
    for peer in (dealer, packets):
        peer.send(b"known")
        door.next()
    for _ in range(50):
        packets.send(b"s")
        dealer.send(b"z")
    while door.next().data != b"z":  # libzmq takes a moment to bring what was sent
        packets.send(b"s")
        door.wake()

    # then they take turns, once libzmq has something
    assert {door.next().data, door.next().data} == {b"s", b"z"}


def test_the_peer_behind_each_is_the_kernels(door: Door) -> None:
    for peer in (door.dealer(), door.packets()):
        peer.send(b"hello")
        incoming = door.next()
        assert incoming.connection is not None
        known = door.network.identify(incoming.connection)
        peers.close(known)
        assert known.pid == os.getpid()


def test_the_loss_of_each_is_told_under_its_own_number(door: Door) -> None:
    numbers = []
    for peer in (door.dealer(), door.packets()):
        peer.send(b"hello")
        incoming = door.next()
        assert incoming.connection is not None
        numbers.append(incoming.connection.fd)
        peer.close()
        assert door.lost() == incoming.connection.fd
    assert numbers[1] < 0 <= numbers[0]


def test_a_name_chosen_on_zeromq_cannot_be_a_route_of_the_other(door: Door) -> None:
    # given a SEQPACKET peer, and one on ZeroMQ that calls itself as much like that one's route as it can
    packets = door.packets()
    packets.send(b"hello")
    route = door.next().routing_id
    longest = route[-255:]
    forger = door.dealer(ROUTING_ID=longest.replace(b"\0", b"\1", 1))
    forger.send(b"for whom is the refusal?")

    # when it is refused
    with pytest.raises(Unreadable) as refused:
        door.next()
    assert door.network.send(refused.value.routing_id, b"you")

    # then it is itself who hears that
    assert forger.recv() == b"you"
    packets.setblocking(False)
    with pytest.raises(BlockingIOError):
        packets.recv(100)


def test_every_user_is_hung_up_on_by_both_ways(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[type] = []
    assert isinstance(door.network, Networks)
    for way in (door.network._router, door.network._seqpacket):
        monkeypatch.setattr(way, "hang_up_on_users", partial(asked.append, type(way)))
    door.network.hang_up_on_users()
    assert asked == [RouterNetwork, seqpacket.SeqpacketNetwork]


# --- which are open --------------------------------------------------------------------------------------------------


def test_both_socket_files_are_of_the_same_mode_and_go_with_the_daemon(tmp_path: Path) -> None:
    with listening(tmp_path / "s", Settings(socket_mode="0620"), MonotonicClock()):
        assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("s", "s.seq")] == [0o620, 0o620]
    assert os.listdir(tmp_path) == []


def test_without_the_fast_socket_nothing_listens_there_and_what_was_left_is_gone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "s.seq"))
    with listening(tmp_path / "s", Settings(fast_socket=False), MonotonicClock()) as network:
        assert isinstance(network, RouterNetwork)
        assert os.listdir(tmp_path) == ["s"]


def test_a_kernel_that_is_not_up_to_it_is_served_by_zeromq_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seqpacket, "SO_PASSRIGHTS", 9999)
    with capture_logs() as log, listening(tmp_path / "s", Settings(), MonotonicClock()) as network:
        assert isinstance(network, RouterNetwork)
        assert os.listdir(tmp_path) == ["s"]
    (line,) = log
    assert (line["event"], line["reason"][:19]) == ("no fast socket", "it takes Linux 6.16")


def test_a_path_that_has_room_for_one_only_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / ("x" * (105 - len(str(tmp_path)) - 1))  # of 107 bytes that a path may have
    if len(path.name) < 1:
        pytest.skip("the folder for tests has too long a name itself")
    with pytest.raises(OSError, match="too long"), listening(path, Settings(), MonotonicClock()):
        pass
    assert os.listdir(tmp_path) == []


def test_limits_are_those_of_the_settings(tmp_path: Path, stack: ExitStack) -> None:
    door = Door(tmp_path / "s", stack, Settings(limits=Limits(message_bytes=1024)))
    packets = door.packets()
    packets.send(bytes(1024))
    assert len(door.next().data) == 1024
    packets.send(bytes(1025))
    assert door.lost() < 0
