"""The hands of the core: each effect, what it does to the machine, whom it tells, and what it answers."""

from __future__ import annotations

import errno
import os
import random
import select
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from hwbpd import page_layout
from hwbpd.attribution import Place
from hwbpd.core.effects import (
    AddLeg,
    Arm,
    Attend,
    Attribute,
    Change,
    Disarm,
    Done,
    DropLeg,
    End,
    Ended,
    Grant,
    Handover,
    Probe,
    Queued,
    Rearm,
    RearmDone,
    Refuse,
    Route,
    Silence,
    Suspend,
    Tell,
    TopUp,
    Unroute,
)
from hwbpd.core.errors import HeldBack, Holder, NoFreeSlot
from hwbpd.core.events import (
    AnyEvent,
    Armed,
    ArmFailed,
    Disarmed,
    ForeignFound,
    FuseBlown,
    HitsCounted,
    LegRefused,
    LegTaken,
    Probed,
    Rearmed,
    RearmFailed,
    Suspended,
    TargetEnded,
)
from hwbpd.core.model import (
    Access,
    ArmedBy,
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
from hwbpd.followers import Decisions
from hwbpd.hits import Hits
from hwbpd.hookspecs import ArmError, Foreign, TargetEnd
from hwbpd.outbox import Outbox
from hwbpd.peers import Connection, Peer
from hwbpd.performer import Performer
from hwbpd.sessions import Session, Sessions
from hwbpd.status_page import StatusPage
from tests.fakes import RECORD, FakeClock, FakeMachine, FakeRights, FakeTransport, LaterAttribution
from tests.slow_model import Event

EVERYWHERE = Target()
MODE = Mode(ring_bytes=4096)
ROOM = MODE.ring_bytes // RECORD.size  # hits in a ring
NOWHERE = Owner(99, 99, 0, 0, "gone")


class FakeWatch:
    """Remembers what is polled, and sees that it can be."""

    def __init__(self) -> None:
        self.polled: dict[int, Sequence[int]] = {}
        self.counted: set[int] = set()  # those to be looked at without being woken
        self.begun = 0

    def begin(self, resource_id: int, descriptors: Sequence[int], counted: bool = False) -> None:
        assert resource_id not in self.polled, "what it polls is not what there is now"
        self.polled[resource_id] = descriptors
        if counted:
            self.counted.add(resource_id)
        self.begun += 1

    def end(self, resource_id: int) -> None:
        self.counted.discard(resource_id)
        epoll = select.epoll()
        for fd in self.polled.pop(resource_id, ()):
            epoll.register(fd)  # fails for one that is closed already
        epoll.close()


class FakeKgdb:
    """Remembers which claims have registers, whatever their kind."""

    def __init__(self) -> None:
        self.having: set[int] = set()

    def kgdb_has(self, claim: Claim) -> None:
        self.having.add(claim.claim_id)

    def kgdb_has_not(self, claim_id: int) -> None:
        self.having.discard(claim_id)


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
        self.rights = FakeRights(self.machine)
        self.attribution = LaterAttribution(self.machine)
        self.came_later: list[AnyEvent] = []
        self.kgdb = FakeKgdb()
        self.page = StatusPage(memoryview(bytearray(page_layout.BYTES)).cast("Q"), epoch=7)
        self.performer = Performer(
            machine=self.machine,
            sessions=self.sessions,
            rights=self.rights,
            outbox=outbox,
            decisions=Decisions(outbox, self.clock, followers_per_uid=1),
            hits=self.hits,
            attribution=self.attribution,
            page=self.page,
            watch=self.watch,
            clock=self.clock,
            kgdb=self.kgdb,
            later=self.came_later.append,
        )
        self.ann, self.bob = self.open(1), self.open(2)

    def open(self, number: int, uid: int = 0) -> Session:
        pidfd = os.eventfd(0, os.EFD_CLOEXEC)
        peer = Peer(number, uid, uid, "gdb", pidfd)
        return self.sessions.open(b"\0" + bytes([number]), Connection(number, ""), peer)

    def sent(self, session: Session) -> list[dict[str, Any]]:
        return self.transport.sent.get(session.routing_id, [])

    def armed(self, *resource_ids: int, claim: Claim) -> None:
        """Bring resources to where their hits flow."""
        of_claim = resources(*resource_ids, mode=claim.mode, target=claim.target)
        assert isinstance(self.performer.perform(Arm(claim, of_claim)), Armed)
        for resource_id in resource_ids:
            assert self.performer.perform(Route(resource_id, claim)) is None

    def ended(self, how: End, claim: Claim, totals: Totals, asked_by: Owner | None = None) -> None:
        assert self.performer.perform(Ended(claim, how, "because", totals, asked_by, 55)) is None

    def close(self) -> None:
        self.attribution.close()
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


def resources(*resource_ids: int, mode: Mode = MODE, target: Target = EVERYWHERE) -> tuple[Resource, ...]:
    return tuple(Resource(resource_id, piece(resource_id), target, mode) for resource_id in resource_ids)


def claim_of(session: Session, mode: Mode = MODE, target: Target = EVERYWHERE) -> Claim:
    return Claim(7, session.owner, Kind.PERF, Span(0x1000, 8), Access.WRITE, mode, target, "", 0)


def test_every_slot_is_armed_before_that_is_said(stage: Stage) -> None:
    stage.clock.wind(3)

    outcome = stage.performer.perform(Arm(claim_of(stage.ann), resources(1, 2)))

    assert outcome == Armed(stage.clock.now_ns(), 7)
    assert sorted(stage.machine.armed) == [1, 2]
    assert stage.watch.polled == {}, "hits have nowhere to go yet"


def test_one_slot_refused_is_none_armed(stage: Stage) -> None:
    # given somebody outside who leaves room for one slot on CPU 1
    stage.machine.kernel.held[-1] = [Event(None, 1, Pool.ANY)] * 3

    # when two are to be armed
    outcome = stage.performer.perform(Arm(claim_of(stage.ann), resources(1, 2)))

    # then the first is given back, and the answer says which leg was refused, and how
    assert outcome == ArmFailed(stage.clock.now_ns(), 7, errno.ENOSPC, cpu=1, tid=None)
    assert stage.machine.armed == {}
    assert list(stage.machine.kernel.held) == [-1]


def test_hits_flow_from_the_route_to_its_end(stage: Stage) -> None:
    # given an armed slot
    claim = claim_of(stage.ann)
    stage.performer.perform(Arm(claim, resources(1)))

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
    stage.machine.hit(1, ROOM + 3)
    stage.machine.hit(2, 4)

    # when they are disarmed
    outcome = stage.performer.perform(Disarm(7, (1, 2)))

    # then nothing is polled or armed, the hits are on their way, and the answer has the final counts
    assert outcome == Disarmed(stage.clock.now_ns(), 7, Totals(hits=ROOM + 7, lost=3))
    assert (stage.watch.polled, stage.machine.armed) == ({}, {})
    assert [message["count"] for message in stage.sent(stage.ann)] == [ROOM, 4]


def test_a_grant_says_what_the_slots_hold(stage: Stage) -> None:
    claim = claim_of(stage.ann, Mode(ring_bytes=4096, fuse_hits=500))

    assert stage.performer.perform(Grant(claim, 55, Plan((piece(1), piece(2))))) is None

    pieces = [{"address": 0x1000 * number, "length": 8, "access": "w", "pool": "any"} for number in (1, 2)]
    assert stage.sent(stage.ann) == [
        {"op": "granted", "id": 55, "claim": 7, "pieces": pieces, "ring_bytes": 4096, "kind": "perf", "guard": 500}
    ]


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
    # given a claim with hits delivered and lost
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)
    stage.machine.hit(1, ROOM + 3)
    outcome = stage.performer.perform(Disarm(7, (1,)))
    assert outcome == Disarmed(stage.clock.now_ns(), 7, Totals(hits=ROOM + 3, lost=3))

    # when its owner has released it
    stage.ended(End.RELEASED, claim, Totals(hits=ROOM + 3, lost=3), asked_by=stage.ann.owner)

    # then there is one reply, and no account any more
    hits, released = stage.sent(stage.ann)
    assert (hits["count"], hits["lost"]) == (ROOM, 3)
    assert released == {"op": "released", "id": 55, "claim": 7} | {
        "hits": ROOM + 3,
        "delivered": ROOM,
        "lost": 3,
        "dropped": 0,
    }
    assert stage.hits.final(7) == Totals()


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
    stage.machine.hit(1, 9)
    stage.performer.perform(Disarm(7, (1,)))

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
    # given a machine that has counted a hit which came out of no ring
    stage.armed(1, claim=claim_of(stage.ann))
    stage.machine.armed[1].hits += 1

    with pytest.raises(AssertionError, match="resource 1"):
        stage.performer.perform(Disarm(7, (1,)))


