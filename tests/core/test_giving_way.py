"""Sharing, waiting, displacing, and coming back, on a machine that does whatever it is told."""

from __future__ import annotations

import errno

import pytest
from msgspec.structs import replace

from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Arm, Change, Done, Effect, End, Ended, Grant, Queued, Refuse, Route, Suspend, Tell
from hwbpd.core.errors import Holder
from hwbpd.core.events import (
    ArmFailed,
    ForeignFound,
    FuseBlown,
    SessionEnded,
    Stopping,
    Suspended,
    Tick,
    YieldRequested,
)
from hwbpd.core.model import Kind, Target
from hwbpd.core.policy import Policy
from tests.core.steps import ANN, BOB, LATE_NS, SLOTS, T0, T1, arm, new_arbiter, release, request, run, states

GRACE_NS = Policy().revoke_grace_ns
CPU0 = Target(cpus=(0,))
LATER_NS = 20_000_000_000


def kinds(effects: list[Effect], *wanted: type) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, wanted)]


def told(effects: list[Effect], change: Change) -> list[int]:
    return [effect.claim.claim_id for effect in effects if isinstance(effect, Tell) and effect.change is change]


@pytest.fixture
def arbiter() -> Arbiter:
    return new_arbiter()


def full(arbiter: Arbiter, target: Target = T0, **fields: object) -> list[int]:
    """Fill a target with claims of Ann's; return their ids."""
    before = set(arbiter.books.claims)
    for _ in range(SLOTS):
        run(arbiter, request(ANN, target, **fields))  # type: ignore[arg-type]
    return sorted(set(arbiter.books.claims) - before)


# --- share -----------------------------------------------------------------------------------------------------------


def test_equal_claims_of_different_owners_have_one_slot(arbiter: Arbiter) -> None:
    run(arbiter, request(ANN, at=1000))

    effects = run(arbiter, request(BOB, at=1000))

    assert not kinds(effects, Arm)
    assert [type(effect) for effect in effects] == [Route, Grant]
    assert len(arbiter.books.resources) == 1


def test_whoever_leaves_a_shared_slot_does_not_disturb_the_others(arbiter: Arbiter) -> None:
    # given two who share
    run(arbiter, request(ANN, at=1000))
    run(arbiter, request(BOB, at=1000))

    # when the one who was there first leaves, then the slot stays, and goes with the last
    run(arbiter, release(1, ANN))
    assert len(arbiter.books.resources) == 1
    run(arbiter, release(2, BOB))
    assert not arbiter.books.resources


@pytest.mark.parametrize("difference", [{"target": T1}, {"at": 1001}, {"guard_per_s": 5}])
def test_what_differs_in_target_span_or_guard_is_not_shared(arbiter: Arbiter, difference: dict[str, object]) -> None:
    run(arbiter, request(ANN, at=1000))
    fields: dict[str, object] = {"at": 1000} | difference
    event = request(BOB, **fields)  # type: ignore[arg-type]
    if "guard_per_s" in difference:
        # a guard shows in the mode, as the shell writes it
        assert event.guard_per_s == 5
        return
    assert kinds(run(arbiter, event), Arm)


def test_a_silenced_slot_is_not_shared(arbiter: Arbiter) -> None:
    run(arbiter, request(ANN, at=1000, guard_per_s=10))
    run(arbiter, FuseBlown(LATE_NS, 1))
    assert states(arbiter) == {1: "guarded"}

    assert kinds(run(arbiter, request(BOB, at=1000, guard_per_s=10)), Arm)


# --- wait ------------------------------------------------------------------------------------------------------------


def test_who_waits_is_told_its_place_and_gets_the_room_when_it_comes(arbiter: Arbiter) -> None:
    # given a full thread, and two who wait
    held = full(arbiter)
    (first,) = kinds(run(arbiter, request(BOB, wait_until_ns=LATER_NS)), Queued)
    (second,) = kinds(run(arbiter, request(BOB, wait_until_ns=LATER_NS)), Queued)
    assert isinstance(first, Queued)
    assert isinstance(second, Queued)
    assert (first.position, second.position) == (1, 2)

    # when one holder lets go, then the first has its slot, and the second still waits
    effects = run(arbiter, release(held[0], ANN))
    assert told(effects, Change.GRANTED) == [first.claim.claim_id]
    assert states(arbiter)[second.claim.claim_id] == "waiting"


