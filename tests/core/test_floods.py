"""
Floods in the arbiter: who is silenced, how it comes to report again, and what becomes of it when it cannot.

How much is too much is ``test_guard.py``'s question.
"""

from __future__ import annotations

import errno

import pytest

from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import (
    Arm,
    Change,
    Disarm,
    Effect,
    End,
    Ended,
    Rearm,
    RearmDone,
    Silence,
    Tell,
    TopUp,
    Unroute,
)
from hwbpd.core.errors import BadClaim, NoResources, NoSuchClaim, NotPermitted
from hwbpd.core.events import (
    AnyEvent,
    Disarmed,
    FuseBlown,
    HitsCounted,
    Rearmed,
    RearmFailed,
    RearmRequested,
    SessionEnded,
    TargetEnded,
    Tick,
)
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Owner, Totals
from tests.core.steps import ANN, BOB, LATE_NS, T1, granted, new_arbiter, refused, release, request

RATE = 10
S = 1_000_000_000
REARM_AFTER_NS = 30 * S


def hits(arm: Arm, number: int, nth: int = 0, lost: int = 0, now_ns: int = LATE_NS) -> HitsCounted:
    """News of hits on the ``nth`` slot of a claim."""
    return HitsCounted(now_ns, arm.resources[nth].resource_id, number, lost)


def flooded(arbiter: Arbiter, pieces: int = 1, now_ns: int = LATE_NS) -> Arm:
    """A claim of ANN's that has been silenced."""
    armed = granted(arbiter, request(pieces=pieces, guard_per_s=RATE))
    arbiter.step(hits(armed, RATE, now_ns=now_ns))
    assert state(arbiter, armed) is State.GUARDED
    return armed


def state(arbiter: Arbiter, arm: Arm) -> State:
    record = arbiter.record(arm.claim.claim_id)
    assert record is not None
    return record.state


def rearm(arm: Arm, by: Owner = ANN, *, operator: bool = False) -> RearmRequested:
    return RearmRequested(LATE_NS, by, 55, arm.claim.claim_id, operator)


def told(effects: list[Effect]) -> list[Change]:
    return [effect.change for effect in effects if isinstance(effect, Tell)]


