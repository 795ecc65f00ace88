"""
The arbiter through random histories, with ``slow_model`` as its machine.

Claims of threads, processes and CPUs come and go, and so do CPUs; the machine refuses what should fit, floods silence,
looks at others end late or never. After each event the invariants hold; after each operation the books count what the
slow model holds, CPU by CPU; and every answer is the one that the slow model gives.
"""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core import invariants
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import (
    AddLeg,
    Arm,
    Attribute,
    Disarm,
    DropLeg,
    Effect,
    Ended,
    Grant,
    Rearm,
    RearmDone,
    Refuse,
    Silence,
    TopUp,
)
from hwbpd.core.errors import CpuOffline, Holder, NoFreeSlot
from hwbpd.core.events import (
    AnyEvent,
    Armed,
    ArmFailed,
    ClaimRequested,
    CpuCameOnline,
    CpuWentOffline,
    Disarmed,
    ForeignFound,
    FuseBlown,
    HitsCounted,
    LegRefused,
    LegTaken,
    Rearmed,
    RearmFailed,
    RearmRequested,
    ReleaseRequested,
    SessionEnded,
    TargetEnded,
    Tick,
)
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Access, Kind, Mode, Owner, Piece, Plan, Process, Span, Target, Totals
from tests import strategies
from tests.core.steps import ANN, refused
from tests.slow_model import Answer, Event, SlowBooks, cpu_wide, of_busiest
from tests.strategies import World

STEP_NS = 1_000
REARM_AFTER_NS = 7 * STEP_NS
GUARD_PER_S = 20


class Ask(NamedTuple):
    """Ask for slots; the machine answers with ``refusal``, or arms them where that is 0."""

    owner: Owner
    target: Target
    plan: Plan
    guard_per_s: int
    refusal: int


class Happens(NamedTuple):
    """
    Something else: to claim ``nth``, or to the ``nth`` resource or CPU, modulo how many there are.

    What the machine is asked to take for it, it takes, unless it ``refuses``.
    """

    what: str
    nth: int
    owner: Owner
    refuses: bool


History = tuple[World, list[Ask | Happens]]


@st.composite
def histories(draw: st.DrawFn) -> History:
    world = draw(strategies.worlds())
    refusals = st.sampled_from([0, 0, 0, 0, 0, errno.ENOSPC, errno.ESRCH, errno.EMFILE])
    targets = strategies.targets(world, stray=True)
    guards = st.sampled_from([0, GUARD_PER_S])
    asks = st.builds(Ask, strategies.owners, targets, strategies.plans(world), guards, refusals)
    whats = st.sampled_from(
        ["release", "force", "session", "exit", "exec", "hits", "hits", "fuse", "rearm", "cpu", "cpu", "cpu", "found"]
    )
    refuses = st.sampled_from([False, False, True])
    others = st.builds(Happens, whats, st.integers(0, 63), strategies.owners, refuses)
    length = draw(st.integers(0, 40))
    return world, draw(st.lists(st.one_of(asks, others), min_size=length, max_size=length))


