"""
Carries out effects on the machine, the routes and the outbox; what comes of one is the event it returns.

One line of log per decision, with the claim, its owner and the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import structlog

from hwbpd.clock import Clock
from hwbpd.core.arbiter import describe
from hwbpd.core.effects import Arm, Disarm, Effect, End, Ended, Grant, Refuse, Route, Unroute
from hwbpd.core.events import AnyEvent, Armed, ArmFailed, Disarmed
from hwbpd.core.model import Delivery, Totals
from hwbpd.hits import Hits
from hwbpd.hookspecs import ArmError, Machine
from hwbpd.messages import Error, Granted, Lost, PieceRow, Released, Reply
from hwbpd.outbox import Outbox
from hwbpd.sessions import Session, Sessions

log = structlog.get_logger("hwbpd")


class Watch(Protocol):
    """Whoever polls descriptors: the server's epoll, or a list in a test."""

    def begin(self, resource_id: int, descriptors: Sequence[int]) -> None:
        """Poll these from now on, and drain once: what came before is not announced."""
        ...

    def end(self, resource_id: int) -> None:
        """No more; they are about to be closed."""
        ...


class Performer:
    """The hands of the core."""

    def __init__(
        self, machine: Machine, sessions: Sessions, outbox: Outbox, hits: Hits, watch: Watch, clock: Clock
    ) -> None:
        self._machine = machine
        self._sessions = sessions
        self._outbox = outbox
        self._hits = hits
        self._watch = watch
        self._clock = clock

    def perform(self, effect: Effect) -> AnyEvent | None:
        """Carry out one effect; return what came of it, if the core waits for that."""
        match effect:
            case Arm():
                return self._arm(effect)
            case Disarm():
                return self._disarm(effect)
            case Route():
                self._hits.route(effect.resource_id, effect.claim)
                self._watch.begin(effect.resource_id, self._machine.descriptors(effect.resource_id))
            case Unroute():
                self._hits.unroute(effect.resource_id, effect.claim_id)
            case Grant():
                self._grant(effect)
            case Refuse():
                self._refuse(effect)
            case Ended():
                self._ended(effect)
        return None

    def _arm(self, effect: Arm) -> AnyEvent:
        armed: list[int] = []
        try:
            for resource in effect.resources:
                self._machine.arm(resource.resource_id, resource.piece, resource.target, resource.mode)
                armed.append(resource.resource_id)
        except ArmError as refusal:
            for resource_id in armed:
                self._machine.disarm(resource_id)
            return ArmFailed(self._clock.now_ns(), effect.claim_id, refusal.errno, refusal.cpu, refusal.tid)
        return Armed(self._clock.now_ns(), effect.claim_id)

    def _disarm(self, effect: Disarm) -> AnyEvent:
        hits = lost = 0
        for resource_id in effect.resource_ids:
            self._watch.end(resource_id)
            batch, totals = self._machine.disarm(resource_id)
            self._hits.deliver(resource_id, batch)
            hits += totals.hits
            lost += totals.lost
        return Disarmed(self._clock.now_ns(), effect.claim_id, Totals(hits, lost))

    def _grant(self, effect: Grant) -> None:
        claim = effect.claim
        log.info("granted", claim_id=claim.claim_id, owner=str(claim.owner), claim=describe(claim), label=claim.label)
        pieces = [
            PieceRow(piece.span.address, piece.span.length_bytes, piece.access.letters, piece.pool)
            for piece in effect.plan.pieces
        ]
        self._reply(
            claim.owner.session_id, Granted(effect.request_id, claim.claim_id, pieces, claim.mode.ring_bytes)
        )

    def _refuse(self, effect: Refuse) -> None:
        error = effect.error
        log.info(
            "refused",
            claim_id=effect.claim_id,
            owner=str(effect.to),
            errno=error.errno_name,
            reason=str(error),
        )
        self._reply(
            effect.to.session_id,
            Error(effect.request_id, error.errno_name, str(error), list(error.holders), effect.claim_id),
        )

    def _ended(self, effect: Ended) -> None:
        claim, totals = effect.claim, effect.totals
        flow = self._hits.flow(claim.claim_id)
        log.info(
            "ended",
            claim_id=claim.claim_id,
            owner=str(claim.owner),
            how=str(effect.how),
            reason=effect.sentence,
            hits=totals.hits,
            delivered=flow.delivered,
            lost=totals.lost,
            dropped=flow.dropped,
        )
        if claim.mode.delivery is Delivery.HITS:
            assert totals.hits == flow.delivered + flow.dropped + totals.lost, (claim, totals)
        if effect.how in {End.FORCED, End.EXIT}:
            owner = self._sessions.of(claim.owner.session_id)
            if owner is not None:
                self._outbox.send(
                    owner,
                    Lost(
                        claim.claim_id,
                        str(effect.how),
                        effect.sentence,
                        totals.hits,
                        flow.delivered,
                        totals.lost,
                        flow.dropped,
                    ),
                )
        if effect.asked_by is not None:
            self._reply(
                effect.asked_by.session_id,
                Released(
                    effect.request_id, claim.claim_id, totals.hits, flow.delivered, totals.lost, flow.dropped
                ),
            )
        self._hits.forget(claim.claim_id)

    def _reply(self, session_id: int, reply: Reply) -> None:
        session: Session | None = self._sessions.of(session_id)
        if session is not None:
            self._outbox.send(session, reply)
