"""Claims that their owner arms by ptrace: the placeholder, the taking, and what is left behind."""

from __future__ import annotations

import errno

import pytest
from msgspec.structs import replace

from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import (
    Attend,
    Attribute,
    Change,
    Disarm,
    Done,
    Effect,
    End,
    Ended,
    Grant,
    Handover,
    Probe,
    Refuse,
    Tell,
)
from hwbpd.core.errors import Holder
from hwbpd.core.events import (
    ForeignFound,
    Probed,
    SessionEnded,
    TakeFailed,
    TakenReported,
    TakingRequested,
    TargetEnded,
)
from hwbpd.core.model import ArmedBy, Kind, Plan, Pool
from tests import strategies
from tests.core.steps import ANN, BOB, LATE_NS, SLOTS, T0, new_arbiter, release, request, run, states


@pytest.fixture
def arbiter() -> Arbiter:
    return new_arbiter()


def tracer(arbiter: Arbiter, owner: object = ANN, **fields: object) -> list[Effect]:
    return run(arbiter, request(owner, T0, kind=Kind.PTRACE, armed_by=ArmedBy.TRACER, **fields))  # type: ignore[arg-type]


def take(arbiter: Arbiter, claim_id: int = 1) -> list[Effect]:
    return run(arbiter, TakingRequested(LATE_NS, ANN, 72, claim_id))


def taken(arbiter: Arbiter, claim_id: int = 1) -> None:
    take(arbiter, claim_id)
    run(arbiter, TakenReported(LATE_NS, ANN, 73, claim_id))
    assert states(arbiter)[claim_id] == "taken"


def test_the_place_is_held_until_the_tracer_takes_it(arbiter: Arbiter) -> None:
    tracer(arbiter)
    assert states(arbiter) == {1: "armed"}

    effects = take(arbiter)

    assert [type(effect) for effect in effects] == [Handover, Done]
    assert states(arbiter) == {1: "taking"}
    assert len(arbiter.books.resources) == 1, "it stays in the books"


def test_without_a_placeholder_the_grant_is_the_word_to_take_it(arbiter: Arbiter) -> None:
    effects = tracer(arbiter, placeholder=False)

    assert isinstance(effects[0], Attend)
    assert any(isinstance(effect, Grant) for effect in effects)
    assert states(arbiter) == {1: "taking"}


def test_what_a_tracer_releases_stays_with_the_thread_until_it_exits(arbiter: Arbiter) -> None:
    tracer(arbiter)
    taken(arbiter)

    effects = run(arbiter, release(1, ANN))
    assert effects == [Done(ANN, 71, "released", 1)]
    assert states(arbiter) == {1: "residue"}
    assert not arbiter.books.sessions

    effects = run(arbiter, TargetEnded(LATE_NS, 1, execed=False))
    (ended,) = (effect for effect in effects if isinstance(effect, Ended))
    assert ended.how is End.EXIT
    assert not arbiter.books.resources


def test_residue_counts_and_the_next_tracer_of_that_thread_reuses_it(arbiter: Arbiter) -> None:
    # given a thread full of what tracers left behind
    for number in range(1, SLOTS + 1):
        tracer(arbiter)
        taken(arbiter, number)
    run(arbiter, SessionEnded(LATE_NS, ANN.session_id, "gone"))
    assert set(states(arbiter).values()) == {"residue"}
    (refused, *_) = run(arbiter, request(BOB))
    assert isinstance(refused, Refuse)
    assert {holder.kind for holder in refused.error.holders} == {"residue"}

    # when a tracer comes, then it has one of these without being asked whether there is room
    effects = tracer(arbiter, BOB)
    assert any(isinstance(effect, Grant) for effect in effects)
    (ended,) = (effect for effect in effects if isinstance(effect, Ended))
    assert (ended.claim.claim_id, ended.how) == (1, End.REUSED)
    assert len(arbiter.books.resources) == SLOTS


@pytest.mark.parametrize(("has_slot", "left"), [(True, {1: "residue"}), (False, {})])
def test_a_tracer_that_dies_while_it_takes_leaves_what_the_thread_has(
    arbiter: Arbiter, has_slot: bool, left: dict[int, str]
) -> None:
    tracer(arbiter)
    take(arbiter)

    (probe,) = run(arbiter, SessionEnded(LATE_NS, ANN.session_id, "gone"))
    assert isinstance(probe, Probe)
    assert probe.known == 0

    run(arbiter, Probed(LATE_NS, 1, has_slot))
    assert states(arbiter) == left


def test_a_slot_that_somebody_outside_took_first_is_reported_with_the_culprit(arbiter: Arbiter) -> None:
    tracer(arbiter)
    take(arbiter)

    effects = run(arbiter, TakeFailed(LATE_NS, ANN, 73, 1, errno.ENOSPC))
    assert any(isinstance(effect, Disarm) for effect in effects)
    assert any(isinstance(effect, Attribute) for effect in effects)
    assert not states(arbiter)

    thief = Holder(97, "perf", 0, "", 1, "on tid 800", evidence="perf fd")
    (told,) = run(arbiter, ForeignFound(LATE_NS, 1, (thief,)))
    assert isinstance(told, Tell)
    assert (told.change, told.holders) == (Change.FOREIGN, (thief,))


