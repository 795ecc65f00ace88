"""Why there is no room: sentences that say where, for whom, and what would have to change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from hwbpd import shortage
from hwbpd.core.model import Pool
from tests.fakes import FakeClient, Rig

TID = 812
ADDRESSES = itertools.count(0x500000, 0x100)  # of claims that share nothing


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.machine.start_task(TID)
    yield rig
    rig.stop()


def claim(rig: Rig, client: FakeClient, op: str = "granted", **fields: Any) -> int:
    reply = rig.ask(client, "claim", **{"address": next(ADDRESSES), "length": 8, "access": "w", **fields})
    assert reply["op"] == op, reply
    return int(reply["claim"])


def why(rig: Rig, client: FakeClient) -> list[str]:
    reply = rig.ask(client, "why", errno="ENOSPC")
    assert (reply["op"], reply["claim"], reply["state"]) == ("why", 0, "")
    return list(reply["lines"])


def test_where_there_is_room_it_is_somebody_outside(rig: Rig) -> None:
    client = rig.client()
    claim(rig, client, tid=TID)

    assert why(rig, client) == [
        "by the books there is room for one more slot everywhere: for whole cpus, threads and processes",
        "where the kernel still has none, somebody outside hwbpd has it; `hwbpctl ls --foreign` looks who",
    ]


def test_a_full_thread_is_told_with_who_is_on_it_who_waits_and_what_would_help(rig: Rig) -> None:
    # given a thread without room, which no whole CPU has room beside, and somebody who waits
    ann, bob = rig.client(pid=4001), rig.client(pid=4002)
    for _ in range(3):
        claim(rig, ann, tid=TID)
    claim(rig, ann, tid=TID, kind="ptrace")
    claim(rig, bob, "queued", tid=TID, wait_until_ns=rig.clock.now_ns() + 10**10)
    rig.clock.wind(2.5)

    # when anybody asks, then it is told once for all CPUs, and for the thread
    on_it = "client4001[4001] as perf: 3 on tid 812, client4001[4001] as ptrace: 1 on tid 812"
    assert why(rig, rig.client(uid=1000)) == [
        f"no slot on cpu 0: 4 of 4 held ({on_it}); the same on cpu 1",
        f"no slot on tid 812 (cpu 0): 4 of 4 held ({on_it})",
        "claim 5 of client4002[4002] as perf is waiting for tid 812 since 2.5 s, for 7.5 s more at most, "
        "behind claims 1, 2, 3, 4",
        "what would have to change:",
        "- claims 1, 2, 3, 4 end, or give way to a claim of higher rank (the highest of them is ptrace, priority 0)",
    ]


def test_cpus_that_are_full_for_different_reasons_are_told_apart(rig: Rig) -> None:
    client = rig.client(pid=4001)
    for _ in range(4):
        claim(rig, client, cpus=[1])

    lines = why(rig, client)

    assert lines[0] == "no slot on cpu 1: 4 of 4 held (client4001[4001] as perf: 4 cpu-wide on cpu 1)"
    assert lines[1] == "what would have to change:"


def test_a_thread_that_is_full_on_one_cpu_is_found(rig: Rig) -> None:
    client = rig.client()
    for _ in range(4):
        claim(rig, client, tid=TID, cpus=[1])

    assert any(line.startswith("no slot on tid 812 (cpu 1): 4 of 4 held") for line in why(rig, client))


def test_a_process_that_is_full_is_found(rig: Rig) -> None:
    client = rig.client()
    for _ in range(4):
        claim(rig, client, pid=TID)

    assert any(line.startswith("no slot on pid 812 (cpu 0): 4 of 4 held") for line in why(rig, client))


def test_what_a_tracer_has_left_behind_nobody_can_take(rig: Rig) -> None:
    # given a thread that keeps a slot of its tracer, among others
    ann, bob = rig.client(), rig.client()
    for _ in range(3):
        claim(rig, ann, tid=TID)
    kept = claim(rig, bob, tid=TID, kind="ptrace", armed_by="tracer", placeholder=False)
    rig.machine.poke(TID)
    rig.ask(bob, "taken", claim=kept)
    rig.ask(bob, "release", claim=kept)

    assert why(rig, ann)[-2:] == [
        "- claims 1, 2, 3 end, or give way to a claim of higher rank (the highest of them is perf, priority 0)",
        f"- tid 812 exits or runs another program: it keeps claim {kept}'s slot until then",
    ]


def test_the_reserve_is_named_where_it_is_what_is_missing() -> None:
    rig = Rig(reserve_slots=1)
    rig.machine.start_task(TID)
    client = rig.client()
    for _ in range(3):
        claim(rig, client, tid=TID)

    lines = why(rig, client)

    assert lines[0].startswith("held back: 1 of 4 slots on cpu 0 are kept free for users outside hwbpd")
    assert lines[-1] == "- the reserve for users outside hwbpd gets smaller (policy.reserve_slots)"
    rig.stop()


def test_much_of_a_sort_is_told_in_part(rig: Rig) -> None:
    # given more full threads, and more who wait, than anybody would read
    client = rig.client()
    for tid in range(900, 900 + 2 * shortage.NAMED, 2):
        rig.machine.start_task(tid)
        for _ in range(4):
            claim(rig, client, tid=tid, delivery="hold")
        claim(rig, client, "queued", tid=tid, wait_until_ns=rig.clock.now_ns() + 10**9)
    claim(rig, client, "queued", tid=900, wait_until_ns=rig.clock.now_ns() + 10**9)

    lines = why(rig, client)

    assert sum(line.startswith("no slot on") for line in lines) == shortage.NAMED
    assert sum("is waiting" in line for line in lines) == shortage.NAMED
    assert "and so on in more places" in lines
    assert "and 1 more wait" in lines


def test_each_pool_of_a_machine_is_told_by_its_name() -> None:
    rig = Rig(slots={Pool.DATA: 1, Pool.INST: 2})
    rig.machine.start_task(TID)
    client = rig.client()
    claim(rig, client, cpus=[0])

    assert why(rig, client)[0].startswith("no data slot on cpu 0: 1 of 1 held")
    rig.stop()


def test_to_ask_changes_nothing(rig: Rig) -> None:
    client = rig.client()
    for _ in range(4):
        claim(rig, client, tid=TID)
    claim(rig, client, "queued", tid=TID, wait_until_ns=rig.clock.now_ns() + 10**9)
    before = rig.arbiter.books.dump()

    why(rig, client)

    assert rig.arbiter.books.dump() == before
    assert len(rig.arbiter.queue) == 1