# --- may it still? ---------------------------------------------------------------------------------------------------


def test_a_slot_on_a_thread_that_became_privileged_meanwhile_is_given_back_before_anything_is_told(
    stage: Stage,
) -> None:
    # given a thread that runs another program while slots on it are taken, and somebody who may not watch that
    stage.machine.start_task(812)
    nobody = stage.open(3, uid=1000)
    stage.rights.about_to_exec = {812}
    target = Target(stage.machine.task(812))

    # when its claim is armed
    outcome = stage.performer.perform(
        Arm(claim_of(nobody, target=target), resources(1, 2, target=target))
    )

    # then nothing is held, and the answer has the reason
    sentence = "uid 1000 may not watch tid 812"
    assert outcome == ArmFailed(stage.clock.now_ns(), 7, errno.EPERM, None, None, sentence=sentence)
    assert (stage.machine.armed, stage.machine.kernel.events(), stage.watch.polled) == ({}, [], {})
    assert stage.transport.sent == {}


def test_who_may_still_has_its_slots_and_so_has_who_was_privileged_when_it_asked(stage: Stage) -> None:
    stage.machine.start_task(812)
    nobody = stage.open(3, uid=1000)
    target = Target(stage.machine.task(812))
    claim = claim_of(nobody, target=target)
    assert isinstance(stage.performer.perform(Arm(claim, resources(1, target=target))), Armed)

    stage.rights.forbidden = {812}
    privileged = msgspec.structs.replace(claim, privileged=True)
    assert isinstance(stage.performer.perform(Arm(privileged, resources(2, target=target))), Armed)