class Shell:
    """An arbiter, a machine that counts slowly, and everything that was said between them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.arbiter = Arbiter(world.slots, world.possible, world.online, REARM_AFTER_NS, slots_on=world.slots_on)
        self.slow = SlowBooks(world.slots, world.possible, world.online, world.slots_on)
        self.events: list[AnyEvent] = []
        self.effects: list[list[Effect]] = []  # of each event
        self.looking: list[int] = []  # claims for which somebody looks who is in the way
        self.told_to_nobody: set[int] = set()  # requests of sessions that ended before the look did
        self.now_ns = 0

    def do(self, operation: Ask | Happens) -> None:
        """Let one thing happen, and all that comes of it."""
        self.now_ns += STEP_NS
        event = self.event_of(operation)
        if event is not None:
            self.feed(event, operation)
        deadline_ns = self.arbiter.next_deadline_ns()
        if deadline_ns is not None and deadline_ns <= self.now_ns:
            self.feed(Tick(self.now_ns), operation)
            assert (self.arbiter.next_deadline_ns() or self.now_ns + 1) > self.now_ns
        self.compare()

    def feed(self, event: AnyEvent, operation: Ask | Happens) -> None:
        pending = [event]
        while pending:
            event = pending.pop(0)
            expected = self.expected(event)
            effects = self.arbiter.step(event)
            assert expected is None or [plain(effect) for effect in effects if isinstance(effect, AddLeg)] == expected
            self.events.append(event)
            self.effects.append(effects)
            invariants.check(self.arbiter.books)
            for effect in effects:
                outcome = self.carry_out(effect, operation)
                if outcome is not None:
                    pending.append(outcome)
        invariants.nothing_is_waiting(self.arbiter.books)

    def event_of(self, operation: Ask | Happens) -> AnyEvent | None:
        """The event that an operation is, in the state that all is in; None where it has no object."""
        now_ns, books = self.now_ns, self.arbiter.books
        if isinstance(operation, Ask):
            owner, target, plan, guard_per_s, _ = operation
            return claim_requested(now_ns, owner, target, plan, guard_per_s)
        what, nth, owner, _ = operation
        resource_id = list(books.resources)[nth % len(books.resources)] if books.resources else 0
        match what:
            case "session":
                of_session = [books.claims[claim_id] for claim_id in books.sessions.get(owner.session_id, ())]
                attributing = [one.claim.requested_ns for one in of_session if one.state is State.ATTRIBUTING]
                self.told_to_nobody.update(attributing)
                return SessionEnded(now_ns, owner.session_id, "its process ended")
            case "cpu":
                return self.cpu_event(self.world.possible[nth % len(self.world.possible)])
            case "found":
                if not self.looking:
                    return None
                holders = (Holder(7, "gdb", 0, "", 1, "somewhere", evidence="traces it"),) * (nth % 2)
                return ForeignFound(now_ns, self.looking.pop(nth % len(self.looking)), holders)
            case "rearm":
                return RearmRequested(now_ns, owner, now_ns, nth % 32, operator=nth >= 32)
            case "release" | "force":
                return ReleaseRequested(now_ns, owner, now_ns, nth, operator=what == "force")
        if not resource_id:
            return None
        match what:
            case "hits":
                return HitsCounted(now_ns, resource_id, nth, nth % 3)
            case "fuse":
                (rider,) = books.riders[resource_id]
                return FuseBlown(now_ns, resource_id) if books.claims[rider.claim_id].guard_per_s else None
        return TargetEnded(now_ns, resource_id, execed=what == "exec")

    def cpu_event(self, cpu: int) -> AnyEvent | None:
        if cpu not in self.slow.online:
            self.slow.online = tuple(sorted((*self.slow.online, cpu)))
            return CpuCameOnline(self.now_ns, cpu)
        if len(self.slow.online) == 1:
            return None
        self.slow.online = tuple(other for other in self.slow.online if other != cpu)
        return CpuWentOffline(self.now_ns, cpu)

    def expected(self, event: AnyEvent) -> list[AddLeg] | None:
        """Which legs a CPU that comes must bring back: as many as fit, oldest first."""
        if not isinstance(event, CpuCameOnline):
            return None
        cpu, events, legs = event.cpu, self.slow.events(), []
        for resource_id, resource in sorted(self.arbiter.books.resources.items()):
            target, leg = resource.target, Event(None, event.cpu, resource.piece.pool)
            if target.is_cpu_wide and cpu in (target.cpus or (cpu,)) and self.slow.admits(leg, events):
                events.append(leg)
                legs.append(AddLeg(resource_id, cpu))
        return legs

    def carry_out(self, effect: Effect, operation: Ask | Happens) -> AnyEvent | None:
        """What a machine does with an effect, and says to it."""
        now_ns = self.now_ns
        refuses = isinstance(operation, Happens) and operation.refuses
        match effect:
            case Arm():
                assert isinstance(operation, Ask)
                return self.arm(effect, operation)
            case DropLeg() | AddLeg():
                return self.change_leg(effect, refuses)
            case Disarm(claim_id, resource_ids):
                for resource_id in resource_ids:
                    self.slow.give_back(resource_id)
                return Disarmed(now_ns, claim_id, Totals(hits=claim_id))
            case Attribute(claim_id):
                self.looking.append(claim_id)
            case Refuse(_, request_id, error) if isinstance(operation, Ask) and request_id == now_ns:
                if not operation.refusal:
                    answer = self.slow.ask(operation.target, operation.plan)
                    assert answer is {NoFreeSlot: Answer.FULL, CpuOffline: Answer.OFFLINE}[type(error)]
            case Rearm(claim_id):
                return RearmFailed(now_ns, claim_id, errno.ENOSPC) if refuses else Rearmed(now_ns, claim_id)
            case TopUp(resource_id):
                return FuseBlown(now_ns, resource_id) if refuses else None
            case Silence(resource_ids):
                assert set(resource_ids) <= self.slow.held.keys()
        return None

    def arm(self, effect: Arm, ask: Ask) -> Armed | ArmFailed:
        assert self.slow.ask(effect.claim.target, ask.plan) is Answer.FITS
        if ask.refusal:
            return ArmFailed(self.now_ns, effect.claim.claim_id, ask.refusal, None, None)
        for resource in effect.resources:
            self.slow.take(resource)
        return Armed(self.now_ns, effect.claim.claim_id)

    def change_leg(self, effect: DropLeg | AddLeg, refuses: bool) -> LegTaken | LegRefused | None:
        resource_id, cpu = effect.resource_id, effect.cpu
        leg = Event(None, cpu, self.arbiter.books.resources[resource_id].piece.pool)
        if isinstance(effect, DropLeg):
            self.slow.held[resource_id].remove(leg)
            return None
        if refuses:
            return LegRefused(self.now_ns, resource_id, cpu, errno.ENOSPC)
        self.slow.held[resource_id].append(leg)
        return LegTaken(self.now_ns, resource_id, cpu)

    def compare(self) -> None:
        """The books hold what the machine holds, on each CPU."""
        books, events = self.arbiter.books, self.slow.events()
        assert books.resources.keys() == self.slow.held.keys()
        assert books.online == set(self.slow.online)
        for pool, counts in books.pools.items():
            for cpu in self.world.possible:
                assert counts.held_cpu_wide(cpu) == len(books.cpu_wide_on(cpu, pool)) == cpu_wide(events, cpu, pool)
                assert counts.held_by_busiest(cpu) == of_busiest(events, cpu, pool)
            for kind in counts.kinds:
                alike = [cpu for cpu in self.world.possible if self.slow.has(cpu, pool) == kind.slots]
                most = counts.most_cpu_wide(kind)
                assert most in alike
                assert counts.held_cpu_wide(most) == max(cpu_wide(events, cpu, pool) for cpu in alike)


def claim_requested(now_ns: int, owner: Owner, target: Target, plan: Plan, guard_per_s: int = 0) -> ClaimRequested:
    """A request whose number is the time, and so are its addresses: nobody shares here."""
    pieces = tuple(
        Piece(Span(now_ns * 64 + 8 * number, 8), piece.access, piece.pool) for number, piece in enumerate(plan.pieces)
    )
    plan = Plan(pieces)
    span, mode = pieces[0].span, Mode()
    return ClaimRequested(
        now_ns, owner, now_ns, Kind.PERF, span, Access.WRITE, mode, target, "", plan, guard_per_s
    )


def play(history: History) -> Shell:
    """Let it all happen."""
    world, operations = history
    shell = Shell(world)
    for operation in operations:
        shell.do(operation)
    return shell


def plain(effect: Effect) -> Any:
    """An effect as a value that compares equal: exceptions do not."""
    if isinstance(effect, Refuse):
        error = effect.error
        return effect.to, effect.request_id, effect.claim_id, type(error), str(error), error.holders
    return effect


@given(histories())
def test_the_same_events_lead_to_the_same_effects_and_the_same_state(history: History) -> None:
    world, _ = history
    shell = play(history)

    again = Arbiter(world.slots, world.possible, world.online, REARM_AFTER_NS, slots_on=world.slots_on)
    effects_again = [again.step(event) for event in shell.events]

    assert [[plain(effect) for effect in told] for told in effects_again] == [
        [plain(effect) for effect in told] for told in shell.effects
    ]
    assert again.books.dump() == shell.arbiter.books.dump()
    assert [list(record.story.lines()) for record in again.books.ended.values()] == [
        list(record.story.lines()) for record in shell.arbiter.books.ended.values()
    ]


@given(histories())
def test_every_request_is_answered_once_and_no_id_is_used_twice(history: History) -> None:
    shell = play(history)
    books = shell.arbiter.books

    told = [effect for of_event in shell.effects for effect in of_event]
    answered = [effect.request_id for effect in told if isinstance(effect, Grant | Refuse | RearmDone)]
    answered += [effect.request_id for effect in told if isinstance(effect, Ended) and effect.asked_by is not None]
    kinds = ClaimRequested | ReleaseRequested | RearmRequested
    asked = {event.request_id for event in shell.events if isinstance(event, kinds)}
    looked_into = {one.claim.requested_ns for one in books.claims.values() if one.state is State.ATTRIBUTING}
    assert sorted(answered) == sorted(asked - looked_into - shell.told_to_nobody)

    asked_to_arm = [effect for effect in told if isinstance(effect, Arm)]
    resource_ids = [resource.resource_id for effect in asked_to_arm for resource in effect.resources]
    assert resource_ids == sorted(set(resource_ids))
    made = [event.now_ns for event in shell.events if isinstance(event, ClaimRequested)]
    claims = {**books.ended, **books.claims}
    assert {claim_id: record.claim.requested_ns for claim_id, record in claims.items()} == dict(enumerate(made, 1))
    granted_ids = {effect.claim.claim_id for effect in told if isinstance(effect, Grant)}
    ended_ids = [effect.claim.claim_id for effect in told if isinstance(effect, Ended)]
    assert granted_ids == {*ended_ids, *(set(books.claims) - set(shell.looking))}
    assert len(ended_ids) == len(set(ended_ids))


@given(histories())
def test_nothing_that_is_refused_leaves_a_trace_in_the_books(history: History) -> None:
    # given a machine in any state that a history can lead to
    world, _ = history
    shell = play(history)
    before = shell.arbiter.books.dump()

    # when everybody asks for more than there is
    most = max(world.has(cpu, pool) for pool in world.slots for cpu in world.possible) + 1
    plan = Plan(tuple(strategies.piece(next(iter(world.slots)), number) for number in range(most)))
    processes: list[Process | None] = [task.process for task in world.tasks]
    targets = [Target(), *map(Target, world.tasks), *(Target(process=process) for process in processes)]
    for number, target in enumerate(targets):
        refused(shell.arbiter.step(claim_requested(10**9 + number, ANN, target, plan)))

    # then the books are as they were
    assert shell.arbiter.books.dump() == before


@given(histories())
def test_when_everybody_has_left_the_books_are_as_new(history: History) -> None:
    world, operations = history
    shell = play(history)

    for owner in {operation.owner for operation in operations}:
        shell.do(Happens("session", 0, owner, refuses=False))
    for cpu in world.possible:
        if (cpu in shell.slow.online) != (cpu in world.online):
            shell.do(Happens("cpu", cpu, ANN, refuses=False))
    for cpu in world.possible:  # the last one online cannot leave before another has come
        if (cpu in shell.slow.online) != (cpu in world.online):
            shell.do(Happens("cpu", cpu, ANN, refuses=False))

    as_new = Arbiter(world.slots, world.possible, world.online, slots_on=world.slots_on)
    assert shell.arbiter.books.dump() == as_new.books.dump()
    assert not shell.slow.events()
