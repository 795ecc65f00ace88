"""The hands of the core: each effect, what it does to the machine, whom it tells, and what it answers."""

from __future__ import annotations

import errno
import os
import random
import select
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from hwbpd.core.effects import Arm, Disarm, End, Ended, Grant, Refuse, Route, Unroute
from hwbpd.core.errors import Holder, NoFreeSlot
from hwbpd.core.events import Armed, ArmFailed, Disarmed
from hwbpd.core.model import (
    Access,
    Claim,
    Delivery,
    Kind,
    Mode,
    Owner,
    Piece,
    Plan,
    Pool,
    Resource,
    Span,
    Target,
    Totals,
)
from hwbpd.hits import Hits
from hwbpd.outbox import Outbox
from hwbpd.peers import Connection, Peer
from hwbpd.performer import Performer
from hwbpd.sessions import Session, Sessions
from tests.fakes import RECORD, FakeClock, FakeMachine, FakeTransport
from tests.slow_model import Event

MODE = Mode(ring_bytes=4096)
NOWHERE = Owner(99, 99, 0, 0, "gone")


class FakeWatch:
    """Remembers what is polled, and sees that it can be."""

    def __init__(self) -> None:
        self.polled: dict[int, Sequence[int]] = {}

    def begin(self, resource_id: int, descriptors: Sequence[int]) -> None:
        self.polled[resource_id] = descriptors

    def end(self, resource_id: int) -> None:
        epoll = select.epoll()
        for fd in self.polled.pop(resource_id, ()):
            epoll.register(fd)  # fails for one that is closed already
        epoll.close()


