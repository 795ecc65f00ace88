"""What leaves the daemon: in order, numbered without a gap, bounded, and counted to the hit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.model import Target
from hwbpd.messages import Bye, Closing, Lost
from hwbpd.outbox import Flow, Outbox
from hwbpd.peers import Connection, Peer
from hwbpd.sessions import Session
from tests import strategies
from tests.fakes import RECORD, FakeTransport

BYTES = RECORD.size


def session(number: int = 1) -> Session:
    return Session(number, b"\0" + bytes([number]), Connection(number, ""), Peer(100 + number, 0, 0, "gdb", -1))


def flow(claim_id: int) -> Flow:
    return Flow(strategies.claim(claim_id, strategies.owner(0), Target()))


def records(*numbers: int) -> bytes:
    """Records that tell themselves apart."""
    return b"".join(number.to_bytes(BYTES, "big") for number in numbers)


def numbers(message: dict[str, Any]) -> list[int]:
    data = message["records"]
    return [int.from_bytes(data[at : at + BYTES], "big") for at in range(0, len(data), BYTES)]


def lost(claim_id: int) -> Lost:
    return Lost(claim_id, "exit", "it has exited", 0, 0, 0, 0)


class Line:
    """An outbox, one session, and what has come through to it."""

    def __init__(self, *, room: int, messages_max: int = 100, hits_max: int = 100) -> None:
        self.transport = FakeTransport(room)
        self.outbox = Outbox(self.transport, messages_max=messages_max, hits_bytes_max=hits_max * BYTES)
        self.session = session()

    @property
    def sent(self) -> list[dict[str, Any]]:
        return self.transport.sent.get(self.session.routing_id, [])

    def make_room(self, messages: int) -> None:
        self.transport.room += messages
        self.outbox.flush()


def test_with_room_everything_leaves_at_once() -> None:
    # given a session that reads
    line = Line(room=10)
    hits = flow(7)
    assert (hits.delivered, hits.lost, hits.dropped) == (0, 0, 0)
    hits.lost = 4
    hits.dropped = 2

    # when a reply, hits and notices are sent
    line.outbox.send(line.session, Bye(5))
    line.outbox.send_hits(line.session, hits, 2, records(1, 2))
    line.outbox.send(line.session, Closing(sentence="over"))

    # then they are on their way as they are, notices numbered and replies not
    assert line.sent == [
        {"op": "bye", "id": 5},
        {"op": "hits", "n": 1, "claim": 7, "count": 2, "records": records(1, 2), "lost": 4, "dropped": 2},
        {"op": "closing", "n": 2, "sentence": "over"},
    ]
    assert hits.delivered == 2
    assert not line.outbox.is_waiting
    assert not line.outbox.is_waiting_for(line.session)


def test_what_finds_no_room_waits_in_order() -> None:
    # given a session whose transport is full after one message
    line = Line(room=1)
    a, b = flow(1), flow(2)
    line.outbox.send(line.session, Bye(1))

    # when hits, replies and notices follow
    line.outbox.send_hits(line.session, a, 1, records(10))
    line.outbox.send(line.session, Bye(2))
    line.outbox.send_hits(line.session, a, 1, records(11))
    line.outbox.send_hits(line.session, b, 1, records(20))
    line.outbox.send(line.session, lost(2))

    # then they wait, and later come as they were sent
    assert (len(line.sent), line.outbox.is_waiting, line.outbox.is_waiting_for(line.session)) == (1, True, True)
    line.make_room(2)
    assert (len(line.sent), line.outbox.is_waiting_for(line.session)) == (3, True)
    line.make_room(10)
    assert [(m["op"], m.get("id") or m["claim"], m.get("n")) for m in line.sent] == [
        ("bye", 1, None),
        ("hits", 1, 1),
        ("bye", 2, None),
        ("hits", 1, 2),
        ("hits", 2, 3),
        ("lost", 2, 4),
    ]
    assert not line.outbox.is_waiting


def test_hits_that_wait_are_joined_until_something_else_comes_between() -> None:
    line = Line(room=0)
    a, b = flow(1), flow(2)
    for number in (1, 2):
        line.outbox.send_hits(line.session, a, 1, records(number))
    line.outbox.send_hits(line.session, a, 2, records(3, 4))
    line.outbox.send_hits(line.session, b, 1, records(5))
    line.outbox.send_hits(line.session, a, 1, records(6))

    line.make_room(10)

    assert [(m["claim"], m["count"], numbers(m)) for m in line.sent] == [(1, 4, [1, 2, 3, 4]), (2, 1, [5]), (1, 1, [6])]


def test_hits_that_wait_are_not_joined_into_more_than_a_message_may_hold() -> None:
    transport = FakeTransport(room=0)
    outbox = Outbox(transport, messages_max=10, hits_bytes_max=100 * BYTES, hits_bytes_per_message=3 * BYTES)
    ann, a = session(), flow(1)
    for number in range(1, 6):
        outbox.send_hits(ann, a, 1, records(number))
    outbox.send_hits(ann, a, 4, records(6, 7, 8, 9))

    transport.room = 10
    outbox.flush()

    assert [numbers(message) for message in transport.sent[ann.routing_id]] == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert a.delivered == 9


def test_hits_that_wait_tell_the_losses_of_the_moment_they_leave() -> None:
    # given hits that wait, and losses after them
    line = Line(room=0, hits_max=1)
    a = flow(1)
    line.outbox.send_hits(line.session, a, 1, records(1))
    line.outbox.send_hits(line.session, a, 5, records(2, 3, 4, 5, 6))
    a.lost = 3

    # when they leave
    line.make_room(1)

    # then they carry what is known by then
    assert (line.sent[0]["lost"], line.sent[0]["dropped"]) == (3, 5)
    assert (a.delivered, a.dropped) == (1, 5)


def test_hits_beyond_the_bound_are_dropped_and_counted_to_the_hit() -> None:
    # given a session for which four hits may wait
    line = Line(room=0, hits_max=4)
    a, b = flow(1), flow(2)

    # when the bound is met exactly, nothing is dropped
    line.outbox.send_hits(line.session, a, 3, records(1, 2, 3))
    line.outbox.send_hits(line.session, b, 1, records(4))
    assert (a.delivered, a.dropped, b.delivered, b.dropped) == (3, 0, 1, 0)

    # when it is passed, all that came at once is dropped, of whichever claim
    line.outbox.send_hits(line.session, a, 2, records(5, 6))
    line.outbox.send_hits(line.session, b, 1, records(7))
    assert (a.delivered, a.dropped, b.delivered, b.dropped) == (3, 2, 1, 1)

    # and what has left makes room for as many again
    line.make_room(1)
    line.outbox.send_hits(line.session, a, 3, records(8, 9, 10))
    line.outbox.send_hits(line.session, a, 1, records(11))
    assert (a.delivered, a.dropped) == (6, 3)
    line.make_room(10)
    assert [number for m in line.sent for number in numbers(m)] == [1, 2, 3, 4, 8, 9, 10]
    line.transport.room = 0
    line.outbox.send_hits(line.session, a, 4, records(12, 13, 14, 15))
    assert a.dropped == 3


def test_hits_dropped_before_anything_waits_leave_nothing_waiting_behind() -> None:
    # given a transport without room, and more hits at once than may wait
    line = Line(room=0, hits_max=2)
    a = flow(1)

    # when they are sent
    line.outbox.send_hits(line.session, a, 3, records(1, 2, 3))

    # then they are dropped, and the next flush has nothing to send
    assert (a.delivered, a.dropped) == (0, 3)
    line.make_room(5)
    assert line.sent == []
    assert not line.outbox.is_waiting


def test_a_session_that_leaves_too_many_messages_unread_is_named_once() -> None:
    # given a session for which two messages may wait, and hits beside them
    line = Line(room=0, messages_max=2)
    line.outbox.send_hits(line.session, flow(1), 1, records(1))
    line.outbox.send(line.session, Bye(1))
    line.outbox.send_hits(line.session, flow(1), 1, records(2))
    line.outbox.send(line.session, lost(1))
    assert line.outbox.overrun == []

    # when more pile up
    line.outbox.send(line.session, Bye(3))
    line.outbox.send(line.session, Bye(4))

    # then it is to be ended, once
    assert line.outbox.overrun == [line.session]


def test_messages_that_have_left_count_no_more() -> None:
    line = Line(room=0, messages_max=2)
    for number in range(2):
        line.outbox.send(line.session, Bye(number))
    line.make_room(1)

    line.outbox.send(line.session, Bye(3))
    assert line.outbox.overrun == []

    line.outbox.send(line.session, Bye(4))
    assert line.outbox.overrun == [line.session]


def test_a_slow_reader_does_not_slow_another() -> None:
    # given one session that reads and one that does not
    line = Line(room=1)
    other = session(2)
    line.outbox.send(line.session, Bye(1))
    line.outbox.send(line.session, Bye(2))

    # when the other is sent something
    line.outbox.send(other, Closing(sentence="over"))

    # then it leaves at once, under a number of its own
    assert line.transport.sent[other.routing_id] == [{"op": "closing", "n": 1, "sentence": "over"}]
    assert line.outbox.is_waiting_for(line.session)
    assert not line.outbox.is_waiting_for(other)


def test_nothing_is_sent_to_a_session_that_is_forgotten() -> None:
    line = Line(room=0)
    line.outbox.send(line.session, Bye(1))

    line.outbox.forget(line.session)
    line.outbox.forget(line.session)
    line.make_room(5)

    assert line.sent == []
    assert not line.outbox.is_waiting


def test_the_last_word_to_a_session_that_does_not_read_takes_the_place_of_all_that_waited() -> None:
    # given a session that was sent a notice, and for which more waits
    line = Line(room=1, messages_max=2)
    line.outbox.send(line.session, lost(1))
    line.outbox.send_hits(line.session, flow(1), 1, records(1))
    for number in range(3):
        line.outbox.send(line.session, Bye(number))

    # when it is over, and one word is left for it
    line.outbox.forget(line.session)
    line.outbox.leave_word(line.session, Closing(sentence="over"))
    assert line.outbox.is_waiting

    # then that is what it reads next, under the next number
    line.make_room(5)
    assert line.sent[1:] == [{"op": "closing", "n": 2, "sentence": "over"}]
    assert not line.outbox.is_waiting


@pytest.mark.parametrize("room", [0, 1])
def test_a_stranger_gets_its_reply_or_does_not(room: int) -> None:
    line = Line(room=room)

    line.outbox.reply_to_stranger(b"\0stranger", Bye(1))

    assert line.transport.sent[b"\0stranger"] == [{"op": "bye", "id": 1}][:room]
    assert not line.outbox.is_waiting


operations = st.lists(
    st.one_of(
        st.tuples(st.just("reply"), st.just(0), st.just(0)),
        st.tuples(st.just("lost"), st.just(0), st.just(0)),
        st.tuples(st.just("hits"), st.integers(0, 1), st.integers(1, 6)),
        st.tuples(st.just("hits"), st.integers(0, 1), st.integers(1, 6)),
        st.tuples(st.just("room"), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@given(operations, st.integers(0, 5), st.integers(4, 12))
def test_whatever_is_sent_arrives_in_its_order_or_is_counted_as_dropped(
    todo: list[tuple[str, int, int]], room: int, hits_max: int
) -> None:
    # given a transport that gets full, and now and then has room again
    line = Line(room=room, hits_max=hits_max)
    flows = [flow(0), flow(1)]
    accepted: list[tuple[str, int]] = []  # what must arrive, in order
    sent_hits = [0, 0]
    for number, (what, which, count) in enumerate(todo):
        match what:
            case "reply":
                line.outbox.send(line.session, Bye(number))
                accepted.append(("bye", number))
            case "lost":
                line.outbox.send(line.session, lost(number))
                accepted.append(("lost", number))
            case "hits":
                mine = [1000 * number + hit for hit in range(count)]
                dropped_before = flows[which].dropped
                line.outbox.send_hits(line.session, flows[which], count, records(*mine))
                sent_hits[which] += count
                if flows[which].dropped == dropped_before:
                    accepted += [("hits", hit) for hit in mine]
                else:
                    assert flows[which].dropped == dropped_before + count
            case "room":
                line.make_room(which)
        assert [claim.delivered + claim.dropped for claim in flows] == sent_hits
        waiting = [token for token in accepted[arrived_so_far(line.sent) :] if token[0] == "hits"]
        assert len(waiting) <= hits_max

    # when it has room for all
    line.make_room(1000)

    # then everything that was not dropped has arrived, in order, and notices are numbered without a gap
    arrived = [token for message in line.sent for token in tokens(message)]
    assert arrived == accepted
    notices = [message["n"] for message in line.sent if "n" in message]
    assert notices == list(range(1, len(notices) + 1))
    assert all(message["count"] == len(numbers(message)) for message in line.sent if message["op"] == "hits")


def tokens(message: dict[str, Any]) -> list[tuple[str, int]]:
    if message["op"] == "hits":
        return [("hits", number) for number in numbers(message)]
    return [(message["op"], message["id"] if message["op"] == "bye" else message["claim"])]


def arrived_so_far(sent: list[dict[str, Any]]) -> int:
    return sum(len(tokens(message)) for message in sent)
