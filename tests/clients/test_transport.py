"""What carries the messages: which of the two is taken, and what SEQPACKET promises at its edges."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest

import hwbp
from hwbp.transport import PACKET_BYTES_MAX, Lost, Seqpacket, Unreadable, Zmq, connect
from tests.clients.fake_daemon import FakeDaemon

NOBODY = 65534
WAIT_S = 30.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else: run the tests as root")


def in_time() -> int:
    return time.monotonic_ns() + int(WAIT_S * 1e9)


def received(transport: Seqpacket, until: int | None = None) -> bytes:
    message = transport.receive(in_time(), until)
    assert message is not None
    return bytes(message)


def packet_listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(WAIT_S)
    return listener


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a daemon of which nothing is there but its file."""
    (tmp_path / "hwbpd.sock").touch()
    return tmp_path / "hwbpd.sock"


@pytest.fixture
def ends(path: Path) -> Iterator[tuple[Seqpacket, socket.socket]]:
    """A transport, and the daemon's end of it."""
    with packet_listener(path.with_name("hwbpd.sock.seq")) as listener:
        transport = Seqpacket(path, WAIT_S)
        theirs, _ = listener.accept()
        with theirs:
            yield transport, theirs
            transport.close()


# --- which one -------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_is_taken_and_otherwise_seqpacket_where_it_is_offered(daemon: FakeDaemon) -> None:
    def taken(transport: str) -> str:
        carrier = connect(daemon.path, transport, WAIT_S)
        carrier.close()
        return type(carrier).__name__

    assert taken("zmq") == "Zmq"
    if daemon.offers_seqpacket:
        assert (taken("seqpacket"), taken("auto")) == ("Seqpacket", "Seqpacket")
    else:
        assert taken("auto") == "Zmq"
        with pytest.raises(hwbp.NotReachable, match=r"hwbpd\.sock\.seq: there is no such socket"):
            taken("seqpacket")


def test_both_carry_a_session(daemon: FakeDaemon) -> None:
    for transport in ("zmq", "seqpacket")[: 1 + daemon.offers_seqpacket]:
        with hwbp.connect(daemon.path, transport=transport) as client:
            assert client.slots().pools == {"any": 4}


def test_another_name_is_a_mistake_of_the_caller(daemon: FakeDaemon) -> None:
    with pytest.raises(ValueError, match="one of auto, zmq, seqpacket"):
        hwbp.connect(daemon.path, transport="tcp")


def test_what_a_dead_daemon_left_does_not_keep_a_client_from_zeromq(tmp_path: Path) -> None:
    packet_listener(tmp_path / "hwbpd.sock.seq").close()
    with FakeDaemon(tmp_path / "hwbpd.sock") as daemon:
        carrier = connect(daemon.path, "auto", WAIT_S)
        carrier.close()
        assert isinstance(carrier, Zmq)
        with pytest.raises(hwbp.NotReachable, match="nobody listens"):
            connect(daemon.path, "seqpacket", WAIT_S)


@needs_root
def test_a_socket_that_somebody_else_put_beside_the_daemons_is_not_taken(tmp_path: Path) -> None:
    # given a daemon of root's, and a listener of nobody's where its second socket would be
    with FakeDaemon(tmp_path / "hwbpd.sock") as daemon:
        listener = packet_listener(tmp_path / "hwbpd.sock.seq")
        os.seteuid(NOBODY)
        try:
            listener.listen()  # the kernel remembers who listens, not who made the file
        finally:
            os.seteuid(0)

        # when a client connects, then it is to the daemon, and whoever insists hears why not
        with listener:
            carrier = connect(daemon.path, "auto", WAIT_S)
            carrier.close()
            assert isinstance(carrier, Zmq)
            with pytest.raises(hwbp.NotReachable, match=f"uid {NOBODY} listens there"):
                connect(daemon.path, "seqpacket", WAIT_S)


