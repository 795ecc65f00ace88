"""
What requests do in a whole daemon on fakes: bounds and their numbers, questions that take nothing, processes, exec,
CPUs that come and go, floods and their end, and who is found in the way.

Who may do what is ``test_who_may.py``'s question.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from hwbpd.core import invariants
from hwbpd.core.model import Pool
from hwbpd.hookspecs import Foreign
from hwbpd.settings import Guard, Limits, Rings, Settings
from tests.fakes import IN_KERNEL, RECORD, FakeBackend, FakeClient, Rig
from tests.slow_model import ANY_CPU, Event

TID = 812  # its process has another thread
OTHER_TID = 813
LONELY_TID = 820  # the only thread of its process
UID = 1000
CLAIM: dict[str, Any] = {"address": 0x404040, "length": 8, "access": "w"}
ADDRESSES = itertools.count(0x500000, 0x100)
RATE = 50
REARM_AFTER_S = 30.0

SETTINGS = Settings(
    limits=Limits(claims_per_session=6, claims_per_uid=4, legs_per_uid=6, sessions_per_uid=3),
    rings=Rings(bytes_default=4096, bytes_max=65536),
    guard=Guard(hits_per_s=RATE),
)


def a_rig(settings: Settings = SETTINGS, **more: Any) -> Iterator[Rig]:
    rig = Rig(settings=settings, **more)
    for tid in (TID, OTHER_TID, LONELY_TID):
        rig.machine.start_task(tid)
    yield rig
    invariants.check(rig.arbiter.books)
    invariants.nothing_is_waiting(rig.arbiter.books)
    rig.stop()


@pytest.fixture
def rig() -> Iterator[Rig]:
    yield from a_rig()


@pytest.fixture
def patient_rig() -> Iterator[Rig]:
    """It arms silenced claims again by itself."""
    yield from a_rig(Settings(guard=Guard(hits_per_s=RATE, rearm_after_s=REARM_AFTER_S)))


def granted(rig: Rig, client: FakeClient, **fields: Any) -> int:
    """Make a claim; each is at an address of its own, so that none shares a slot."""
    reply = rig.ask(client, "claim", **{**CLAIM, "address": next(ADDRESSES), **fields})
    assert reply["op"] == "granted", reply
    return int(reply["claim"])


def refused(rig: Rig, client: FakeClient, op: str = "claim", **fields: Any) -> dict[str, Any]:
    reply = rig.ask(client, op, **({**CLAIM, **fields} if op in ("claim", "fit") else fields))
    assert reply["op"] == "error", reply
    return reply


def ops(client: FakeClient) -> list[str]:
    return [str(message["op"]) for message in client.read()]


def on_cpus(rig: Rig) -> list[int]:
    """CPU-wide slots that the machine holds on each CPU."""
    events = rig.machine.kernel.events()
    return [sum(event.task is None and event.cpu == cpu for event in events) for cpu in rig.machine.kernel.possible]


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_claims_of_a_user_are_bounded_over_all_its_sessions(rig: Rig) -> None:
    # given two sessions of one user that together have as many claims as it may
    first, second = rig.client(uid=UID), rig.client(uid=UID)
    claims = [granted(rig, client, tid=TID, delivery="hold") for client in (first, second, first, second)]

    # when it asks for one more
    refusal = refused(rig, second, tid=LONELY_TID)

    # then it hears the number and the setting, and nothing is counted
    assert (refusal["errno"], "claim" in refusal) == ("EDQUOT", False)
    assert refusal["sentence"] == f"uid {UID} has 4 claims; more are not allowed (limits.claims_per_uid)"
    assert list(rig.arbiter.books.claims) == claims

    # and others are not concerned, nor is the user once it has released one
    granted(rig, rig.client(uid=UID + 1), tid=LONELY_TID)
    rig.ask(first, "release", claim=claims[0])
    granted(rig, second, tid=TID)


def test_legs_of_a_user_are_bounded_however_they_come_about(rig: Rig) -> None:
    # given a user with legs on a process of two threads, on two CPUs, and on a thread
    client = rig.client(uid=UID)
    granted(rig, client, pid=TID, delivery="hold")
    granted(rig, client, tid=LONELY_TID)

    # when it wants more than are left, then it hears the numbers and the setting
    refusal = refused(rig, client, tid=LONELY_TID, cpus=[0, 1])
    assert refusal["errno"] == "EDQUOT"
    assert refusal["sentence"] == f"uid {UID} has 5 legs and wants 2 more; 6 are allowed (limits.legs_per_uid)"
    assert "wants 4 more" in refused(rig, client, pid=TID)["sentence"]

    # and what is just enough, it gets
    granted(rig, client, tid=LONELY_TID, cpus=[1])
    assert "has 6 legs and wants 1 more" in refused(rig, client, tid=LONELY_TID)["sentence"]


def test_legs_on_cpus_are_counted_as_there_are_cpus_and_pieces() -> None:
    # given slots so short that a claim needs two, and a user who may watch CPUs
    limits = Limits(legs_per_uid=5)
    for rig in a_rig(Settings(limits=limits), cpus=3, backend=FakeBackend({Pool.ANY: 4}, piece_bytes=4)):
        rig.rights.allowed_cpu_wide = True
        client = rig.client(uid=UID)

        # when it wants every CPU, then two pieces on three CPUs are six
        assert "has 0 legs and wants 6 more" in refused(rig, client)["sentence"]
        rig.machine.take_cpu_offline(2)
        rig.turn()

        # and once one of them is gone, four
        granted(rig, client)
        assert "has 4 legs and wants 2 more" in refused(rig, client, cpus=[1])["sentence"]


def test_a_process_whose_threads_have_gone_has_no_legs(rig: Rig) -> None:
    # given a claim on a process that has just exited, and the daemon has not noticed
    client = rig.client(uid=UID)
    granted(rig, client, pid=TID, delivery="hold")
    for tid in (TID, OTHER_TID):
        rig.machine.exit_task(tid)

    # when its owner asks for more in the same moment, then the dead process does not count
    client.ask("claim", **CLAIM, tid=LONELY_TID, cpus=[0, 1])
    rig.turn()

    assert "granted" in ops(client)


def test_root_is_bound_by_what_a_session_may_have_and_not_by_what_a_user_may(rig: Rig) -> None:
    first, second = rig.client(), rig.client()
    for _ in range(4):
        granted(rig, first, pid=TID, delivery="hold")
    granted(rig, first, tid=LONELY_TID)
    granted(rig, second, tid=LONELY_TID)
    granted(rig, first, tid=LONELY_TID)

    refusal = refused(rig, first, tid=LONELY_TID)

    assert refusal["sentence"] == "this session has 6 claims, all it may have (limits.claims_per_session)"
    granted(rig, second, tid=LONELY_TID)


def test_sessions_of_a_user_are_bounded_and_root_is_not_bound(rig: Rig) -> None:
    # given as many sessions as a user may have
    first, *_ = (rig.client(uid=UID) for _ in range(3))
    late = rig.client(uid=UID, hello=False)

    # when it opens one more, then it hears the number and the setting
    reply = rig.ask(late, "hello", version=1)
    assert (reply["op"], reply["errno"]) == ("error", "EDQUOT")
    assert reply["sentence"] == f"uid {UID} has 3 sessions; more are not allowed (limits.sessions_per_uid)"

    # and another user, and root, are not concerned
    rig.client(uid=UID + 1)
    for _ in range(4):
        rig.client()

    # and who leaves makes room, as does who says hello again
    assert rig.ask(first, "hello", version=1)["op"] == "welcome"
    rig.ask(first, "goodbye")
    assert rig.ask(late, "hello", version=1)["op"] == "welcome"


def test_what_is_refused_before_it_is_counted_is_one_line_in_the_log(rig: Rig) -> None:
    client = rig.client(uid=UID, pid=4001)
    with capture_logs() as lines:
        refused(rig, client, tid=4711)
        refused(rig, client, pid=4711, access="x")
        refused(rig, client)

    assert [(line["event"], line["owner"], line["uid"], line["errno"]) for line in lines] == [
        ("refused", "client4001[4001]", UID, errno_name) for errno_name in ("ESRCH", "ESRCH", "EPERM")
    ]
    assert [line["claim"] for line in lines] == [
        "mem:0x404040/8:w for tid 4711 as perf",
        "mem:0x404040/8:x for pid 4711 as perf",
        "mem:0x404040/8:w for cpu-wide as perf",
    ]


# --- would it fit? ---------------------------------------------------------------------------------------------------


def test_whether_it_would_fit_is_told_with_what_the_slots_would_hold_and_takes_nothing(rig: Rig) -> None:
    # given a thread with a free slot
    ann, bob = rig.client(pid=4001), rig.client()
    for _ in range(3):
        granted(rig, ann, tid=TID, kind="ptrace")
    before = rig.arbiter.books.dump()
    told = len(rig.arbiter.books.ended)

    # when it is asked, again and again, then one more fits
    pieces = [{"address": 0x404040, "length": 8, "access": "w", "pool": "any"}]
    for _ in range(3):
        reply = rig.ask(bob, "fit", **CLAIM, tid=TID)
        assert reply == {"op": "fit", "id": reply["id"], "fits": True, "pieces": pieces}

    # and when there is no room, it hears who is in the way, as it would at a claim
    granted(rig, ann, tid=TID, kind="ptrace")
    reply, refusal = rig.ask(bob, "fit", **CLAIM, tid=TID), refused(rig, bob, tid=TID)
    assert (reply["op"], reply["fits"], reply["pieces"], reply["errno"]) == ("fit", False, pieces, "ENOSPC")
    assert (reply["sentence"], reply["holders"]) == (refusal["sentence"], refusal["holders"])
    assert [holder["pid"] for holder in reply["holders"]] == [4001]

    # and nothing was taken, nor is there a story of it
    assert len(rig.arbiter.books.ended) == told + 1, "the claim's"
    rig.ask(ann, "release", claim=4)
    assert rig.arbiter.books.dump() == before


def test_what_could_not_be_claimed_at_all_is_refused_as_a_claim_would_be(rig: Rig) -> None:
    client = rig.client(uid=UID)

    assert refused(rig, client, "fit", tid=4711)["errno"] == "ESRCH"
    assert refused(rig, client, "fit")["errno"] == "EPERM"
    assert refused(rig, client, "fit", tid=TID, cpus=[])["errno"] == "EINVAL"
    reply = rig.ask(client, "fit", **CLAIM, tid=TID, cpus=[77])
    assert (reply["op"], reply["fits"], reply["errno"]) == ("fit", False, "ENODEV")


def test_a_question_does_not_count_against_the_bounds(rig: Rig) -> None:
    client = rig.client(uid=UID)
    for _ in range(4):
        granted(rig, client, tid=TID)

    assert rig.ask(client, "fit", **CLAIM, tid=LONELY_TID)["fits"]


def test_whether_it_would_fit_minds_who_shares_who_waits_who_gives_way_and_the_reserve(rig: Rig) -> None:
    # given a thread whose slots are all held, for claims of a low rank and for one that waits
    client = rig.client()
    for address in range(0, 32, 8):
        granted(rig, client, address=address, tid=TID)
    rig.ask(client, "claim", **{**CLAIM, "length": 4}, tid=TID, wait_until_ns=rig.clock.now_ns() + 10**9)
    before = rig.arbiter.books.dump()

    # when it is asked, then what is armed already fits, as does what others would give way to
    assert rig.ask(client, "fit", **{**CLAIM, "address": 8}, tid=TID)["fits"]
    reply = rig.ask(client, "fit", **CLAIM, tid=TID, kind="ptrace")
    assert reply["fits"]
    assert reply["sentence"].startswith("once claim 4 has given way: no slot on tid 812")
    reply = rig.ask(client, "fit", **CLAIM, tid=TID)
    assert (reply["fits"], reply["errno"]) == (False, "ENOSPC")

    # and nobody gives way to a question
    assert ops(client) == []
    assert rig.arbiter.books.dump() == before


# --- sharing, waiting, giving way ------------------------------------------------------------------------------------


def in_a_second(rig: Rig) -> int:
    return rig.clock.now_ns() + 10**9


def full(rig: Rig, client: FakeClient, **fields: Any) -> list[int]:
    """Hold every slot of a thread."""
    return [granted(rig, client, tid=TID, **fields) for _ in range(4)]


def queued(rig: Rig, client: FakeClient, **fields: Any) -> int:
    reply = rig.ask(client, "claim", **{**CLAIM, "tid": TID, "wait_until_ns": in_a_second(rig), **fields})
    assert reply["op"] == "queued", reply
    return int(reply["claim"])


def test_two_on_one_slot_have_their_own_hits_and_neither_minds_the_other_leaving(rig: Rig) -> None:
    # given a claim with a hit that nobody has drained
    ann, bob = rig.client(), rig.client(uid=UID)
    first = granted(rig, ann, **CLAIM, tid=TID)
    rig.machine.hit(1, 1)

    # when another user claims the same
    second = granted(rig, bob, **CLAIM, tid=TID)
    rig.machine.hit(1, 2)
    rig.turn()

    # then one slot is held, and each counts from when it came
    assert len(rig.machine.armed) == 1
    (row,) = rig.ask(bob, "slots")["resources"]
    assert [(of["claim"], of["hits"]) for of in row["claims"]] == [(first, 3), (second, 2)]
    assert row["address"] == CLAIM["address"], "it is its own, too"

    # and when one leaves, the other goes on
    released = rig.ask(ann, "release", claim=first)
    assert (released["hits"], released["delivered"]) == (3, 3)
    rig.machine.hit(1, 4)
    rig.turn()
    assert rig.ask(bob, "counts", claim=second)["hits"] == 6
    assert sum(message["count"] for message in bob.read() if message["op"] == "hits") == 6
    assert rig.ask(bob, "release", claim=second)["hits"] == 6
    assert rig.machine.armed == {}


def test_who_joins_must_be_allowed_to_watch_as_if_alone(rig: Rig) -> None:
    granted(rig, rig.client(), **CLAIM, tid=TID)
    rig.rights.forbidden = {TID}

    assert refused(rig, rig.client(uid=UID), tid=TID)["errno"] == "EPERM"


def test_a_flood_silences_everybody_on_the_slot(rig: Rig) -> None:
    ann, bob = rig.client(), rig.client()
    claims = [granted(rig, client, **CLAIM, tid=TID) for client in (ann, bob)]

    rig.machine.hit(1, 10 * RATE)
    rig.turn()

    for client, claim in zip((ann, bob), claims, strict=True):
        assert ops(client) == ["hits", "guarded"]
        assert rig.ask(client, "counts", claim=claim)["hits"] == RATE


def test_those_who_come_and_go_on_a_slot_do_not_wear_its_fuse_down(rig: Rig) -> None:
    """What is drained for them out of turn is filled up again like all else."""
    client, other = rig.client(), rig.client()
    claim = granted(rig, client, **CLAIM, tid=TID)

    for _ in range(20):
        rig.machine.hit(1, RATE // 5)
        guest = granted(rig, other, **CLAIM, tid=TID)
        rig.machine.hit(1, RATE // 5)
        rig.ask(other, "release", claim=guest)
        rig.clock.wind(1)
        rig.turn()

    assert rig.ask(client, "counts", claim=claim)["hits"] == 40 * (RATE // 5)
    assert set(ops(client)) == {"hits"}


def test_who_waits_hears_its_place_at_once_and_has_its_slot_when_there_is_room(rig: Rig) -> None:
    # given a thread without room
    ann, bob = rig.client(pid=4001), rig.client()
    held = full(rig, ann)

    # when another would wait, then it hears in which place, and for whom
    reply = rig.ask(bob, "claim", **CLAIM, tid=TID, wait_until_ns=in_a_second(rig), label="patience")
    assert (reply["op"], reply["position"], reply["errno"]) == ("queued", 1, "ENOSPC")
    assert [holder["pid"] for holder in reply["holders"]] == [4001]
    assert (ops(ann), ops(bob)) == (["contended"] * 4, []), "each of those in the way"
    assert rig.ask(bob, "counts", claim=reply["claim"])["hits"] == 0

    # and when there is room, it hears what it would have heard at once, and gets hits
    rig.ask(ann, "release", claim=held[0])
    (granted_now,) = bob.read()
    assert (granted_now["op"], granted_now["n"], granted_now["claim"]) == ("granted", 1, reply["claim"])
    assert granted_now["pieces"][0]["address"] == CLAIM["address"]
    rig.machine.hit(max(rig.machine.armed), 2)
    rig.turn()
    assert ops(bob) == ["hits"]


def test_a_wait_ends_at_its_time_and_the_daemon_does_not_sleep_through_it(rig: Rig) -> None:
    ann, bob = rig.client(), rig.client()
    full(rig, ann)
    claim = queued(rig, bob)

    rig.clock.wind(0.75)
    for _ in range(3):
        rig.turn()
    assert rig.server._wait_s() == 0.25
    rig.clock.wind(0.25)
    rig.turn()

    (lost,) = bob.read()
    assert (lost["op"], lost["claim"], lost["reason"], lost["hits"]) == ("lost", claim, "timeout", 0)


def test_who_has_waited_long_enough_may_leave_the_queue(rig: Rig) -> None:
    ann, bob = rig.client(), rig.client()
    full(rig, ann)
    claim = queued(rig, bob)

    released = rig.ask(bob, "release", claim=claim)

    assert (released["op"], released["hits"]) == ("released", 0)
    assert len(rig.arbiter.queue) == 0


def test_a_wait_that_is_longer_than_the_daemon_allows_is_refused_with_the_setting(rig: Rig) -> None:
    refusal = refused(rig, rig.client(), tid=TID, wait_until_ns=rig.clock.now_ns() + 3601 * 10**9)

    assert (refusal["errno"], refusal["sentence"]) == (
        "EINVAL",
        "a wait of 3601 s is more than the 3600 s of this daemon (policy.wait_max_s)",
    )


def test_those_who_wait_count_against_the_bounds(rig: Rig) -> None:
    full(rig, rig.client())
    client = rig.client(uid=UID)
    for _ in range(4):
        queued(rig, client)

    assert "has 4 claims" in refused(rig, client, tid=TID, wait_until_ns=in_a_second(rig))["sentence"]

    # and with the legs that they wait for
    other = rig.client(uid=UID + 1)
    for _ in range(3):
        queued(rig, other, cpus=[0, 1])
    assert "has 6 legs and wants 1 more" in refused(rig, other, tid=LONELY_TID)["sentence"]


def test_a_higher_rank_takes_the_slot_of_a_lower_one_which_counts_on_when_it_has_it_back(rig: Rig) -> None:
    # given a thread without room, and a claim on it with a hit
    ann, bob = rig.client(), rig.client(pid=4002)
    youngest = full(rig, ann)[-1]
    rig.machine.hit(4, 1)

    # when a claim of higher rank comes, then somebody is asked to give way
    asked = bob.ask("claim", **CLAIM, tid=TID, kind="ptrace")
    rig.turn()
    revoke, hits = ann.read()
    assert (hits["op"], revoke["op"], revoke["claim"], revoke["by"]["pid"]) == ("hits", "revoke", youngest, 4002)
    assert revoke["deadline_ns"] == rig.clock.now_ns() + 10**8
    assert bob.read() == []

    # and goes on until it does
    rig.machine.hit(4, 2)
    assert rig.ask(ann, "yield", claim=youngest) == {"op": "yielded", "id": ann._last_id, "claim": youngest}
    assert [(message["op"], message.get("count")) for message in ann.read()] == [("hits", 2), ("suspended", None)]
    (reply,) = bob.read()
    assert (reply["op"], reply["id"]) == ("granted", asked)
    assert rig.ask(ann, "counts", claim=youngest)["hits"] == 3

    # and when the other has gone, it is back, and its account is of both times
    rig.ask(bob, "release", claim=reply["claim"])
    assert ops(ann) == ["resumed"]
    rig.machine.hit(max(rig.machine.armed), 4)
    released = rig.ask(ann, "release", claim=youngest)
    assert (released["hits"], released["delivered"]) == (7, 7)


def test_who_does_not_give_way_is_made_to(rig: Rig) -> None:
    ann, bob = rig.client(), rig.client()
    full(rig, ann)
    bob.ask("claim", **CLAIM, tid=TID, kind="ptrace")
    rig.turn()
    assert (ops(ann), ops(bob)) == (["revoke"], [])

    rig.clock.wind(0.1)
    rig.turn()

    assert (ops(ann), ops(bob)) == (["suspended"], ["granted"])


def test_nobody_gives_way_unasked_or_for_others(rig: Rig) -> None:
    ann, bob = rig.client(), rig.client()
    claim = granted(rig, ann, tid=TID)

    assert refused(rig, ann, "yield", claim=claim)["errno"] == "EINVAL"
    assert refused(rig, bob, "yield", claim=claim)["errno"] == "EPERM"
    assert refused(rig, bob, "yield", claim=4711)["errno"] == "ENOENT"


def test_only_root_goes_before_others_of_its_kind(rig: Rig) -> None:
    refusal = refused(rig, rig.client(uid=UID), tid=TID, priority=1)

    assert (refusal["errno"], refusal["sentence"]) == (
        "EPERM",
        "priority 1 is for root only; others may ask for 0 or less",
    )


def test_some_slots_are_left_to_users_outside() -> None:
    # given a daemon that leaves one slot of four
    for rig in a_rig(reserve_slots=1):
        client = rig.client()
        for _ in range(3):
            granted(rig, client, tid=TID)

        # when the fourth is wanted
        refusal = refused(rig, client, tid=TID)

        # then that is no matter of the kernel's, and the refusal says so
        assert refusal["errno"] == "EAGAIN"
        assert "(policy.reserve_slots)" in refusal["sentence"]
        assert rig.ask(client, "fit", **CLAIM, tid=TID)["errno"] == "EAGAIN"


# --- tracers ---------------------------------------------------------------------------------------------------------


def tracer(rig: Rig, client: FakeClient, **fields: Any) -> int:
    return granted(rig, client, tid=TID, kind="ptrace", armed_by="tracer", **fields)


def states(rig: Rig, client: FakeClient) -> list[str]:
    return [of["state"] for row in rig.ask(client, "slots")["resources"] for of in row["claims"]]


def test_a_tracer_takes_its_slot_and_leaves_it_behind_until_the_thread_exits(rig: Rig) -> None:
    # given a place that is held for a tracer
    client = rig.client()
    claim = tracer(rig, client)
    assert len(rig.machine.kernel.events()) == 1

    # when it takes the slot, then it finds it free
    assert rig.ask(client, "taking", claim=claim)["op"] == "take"
    assert (rig.machine.kernel.events(), states(rig, client)) == ([], ["taking"])
    rig.machine.poke(TID)
    assert rig.ask(client, "taken", claim=claim)["op"] == "taken"
    assert states(rig, client) == ["taken"]

    # and what it releases the thread keeps, for which there are no counts
    assert rig.ask(client, "release", claim=claim)["op"] == "released"
    assert states(rig, client) == ["residue"]
    assert rig.ask(client, "counts", claim=claim)["hits"] == 0

    # until the thread exits
    rig.machine.exit_task(TID)
    rig.turn()
    assert states(rig, client) == []
    assert rig.machine.armed == {}


def test_a_tracer_without_a_placeholder_takes_its_slot_at_once(rig: Rig) -> None:
    client = rig.client()
    claim = tracer(rig, client, placeholder=False)
    assert (rig.machine.kernel.events(), states(rig, client)) == ([], ["taking"])

    rig.machine.poke(TID)

    assert rig.ask(client, "taken", claim=claim)["op"] == "taken"


@pytest.mark.parametrize("pokes", [True, False])
def test_of_a_tracer_that_dies_in_between_what_it_took_stays_and_no_more(rig: Rig, pokes: bool) -> None:
    client, other = rig.client(), rig.client()
    rig.ask(client, "taking", claim=tracer(rig, client))
    if pokes:
        rig.machine.poke(TID)

    client.die()
    rig.turn()

    assert states(rig, other) == (["residue"] if pokes else [])


def test_who_took_a_tracers_slot_first_is_found_and_named(rig: Rig) -> None:
    # given a tracer that is about to take its slot, and somebody outside who is faster
    client = rig.client()
    claim = tracer(rig, client)
    rig.ask(client, "taking", claim=claim)
    full_outside(rig)
    with pytest.raises(OSError, match="No space left"):
        rig.machine.poke(TID)

    # when it says so
    assert rig.ask(client, "take_failed", claim=claim, errno=errno.ENOSPC)["op"] == "take_failed"

    # then its claim is over, and it hears who has the slot
    lost, foreign = client.read()
    assert (lost["op"], lost["claim"], lost["reason"]) == ("lost", claim, "take failed")
    assert (foreign["op"], foreign["claim"], foreign["holders"]) == ("foreign", claim, [GDB_ON_THE_WIRE])
    assert rig.machine.armed == {}


def test_what_is_not_a_tracers_is_not_taken(rig: Rig) -> None:
    ann, bob = rig.client(), rig.client()
    claim, traced = granted(rig, ann, tid=TID), tracer(rig, ann)

    for op, fields in (("taking", {}), ("taken", {}), ("take_failed", {"errno": 28})):
        assert refused(rig, ann, op, claim=claim, **fields)["errno"] == "EINVAL"
        assert refused(rig, bob, op, claim=traced, **fields)["errno"] == "EPERM"
        assert refused(rig, ann, op, claim=4711, **fields)["errno"] == "ENOENT"
    assert refused(rig, ann, armed_by="tracer")["errno"] == "EINVAL"


# --- processes, exec -------------------------------------------------------------------------------------------------


def test_a_claim_on_a_process_is_listed_as_one_and_ends_with_its_last_thread(rig: Rig) -> None:
    # given a claim on a process of two threads
    client = rig.client()
    claim = granted(rig, client, pid=TID)
    (row,) = rig.ask(client, "slots")["resources"]
    assert (row["pid"], row["tid"], row["cpus"]) == (TID, 0, None)

    # when one of them exits, then the claim goes on
    rig.machine.exit_task(TID)
    rig.turn()
    assert ops(client) == []

    # and ends with the other
    rig.machine.exit_task(OTHER_TID)
    rig.turn()
    (lost,) = client.read()
    assert (lost["op"], lost["claim"], lost["reason"]) == ("lost", claim, "exit")
    assert lost["sentence"] == f"pid {TID} has exited"
    assert rig.machine.armed == {}


@pytest.mark.parametrize("target", [{"tid": LONELY_TID}, {"pid": LONELY_TID}], ids=["thread", "process"])
@pytest.mark.parametrize("across_exec", [True, False])
def test_a_claim_ends_at_an_exec_unless_it_is_to_go_on(rig: Rig, target: dict[str, int], across_exec: bool) -> None:
    # given a claim with a hit that is not delivered yet
    client = rig.client()
    claim = granted(rig, client, **target, across_exec=across_exec)
    rig.machine.hit(1, 2)

    # when its target runs another program
    rig.machine.exec_task(LONELY_TID)
    rig.turn()
    rig.turn()

    # then it goes on if it was asked for so, and else ends after its last hits
    if across_exec:
        assert ops(client) == ["hits"]
        assert rig.ask(client, "counts", claim=claim)["hits"] == 2
        return
    hits, lost = client.read()
    assert (hits["count"], lost["op"], lost["reason"], lost["hits"], lost["delivered"]) == (2, "lost", "exec", 2, 2)
    assert lost["sentence"].endswith(f"id {LONELY_TID} runs another program now")
    assert rig.machine.armed == {}


def test_a_thread_that_gets_privileges_while_its_slot_is_taken_is_not_watched(rig: Rig) -> None:
    # given a thread that is about to run a program its owner may not watch
    client = rig.client(uid=UID)
    rig.rights.about_to_exec = {TID}
    before = rig.arbiter.books.dump()

    # when it is claimed, then that is refused after all, and nothing is left of it
    refusal = refused(rig, client, tid=TID)
    assert (refusal["errno"], refusal["sentence"]) == ("EPERM", f"uid {UID} may not watch tid {TID}")
    assert rig.arbiter.books.dump() == before
    assert rig.machine.armed == {}
    assert rig.machine.kernel.events() == []
    assert ops(client) == []

    # and its story says so
    story = rig.ask(client, "why", claim=refusal["claim"])
    assert (story["state"], story["lines"][-1].split("  ")[1]) == (
        "refused",
        f"refused by the kernel: uid {UID} may not watch tid {TID}",
    )


def test_of_cpu_wide_hits_those_of_one_process_are_delivered_and_the_others_accounted_for(rig: Rig) -> None:
    client = rig.client()
    claim = granted(rig, client, only_pid=TID)
    for pid, hits in ((TID, 2), (4711, 3)):
        rig.machine.hit(1, hits, pid=pid)
    rig.turn()

    counts = rig.ask(client, "counts", claim=claim)
    released = rig.ask(client, "release", claim=claim)

    for told in (counts, released):
        assert (told["hits"], told["delivered"], told["filtered"]) == (5, 2, 3)
    (hits_notice,) = client.read()
    assert hits_notice["count"] == 2


# --- floods ----------------------------------------------------------------------------------------------------------


def guarded(rig: Rig, client: FakeClient, **fields: Any) -> int:
    """A claim that has been silenced, and whose owner has read so."""
    claim = granted(rig, client, tid=TID, **fields)
    rig.machine.hit(next(reversed(rig.machine.armed)), 10 * RATE)
    rig.clock.wind(0.3)  # what only counts is looked at four times a second
    rig.turn()
    assert rig.ask(client, "why", claim=claim)["state"] == "guarded"
    assert ops(client) == (["guarded"] if fields.get("delivery") == "count" else ["hits", "guarded"])
    return claim


@pytest.mark.parametrize("delivery", ["hits", "count"])
def test_a_flood_is_silenced_keeps_its_slot_and_goes_on_when_it_is_armed_again(rig: Rig, delivery: str) -> None:
    # given a flood, of which a second's worth came through
    client = rig.client()
    claim = guarded(rig, client, delivery=delivery)
    held = rig.machine.kernel.events()
    rig.machine.hit(1, 5)
    assert rig.ask(client, "counts", claim=claim)["hits"] == RATE
    (row,) = rig.ask(client, "slots")["resources"]
    assert (row["claims"][0]["state"], len(held)) == ("guarded", 1)

    # when its owner wants it back
    request = client.ask("rearm", claim=claim)
    rig.turn()

    # then it reports again, in the slot it had, and its counts go on
    resumed, rearmed = client.read()
    assert (resumed["op"], resumed["claim"], "cpu" in resumed) == ("resumed", claim, False)
    assert rearmed == {"op": "rearmed", "id": request, "claim": claim}
    rig.machine.hit(1, 7)
    rig.turn()
    assert rig.ask(client, "counts", claim=claim)["hits"] == RATE + 7
    assert rig.machine.kernel.events() == held


def test_a_count_below_the_rate_is_never_silenced(rig: Rig) -> None:
    """Nothing tells of hits that are only counted: its fuse is topped up because it is looked at."""
    client = rig.client()
    claim = granted(rig, client, tid=TID, delivery="count")

    for _ in range(40):
        rig.machine.hit(1, RATE // 5)
        rig.clock.wind(0.25)
        rig.turn()

    assert rig.ask(client, "counts", claim=claim)["hits"] == 40 * (RATE // 5)
    assert ops(client) == []


def test_a_claim_may_have_a_guard_of_its_own(rig: Rig) -> None:
    client = rig.client()
    reply = rig.ask(client, "claim", **CLAIM, tid=TID, guard=0, ring_bytes=65536)
    assert (reply["guard"], rig.ask(client, "claim", **CLAIM, tid=TID, guard=7)["guard"]) == (0, 7)

    rig.machine.hit(1, 100 * RATE)
    rig.machine.hit(2, 100 * RATE)
    rig.turn()

    states = [row["claims"][0]["state"] for row in rig.ask(client, "slots")["resources"]]
    assert states == ["armed", "guarded"]
    assert [rig.machine.totals(resource_id).hits for resource_id in (1, 2)] == [100 * RATE, 7]


def test_a_silenced_claim_is_armed_again_by_itself_where_the_daemon_is_set_so(patient_rig: Rig) -> None:
    rig = patient_rig
    client = rig.client()
    claim = guarded(rig, client)

    rig.clock.wind(REARM_AFTER_S - 0.01)
    rig.turn()
    assert ops(client) == []
    rig.clock.wind(0.02)
    rig.turn()

    assert ops(client) == ["resumed"]
    assert rig.ask(client, "why", claim=claim)["state"] == "armed"


def test_the_daemon_does_not_sleep_through_the_time_to_arm_again(patient_rig: Rig) -> None:
    # given a claim that is armed again in a quarter of a second, and rings that were just looked into
    rig = patient_rig
    guarded(rig, rig.client())
    rig.clock.wind(REARM_AFTER_S - 0.25)
    for _ in range(3):
        rig.turn()

    # when the daemon would sleep, then no longer than that
    assert rig.server._wait_s() == 0.25


def test_a_slot_that_somebody_outside_took_while_it_was_armed_again_ends_the_claim(rig: Rig) -> None:
    # given a flood, and somebody outside who is quick
    client = rig.client()
    claim = guarded(rig, client)
    rig.machine.steals = 1.0

    # when its owner wants it back
    request = client.ask("rearm", claim=claim)
    rig.turn()

    # then it hears that it is gone, with the final account, and nothing is held
    error, lost = client.read()
    assert (error["op"], error["id"], error["errno"], error["claim"]) == ("error", request, "EMFILE", claim)
    assert (lost["op"], lost["claim"], lost["reason"], lost["hits"]) == ("lost", claim, "stolen", RATE)
    assert lost["hits"] == lost["delivered"] + lost["lost"] + lost["dropped"]
    assert lost["sentence"] == error["sentence"]
    assert rig.machine.armed == {}
    assert rig.arbiter.books.claims == {}


def test_only_what_is_silent_is_armed_again(rig: Rig) -> None:
    client = rig.client()
    claim = granted(rig, client, tid=TID)

    assert refused(rig, client, "rearm", claim=claim)["errno"] == "EINVAL"
    assert refused(rig, client, "rearm", claim=4711)["errno"] == "ENOENT"
    rig.ask(client, "release", claim=claim)
    assert refused(rig, client, "rearm", claim=claim)["errno"] == "ENOENT"


# --- CPUs that come and go -------------------------------------------------------------------------------------------


def test_a_cpu_that_goes_takes_its_slots_along_and_brings_them_back(rig: Rig) -> None:
    # given claims on every CPU, on CPU 1, and on a thread
    client = rig.client()
    everywhere, on_1 = granted(rig, client), granted(rig, client, cpus=[1])
    granted(rig, client, tid=TID)
    rig.machine.hit(1, 3)

    # when it goes
    rig.machine.take_cpu_offline(1)
    rig.turn()

    # then its owner hears of each slot, and the machine has given them back; hits before that are not lost
    notices = client.read()
    lost = [message for message in notices if message["op"] == "lost"]
    assert [(message["claim"], message["reason"], message["cpu"]) for message in lost] == [
        (everywhere, "offline", 1),
        (on_1, "offline", 1),
    ]
    assert sum(message["count"] for message in notices if message["op"] == "hits") == 3
    assert on_cpus(rig) == [1, 0]
    cpus = rig.ask(client, "slots")["cpus"]
    assert [(row["online"], row["cpu_wide"]) for row in cpus] == [(True, {"any": 1}), (False, {"any": 0})]
    assert rig.ask(client, "capabilities")["cpus_online"] == [0]

    # and when it is back, it has them again
    rig.machine.bring_cpu_online(1)
    rig.turn()
    assert [(message["op"], message["claim"], message["cpu"]) for message in client.read()] == [
        ("resumed", everywhere, 1),
        ("resumed", on_1, 1),
    ]
    assert on_cpus(rig) == [1, 2]


def test_a_slot_that_the_kernel_does_not_give_back_is_told(rig: Rig) -> None:
    # given a claim on every CPU, and somebody outside who takes what is free while CPU 1 is away
    client = rig.client()
    claim = granted(rig, client)
    rig.machine.take_cpu_offline(1)
    rig.turn()
    rig.machine.kernel.held[-1] = [Event(None, 1, Pool.ANY)] * 4
    client.read()

    # when it is back
    rig.machine.bring_cpu_online(1)
    rig.turn()

    # then the owner hears that it has no slot there, and goes on where it has one
    (suspended,) = client.read()
    assert (suspended["op"], suspended["claim"], suspended["cpu"]) == ("suspended", claim, 1)
    assert suspended["sentence"] == "cpu 1 is back, without it: the kernel refused with ENOSPC"
    rig.machine.hit(1, 1)
    rig.turn()
    assert ops(client) == ["hits"]
    assert rig.ask(client, "release", claim=claim)["hits"] == 1
    del rig.machine.kernel.held[-1]


def test_what_is_claimed_on_an_offline_cpu_is_refused(rig: Rig) -> None:
    client = rig.client()
    rig.machine.take_cpu_offline(1)

    assert refused(rig, client, cpus=[1])["errno"] == "ENODEV"

    assert granted(rig, client)
    assert on_cpus(rig) == [1, 0]


# --- who is in the way outside ---------------------------------------------------------------------------------------

GDB = Foreign(812, "gdb", 1000, 4, "on tid 812", "tracer")
GDB_ON_THE_WIRE = {
    "pid": 812,
    "comm": "gdb",
    "uid": 1000,
    "kind": "",
    "slots": 4,
    "place": "on tid 812",
    "claim_ids": [],
    "evidence": "tracer",
}


def full_outside(rig: Rig) -> None:
    """Let somebody outside hold every slot of a thread."""
    rig.machine.kernel.held[-1] = [Event(rig.machine.tasks[TID], ANY_CPU, Pool.ANY)] * 4
    rig.machine.outside = [GDB]


def test_a_refusal_by_the_kernel_names_who_was_found_outside(rig: Rig) -> None:
    client = rig.client()
    full_outside(rig)

    refusal = refused(rig, client, tid=TID)

    assert (refusal["errno"], refusal["holders"]) == ("ENOSPC", [GDB_ON_THE_WIRE])
    assert refusal["sentence"].endswith("4 of 4 held (gdb[812] outside hwbpd: 4 on tid 812 (tracer))")
    (place,) = rig.attribution.looked_at
    assert (place.pool, place.target.task, place.cpu) == (Pool.ANY, rig.machine.tasks[TID], None)


def test_while_somebody_looks_others_are_served_and_the_claim_is_neither_held_nor_refused(rig: Rig) -> None:
    # given a claim that the kernel has no room for, and a look that takes its time
    client, other = rig.client(), rig.client()
    full_outside(rig)
    rig.attribution.is_looking = True
    asked = client.ask("claim", **CLAIM, tid=TID)
    rig.turn()

    # when others ask, and its owner asks something else, then they are served
    granted(rig, other, tid=LONELY_TID)
    assert [row["tid"] for row in rig.ask(client, "slots")["resources"]] == [LONELY_TID]
    assert refused(rig, client, "counts", claim=1)["errno"] == "ENOENT"
    assert refused(rig, client, "release", claim=1)["errno"] == "ENOENT"
    assert rig.ask(client, "why", claim=1)["state"] == "attributing"
    assert client.read() == []

    # and when the look is over, it is refused
    rig.attribution.is_looking = False
    rig.turn()
    (refusal,) = client.read()
    assert (refusal["id"], refusal["errno"], refusal["holders"]) == (asked, "ENOSPC", [GDB_ON_THE_WIRE])


@pytest.mark.parametrize("way", ["goodbye", "cut", "death", "stop"])
def test_who_has_left_before_the_look_is_over_hears_nothing_of_it(way: str) -> None:
    for rig in a_rig():
        # given a claim for which somebody looks, and a question who else there is
        client = rig.client()
        full_outside(rig)
        rig.attribution.is_looking = True
        client.ask("claim", **CLAIM, tid=TID)
        client.ask("foreign")
        rig.turn()

        # when its owner leaves, and the look ends then
        match way:
            case "goodbye":
                client.ask("goodbye")
            case "cut":
                client.cut()
            case "death":
                client.die()
            case "stop":
                continue
        rig.turn()
        rig.attribution.is_looking = False
        rig.turn()

        # then nobody is told, and nothing is left of it
        assert ops(client) == (["bye"] if way == "goodbye" else [])
        assert rig.arbiter.books.claims == {}
        assert rig.ask(rig.client(), "slots")["resources"] == []


def test_who_holds_what_outside_is_looked_for_on_every_cpu(rig: Rig) -> None:
    rig.machine.outside = [GDB]
    client = rig.client()

    reply = rig.ask(client, "foreign")

    assert reply == {"op": "foreign", "id": reply["id"], "holders": [GDB_ON_THE_WIRE] * 2}
    assert [(place.target.is_cpu_wide, place.cpu) for place in rig.attribution.looked_at] == [(True, 0), (True, 1)]


# --- what is not shown -----------------------------------------------------------------------------------------------


def test_a_user_does_not_learn_from_its_hits_where_the_kernel_runs(rig: Rig) -> None:
    mine, roots = rig.client(uid=UID), rig.client()
    for client in (mine, roots):
        granted(rig, client, tid=TID)
    for resource_id in (1, 2):
        rig.machine.hit(resource_id, 1, where=IN_KERNEL)
    rig.turn()

    ips = [RECORD.unpack(client.read()[0]["records"])[3] for client in (mine, roots)]

    assert ips[0] == 0
    assert ips[1] != 0