def test_with_too_few_descriptors_the_answer_says_how_many(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ArmError(errno.EMFILE, tid=812, needed=3000, allowed=500)

    monkeypatch.setattr(stage.machine, "arm", refuse)

    outcome = stage.performer.perform(Arm(claim_of(stage.ann), resources(1)))

    assert outcome == ArmFailed(stage.clock.now_ns(), 7, errno.EMFILE, None, 812, needed=3000, allowed=500)


# --- several on one slot ---------------------------------------------------------------------------------------------


def of_bob(claim: Claim, stage: Stage) -> Claim:
    return msgspec.structs.replace(claim, claim_id=8, owner=stage.bob.owner)


def test_who_joins_an_armed_slot_has_no_hit_from_before_and_the_guard_hears_of_those(stage: Stage) -> None:
    # given a slot with hits that nobody has drained
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)
    stage.machine.hit(1, 4)
    begun = stage.watch.begun

    # when another claim is routed there
    outcome = stage.performer.perform(Route(1, of_bob(claim, stage)))

    # then they have gone to the first only, the core hears of them, and the slot is polled as it was
    assert outcome == HitsCounted(stage.clock.now_ns(), 1, 4, 0)
    assert [message["count"] for message in stage.sent(stage.ann)] == [4]
    assert stage.sent(stage.bob) == []
    assert (stage.watch.begun, sorted(stage.watch.polled)) == (begun, [1])


def test_who_leaves_a_shared_slot_gets_its_last_hits_and_the_slot_stays_as_it_is(stage: Stage) -> None:
    # given two claims on a slot, of which one has a slot of its own beside it
    claim = claim_of(stage.ann)
    stage.armed(1, 2, claim=claim)
    stage.performer.perform(Route(1, of_bob(claim, stage)))
    stage.machine.hit(1, 3)
    stage.machine.hit(2, 5)

    # when it ends
    outcome = stage.performer.perform(Disarm(7, (2,), shared=(1,)))

    # then its counts are of both, and the other has had the same hits of the shared one, of which the core hears
    assert outcome == Disarmed(stage.clock.now_ns(), 7, Totals(hits=8))
    assert stage.came_later == [HitsCounted(stage.clock.now_ns(), 1, 3, 0)]
    assert [message["count"] for message in stage.sent(stage.bob)] == [3]

    # and the shared slot goes on for the other alone
    assert (sorted(stage.machine.armed), sorted(stage.watch.polled)) == ([1], [1])
    assert stage.page.count(0, None) == (1, 1)
    stage.machine.hit(1, 2)
    outcome = stage.performer.perform(Disarm(8, (1,)))
    assert outcome == Disarmed(stage.clock.now_ns(), 8, Totals(hits=5))
    assert len(stage.sent(stage.ann)) == 2