def test_a_queue_of_newcomers_that_does_not_move_is_waited_for_and_no_longer(path: Path) -> None:
    with packet_listener(path.with_name("hwbpd.sock.seq")) as listener:
        listener.listen(0)
        waiting = Seqpacket(path, WAIT_S)
        with pytest.raises(hwbp.NotReachable, match="so many wait"):
            Seqpacket(path, 0.01)
        waiting.close()


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_message_is_a_packet_and_comes_whole(ends: tuple[Seqpacket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * PACKET_BYTES_MAX)
    assert ours.send(b"question", in_time())
    assert theirs.recv(100) == b"question"

    for size in (1, 100_000, PACKET_BYTES_MAX):
        theirs.send(b"a" * size)
        assert received(ours) == b"a" * size
    assert ours.receive(0) is None


def test_a_packet_that_is_too_long_is_not_taken_for_its_beginning(ends: tuple[Seqpacket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * PACKET_BYTES_MAX)
    theirs.send(bytes(PACKET_BYTES_MAX + 1))

    with pytest.raises(Unreadable, match=str(PACKET_BYTES_MAX + 1)):
        ours.receive(in_time())


def test_another_descriptor_ends_the_wait_unless_a_message_is_there(ends: tuple[Seqpacket, socket.socket]) -> None:
    ours, theirs = ends
    reader, writer = os.pipe()
    os.write(writer, b"now")

    assert ours.receive(in_time(), until=reader) is None
    theirs.send(b"message")
    assert received(ours, until=reader) == b"message"

    os.close(reader)
    os.close(writer)


def test_where_there_is_no_room_sending_ends_with_the_deadline(ends: tuple[Seqpacket, socket.socket]) -> None:
    # given a daemon that reads nothing
    ours, theirs = ends
    sent = 0
    while ours.send(bytes(1000), 0):
        sent += 1
        assert sent < 100_000

    # when it reads, then there is room again
    for _ in range(sent):
        theirs.recv(1000)
    assert ours.send(b"again", in_time())


# --- the end ---------------------------------------------------------------------------------------------------------


def _reads_all(_: socket.socket) -> None:
    pass


def _leaves_something_unread(ours: socket.socket) -> None:
    ours.send(b"question")  # Linux then says "connection reset" before it hands over what had come


@pytest.mark.parametrize("before", [_reads_all, _leaves_something_unread])
def test_what_came_before_the_end_is_read_first(
    ends: tuple[Seqpacket, socket.socket], before: Callable[[socket.socket], None]
) -> None:
    ours, theirs = ends
    before(ours._socket)
    theirs.send(b"last words")
    theirs.close()

    assert received(ours) == b"last words"
    with pytest.raises(Lost):
        ours.receive(in_time())
    with pytest.raises(Lost):
        ours.send(b"anybody there?", in_time())


def test_what_came_before_the_end_is_read_first_on_zeromq_too(tmp_path: Path) -> None:
    # given a daemon that has sent several messages and gone, and a client that has read none of them
    with FakeDaemon(tmp_path / "hwbpd.sock") as daemon:
        transport = Zmq(daemon.path)
        transport.send(msgpack.packb({"op": "hello", "id": 1}), in_time())
        assert transport.receive(in_time()) is not None
        daemon.push_bytes(b"in one piece")
        assert transport.receive(in_time()) == b"in one piece"
        for word in (b"last", b"words"):
            daemon.push_bytes(word)
    assert select.select([transport._monitor_fd], [], [], WAIT_S)[0], "it is known to be gone"

    # when it reads, then they are there, and then the end
    assert [transport.receive(in_time()), transport.receive(in_time())] == [b"last", b"words"]
    with pytest.raises(Lost):
        transport.receive(in_time())
    transport.close()


def test_the_last_words_of_a_daemon_are_why_a_request_fails(tmp_path: Path) -> None:
    # given a daemon that has ended, and a client that has not read why
    with FakeDaemon(tmp_path / "hwbpd.sock", offers_seqpacket=True) as daemon:
        client = hwbp.connect(daemon.path)
        daemon.push({"op": "closing", "sentence": "the daemon is stopping"})

    # when it asks something, then it hears that
    with pytest.raises(hwbp.Stale, match="the daemon is stopping"):
        client.slots()
    client.close()


def test_a_message_longer_than_any_socket_takes_costs_the_connection(ends: tuple[Seqpacket, socket.socket]) -> None:
    ours, _ = ends
    with pytest.raises(Lost):
        ours.send(bytes(64 * PACKET_BYTES_MAX), in_time())


def test_closing_ends_the_connection_even_where_a_child_has_a_copy(ends: tuple[Seqpacket, socket.socket]) -> None:
    ours, theirs = ends
    copy = os.dup(ours._socket.fileno())

    ours.close()

    assert theirs.recv(1) == b""
    os.close(copy)