def test_a_stream_below_the_rate_is_topped_up_by_what_time_has_earned() -> None:
    # given a guarded claim whose bucket was filled one second after it was asked for
    arbiter = new_arbiter()
    armed = granted(arbiter, request(guard_per_s=RATE))
    (resource,) = armed.resources
    assert arbiter.step(hits(armed, 0)) == [], "a full bucket earns nothing"

    # when hits come, what they took is given back as time passes, to the machine's fuse, too
    assert arbiter.step(hits(armed, 4)) == []
    assert arbiter.step(hits(armed, 0, now_ns=LATE_NS + S // 10)) == [TopUp(resource.resource_id, 1)]
    assert arbiter.step(hits(armed, 1, now_ns=LATE_NS + 10 * S)) == [TopUp(resource.resource_id, 4)]
    assert state(arbiter, armed) is State.ARMED


def test_a_flood_is_silenced_and_its_owner_told_once() -> None:
    # given two slots of one claim
    arbiter = new_arbiter()
    armed = granted(arbiter, request(pieces=2, guard_per_s=RATE))

    # when one of them brings a second's worth at once
    effects = arbiter.step(hits(armed, RATE - 3, lost=3))

    # then both are silent, with their slots held, and the owner knows the rate and the way on
    sentence = f"silenced: more than {RATE} hits a second; it keeps its slot, `rearm` goes on"
    ids = tuple(resource.resource_id for resource in armed.resources)
    assert effects == [Silence(ids), Tell(armed.claim, Change.GUARDED, sentence)]
    assert state(arbiter, armed) is State.GUARDED
    assert set(ids) <= arbiter.books.resources.keys()
    record = arbiter.books.claims[armed.claim.claim_id]
    assert list(record.story.lines())[-1].endswith(sentence)

    # and what was still in the rings is counted, and says nothing more
    assert arbiter.step(hits(armed, RATE)) == []
    assert arbiter.step(hits(armed, RATE, nth=1)) == []
    assert (record.hits, record.lost) == (3 * RATE, 3)


def test_a_fuse_that_blew_before_we_looked_is_a_flood() -> None:
    arbiter = new_arbiter()
    armed = granted(arbiter, request(guard_per_s=RATE))
    (resource,) = armed.resources

    effects = arbiter.step(FuseBlown(LATE_NS, resource.resource_id))

    assert effects[0] == Silence((resource.resource_id,))
    assert told(effects) == [Change.GUARDED]
    assert arbiter.step(FuseBlown(LATE_NS, resource.resource_id)) == [], "once is enough"


def test_a_fuse_of_a_slot_that_is_free_again_or_never_had_one_is_nobodys() -> None:
    arbiter = new_arbiter()
    (resource,) = granted(arbiter, request(guard_per_s=0)).resources

    for resource_id in (12345, resource.resource_id):
        assert arbiter.step(FuseBlown(LATE_NS, resource_id)) == []


def test_without_a_guard_nothing_is_a_flood() -> None:
    arbiter = new_arbiter()
    armed = granted(arbiter, request(guard_per_s=0))

    assert arbiter.step(hits(armed, 10**9)) == []
    assert state(arbiter, armed) is State.ARMED


def test_a_flood_on_one_claim_silences_no_other() -> None:
    arbiter = new_arbiter()
    quiet = granted(arbiter, request(BOB, T1, guard_per_s=RATE))

    flooded(arbiter)

    assert told(arbiter.step(hits(quiet, RATE - 1))) == []
    assert state(arbiter, quiet) is State.ARMED


# --- armed again -----------------------------------------------------------------------------------------------------


def test_who_asks_has_its_claim_armed_again_with_a_new_fuse() -> None:
    # given a claim that was silenced
    arbiter = new_arbiter()
    armed = flooded(arbiter, pieces=2)
    ids = tuple(resource.resource_id for resource in armed.resources)

    # when its owner wants it back, then the machine is asked first
    assert arbiter.step(rearm(armed)) == [Rearm(armed.claim.claim_id, ids, RATE)]
    assert state(arbiter, armed) is State.REARMING

    # and its answer is what is told
    assert arbiter.step(Rearmed(LATE_NS, armed.claim.claim_id)) == [
        Tell(armed.claim, Change.RESUMED, "it reports again"),
        RearmDone(armed.claim, ANN, 55),
    ]
    assert state(arbiter, armed) is State.ARMED
    assert list(arbiter.books.claims[armed.claim.claim_id].story.lines())[-1].endswith("reports again")

    # and it has a second's worth again, on each slot, before it is silenced again
    for nth in (0, 1):
        assert arbiter.step(hits(armed, RATE - 1, nth=nth)) == []
    assert told(arbiter.step(hits(armed, 1))) == [Change.GUARDED]


def test_an_operator_arms_the_claims_of_others_again() -> None:
    arbiter = new_arbiter()
    armed = flooded(arbiter)

    assert isinstance(arbiter.step(rearm(armed, BOB, operator=True))[0], Rearm)

    assert arbiter.step(Rearmed(LATE_NS, armed.claim.claim_id))[-1] == RearmDone(armed.claim, BOB, 55)


def test_a_stranger_may_not_arm_a_claim_again() -> None:
    arbiter = new_arbiter()
    armed = flooded(arbiter)

    refusal = refused(arbiter.step(rearm(armed, BOB)))

    assert isinstance(refusal.error, NotPermitted)
    assert str(refusal.error) == f"claim 1 belongs to {ANN}; only that session, or root, may rearm it"
    assert (refusal.to, refusal.request_id) == (BOB, 55)
    assert state(arbiter, armed) is State.GUARDED


def test_only_what_was_silenced_is_armed_again() -> None:
    arbiter = new_arbiter()
    armed = granted(arbiter, request(guard_per_s=RATE))

    refusal = refused(arbiter.step(rearm(armed)))
    assert isinstance(refusal.error, BadClaim)
    assert str(refusal.error) == "claim 1 is armed; only a guarded one is to be armed again"

    arbiter.step(release(1, ANN))
    arbiter.step(Disarmed(LATE_NS, 1, Totals()))
    refusal = refused(arbiter.step(rearm(armed)))
    assert isinstance(refusal.error, NoSuchClaim)
    assert str(refusal.error) == "claim 1 is over"


@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "by itself"])
def test_a_slot_that_somebody_took_meanwhile_is_lost_and_said_to_be_stolen(asked: bool) -> None:
    # given a claim that is being armed again
    arbiter = new_arbiter(REARM_AFTER_NS)
    armed = flooded(arbiter, pieces=2)
    ids = tuple(resource.resource_id for resource in armed.resources)
    arbiter.step(rearm(armed) if asked else Tick(LATE_NS + REARM_AFTER_NS))

    # when the machine could not have a slot back
    effects = arbiter.step(RearmFailed(LATE_NS, 1, errno.ENOSPC))

    # then whoever asked hears it, what is left is given back, and the owner loses the claim
    sentence = "its slot was taken by somebody else while it was armed again (ENOSPC)"
    if asked:
        refusal = refused(effects[:1])
        assert isinstance(refusal.error, NoResources)
        assert (str(refusal.error), refusal.to, refusal.request_id, refusal.claim_id) == (sentence, ANN, 55, 1)
        effects = effects[1:]
    assert effects == [Disarm(1, ids)]
    assert arbiter.step(Disarmed(LATE_NS, 1, Totals(hits=RATE))) == [
        *(Unroute(resource_id, 1) for resource_id in ids),
        Ended(armed.claim, End.STOLEN, sentence, Totals(hits=RATE)),
    ]
    assert arbiter.books.dump() == new_arbiter().books.dump()


