"""
The arbiter, event by event: what it orders, what it tells whom, and what it leaves alone.

Whether a slot fits is ``test_admission.py``'s question; here it is enough that four fit on one thread.
"""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core import invariants
from hwbpd.core.admission import OUTSIDE
from hwbpd.core.arbiter import Arbiter, describe
from hwbpd.core.effects import Arm, Disarm, Effect, End, Ended, Grant, Refuse, Route, Unroute
from hwbpd.core.errors import (
    BadClaim,
    CpuOffline,
    HwbpError,
    NoFreeSlot,
    NoResources,
    NoSuchClaim,
    NotPermitted,
    NotSupported,
    TargetGone,
)
from hwbpd.core.events import (
    AnyEvent,
    Armed,
    ArmFailed,
    ClaimRequested,
    Disarmed,
    HitsCounted,
    ReleaseRequested,
    SessionEnded,
    Stopping,
    TargetExited,
)
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Access, Kind, Mode, Owner, Plan, Pool, Span, Target, Totals
from tests import strategies
from tests.strategies import World

T0, T1 = Target(strategies.task(0)), Target(strategies.task(1))
ANN, BOB = strategies.owner(0), strategies.owner(1)
SLOTS = 4
LATE_NS = 9_000_000_000


def new_arbiter() -> Arbiter:
    return Arbiter({Pool.ANY: SLOTS}, (0, 1), (0, 1))


def request(owner: Owner = ANN, target: Target = T0, pieces: int = 1, request_id: int = 70) -> ClaimRequested:
    plan = Plan(tuple(strategies.piece(Pool.ANY, number) for number in range(pieces)))
    return ClaimRequested(
        1_000_000_000, owner, request_id, Kind.PERF, Span(0x1000, 8), Access.WRITE, Mode(), target, "", plan
    )


def arm(arbiter: Arbiter, event: ClaimRequested) -> Arm:
    """Step a request that fits; return what is to be armed for it."""
    (effect,) = arbiter.step(event)
    assert isinstance(effect, Arm)
    return effect


def granted(arbiter: Arbiter, event: ClaimRequested) -> Arm:
    """Bring a request to its grant; return what was armed for it."""
    effect = arm(arbiter, event)
    arbiter.step(Armed(LATE_NS, effect.claim_id))
    return effect


def refused(effects: list[Effect]) -> Refuse:
    (effect,) = effects
    assert isinstance(effect, Refuse)
    return effect


def release(claim_id: int, by: Owner, *, operator: bool = False, request_id: int = 71) -> ReleaseRequested:
    return ReleaseRequested(LATE_NS, by, request_id, claim_id, operator)


# --- a claim ---------------------------------------------------------------------------------------------------------


def test_nobody_is_granted_a_slot_before_the_machine_has_armed_it() -> None:
    # given a request that fits
    arbiter = new_arbiter()
    asked = request()

    # when it is stepped
    effects = arbiter.step(asked)

    # then the slot is counted and the machine is asked, and that is all
    (armed,) = effects
    assert isinstance(armed, Arm)
    (resource,) = armed.resources
    assert (resource.piece, resource.target, resource.mode) == (asked.plan.pieces[0], T0, Mode())
    assert arbiter.books.pools[Pool.ANY].held_by_task(strategies.task(0), 0) == 1
    assert arbiter.books.claims[armed.claim_id].state is State.ARMING

    # and only the machine's answer brings the route and, after it, the grant
    claim = arbiter.books.claims[armed.claim_id].claim
    assert arbiter.step(Armed(LATE_NS, armed.claim_id)) == [
        Route(resource.resource_id, claim),
        Grant(claim, asked.request_id, asked.plan),
    ]
    assert arbiter.books.claims[armed.claim_id].state is State.ARMED


def test_a_claim_is_what_was_asked_for() -> None:
    arbiter = new_arbiter()
    mode = Mode(user=False, ring_bytes=4096)

    (effect,) = arbiter.step(
        ClaimRequested(
            5, BOB, 70, Kind.KGDB, Span(0x2000, 4), Access.EXECUTE, mode, T1, "the list", request().plan
        )
    )

    assert isinstance(effect, Arm)
    claim = arbiter.books.claims[effect.claim_id].claim
    assert (claim.owner, claim.kind, claim.span, claim.access) == (BOB, Kind.KGDB, Span(0x2000, 4), Access.EXECUTE)
    assert (claim.mode, claim.target, claim.label, claim.requested_ns) == (mode, T1, "the list", 5)


