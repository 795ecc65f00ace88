"""Giving way, and coming back: what is suspended keeps its name and its place."""

from __future__ import annotations

from typing import Any

from tests.fakes import FakeClient
from tests.scenarios.scene import Scene, ops, told


def debug(scene: Scene, client: FakeClient, **wish: Any) -> int:
    """Ask, as a debugger, for the slot; the answer comes when it is there."""
    fields = {"address": 0x1000, "length": 8, "access": "w", "delivery": "count", "tid": 800, "kind": "ptrace", **wish}
    asked = client.ask("claim", **fields)
    scene.rig.turn()
    return asked


def test_one_who_stays_silent_is_made_to_give_way_at_the_deadline() -> None:
    # given a profiler that has been asked to give way
    scene = Scene(slots=1)
    profiler, debugger = scene.rig.client(), scene.rig.client()
    scene.claim(profiler)
    asked = debug(scene, debugger)
    assert ops(profiler) == ["revoke"]

    # when it says nothing, then the debugger has the slot at the deadline and not before
    scene.pass_time(0.09)
    assert not debugger.inbox
    scene.pass_time(0.02)
    assert [(message["op"], message["id"]) for message in debugger.read()] == [("granted", asked)]
    assert ops(profiler) == ["suspended"]


def test_the_suspended_is_resumed_with_its_name_and_its_counts_when_room_is_back() -> None:
    # given a profiler that has counted, and given way
    scene = Scene(slots=1)
    profiler, debugger = scene.rig.client(), scene.rig.client()
    claim = scene.claim(profiler)["claim"]
    (resource_id,) = scene.rig.machine.armed
    scene.rig.machine.hit(resource_id, 4)
    debug(scene, debugger)
    scene.rig.ask(profiler, "yield", claim=claim)
    (granted,) = debugger.read()

    # when the debugger is done
    scene.rig.ask(debugger, "release", claim=granted["claim"])

    # then the profiler goes on as the same claim, and no hit that it saw is forgotten
    assert ops(profiler) == ["revoke", "suspended", "resumed"]
    (resource_id,) = scene.rig.machine.armed
    scene.rig.machine.hit(resource_id, 5)
    assert scene.rig.ask(profiler, "counts", claim=claim)["hits"] == 9


def test_the_displaced_is_put_back_when_the_displacer_cannot_be_armed() -> None:
    # given a profiler that is asked to give way to a debugger of a thread, which then exits
    scene = Scene(slots=1)
    profiler, debugger = scene.rig.client(), scene.rig.client()
    claim = scene.claim(profiler, cpus=[0])["claim"]
    debug(scene, debugger, tid=801)
    scene.rig.machine.exit_task(801)

    # when it does give way
    scene.rig.ask(profiler, "yield", claim=claim)

    # then the debugger is refused, and the profiler has its slot again
    (refused,) = debugger.read()
    assert refused["errno"] == "ESRCH"
    assert ops(profiler) == ["revoke", "suspended", "resumed"]
    assert scene.slots_held() == 1


def test_one_who_was_asked_is_spared_when_the_displacer_leaves_before() -> None:
    # given a profiler that was asked to give way
    scene = Scene(slots=1)
    profiler, debugger = scene.rig.client(), scene.rig.client()
    claim = scene.claim(profiler)["claim"]
    debug(scene, debugger)

    # when the debugger dies first, then the profiler need not, and nothing happens at the deadline
    debugger.die()
    scene.rig.turn()
    assert ops(profiler) == ["revoke", "spared"]
    scene.pass_time(1)
    assert ops(profiler) == []
    assert scene.states(profiler) == {claim: "armed"}


def test_to_yield_unasked_is_refused() -> None:
    scene = Scene(slots=1)
    client = scene.rig.client()
    claim = scene.claim(client)["claim"]

    assert scene.rig.ask(client, "yield", claim=claim)["errno"] == "EINVAL"


def test_the_suspended_may_be_released_and_say_what_they_have_counted() -> None:
    # given a claim that has given way after three hits
    scene = Scene(slots=1)
    profiler, debugger = scene.rig.client(), scene.rig.client()
    claim = scene.claim(profiler)["claim"]
    scene.rig.machine.hit(next(iter(scene.rig.machine.armed)), 3)
    debug(scene, debugger)
    scene.rig.ask(profiler, "yield", claim=claim)

    # when it is released, then its account is complete, and the debugger has what it had
    assert scene.rig.ask(profiler, "release", claim=claim)["hits"] == 3
    assert [message["op"] for message in debugger.read()] == ["granted"]
    assert scene.slots_held() == 1


def test_the_suspended_are_resumed_before_those_who_asked_later() -> None:
    # given a profiler that has given way, and another that came after and waits
    scene = Scene(slots=1)
    profiler, late, debugger = (scene.rig.client() for _ in range(3))
    claim = scene.claim(profiler)["claim"]
    debug(scene, debugger)
    scene.rig.ask(profiler, "yield", claim=claim)
    (granted,) = debugger.read()
    assert scene.wait_claim(late, 10, 2)["op"] == "queued"

    # when room is back, then it goes to the one that was there first
    scene.rig.ask(debugger, "release", claim=granted["claim"])
    assert ops(profiler)[-1] == "resumed"
    assert not told(late)