@pytest.mark.parametrize("event", [TakenReported(LATE_NS, ANN, 73, 1), TakeFailed(LATE_NS, ANN, 73, 1, errno.EIO)])
def test_what_was_not_announced_is_not_taken(arbiter: Arbiter, event: TakenReported | TakeFailed) -> None:
    tracer(arbiter)

    (refused,) = run(arbiter, event)

    assert isinstance(refused, Refuse)
    assert refused.error.errno_name == "EINVAL"
    assert states(arbiter) == {1: "armed"}


def test_what_a_tracer_has_is_not_displaced_and_not_released_by_others(arbiter: Arbiter) -> None:
    for number in range(1, SLOTS + 1):
        tracer(arbiter)
        taken(arbiter, number)

    assert isinstance(run(arbiter, request(BOB, kind=Kind.KGDB, privileged=True))[0], Refuse)
    (refused,) = run(arbiter, release(1, BOB, operator=True))
    assert isinstance(refused, Refuse)


def test_without_a_placeholder_what_is_reused_is_to_be_taken_at_once(arbiter: Arbiter) -> None:
    tracer(arbiter)
    taken(arbiter)
    run(arbiter, release(1, ANN))

    tracer(arbiter, placeholder=False)

    assert states(arbiter) == {2: "taking"}


def test_what_could_not_be_taken_again_is_still_the_threads(arbiter: Arbiter) -> None:
    # given residue that another tracer reuses
    tracer(arbiter)
    taken(arbiter)
    run(arbiter, release(1, ANN))
    tracer(arbiter)
    take(arbiter, 2)

    # when it cannot, then the thread has the slot as before
    effects = run(arbiter, TakeFailed(LATE_NS, ANN, 73, 2, errno.EIO))

    assert effects == [Done(ANN, 73, "take_failed", 2)]
    assert states(arbiter) == {2: "residue"}


@pytest.mark.parametrize("has_some", [True, False])
def test_a_tracer_that_took_some_of_its_slots_leaves_them_behind(arbiter: Arbiter, has_some: bool) -> None:
    # Given a tracer that takes three slots, and is refused one of them,
    tracer(arbiter, pieces=3)
    take(arbiter)
    effects = run(arbiter, TakeFailed(LATE_NS, ANN, 73, 1, errno.EINVAL))

    # then it is looked whether the thread has any of the others,
    assert isinstance(effects[0], Probe)
    assert effects[1:] == [Done(ANN, 73, "take_failed", 1)]
    effects = run(arbiter, Probed(LATE_NS, 1, has_some))

    # and where it has, they stay counted until the thread ends; where it has none, all are free.
    if has_some:
        assert (effects, states(arbiter)) == ([], {1: "residue"})
        assert len(arbiter.books.resources) == 3
        run(arbiter, TargetEnded(LATE_NS, next(iter(arbiter.books.resources)), execed=False))
    else:
        assert [type(effect) for effect in effects if isinstance(effect, Disarm | Ended)] == [Disarm, Ended]
    assert not arbiter.books.resources


@pytest.mark.parametrize("has_slot", [False, True])
def test_who_fails_at_one_of_several_slots_may_have_left_others_behind(arbiter: Arbiter, has_slot: bool) -> None:
    # given a tracer that is about to take two slots
    tracer(arbiter, pieces=2)
    take(arbiter)

    # when it could not take them, then the thread is looked at before anything counts as free
    effects = run(arbiter, TakeFailed(LATE_NS, ANN, 74, 1, errno.EINVAL))
    assert [type(effect) for effect in effects] == [Probe, Done]
    assert len(arbiter.books.resources) == 2

    # and what the kernel keeps is not given to others
    effects = run(arbiter, Probed(LATE_NS, 1, has_slot))
    assert states(arbiter) == ({1: "residue"} if has_slot else {})
    assert [effect.how for effect in effects if isinstance(effect, Ended)] == ([] if has_slot else [End.TAKE_FAILED])


def test_residue_of_another_pool_is_not_reused() -> None:
    # given a machine of two pools, where a tracer has left a breakpoint behind
    arbiter = Arbiter({Pool.INST: 2, Pool.DATA: 2}, (0, 1), (0, 1))
    asked = request(ANN, T0, kind=Kind.PTRACE, armed_by=ArmedBy.TRACER)
    breakpoint_, watchpoint = strategies.piece(Pool.INST, 1), strategies.piece(Pool.DATA, 2)
    run(arbiter, replace(asked, plan=Plan((breakpoint_,))))
    taken(arbiter)
    run(arbiter, release(1, ANN))
    assert states(arbiter) == {1: "residue"}

    # when the next wants a watchpoint, then it gets a slot of that pool, and the residue stays
    run(arbiter, replace(asked, plan=Plan((watchpoint,))))
    assert states(arbiter) == {1: "residue", 2: "armed"}
    assert [one.piece.pool for one in arbiter.books.resources.values()] == [Pool.INST, Pool.DATA]