def test_a_refusal_changes_nothing_but_its_own_story() -> None:
    # given a thread whose slots are all held
    arbiter = new_arbiter()
    holders = [granted(arbiter, request(BOB)).claim_id for _ in range(SLOTS)]
    before = arbiter.books.dump()

    # when one more is asked for
    refusal = refused(arbiter.step(request(ANN, request_id=99)))

    # then the refusal names who holds them, nothing is counted, and the claim's story can be told
    assert isinstance(refusal.error, NoFreeSlot)
    assert (refusal.to, refusal.request_id, refusal.claim_id) == (ANN, 99, SLOTS + 1)
    (holder,) = refusal.error.holders
    assert (holder.pid, holder.slots, holder.claim_ids) == (BOB.pid, SLOTS, tuple(holders))
    assert arbiter.books.dump() == before
    record = arbiter.record(refusal.claim_id)
    assert record is not None
    assert record.state is State.REFUSED
    assert [line.split("  ")[1] for line in record.story.lines()] == [
        f"{ANN} asked for mem:0x1000/8:w for tid 800 as perf",
        f"refused: {refusal.error}",
    ]


@pytest.mark.parametrize(
    ("number", "expected", "says"),
    [
        (errno.ENOSPC, NoFreeSlot, "at least 4 held outside hwbpd"),
        (errno.ESRCH, TargetGone, "tid 800 on cpu 1 does not exist any more"),
        (errno.ENODEV, CpuOffline, "tid 800 on cpu 1 is offline"),
        (errno.EMFILE, NoResources, "(EMFILE) for mem:0x1000/8:w for tid 800 as perf"),
        (errno.ENFILE, NoResources, "(ENFILE)"),
        (errno.ENOMEM, NoResources, "(ENOMEM)"),
        (errno.EACCES, NotPermitted, "(EACCES)"),
        (errno.EPERM, NotPermitted, "(EPERM)"),
        (errno.EINVAL, BadClaim, "the backend should have said so"),
        (errno.EIO, NotSupported, "on tid 800 on cpu 1 with EIO"),
        (4711, NotSupported, "with errno 4711"),
    ],
)
def test_what_the_kernel_refuses_is_undone_and_told_in_the_owners_words(
    number: int, expected: type[HwbpError], says: str
) -> None:
    # given a claim whose slots are counted while the kernel is asked
    arbiter = new_arbiter()
    before = arbiter.books.dump()
    claim_id = arm(arbiter, request(request_id=99)).claim_id

    # when the kernel refuses one of its legs
    refusal = refused(arbiter.step(ArmFailed(LATE_NS, claim_id, number, cpu=1, tid=800)))

    # then the owner hears which of our refusals that is, and the books are as they were
    assert type(refusal.error) is expected
    assert says in str(refusal.error)
    assert (refusal.to, refusal.request_id, refusal.claim_id) == (ANN, 99, claim_id)
    assert arbiter.books.dump() == before
    record = arbiter.record(claim_id)
    assert record is not None
    assert (record.state, record.resource_ids) == (State.REFUSED, ())
    assert list(record.story.lines())[-1].endswith(f"refused by the kernel: {refusal.error}")


@pytest.mark.parametrize(
    ("cpu", "tid", "where"),
    [(1, None, "cpu 1"), (0, None, "cpu 0"), (None, 800, "tid 800"), (1, 800, "tid 800 on cpu 1")],
)
def test_a_refusal_names_the_leg_as_far_as_the_machine_does(cpu: int | None, tid: int | None, where: str) -> None:
    arbiter = new_arbiter()
    claim_id = arm(arbiter, request()).claim_id

    refusal = refused(arbiter.step(ArmFailed(LATE_NS, claim_id, errno.ESRCH, cpu, tid)))

    assert str(refusal.error) == f"{where} does not exist any more"


def test_a_refusal_reads_well_where_the_machine_does_not_say_which_leg() -> None:
    for number in (errno.ESRCH, errno.ENODEV, errno.EIO):
        arbiter = new_arbiter()
        claim_id = arm(arbiter, request()).claim_id

        refusal = refused(arbiter.step(ArmFailed(LATE_NS, claim_id, number, cpu=None, tid=None)))

        sentence = str(refusal.error)
        assert sentence == sentence.strip()
        assert "  " not in sentence


