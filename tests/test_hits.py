"""A hit goes from its ring to everybody who is entitled to it, and is counted wherever it is lost."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwbpd.core.model import Access, Claim, Delivery, Kind, Mode, Owner, Piece, Pool, Span, Target, Totals
from hwbpd.hits import Hits
from hwbpd.hookspecs import Batch
from hwbpd.outbox import Outbox
from hwbpd.peers import Connection, Peer
from hwbpd.sessions import Session, Sessions
from tests.fakes import IN_KERNEL, IN_USER, KERNEL_IP, RECORD, USER_IP, FakeMachine, FakeTransport

SPAN = Span(0x404040, 8)
RING = Mode(ring_bytes=4096)
COUNT = Mode(delivery=Delivery.COUNT)
BURNING = Mode(delivery=Delivery.COUNT, fuse_hits=1000)
EVERYWHERE, CPU_0, CPU_1 = Target(), Target(cpus=(0,)), Target(cpus=(1,))
ROOM = RING.ring_bytes // RECORD.size  # hits in a ring
PER_MESSAGE = 10  # hits


class Way:
    """A machine, two sessions, and the way between them."""

    def __init__(self) -> None:
        self.machine = FakeMachine({Pool.ANY: 4}, 2, random.Random(0))
        self.transport = FakeTransport()
        self.sessions = Sessions()
        self.outbox = Outbox(self.transport, messages_max=10, hits_bytes_max=2**20)
        self.hits = Hits(self.machine, self.sessions, self.outbox, PER_MESSAGE * RECORD.size)
        self.ann, self.bob = self.open(1), self.open(2)

    def open(self, number: int) -> Session:
        pidfd = os.eventfd(0, os.EFD_CLOEXEC)
        return self.sessions.open(b"\0" + bytes([number]), Connection(number, ""), Peer(number, 0, 0, "gdb", pidfd))

    def claim(self, claim_id: int, session: Session, mode: Mode = RING) -> Claim:
        return claim_of(session.owner, claim_id, mode)

    def arm(self, resource_id: int, mode: Mode = RING, target: Target = EVERYWHERE) -> None:
        self.machine.arm(resource_id, Piece(SPAN, Access.WRITE, Pool.ANY), target, mode)

    def disarm(self, resource_id: int) -> None:
        self.hits.disarmed(resource_id, *self.machine.disarm(resource_id))

    def sent(self, session: Session) -> list[dict[str, Any]]:
        return self.transport.sent.get(session.routing_id, [])

    def close(self) -> None:
        self.machine.close()
        for session in self.sessions:
            self.sessions.close(session)


def claim_of(owner: Owner, claim_id: int, mode: Mode) -> Claim:
    return Claim(claim_id, owner, Kind.PERF, SPAN, Access.WRITE, mode, Target(), "", 0)


@pytest.fixture
def way() -> Iterator[Way]:
    way = Way()
    yield way
    way.close()


def test_a_drain_is_one_message_of_whole_records(way: Way) -> None:
    # given hits in a ring
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.machine.hit(1, 3)
    records = b"".join(way.machine.armed[1].ring)

    # when it is drained
    batch = way.hits.drain(1)

    # then they are on their way, as they were in the ring
    assert batch == Batch(records, 3, 0, more=False)
    assert way.sent(way.ann) == [{"op": "hits", "n": 1, "claim": 7, "count": 3, "records": records}]
    assert way.hits.account(7).delivered == 3


def test_the_last_hits_of_a_claim_come_in_messages_that_hold_no_more_than_they_may(way: Way) -> None:
    # given a ring that is disarmed with more in it than a message holds
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.machine.hit(1, 2 * PER_MESSAGE + 1)
    batch, totals = way.machine.disarm(1)

    # when they are delivered
    way.hits.disarmed(1, batch, totals)

    # then in as many messages as it takes
    sent = way.sent(way.ann)
    assert [message["count"] for message in sent] == [PER_MESSAGE, PER_MESSAGE, 1]
    assert b"".join(message["records"] for message in sent) == batch.records
    assert way.hits.account(7).delivered == 2 * PER_MESSAGE + 1


def test_a_message_holds_no_more_than_it_may(way: Way) -> None:
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.machine.hit(1, PER_MESSAGE + 1)

    assert way.hits.drain(1).more
    assert not way.hits.drain(1).more

    assert [message["count"] for message in way.sent(way.ann)] == [PER_MESSAGE, 1]


def test_an_empty_drain_says_nothing(way: Way) -> None:
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))

    assert way.hits.drain(1) == Batch(b"", 0, 0, more=False)

    assert way.sent(way.ann) == []


def test_every_rider_gets_every_hit_and_only_while_it_rides(way: Way) -> None:
    # given two claims on one slot
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.hits.route(1, way.claim(8, way.bob))
    way.machine.hit(1, 2)
    way.hits.drain(1)

    # when one leaves
    way.hits.leave(1, 7)
    way.machine.hit(1, 3)
    way.hits.drain(1)

    # then it had the hits until then, and the other has all
    assert [message["count"] for message in way.sent(way.ann)] == [2]
    assert [message["count"] for message in way.sent(way.bob)] == [2, 3]

    # and when the other has left too, hits go nowhere
    way.hits.leave(1, 8)
    way.machine.hit(1, 1)
    assert way.hits.drain(1).hits == 1
    assert len(way.sent(way.bob)) == 2


def test_a_claim_on_several_slots_has_one_account(way: Way) -> None:
    claim = way.claim(7, way.ann)
    for resource_id in (1, 2):
        way.arm(resource_id)
        way.hits.route(resource_id, claim)
        way.machine.hit(resource_id, 2)
        way.hits.drain(resource_id)

    assert way.hits.account(7).delivered == 4
    way.hits.leave(1, 7)
    assert way.hits.account(7).delivered == 4, "the account lasts until the claim is forgotten"


def test_losses_of_the_ring_are_told_even_without_a_hit(way: Way) -> None:
    # given a ring that has lost hits
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))

    # when a batch brings only the news of it
    way.hits.deliver(1, Batch(b"", 0, 5, more=False))
    way.hits.deliver(1, Batch(b"", 0, 2, more=False))

    # then the owner hears of them, summed up
    assert [(message["count"], message["lost"]) for message in way.sent(way.ann)] == [(0, 5), (0, 7)]
    assert way.hits.account(7).lost == 7


def test_who_only_wants_the_count_gets_no_hits(way: Way) -> None:
    # given a slot with a ring, and somebody on it who only counts
    way.arm(1)
    way.hits.route(1, way.claim(8, way.bob))
    way.hits.route(1, way.claim(7, way.ann, COUNT))

    # when it is hit more often than its ring holds
    way.machine.hit(1, ROOM + 1)
    way.hits.drain(1)

    # then the one gets records and news of the loss, and the other the number of all
    assert way.sent(way.ann) == []
    assert way.hits.so_far(7, (1,)) == Totals(hits=ROOM + 1)
    assert way.sent(way.bob)[0]["lost"] == 1
    assert way.hits.so_far(8, (1,)) == Totals(hits=ROOM + 1, lost=1)


def test_of_a_filtered_claim_only_the_hits_of_its_process_are_sent_and_the_others_are_counted(way: Way) -> None:
    # given two claims on one slot, one of which wants the hits of one process only
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann, Mode(ring_bytes=4096, only_pid=5)))
    way.hits.route(1, way.claim(8, way.bob))

    # when two processes hit it
    way.machine.hit(1, 2, pid=5)
    way.machine.hit(1, 3, pid=6)
    way.machine.hit(1, 1, pid=5)
    way.hits.drain(1)

    # then each has what it wants, and what was filtered is in the account
    (to_ann,), (to_bob,) = way.sent(way.ann), way.sent(way.bob)
    pids = [RECORD.unpack_from(to_ann["records"], at)[4] for at in range(0, len(to_ann["records"]), RECORD.size)]
    assert (to_ann["count"], pids) == (3, [5, 5, 5])
    assert to_bob["count"] == 6
    assert [(flow.delivered, flow.filtered) for flow in map(way.hits.account, (7, 8))] == [(3, 3), (6, 0)]


def test_where_all_is_filtered_nothing_is_sent_but_news_of_losses(way: Way) -> None:
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann, Mode(ring_bytes=4096, only_pid=5)))
    way.machine.hit(1, 2, pid=6)
    records = b"".join(way.machine.armed[1].ring)

    way.hits.drain(1)
    assert way.sent(way.ann) == []

    way.hits.deliver(1, Batch(records, 2, 4, more=False))
    assert [(message["count"], message["records"], message["lost"]) for message in way.sent(way.ann)] == [(0, b"", 4)]
    assert way.hits.account(7).filtered == 4


def test_of_a_session_that_is_over_what_is_filtered_is_not_dropped(way: Way) -> None:
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann, Mode(ring_bytes=4096, only_pid=5)))
    way.sessions.close(way.ann)
    way.machine.hit(1, 4, pid=5)
    way.machine.hit(1, 3, pid=6)

    way.hits.drain(1)

    flow = way.hits.account(7)
    assert (flow.delivered, flow.dropped, flow.filtered) == (0, 4, 3)


def test_where_the_kernel_was_is_kept_from_who_may_not_know_and_from_nobody_else(way: Way) -> None:
    # given two claims on one slot, one of an owner without privileges
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann, Mode(ring_bytes=4096, hide_kernel=True)))
    way.hits.route(1, way.claim(8, way.bob))

    # when the kernel hits it, and a program
    way.machine.hit(1, 1, where=IN_KERNEL)
    way.machine.hit(1, 1, where=IN_USER)
    way.hits.drain(1)

    # then one sees where the program was, and the other both
    (to_ann,), (to_bob,) = way.sent(way.ann), way.sent(way.bob)
    ips = [[RECORD.unpack_from(sent["records"], at)[3] for at in (0, RECORD.size)] for sent in (to_ann, to_bob)]
    assert ips == [[0, USER_IP], [KERNEL_IP, USER_IP]]
    assert (to_ann["count"], way.hits.account(7).delivered) == (2, 2)


def test_of_what_only_counts_with_a_fuse_each_look_brings_what_came_since(way: Way) -> None:
    # given a slot without a ring that would stop by itself after a thousand hits
    mode = Mode(delivery=Delivery.COUNT, fuse_hits=1000)
    way.arm(1, mode)
    way.hits.route(1, way.claim(7, way.ann, mode))
    assert way.hits.is_counted(1)

    # when it is hit and looked at, again and again
    looks = []
    for hits in (3, 0, 4):
        way.machine.hit(1, hits)
        looks.append(way.hits.drain(1))

    # then each look brings the difference, and nobody is sent anything
    assert looks == [Batch(b"", hits, 0, more=False) for hits in (3, 0, 4)]
    assert way.sent(way.ann) == []

    # and once it is given back it is not looked at any more
    way.disarm(1)
    assert not way.hits.is_counted(1)
    assert way.hits.final(7) == Totals(hits=7)


@pytest.mark.parametrize(
    "mode", [Mode(delivery=Delivery.COUNT), Mode(delivery=Delivery.HOLD), Mode(ring_bytes=4096, fuse_hits=5), RING]
)
def test_what_has_a_ring_or_no_fuse_need_not_be_looked_at(way: Way, mode: Mode) -> None:
    way.hits.route(1, way.claim(7, way.ann, mode))

    assert not way.hits.is_counted(1)


def test_hits_for_a_session_that_is_over_are_counted_as_dropped(way: Way) -> None:
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.sessions.close(way.ann)
    way.machine.hit(1, 4)

    way.hits.drain(1)

    flow = way.hits.account(7)
    assert (flow.delivered, flow.dropped) == (0, 4)
    assert way.sent(way.ann) == []


def test_an_account_is_gone_once_it_is_forgotten(way: Way) -> None:
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.machine.hit(1, 3)
    way.disarm(1)
    assert way.hits.final(7) == Totals(hits=3)

    way.hits.forget(7)

    assert way.hits.account(7) == (0, 0, 0, 0, 0)


def test_claims_that_are_over_leave_nothing_behind(way: Way) -> None:
    for claim_id in range(1, 11):
        for resource_id in (2 * claim_id, 2 * claim_id + 1):
            way.arm(resource_id, BURNING, CPU_0 if resource_id % 2 else CPU_1)
            way.hits.route(resource_id, way.claim(claim_id, way.ann, BURNING))
        for resource_id in (2 * claim_id, 2 * claim_id + 1):
            way.disarm(resource_id)
        way.hits.forget(claim_id)

    assert (way.hits._slots, way.hits._flows) == ({}, {})


def test_what_has_no_route_brings_nothing_and_is_not_asked(way: Way) -> None:
    """A tracer's slots are armed, or attended to, without one."""
    assert way.hits.drain(1) == Batch(b"", 0, 0, more=False)
    way.hits.disarmed(1, Batch(b"", 0, 0, more=False), Totals())
    assert way.hits.leave(1, 7).hits == 0
    assert (way.hits.final(7), way.hits.so_far(7, (1,)), way.hits.so_far_on(1, 7)) == (Totals(),) * 3


