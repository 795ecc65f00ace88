"""
What becomes of a claim that wants room: the one place where the policies meet, in this order.

1. **Share.** Each piece for which an equal resource is armed rides on that; a tracer's claim for whose every piece the
   thread still has a tracer's slot reuses those. Neither takes room, so nothing is asked about them.
2. **Queue.** Nobody overtakes one who waits, of equal or higher rank, for room that the claim would take.
3. **Kernel**, and **reserve**: the rest must fit by the kernel's rule, and leave the reserve free. kgdb halts the
   machine and everybody on it, so it may have the reserve.
4. **Displace.** What does not fit may take the room of claims of strictly lower rank: of anybody's for root, of their
   own for others, as the kernel would not let them take what is another's either.
5. Otherwise it waits, or is refused; which of the two is not decided here.
"""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from hwbpd.core.admission import check_reserve, fits, full_places, never_fits
from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.errors import CpuOffline, HeldBack, Holder, HwbpError, NoFreeSlot, TargetGone
from hwbpd.core.lifecycle import ARMED_BY_US
from hwbpd.core.model import ArmedBy, Claim, Kind, Piece, Plan
from hwbpd.core.policy import Policy
from hwbpd.core.preemption import victims
from hwbpd.core.queue import Queue


class Placement(Struct, frozen=True):
    """
    What a claim gets.

    With ``refusal`` it has no room now; ``victims`` are then those who would have to give way for it, if any would do.
    ``hopeless`` refusals do not go away by waiting.
    """

    shared: tuple[int, ...] = ()  # resources to ride on
    reused: tuple[int, ...] = ()  # resources that its thread has kept
    pieces: tuple[Piece, ...] = ()  # what it takes slots for
    refusal: HwbpError | None = None
    victims: tuple[int, ...] = ()
    hopeless: bool = False


def place(books: Books, queue: Queue, claim: Claim, plan: Plan, policy: Policy) -> Placement:
    """Decide; change nothing."""
    if not books.has_world(claim.target):
        return Placement(refusal=TargetGone(f"{claim.target} is over"), hopeless=True)
    shared, reused, rest = _without_room(books, claim, plan)
    if not rest:
        return Placement(tuple(shared), tuple(reused))
    needed = Plan(tuple(rest))
    reserve = reserve_for(claim, policy)
    ahead = None
    if len(queue):
        ahead = queue.blocker(books, claim.target, needed, claim.rank, claim.claim_id, reserve)
    try:
        fits(books, claim.target, needed)
        if ahead is not None:
            raise HeldBack(_behind(ahead), (holder_of(ahead.claim),))
        check_reserve(books, claim.target, needed, reserve)
    except CpuOffline as refusal:
        return Placement(refusal=refusal, hopeless=True)
    except (NoFreeSlot, HeldBack) as refusal:
        if never_fits(books, claim.target, needed, reserve):
            return Placement(refusal=refusal, hopeless=True)
        if ahead is not None:
            return Placement(refusal=refusal)
        found = victims(books, claim.target, needed, reserve, lambda other: _may_displace(claim, other), _is_ours)
        return Placement(refusal=refusal, victims=found or ())
    return Placement(tuple(shared), tuple(reused), tuple(rest))


def may_have_room(books: Books, claim: Claim, plan: Plan, policy: Policy) -> bool:
    """
    Whether it is worth while to ``place`` a claim that waits already.

    Many wait for what one gives back, and most of them in vain: this makes no sentence of it, nor looks who is in the
    way.
    """
    rest = Counter(piece.pool for piece in _without_room(books, claim, plan)[2])
    reserve = reserve_for(claim, policy)
    return not any(
        any(full_places(books.counts(pool, claim.target), claim.target, pieces, reserve))
        for pool, pieces in rest.items()
    )


def _without_room(books: Books, claim: Claim, plan: Plan) -> tuple[list[int], list[int], list[Piece]]:
    """The resources that serve pieces of the plan as they are, shared and reused, and the pieces that need slots."""
    if claim.armed_by is ArmedBy.TRACER:
        reused = _all_reused(books, claim, plan)
        return [], reused, [] if reused else list(plan.pieces)
    shared: list[int] = []
    rest: list[Piece] = []
    for piece in plan.pieces:
        alike = books.alike(claim, piece)
        if alike is None or alike in shared:
            rest.append(piece)
        else:
            shared.append(alike)
    return shared, [], rest


def _all_reused(books: Books, claim: Claim, plan: Plan) -> list[int]:
    """A tracer's slots that the thread has kept, if they are enough for the whole plan; else none."""
    assert claim.target.task is not None
    reused: list[int] = []
    for piece in plan.pieces:
        kept = [one for one in books.residue_of(claim.target.task, piece.pool) if one not in reused]
        if not kept:
            return []
        reused.append(kept[0])
    return reused


def reserve_for(claim: Claim, policy: Policy) -> int:
    """How many slots a claim has to leave free; of a vCPU's none, as nobody but its VMM has to do with them."""
    return 0 if claim.kind is Kind.KGDB or claim.target.vcpu is not None else policy.reserve_slots


def _may_displace(claim: Claim, other: Claim) -> bool:
    return other.rank < claim.rank and (claim.privileged or other.owner.uid == claim.owner.uid)


def _is_ours(record: ClaimRecord) -> bool:
    """Whether we can take its slots back: not what a tracer has touched, nor what the thread keeps."""
    return record.state in ARMED_BY_US and not record.reused


def _behind(ahead: ClaimRecord) -> str:
    claim = ahead.claim
    rank = f"{claim.kind}, priority {claim.priority}" if claim.priority else str(claim.kind)
    return f"held back: claim {claim.claim_id} of {claim.owner} ({rank}) waits for this room and is ahead"


def holder_of(claim: Claim) -> Holder:
    """A claim in the terms of a refusal."""
    owner = claim.owner
    return Holder(owner.pid, owner.comm, owner.uid, str(claim.kind), 1, f"on {claim.target}", (claim.claim_id,))