@pytest.mark.parametrize(("pieces", "outside"), [(1, 3), (2, 2), (3, 1)])
def test_what_the_books_cannot_explain_is_held_outside_hwbpd(pieces: int, outside: int) -> None:
    # given one slot of four that the books know of
    arbiter = new_arbiter()
    known = granted(arbiter, request(BOB)).claim_id

    # when the kernel has no room for what should fit
    claim_id = arm(arbiter, request(ANN, pieces=pieces)).claim_id
    refusal = refused(arbiter.step(ArmFailed(LATE_NS, claim_id, errno.ENOSPC, cpu=None, tid=800))).error

    # then ours is named, and the least that others must have is counted
    ours, others = refusal.holders
    assert (ours.pid, ours.claim_ids, ours.evidence) == (BOB.pid, (known,), "books")
    assert (others.pid, others.comm, others.slots, others.evidence) == (0, OUTSIDE, outside, "the kernel refused")
    assert f"at least {outside} held outside hwbpd" in str(refusal)


def test_several_pieces_are_counted_all_or_none() -> None:
    # given two slots left on a thread
    arbiter = new_arbiter()
    granted(arbiter, request(pieces=2))
    before = arbiter.books.dump()

    # when three are asked for at once, they are refused together
    refusal = refused(arbiter.step(request(pieces=3)))
    assert isinstance(refusal.error, NoFreeSlot)
    assert arbiter.books.dump() == before

    # when two are, both are armed, and when the kernel refuses, both are given back
    armed = arm(arbiter, request(pieces=2))
    assert len(armed.resources) == 2
    assert arbiter.books.pools[Pool.ANY].held_by_task(strategies.task(0), 0) == SLOTS
    refused(arbiter.step(ArmFailed(LATE_NS, armed.claim_id, errno.ENOSPC, None, 800)))
    assert arbiter.books.dump() == before

    # and when they are granted, each has its route, and each goes at the end
    armed = arm(arbiter, request(pieces=2))
    ids = [resource.resource_id for resource in armed.resources]
    routes = arbiter.step(Armed(LATE_NS, armed.claim_id))
    assert [effect.resource_id for effect in routes if isinstance(effect, Route)] == ids
    assert arbiter.step(release(armed.claim_id, ANN)) == [Disarm(armed.claim_id, tuple(ids))]
    ended = arbiter.step(Disarmed(LATE_NS, armed.claim_id, Totals()))
    assert [effect for effect in ended if isinstance(effect, Unroute)] == [Unroute(i, armed.claim_id) for i in ids]
    assert arbiter.books.dump() == before


def test_an_answer_that_nobody_waits_for_is_our_own_mistake() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request()).claim_id

    with pytest.raises(AssertionError, match="armed cannot take the step"):
        arbiter.step(Armed(LATE_NS, claim_id))


# --- its end ---------------------------------------------------------------------------------------------------------


def test_a_slot_counts_until_the_machine_has_given_it_back() -> None:
    # given a granted claim
    arbiter = new_arbiter()
    armed = granted(arbiter, request())
    claim = arbiter.books.claims[armed.claim_id].claim
    (resource,) = armed.resources

    # when its owner releases it, the machine is asked first
    assert arbiter.step(release(armed.claim_id, ANN, request_id=88)) == [
        Disarm(armed.claim_id, (resource.resource_id,))
    ]
    assert arbiter.books.pools[Pool.ANY].held_by_task(strategies.task(0), 0) == 1
    assert arbiter.books.claims[armed.claim_id].state is State.RELEASING

    # then its answer frees the slot and is told with the final counts
    totals = Totals(hits=12, lost=5)
    assert arbiter.step(Disarmed(LATE_NS, armed.claim_id, totals)) == [
        Unroute(resource.resource_id, armed.claim_id),
        Ended(claim, End.RELEASED, "released by its owner", totals, ANN, 88),
    ]
    assert arbiter.books.dump() == new_arbiter().books.dump()
    record = arbiter.record(armed.claim_id)
    assert record is not None
    assert (record.state, record.resource_ids) == (State.RELEASED, ())
    assert (record.hits, record.lost) == (12, 5)


def test_an_operator_ends_the_claims_of_others_and_says_who_it_was() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request(ANN)).claim_id

    arbiter.step(release(claim_id, BOB, operator=True, request_id=88))
    ended = arbiter.step(Disarmed(LATE_NS, claim_id, Totals()))[-1]

    assert isinstance(ended, Ended)
    assert (ended.claim.owner, ended.how, ended.asked_by, ended.request_id) == (ANN, End.FORCED, BOB, 88)
    assert ended.sentence == f"released by {BOB}, uid {BOB.uid}"