# --- several on one slot ---------------------------------------------------------------------------------------------


def test_who_joins_gets_the_hits_from_then_on_and_those_before_go_to_who_was_there(way: Way) -> None:
    # given a slot with a rider, and more in its ring than one message holds
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.machine.hit(1, PER_MESSAGE + 2)

    # when another joins
    came = way.hits.route(1, way.claim(8, way.bob))

    # then all of that has gone to the first, and is what the guard has to hear of
    assert (came.hits, came.lost) == (PER_MESSAGE + 2, 0)
    assert way.hits.account(7).delivered == PER_MESSAGE + 2
    assert way.sent(way.bob) == []

    # and what comes now goes to both, each with its own account
    way.machine.hit(1, 3)
    assert way.hits.so_far(7, (1,)) == Totals(hits=PER_MESSAGE + 5)
    assert way.hits.so_far(8, (1,)) == way.hits.so_far_on(1, 8) == Totals(hits=3)
    way.hits.drain(1)
    assert [way.hits.account(claim_id).delivered for claim_id in (7, 8)] == [PER_MESSAGE + 5, 3]


def test_who_leaves_gets_what_is_in_the_ring_and_no_more(way: Way) -> None:
    # given two riders, and hits that nobody has drained, some of them lost
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.hits.route(1, way.claim(8, way.bob))
    way.machine.hit(1, ROOM + 4)

    # when one leaves
    came = way.hits.leave(1, 7)

    # then both have had them
    assert (came.hits, came.lost) == (ROOM, 4)
    assert way.hits.final(7) == way.hits.final(8) == Totals(hits=ROOM + 4, lost=4)

    # and what comes then concerns the other only, to whose end the slot stays
    way.machine.hit(1, 2)
    way.disarm(1)
    assert way.hits.final(7) == Totals(hits=ROOM + 4, lost=4)
    assert way.hits.final(8) == Totals(hits=ROOM + 6, lost=4)


