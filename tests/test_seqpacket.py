"""
The SEQPACKET socket as the daemon listens on it, and what peers, honest or not, can do to it.

Both ends are in this thread, and what one has sent has arrived at the other: nothing here waits for long.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hwbpd import connections, peers, seqpacket
from hwbpd.connections import HELLO_WITHIN_NS
from hwbpd.core.errors import NotPermitted
from hwbpd.network import Incoming
from hwbpd.seqpacket import PACKET_BYTES_MAX, NotHere, SeqpacketNetwork
from hwbpd.settings import Limits
from tests.fakes import FakeClock

ANN, BOB = 1001, 1002
WAIT_S = 30.0
MESSAGE_BYTES = 4096
HITS_BYTES = 8192
LIMITS = Limits(message_bytes=MESSAGE_BYTES, connections_per_uid=3, connections_per_uid_per_s=1, sessions=5)


class Door:
    """A network, and peers of it."""

    def __init__(self, path: Path, stack: ExitStack, hits_bytes: int = HITS_BYTES) -> None:
        self.path = path
        self.clock = FakeClock()
        self.network = SeqpacketNetwork(path, LIMITS, 0o600, self.clock, hits_bytes)
        stack.callback(self.network.close)
        self._stack = stack

    def peer(self) -> socket.socket:
        peer = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer.settimeout(WAIT_S)
        peer.connect(str(self.path))
        return peer

    def known(self) -> tuple[socket.socket, Incoming]:
        """A peer that has sent something, and what came."""
        peer = self.peer()
        peer.send(b"hello")
        return peer, self.next()

    def wake(self, timeout_s: float = 0) -> bool:
        """What the server's epoll does; return whether it woke."""
        ready = select.select(self.network.descriptors(), [], [], timeout_s)[0]
        for fd in ready:
            self.network.woke(fd)
        return bool(ready)

    def next(self) -> Incoming:
        while (incoming := self.network.receive()) is None:
            assert self.network.has_news() or self.wake(WAIT_S), "nothing came"
        return incoming

    def lost(self) -> list[int]:
        """The connections that are lost by now; what was sent before is read and let go."""
        self.wake()
        lost = list(self.network.lost_connections())
        while self.network.receive() is not None:
            pass
        return lost + list(self.network.lost_connections())

    def accept_all(self) -> None:
        assert self.wake(WAIT_S)
        assert self.network.receive() is None


def number(incoming: Incoming) -> int:
    assert incoming.connection is not None
    return incoming.connection.fd


def is_hung_up_on(peer: socket.socket) -> bool:
    try:
        return select.select([peer], [], [], 0)[0] == [peer] and peer.recv(1) == b""
    except ConnectionResetError:  # with something of theirs unread
        return True


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def door(tmp_path: Path, stack: ExitStack) -> Door:
    return Door(tmp_path / "s.seq", stack)


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whose the next connections are, as the kernel would say."""
    next_uids: list[int] = []
    of: dict[int, int] = {}

    def credentials(connection: socket.socket) -> tuple[int, int, int]:
        uid = of[connection.fileno()] = next_uids.pop(0)
        return os.getpid(), uid, uid

    monkeypatch.setattr(peers, "credentials_of", credentials)
    monkeypatch.setattr(connections, "_uid_of", of.get)
    return next_uids


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_message_and_its_answer_pass(door: Door) -> None:
    # given a peer
    peer = door.peer()
    assert not door.network.has_news()

    # when it sends something
    peer.send(b"question")
    incoming = door.next()

    # then it comes as it was sent, and an answer goes back
    assert incoming.data == b"question"
    assert door.network.receive() is None
    assert not door.wake(), "with nothing to do the loop sleeps"
    assert door.network.send(incoming.routing_id, b"answer")
    assert peer.recv(100) == b"answer"


def test_connections_take_turns(door: Door) -> None:
    # given one who has sent much, and one who has sent little after that
    much, little = door.peer(), door.peer()
    for _ in range(50):
        much.send(b"much")
    little.send(b"little")

    # when messages are received, then the second of them is the little
    assert {door.next().data, door.next().data} == {b"much", b"little"}
    assert all(door.next().data == b"much" for _ in range(49))


def test_no_route_can_be_one_of_zeromqs_and_none_is_used_again(door: Door) -> None:
    peer, first = door.known()
    peer.close()
    assert door.lost() == [number(first)]
    _, second = door.known()

    assert len(first.routing_id) == len(second.routing_id) > 255
    assert first.routing_id != second.routing_id
    assert number(second) < number(first) < 0, "no descriptors, which libzmq has, too"


@pytest.mark.parametrize("packet", [b"", bytes(MESSAGE_BYTES + 1)], ids=["empty", "too long"])
def test_what_is_no_message_costs_the_connection_and_nobody_elses(door: Door, packet: bytes) -> None:
    # given two peers, one of which has sent the longest message there may be
    (bad, incoming), (good, _) = door.known(), door.known()
    bad.send(bytes(MESSAGE_BYTES))
    assert len(door.next().data) == MESSAGE_BYTES

    # when it sends what is none
    bad.send(packet)

    # then its connection is over, and the other is served
    assert door.lost() == [number(incoming)]
    assert bad.recv(1) == b""
    good.send(b"still here")
    assert door.next().data == b"still here"


def test_what_was_sent_before_the_end_is_served_before_the_loss_is_told(door: Door) -> None:
    peer, incoming = door.known()
    peer.send(b"one")
    peer.send(b"two")
    peer.close()

    assert door.wake(WAIT_S)
    assert list(door.network.lost_connections()) == []
    assert [door.next().data, door.next().data] == [b"one", b"two"]
    assert door.lost() == [number(incoming)]


def test_a_peer_that_goes_with_an_answer_unread_is_lost_like_any_other(door: Door) -> None:
    peer, incoming = door.known()
    door.network.send(incoming.routing_id, b"answer")
    peer.close()  # which resets the connection

    assert door.lost() == [number(incoming)]
    assert not door.wake()


def test_a_loss_is_told_at_once_where_nothing_is_left_to_be_read(door: Door) -> None:
    peer, incoming = door.known()
    peer.close()

    assert door.wake(WAIT_S)
    assert list(door.network.lost_connections()) == [number(incoming)]


def test_descriptors_sent_along_are_refused_by_the_kernel(door: Door) -> None:
    """To let go of somebody's socket may take as long as they like: SO_LINGER."""
    peer, _ = door.known()
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(PermissionError):
        socket.send_fds(peer, [b"a present"], [peer.fileno()])

    assert not door.wake()
    assert set(os.listdir("/proc/self/fd")) == before
    peer.send(b"without")
    assert door.next().data == b"without"