def test_a_wait_ends_at_its_deadline(arbiter: Arbiter) -> None:
    full(arbiter)
    run(arbiter, request(BOB, wait_until_ns=LATER_NS))
    assert arbiter.next_deadline_ns() == LATER_NS

    (ended,) = kinds(run(arbiter, Tick(LATER_NS)), Ended)

    assert isinstance(ended, Ended)
    assert (ended.claim.claim_id, ended.how) == (SLOTS + 1, End.TIMEOUT)


def test_nobody_overtakes_one_who_waits_for_the_same_room(arbiter: Arbiter) -> None:
    # given one who waits for a CPU that a task keeps it from
    held = full(arbiter, CPU0)
    run(arbiter, release(held[0], ANN))
    run(arbiter, request(BOB, CPU0, pieces=2, wait_until_ns=LATER_NS))

    # when somebody wants the one slot that is free, then it is held back; elsewhere there is room
    (refused,) = kinds(run(arbiter, request(ANN, CPU0)), Refuse)
    assert isinstance(refused, Refuse)
    assert refused.error.errno_name == "EAGAIN"
    assert kinds(run(arbiter, request(ANN, Target(cpus=(1,)))), Grant)


def test_when_who_waits_leaves_those_behind_it_are_served(arbiter: Arbiter) -> None:
    held = full(arbiter, CPU0)
    run(arbiter, release(held[0], ANN))
    run(arbiter, request(BOB, CPU0, pieces=2, wait_until_ns=LATER_NS))
    run(arbiter, request(ANN, CPU0, wait_until_ns=LATER_NS))

    effects = run(arbiter, SessionEnded(LATE_NS, BOB.session_id, "gone"))

    assert told(effects, Change.GRANTED) == [SLOTS + 2]


def test_several_waiters_of_a_session_that_ends_get_nothing_of_each_other(arbiter: Arbiter) -> None:
    held = full(arbiter, CPU0)
    for _ in range(3):
        run(arbiter, request(BOB, CPU0, wait_until_ns=LATER_NS))

    run(arbiter, SessionEnded(LATE_NS, BOB.session_id, "gone"))

    assert sorted(states(arbiter)) == held


def test_what_the_kernel_refuses_waits_and_is_tried_again(arbiter: Arbiter) -> None:
    # given a claim that fits in the books, and that waits
    effect = arm(arbiter, request(ANN, wait_until_ns=LATER_NS))
    arbiter.step(ArmFailed(LATE_NS, effect.claim.claim_id, errno.ENOSPC, 0, None))
    outside = Holder(97, "perf", 0, "", 4, "on cpu 0", evidence="perf fd")
    (queued,) = arbiter.step(ForeignFound(LATE_NS, effect.claim.claim_id, (outside,)))
    assert isinstance(queued, Queued)

    # when a while has passed, then it is tried again, and told
    again_ns = LATE_NS + Policy().retry_ns
    assert arbiter.next_deadline_ns() == again_ns
    assert told(run(arbiter, Tick(again_ns)), Change.GRANTED) == [effect.claim.claim_id]


def test_what_would_not_fit_on_an_empty_machine_does_not_wait(arbiter: Arbiter) -> None:
    assert kinds(run(arbiter, request(ANN, pieces=SLOTS + 1, wait_until_ns=LATER_NS)), Refuse)


# --- displace --------------------------------------------------------------------------------------------------------


def test_a_higher_rank_displaces_the_youngest_which_resumes_in_its_place(arbiter: Arbiter) -> None:
    # given a full thread, when a debugger that is root wants a slot
    held = full(arbiter)
    effects = run(arbiter, request(BOB, kind=Kind.PTRACE, privileged=True))

    # then the youngest is asked to give way, until a deadline
    (revoke,) = (effect for effect in effects if isinstance(effect, Tell) and effect.change is Change.REVOKE)
    assert revoke.claim.claim_id == held[-1]
    assert revoke.deadline_ns == 1_000_000_000 + GRACE_NS
    assert not kinds(effects, Grant)

    # when it does, then the debugger has the slot
    effects = run(arbiter, YieldRequested(LATE_NS, ANN, 72, held[-1]))
    assert told(effects, Change.SUSPENDED) == [held[-1]]
    assert kinds(effects, Grant)
    assert states(arbiter)[held[-1]] == "suspended"

    # and when the debugger lets go, then it has it back
    effects = run(arbiter, release(SLOTS + 1, BOB))
    assert told(effects, Change.RESUMED) == [held[-1]]
    assert states(arbiter) == dict.fromkeys(held, "armed")