def test_losses_before_it_joined_are_not_told_to_who_joins(way: Way) -> None:
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))
    way.machine.hit(1, ROOM + 9)
    way.hits.route(1, way.claim(8, way.bob))
    way.machine.hit(1, 1)

    way.hits.drain(1)

    assert [message["lost"] for message in way.sent(way.ann)][-1] == 9
    assert ["lost" in message for message in way.sent(way.bob)] == [False]


def test_of_those_who_only_count_each_counts_from_when_it_joined_to_when_it_left(way: Way) -> None:
    # given a slot that counts, for somebody who comes first and for somebody who comes later
    way.arm(1, COUNT)
    way.hits.route(1, way.claim(7, way.ann, COUNT))
    way.machine.hit(1, 5)
    assert way.hits.route(1, way.claim(8, way.bob, COUNT)).hits == 0
    way.machine.hit(1, 7)

    # when the first leaves, and later the other
    way.hits.leave(1, 7)
    way.machine.hit(1, 11)
    assert way.hits.so_far(8, (1,)) == Totals(hits=18)
    way.disarm(1)

    # then each has counted what was hit meanwhile
    assert (way.hits.final(7), way.hits.final(8)) == (Totals(hits=12), Totals(hits=18))


def test_looks_at_what_only_counts_leave_the_counts_as_they_are(way: Way) -> None:
    way.arm(1, BURNING)
    way.hits.route(1, way.claim(7, way.ann, BURNING))
    way.machine.hit(1, 2)
    way.hits.drain(1)
    way.hits.route(1, way.claim(8, way.bob, BURNING))
    way.machine.hit(1, 1)

    assert way.hits.drain(1).hits == 1
    assert (way.hits.so_far(7, (1,)).hits, way.hits.so_far(8, (1,)).hits) == (3, 1)
    assert (way.hits.account(7).hits, way.hits.account(8).hits) == (3, 1)