def test_a_refill_for_a_slot_that_was_given_back_meanwhile_is_nothing(stage: Stage) -> None:
    stage.armed(1, claim=claim_of(stage.ann, FUSED))
    stage.performer.perform(Disarm(7, (1,)))

    assert stage.performer.perform(TopUp(1, 5)) is None


def test_a_claim_that_gives_way_gives_everything_back_and_counts_on_when_it_is_armed_again(stage: Stage) -> None:
    # given a claim with hits, some of them not drained
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)
    stage.machine.hit(1, 2)
    stage.hits.drain(1)
    stage.machine.hit(1, 1)

    # when it gives way
    outcome = stage.performer.perform(Suspend(7, (1,)))

    # then the slot is free, nobody polls it, the page does not show it, and all hits are on their way
    assert outcome == Suspended(stage.clock.now_ns(), 7)
    assert (stage.machine.armed, stage.machine.kernel.events(), stage.watch.polled) == ({}, [], {})
    assert stage.page.count(0, None) == (0, 0)
    assert [message["count"] for message in stage.sent(stage.ann)] == [2, 1]

    # and when it is armed again and ends, its account is of both times
    stage.armed(2, claim=claim)
    stage.machine.hit(2, 4)
    outcome = stage.performer.perform(Disarm(7, (2,)))
    assert outcome == Disarmed(stage.clock.now_ns(), 7, Totals(hits=7))
    stage.ended(End.RELEASED, claim, Totals(hits=7), asked_by=stage.ann.owner)
    assert stage.sent(stage.ann)[-1]["delivered"] == 7


def test_the_page_shows_a_slot_until_it_has_been_given_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.armed(1, claim=claim_of(stage.ann))
    disarm = stage.machine.disarm
    shown = []

    def look(resource_id: int) -> Any:
        shown.append(stage.page.count(0, None))
        return disarm(resource_id)

    monkeypatch.setattr(stage.machine, "disarm", look)
    stage.performer.perform(Suspend(7, (1,)))

    assert (shown, stage.page.count(0, None)) == ([(1, 1)], (0, 0))


# --- tracers ---------------------------------------------------------------------------------------------------------

HOLD = Mode(delivery=Delivery.HOLD)


def on_a_thread(stage: Stage) -> tuple[Claim, tuple[Resource, ...]]:
    """A tracer's claim for two slots of a thread."""
    stage.machine.start_task(812)
    target = Target(stage.machine.task(812))
    claim = msgspec.structs.replace(claim_of(stage.ann, HOLD, target), armed_by=ArmedBy.TRACER)
    return claim, resources(1, 2, mode=HOLD, target=target)


def test_a_place_is_held_for_a_tracer_until_it_takes_it_and_the_thread_attended_to_then(stage: Stage) -> None:
    # given two places that are held
    claim, both = on_a_thread(stage)
    assert stage.performer.perform(Arm(claim, both)) == Armed(stage.clock.now_ns(), 7)
    assert (len(stage.machine.kernel.events()), sorted(stage.watch.polled)) == (2, [1, 2])
    assert stage.page.count(None, claim.target.task) == (2, 0)

    # when the tracer is about to take them
    assert stage.performer.perform(Handover(7, (1, 2))) is None

    # then they are free in the kernel, and on the page
    assert stage.machine.kernel.events() == []
    assert stage.page.count(None, claim.target.task) == (0, 0)
    stage.machine.poke(812)
    stage.machine.poke(812)

    # and what becomes of the thread is still noticed, until they are given back
    assert sorted(stage.watch.polled) == [1, 2]
    stage.machine.exit_task(812)
    assert stage.machine.end_of_target(1) is TargetEnd.EXIT
    assert stage.performer.perform(Disarm(7, (1, 2))) == Disarmed(stage.clock.now_ns(), 7, Totals())
    assert (stage.machine.armed, stage.watch.polled) == ({}, {})


