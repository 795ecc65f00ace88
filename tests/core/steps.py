"""Steps that tests of the arbiter share: a request, its grant, its refusal and its release, for two owners."""

from __future__ import annotations

import errno

from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Arm, Attribute, Effect, Refuse
from hwbpd.core.errors import Holder
from hwbpd.core.events import Armed, ArmFailed, ClaimRequested, ForeignFound, ReleaseRequested
from hwbpd.core.model import Access, Kind, Mode, Owner, Plan, Pool, Span, Target
from tests import strategies

T0, T1 = Target(strategies.task(0)), Target(strategies.task(1))
P0 = Target(process=strategies.task(0).process)  # both of them
ANN, BOB = strategies.owner(0), strategies.owner(1)
SLOTS = 4
LATE_NS = 9_000_000_000


def new_arbiter(rearm_after_ns: int = 0) -> Arbiter:
    return Arbiter({Pool.ANY: SLOTS}, (0, 1), (0, 1), rearm_after_ns)


def request(
    owner: Owner = ANN, target: Target = T0, pieces: int = 1, request_id: int = 70, guard_per_s: int = 0
) -> ClaimRequested:
    plan = Plan(tuple(strategies.piece(Pool.ANY, number) for number in range(pieces)))
    span, mode = Span(0x1000, 8), Mode()
    return ClaimRequested(
        1_000_000_000, owner, request_id, Kind.PERF, span, Access.WRITE, mode, target, "", plan, guard_per_s
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
    (effect,) = effects
    assert isinstance(effect, Refuse)
    return effect


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
