"""What the daemon answers when it is asked, and that asking changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from hwbpd.core.model import Pool
from hwbpd.settings import Limits, Settings
from tests.fakes import FakeBackend, FakeClient, Rig

TID = 812
ADDRESSES = itertools.count(0x500000, 0x100)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(settings=Settings(limits=Limits(claims_per_session=50)))
    rig.machine.start_task(TID)
    yield rig
    rig.stop()


def claim(rig: Rig, client: FakeClient, **fields: Any) -> int:
    """Make a claim; each is at an address of its own, so that none shares a slot."""
    granted = rig.ask(client, "claim", **{"address": next(ADDRESSES), "length": 8, "access": "w", **fields})
    assert granted["op"] == "granted", granted
    return int(granted["claim"])


def test_a_row_says_what_a_slot_holds_for_whom_and_since_when(rig: Rig) -> None:
    # given a claim that is two seconds old and has had hits
    client = rig.client(pid=4242)
    asked = {"address": 0x404040, "kernel": False, "kind": "ptrace", "label": "the list", "ring_bytes": 4096}
    mine = claim(rig, client, tid=TID, cpus=[1], **asked)
    (resource_id,) = rig.machine.armed
    rig.machine.hit(resource_id, 3)
    rig.clock.wind(2)

    # when slots are listed
    reply = rig.ask(client, "slots")

    # then its row says all of it
    assert reply["resources"] == [
        {
            "resource": resource_id,
            "address": 0x404040,
            "length": 8,
            "access": "w",
            "pool": "any",
            "user": True,
            "kernel": False,
            "delivery": "hits",
            "tid": TID,
            "cpus": [1],
            "claims": [
                {
                    "claim": mine,
                    "pid": 4242,
                    "comm": "client4242",
                    "uid": 0,
                    "kind": "ptrace",
                    "label": "the list",
                    "state": "armed",
                    "age_ns": 2_000_000_000,
                    "hits": 3,
                    "lost": 0,
                    "dropped": 0,
                }
            ],
        }
    ]
    assert (reply["pools"], reply["more"]) == ({"any": 4}, False)


def test_cpus_say_what_is_used_by_cpu_wide_claims_and_by_the_busiest_task(rig: Rig) -> None:
    client = rig.client()
    claim(rig, client)
    claim(rig, client, cpus=[1])
    claim(rig, client, tid=TID, delivery="hold")
    claim(rig, client, tid=TID, cpus=[0])

    reply = rig.ask(client, "slots")

    assert reply["cpus"] == [
        {"cpu": 0, "online": True, "cpu_wide": {"any": 1}, "busiest_task": {"any": 2}},
        {"cpu": 1, "online": True, "cpu_wide": {"any": 2}, "busiest_task": {"any": 1}},
    ]
    assert [(row["tid"], row["cpus"], row["delivery"]) for row in reply["resources"]] == [
        (0, None, "hits"),
        (0, [1], "hits"),
        (TID, None, "hold"),
        (TID, [0], "hits"),
    ]


def test_pages_follow_each_other_without_a_gap(rig: Rig) -> None:
    # given more slots than one page shows
    client = rig.client()
    for tid in range(900, 907):
        rig.machine.start_task(tid)
        claim(rig, client, tid=tid)
    everything = rig.ask(client, "slots")["resources"]

    # when they are asked for page by page
    pages: list[dict[str, Any]] = []
    while not pages or pages[-1]["more"]:
        after = pages[-1]["resources"][-1]["resource"] if pages else 0
        pages.append(rig.ask(client, "slots", after=after, most=3))

    # then the pages are what one page would have shown, and only the first has the CPUs
    assert [len(page["resources"]) for page in pages] == [3, 3, 1]
    assert [row for page in pages for row in page["resources"]] == everything
    assert [len(page["cpus"]) for page in pages] == [2, 0, 0]

    # and a page that is just full is the last
    assert not rig.ask(client, "slots", most=7)["more"]
    assert rig.ask(client, "slots", most=6)["more"]


def test_counts_are_those_of_the_machine_and_of_the_way_to_the_client(rig: Rig) -> None:
    # given a claim with hits on their way, and more in a ring that was too small for all
    client = rig.client()
    mine = claim(rig, client, tid=TID, ring_bytes=4096)
    (resource_id,) = rig.machine.armed
    rig.machine.hit(resource_id, 5)
    rig.turn()
    rig.machine.hit(resource_id, 100)

    # when its owner asks, then what is in the ring is counted and not yet delivered
    told = rig.ask(client, "counts", claim=mine)
    assert told == {"op": "counts", "id": told["id"], "claim": mine} | account(hits=105, delivered=5, lost=15)

    # and once the ring has been looked into it all adds up
    rig.clock.wind(0.01)
    rig.turn()
    told = rig.ask(client, "counts", claim=mine)
    assert told == {"op": "counts", "id": told["id"], "claim": mine} | account(hits=105, delivered=90, lost=15)


def account(hits: int, delivered: int = 0, lost: int = 0, dropped: int = 0) -> dict[str, int]:
    return {"hits": hits, "delivered": delivered, "lost": lost, "dropped": dropped}


def test_who_only_counts_has_lost_nothing(rig: Rig) -> None:
    client = rig.client()
    mine = claim(rig, client, tid=TID, delivery="count")
    (resource_id,) = rig.machine.armed
    rig.machine.hit(resource_id, 1000)

    told = rig.ask(client, "counts", claim=mine)

    assert told == {"op": "counts", "id": told["id"], "claim": mine} | account(hits=1000)


@pytest.mark.parametrize("op", ["counts", "why"])
def test_of_a_claim_that_never_was_there_is_nothing_to_say(rig: Rig, op: str) -> None:
    reply = rig.ask(rig.client(), op, claim=4711)

    assert (reply["op"], reply["errno"]) == ("error", "ENOENT")
    assert "4711" in reply["sentence"]


def test_a_claim_that_is_over_has_a_story_and_no_counts(rig: Rig) -> None:
    client = rig.client()
    mine = claim(rig, client, address=0x404040)
    rig.ask(client, "release", claim=mine)

    assert rig.ask(client, "counts", claim=mine)["errno"] == "ENOENT"
    story = rig.ask(client, "why", claim=mine)
    assert (story["claim"], story["state"]) == (mine, "released")
    assert [line.split("  ", 1)[1] for line in story["lines"]] == [
        "client1000[1000] asked for mem:0x404040/8:w for cpu-wide on all cpus as perf",
        "granted: the kernel has taken the slots",
        "its end: released by its owner",
        "its slots are free, after 0 hits",
    ]


def test_a_refused_claim_tells_why(rig: Rig) -> None:
    client = rig.client()
    for _ in range(4):
        claim(rig, client)

    refusal = rig.ask(client, "claim", address=0x404040, length=8, access="w")

    story = rig.ask(client, "why", claim=refusal["claim"])
    assert story["state"] == "refused"
    assert story["lines"][-1].endswith(refusal["sentence"])


def test_what_is_to_be_known_of_the_machine_comes_before_what_is_of_its_registers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = FakeBackend({Pool.ANY: 4})
    monkeypatch.setattr(backend, "describe", lambda: {"notes": ["of the registers"]})
    rig = Rig(backend=backend)
    monkeypatch.setattr(rig.machine, "notes", lambda: ("of the machine",))

    reply = rig.ask(rig.client(), "capabilities")

    assert reply["registers"]["notes"] == ["of the machine", "of the registers"]


def test_capabilities_are_those_of_this_machine_and_this_daemon(rig: Rig) -> None:
    reply = rig.ask(rig.client(), "capabilities")

    assert (reply["machine"], reply["backend"], reply["architecture"]) == ("fake", "fake", "fake")
    assert (reply["pools"], reply["cpus_possible"], reply["cpus_online"]) == ({"any": 4}, [0, 1], [0, 1])
    assert reply["registers"] == {"lengths": {}, "default_lengths": {}, "reports": {}, "notes": []}
    assert reply["limits"] == {
        "message_bytes": 65536,
        "claims_per_session": 50,
        "claims_per_uid": 1000,
        "legs_per_uid": 4096,
        "sessions": 1000,
        "sessions_per_uid": 64,
        "followers_per_uid": 8,
        "threads_per_uid": 1024,
        "vms_per_session": 16,
        "vcpus_per_session": 1024,
        "vcpus_per_uid": 4096,
        "connections_per_uid": 128,
        "connections_per_uid_per_s": 20,
        "memory_bytes": 2**30,
        "messages_queued_per_session": 256,
        "hits_bytes_queued_per_session": 16 * 2**20,
        "ring_bytes_default": 256 * 1024,
        "ring_bytes_max": 8 * 2**20,
        "guard_hits_per_s": 10_000,
        "wait_max_s": 3600,
        "reserve_slots": 0,
    }


def test_to_ask_changes_nothing(rig: Rig) -> None:
    client = rig.client()
    mine = claim(rig, client, tid=TID)
    before = rig.arbiter.books.dump()

    for op, fields in (("slots", {}), ("capabilities", {}), ("counts", {"claim": mine}), ("why", {"claim": mine})):
        assert rig.ask(client, op, **fields)["op"] == op

    assert rig.arbiter.books.dump() == before


# --- those who wait --------------------------------------------------------------------------------------------------


def queued(rig: Rig, client: FakeClient, **fields: Any) -> int:
    wait = {"address": 0x404040, "length": 8, "access": "w", "wait_until_ns": rig.clock.now_ns() + 10**10}
    reply = rig.ask(client, "claim", **{**wait, "tid": TID, **fields})
    assert reply["op"] == "queued", reply
    return int(reply["claim"])


def test_those_who_wait_are_listed_with_their_place_and_who_is_in_their_way(rig: Rig) -> None:
    # given a thread without room, and two who wait for it, one of a higher rank that nobody else has
    ann, bob = rig.client(), rig.client(pid=4242)
    held = [claim(rig, ann, tid=TID, kind="ptrace") for _ in range(4)]
    patient = queued(rig, bob, label="patience")
    rig.clock.wind(2)
    urgent = queued(rig, bob, kind="ptrace", address=0x500)

    # when slots are listed
    waiting = rig.ask(bob, "slots")["waiting"]

    # then they are there in the order in which they have their turn
    assert waiting[1] == {
        "claim": patient,
        "pid": 4242,
        "comm": "client4242",
        "uid": 0,
        "kind": "perf",
        "label": "patience",
        "priority": 0,
        "state": "waiting",
        "position": 2,
        "age_ns": 2_000_000_000,
        "deadline_ns": rig.clock.now_ns() - 2_000_000_000 + 10**10,
        "address": 0x404040,
        "length": 8,
        "access": "w",
        "target": f"tid {TID}",
        "blockers": [urgent, *held],
    }
    assert (waiting[0]["claim"], waiting[0]["position"], waiting[0]["blockers"]) == (urgent, 1, held)


def test_who_displaces_and_who_is_suspended_are_listed_among_them(rig: Rig) -> None:
    # given a claim that has to give way to another
    ann, bob = rig.client(), rig.client()
    held = [claim(rig, ann, tid=TID) for _ in range(4)]
    bob.ask("claim", address=0x404040, length=8, access="w", tid=TID, kind="ptrace")
    rig.turn()

    # when it has not yet, then the other is listed with the time at which it will have
    (displacing,) = rig.ask(ann, "slots")["waiting"]
    assert (displacing["state"], displacing["blockers"]) == ("displacing", [held[3]])
    assert displacing["deadline_ns"] == rig.clock.now_ns() + 10**8

    # and when it has, it is listed itself, without an end to it
    rig.ask(ann, "yield", claim=held[3])
    (suspended,) = rig.ask(ann, "slots")["waiting"]
    assert (suspended["claim"], suspended["state"], suspended["deadline_ns"]) == (held[3], "suspended", 0)
    assert suspended["blockers"] == [held[0], held[1], held[2], displacing["claim"]]


def test_of_those_who_wait_addresses_are_shown_to_their_own_and_to_root_only(rig: Rig) -> None:
    root, ann, bob = rig.client(), rig.client(uid=1000), rig.client(uid=1001)
    for _ in range(4):
        claim(rig, root, tid=TID)
    queued(rig, ann)

    shown = [rig.ask(client, "slots")["waiting"][0]["address"] for client in (root, ann, bob)]

    assert shown == [0x404040, 0x404040, None]


def test_as_many_are_listed_as_a_page_has_rows_and_only_on_the_first(rig: Rig) -> None:
    client = rig.client()
    for _ in range(4):
        claim(rig, client, tid=TID)
    claims = [queued(rig, client, address=address) for address in range(0, 40, 8)]

    first = rig.ask(client, "slots", most=3)
    second = rig.ask(client, "slots", most=3, after=first["resources"][-1]["resource"])

    assert [row["claim"] for row in first["waiting"]] == claims[:3]
    assert "waiting" not in second


def test_a_row_counts_for_each_rider_what_was_hit_since_it_came(rig: Rig) -> None:
    client = rig.client()
    for hits in (3, 4):
        claim(rig, client, address=0x404040, tid=TID)
        rig.machine.hit(1, hits)

    (row,) = rig.ask(client, "slots")["resources"]

    assert [(of["hits"], of["lost"]) for of in row["claims"]] == [(7, 0), (4, 0)]