def test_a_thread_that_is_gone_before_its_tracer_takes_it_has_ended(stage: Stage) -> None:
    # given a place on a thread that exits unnoticed
    claim, (one, _) = on_a_thread(stage)
    stage.performer.perform(Arm(claim, (one,)))
    stage.machine.exit_task(812)

    # when its tracer is about to take it, then the core hears of the end
    assert stage.performer.perform(Handover(7, (1,))) == TargetEnded(stage.clock.now_ns(), 1, execed=False)
    assert (stage.machine.armed, stage.watch.polled) == ({}, {})

    # and nothing is left to be given back
    assert stage.performer.perform(Disarm(7, (1,))) == Disarmed(stage.clock.now_ns(), 7, Totals())


def test_a_place_that_is_held_may_be_given_up_for_others(stage: Stage) -> None:
    claim, both = on_a_thread(stage)
    stage.performer.perform(Arm(claim, both))

    assert stage.performer.perform(Suspend(7, (1, 2))) == Suspended(stage.clock.now_ns(), 7)

    assert (stage.machine.kernel.events(), stage.watch.polled) == ([], {})
    assert stage.page.count(None, claim.target.task) == (0, 0)


def test_without_a_placeholder_the_thread_is_attended_to_at_once(stage: Stage) -> None:
    claim, both = on_a_thread(stage)

    assert stage.performer.perform(Attend(claim, both)) == Armed(stage.clock.now_ns(), 7)

    assert (stage.machine.kernel.events(), sorted(stage.watch.polled)) == ([], [1, 2])
    assert stage.page.count(None, claim.target.task) == (0, 0)
    assert stage.performer.perform(Disarm(7, (1, 2))) == Disarmed(stage.clock.now_ns(), 7, Totals())


def test_who_may_not_watch_a_thread_does_not_trace_it_either(stage: Stage) -> None:
    claim, both = on_a_thread(stage)
    nobody = stage.open(3, uid=1000)
    stage.rights.about_to_exec = {812}

    outcome = stage.performer.perform(Attend(msgspec.structs.replace(claim, owner=nobody.owner), both))

    assert isinstance(outcome, ArmFailed)
    assert (outcome.errno, stage.machine.armed, stage.watch.polled) == (errno.EPERM, {}, {})


def test_a_thread_that_is_gone_cannot_be_attended_to(stage: Stage) -> None:
    claim, both = on_a_thread(stage)
    stage.machine.exit_task(812)

    assert stage.performer.perform(Attend(claim, both)) == ArmFailed(
        stage.clock.now_ns(), 7, errno.ESRCH, None, 812
    )
    assert stage.machine.armed == {}


@pytest.mark.parametrize(("known", "has_slot"), [(0, True), (1, True), (2, False), (3, False)])
def test_whether_a_thread_has_a_slot_of_its_tracer_is_seen_beside_those_that_are_known(
    stage: Stage, known: int, has_slot: bool
) -> None:
    claim, (one, _) = on_a_thread(stage)
    stage.performer.perform(Arm(claim, (one,)))
    stage.machine.poke(812)
    stage.machine.poke(812)

    outcome = stage.performer.perform(Probe(7, claim.target, Pool.ANY, known))

    assert outcome == Probed(stage.clock.now_ns(), 7, has_slot)


def test_where_it_cannot_be_seen_the_thread_has_it(stage: Stage) -> None:
    claim, _ = on_a_thread(stage)
    stage.machine.exit_task(812)

    assert stage.performer.perform(Probe(7, claim.target, Pool.ANY, 0)) == Probed(stage.clock.now_ns(), 7, True)


# --- too many hits ---------------------------------------------------------------------------------------------------

FUSED = Mode(ring_bytes=4096, fuse_hits=10)


def test_a_fuse_is_topped_up_and_one_that_has_blown_is_told_of(stage: Stage) -> None:
    # given a slot that stops by itself after ten hits
    stage.armed(1, claim=claim_of(stage.ann, FUSED))
    stage.machine.hit(1, 7)

    # when it is topped up in time, it lets so many more through
    assert stage.performer.perform(TopUp(1, 5)) is None
    stage.machine.hit(1, 100)
    assert stage.machine.totals(1).hits == 15

    # and when it is too late, that is the answer
    assert stage.performer.perform(TopUp(1, 5)) == FuseBlown(stage.clock.now_ns(), 1)
    stage.machine.hit(1, 100)
    assert stage.machine.totals(1).hits == 15


