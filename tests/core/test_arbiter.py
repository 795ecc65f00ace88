"""
The arbiter, event by event: what it orders, what it tells whom, and what it leaves alone.

Whether a slot fits is ``test_admission.py``'s question; here it is enough that four fit on one thread.
"""

from __future__ import annotations

import errno

import pytest

from hwbpd.core.arbiter import describe
from hwbpd.core.effects import Arm, Attribute, Disarm, End, Ended, Grant, Route, Unroute
from hwbpd.core.errors import (
    BadClaim,
    CpuOffline,
    Holder,
    HwbpError,
    NoFreeSlot,
    NoResources,
    NoSuchClaim,
    NotPermitted,
    NotSupported,
    TargetGone,
)
from hwbpd.core.events import (
    Armed,
    ArmFailed,
    ClaimRequested,
    Disarmed,
    ForeignFound,
    HitsCounted,
    SessionEnded,
    Stopping,
    TargetEnded,
)
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Access, Kind, Mode, Owner, Pool, Span, Target, Totals
from tests import strategies
from tests.core.steps import (
    ANN,
    BOB,
    LATE_NS,
    P0,
    SLOTS,
    T0,
    T1,
    arm,
    arm_failed,
    granted,
    new_arbiter,
    refused,
    release,
    request,
)

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
    assert arbiter.books.claims[armed.claim.claim_id].state is State.ARMING

    # and only the machine's answer brings the route and, after it, the grant
    claim = arbiter.books.claims[armed.claim.claim_id].claim
    assert arbiter.step(Armed(LATE_NS, armed.claim.claim_id)) == [
        Route(resource.resource_id, claim),
        Grant(claim, asked.request_id, asked.plan),
    ]
    assert arbiter.books.claims[armed.claim.claim_id].state is State.ARMED


def test_a_claim_is_what_was_asked_for() -> None:
    arbiter = new_arbiter()
    mode = Mode(user=False, ring_bytes=4096)

    (effect,) = arbiter.step(
        ClaimRequested(
            5, BOB, 70, Kind.KGDB, Span(0x2000, 4), Access.EXECUTE, mode, T1, "the list", request().plan
        )
    )

    assert isinstance(effect, Arm)
    claim = arbiter.books.claims[effect.claim.claim_id].claim
    assert (claim.owner, claim.kind, claim.span, claim.access) == (BOB, Kind.KGDB, Span(0x2000, 4), Access.EXECUTE)
    assert (claim.mode, claim.target, claim.label, claim.requested_ns) == (mode, T1, "the list", 5)


def test_a_refusal_changes_nothing_but_its_own_story() -> None:
    # given a thread whose slots are all held
    arbiter = new_arbiter()
    holders = [granted(arbiter, request(BOB)).claim.claim_id for _ in range(SLOTS)]
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
        (errno.ENOSPC, NoFreeSlot, "somebody outside hwbpd: at least 4 on cpu 1"),
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
    claim_id = arm(arbiter, request(request_id=99)).claim.claim_id

    # when the kernel refuses one of its legs
    refusal = arm_failed(arbiter, ArmFailed(LATE_NS, claim_id, number, cpu=1, tid=800))

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
    claim_id = arm(arbiter, request()).claim.claim_id

    refusal = arm_failed(arbiter, ArmFailed(LATE_NS, claim_id, errno.ESRCH, cpu, tid))

    assert str(refusal.error) == f"{where} does not exist any more"


def test_a_refusal_reads_well_where_the_machine_does_not_say_which_leg() -> None:
    for number in (errno.ESRCH, errno.ENODEV, errno.EIO):
        arbiter = new_arbiter()
        claim_id = arm(arbiter, request()).claim.claim_id

        refusal = arm_failed(arbiter, ArmFailed(LATE_NS, claim_id, number, cpu=None, tid=None))

        sentence = str(refusal.error)
        assert sentence == sentence.strip()
        assert "  " not in sentence


@pytest.mark.parametrize(("pieces", "outside"), [(1, 3), (2, 2), (3, 1)])
def test_what_the_books_cannot_explain_is_held_outside_hwbpd(pieces: int, outside: int) -> None:
    # given one slot of four that the books know of
    arbiter = new_arbiter()
    known = granted(arbiter, request(BOB)).claim.claim_id

    # when the kernel has no room for what should fit
    claim_id = arm(arbiter, request(ANN, pieces=pieces)).claim.claim_id
    refusal = arm_failed(arbiter, ArmFailed(LATE_NS, claim_id, errno.ENOSPC, cpu=None, tid=800)).error

    # then ours is named, and the least that others must have is counted
    ours, others = refusal.holders
    assert (ours.pid, ours.claim_ids, ours.evidence) == (BOB.pid, (known,), "books")
    assert (others.pid, others.comm, others.slots, others.evidence) == (
        0,
        "outside hwbpd",
        outside,
        "the kernel refused",
    )
    assert f"somebody outside hwbpd: at least {outside} on cpu 0" in str(refusal)


