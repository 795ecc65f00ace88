"""
The server as its clients meet it: who is let in, what is refused and how, and when a session ends.

A whole daemon on fakes, without a socket; what real sockets add is in ``test_network.py``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from hwbpd.core import invariants
from hwbpd.core.errors import BadMessage
from hwbpd.core.model import Delivery, Kind, Pool
from hwbpd.hookspecs import Backend, CpuFacts
from hwbpd.messages import CPU_MAX, LENGTH_MAX, TID_MAX, U64_MAX
from hwbpd.network import Incoming, Unreadable
from hwbpd.plugins import Plugins
from hwbpd.server import MESSAGES_PER_TURN
from hwbpd.settings import Limits, Settings
from tests.fakes import EPOCH, RECORD, FakeBackend, FakeClient, Rig
from tests.slow_model import ANY_CPU, Event

TID = 812
CLAIM: dict[str, Any] = {"address": 0x404040, "length": 8, "access": "w"}
ADDRESSES = itertools.count(0x500000, 0x100)


@pytest.fixture
def rig() -> Iterator[Rig]:
    yield from a_rig()


def a_rig(settings: Settings | None = None, backend: Backend | None = None) -> Iterator[Rig]:
    rig = Rig(settings=settings, backend=backend)
    rig.machine.start_task(TID)
    try:
        yield rig
        invariants.check(rig.arbiter.books)
        invariants.nothing_is_waiting(rig.arbiter.books)
    finally:
        rig.stop()  # its watch over memory is a thread, and looking for a small example makes many


@pytest.fixture
def small_rig() -> Iterator[Rig]:
    limits = Limits(claims_per_session=2, sessions=2, messages_queued_per_session=3, hits_bytes_queued_per_session=4096)
    yield from a_rig(Settings(limits=limits))


@pytest.fixture
def rig_of_short_slots() -> Iterator[Rig]:
    yield from a_rig(backend=FakeBackend({Pool.ANY: 4}, piece_bytes=8))


def granted(rig: Rig, client: FakeClient, **fields: Any) -> int:
    """Make a claim; each is at an address of its own, so that none shares a slot."""
    reply = rig.ask(client, "claim", **{**CLAIM, "address": next(ADDRESSES), **fields})
    assert reply["op"] == "granted", reply
    return int(reply["claim"])


def refusal(reply: dict[str, Any]) -> str:
    assert reply["op"] == "error", reply
    return str(reply["errno"])


def is_open(fd: int) -> bool:
    """Whether it is open still. Those of the fakes are eventfds; others may get the number of a closed one."""
    with suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    return False


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_hello_is_answered_with_who_is_there(rig: Rig) -> None:
    client = rig.client(hello=False)

    client.ask("hello", version=1, client="gdb")
    rig.turn()

    names = {"machine": "fake", "backend": "fake"}
    assert client.read() == [{"op": "welcome", "id": 1, "version": 1, "epoch": EPOCH, "session": 1, **names}]


@pytest.mark.parametrize(
    "op",
    [
        *("claim", "fit", "plan", "release", "rearm", "counts", "slots"),
        *("foreign", "capabilities", "why", "follow", "goodbye"),
    ],
)
def test_without_hello_nothing_is_done(rig: Rig, op: str) -> None:
    of_claim = {verb: {"claim": 1} for verb in ("release", "rearm", "counts", "why")}
    fields = {"claim": CLAIM, "fit": CLAIM, "plan": CLAIM, **of_claim}.get(op, {})

    reply = rig.ask(rig.client(hello=False), op, **fields)

    assert refusal(reply) == "ESTALE"
    assert "say hello first" in reply["sentence"]
    assert rig.arbiter.books.ended == {}


def test_a_request_for_an_earlier_daemon_is_refused(rig: Rig) -> None:
    reply = rig.ask(rig.client(), "claim", **CLAIM, epoch=EPOCH - 1)

    assert refusal(reply) == "ESTALE"
    assert rig.arbiter.books.ended == {}


@pytest.mark.parametrize("version", [0, 2, 65535])
def test_another_version_of_the_protocol_is_refused_with_both_numbers(rig: Rig, version: int) -> None:
    reply = rig.ask(rig.client(hello=False), "hello", version=version)

    assert refusal(reply) == "EPROTO"
    assert f"version {version} " in reply["sentence"]
    assert "this daemon version 1" in reply["sentence"]
    assert len(rig.sessions) == 0


def test_everybody_has_a_session_and_only_some_are_privileged(rig: Rig) -> None:
    """What each may do with it is in ``test_who_may.py``."""
    for uid in (0, 1000):
        assert rig.ask(rig.client(uid=uid, hello=False), "hello", version=1)["op"] == "welcome"

    assert [(session.owner.uid, session.privileged) for session in rig.sessions] == [(0, True), (1000, False)]


def test_who_cannot_be_looked_at_is_not_let_in(rig: Rig) -> None:
    # given a connection of a process that is gone, or another by now
    client = rig.client(hello=False)
    rig.rights.gone.add(client.pid)

    # when it says hello
    reply = rig.ask(client, "hello", version=1)

    # then it is refused, nothing of it is kept, and the daemon goes on when the connection ends
    assert refusal(reply) == "EPERM"
    assert len(rig.sessions) == 0
    assert [is_open(fd) for fd in rig.network.pidfds] == [False]
    assert refusal(rig.ask(client, "slots")) == "ESTALE"
    client.cut()
    rig.turn()
    assert rig.ask(rig.client(), "slots")["op"] == "slots"


def test_a_connection_without_credentials_is_refused(rig: Rig) -> None:
    client = rig.client(hello=False)
    rig.network.arrive(
        Incoming(client.routing_id, None, msgpack.packb({"op": "hello", "id": 5, "version": 1}))
    )

    rig.turn()

    (reply,) = client.read()
    assert (reply["id"], refusal(reply)) == (5, "EPERM")
    assert len(rig.sessions) == 0


def test_sessions_are_bounded_and_the_refusal_says_how_many(small_rig: Rig) -> None:
    # given as many sessions as there may be
    rig = small_rig
    first, _ = rig.client(), rig.client()

    # when one more comes
    third = rig.client(hello=False)
    reply = rig.ask(third, "hello", version=1)

    # then it hears the number and the setting
    assert refusal(reply) == "EDQUOT"
    assert reply["sentence"].startswith("2 sessions are open")
    assert "limits.sessions" in reply["sentence"]

    # and has its session once there is room
    rig.ask(first, "goodbye")
    assert rig.ask(third, "hello", version=1)["op"] == "welcome"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\xc1", b"GET / HTTP/1.1\r\n\r\n", b"\x91" * 5000, msgpack.packb([1, 2])])
def test_bytes_that_are_no_message_are_answered_and_the_daemon_goes_on(rig: Rig, data: bytes) -> None:
    for client in (rig.client(), rig.client(hello=False)):
        client.send_bytes(data)
        rig.turn()

        (reply,) = client.read()
        assert (reply["id"], refusal(reply)) == (0, "EBADMSG")

    assert rig.ask(rig.clients[0], "slots")["op"] == "slots"


def test_a_bad_request_is_answered_under_its_own_id_and_changes_nothing(rig: Rig) -> None:
    client = rig.client()

    reply = rig.ask(client, "claim", **{**CLAIM, "length": 0})

    assert refusal(reply) == "EBADMSG"
    assert "length" in reply["sentence"]
    assert rig.arbiter.books.ended == {}


@pytest.mark.parametrize("access", ["w\n", "\nw", "wr", ""])
def test_letters_that_are_no_access_are_refused_at_the_door(rig: Rig, access: str) -> None:
    reply = rig.ask(rig.client(), "claim", **{**CLAIM, "access": access})

    assert refusal(reply) == "EBADMSG"
    assert "access" in reply["sentence"]


def test_what_the_transport_cannot_read_is_answered_with_its_reason(rig: Rig) -> None:
    client = rig.client()
    rig.network.arrive(Unreadable(client.routing_id, BadMessage("a message is one frame, not 3")))

    rig.turn()

    (reply,) = client.read()
    assert (reply["id"], refusal(reply), reply["sentence"]) == (0, "EBADMSG", "a message is one frame, not 3")


def test_a_request_whose_deadline_has_passed_is_not_carried_out(rig: Rig) -> None:
    # given a clock, and requests around its time
    client = rig.client()
    now_ns = rig.clock.now_ns()

    # when one is a nanosecond late, then nothing is done
    assert refusal(rig.ask(client, "claim", **CLAIM, deadline_ns=now_ns - 1)) == "ETIMEDOUT"
    assert rig.arbiter.books.ended == {}

    # and one that is just in time is served, as is one without a deadline
    assert rig.ask(client, "claim", **CLAIM, deadline_ns=now_ns)["op"] == "granted"
    assert rig.ask(client, "claim", **CLAIM, deadline_ns=0)["op"] == "granted"


def test_claims_are_bounded_and_the_refusal_says_how_many(small_rig: Rig) -> None:
    # given a session with as many claims as it may have
    rig = small_rig
    client = rig.client()
    first = granted(rig, client)
    granted(rig, client)

    # when it asks for one more
    reply = rig.ask(client, "claim", **CLAIM)

    # then it hears the number and the setting; another session is not concerned
    assert refusal(reply) == "EDQUOT"
    assert "this session has 2 claims" in reply["sentence"]
    assert "limits.claims_per_session" in reply["sentence"]
    granted(rig, rig.client())

    # and a claim released makes room for one
    rig.ask(client, "release", claim=first)
    granted(rig, client)


def test_a_refusal_names_who_is_in_the_way(rig: Rig) -> None:
    ann, bob = rig.client(pid=4001), rig.client(pid=4002)
    for _ in range(4):
        granted(rig, ann, tid=TID, kind="ptrace")

    reply = rig.ask(bob, "claim", **CLAIM, tid=TID)

    assert refusal(reply) == "ENOSPC"
    (holder,) = reply["holders"]
    assert (holder["pid"], holder["kind"], holder["slots"], holder["claim_ids"]) == (4001, "ptrace", 4, [1, 2, 3, 4])
    assert reply["sentence"].endswith("4 of 4 held (client4001[4001] as ptrace: 4 on tid 812)")


def test_a_refusal_by_the_kernel_leaves_the_slots_as_they_were(rig: Rig) -> None:
    rig.machine.kernel.held[-1] = [Event(rig.machine.tasks[TID], ANY_CPU, Pool.ANY)] * 4
    before = rig.arbiter.books.dump()

    reply = rig.ask(rig.client(), "claim", **CLAIM, tid=TID)

    assert refusal(reply) == "ENOSPC"
    assert "somebody outside hwbpd: at least 4 on cpu 0" in reply["sentence"]
    assert rig.arbiter.books.dump() == before


# --- how a session ends ----------------------------------------------------------------------------------------------


def leave(rig: Rig, client: FakeClient, way: str) -> None:
    match way:
        case "goodbye":
            assert rig.ask(client, "goodbye")["op"] == "bye"
        case "death":
            client.die()
        case "cut":
            client.cut()
        case "death and cut":
            client.die()
            client.cut()
    rig.turn()


@pytest.mark.parametrize("way", ["goodbye", "death", "cut", "death and cut"])
def test_however_a_session_ends_its_claims_end_with_it(rig: Rig, way: str) -> None:
    # given two sessions with claims
    client, other = rig.client(), rig.client()
    granted(rig, client)
    granted(rig, client, tid=TID)
    kept = granted(rig, other)
    session = rig.sessions.on_route(client.routing_id)
    assert session is not None
    rings = [fd for resource_id in (1, 2) for fd in rig.machine.descriptors(resource_id)]
    assert all(map(is_open, [*rings, session.peer.pidfd]))

    # when one ends
    leave(rig, client, way)

    # then only the other's slot is held, in the books and by the machine, and nothing of it is left open
    assert list(rig.arbiter.books.claims) == [kept]
    assert list(rig.machine.armed) == list(rig.arbiter.books.resources)
    assert [session.owner.pid for session in rig.sessions] == [other.pid]
    assert not any(map(is_open, [*rings, session.peer.pidfd]))
    assert rig.ask(other, "slots")["op"] == "slots"


@pytest.mark.parametrize("way", ["goodbye", "death"])
def test_after_its_end_a_connection_must_say_hello_again(rig: Rig, way: str) -> None:
    client = rig.client()
    leave(rig, client, way)

    assert refusal(rig.ask(client, "slots")) == "ESTALE"


def test_what_a_dead_process_held_is_free_for_a_request_of_the_same_turn(rig: Rig) -> None:
    # given all slots held by somebody
    ann, bob = rig.client(), rig.client()
    for _ in range(4):
        granted(rig, ann)

    # when it dies just as another asks
    request = bob.ask("claim", **CLAIM)
    ann.die()
    rig.turn()

    # then there is room
    (reply,) = bob.read()
    assert (reply["op"], reply["id"]) == ("granted", request)


def test_hello_again_begins_anew(rig: Rig) -> None:
    # given a session with a claim
    client = rig.client()
    granted(rig, client)

    # when it says hello again
    welcome = rig.ask(client, "hello", version=1)

    # then it has another session, and the claim of the first is over
    assert (welcome["op"], welcome["session"]) == ("welcome", 2)
    assert rig.arbiter.books.claims == {}
    assert rig.machine.armed == {}
    granted(rig, client)


def test_a_new_connection_on_the_descriptor_of_a_lost_one_has_none_of_its_claims(rig: Rig) -> None:
    # given a session whose connection is lost just before its descriptor is used again
    lost = rig.client()
    granted(rig, lost)
    lost.cut()
    later = rig.client(pid=5000, hello=False)
    later.fd = lost.fd

    # when the new one says hello
    assert rig.ask(later, "hello", version=1)["op"] == "welcome"

    # then the old claims are over, and the new session stays
    assert rig.arbiter.books.claims == {}
    assert [session.owner.pid for session in rig.sessions] == [5000]
    granted(rig, later)
    rig.turn()
    assert len(rig.arbiter.books.claims) == 1


def test_a_connection_replaced_without_a_word_ends_the_session_that_was_there(rig: Rig) -> None:
    gone = rig.client()
    granted(rig, gone)
    rig.network.lose(gone, told=False)
    later = rig.client(pid=5000, hello=False)
    later.fd = gone.fd

    assert rig.ask(later, "hello", version=1)["op"] == "welcome"

    assert rig.arbiter.books.claims == {}
    assert [session.owner.pid for session in rig.sessions] == [5000]


def test_a_session_does_not_follow_a_routing_id_to_another_connection(rig: Rig) -> None:
    # given a session
    client = rig.client()
    granted(rig, client)

    # when a message under its routing id comes through another connection
    client.fd += 500
    reply = rig.ask(client, "slots")

    # then the session is over rather than somebody else's
    assert refusal(reply) == "ESTALE"
    assert len(rig.sessions) == 0
    assert rig.arbiter.books.claims == {}


def test_who_does_not_read_its_replies_is_disconnected_and_nobody_else(small_rig: Rig) -> None:
    # given a session that reads nothing, with room for the welcome and three messages waiting
    rig = small_rig
    slow, other = rig.client(room=1), rig.client()
    slow.room = 0
    granted_before = rig.arbiter.books.dump()
    for _ in range(3):
        slow.ask("capabilities")
    rig.turn()
    assert len(rig.sessions) == 2

    # when one more finds no room
    slow.ask("claim", **CLAIM)
    rig.turn()

    # then its session is over, with its claim, and the other is served
    assert [session.owner.pid for session in rig.sessions] == [other.pid]
    assert rig.arbiter.books.dump() == granted_before
    granted(rig, other)

    # and it is told when it reads again
    slow.read()
    slow.room = 10
    rig.turn()
    assert [message["op"] for message in slow.read()] == ["closing"]
    assert not rig.outbox.is_waiting


def test_the_last_word_of_one_session_is_not_read_in_the_next(small_rig: Rig) -> None:
    # given a session that was ended because it did not read
    rig = small_rig
    slow = rig.client(room=1)
    slow.room = 0
    for _ in range(4):
        slow.ask("capabilities")
    rig.turn()
    assert len(rig.sessions) == 0

    # when it reads again and says hello in the same breath
    slow.room = 10
    slow.ask("hello", version=1)
    rig.turn()

    # then what closes the first session does not come after what opens the second
    assert [message["op"] for message in slow.read()] in (["closing", "welcome"], ["welcome"])


def test_who_says_goodbye_behind_a_flood_of_hits_has_its_answers(rig: Rig) -> None:
    # given a client that is behind: its side is full of hits, and more wait for it
    client = rig.client(room=1)
    claim = granted(rig, client, ring_bytes=2**19)
    rig.machine.hit(1, 1)
    rig.turn()
    rig.machine.hit(1, 1)
    rig.turn()
    assert rig.outbox.is_waiting

    # when it releases its claim, says goodbye, and reads on
    asked = [client.ask("release", claim=claim), client.ask("goodbye")]
    rig.turn()
    client.room = 100
    rig.turn()

    # then both requests are answered, in their order
    assert [message["id"] for message in client.read() if "id" in message] == asked


def test_stopping_ends_every_claim_and_tells_every_session() -> None:
    # given sessions with claims, and hits that nobody has drained
    rig = Rig()
    clients = [rig.client(), rig.client()]
    for client in clients:
        granted(rig, client)
    rig.machine.hit(1, 3)

    # when the daemon stops
    rig.stop()

    # then what was left is delivered, each hears that it is over, and every slot is free
    first, second = (client.read() for client in clients)
    assert [message["op"] for message in first] == ["hits", "closing"]
    assert [message["op"] for message in second] == ["closing"]
    assert "stopping" in second[0]["sentence"]
    assert rig.machine.armed == {}
    assert len(rig.sessions) == 0


# --- claims and hits -------------------------------------------------------------------------------------------------


def test_root_releases_what_another_session_holds_and_both_are_told(rig: Rig) -> None:
    ann, bob = rig.client(pid=4001), rig.client(pid=4002)
    claim = granted(rig, ann)

    reply = rig.ask(bob, "release", claim=claim)

    assert (reply["op"], reply["claim"]) == ("released", claim)
    (notice,) = ann.read()
    assert (notice["op"], notice["n"], notice["claim"], notice["reason"]) == ("lost", 1, claim, "forced")
    assert notice["sentence"] == "released by client4002[4002], uid 0"
    assert rig.machine.armed == {}


def test_hits_come_before_the_reply_that_ends_their_claim(rig: Rig) -> None:
    client = rig.client()
    claim = granted(rig, client)
    rig.machine.hit(1, 3)

    client.ask("release", claim=claim)
    rig.turn()

    hits, released = client.read()
    assert (hits["op"], hits["count"]) == ("hits", 3)
    assert (released["op"], released["hits"], released["delivered"]) == ("released", 3, 3)


def test_the_core_hears_once_per_drain_what_it_brought_and_what_was_lost(rig: Rig) -> None:
    # given a ring for 85 hits
    client = rig.client()
    claim = granted(rig, client, ring_bytes=4096)

    for hits, expected in ((3, (3, 0)), (100, (103, 15))):
        # when it is hit and drained
        rig.machine.hit(1, hits)
        rig.clock.wind(0.01)
        rig.turn()

        # then the books have it
        record = rig.arbiter.books.claims[claim]
        assert (record.hits, record.lost) == expected


def test_a_claim_ends_with_its_thread_after_its_last_hits(rig: Rig) -> None:
    client = rig.client()
    claim = granted(rig, client, tid=TID)
    rig.machine.hit(1, 3)
    rig.machine.exit_task(TID)

    rig.turn()
    rig.turn()

    hits, lost = client.read()
    assert (hits["op"], hits["count"]) == ("hits", 3)
    assert (lost["op"], lost["claim"], lost["reason"]) == ("lost", claim, "exit")
    assert (lost["sentence"], lost["hits"], lost["delivered"]) == ("tid 812 has exited", 3, 3)
    assert rig.machine.armed == {}


def test_a_claim_of_several_slots_ends_with_its_thread(rig_of_short_slots: Rig) -> None:
    # given a claim that needs three slots on a thread
    rig = rig_of_short_slots
    client = rig.client()
    claim = granted(rig, client, tid=TID, length=24)
    assert len(rig.machine.armed) == 3

    # when the thread exits, which every slot tells at once
    rig.machine.exit_task(TID)
    rig.turn()

    # then the claim is over, once, and the daemon goes on
    (lost,) = client.read()
    assert (lost["op"], lost["claim"], lost["reason"]) == ("lost", claim, "exit")
    assert rig.machine.armed == {}
    assert rig.ask(client, "slots")["resources"] == []


def test_several_slots_are_one_claim_to_its_owner(rig_of_short_slots: Rig) -> None:
    rig = rig_of_short_slots
    client = rig.client()
    reply = rig.ask(client, "claim", address=0x404040, length=20, access="w", tid=TID)
    assert [(piece["address"], piece["length"]) for piece in reply["pieces"]] == [
        (0x404040, 8),
        (0x404048, 8),
        (0x404050, 4),
    ]
    for resource_id in tuple(rig.machine.armed):
        rig.machine.hit(resource_id, resource_id)

    released = rig.ask(client, "release", claim=reply["claim"])

    assert (released["hits"], released["delivered"]) == (6, 6)
    assert [message["count"] for message in client.read()] == [1, 2, 3]

    # and where not all of them fit, none is held
    granted(rig, client, tid=TID)
    granted(rig, client, tid=TID)
    assert refusal(rig.ask(client, "claim", address=0x404040, length=24, access="w", tid=TID)) == "ENOSPC"
    assert len(rig.machine.armed) == 2


any_claim = st.fixed_dictionaries(
    {
        "address": st.one_of(st.integers(0, U64_MAX), st.sampled_from([0x404040, U64_MAX - 7])),
        "length": st.one_of(st.sampled_from([1, 2, 4, 8]), st.integers(1, LENGTH_MAX)),
        "access": st.sampled_from(["r", "w", "rw", "x"]),
    },
    optional={
        "tid": st.sampled_from([0, TID, TID + 1, TID_MAX]),
        "cpus": st.none() | st.lists(st.sampled_from([0, 1, 2, CPU_MAX]), max_size=3),
        "user": st.booleans(),
        "kernel": st.booleans(),
        "user_chain": st.booleans(),
        "kernel_chain": st.booleans(),
        "delivery": st.sampled_from(Delivery),
        "ring_bytes": st.one_of(st.sampled_from([0, 4096, 2**20]), st.integers(0, 2**30)),
        "label": st.text(max_size=64),
    },
)


@given(st.lists(any_claim, min_size=1, max_size=8), st.sampled_from(Kind))
def test_any_claim_is_granted_or_refused_with_a_reason_and_nothing_else_happens(
    claims: list[dict[str, Any]], kind: Kind
) -> None:
    # given a daemon with the fit of real registers, and claims of one rank: none displaces another
    for rig in a_rig(backend=Plugins().backend(CpuFacts("x86_64"))):
        client = rig.client()

        # when anything is claimed that the protocol has words for
        replies = [rig.ask(client, "claim", kind=kind, **fields) for fields in claims]

        # then each is granted or refused with one of our errors, and what is held is what was granted: equals share
        granted_ids = [reply["claim"] for reply in replies if reply["op"] == "granted"]
        assert list(rig.arbiter.books.claims) == granted_ids
        refusals = {reply["errno"] for reply in replies if reply["op"] == "error"}
        assert refusals <= {"ENOSPC", "EINVAL", "EOPNOTSUPP", "ESRCH", "ENODEV", "EDQUOT"}
        held = rig.arbiter.books.claims.values()
        different = {(of.claim.target, piece, of.claim.mode) for of in held for piece in of.plan.pieces}
        assert [len(rig.arbiter.books.resources), len(rig.machine.armed)] == [len(different)] * 2


def test_requests_are_answered_in_their_order_and_hits_flow_under_a_storm_of_them(rig: Rig) -> None:
    # given a claim with a hit, and more requests than one turn serves
    client = rig.client()
    granted(rig, client)
    rig.machine.hit(1, 1)
    asked = [client.ask("capabilities") for _ in range(MESSAGES_PER_TURN + 10)]

    # when the daemon takes one turn
    rig.server.turn(block=False)

    # then it has served a bounded number of them, and the hit
    replies = client.read()
    assert [message["op"] for message in replies] == ["capabilities"] * MESSAGES_PER_TURN + ["hits"]

    # and the rest in the next
    rig.turn()
    replies += client.read()
    assert [message["id"] for message in replies if "id" in message] == asked


def test_a_flood_of_hits_lets_requests_through(rig: Rig) -> None:
    # given a ring with more hits than one message holds
    client = rig.client()
    granted(rig, client, ring_bytes=2**19)
    per_message = rig.settings.rings.bytes_per_message // RECORD.size
    rig.machine.hit(1, 3 * per_message)

    # when a request comes between two of its messages
    rig.server.turn(block=False)
    client.ask("capabilities")
    rig.server.turn(block=False)

    # then it is answered before the rest of the flood
    assert [message["op"] for message in client.read()] == ["hits", "capabilities", "hits"]


def test_every_decision_is_one_line_in_the_log(rig: Rig) -> None:
    with capture_logs() as lines:
        client = rig.client(pid=4001)
        claim = granted(rig, client, **CLAIM, tid=TID, label="the list")
        rig.ask(client, "claim", **CLAIM, tid=99)
        rig.ask(client, "release", claim=claim)
        rig.ask(client, "goodbye")

    assert [line["event"] for line in lines] == ["session", "granted", "refused", "ended", "session over"]
    assert {line["owner"] for line in lines} == {"client4001[4001]"}
    assert lines[1]["claim"] == "mem:0x404040/8:w for tid 812 as perf"
    assert (lines[2]["errno"], lines[3]["how"]) == ("ESRCH", "released")