def test_an_operators_own_claim_is_released_and_not_forced() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request(ANN)).claim_id

    arbiter.step(release(claim_id, ANN, operator=True))
    ended = arbiter.step(Disarmed(LATE_NS, claim_id, Totals()))[-1]

    assert isinstance(ended, Ended)
    assert ended.how is End.RELEASED


@pytest.mark.parametrize(
    "stranger", [BOB, Owner(77, ANN.pid, ANN.uid, ANN.gid, ANN.comm)], ids=["another process", "another session"]
)
def test_a_stranger_may_not_release_a_claim(stranger: Owner) -> None:
    # given a claim of one session
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request(ANN)).claim_id
    before = arbiter.books.dump()

    # when another, even of the same process, wants it released
    refusal = refused(arbiter.step(release(claim_id, stranger, request_id=88)))

    # then it hears whose it is, and the claim stays
    assert isinstance(refusal.error, NotPermitted)
    assert f"belongs to {ANN}" in str(refusal.error)
    assert (refusal.to, refusal.request_id, refusal.claim_id) == (stranger, 88, claim_id)
    assert arbiter.books.dump() == before


def test_a_claim_that_is_over_and_one_that_never_was_are_told_apart() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request()).claim_id
    arbiter.step(release(claim_id, ANN))
    arbiter.step(Disarmed(LATE_NS, claim_id, Totals()))

    over = refused(arbiter.step(release(claim_id, ANN)))
    never = refused(arbiter.step(release(12345, ANN)))

    assert isinstance(over.error, NoSuchClaim)
    assert isinstance(never.error, NoSuchClaim)
    assert str(over.error) == f"claim {claim_id} is over"
    assert "there is no claim 12345" in str(never.error)
    assert (over.claim_id, never.claim_id) == (0, 0)


def test_the_end_of_a_session_releases_its_claims_and_no_others() -> None:
    # given two sessions with claims
    arbiter = new_arbiter()
    first = granted(arbiter, request(ANN))
    other = granted(arbiter, request(BOB))
    second = granted(arbiter, request(ANN, T1))

    # when one ends
    effects = arbiter.step(SessionEnded(LATE_NS, ANN.session_id, "its process ended"))

    # then its claims go, oldest first, and nobody waits for a reply
    assert effects == [Disarm(gone.claim_id, (gone.resources[0].resource_id,)) for gone in (first, second)]
    for gone in (first, second):
        ended = arbiter.step(Disarmed(LATE_NS, gone.claim_id, Totals()))[-1]
        assert isinstance(ended, Ended)
        assert (ended.how, ended.sentence) == (End.SESSION, "its process ended")
        assert (ended.asked_by, ended.request_id) == (None, 0)
    assert list(arbiter.books.claims) == [other.claim_id]
    assert ANN.session_id not in arbiter.books.sessions

    # and a session without claims ends without effects
    assert arbiter.step(SessionEnded(LATE_NS, ANN.session_id, "again")) == []


def test_a_claim_ends_with_its_thread_once_however_many_slots_tell_of_it() -> None:
    # given a claim of two slots on one thread, and one on another
    arbiter = new_arbiter()
    armed = granted(arbiter, request(pieces=2))
    other = granted(arbiter, request(BOB, T1))
    first, second = (resource.resource_id for resource in armed.resources)

    # when both slots tell that the thread is gone
    told_first = arbiter.step(TargetExited(LATE_NS, first))
    told_again = arbiter.step(TargetExited(LATE_NS, second))

    # then the claim is released once, and the other stays
    assert told_first == [Disarm(armed.claim_id, (first, second))]
    assert told_again == []
    ended = arbiter.step(Disarmed(LATE_NS, armed.claim_id, Totals()))[-1]
    assert isinstance(ended, Ended)
    assert (ended.how, ended.sentence, ended.asked_by) == (End.EXIT, "tid 800 has exited", None)
    assert list(arbiter.books.claims) == [other.claim_id]

    # and a slot that is free again tells nothing
    assert arbiter.step(TargetExited(LATE_NS, first)) == []


def test_stopping_ends_every_claim_of_everybody() -> None:
    arbiter = new_arbiter()
    claims = [granted(arbiter, request(owner)).claim_id for owner in (ANN, BOB, ANN)]

    effects = arbiter.step(Stopping(LATE_NS, "the daemon is stopping"))

    assert [effect.claim_id for effect in effects if isinstance(effect, Disarm)] == claims
    for claim_id in claims:
        ended = arbiter.step(Disarmed(LATE_NS, claim_id, Totals()))[-1]
        assert isinstance(ended, Ended)
        assert (ended.how, ended.sentence) == (End.STOPPING, "the daemon is stopping")
    assert arbiter.books.dump() == new_arbiter().books.dump()