def test_who_does_not_give_way_in_time_is_made_to(arbiter: Arbiter) -> None:
    full(arbiter)
    run(arbiter, request(BOB, kind=Kind.PTRACE, privileged=True))

    assert kinds(run(arbiter, Tick(1_000_000_000 + GRACE_NS)), Grant)


def test_kgdb_asks_nobody(arbiter: Arbiter) -> None:
    full(arbiter, CPU0)

    effects = run(arbiter, request(BOB, Target(), kind=Kind.KGDB, privileged=True))

    assert len(kinds(effects, Suspend)) == 1
    assert kinds(effects, Grant)


@pytest.mark.parametrize("kind", [Kind.PERF, Kind.BACKGROUND])
def test_an_equal_or_lower_rank_displaces_nobody(arbiter: Arbiter, kind: Kind) -> None:
    full(arbiter)

    assert kinds(run(arbiter, request(BOB, kind=kind, privileged=True)), Refuse)


def test_a_user_displaces_its_own_claims_only(arbiter: Arbiter) -> None:
    full(arbiter)

    assert kinds(run(arbiter, request(BOB, kind=Kind.PTRACE)), Refuse)
    assert told(run(arbiter, request(ANN, kind=Kind.PTRACE)), Change.REVOKE)


def test_a_displacer_that_fails_to_arm_leaves_all_as_it_was(arbiter: Arbiter) -> None:
    # given somebody who gave way
    held = full(arbiter)
    run(arbiter, request(BOB, kind=Kind.PTRACE, privileged=True, wait_until_ns=LATER_NS))
    (suspend, *_) = arbiter.step(YieldRequested(LATE_NS, ANN, 72, held[-1]))
    assert isinstance(suspend, Suspend)
    effects = arbiter.step(Suspended(LATE_NS, held[-1]))
    assert kinds(effects, Arm)

    # when the kernel refuses the debugger, then the other is resumed at once
    effects = run(arbiter, ArmFailed(LATE_NS, SLOTS + 1, errno.ENOSPC, 0, None))
    assert told(effects, Change.RESUMED) == [held[-1]]
    run(arbiter, ForeignFound(LATE_NS, SLOTS + 1, ()))
    assert states(arbiter) == dict.fromkeys(held, "armed")


def test_a_displacer_that_goes_spares_those_that_have_not_given_way(arbiter: Arbiter) -> None:
    held = full(arbiter)
    run(arbiter, request(BOB, kind=Kind.PTRACE, privileged=True))
    assert states(arbiter)[held[-1]] == "yielding"

    effects = run(arbiter, SessionEnded(LATE_NS, BOB.session_id, "gone"))

    assert told(effects, Change.SPARED) == [held[-1]]
    assert states(arbiter) == dict.fromkeys(held, "armed")


def test_all_who_share_a_slot_give_way_or_none(arbiter: Arbiter) -> None:
    # given a full thread of which one slot is shared
    for number in range(SLOTS - 1):
        run(arbiter, request(ANN, kind=Kind.PTRACE, at=2000 + number))
    for owner in (ANN, BOB):
        run(arbiter, request(owner, at=1000))

    # when somebody of a rank between wants one, then both who share it are asked
    effects = run(arbiter, request(ANN, kind=Kind.PTRACE, privileged=True, at=3000))
    assert told(effects, Change.REVOKE) == [SLOTS, SLOTS + 1]
    effects = run(arbiter, Tick(LATE_NS))
    assert kinds(effects, Grant)

    # and both come back, to one slot
    effects = run(arbiter, release(SLOTS + 2, ANN))
    assert told(effects, Change.RESUMED) == [SLOTS, SLOTS + 1]
    assert len(arbiter.books.resources) == SLOTS


def test_at_the_end_of_the_daemon_nobody_gets_anything(arbiter: Arbiter) -> None:
    full(arbiter)
    run(arbiter, request(BOB, wait_until_ns=LATER_NS))
    run(arbiter, request(BOB, kind=Kind.PTRACE, privileged=True))

    effects = run(arbiter, Stopping(LATE_NS, "over"))

    assert not kinds(effects, Arm)
    assert not states(arbiter)


# --- reserve ---------------------------------------------------------------------------------------------------------


