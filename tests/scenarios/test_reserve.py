"""Some slots of each CPU are left for users outside hwbpd."""

from __future__ import annotations

import pytest

from tests.scenarios.scene import OTHER_TID, TID, Scene, ops


def test_the_last_slot_of_a_thread_is_left_to_users_outside() -> None:
    # given four slots, one of them in reserve
    scene = Scene(slots=4, reserve_slots=1)
    client = scene.rig.client()

    # when somebody claims one after the other, then three are granted, and the fourth is held back with the number
    assert [scene.claim(client, nth)["op"] for nth in range(3)] == ["granted"] * 3
    refused = scene.claim(client, 3)
    assert (refused["op"], refused["errno"]) == ("error", "EAGAIN")
    assert "1 of 4" in refused["sentence"]
    assert "reserve_slots" in refused["sentence"]

    # and a tracer outside finds the one
    scene.rig.machine.poke(TID)


def test_what_counts_is_each_place_by_itself() -> None:
    # given two slots, one of them in reserve, and a thread that has the other
    scene = Scene(slots=2, reserve_slots=1)
    client = scene.rig.client()
    scene.claim(client)

    # then another thread has the same room, and the whole CPU, on which both threads run, has none
    assert scene.claim(client, 1, tid=OTHER_TID)["op"] == "granted"
    assert scene.claim(client, 2, cpus=[0])["errno"] == "EAGAIN"


def test_a_pool_of_one_slot_serves_somebody_all_the_same() -> None:
    scene = Scene(slots=1, reserve_slots=1)

    assert scene.claim(scene.rig.client())["op"] == "granted"


@pytest.mark.parametrize("reserve_slots", [0, 1])
def test_kgdb_may_have_the_reserve(reserve_slots: int) -> None:
    scene = Scene(slots=2, reserve_slots=reserve_slots)
    kgdb = scene.rig.client()

    assert [scene.claim(kgdb, nth, cpus=[0], kind="kgdb")["op"] for nth in range(2)] == ["granted"] * 2


def test_one_who_waits_is_served_when_the_reserve_would_be_left() -> None:
    # given two slots, one in reserve and one held, and somebody who waits
    scene = Scene(slots=2, reserve_slots=1)
    ann, bob = scene.rig.client(), scene.rig.client()
    held = scene.claim(ann)["claim"]
    queued = scene.wait_claim(bob, 10, 1)
    assert (queued["op"], queued["errno"]) == ("queued", "EAGAIN")

    # when the holder lets go, then it is served
    scene.rig.ask(ann, "release", claim=held)
    assert ops(bob) == ["granted"]