def test_to_silence_stops_every_slot_and_gives_none_back(stage: Stage) -> None:
    stage.armed(1, 2, claim=claim_of(stage.ann))
    held = stage.machine.kernel.events()

    assert stage.performer.perform(Silence((1, 2))) is None

    for resource_id in (1, 2):
        stage.machine.hit(resource_id, 5)
        assert stage.machine.totals(resource_id).hits == 0
    assert stage.machine.kernel.events() == held
    assert sorted(stage.watch.polled) == [1, 2]


def test_to_arm_again_lets_every_slot_report_and_polls_what_there_is_then(stage: Stage) -> None:
    # given a claim of two slots that has been silenced
    stage.armed(1, 2, claim=claim_of(stage.ann, FUSED))
    stage.performer.perform(Silence((1, 2)))
    begun = stage.watch.begun

    # when it is armed again
    assert stage.performer.perform(Rearm(7, (1, 2), 3)) == Rearmed(stage.clock.now_ns(), 7)

    # then each reports up to its new fuse, and is polled anew: its descriptors are others now
    for resource_id in (1, 2):
        stage.machine.hit(resource_id, 5)
        assert stage.machine.totals(resource_id).hits == 3
    assert (stage.watch.begun, sorted(stage.watch.polled)) == (begun + 2, [1, 2])


def test_a_slot_that_is_lost_while_it_is_armed_again_is_told_with_its_errno_and_the_others_are_tried(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a claim of three slots, the second of which somebody takes
    stage.armed(1, 2, 3, claim=claim_of(stage.ann, FUSED))
    rearm = stage.machine.rearm
    tried = []

    def lose_the_second(resource_id: int, fuse_hits: int) -> None:
        tried.append(resource_id)
        rearm(resource_id, fuse_hits)
        if resource_id == 2:
            raise ArmError(errno.ENOSPC)

    monkeypatch.setattr(stage.machine, "rearm", lose_the_second)

    # when it is armed again
    outcome = stage.performer.perform(Rearm(7, (1, 2, 3), 3))

    # then that is the answer, and everything is still polled until it is disarmed
    assert outcome == RearmFailed(stage.clock.now_ns(), 7, errno.ENOSPC)
    assert tried == [1, 2, 3]
    assert sorted(stage.watch.polled) == [1, 2, 3]


def test_who_asked_for_it_is_told_that_it_is_done(stage: Stage) -> None:
    stage.performer.perform(RearmDone(claim_of(stage.ann), stage.bob.owner, 55))

    assert stage.sent(stage.bob) == [{"op": "rearmed", "id": 55, "claim": 7}]
    assert stage.sent(stage.ann) == []


def test_what_only_counts_with_a_fuse_is_looked_at_without_being_woken(stage: Stage) -> None:
    count, unfused = Mode(delivery=Delivery.COUNT, fuse_hits=10), Mode(delivery=Delivery.COUNT)
    stage.armed(1, claim=claim_of(stage.ann, count))
    assert stage.watch.counted == {1}

    stage.performer.perform(Rearm(7, (1,), 3))
    assert stage.watch.counted == {1}, "also once it is armed again"

    stage.performer.perform(Disarm(7, (1,)))
    stage.performer.perform(Unroute(1, 7))
    stage.armed(2, claim=claim_of(stage.ann, unfused))
    stage.armed(3, claim=claim_of(stage.ann, FUSED))
    assert stage.watch.counted == set()


# --- CPUs that come and go -------------------------------------------------------------------------------------------


def test_a_leg_goes_with_its_cpu_and_comes_back_with_it(stage: Stage) -> None:
    # given a slot on both CPUs
    stage.armed(1, claim=claim_of(stage.ann))
    begun = stage.watch.begun

    # when one goes, then its leg is given back, and what is left is polled anew
    assert stage.performer.perform(DropLeg(1, 1)) is None
    assert stage.machine.kernel.events() == [Event(None, 0, Pool.ANY)]
    assert stage.watch.begun == begun + 1

    # and when it is back, the leg is taken
    assert stage.performer.perform(AddLeg(1, 1)) == LegTaken(stage.clock.now_ns(), 1, 1)
    assert sorted(stage.machine.kernel.events(), key=lambda event: event.cpu) == [
        Event(None, 0, Pool.ANY),
        Event(None, 1, Pool.ANY),
    ]
    assert stage.watch.polled == {1: stage.machine.descriptors(1)}
    assert stage.watch.begun == begun + 2


def test_a_leg_that_is_refused_leaves_the_others_polled(stage: Stage) -> None:
    # given a slot that has lost its leg on CPU 1, where others have taken every slot
    stage.armed(1, claim=claim_of(stage.ann))
    stage.performer.perform(DropLeg(1, 1))
    stage.machine.kernel.held[-1] = [Event(None, 1, Pool.ANY)] * 4

    # when it should have the leg back
    outcome = stage.performer.perform(AddLeg(1, 1))

    # then it hears why not, and the leg on CPU 0 goes on
    assert outcome == LegRefused(stage.clock.now_ns(), 1, 1, errno.ENOSPC)
    assert stage.machine.kernel.held[1] == [Event(None, 0, Pool.ANY)]
    assert sorted(stage.watch.polled) == [1]


# --- who is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "cpu", "notice"),
    [
        (Change.SPARED, None, {"op": "spared"}),
        (Change.SUSPENDED, None, {"op": "suspended"}),
        (Change.GUARDED, None, {"op": "guarded"}),
        (Change.RESUMED, None, {"op": "resumed"}),
        (Change.RESUMED, 1, {"op": "resumed", "cpu": 1}),
        (Change.SUSPENDED, 1, {"op": "suspended", "cpu": 1}),
    ],
)
def test_an_owner_is_told_what_becomes_of_a_claim_that_goes_on(
    stage: Stage, change: Change, cpu: int | None, notice: dict[str, Any]
) -> None:
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)

    stage.performer.perform(Tell(claim, change, "because", cpu))

    assert stage.sent(stage.ann) == [{"n": 1, "claim": 7, "sentence": "because", **notice}]
    assert stage.sent(stage.bob) == []