def test_the_reserve_is_left_to_others_but_for_kgdb() -> None:
    arbiter = new_arbiter(policy=Policy(reserve_slots=1))
    for _ in range(SLOTS - 1):
        assert kinds(run(arbiter, request(ANN)), Grant)

    (refused,) = kinds(run(arbiter, request(ANN)), Refuse)
    assert isinstance(refused, Refuse)
    assert refused.error.errno_name == "EAGAIN"
    assert kinds(run(arbiter, request(BOB, kind=Kind.KGDB, privileged=True)), Grant)


def test_nobody_is_told_of_a_claim_it_does_not_know_yet(arbiter: Arbiter) -> None:
    # given a debugger that waits for somebody to give way, and has no answer yet
    full(arbiter)
    run(arbiter, request(BOB, kind=Kind.PTRACE, privileged=True))

    # when another, behind it, wants the same room
    effects = run(arbiter, request(ANN))

    # then the first hears nothing of it: it does not know the claim by its number
    assert kinds(effects, Refuse)
    assert SLOTS + 1 not in told(effects, Change.CONTENDED)


def test_a_claim_that_an_operator_ends_before_it_was_answered_is_a_request_refused(arbiter: Arbiter) -> None:
    # given a debugger that waits for somebody to give way
    full(arbiter)
    run(arbiter, request(BOB, kind=Kind.PTRACE, privileged=True, request_id=70))

    # when an operator ends it
    effects = run(arbiter, release(SLOTS + 1, ANN, operator=True))

    # then its owner has its one answer, and the operator has one
    assert [(one.to, one.request_id) for one in effects if isinstance(one, Refuse)] == [(BOB, 70)]
    assert [(one.to, one.what) for one in effects if isinstance(one, Done)] == [(ANN, "released")]
    assert not kinds(effects, Ended)


def test_waits_that_were_given_up_are_forgotten(arbiter: Arbiter) -> None:
    full(arbiter)

    for number in range(1000):
        run(arbiter, request(BOB, wait_until_ns=LATER_NS + number))
        run(arbiter, release(SLOTS + 1 + number, BOB))

    assert arbiter.next_deadline_ns() is not None
    assert len(arbiter._deadlines) < 200


def test_only_its_owner_lets_a_claim_give_way_and_only_when_it_was_asked_to(arbiter: Arbiter) -> None:
    held = full(arbiter)

    # nobody was asked yet
    (refusal,) = run(arbiter, YieldRequested(LATE_NS, ANN, 72, held[-1]))
    assert isinstance(refusal, Refuse)
    assert refusal.error.errno_name == "EINVAL"

    # and then it is for its owner to answer
    run(arbiter, request(BOB, kind=Kind.PTRACE, privileged=True))
    (refusal,) = run(arbiter, YieldRequested(LATE_NS, BOB, 73, held[-1]))
    assert isinstance(refusal, Refuse)
    assert refusal.error.errno_name == "EPERM"
    assert states(arbiter)[held[-1]] == "yielding"


def test_when_a_wait_ends_in_vain_those_behind_it_are_served(arbiter: Arbiter) -> None:
    # given one free slot, one who waits for two, and one behind it for whom there would be room
    full(arbiter)
    run(arbiter, request(BOB, pieces=2, wait_until_ns=LATER_NS))
    run(arbiter, release(1, ANN))
    run(arbiter, request(BOB, wait_until_ns=2 * LATER_NS))
    assert states(arbiter)[SLOTS + 2] == "waiting"

    # when the first has waited long enough
    effects = run(arbiter, Tick(LATER_NS))

    # then the other has the slot
    assert told(effects, Change.GRANTED) == [SLOTS + 2]


@pytest.mark.parametrize(("priority", "said"), [(0, "(perf)"), (3, "(perf, priority 3)")])
def test_who_is_held_up_is_told_of_what_rank_the_one_ahead_is(arbiter: Arbiter, priority: int, said: str) -> None:
    # given one free slot, and one who waits for two
    full(arbiter)
    run(arbiter, replace(request(BOB, pieces=2, wait_until_ns=LATER_NS), priority=priority))
    run(arbiter, release(1, ANN))

    # when another wants the free one
    effects = run(arbiter, request(BOB))

    # then it hears who is ahead, and with which rank
    (refusal,) = (one for one in effects if isinstance(one, Refuse))
    assert refusal.error.errno_name == "EAGAIN"
    assert said in str(refusal.error)
