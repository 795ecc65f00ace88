"""Steps that tests of the arbiter share: a request, its grant, its refusal and its release, for two owners."""

from __future__ import annotations

import errno
import itertools

from hwbpd.core import invariants
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Arm, Attend, Attribute, Change, Disarm, Effect, Refuse, Suspend, Tell
from hwbpd.core.errors import Holder
from hwbpd.core.events import (
    AnyEvent,
    Armed,
    ArmFailed,
    ClaimRequested,
    Disarmed,
    ForeignFound,
    ReleaseRequested,
    Suspended,
)
from hwbpd.core.model import Access, ArmedBy, Delivery, Kind, Mode, Owner, Plan, Pool, Span, Target, Totals
from hwbpd.core.policy import Policy
from tests import strategies

T0, T1 = Target(strategies.task(0)), Target(strategies.task(1))
P0 = Target(process=strategies.task(0).process)  # both of them
ANN, BOB = strategies.owner(0), strategies.owner(1)
SLOTS = 4
LATE_NS = 9_000_000_000
numbers = itertools.count()


def new_arbiter(rearm_after_ns: int = 0, policy: Policy | None = None) -> Arbiter:
    return Arbiter({Pool.ANY: SLOTS}, (0, 1), (0, 1), rearm_after_ns, policy)


def request(
    owner: Owner = ANN,
    target: Target = T0,
    pieces: int = 1,
    request_id: int = 70,
    guard_per_s: int = 0,
    *,
    kind: Kind = Kind.PERF,
    wait_until_ns: int = 0,
    privileged: bool = False,
    at: int | None = None,
    armed_by: ArmedBy = ArmedBy.DAEMON,
    placeholder: bool = True,
    now_ns: int = 1_000_000_000,
) -> ClaimRequested:
    """:param at: the number of its first piece; requests of the same share. None: each has addresses of its own."""
    first = next(numbers) if at is None else at
    plan = Plan(tuple(strategies.piece(Pool.ANY, next(numbers) if n else first) for n in range(pieces)))
    span = Span(0x1000, 8)
    mode = Mode(delivery=Delivery.HOLD) if armed_by is ArmedBy.TRACER else Mode()
    return ClaimRequested(
        now_ns,
        owner,
        request_id,
        kind,
        span,
        Access.WRITE,
        mode,
        target,
        "",
        plan,
        guard_per_s,
        privileged,
        wait_until_ns=wait_until_ns,
        armed_by=armed_by,
        placeholder=placeholder,
    )


def arm(arbiter: Arbiter, event: ClaimRequested) -> Arm:
    """Step a request that fits; return what is to be armed for it."""
    (effect,) = arbiter.step(event)
    assert isinstance(effect, Arm)
    return effect


def granted(arbiter: Arbiter, event: ClaimRequested) -> Arm:
    """Bring a request to its grant; return what was armed for it."""
    effect = arm(arbiter, event)
    arbiter.step(Armed(LATE_NS, effect.claim.claim_id))
    return effect


def refused(effects: list[Effect]) -> Refuse:
    (effect,) = (effect for effect in effects if not is_contended(effect))
    assert isinstance(effect, Refuse)
    return effect


def is_contended(effect: Effect) -> bool:
    """Whether somebody in the way is told that he is."""
    return isinstance(effect, Tell) and effect.change is Change.CONTENDED


def arm_failed(arbiter: Arbiter, event: ArmFailed, *found: Holder) -> Refuse:
    """Let the machine refuse a claim, and a look find these holders; return what the owner is told."""
    effects = arbiter.step(event)
    if event.errno == errno.ENOSPC:
        (attribute,) = effects
        assert isinstance(attribute, Attribute)
        effects = arbiter.step(ForeignFound(LATE_NS, attribute.claim_id, found))
    return refused(effects)


def release(claim_id: int, by: Owner, *, operator: bool = False, request_id: int = 71) -> ReleaseRequested:
    return ReleaseRequested(LATE_NS, by, request_id, claim_id, operator)


def run(arbiter: Arbiter, event: AnyEvent) -> list[Effect]:
    """Step an event on a machine that does whatever it is told; return every effect, in order."""
    todo: list[AnyEvent] = [event]
    effects: list[Effect] = []
    while todo:
        for effect in arbiter.step(todo.pop(0)):
            effects.append(effect)
            match effect:
                case Arm() | Attend():
                    todo.append(Armed(event.now_ns, effect.claim.claim_id))
                case Disarm():
                    todo.append(Disarmed(event.now_ns, effect.claim_id, Totals()))
                case Suspend():
                    todo.append(Suspended(event.now_ns, effect.claim_id))
    invariants.check(arbiter.books)
    invariants.nothing_is_waiting(arbiter.books)
    invariants.who_waits_is_queued(arbiter.books, arbiter.queue)
    return effects


def states(arbiter: Arbiter) -> dict[int, str]:
    """Where every claim stands that is not over."""
    return {claim_id: str(record.state) for claim_id, record in arbiter.books.claims.items()}
