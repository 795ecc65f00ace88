"""
Tells people: the effects that come to a reply, a notice, or a decision for those who follow.

Each decision is told once, with the claim, its owner and the reason (``followers.py``): after the answer to whoever
waits for it, as nobody needs to wait for that. Where a session is over there is nobody to tell, and that is all right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from hwbpd.core.arbiter import describe
from hwbpd.core.effects import Change, Done, Effect, End, Ended, Grant, Queued, RearmDone, Refuse, Tell
from hwbpd.core.errors import HwbpError
from hwbpd.core.model import Claim, Plan
from hwbpd.followers import Decisions
from hwbpd.hits import Hits
from hwbpd.messages import (
    Contended,
    Error,
    ForeignNotice,
    Granted,
    GrantedNotice,
    Guarded,
    Lost,
    Notice,
    PieceRow,
    QueuedReply,
    RearmedReply,
    Released,
    Reply,
    Resumed,
    Revoke,
    Spared,
    Suspended,
    Take,
    TakeFailedReply,
    TakenReply,
    Yielded,
)
from hwbpd.outbox import Outbox
from hwbpd.sessions import Sessions

# The replies that need no more than a word. Of what its tracer has, nothing is counted here.
_WORDS: dict[str, Callable[[int, int], Reply]] = {
    "yielded": Yielded,
    "take": Take,
    "taken": TakenReply,
    "take_failed": TakeFailedReply,
    "released": lambda request_id, claim_id: Released(request_id, claim_id, 0, 0, 0, 0),
}

# How a claim may end without its owner having asked for it, and without its session being over.
_UNASKED = frozenset(
    {End.FORCED, End.EXIT, End.EXEC, End.STOLEN, End.TIMEOUT, End.REFUSED, End.TAKE_FAILED, End.REUSED}
)


class Teller:
    """``hands``: what carries out which effect."""

    def __init__(self, hits: Hits, sessions: Sessions, outbox: Outbox, decisions: Decisions) -> None:
        self._hits = hits
        self._sessions = sessions
        self._outbox = outbox
        self._decisions = decisions
        self.hands: Mapping[type[Effect], Callable[[Any], None]] = {
            Grant: self._grant,
            Refuse: self._refuse,
            Queued: self._queued,
            Done: self._done,
            Tell: self._tell,
            RearmDone: self._rearm_done,
            Ended: self._ended,
        }

    def _tell(self, effect: Tell) -> None:
        claim = effect.claim
        self._decide(str(effect.change), claim, effect.sentence, cpu=effect.cpu)
        owner = self._sessions.of(claim.owner.session_id)
        if owner is not None:
            self._outbox.send(owner, self._notice(effect))

    def _notice(self, effect: Tell) -> Notice:
        claim, sentence, cpu = effect.claim, effect.sentence, effect.cpu
        match effect.change:
            case Change.GRANTED:
                assert effect.plan is not None
                return GrantedNotice(
                    claim.claim_id, _rows(effect.plan), claim.mode.ring_bytes, str(claim.kind), claim.mode.fuse_hits
                )
            case Change.REVOKE:
                return Revoke(claim.claim_id, effect.holders[0], sentence, effect.deadline_ns)
            case Change.SPARED:
                return Spared(claim.claim_id, sentence)
            case Change.CONTENDED:
                return Contended(claim.claim_id, effect.holders[0], sentence)
            case Change.FOREIGN:
                return ForeignNotice(claim.claim_id, sentence, list(effect.holders))
            case Change.GUARDED:
                return Guarded(claim.claim_id, sentence)
            case Change.RESUMED:
                return Resumed(claim.claim_id, sentence, cpu)
            case Change.SUSPENDED:
                return Suspended(claim.claim_id, sentence, cpu)
            case Change.OFFLINE:
                return self._lost(claim, "offline", sentence, cpu)

    def _decide(self, what: str, claim: Claim, sentence: str = "", **more: Any) -> None:
        """Tell the others, while the answer is on its way: nobody needs to wait for that."""
        about, label = describe(claim), claim.label
        self._decisions.tell(
            what, claim.owner, sentence, claim_id=claim.claim_id, about=about, kind=claim.kind, label=label, **more
        )

    def _grant(self, effect: Grant) -> None:
        claim, mode = effect.claim, effect.claim.mode
        pieces, kind = _rows(effect.plan), str(claim.kind)
        reply = Granted(effect.request_id, claim.claim_id, pieces, mode.ring_bytes, kind, mode.fuse_hits)
        self._reply(claim.owner.session_id, reply)
        self._decide("granted", claim)

    def _queued(self, effect: Queued) -> None:
        claim, error = effect.claim, effect.error
        sentence, holders = str(error), list(error.holders)
        reply = QueuedReply(
            effect.request_id, claim.claim_id, effect.position, error.errno_name, sentence, holders
        )
        self._reply(claim.owner.session_id, reply)
        self._decide("queued", claim, sentence, errno=error.errno_name)

    def _done(self, effect: Done) -> None:
        self._reply(effect.to.session_id, _WORDS[effect.what](effect.request_id, effect.claim_id))

    def _refuse(self, effect: Refuse) -> None:
        error = effect.error
        self._decisions.tell(
            "refused", effect.to, str(error), claim_id=effect.claim_id, errno=error.errno_name
        )
        self._reply(
            effect.to.session_id,
            Error(effect.request_id, error.errno_name, str(error), list(error.holders), effect.claim_id),
        )

    def _ended(self, effect: Ended) -> None:
        claim = effect.claim
        # The effect's totals are the core's, who knows nothing of what came last before it was suspended.
        self._hits.final(claim.claim_id)
        account = self._hits.account(claim.claim_id)
        if effect.how in _UNASKED:
            owner = self._sessions.of(claim.owner.session_id)
            if owner is not None:
                self._outbox.send(owner, self._lost(claim, str(effect.how), effect.sentence, refusal=effect.refusal))
        if effect.asked_by is not None:
            self._reply(effect.asked_by.session_id, Released(effect.request_id, claim.claim_id, *account))
        self._decide(
            "ended",
            claim,
            effect.sentence,
            how=str(effect.how),
            hits=account.hits,
            delivered=account.delivered,
            lost=account.lost,
            dropped=account.dropped,
        )
        self._hits.forget(claim.claim_id)

    def _lost(
        self, claim: Claim, reason: str, sentence: str, cpu: int | None = None, refusal: HwbpError | None = None
    ) -> Lost:
        told = Lost(claim.claim_id, reason, sentence, *self._hits.account(claim.claim_id), cpu)
        if refusal is None:
            return told
        return replace(told, errno=refusal.errno_name, holders=list(refusal.holders))

    def _rearm_done(self, effect: RearmDone) -> None:
        self._reply(effect.to.session_id, RearmedReply(effect.request_id, effect.claim.claim_id))

    def _reply(self, session_id: int, reply: Reply) -> None:
        session = self._sessions.of(session_id)
        if session is not None:
            self._outbox.send(session, reply)


def _rows(plan: Plan) -> list[PieceRow]:
    return [
        PieceRow(piece.span.address, piece.span.length_bytes, piece.access.letters, piece.pool)
        for piece in plan.pieces
    ]