# --- who is in the way outside ---------------------------------------------------------------------------------------

GDB = Holder(812, "gdb", 1000, "", 4, "on tid 800", evidence="traces it")


def test_when_the_kernel_has_no_room_somebody_looks_before_the_owner_is_told() -> None:
    # given a claim that fits in the books
    arbiter = new_arbiter()
    before = arbiter.books.dump()
    claim_id = arm(arbiter, request(request_id=99)).claim.claim_id

    # when the kernel has no room on CPU 1, then nothing is held, and those in the way there are looked for
    effects = arbiter.step(ArmFailed(LATE_NS, claim_id, errno.ENOSPC, cpu=1, tid=800))
    assert effects == [Attribute(claim_id, Pool.ANY, T0, 1)]
    assert arbiter.books.claims[claim_id].state is State.ATTRIBUTING
    assert {**arbiter.books.dump(), "claims": {}, "sessions": {}} == before

    # and what is found is what the owner hears, in place of a guess
    refusal = refused(arbiter.step(ForeignFound(LATE_NS, claim_id, (GDB,))))
    assert isinstance(refusal.error, NoFreeSlot)
    assert (refusal.to, refusal.request_id, refusal.claim_id, refusal.error.holders) == (ANN, 99, claim_id, (GDB,))
    assert str(refusal.error) == f"no slot on tid 800 (cpu 1): 4 of 4 held ({GDB})"
    record = arbiter.record(claim_id)
    assert record is not None
    assert record.state is State.REFUSED
    assert [line.split("  ")[1] for line in record.story.lines()][1:] == [
        "the kernel has no room although the books have: looking who is in the way",
        f"refused by the kernel: {refusal.error}",
    ]
    assert arbiter.books.dump() == before


def test_those_outside_are_named_after_those_in_the_books() -> None:
    arbiter = new_arbiter()
    known = granted(arbiter, request(BOB)).claim.claim_id
    claim_id = arm(arbiter, request()).claim.claim_id

    refusal = arm_failed(arbiter, ArmFailed(LATE_NS, claim_id, errno.ENOSPC, None, 800), GDB)

    ours, theirs = refusal.error.holders
    assert (ours.pid, ours.claim_ids) == (BOB.pid, (known,))
    assert theirs == GDB


def test_a_claim_that_is_looked_into_holds_up_nobody_and_is_nobodys_to_release() -> None:
    # given a claim for which somebody looks, with a number that is known from the books alone
    arbiter = new_arbiter()
    claim_id = arm(arbiter, request()).claim.claim_id
    arbiter.step(ArmFailed(LATE_NS, claim_id, errno.ENOSPC, None, 800))

    # when its owner wants to release it, then there is nothing to release yet
    assert isinstance(refused(arbiter.step(release(claim_id, ANN))).error, NoSuchClaim)

    # and others are served meanwhile
    granted(arbiter, request(BOB, pieces=SLOTS))
    arm_failed_later = refused(arbiter.step(ForeignFound(LATE_NS, claim_id, ())))
    assert (arm_failed_later.to, arm_failed_later.request_id) == (ANN, 70)


@pytest.mark.parametrize("ending", ["session", "stopping"])
def test_who_is_gone_before_the_look_ends_is_told_nothing(ending: str) -> None:
    # given a claim for which somebody looks
    arbiter = new_arbiter()
    claim_id = arm(arbiter, request()).claim.claim_id
    arbiter.step(ArmFailed(LATE_NS, claim_id, errno.ENOSPC, None, 800))

    # when its session ends, or the daemon does, then there is nothing to disarm and it is out of the books
    event = SessionEnded(LATE_NS, ANN.session_id, "gone") if ending == "session" else Stopping(LATE_NS, "stop")
    assert arbiter.step(event) == []
    assert arbiter.books.dump() == new_arbiter().books.dump()
    record = arbiter.record(claim_id)
    assert record is not None
    assert record.state is State.REFUSED

    # and what the look finds is told to nobody
    assert arbiter.step(ForeignFound(LATE_NS, claim_id, (GDB,))) == []


def test_what_is_found_for_a_claim_that_never_was_is_told_to_nobody() -> None:
    arbiter = new_arbiter()

    assert arbiter.step(ForeignFound(LATE_NS, 12345, (GDB,))) == []


