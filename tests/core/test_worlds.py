"""
Worlds of vCPUs in the arbiter: none competes with another or with the host, and within one everything is decided as on
a machine that has one CPU.

The judge is the arbiter itself: what one with many worlds decides in each of them is what another decides that has
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Disarm, Effect, End, Ended, Grant, Queued, Refuse, Suspend, Tell
from hwbpd.core.errors import NoFreeSlot, TargetGone
from hwbpd.core.events import (
    AnyEvent,
    NotLoaded,
    ReleaseRequested,
    SessionEnded,
    Tick,
    VcpuCame,
    VcpuWent,
    YieldRequested,
)
from hwbpd.core.model import Kind, Owner, Pool, Target, Vcpu
from hwbpd.core.policy import Policy
from tests import strategies
from tests.core.steps import ANN, BOB, LATE_NS, SLOTS, T0, T1, new_arbiter, release, request, run, states

NOW_NS = 1_000_000_000
FIRST, SECOND = Vcpu(1, strategies.task(0)), Vcpu(2, strategies.task(1))
ON_FIRST, ON_SECOND, EVERYWHERE = Target(vcpu=FIRST), Target(vcpu=SECOND), Target()
TWO = {Pool.ANY: 2}
RESERVE = Policy(reserve_slots=1)


def came(vcpu: Vcpu, slots: int = 2) -> VcpuCame:
    return VcpuCame(NOW_NS, vcpu, {Pool.ANY: slots})


def with_worlds(policy: Policy | None = None) -> Arbiter:
    arbiter = new_arbiter(policy=policy)
    for vcpu in (FIRST, SECOND):
        assert run(arbiter, came(vcpu)) == []
    return arbiter


def is_granted(effects: Iterable[Effect]) -> bool:
    return any(isinstance(effect, Grant) for effect in effects)


# --- by example ------------------------------------------------------------------------------------------------------


def test_a_full_world_refuses_and_the_others_have_room() -> None:
    # given a vCPU that is full, of two
    arbiter = with_worlds()
    for _ in range(2):
        assert is_granted(run(arbiter, request(target=ON_FIRST)))

    # when one more is wanted there, then it is refused by those who hold it
    refusals = [effect for effect in run(arbiter, request(BOB, ON_FIRST)) if isinstance(effect, Refuse)]
    (refused,) = refusals
    assert isinstance(refused.error, NoFreeSlot)
    assert str(refused.error).startswith("no slot on vcpu 1: 2 of 2 held (")
    assert [holder.place for holder in refused.error.holders] == ["on vcpu 1"]

    # and elsewhere there is all the room there was
    for target, slots in ((ON_SECOND, 2), (T0, SLOTS)):
        assert all(is_granted(run(arbiter, request(target=target))) for _ in range(slots))


def test_no_slot_of_a_vcpu_is_kept_free_for_others() -> None:
    # given a reserve, when a vCPU is filled, then every slot of it can be had, and of the host's one is left
    arbiter = with_worlds(RESERVE)
    assert [is_granted(run(arbiter, request(target=ON_FIRST))) for _ in range(3)] == [True, True, False]
    assert [is_granted(run(arbiter, request(target=EVERYWHERE))) for _ in range(4)] == [True, True, True, False]


def test_who_waits_for_a_vcpu_holds_up_nobody_elsewhere() -> None:
    # given a claim of the highest rank that waits for a vCPU
    arbiter = with_worlds()
    run(arbiter, request(ANN, ON_FIRST, pieces=2, kind=Kind.KGDB))
    effects = run(arbiter, request(BOB, ON_FIRST, pieces=2, kind=Kind.KGDB, wait_until_ns=LATE_NS))
    assert any(isinstance(effect, Queued) for effect in effects)

    # when claims of the lowest come for the host and another vCPU, then they are granted
    for target in (EVERYWHERE, T0, ON_SECOND):
        assert is_granted(run(arbiter, request(target=target, kind=Kind.BACKGROUND)))

    # and when one of the same rank comes for that vCPU, it stands behind
    effects = run(arbiter, request(ANN, ON_FIRST, kind=Kind.KGDB, wait_until_ns=LATE_NS))
    assert [effect.position for effect in effects if isinstance(effect, Queued)] == [2]


def test_who_waits_for_a_vcpu_is_not_looked_at_for_whole_cpus_either() -> None:
    # given claims that wait for a vCPU and for a thread, and a host with one slot left on every other thread
    arbiter = with_worlds()
    for target in (ON_FIRST, T0):
        run(arbiter, request(ANN, target, pieces=2))
        run(arbiter, request(ANN, target, pieces=2))
    run(arbiter, request(BOB, ON_FIRST, pieces=2, kind=Kind.PTRACE, wait_until_ns=LATE_NS))
    run(arbiter, request(ANN, T1, pieces=3))
    run(arbiter, request(BOB, T1, pieces=2, kind=Kind.BACKGROUND, wait_until_ns=LATE_NS))
    run(arbiter, ReleaseRequested(LATE_NS, ANN, 81, 3, False))
    run(arbiter, ReleaseRequested(LATE_NS, ANN, 82, 4, False))

    # when one for whole CPUs comes that stands before the thread's and behind the vCPU's, then it has its slot
    assert is_granted(run(arbiter, request(target=EVERYWHERE)))


def test_only_claims_on_the_same_vcpu_are_displaced() -> None:
    # given background claims in every world, the host full
    arbiter = with_worlds()
    for target, slots in ((ON_FIRST, 2), (ON_SECOND, 2), (EVERYWHERE, SLOTS)):
        run(arbiter, request(target=target, pieces=slots, kind=Kind.BACKGROUND))
    before = states(arbiter)

    # when a debugger wants a slot of one vCPU, then that one's claim gives way
    effects = run(arbiter, request(ANN, ON_FIRST, kind=Kind.PTRACE))
    assert [effect.claim.target for effect in effects if isinstance(effect, Tell)] == [ON_FIRST]
    run(arbiter, YieldRequested(LATE_NS, ANN, 80, 1))
    assert states(arbiter) == before | {1: "suspended", 4: "armed"}

    # and is back when the debugger is done
    run(arbiter, release(4, ANN))
    assert states(arbiter) == before


def test_a_vcpu_that_ends_takes_its_claims_with_it_and_no_others() -> None:
    # given a vCPU with claims that hold, one shared, one that displaces and one that waits, and claims elsewhere
    arbiter = with_worlds()
    run(arbiter, request(ANN, ON_FIRST, at=7))
    run(arbiter, request(BOB, ON_FIRST, at=7))
    run(arbiter, request(ANN, ON_FIRST, kind=Kind.BACKGROUND))
    run(arbiter, request(BOB, ON_FIRST, kind=Kind.BACKGROUND, wait_until_ns=LATE_NS))
    run(arbiter, request(ANN, ON_FIRST, kind=Kind.PTRACE, pieces=2, wait_until_ns=LATE_NS))
    here = set(states(arbiter))
    run(arbiter, request(BOB, ON_SECOND))
    run(arbiter, request(BOB, T0))
    elsewhere = {claim_id: state for claim_id, state in states(arbiter).items() if claim_id not in here}

    # when it ends
    effects = run(arbiter, VcpuWent(LATE_NS, FIRST, "tid 800 has ended"))

    # then each of them ends once, nobody is granted anything, and the world is gone
    ended = [effect for effect in effects if isinstance(effect, Ended)]
    assert sorted(effect.claim.claim_id for effect in ended) == sorted(here)
    assert {(effect.how, effect.sentence) for effect in ended} == {(End.EXIT, "vcpu 1 is over: tid 800 has ended")}
    assert not is_granted(effects)
    assert states(arbiter) == elsewhere
    assert set(arbiter.books.vcpus) == {SECOND}

    # and who comes too late hears that it is over, whether it would wait or not
    (late,) = run(arbiter, request(ANN, ON_FIRST, wait_until_ns=2 * LATE_NS))
    assert isinstance(late, Refuse)
    assert isinstance(late.error, TargetGone)


@pytest.mark.parametrize("shared", [False, True])
def test_what_cannot_be_loaded_ends_for_all_who_have_it(shared: bool) -> None:
    arbiter = with_worlds()
    run(arbiter, request(ANN, ON_FIRST, at=3))
    run(arbiter, request(BOB, ON_FIRST, at=3 if shared else 4))

    effects = run(arbiter, NotLoaded(LATE_NS, 1, 22))

    ended = {effect.claim.claim_id: effect.how for effect in effects if isinstance(effect, Ended)}
    assert ended == dict.fromkeys([1, 2] if shared else [1], End.REFUSED)
    assert states(arbiter) == ({} if shared else {2: "armed"})
    # and a word about what is held no more is a word about nothing
    assert run(arbiter, NotLoaded(LATE_NS, 1, 22)) == []


# --- against arbiters that have one world each -----------------------------------------------------------------------


class Ask(NamedTuple):
    """Claim in one of the worlds."""

    world: int  # 0: the host
    target: Target
    owner: Owner
    kind: Kind
    pieces: int
    at: int | None
    waits: bool


class Act(NamedTuple):
    """Something about the ``nth`` of all claims that were ever made, or time that passes, or a session that ends."""

    what: str
    nth: int


PLACES = ((0, EVERYWHERE), (0, T0), (1, ON_FIRST), (2, ON_SECOND))
ASKS = st.builds(
    lambda place, *rest: Ask(*place, *rest),
    st.sampled_from(PLACES),
    st.sampled_from([ANN, BOB]),
    st.sampled_from([Kind.PTRACE, Kind.PERF, Kind.BACKGROUND]),
    st.integers(1, 2),
    st.none() | st.integers(10_000, 10_001),
    st.booleans(),
)
DEEDS = ("release", "yield", "tick", "session", "went", "not loaded")
ACTS = st.builds(Act, st.sampled_from(DEEDS), st.integers(0, 20))


class Together:
    """One arbiter with three worlds, and three arbiters with one each, to which the same happens."""

    def __init__(self) -> None:
        self.whole = with_worlds()
        self.alone = [new_arbiter(), new_arbiter(), new_arbiter()]
        run(self.alone[1], came(FIRST))
        run(self.alone[2], came(SECOND))
        self.now_ns = NOW_NS
        self.here: list[tuple[int, int]] = []  # per claim of the whole: its world, and its id there
        self.gone: set[int] = set()

    def ask(self, ask: Ask) -> None:
        event = request(
            ask.owner, ask.target, ask.pieces, kind=ask.kind, at=ask.at, now_ns=self.now_ns,
            wait_until_ns=self.now_ns + 1000 if ask.waits else 0,
        )  # fmt: skip
        alone = self.alone[ask.world]
        mine = alone._last_claim_id + 1
        self.here.append((ask.world, mine))
        self.same(event, [(ask.world, event)])

    def act(self, act: Act) -> None:
        self.now_ns += 100
        if act.what == "tick":
            self.now_ns += 1000
            self.same(Tick(self.now_ns), [(world, Tick(self.now_ns)) for world in range(3)])
        elif act.what == "session":
            ended = SessionEnded(self.now_ns, (ANN, BOB)[act.nth % 2].session_id, "it ended")
            self.same(ended, [(world, ended) for world in range(3)])
        elif act.what == "went":
            world = 1 + act.nth % 2
            if world not in self.gone:
                self.gone.add(world)
                went = VcpuWent(self.now_ns, (FIRST, SECOND)[world - 1], "it ended")
                self.same(went, [(world, went)])
        elif self.here:
            whole_id = 1 + act.nth % len(self.here)
            world, own_id = self.here[whole_id - 1]
            if act.what == "not loaded":
                self.not_loaded(whole_id, world, own_id)
                return
            record = self.whole.record(whole_id)
            by = ANN if record is None else record.claim.owner

            def event(claim_id: int) -> AnyEvent:
                if act.what == "yield":
                    return YieldRequested(self.now_ns, by, 90, claim_id)
                return ReleaseRequested(self.now_ns, by, 90, claim_id, False)

            self.same(event(whole_id), [(world, event(own_id))])

    def not_loaded(self, whole_id: int, world: int, own_id: int) -> None:
        records = self.whole.books.claims.get(whole_id), self.alone[world].books.claims.get(own_id)
        if world and records[0] is not None and records[1] is not None and records[0].resource_ids:
            first, second = (NotLoaded(self.now_ns, record.resource_ids[0], 22) for record in records if record)
            self.same(first, [(world, second)])

    def same(self, event: AnyEvent, alone: list[tuple[int, AnyEvent]]) -> None:
        """Let it happen in both; in each world the same follows, in the same order."""
        together = run(self.whole, event)
        for world in range(3):
            apart = [effect for at, one in alone if at == world for effect in run(self.alone[world], one)]
            assert [told for whose, told in map(self._told, together) if whose == world] == [
                told for _, told in (self._told(effect, world) for effect in apart) if told[1]
            ]
        for whole_id, (world, own_id) in enumerate(self.here, start=1):
            ours, theirs = self.whole.record(whole_id), self.alone[world].record(own_id)
            assert ours is not None
            assert theirs is not None
            assert ours.state == theirs.state, (whole_id, ours.state, theirs.state)

    def _told(self, effect: Effect, world: int | None = None) -> tuple[int | None, tuple[str, int]]:
        """Whose an effect is, and what it is about which claim, by the whole's number."""
        claim_id = getattr(effect, "claim_id", 0) or getattr(getattr(effect, "claim", None), "claim_id", 0)
        what = type(effect).__name__ + str(getattr(effect, "change", "")) + str(getattr(effect, "how", ""))
        if not claim_id:  # a refusal of something about a claim that is over
            return world, (what, 0)
        if world is not None:
            claim_id = 1 + self.here.index((world, claim_id))
        return self.here[claim_id - 1][0], (what, claim_id)


@given(st.lists(ASKS | ASKS | ACTS, max_size=25))
def test_in_each_world_it_is_as_if_there_were_no_other(history: list[Ask | Act]) -> None:
    together = Together()
    for step in history:
        if isinstance(step, Act):
            together.act(step)
        elif step.world not in together.gone:
            together.ask(step)


def test_the_comparison_sees_worlds_that_compete() -> None:
    # given a comparison in which one world has a slot less than it should
    together = Together()
    together.alone[1] = new_arbiter()
    run(together.alone[1], came(FIRST, slots=1))

    # when it is filled, then the difference shows
    one_slot = Ask(1, ON_FIRST, ANN, Kind.PERF, 1, None, False)
    together.ask(one_slot)
    with pytest.raises(AssertionError):
        together.ask(one_slot)
    assert any(isinstance(effect, Disarm | Suspend) for effect in run(together.whole, VcpuWent(LATE_NS, FIRST, "over")))