@pytest.mark.parametrize("end", ["release", "session", "exit"])
def test_a_silent_claim_ends_like_any_other(end: str) -> None:
    arbiter = new_arbiter(REARM_AFTER_NS)
    armed = flooded(arbiter)
    (resource,) = armed.resources
    events: dict[str, AnyEvent] = {
        "release": release(1, ANN),
        "session": SessionEnded(LATE_NS, ANN.session_id, "its process ended"),
        "exit": TargetEnded(LATE_NS, resource.resource_id, execed=False),
    }

    assert arbiter.step(events[end]) == [Disarm(1, (resource.resource_id,))]
    arbiter.step(Disarmed(LATE_NS, 1, Totals(hits=RATE)))

    # and nobody wants it armed again, whatever time passes
    assert arbiter.step(Tick(LATE_NS + REARM_AFTER_NS)) == []
    assert arbiter.next_deadline_ns() is None
    assert arbiter.books.dump() == new_arbiter().books.dump()


# --- by itself -------------------------------------------------------------------------------------------------------


def test_without_a_time_to_wait_a_silent_claim_stays_silent() -> None:
    arbiter = new_arbiter(rearm_after_ns=0)
    flooded(arbiter)

    assert arbiter.next_deadline_ns() is None
    assert arbiter.step(Tick(LATE_NS + 10**15)) == []


def test_after_the_time_to_wait_a_silent_claim_is_armed_again_by_itself() -> None:
    # given two claims that were silenced one after the other
    arbiter = new_arbiter(REARM_AFTER_NS)
    first, second = flooded(arbiter, now_ns=LATE_NS), flooded(arbiter, now_ns=LATE_NS + 5)
    assert arbiter.next_deadline_ns() == LATE_NS + REARM_AFTER_NS

    # when the time of the first has come, and not a nanosecond earlier, it is armed again
    assert arbiter.step(Tick(LATE_NS + REARM_AFTER_NS - 1)) == []
    assert arbiter.step(Tick(LATE_NS + REARM_AFTER_NS)) == [Rearm(1, (first.resources[0].resource_id,), RATE)]
    assert arbiter.next_deadline_ns() == LATE_NS + REARM_AFTER_NS + 5

    # and nobody is answered who did not ask
    assert arbiter.step(Rearmed(LATE_NS, 1)) == [Tell(first.claim, Change.RESUMED, "it reports again")]
    assert arbiter.step(Tick(LATE_NS + 2 * REARM_AFTER_NS)) == [Rearm(2, (second.resources[0].resource_id,), RATE)]
    assert arbiter.next_deadline_ns() is None


def test_the_time_to_wait_begins_with_the_last_flood() -> None:
    # given a claim that was silenced, armed again on request, and silenced again
    arbiter = new_arbiter(REARM_AFTER_NS)
    armed = flooded(arbiter)
    arbiter.step(rearm(armed))
    arbiter.step(Rearmed(LATE_NS, 1))
    again_ns = LATE_NS + 20 * S
    assert told(arbiter.step(hits(armed, RATE, now_ns=again_ns))) == [Change.GUARDED]

    # when the time of the first silence is over, then that of the second is not
    assert arbiter.step(Tick(LATE_NS + REARM_AFTER_NS)) == []
    assert isinstance(arbiter.step(Tick(again_ns + REARM_AFTER_NS))[0], Rearm)