def test_the_daemons_own_reason_for_undoing_a_claim_is_what_its_owner_hears() -> None:
    arbiter = new_arbiter()
    claim_id = arm(arbiter, request()).claim.claim_id

    refusal = arm_failed(
        arbiter, ArmFailed(LATE_NS, claim_id, errno.EPERM, None, None, sentence="tid 800 runs passwd now")
    )

    assert isinstance(refusal.error, NotPermitted)
    assert str(refusal.error) == "tid 800 runs passwd now"


def test_a_process_with_too_many_threads_is_refused_with_the_number_and_another_way() -> None:
    arbiter = new_arbiter()
    claim_id = arm(arbiter, request(target=P0, pieces=2)).claim.claim_id

    refusal = arm_failed(
        arbiter, ArmFailed(LATE_NS, claim_id, errno.EMFILE, None, 800, needed=3000, allowed=500)
    )

    assert isinstance(refusal.error, NoResources)
    assert "takes 6000 descriptors" in str(refusal.error)
    assert "may open 500 more" in str(refusal.error)
    assert "filtered by process" in str(refusal.error)


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
    arm_failed(arbiter, ArmFailed(LATE_NS, armed.claim.claim_id, errno.ENOSPC, None, 800))
    assert arbiter.books.dump() == before

    # and when they are granted, each has its route, and each goes at the end
    armed = arm(arbiter, request(pieces=2))
    ids = [resource.resource_id for resource in armed.resources]
    routes = arbiter.step(Armed(LATE_NS, armed.claim.claim_id))
    assert [effect.resource_id for effect in routes if isinstance(effect, Route)] == ids
    assert arbiter.step(release(armed.claim.claim_id, ANN)) == [Disarm(armed.claim.claim_id, tuple(ids))]
    ended = arbiter.step(Disarmed(LATE_NS, armed.claim.claim_id, Totals()))
    unroutes = [Unroute(resource_id, armed.claim.claim_id) for resource_id in ids]
    unroutes = [Unroute(resource_id, armed.claim.claim_id) for resource_id in ids]
    assert [effect for effect in ended if isinstance(effect, Unroute)] == unroutes
    assert arbiter.books.dump() == before


def test_an_answer_that_nobody_waits_for_is_our_own_mistake() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request()).claim.claim_id

    with pytest.raises(AssertionError, match="armed cannot take the step"):
        arbiter.step(Armed(LATE_NS, claim_id))


# --- its end ---------------------------------------------------------------------------------------------------------


def test_a_slot_counts_until_the_machine_has_given_it_back() -> None:
    # given a granted claim
    arbiter = new_arbiter()
    armed = granted(arbiter, request())
    claim = arbiter.books.claims[armed.claim.claim_id].claim
    (resource,) = armed.resources

    # when its owner releases it, the machine is asked first
    assert arbiter.step(release(armed.claim.claim_id, ANN, request_id=88)) == [
        Disarm(armed.claim.claim_id, (resource.resource_id,))
    ]
    assert arbiter.books.pools[Pool.ANY].held_by_task(strategies.task(0), 0) == 1
    assert arbiter.books.claims[armed.claim.claim_id].state is State.RELEASING

    # then its answer frees the slot and is told with the final counts
    totals = Totals(hits=12, lost=5)
    assert arbiter.step(Disarmed(LATE_NS, armed.claim.claim_id, totals)) == [
        Unroute(resource.resource_id, armed.claim.claim_id),
        Ended(claim, End.RELEASED, "released by its owner", totals, ANN, 88),
    ]
    assert arbiter.books.dump() == new_arbiter().books.dump()
    record = arbiter.record(armed.claim.claim_id)
    assert record is not None
    assert (record.state, record.resource_ids) == (State.RELEASED, ())
    assert (record.hits, record.lost) == (12, 5)


def test_an_operator_ends_the_claims_of_others_and_says_who_it_was() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request(ANN)).claim.claim_id

    arbiter.step(release(claim_id, BOB, operator=True, request_id=88))
    ended = arbiter.step(Disarmed(LATE_NS, claim_id, Totals()))[-1]

    assert isinstance(ended, Ended)
    assert (ended.claim.owner, ended.how, ended.asked_by, ended.request_id) == (ANN, End.FORCED, BOB, 88)
    assert ended.sentence == f"released by {BOB}, uid {BOB.uid}"