def test_an_owner_is_told_that_a_slot_went_with_its_cpu(stage: Stage) -> None:
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)

    stage.performer.perform(Tell(claim, Change.OFFLINE, "because", 1))

    (lost,) = stage.sent(stage.ann)
    assert (lost["op"], lost["claim"], lost["reason"], lost["sentence"], lost["cpu"]) == (
        "lost",
        7,
        "offline",
        "because",
        1,
    )


BOB = Holder(2, "gdb", 0, "ptrace", 1, "on tid 812", (8,))
BOB_ON_THE_WIRE = msgspec.to_builtins(BOB) | {"claim_ids": [8]}


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        (Change.REVOKE, {"op": "revoke", "by": BOB_ON_THE_WIRE, "deadline_ns": 99}),
        (Change.CONTENDED, {"op": "contended", "by": BOB_ON_THE_WIRE}),
        (Change.FOREIGN, {"op": "foreign", "holders": [BOB_ON_THE_WIRE]}),
    ],
)
def test_an_owner_is_told_who_wants_its_slot_and_who_was_faster(
    stage: Stage, change: Change, notice: dict[str, Any]
) -> None:
    claim = claim_of(stage.ann)

    stage.performer.perform(Tell(claim, change, "because", holders=(BOB,), deadline_ns=99))

    assert stage.sent(stage.ann) == [{"n": 1, "claim": 7, "sentence": "because", **notice}]


def test_who_waits_is_told_its_place_and_what_for_and_at_last_what_it_has(stage: Stage) -> None:
    # given a claim that has to wait
    claim = claim_of(stage.ann, FUSED)
    stage.performer.perform(Queued(claim, 55, 2, HeldBack("no room yet", (BOB,))))
    assert stage.sent(stage.ann) == [
        {"op": "queued", "id": 55, "claim": 7, "position": 2, "errno": "EAGAIN", "sentence": "no room yet"}
        | {"holders": [BOB_ON_THE_WIRE]}
    ]

    # when it is granted
    stage.performer.perform(Tell(claim, Change.GRANTED, "there is room now", plan=Plan((piece(1),))))

    # then it hears what it would have heard at once
    pieces = [{"address": 0x1000, "length": 8, "access": "w", "pool": "any"}]
    assert stage.sent(stage.ann)[1:] == [
        {"op": "granted", "n": 1, "claim": 7, "pieces": pieces, "ring_bytes": 4096, "kind": "perf", "guard": 10}
    ]