def test_hits_are_counted_for_the_claim_that_rides_on_the_slot() -> None:
    # given a claim on one slot, and one on another
    arbiter = new_arbiter()
    armed, other = granted(arbiter, request()), granted(arbiter, request())
    resource_id = armed.resources[0].resource_id

    # when drains bring hits, and news of lost ones
    effects = [arbiter.step(HitsCounted(LATE_NS, resource_id, hits, lost)) for hits, lost in ((5, 0), (2, 3))]

    # then the claim had all of them, and nothing is ordered
    record = arbiter.books.claims[armed.claim_id]
    assert (record.hits, record.lost) == (10, 3)
    assert arbiter.books.claims[other.claim_id].hits == 0
    assert effects == [[], []]
    assert arbiter.step(HitsCounted(LATE_NS, 12345, 1, 1)) == []


def test_the_story_of_a_claim_tells_its_life_in_order_with_its_times() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request()).claim_id
    arbiter.step(release(claim_id, ANN))
    arbiter.step(Disarmed(LATE_NS + 500_000_000, claim_id, Totals(hits=12)))

    record = arbiter.record(claim_id)

    assert record is not None
    assert list(record.story.lines()) == [
        f"+0.000000 s  {ANN} asked for mem:0x1000/8:w for tid 800 as perf",
        "+8.000000 s  granted: the kernel has taken the slots",
        "+8.000000 s  its end: released by its owner",
        "+8.500000 s  its slots are free, after 12 hits",
    ]
    assert arbiter.record(claim_id + 1) is None
    going_on = granted(arbiter, request()).claim_id
    assert arbiter.record(going_on) is arbiter.books.claims[going_on], "a claim that is not over has a story, too"


@pytest.mark.parametrize(
    ("user", "kernel", "modifier"), [(True, True, ""), (True, False, ":u"), (False, True, ":k"), (False, False, "")]
)
def test_a_claim_is_described_as_perf_writes_it(user: bool, kernel: bool, modifier: str) -> None:
    claim = strategies.claim(1, ANN, Target(strategies.task(0), (0, 1)), Kind.KVM)
    mode = Mode(user=user, kernel=kernel)

    described = describe(type(claim)(1, ANN, Kind.KVM, claim.span, Access.WRITE, mode, claim.target, "", 0))

    assert described == f"mem:0x1000/8:w{modifier} for tid 800 on cpu 0-1 as kvm"


# --- random histories ------------------------------------------------------------------------------------------------


class Ask(NamedTuple):
    """Ask for slots; the machine answers with ``refusal``, or arms them where that is 0."""

    owner: Owner
    target: Target
    plan: Plan
    refusal: int


class Happens(NamedTuple):
    """Something else: to claim ``nth``, or to the ``nth`` resource, modulo how many there are."""

    what: str
    nth: int
    owner: Owner


History = tuple[World, list[Ask | Happens]]


@st.composite
def histories(draw: st.DrawFn) -> History:
    world = draw(strategies.worlds())
    refusals = st.sampled_from([0, 0, 0, 0, errno.ENOSPC, errno.ESRCH, errno.EMFILE])
    asks = st.builds(Ask, strategies.owners, strategies.targets(world, stray=True), strategies.plans(world), refusals)
    whats = st.sampled_from(["release", "force", "session", "exit", "hits"])
    others = st.builds(Happens, whats, st.integers(0, 63), strategies.owners)
    length = draw(st.integers(0, 30))
    return world, draw(st.lists(st.one_of(asks, asks, others), min_size=length, max_size=length))


def event_of(arbiter: Arbiter, operation: Ask | Happens, now_ns: int) -> AnyEvent | None:
    """The event that an operation is, in the state that the arbiter is in; None where it has no object."""
    if isinstance(operation, Ask):
        owner, target, plan, _ = operation
        span = plan.pieces[0].span
        return ClaimRequested(now_ns, owner, now_ns, Kind.PERF, span, Access.WRITE, Mode(), target, "", plan)
    what, nth, owner = operation
    if what == "session":
        return SessionEnded(now_ns, owner.session_id, "its process ended")
    if what in ("exit", "hits"):
        if not arbiter.books.resources:
            return None
        resource_id = list(arbiter.books.resources)[nth % len(arbiter.books.resources)]
        return TargetExited(now_ns, resource_id) if what == "exit" else HitsCounted(now_ns, resource_id, nth, nth % 3)
    return ReleaseRequested(now_ns, owner, now_ns, nth, operator=what == "force")