class Stage:
    """A performer with a machine of two CPUs with four slots, and two sessions."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.machine = FakeMachine({Pool.ANY: 4}, 2, random.Random(0))
        self.transport = FakeTransport()
        self.sessions = Sessions()
        outbox = Outbox(self.transport, messages_max=10, hits_bytes_max=2**20)
        self.hits = Hits(self.machine, self.sessions, outbox, 4096)
        self.watch = FakeWatch()
        self.performer = Performer(self.machine, self.sessions, outbox, self.hits, self.watch, self.clock)
        self.ann, self.bob = self.open(1), self.open(2)

    def open(self, number: int) -> Session:
        pidfd = os.eventfd(0, os.EFD_CLOEXEC)
        return self.sessions.open(b"\0" + bytes([number]), Connection(number, ""), Peer(number, 0, 0, "gdb", pidfd))

    def sent(self, session: Session) -> list[dict[str, Any]]:
        return self.transport.sent.get(session.routing_id, [])

    def armed(self, *resource_ids: int, claim: Claim) -> None:
        """Bring resources to where their hits flow."""
        assert isinstance(self.performer.perform(Arm(claim.claim_id, resources(*resource_ids, mode=claim.mode))), Armed)
        for resource_id in resource_ids:
            assert self.performer.perform(Route(resource_id, claim)) is None

    def ended(self, how: End, claim: Claim, totals: Totals, asked_by: Owner | None = None) -> None:
        assert self.performer.perform(Ended(claim, how, "because", totals, asked_by, 55)) is None

    def close(self) -> None:
        self.machine.close()
        for session in self.sessions:
            self.sessions.close(session)


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def piece(number: int) -> Piece:
    return Piece(Span(0x1000 * number, 8), Access.WRITE, Pool.ANY)


def resources(*resource_ids: int, mode: Mode = MODE) -> tuple[Resource, ...]:
    return tuple(Resource(resource_id, piece(resource_id), Target(), mode) for resource_id in resource_ids)


def claim_of(session: Session, mode: Mode = MODE) -> Claim:
    return Claim(7, session.owner, Kind.PERF, Span(0x1000, 8), Access.WRITE, mode, Target(), "", 0)


def test_every_slot_is_armed_before_that_is_said(stage: Stage) -> None:
    stage.clock.wind(3)

    outcome = stage.performer.perform(Arm(7, resources(1, 2)))

    assert outcome == Armed(stage.clock.now_ns(), 7)
    assert sorted(stage.machine.armed) == [1, 2]
    assert stage.watch.polled == {}, "hits have nowhere to go yet"


def test_one_slot_refused_is_none_armed(stage: Stage) -> None:
    # given somebody outside who leaves room for one slot on CPU 1
    stage.machine.kernel.held[-1] = [Event(None, 1, Pool.ANY)] * 3

    # when two are to be armed
    outcome = stage.performer.perform(Arm(7, resources(1, 2)))

    # then the first is given back, and the answer says which leg was refused, and how
    assert outcome == ArmFailed(stage.clock.now_ns(), 7, errno.ENOSPC, cpu=1, tid=None)
    assert stage.machine.armed == {}
    assert list(stage.machine.kernel.held) == [-1]


def test_hits_flow_from_the_route_to_its_end(stage: Stage) -> None:
    # given an armed slot
    claim = claim_of(stage.ann)
    stage.performer.perform(Arm(7, resources(1)))

    # when it has a route, its descriptors are polled, and what is drained goes to the owner
    assert stage.performer.perform(Route(1, claim)) is None
    assert stage.watch.polled == {1: stage.machine.descriptors(1)}
    stage.machine.hit(1, 2)
    stage.hits.drain(1)
    assert [message["count"] for message in stage.sent(stage.ann)] == [2]

    # and when it has none, nothing does
    assert stage.performer.perform(Unroute(1, 7)) is None
    stage.machine.hit(1, 1)
    stage.hits.drain(1)
    assert len(stage.sent(stage.ann)) == 1


def test_to_disarm_delivers_what_is_left_and_adds_up_every_slot(stage: Stage) -> None:
    # given two slots of one claim, with hits that nobody has drained, and one of them with losses
    stage.armed(1, 2, claim=claim_of(stage.ann))
    room = MODE.ring_bytes // RECORD.size
    stage.machine.hit(1, room + 3)
    stage.machine.hit(2, 4)

    # when they are disarmed
    outcome = stage.performer.perform(Disarm(7, (1, 2)))

    # then nothing is polled or armed, the hits are on their way, and the answer has the final counts
    assert outcome == Disarmed(stage.clock.now_ns(), 7, Totals(hits=room + 7, lost=3))
    assert (stage.watch.polled, stage.machine.armed) == ({}, {})
    assert [message["count"] for message in stage.sent(stage.ann)] == [room, 4]


def test_a_grant_says_what_the_slots_hold(stage: Stage) -> None:
    claim = claim_of(stage.ann)

    assert stage.performer.perform(Grant(claim, 55, Plan((piece(1), piece(2))))) is None

    pieces = [{"address": 0x1000 * number, "length": 8, "access": "w", "pool": "any"} for number in (1, 2)]
    assert stage.sent(stage.ann) == [{"op": "granted", "id": 55, "claim": 7, "pieces": pieces, "ring_bytes": 4096}]


def test_a_refusal_carries_its_errno_its_sentence_and_its_holders(stage: Stage) -> None:
    holder = Holder(812, "gdb", 0, "ptrace", 4, "on tid 812", (3, 4))

    stage.performer.perform(Refuse(stage.ann.owner, 55, NoFreeSlot("no slot on tid 812", (holder,)), 7))

    (error,) = stage.sent(stage.ann)
    assert (error["id"], error["errno"], error["sentence"], error["claim"]) == (55, "ENOSPC", "no slot on tid 812", 7)
    assert error["holders"] == [
        {"pid": 812, "comm": "gdb", "uid": 0, "kind": "ptrace", "slots": 4, "place": "on tid 812"}
        | {"claim_ids": [3, 4], "evidence": "books"}
    ]


def test_who_releases_its_claim_gets_the_final_counts_in_the_reply(stage: Stage) -> None:
    # given a claim with hits delivered, dropped and lost
    claim = claim_of(stage.ann)
    stage.performer.perform(Route(stage_armed(stage), claim))
    flow = stage.hits.flow(7)
    flow.delivered, flow.dropped = 5, 2

    # when its owner has released it
    stage.ended(End.RELEASED, claim, Totals(hits=10, lost=3), asked_by=stage.ann.owner)

    # then there is one reply, and no account any more
    assert stage.sent(stage.ann) == [
        {"op": "released", "id": 55, "claim": 7, "hits": 10, "delivered": 5, "lost": 3, "dropped": 2}
    ]
    with pytest.raises(KeyError):
        stage.hits.flow(7)


def stage_armed(stage: Stage) -> int:
    stage.performer.perform(Arm(7, resources(1)))
    return 1


def test_who_loses_its_claim_to_an_operator_is_told_and_so_is_the_operator(stage: Stage) -> None:
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)

    stage.ended(End.FORCED, claim, Totals(), asked_by=stage.bob.owner)

    counts = {"claim": 7, "hits": 0, "delivered": 0, "lost": 0, "dropped": 0}
    assert stage.sent(stage.ann) == [{"op": "lost", "n": 1, "reason": "forced", "sentence": "because", **counts}]
    assert stage.sent(stage.bob) == [{"op": "released", "id": 55, **counts}]


def test_who_loses_its_claim_with_the_thread_is_told(stage: Stage) -> None:
    claim = claim_of(stage.ann, Mode(delivery=Delivery.COUNT))
    stage.armed(1, claim=claim)

    stage.ended(End.EXIT, claim, Totals(hits=9))

    assert stage.sent(stage.ann) == [
        {"op": "lost", "n": 1, "claim": 7, "reason": "exit", "sentence": "because"}
        | {"hits": 9, "delivered": 0, "lost": 0, "dropped": 0}
    ]


@pytest.mark.parametrize("how", [End.SESSION, End.STOPPING])
def test_at_the_end_of_a_session_or_the_daemon_no_claim_is_told_of_apart(stage: Stage, how: End) -> None:
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)

    stage.ended(how, claim, Totals())

    assert stage.sent(stage.ann) == []


def test_nobody_is_told_where_nobody_is_left(stage: Stage) -> None:
    # given a claim whose session is over
    claim = Claim(7, NOWHERE, Kind.PERF, Span(0x1000, 8), Access.WRITE, MODE, Target(), "", 0)
    stage.armed(1, claim=claim)

    # when there is something to tell
    stage.performer.perform(Grant(claim, 55, Plan((piece(1),))))
    stage.performer.perform(Refuse(NOWHERE, 55, NoFreeSlot("no slot")))
    stage.ended(End.EXIT, claim, Totals(), asked_by=NOWHERE)

    # then it is told to nobody
    assert stage.transport.sent == {}


def test_an_account_that_does_not_add_up_is_our_own_mistake(stage: Stage) -> None:
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)

    with pytest.raises(AssertionError):
        stage.ended(End.EXIT, claim, Totals(hits=1))
