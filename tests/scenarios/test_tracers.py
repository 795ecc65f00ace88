"""Slots that a tracer takes by ptrace: the daemon keeps the place for it, and the books of what it leaves behind."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.fakes import FakeClient
from tests.scenarios.scene import TID, Scene, told


def trace(scene: Scene, client: FakeClient, nth: int = 0, **wish: Any) -> dict[str, Any]:
    """Claim a slot of the thread for a tracer."""
    return scene.claim(client, nth, kind="ptrace", armed_by="tracer", delivery="hold", **wish)


def take(scene: Scene, tracer: FakeClient, claim: int) -> None:
    """The tracer's dance: announce it, poke, and say that it went well."""
    assert scene.rig.ask(tracer, "taking", claim=claim)["op"] == "take"
    scene.rig.machine.poke(TID)
    assert scene.rig.ask(tracer, "taken", claim=claim)["op"] == "taken"


def test_the_place_is_held_until_the_tracer_takes_it() -> None:
    # given one slot, and a tracer that has been granted it and will take it later
    scene = Scene(slots=1)
    tracer, other = scene.rig.client(), scene.rig.client()
    claim = trace(scene, tracer)["claim"]

    # then nobody else gets it, in the kernel neither
    assert scene.claim(other, 1)["errno"] == "ENOSPC"
    assert scene.slots_held() == 1

    # and when it takes it, it is there, and the books count it
    take(scene, tracer, claim)
    assert scene.states(tracer) == {claim: "taken"}
    assert scene.claim(other, 1)["errno"] == "ENOSPC"


def test_what_a_tracer_releases_is_residue_until_the_thread_exits() -> None:
    # given a slot that a tracer has taken
    scene = Scene(slots=1)
    tracer, other = scene.rig.client(), scene.rig.client()
    claim = trace(scene, tracer)["claim"]
    take(scene, tracer, claim)

    # when it releases it
    assert scene.rig.ask(tracer, "release", claim=claim)["op"] == "released"

    # then the thread still has the slot, and a refusal says whose it was
    assert scene.states(tracer) == {claim: "residue"}
    refused = scene.claim(other, 1)
    assert refused["errno"] == "ENOSPC"
    assert refused["holders"][0]["claim_ids"] == [claim]

    # and the slot is free when the thread is gone
    scene.rig.machine.exit_task(TID)
    scene.rig.turn()
    assert scene.states(tracer) == {}


def test_the_next_tracer_of_the_thread_reuses_what_was_left_behind() -> None:
    # given one slot, and that it is residue
    scene = Scene(slots=1)
    first, second = scene.rig.client(), scene.rig.client()
    claim = trace(scene, first)["claim"]
    take(scene, first, claim)
    scene.rig.ask(first, "release", claim=claim)

    # when another tracer of that thread asks, then it has it although nothing is free
    reply = trace(scene, second)
    assert reply["op"] == "granted"
    assert scene.rig.ask(second, "taking", claim=reply["claim"])["op"] == "take"
    assert scene.rig.ask(second, "taken", claim=reply["claim"])["op"] == "taken"
    assert scene.states(second) == {reply["claim"]: "taken"}
    assert scene.slots_held() == 1


def test_an_exec_gives_back_what_tracers_had() -> None:
    scene = Scene(slots=1)
    tracer, other = scene.rig.client(), scene.rig.client()
    claim = trace(scene, tracer)["claim"]
    take(scene, tracer, claim)

    scene.rig.machine.exec_task(TID)
    scene.rig.turn()

    over = told(tracer).pop()
    assert (over["op"], over["claim"], over["reason"]) == ("lost", claim, "exec")
    assert scene.claim(other, 1)["op"] == "granted"


@pytest.mark.parametrize("has_poked", [False, True])
def test_a_tracer_that_dies_in_the_window_leaves_nothing_behind_but_what_it_took(has_poked: bool) -> None:
    # given a tracer that was told to take its slot
    scene = Scene(slots=1)
    tracer, other = scene.rig.client(), scene.rig.client()
    claim = trace(scene, tracer)["claim"]
    scene.rig.ask(tracer, "taking", claim=claim)
    if has_poked:
        scene.rig.machine.poke(TID)

    # when it dies before it says how that went
    tracer.die()
    scene.rig.turn()

    # then the slot is residue if it had taken it, and free if not
    if has_poked:
        assert scene.states(other) == {claim: "residue"}
        assert scene.claim(other, 1)["errno"] == "ENOSPC"
    else:
        assert scene.states(other) == {}
        assert scene.claim(other, 1)["op"] == "granted"


def test_a_slot_stolen_in_the_window_is_reported_with_whoever_took_it() -> None:
    # given a tracer that was told to take its slot, and somebody outside who was faster
    scene = Scene(slots=1)
    tracer = scene.rig.client()
    claim = trace(scene, tracer)["claim"]
    scene.rig.ask(tracer, "taking", claim=claim)
    scene.rig.machine.poke(TID)
    with pytest.raises(OSError, match="No space"):
        scene.rig.machine.poke(TID)

    # when it says so
    failed = scene.rig.ask(tracer, "take_failed", claim=claim, errno=errno.ENOSPC)

    # then the claim is over, and after a look the tracer hears what was found
    assert failed["op"] == "take_failed"
    scene.rig.turn()
    assert [notice["op"] for notice in told(tracer)][-1] == "foreign"
    assert scene.states(tracer) == {}


def test_what_a_tracer_has_touched_is_nobody_elses_to_take_back() -> None:
    # given a slot that a tracer has taken, and one that is held for another tracer
    scene = Scene(slots=2)
    tracer, later, kgdb = (scene.rig.client() for _ in range(3))
    taken = trace(scene, tracer)["claim"]
    take(scene, tracer, taken)
    held = trace(scene, later, 1)["claim"]

    # when kgdb wants both, then it has the one that was only held
    assert scene.claim(kgdb, 2, cpus=[0], kind="kgdb")["op"] == "granted"
    assert scene.states(kgdb)[held] == "suspended"
    refused = scene.claim(kgdb, 3, cpus=[0], kind="kgdb")
    assert refused["errno"] == "ENOSPC"
    assert taken in [claim for holder in refused["holders"] for claim in holder["claim_ids"]]