# --- what goes out ---------------------------------------------------------------------------------------------------


def test_where_there_is_no_room_nothing_is_sent_and_the_loop_wakes_when_there_is(door: Door) -> None:
    # given a peer that reads nothing
    peer, incoming = door.known()
    sent = 0
    while door.network.send(incoming.routing_id, b"%6d" % sent + bytes(1000)):
        sent += 1
        assert sent < 100_000
    assert not door.wake(), "as long as it reads nothing, the loop sleeps"

    # when it reads, then the loop wakes, and what was said to be sent has come
    assert [int(peer.recv(2000)[:6]) for _ in range(sent)] == list(range(sent))
    assert door.wake(WAIT_S)
    assert door.network.receive() is None
    assert not door.wake(), "once"
    assert door.network.send(incoming.routing_id, b"again")
    assert peer.recv(100) == b"again"


def test_a_message_of_hits_fits_however_little_else_waits(door: Door) -> None:
    peer, incoming = door.known()
    size = HITS_BYTES + seqpacket.RECORD_BYTES_MAX

    assert door.network.send(incoming.routing_id, bytes(size))
    assert len(peer.recv(2 * size)) == size


def test_a_reply_longer_than_what_usually_waits_gets_room(door: Door) -> None:
    peer, incoming = door.known()
    for size in (400_000, PACKET_BYTES_MAX):
        assert door.network.send(incoming.routing_id, bytes(size))
        assert len(peer.recv(2 * size)) == size


def test_a_reply_longer_than_any_client_expects_ends_the_connection(door: Door) -> None:
    peer, incoming = door.known()

    assert door.network.send(incoming.routing_id, bytes(PACKET_BYTES_MAX + 1))

    assert peer.recv(1) == b""
    assert door.lost() == [number(incoming)]


def test_to_a_peer_that_is_gone_everything_counts_as_sent(door: Door) -> None:
    peer, incoming = door.known()
    peer.close()
    assert door.network.send(incoming.routing_id, b"anybody there?")
    door.lost()
    assert door.network.send(incoming.routing_id, b"anybody there?")


def test_what_was_sent_can_be_read_after_the_daemon_has_gone(door: Door) -> None:
    peer, incoming = door.known()
    door.network.send(incoming.routing_id, b"closing")
    door.network.close()

    assert [peer.recv(100), peer.recv(100)] == [b"closing", b""]


# --- who it is, and what strangers may cost --------------------------------------------------------------------------


def test_the_identity_of_a_peer_is_the_kernels(door: Door) -> None:
    _, incoming = door.known()
    assert incoming.connection is not None

    peer = door.network.identify(incoming.connection)

    peers.close(peer)
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())


def test_a_connection_that_is_gone_has_no_identity(door: Door) -> None:
    peer, incoming = door.known()
    peer.close()
    door.lost()
    assert incoming.connection is not None

    with pytest.raises(NotPermitted, match="gone"):
        door.network.identify(incoming.connection)


