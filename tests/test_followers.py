"""Who is told what is decided, and what becomes of followers that do not read: on a whole daemon on fakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from hwbpd.outbox import DECISIONS_WAITING_MAX
from hwbpd.settings import Guard, Limits, Rings, Settings
from tests.fakes import FakeClient, Rig

TID, UID, OTHER_UID = 812, 1000, 1001
CLAIM: dict[str, Any] = {"address": 0x404040, "length": 8, "access": "w", "tid": TID}
SETTINGS = Settings(
    limits=Limits(followers_per_uid=2, messages_queued_per_session=10),
    rings=Rings(bytes_default=4096),
    guard=Guard(hits_per_s=50),
)


def a_rig() -> Iterator[Rig]:
    rig = Rig(settings=SETTINGS)
    rig.machine.start_task(TID)
    yield rig
    rig.stop()


@pytest.fixture
def rig() -> Iterator[Rig]:
    yield from a_rig()


def follower(rig: Rig, uid: int = 0) -> FakeClient:
    client = rig.client(uid=uid)
    assert rig.ask(client, "follow")["op"] == "following"
    return client


def decisions(client: FakeClient) -> list[dict[str, Any]]:
    """What it was told since it was last asked; it reads everything."""
    return [message for message in client.read() if message["op"] == "decision"]


def told(client: FakeClient) -> list[str]:
    return [decision["what"] for decision in decisions(client)]


def test_a_decision_is_told_to_the_log_and_to_followers_alike(rig: Rig) -> None:
    # Given a follower of everything,
    root = follower(rig)

    # when somebody comes, claims, is refused by its kernel and at the door, releases, and goes,
    with capture_logs() as lines:
        user = rig.client(pid=4001, uid=UID)
        claim = rig.ask(user, "claim", **CLAIM, label="the list", kind="ptrace")["claim"]
        rig.ask(user, "claim", **CLAIM | {"tid": 99})
        rig.ask(user, "release", claim=12345)
        rig.ask(user, "release", claim=claim)
        rig.ask(user, "goodbye")

    # then each is told once to both, in the same words.
    heard = decisions(root)
    assert [each["what"] for each in heard] == [line["event"] for line in lines]
    assert [each["what"] for each in heard] == ["session", "granted", "refused", "refused", "ended", "session over"]
    assert [each.get("sentence", "") for each in heard] == [line.get("reason", "") for line in lines]
    assert {(each["comm"], each["pid"], each["uid"]) for each in heard} == {("client4001", 4001, UID)}
    assert {each["session"] for each in heard} == {2}
    came, granted, at_the_door, no_such, ended, _ = heard
    assert came["label"] == "test"
    assert (granted["claim"], granted["kind"], granted["label"]) == (claim, "ptrace", "the list")
    assert granted["about"] == "mem:0x404040/8:w for tid 812 as ptrace"
    assert granted["at_ns"] == rig.clock.now_ns()
    assert (at_the_door["errno"], at_the_door["about"]) == ("ESRCH", "mem:0x404040/8:w for tid 99 as perf")
    assert no_such["errno"] == "ENOENT"
    assert (ended["claim"], ended["reason"]) == (claim, "released")
    assert "missed" not in ended


def test_what_becomes_of_a_claim_that_goes_on_is_told_too(rig: Rig) -> None:
    # Given a claim on every CPU,
    root, owner = follower(rig), rig.client()
    claim = rig.ask(owner, "claim", **CLAIM | {"tid": 0})["claim"]
    assert told(root)[-1] == "granted"

    # when a CPU goes and comes back, and then more hits come than may,
    rig.machine.take_cpu_offline(1)
    rig.turn()
    rig.machine.bring_cpu_online(1)
    rig.turn()
    rig.machine.hit(1, 51)
    rig.turn()
    rig.clock.wind(1)
    rig.turn()
    rig.ask(owner, "rearm", claim=claim)

    # then all of it is heard, with the CPU where there is one.
    assert [(each["what"], each["claim"], each.get("cpu")) for each in decisions(root)] == [
        ("offline", claim, 1),
        ("resumed", claim, 1),
        ("guarded", claim, None),
        ("resumed", claim, None),
    ]


def test_others_than_root_hear_of_their_own_uid_only(rig: Rig) -> None:
    # Given followers of two users, and root's,
    root, ours, theirs = follower(rig), follower(rig, UID), follower(rig, OTHER_UID)
    for each in (root, ours, theirs):
        each.read()

    # when one of the users and root claim and are refused,
    user = rig.client(uid=UID)
    rig.ask(user, "claim", **CLAIM)
    rig.ask(rig.client(), "claim", **CLAIM | {"tid": 99})

    # then everybody hears what is theirs to hear.
    assert told(root) == ["session", "granted", "session", "refused"]
    assert told(ours) == ["session", "granted"]
    assert told(theirs) == []


def test_following_twice_is_following_once_and_nobody_else_is_told(rig: Rig) -> None:
    # Given one that followed twice, and one that does not follow,
    root, silent = follower(rig), rig.client()
    root.read()
    assert rig.ask(root, "follow")["op"] == "following"

    # when something is decided, then it is told once.
    rig.client()
    assert told(root) == ["session"]
    assert told(silent) == []


def test_a_follower_hears_nothing_of_its_own_end_nor_after(rig: Rig) -> None:
    # Given two followers, one of which has a claim,
    stays, goes = follower(rig), follower(rig)
    rig.ask(goes, "claim", **CLAIM)
    stays.read(), goes.read()

    # when that one says goodbye, then what ends with it is told to the other,
    rig.ask(goes, "goodbye")
    assert told(stays) == ["ended", "session over"]

    # and nothing comes to the connection any more, not even in a session that begins there later.
    goes.ask("hello", version=1)
    rig.turn()
    rig.client()
    assert told(goes) == []
    assert told(stays) == ["session", "session"]


def test_followers_of_a_user_are_bounded_and_the_refusal_says_how_many(rig: Rig) -> None:
    first, second = follower(rig, UID), follower(rig, UID)
    third = rig.client(uid=UID)

    # Given as many as may, then one more is refused, those that follow may say so again, and root is not bound.
    refusal = rig.ask(third, "follow")
    assert (refusal["errno"], refusal["sentence"]) == (
        "EDQUOT",
        f"uid {UID} follows with 2 sessions; more are not allowed (limits.followers_per_uid)",
    )
    assert rig.ask(second, "follow")["op"] == "following"
    for _ in range(3):
        follower(rig)

    # When one of them is gone, however it went, then there is room again.
    first.cut()
    rig.turn()
    assert rig.ask(third, "follow")["op"] == "following"


def test_who_does_not_read_misses_decisions_and_keeps_its_session(rig: Rig) -> None:
    # Given two followers, one of which takes three more messages and then none,
    reads, sleeps = follower(rig), follower(rig)
    reads.read(), sleeps.read()
    sleeps.room = 3

    # when far more is decided than may wait,
    user = rig.client()
    for _ in range(DECISIONS_WAITING_MAX):
        claim = rig.ask(user, "claim", **CLAIM)["claim"]
        rig.ask(user, "release", claim=claim)
    happened = 1 + 2 * DECISIONS_WAITING_MAX

    # then the other one hears all of it, and the session of the one that sleeps is not ended.
    assert len(told(reads)) == happened
    assert len(rig.sessions) == 3

    # When it reads at last, then the numbers have no gap, and what it heard and missed is all there was.
    sleeps.room = 10_000
    before = decisions(sleeps)
    rig.turn()
    heard = [*before, *decisions(sleeps)]
    assert [each["n"] for each in heard] == list(range(heard[0]["n"], heard[0]["n"] + len(heard)))
    assert len(heard) == 3 + DECISIONS_WAITING_MAX
    assert len(heard) + heard[-1]["missed"] == happened

    # And what is decided then is told again, with what was missed.
    rig.client()
    (last,) = decisions(sleeps)
    assert (last["what"], last["missed"]) == ("session", heard[-1]["missed"])


def test_replies_and_notices_to_a_follower_have_the_room_they_have_without(rig: Rig) -> None:
    # Given a follower that takes nothing, for which as many decisions wait as may,
    sleeps = follower(rig)
    sleeps.read()
    sleeps.room = 0
    for _ in range(DECISIONS_WAITING_MAX + 5):
        rig.client().cut()
        rig.turn()

    # when it asks as many questions as replies may wait, then its session goes on; with one more it ends.
    for _ in range(10):
        sleeps.ask("capabilities")
    rig.turn()
    assert rig.sessions.on_route(sleeps.routing_id) is not None
    sleeps.ask("capabilities")
    rig.turn()
    assert rig.sessions.on_route(sleeps.routing_id) is None


@given(st.lists(st.sampled_from(["decide", "read", "hold", "take"]), max_size=60))
def test_whatever_a_follower_does_heard_and_missed_are_all_there_was(doings: list[str]) -> None:
    # Given a follower that reads and stops reading as it likes while more is decided,
    rigs = a_rig()
    rig = next(rigs)
    root = follower(rig)
    root.read()
    happened, heard = 0, []
    for doing in doings:
        match doing:
            case "decide":
                for _ in range(30):
                    rig.ask(rig.clients[-1] if happened else rig.client(), "release", claim=99)
                    happened += 1 if happened else 2
            case "read":
                heard += decisions(root)
            case "hold":
                root.room = len(root.inbox)
            case "take":
                root.room = 10_000
        rig.turn()

    # when it has read all, then nothing is unaccounted for.
    root.room = 10_000
    rig.turn()
    heard += decisions(root)
    assert len(heard) + (heard[-1].get("missed", 0) if heard else 0) == happened
    next(rigs, None)