def outcome(effect: Effect, refusal: int, now_ns: int) -> AnyEvent | None:
    """What a machine says to an effect."""
    match effect:
        case Arm(claim_id):
            return ArmFailed(now_ns, claim_id, refusal, None, None) if refusal else Armed(now_ns, claim_id)
        case Disarm(claim_id):
            return Disarmed(now_ns, claim_id, Totals(hits=claim_id))
    return None


def play(world: World, operations: list[Ask | Happens]) -> tuple[Arbiter, list[AnyEvent], list[list[Effect]]]:
    """Let it all happen, as the shell does; return every event in its order, and what each brought."""
    arbiter = Arbiter(world.slots, world.possible, world.online)
    events: list[AnyEvent] = []
    effects: list[list[Effect]] = []
    for number, operation in enumerate(operations):
        first = event_of(arbiter, operation, now_ns=number)
        pending = [] if first is None else [first]
        while pending:
            events.append(pending.pop(0))
            effects.append(arbiter.step(events[-1]))
            invariants.check(arbiter.books)
            refusal = operation.refusal if isinstance(operation, Ask) else 0
            pending += [event for effect in effects[-1] if (event := outcome(effect, refusal, number)) is not None]
        invariants.nothing_is_waiting(arbiter.books)
    return arbiter, events, effects


def plain(effect: Effect) -> Any:
    """An effect as a value that compares equal: exceptions do not."""
    if isinstance(effect, Refuse):
        error = effect.error
        return effect.to, effect.request_id, effect.claim_id, type(error), str(error), error.holders
    return effect


@given(histories())
def test_the_same_events_lead_to_the_same_effects_and_the_same_state(history: History) -> None:
    world, operations = history
    arbiter, events, effects = play(world, operations)

    again = Arbiter(world.slots, world.possible, world.online)
    effects_again = [again.step(event) for event in events]

    assert [[plain(effect) for effect in told] for told in effects_again] == [
        [plain(effect) for effect in told] for told in effects
    ]
    assert again.books.dump() == arbiter.books.dump()
    assert [list(record.story.lines()) for record in again.books.ended.values()] == [
        list(record.story.lines()) for record in arbiter.books.ended.values()
    ]


@given(histories())
def test_every_request_is_answered_once_and_no_id_is_used_twice(history: History) -> None:
    arbiter, events, effects = play(*history)

    told = [effect for of_event in effects for effect in of_event]
    answered = [effect.request_id for effect in told if isinstance(effect, Grant | Refuse)]
    answered += [effect.request_id for effect in told if isinstance(effect, Ended) and effect.asked_by is not None]
    asked = [event.request_id for event in events if isinstance(event, ClaimRequested | ReleaseRequested)]
    assert sorted(answered) == sorted(asked)

    asked_to_arm = [effect for effect in told if isinstance(effect, Arm)]
    resource_ids = [resource.resource_id for effect in asked_to_arm for resource in effect.resources]
    assert resource_ids == sorted(set(resource_ids))
    claim_ids = [effect.claim_id for effect in told if isinstance(effect, Arm | Refuse) and effect.claim_id]
    made = sum(isinstance(event, ClaimRequested) for event in events)
    assert set(claim_ids) == set(range(1, made + 1))
    granted_ids = {effect.claim.claim_id for effect in told if isinstance(effect, Grant)}
    ended_ids = [effect.claim.claim_id for effect in told if isinstance(effect, Ended)]
    assert granted_ids == {*ended_ids, *arbiter.books.claims}
    assert len(ended_ids) == len(set(ended_ids))


@given(histories())
def test_nothing_that_is_refused_leaves_a_trace_in_the_books(history: History) -> None:
    # given a machine in any state that a history can lead to
    world, operations = history
    arbiter, *_ = play(world, operations)
    before = arbiter.books.dump()

    # when everybody asks for more than there is
    most = max(world.slots.values()) + 1
    plan = Plan(tuple(strategies.piece(next(iter(world.slots)), number) for number in range(most)))
    for number, task in enumerate((None, *world.tasks)):
        event = event_of(arbiter, Ask(ANN, Target(task), plan, 0), now_ns=1000 + number)
        assert event is not None
        refused(arbiter.step(event))

    # then the books are as they were
    assert arbiter.books.dump() == before