def test_whoever_does_not_say_hello_in_time_is_hung_up_on(door: Door) -> None:
    polite, incoming = door.known()
    assert incoming.connection is not None
    peers.close(door.network.identify(incoming.connection))
    silent = door.peer()
    door.accept_all()

    door.clock.time_ns += HELLO_WITHIN_NS

    assert len(door.lost()) == 1
    assert [is_hung_up_on(each) for each in (silent, polite)] == [True, False]


def test_a_user_has_so_many_connections_and_makes_so_many_a_second(door: Door, users: list[int]) -> None:
    users += [ANN] * 5 + [BOB]
    anns = [door.peer() for _ in range(4)]
    door.accept_all()
    assert [is_hung_up_on(each) for each in anns] == [False, False, False, True]

    anns[0].close()
    door.lost()
    door.clock.wind(1.0)
    late, bob = door.peer(), door.peer()
    door.accept_all()
    assert not any(map(is_hung_up_on, (late, bob)))


def test_beyond_as_many_as_there_may_be_sessions_only_root_connects(door: Door, users: list[int]) -> None:
    users += [0] * LIMITS.sessions + [ANN, 0]
    for _ in range(LIMITS.sessions):
        door.peer()
    ann, root = door.peer(), door.peer()
    door.accept_all()

    assert [is_hung_up_on(each) for each in (ann, root)] == [True, False]


def test_who_is_hung_up_on_is_not_heard_any_more(door: Door, users: list[int]) -> None:
    # given two users, both of whom have sent something that was not read yet
    users += [ANN, 0]
    ann, root = door.peer(), door.peer()
    door.accept_all()
    ann.send(b"more of the same")
    root.send(b"root's")

    # when every user is hung up on
    door.network.hang_up_on_users()

    # then only root's message comes
    assert door.next().data == b"root's"
    assert len(door.lost()) == 1
    assert is_hung_up_on(ann)
    assert not is_hung_up_on(root)


def test_without_descriptors_newcomers_wait_and_nothing_spins(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a connection, a newcomer, and no descriptor left for it
    peer, _ = door.known()
    newcomer = door.peer()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    watched = door.network.descriptors()[0]
    waker = select.poll()
    waker.register(watched, select.POLLIN)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        # when the loop looks, then it goes back to sleep, and serves who is there
        door.network.woke(watched)
        assert door.network.receive() is None
        assert not door.network.has_news()
        assert not waker.poll(0)
        peer.send(b"still here")
        assert waker.poll(WAIT_S * 1000)
        assert door.next().data == b"still here"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    # and when there are descriptors again, the newcomer is let in with the next turn
    newcomer.send(b"at last")
    assert list(door.network.lost_connections()) == []
    assert door.next().data == b"at last"


# --- its beginning and end -------------------------------------------------------------------------------------------


def test_the_socket_file_is_of_the_mode_asked_for_and_goes_with_the_daemon(door: Door) -> None:
    assert stat.S_IMODE(door.path.stat().st_mode) == 0o600
    door.network.close()
    assert not door.path.exists()


def test_what_a_killed_daemon_left_is_replaced(tmp_path: Path, stack: ExitStack) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "s.seq"))
    Door(tmp_path / "s.seq", stack).known()


def test_a_kernel_that_cannot_refuse_descriptors_gets_no_such_socket(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seqpacket, "SO_PASSRIGHTS", 9999)
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(NotHere, match=r"Linux 6\.16"):
        Door(tmp_path / "s.seq", stack)

    assert not (tmp_path / "s.seq").exists()
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_host_that_lets_too_little_wait_for_a_client_gets_no_such_socket(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little(connection: socket.socket, bytes_wanted: int) -> int:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    monkeypatch.setattr(seqpacket, "_widen", little)
    with pytest.raises(NotHere, match=r"wmem_max.*rings\.bytes_per_message"):
        Door(tmp_path / "s.seq", stack)


def test_a_path_too_long_for_a_socket_is_an_error_of_the_system(tmp_path: Path, stack: ExitStack) -> None:
    with pytest.raises(OSError, match="too long"):
        Door(tmp_path / ("x" * 200), stack)


def test_errors_of_accept_that_pass_do_not_stop_it(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a newcomer that has gone before it was accepted, and another
    real = door.network._listener
    refusals = [OSError(errno.ECONNABORTED, "gone")]

    class Once:
        def accept(self) -> tuple[socket.socket, object]:
            if refusals:
                raise refusals.pop()
            return real.accept()

        def close(self) -> None:
            real.close()

    monkeypatch.setattr(door.network, "_listener", Once())
    assert door.known()[1].data == b"hello"
