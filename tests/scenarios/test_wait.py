"""Who may wait gets a place in a queue, and an answer by its deadline."""

from __future__ import annotations

from tests.scenarios.scene import OTHER_TID, Scene, ops, told


def test_one_who_does_not_wait_is_refused_at_once() -> None:
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(), scene.rig.client()
    held = scene.claim(ann)

    refused = scene.claim(bob, nth=1)

    assert (refused["op"], refused["errno"]) == ("error", "ENOSPC")
    assert [claim for holder in refused["holders"] for claim in holder["claim_ids"]] == [held["claim"]]


def test_a_waiter_is_told_its_place_and_who_is_in_its_way_and_gets_the_slot_when_it_is_free() -> None:
    # given a slot that somebody holds
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(), scene.rig.client()
    held = scene.claim(ann)

    # when another asks for it, and waits
    queued = scene.wait_claim(bob, 10, nth=1)

    # then it hears that it is first, and who holds what it wants; the holder hears that it is wanted
    assert (queued["op"], queued["position"], queued["errno"]) == ("queued", 1, "ENOSPC")
    assert queued["holders"][0]["claim_ids"] == [held["claim"]]
    contended = told(ann).pop()
    assert (contended["op"], contended["claim"], contended["by"]["pid"]) == ("contended", held["claim"], bob.pid)

    # and when the holder lets go, it has the slot at once
    scene.rig.ask(ann, "release", claim=held["claim"])
    granted = told(bob).pop()
    assert (granted["op"], granted["claim"]) == ("granted", queued["claim"])
    assert scene.slots_held() == 1


def test_waiters_of_one_rank_are_served_in_the_order_in_which_they_asked() -> None:
    # given three who wait for one slot
    scene = Scene(slots=1)
    holder = scene.rig.client()
    held = scene.claim(holder)["claim"]
    waiters = [scene.rig.client() for _ in range(3)]
    queued = [scene.wait_claim(waiter, 10, nth) for nth, waiter in enumerate(waiters, 1)]
    assert [reply["position"] for reply in queued] == [1, 2, 3]

    # when each lets go of it as soon as it has it, then they have it one after the other
    for waiter, reply in zip(waiters, queued, strict=True):
        scene.rig.ask(holder, "release", claim=held)
        assert ops(waiter) == ["granted"]
        assert [ops(other) for other in waiters if other is not waiter].count(["granted"]) == 0
        holder, held = waiter, reply["claim"]


def test_nobody_overtakes_a_waiter_whose_room_it_would_take() -> None:
    # given two slots, one held for the whole CPU and one for a thread, and somebody who waits for another of the CPU
    scene = Scene(slots=2)
    ann, bob, cyd = (scene.rig.client() for _ in range(3))
    held = scene.claim(ann)["claim"]
    scene.claim(bob, 1, cpus=[0])
    waits = scene.wait_claim(bob, 10, 2, cpus=[0])
    assert waits["op"] == "queued"

    # when a third asks, without waiting, for another thread, which runs on that CPU, too
    late = scene.claim(cyd, 3, tid=OTHER_TID)

    # then it is held back, with the waiter as the reason, though the kernel has room for it
    assert (late["op"], late["errno"]) == ("error", "EAGAIN")
    assert f"claim {waits['claim']}" in late["sentence"]

    # and once the waiter has been served, there is no room any more
    scene.rig.ask(ann, "release", claim=held)
    assert ops(bob) == ["contended", "granted"]
    assert scene.claim(cyd, 3, tid=OTHER_TID)["errno"] == "ENOSPC"


def test_those_who_want_different_things_do_not_wait_for_each_other() -> None:
    # given a thread whose only slot is held, and somebody who waits for it
    scene = Scene(slots=1)
    ann, bob, cyd = (scene.rig.client() for _ in range(3))
    scene.claim(ann)
    scene.wait_claim(bob, 10, 1)

    # then another thread's slot is there for whoever asks
    assert scene.claim(cyd, 2, tid=OTHER_TID)["op"] == "granted"


def test_a_wait_ends_at_its_deadline() -> None:
    # given one who waits for two seconds
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(), scene.rig.client()
    scene.claim(ann)
    queued = scene.wait_claim(bob, 2, 1)

    # then nothing comes before that, and then its end
    scene.pass_time(1.9)
    assert ops(bob) == []
    scene.pass_time(0.2)
    over = told(bob).pop()
    assert (over["op"], over["claim"], over["reason"]) == ("lost", queued["claim"], "timeout")

    # and it hears who is in the way still
    assert over["errno"] == "ETIMEDOUT"
    assert [holder["pid"] for holder in over["holders"]] == [ann.pid]


def test_a_waiter_may_leave_the_queue_and_then_holds_up_nobody() -> None:
    # given a waiter that holds up another
    scene = Scene(slots=2)
    ann, bob, cyd = (scene.rig.client() for _ in range(3))
    scene.claim(ann)
    scene.claim(bob, 1, cpus=[0])
    ahead = scene.wait_claim(bob, 10, 2, cpus=[0])
    behind = scene.wait_claim(cyd, 10, 3, tid=OTHER_TID)
    assert (ahead["op"], behind["op"]) == ("queued", "queued")

    # when it leaves, then the other has what was there all the time
    assert scene.rig.ask(bob, "release", claim=ahead["claim"])["op"] == "released"
    assert ops(cyd) == ["granted"]


def test_a_wait_ends_with_its_owner() -> None:
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(), scene.rig.client()
    held = scene.claim(ann)["claim"]
    scene.wait_claim(bob, 10, 1)

    bob.die()
    scene.rig.turn()

    assert scene.states(ann) == {held: "armed"}
    scene.rig.ask(ann, "release", claim=held)
    assert scene.slots_held() == 0