def test_an_operators_own_claim_is_released_and_not_forced() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request(ANN)).claim.claim_id

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
    claim_id = granted(arbiter, request(ANN)).claim.claim_id
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
    claim_id = granted(arbiter, request()).claim.claim_id
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
    assert effects == [Disarm(gone.claim.claim_id, (gone.resources[0].resource_id,)) for gone in (first, second)]
    for gone in (first, second):
        ended = arbiter.step(Disarmed(LATE_NS, gone.claim.claim_id, Totals()))[-1]
        assert isinstance(ended, Ended)
        assert (ended.how, ended.sentence) == (End.SESSION, "its process ended")
        assert (ended.asked_by, ended.request_id) == (None, 0)
    assert list(arbiter.books.claims) == [other.claim.claim_id]
    assert ANN.session_id not in arbiter.books.sessions

    # and a session without claims ends without effects
    assert arbiter.step(SessionEnded(LATE_NS, ANN.session_id, "again")) == []


@pytest.mark.parametrize(
    ("target", "execed", "how", "sentence"),
    [
        (T0, False, End.EXIT, "tid 800 has exited"),
        (T0, True, End.EXEC, "tid 800 runs another program now"),
        (P0, False, End.EXIT, "pid 800 has exited"),
        (P0, True, End.EXEC, "pid 800 runs another program now"),
    ],
)
def test_a_claim_ends_with_its_target_and_says_how_that_ended(
    target: Target, execed: bool, how: End, sentence: str
) -> None:
    arbiter = new_arbiter()
    armed = granted(arbiter, request(target=target))
    (resource,) = armed.resources

    assert arbiter.step(TargetEnded(LATE_NS, resource.resource_id, execed)) == [
        Disarm(armed.claim.claim_id, (resource.resource_id,))
    ]

    ended = arbiter.step(Disarmed(LATE_NS, armed.claim.claim_id, Totals(hits=3)))[-1]
    assert ended == Ended(armed.claim, how, sentence, Totals(hits=3))


def test_a_claim_ends_with_its_thread_once_however_many_slots_tell_of_it() -> None:
    # given a claim of two slots on one thread, and one on another
    arbiter = new_arbiter()
    armed = granted(arbiter, request(pieces=2))
    other = granted(arbiter, request(BOB, T1))
    first, second = (resource.resource_id for resource in armed.resources)

    # when both slots tell that the thread is gone
    told_first = arbiter.step(TargetEnded(LATE_NS, first, execed=False))
    told_again = arbiter.step(TargetEnded(LATE_NS, second, execed=False))

    # then the claim is released once, and the other stays
    assert told_first == [Disarm(armed.claim.claim_id, (first, second))]
    assert told_again == []
    ended = arbiter.step(Disarmed(LATE_NS, armed.claim.claim_id, Totals()))[-1]
    assert isinstance(ended, Ended)
    assert (ended.how, ended.sentence, ended.asked_by) == (End.EXIT, "tid 800 has exited", None)
    assert list(arbiter.books.claims) == [other.claim.claim_id]

    # and a slot that is free again tells nothing
    assert arbiter.step(TargetEnded(LATE_NS, first, execed=False)) == []


def test_stopping_ends_every_claim_of_everybody() -> None:
    arbiter = new_arbiter()
    claims = [granted(arbiter, request(owner)).claim.claim_id for owner in (ANN, BOB, ANN)]

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
    record = arbiter.books.claims[armed.claim.claim_id]
    assert (record.hits, record.lost) == (10, 3)
    assert arbiter.books.claims[other.claim.claim_id].hits == 0
    assert effects == [[], []]
    assert arbiter.step(HitsCounted(LATE_NS, 12345, 1, 1)) == []


def test_the_story_of_a_claim_tells_its_life_in_order_with_its_times() -> None:
    arbiter = new_arbiter()
    claim_id = granted(arbiter, request()).claim.claim_id
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
    going_on = granted(arbiter, request()).claim.claim_id
    assert arbiter.record(going_on) is arbiter.books.claims[going_on], "a claim that is not over has a story, too"


@pytest.mark.parametrize(
    ("user", "kernel", "modifier"), [(True, True, ""), (True, False, ":u"), (False, True, ":k"), (False, False, "")]
)
def test_a_claim_is_described_as_perf_writes_it(user: bool, kernel: bool, modifier: str) -> None:
    claim = strategies.claim(1, ANN, Target(strategies.task(0), (0, 1)), Kind.KVM)
    mode = Mode(user=user, kernel=kernel)

    described = describe(type(claim)(1, ANN, Kind.KVM, claim.span, Access.WRITE, mode, claim.target, "", 0))

    assert described == f"mem:0x1000/8:w{modifier} for tid 800 on cpu 0-1 as kvm"