@pytest.mark.parametrize("how", [End.TIMEOUT, End.REFUSED, End.TAKE_FAILED, End.REUSED])
def test_a_claim_that_never_had_a_hit_ends_with_nought(stage: Stage, how: End) -> None:
    stage.ended(how, claim_of(stage.ann), Totals())

    assert stage.sent(stage.ann) == [
        {"op": "lost", "n": 1, "claim": 7, "reason": str(how), "sentence": "because"}
        | {"hits": 0, "delivered": 0, "lost": 0, "dropped": 0}
    ]


def test_who_leaves_the_queue_is_answered(stage: Stage) -> None:
    stage.ended(End.RELEASED, claim_of(stage.ann), Totals(), asked_by=stage.ann.owner)

    assert stage.sent(stage.ann) == [
        {"op": "released", "id": 55, "claim": 7, "hits": 0, "delivered": 0, "lost": 0, "dropped": 0}
    ]


@pytest.mark.parametrize("what", ["yielded", "take", "taken", "take_failed"])
def test_a_request_that_needs_a_word_gets_it(stage: Stage, what: str) -> None:
    assert stage.performer.perform(Done(stage.ann.owner, 55, what, 7)) is None

    assert stage.sent(stage.ann) == [{"op": what, "id": 55, "claim": 7}]


def test_of_what_a_tracer_leaves_behind_nothing_was_counted(stage: Stage) -> None:
    stage.performer.perform(Done(stage.ann.owner, 55, "released", 7))

    assert stage.sent(stage.ann) == [
        {"op": "released", "id": 55, "claim": 7, "hits": 0, "delivered": 0, "lost": 0, "dropped": 0}
    ]


@pytest.mark.parametrize("change", list(Change))
def test_of_a_change_nobody_is_told_where_nobody_is_left(stage: Stage, change: Change) -> None:
    claim = Claim(7, NOWHERE, Kind.PERF, Span(0x1000, 8), Access.WRITE, MODE, Target(), "", 0)
    stage.armed(1, claim=claim)

    stage.performer.perform(Tell(claim, change, "because", 1))
    stage.performer.perform(RearmDone(claim, NOWHERE, 55))

    assert stage.transport.sent == {}


@pytest.mark.parametrize("how", [End.EXIT, End.EXEC, End.STOLEN])
def test_who_loses_its_claim_without_asking_is_told_how(stage: Stage, how: End) -> None:
    claim = claim_of(stage.ann)
    stage.armed(1, claim=claim)

    stage.ended(how, claim, Totals())

    assert [(message["op"], message["reason"]) for message in stage.sent(stage.ann)] == [("lost", str(how))]


def test_hits_of_other_processes_belong_to_the_final_account(stage: Stage) -> None:
    # given a claim that wants the hits of one process, and hits of two
    claim = claim_of(stage.ann, Mode(ring_bytes=4096, only_pid=5))
    stage.armed(1, claim=claim)
    stage.machine.hit(1, 3, pid=5)
    stage.machine.hit(1, 4, pid=6)

    # when it is released
    outcome = stage.performer.perform(Disarm(7, (1,)))
    assert isinstance(outcome, Disarmed)
    stage.ended(End.RELEASED, claim, outcome.totals, asked_by=stage.ann.owner)

    # then the reply tells them apart
    hits, released = stage.sent(stage.ann)
    assert hits["count"] == 3
    assert released == {"op": "released", "id": 55, "claim": 7} | {
        "hits": 7,
        "delivered": 3,
        "lost": 0,
        "dropped": 0,
        "filtered": 4,
    }


# --- who is in the way -----------------------------------------------------------------------------------------------


def test_who_is_in_the_way_is_looked_for_and_told_later(stage: Stage) -> None:
    # given somebody outside
    stage.machine.outside = [Foreign(812, "gdb", 1000, 4, "on tid 800", "tracer")]

    # when it is looked for, then the core has no answer yet
    assert stage.performer.perform(Attribute(7, Pool.ANY, Target(), 1)) is None
    assert stage.came_later == []

    # and has it when the look is over, with the time of that
    stage.clock.wind(3)
    stage.attribution.answers()
    holder = Holder(812, "gdb", 1000, "", 4, "on tid 800", evidence="tracer")
    assert stage.came_later == [ForeignFound(stage.clock.now_ns(), 7, (holder,))]
    assert stage.attribution.looked_at == [Place(Pool.ANY, Target(), 1)]
