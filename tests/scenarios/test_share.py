"""Who wants the very same rides on one slot."""

from __future__ import annotations

from tests.scenarios.scene import TID, USER, Scene, ops


def test_two_owners_of_the_same_watchpoint_share_one_slot_and_each_gets_every_hit() -> None:
    # given one slot, and somebody who watches an address with it
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(uid=USER), scene.rig.client(uid=USER + 1)
    first = scene.claim(ann, delivery="hits")

    # when another user asks for the very same
    second = scene.claim(bob, delivery="hits")

    # then both have it, by one slot
    assert (first["op"], second["op"]) == ("granted", "granted")
    assert scene.slots_held() == 1

    # and when it is hit, each is told of every hit from now on
    (resource_id,) = scene.rig.machine.armed
    scene.rig.machine.hit(resource_id, 3, pid=TID)
    scene.rig.turn()
    assert [message["count"] for message in ann.read() if message["op"] == "hits"] == [3]
    assert [message["count"] for message in bob.read() if message["op"] == "hits"] == [3]


def test_one_who_leaves_does_not_disturb_the_others() -> None:
    # given two who share a slot that has been hit
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(), scene.rig.client()
    claims = [scene.claim(client, delivery="hits")["claim"] for client in (ann, bob)]
    (resource_id,) = scene.rig.machine.armed
    scene.rig.machine.hit(resource_id, 2)

    # when one of them leaves
    over = scene.rig.ask(ann, "release", claim=claims[0])

    # then its account is complete, and the other goes on with the same slot
    assert (over["hits"], over["delivered"]) == (2, 2)
    scene.rig.machine.hit(resource_id, 5)
    scene.rig.turn()
    over = scene.rig.ask(bob, "release", claim=claims[1])
    assert (over["hits"], over["delivered"]) == (7, 7)
    assert scene.slots_held() == 0


def test_what_differs_in_anything_that_a_hit_would_show_is_not_shared() -> None:
    # given somebody who watches writes, in user mode and in the kernel
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(), scene.rig.client()
    scene.claim(ann)

    # then another address, user mode alone, records of hits and the writes of every thread are other wishes
    others = [
        scene.claim(bob, nth=1),
        scene.claim(bob, kernel=False),
        scene.claim(bob, delivery="hits"),
        scene.claim(bob, cpus=[0]),
    ]
    assert [reply["op"] for reply in others] == ["error"] * 4
    assert {reply["errno"] for reply in others} == {"ENOSPC"}


def test_a_slot_is_shared_even_with_those_who_would_have_to_wait_for_another() -> None:
    # given one slot, held, and somebody who waits for another
    scene = Scene(slots=1)
    ann, bob, cyd = (scene.rig.client() for _ in range(3))
    scene.claim(ann)
    assert scene.wait_claim(bob, 10, nth=1)["op"] == "queued"

    # when a third asks for what is armed already, then it takes no room, so it overtakes nobody
    assert scene.claim(cyd)["op"] == "granted"
    assert ops(bob) == []
