"""What a stranger may cost: connections at a time, connections a second, and time to say hello."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from hwbpd import connections
from hwbpd.connections import HELLO_WITHIN_NS, NS_PER_S, Connections
from hwbpd.settings import Limits

ANN, BOB, ROOT = 1001, 1002, 0
LIMITS = Limits(connections_per_uid=3, connections_per_uid_per_s=2)


class Door:
    """Connections whose users are as the test says, on real sockets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept = Connections(LIMITS)
        self.users: dict[int, int] = {}
        self.sockets: list[socket.socket] = []
        monkeypatch.setattr(connections, "_uid_of", self.users.get)

    def connect(self, uid: int, now_ns: int = 0) -> socket.socket:
        """Return the other end of a connection that was accepted."""
        ours, theirs = socket.socketpair()
        theirs.settimeout(0)
        self.sockets += [ours, theirs]
        self.users[ours.fileno()] = uid
        self.kept.accepted(ours.fileno(), now_ns)
        return theirs

    def ours(self, theirs: socket.socket) -> int:
        return self.sockets[self.sockets.index(theirs) - 1].fileno()


def is_hung_up_on(theirs: socket.socket) -> bool:
    try:
        return theirs.recv(1) == b""
    except BlockingIOError:
        return False


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    door = Door(monkeypatch)
    yield door
    for each in door.sockets:
        each.close()


def test_one_connection_too_many_of_a_user_is_hung_up_on(door: Door) -> None:
    anns = [door.connect(ANN) for _ in range(4)]
    bob = door.connect(BOB)

    assert [is_hung_up_on(each) for each in (*anns, bob)] == [False, False, False, True, False]


def test_a_connection_that_is_gone_makes_room(door: Door) -> None:
    anns = [door.connect(ANN) for _ in range(3)]
    door.kept.lost(door.ours(anns[0]))

    assert not is_hung_up_on(door.connect(ANN))


def test_root_may_have_any_number(door: Door) -> None:
    assert not any(is_hung_up_on(door.connect(ROOT)) for _ in range(10))
    assert all(door.kept.may_connect(ROOT, 0) for _ in range(10))


def test_who_does_not_say_hello_in_time_is_hung_up_on_and_who_does_is_not(door: Door) -> None:
    silent, root, polite = door.connect(ANN), door.connect(ROOT), door.connect(ANN, now_ns=5)
    door.kept.said_hello(door.ours(polite))

    door.kept.hang_up_on_silent(HELLO_WITHIN_NS - 1)
    assert not any(map(is_hung_up_on, (silent, root, polite)))

    door.kept.hang_up_on_silent(HELLO_WITHIN_NS + 5)
    assert [is_hung_up_on(each) for each in (silent, root, polite)] == [True, True, False]


def test_a_user_may_make_a_few_connections_at_once_and_then_so_many_a_second(door: Door) -> None:
    # given a user who has used up what may come at once
    assert [door.kept.may_connect(ANN, 0) for _ in range(4)] == [True, True, True, False]

    # when time passes, then it earns two a second, and never more than may come at once
    assert [door.kept.may_connect(ANN, NS_PER_S // 2) for _ in range(2)] == [True, False]
    assert [door.kept.may_connect(ANN, 100 * NS_PER_S) for _ in range(4)] == [True, True, True, False]
    assert door.kept.may_connect(BOB, 0)


def test_a_descriptor_that_is_used_again_is_counted_for_its_new_user(door: Door) -> None:
    theirs = door.connect(ANN)
    fd = door.ours(theirs)
    door.users[fd] = BOB
    door.kept.accepted(fd, 0)  # the loss of the first was not told yet

    for _ in range(3):
        assert not is_hung_up_on(door.connect(ANN))
