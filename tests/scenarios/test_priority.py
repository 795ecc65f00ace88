"""What is higher goes first, and displaces what is lower: never what is equal, and never more than it needs."""

from __future__ import annotations

from tests.scenarios.scene import USER, Scene, ops, told


def test_a_debugger_displaces_a_profiler_of_the_same_user() -> None:
    # given a profiler of a user in the only slot
    scene = Scene(slots=1)
    profiler, debugger = scene.rig.client(uid=USER), scene.rig.client(uid=USER)
    low = scene.claim(profiler, kind="perf")["claim"]

    # when the user's debugger wants it
    asked = debugger.ask("claim", address=0x1000, length=8, access="w", delivery="count", tid=800, kind="ptrace")
    scene.rig.turn()

    # then the profiler is asked to give way, with who and until when, and has its slot until it does
    revoke = told(profiler).pop()
    assert (revoke["op"], revoke["claim"], revoke["by"]["pid"]) == ("revoke", low, debugger.pid)
    assert revoke["deadline_ns"] == scene.rig.clock.now_ns() + 100_000_000
    assert not debugger.inbox

    # and when it has, the debugger has the slot
    assert scene.rig.ask(profiler, "yield", claim=low)["op"] == "yielded"
    assert ops(profiler) == ["suspended"]
    (granted,) = debugger.read()
    assert (granted["op"], granted["id"]) == ("granted", asked)
    assert scene.states(profiler)[low] == "suspended"


def test_nobody_displaces_an_equal() -> None:
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(), scene.rig.client()
    scene.claim(ann, kind="ptrace")

    refused = scene.claim(bob, 1, kind="ptrace")

    assert refused["errno"] == "ENOSPC"
    assert ops(ann) in ([], ["contended"])


def test_a_number_decides_among_claims_of_one_kind() -> None:
    # given a profiler that has put itself behind
    scene = Scene(slots=1)
    ann, bob = scene.rig.client(uid=USER), scene.rig.client(uid=USER)
    behind = scene.claim(ann, priority=-10)["claim"]

    # when another of the same kind and user comes with more, then that goes first
    scene.rig.clock.wind(0.001)
    bob.ask("claim", address=0x1000, length=8, access="w", delivery="count", tid=800)
    scene.rig.turn()
    assert scene.states(ann)[behind] == "yielding"


def test_a_user_does_not_displace_other_users() -> None:
    # given a background claim of one user
    scene = Scene(slots=1)
    ann, bob, root = scene.rig.client(uid=USER), scene.rig.client(uid=USER + 1), scene.rig.client()
    scene.claim(ann, kind="background")

    # when the debugger of another user wants its slot, then it is refused; only root's displaces it
    assert scene.claim(bob, 1, kind="ptrace")["errno"] == "ENOSPC"
    assert "revoke" not in ops(ann)
    root.ask("claim", address=0x1000, length=8, access="w", delivery="count", tid=800, kind="ptrace")
    scene.rig.turn()
    assert ops(ann) == ["revoke"]


def test_as_few_give_way_as_will_do_and_the_youngest_of_equals() -> None:
    # given three profilers in all the slots
    scene = Scene(slots=3)
    profilers = [scene.rig.client() for _ in range(3)]
    claims = [scene.claim(profiler, nth)["claim"] for nth, profiler in enumerate(profilers)]

    # when a debugger wants one
    debugger = scene.rig.client()
    debugger.ask("claim", address=0x1000, length=8, access="w", delivery="count", tid=800, kind="ptrace")
    scene.rig.turn()

    # then the one that came last is asked, and nobody else
    assert [scene.states(debugger)[claim] for claim in claims] == ["armed", "armed", "yielding"]


def test_the_higher_of_two_waiters_goes_first_whenever_it_came() -> None:
    # given a slot that cannot be taken back from whoever has it, and two who wait, the later of them higher
    scene = Scene(slots=1)
    holder, low, high = (scene.rig.client() for _ in range(3))
    held = scene.claim(holder, kind="kgdb")["claim"]
    assert scene.wait_claim(low, 10, 1, kind="perf")["position"] == 1
    assert scene.wait_claim(high, 10, 2, kind="ptrace")["position"] == 1

    # when it comes free
    scene.rig.ask(holder, "release", claim=held)

    # then the higher has it
    assert (ops(low), ops(high)) == ([], ["granted"])


def test_kgdb_takes_what_it_can_at_once_and_asks_nobody() -> None:
    # given a profiler in the only slot
    scene = Scene(slots=1)
    profiler, kgdb = scene.rig.client(), scene.rig.client()
    scene.claim(profiler)

    # when kgdb wants it, then it has it with the answer, and the profiler hears what has happened
    assert scene.claim(kgdb, 1, cpus=[0], kind="kgdb")["op"] == "granted"
    assert ops(profiler) == ["revoke", "suspended"]