def test_somebody_with_a_fuse_who_joins_who_only_counts_makes_it_looked_at(way: Way) -> None:
    # given a slot that counts without a fuse, and has counted much
    way.arm(1, COUNT)
    way.hits.route(1, way.claim(7, way.ann, COUNT))
    way.machine.hit(1, 1000)

    # when somebody with a fuse joins, then it is looked at, and what was before is no news
    way.hits.route(1, way.claim(8, way.bob, BURNING))
    assert way.hits.is_counted(1)
    way.machine.hit(1, 2)
    assert way.hits.drain(1).hits == 2


@pytest.mark.parametrize("mode", [RING, COUNT])
def test_a_claim_that_was_suspended_goes_on_counting_where_it_was(way: Way, mode: Mode) -> None:
    # given a claim that has had hits, and was suspended with some of them not drained
    way.arm(1, mode)
    way.hits.route(1, way.claim(7, way.ann, mode))
    way.machine.hit(1, 4)
    way.hits.drain(1)
    way.machine.hit(1, 2)
    way.disarm(1)
    assert way.hits.so_far(7, ()) == Totals(hits=6)

    # when it is resumed, on another slot
    way.arm(2, mode)
    way.hits.route(2, way.claim(7, way.ann, mode))
    way.machine.hit(2, 3)

    # then its account goes over both times
    assert way.hits.so_far(7, (2,)) == Totals(hits=9)
    assert way.hits.so_far_on(2, 7) == Totals(hits=3)
    way.disarm(2)
    assert way.hits.final(7) == Totals(hits=9)


