"""A session is found by each thing that can name it, until it is closed; no number is used twice."""

from __future__ import annotations

import os

import pytest

from hwbpd.core.model import Owner
from hwbpd.peers import Connection, Peer
from hwbpd.sessions import Session, Sessions


def open_one(sessions: Sessions, number: int, uid: int = 0) -> Session:
    """Open a session whose every name follows from ``number``, but for the uid if that is given."""
    peer = Peer(4000 + number, uid or 10 + number, 20 + number, f"client{number}", os.eventfd(0, os.EFD_CLOEXEC))
    return sessions.open(b"\0" + bytes([number]), Connection(100 + number, "localhost"), peer)


def found(sessions: Sessions, session: Session) -> list[Session | None]:
    """What each of a session's names leads to."""
    return [
        sessions.of(session.session_id),
        sessions.on_route(session.routing_id),
        sessions.on_connection(session.connection.fd),
        sessions.of_process(session.peer.pidfd),
    ]


def test_a_session_is_found_by_each_of_its_names_until_it_is_closed() -> None:
    # given two sessions
    sessions = Sessions()
    first, second = open_one(sessions, 1), open_one(sessions, 2)
    assert found(sessions, first) == [first] * 4
    assert found(sessions, second) == [second] * 4
    assert (len(sessions), list(sessions)) == (2, [first, second])

    # when one is closed
    sessions.close(first)

    # then none of its names leads anywhere, its process is let go, and the other stays
    assert found(sessions, first) == [None] * 4
    with pytest.raises(OSError):
        os.fstat(first.peer.pidfd)
    assert found(sessions, second) == [second] * 4
    assert list(sessions) == [second]
    sessions.close(second)


def test_the_owner_is_the_process_at_the_other_end() -> None:
    sessions = Sessions()

    session = open_one(sessions, 5)

    assert session.owner == Owner(session.session_id, 4005, 15, 25, "client5")
    assert session.notices_sent == 0
    sessions.close(session)


def test_the_sessions_of_a_user_are_found_until_they_are_closed() -> None:
    # given two sessions of one user, and one of another
    sessions = Sessions()
    first, second, other = open_one(sessions, 1), open_one(sessions, 2, uid=11), open_one(sessions, 3)
    assert (list(sessions.of_uid(11)), list(sessions.of_uid(13))) == ([first, second], [other])

    # when they end, then they are not found, and nothing is kept of a user without any
    sessions.close(first)
    assert list(sessions.of_uid(11)) == [second]
    sessions.close(second)
    assert list(sessions.of_uid(11)) == []
    assert list(sessions._by_uid) == [13]
    sessions.close(other)


def test_nobody_is_privileged_before_that_is_known() -> None:
    sessions = Sessions()

    session = open_one(sessions, 1)

    assert not session.privileged
    sessions.close(session)


def test_a_session_number_is_never_used_again() -> None:
    sessions = Sessions()
    ids = []
    for _ in range(3):
        session = open_one(sessions, 1)
        ids.append(session.session_id)
        sessions.close(session)

    assert ids == [1, 2, 3]


def test_sessions_may_end_while_one_goes_over_them() -> None:
    sessions = Sessions()
    for number in range(4):
        open_one(sessions, number)

    for session in sessions:
        sessions.close(session)

    assert len(sessions) == 0


def test_nothing_is_found_where_nobody_is() -> None:
    sessions = Sessions()

    assert sessions.of(1) is None
    assert sessions.on_route(b"\0") is None
    assert sessions.on_connection(3) is None
    assert sessions.of_process(3) is None