@dataclass
class Rider:
    """What a claim should have had: what the machine counted while it was on the slot."""

    claim: Claim
    hits: int = 0


@given(steps=st.lists(st.tuples(st.sampled_from(["hit", "drain", "join", "leave", "suspend"]), st.integers(1, 130))))
@settings(max_examples=200, deadline=None)
def test_each_rider_has_what_was_hit_while_it_rode_however_they_come_and_go(steps: list[tuple[str, int]]) -> None:
    # given a slot, and riders that come, go, are suspended all together and come back
    with contextlib.closing(Way()) as way:
        modes = (RING, Mode(ring_bytes=4096, only_pid=5), Mode(ring_bytes=4096, hide_kernel=True))
        resource_id = 1
        way.arm(resource_id)
        riding: dict[int, Rider] = {}
        away: dict[int, Rider] = {}
        for number, (what, size) in enumerate(steps, start=100):
            if what == "hit" and riding:
                way.machine.hit(resource_id, size, pid=4 + size % 2)
                for rider in riding.values():
                    rider.hits += size
            elif what == "drain":
                way.hits.drain(resource_id)
            elif what == "join":
                rider = Rider(way.claim(number, way.ann if size % 3 else way.bob, modes[size % 3]))
                if away and size % 2:
                    rider = away.pop(next(iter(away)))
                riding[rider.claim.claim_id] = rider
                way.hits.route(resource_id, rider.claim)
            elif what == "leave" and len(riding) > 1:
                left = riding.pop(sorted(riding)[size % len(riding)])
                way.hits.leave(resource_id, left.claim.claim_id)
                away[left.claim.claim_id] = left
            elif what == "suspend" and riding:
                way.disarm(resource_id)
                away |= riding
                riding = {}
                resource_id += 1
                way.arm(resource_id)
        if riding:
            way.disarm(resource_id)

        # then every hit went one way for each, and none is missing or counted twice
        for claim_id, rider in {**riding, **away}.items():
            account = way.hits.account(claim_id)
            assert way.hits.final(claim_id).hits == rider.hits
            assert account.delivered + account.lost + account.dropped + account.filtered == rider.hits
            told = [message for session in (way.ann, way.bob) for message in way.sent(session)]
            records = sum(message["count"] for message in told if message["claim"] == claim_id)
            assert records == account.delivered


def test_what_is_drained_and_lost_adds_up_to_what_was_hit(way: Way) -> None:
    way.arm(1)
    way.hits.route(1, way.claim(7, way.ann))

    way.machine.hit(1, ROOM + 9)
    while way.hits.drain(1).more:
        pass
    batch, totals = way.machine.disarm(1)
    way.hits.disarmed(1, batch, totals)

    flow = way.hits.account(7)
    assert totals == Totals(hits=ROOM + 9, lost=9)
    assert (flow.delivered, flow.lost) == (ROOM, 9)
