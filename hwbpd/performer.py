"""
Carries out effects on the machine, the routes and the outbox; what comes of one is the event it returns.

Each decision is told once, with the claim, its owner and the reason (``followers.py``).

The status page hears of a resource before the machine does when it is to report, and after it when it is not to any
more: whoever reads there may be told too early or too long, and never too late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hwbpd.attribution import Attribution, Place
from hwbpd.clock import Clock
from hwbpd.core.arbiter import describe
from hwbpd.core.effects import (
    AddLeg,
    Arm,
    Attribute,
    Change,
    Disarm,
    DropLeg,
    Effect,
    End,
    Ended,
    Grant,
    Rearm,
    RearmDone,
    Refuse,
    Route,
    Silence,
    Tell,
    TopUp,
    Unroute,
)
from hwbpd.core.errors import Holder, HwbpError
from hwbpd.core.events import (
    AnyEvent,
    Armed,
    ArmFailed,
    Disarmed,
    ForeignFound,
    FuseBlown,
    LegRefused,
    LegTaken,
    Rearmed,
    RearmFailed,
)
from hwbpd.core.model import Claim, Delivery, Totals
from hwbpd.followers import Decisions
from hwbpd.hits import Hits
from hwbpd.hookspecs import ArmError, Machine
from hwbpd.messages import (
    Error,
    Granted,
    Guarded,
    Lost,
    PieceRow,
    RearmedReply,
    Released,
    Reply,
    Resumed,
    Suspended,
)
from hwbpd.outbox import Outbox
from hwbpd.rights import Rights
from hwbpd.sessions import Session, Sessions
from hwbpd.status_page import StatusPage


class Watch(Protocol):
    """Whoever polls descriptors: the server's epoll, or a list in a test."""

    def begin(self, resource_id: int, descriptors: Sequence[int], counted: bool = False) -> None:
        """Poll these from now on, and drain once: what came before is not announced."""
        ...

    def end(self, resource_id: int) -> None:
        """No more; they are about to be closed."""
        ...


class Performer:
    """The hands of the core."""

    def __init__(
        self,
        *,
        machine: Machine,
        sessions: Sessions,
        rights: Rights,
        outbox: Outbox,
        decisions: Decisions,
        hits: Hits,
        attribution: Attribution,
        page: StatusPage,
        watch: Watch,
        clock: Clock,
        later: Callable[[AnyEvent], None],
    ) -> None:
        """:param later: takes the events that come of an effect after ``perform`` has returned."""
        self._hands: dict[type[Effect], Callable[[Any], AnyEvent | None]] = {
            Arm: self._arm,
            Disarm: self._disarm,
            Attribute: self._attribute,
            TopUp: self._top_up,
            Silence: self._silence,
            Rearm: self._rearm,
            DropLeg: self._drop_leg,
            AddLeg: self._add_leg,
            Route: self._route,
            Unroute: self._unroute,
            Grant: self._grant,
            Refuse: self._refuse,
            Tell: self._tell,
            RearmDone: self._rearm_done,
            Ended: self._ended,
        }
        self._rights = rights
        self._attribution = attribution
        self._later = later
        self._machine = machine
        self._page = page
        self._sessions = sessions
        self._outbox = outbox
        self._decisions = decisions
        self._hits = hits
        self._watch = watch
        self._clock = clock

    def perform(self, effect: Effect) -> AnyEvent | None:
        """Carry out one effect; return what came of it, if the core waits for that."""
        return self._hands[type(effect)](effect)

    def _route(self, effect: Route) -> None:
        self._hits.route(effect.resource_id, effect.claim)
        self._watch_anew(effect.resource_id)

    def _watch_anew(self, resource_id: int) -> None:
        self._watch.begin(resource_id, self._machine.descriptors(resource_id), self._hits.is_counted(resource_id))

    def _unroute(self, effect: Unroute) -> None:
        self._hits.unroute(effect.resource_id, effect.claim_id)

    def _top_up(self, effect: TopUp) -> AnyEvent | None:
        in_time = self._machine.top_up(effect.resource_id, effect.hits)
        return None if in_time else FuseBlown(self._clock.now_ns(), effect.resource_id)

    def _silence(self, effect: Silence) -> None:
        for resource_id in effect.resource_ids:
            self._machine.silence(resource_id)
            self._page.clear_armed(resource_id)

    def _drop_leg(self, effect: DropLeg) -> None:
        self._watch.end(effect.resource_id)
        self._machine.drop_cpu(effect.resource_id, effect.cpu)
        self._page.clear_on(effect.resource_id, effect.cpu)
        self._watch_anew(effect.resource_id)

    def _rearm_done(self, effect: RearmDone) -> None:
        self._reply(effect.to.session_id, RearmedReply(effect.request_id, effect.claim.claim_id))

    def _arm(self, effect: Arm) -> AnyEvent:
        claim = effect.claim
        armed: list[int] = []
        for resource in effect.resources:
            self._page.show(resource)
        try:
            for resource in effect.resources:
                self._machine.arm(resource.resource_id, resource.piece, resource.target, resource.mode)
                armed.append(resource.resource_id)
        except ArmError as refusal:
            self._undo(effect, armed)
            return ArmFailed(
                self._clock.now_ns(),
                claim.claim_id,
                refusal.errno,
                refusal.cpu,
                refusal.tid,
                refusal.needed,
                refusal.allowed,
            )
        session = self._sessions.of(claim.owner.session_id)
        try:
            if session is not None:
                self._rights.still_may(session.peer, claim)
        except HwbpError as refusal:
            self._undo(effect, armed)
            now_ns = self._clock.now_ns()
            return ArmFailed(now_ns, claim.claim_id, refusal.errno, None, None, sentence=str(refusal))
        return Armed(self._clock.now_ns(), claim.claim_id)

    def _undo(self, effect: Arm, armed: Sequence[int]) -> None:
        for resource_id in armed:
            self._machine.disarm(resource_id)
        for resource in effect.resources:
            self._page.clear(resource.resource_id)

    def _rearm(self, effect: Rearm) -> AnyEvent:
        failed = 0
        for resource_id in effect.resource_ids:
            self._watch.end(resource_id)
            self._page.show_armed(resource_id)
            try:
                self._machine.rearm(resource_id, effect.fuse_hits)
            except ArmError as refusal:
                failed = refusal.errno
            self._watch_anew(resource_id)
        if failed:
            return RearmFailed(self._clock.now_ns(), effect.claim_id, failed)
        return Rearmed(self._clock.now_ns(), effect.claim_id)

    def _add_leg(self, effect: AddLeg) -> AnyEvent:
        self._watch.end(effect.resource_id)
        self._page.show_on(effect.resource_id, effect.cpu)
        try:
            self._machine.add_cpu(effect.resource_id, effect.cpu)
        except ArmError as refusal:
            self._page.clear_on(effect.resource_id, effect.cpu)
            return LegRefused(self._clock.now_ns(), effect.resource_id, effect.cpu, refusal.errno)
        finally:
            self._watch_anew(effect.resource_id)
        return LegTaken(self._clock.now_ns(), effect.resource_id, effect.cpu)

    def _attribute(self, effect: Attribute) -> None:
        place = Place(effect.pool, effect.target, effect.cpu)

        def found(holders: tuple[Holder, ...]) -> None:
            self._later(ForeignFound(self._clock.now_ns(), effect.claim_id, holders))

        self._attribution.look((place,), found)

    def _tell(self, effect: Tell) -> None:
        claim = effect.claim
        self._decisions.tell(
            str(effect.change),
            claim.owner,
            effect.sentence,
            claim_id=claim.claim_id,
            about=describe(claim),
            kind=claim.kind,
            label=claim.label,
            cpu=effect.cpu,
        )
        owner = self._sessions.of(claim.owner.session_id)
        if owner is None:
            return
        match effect.change:
            case Change.GUARDED:
                self._outbox.send(owner, Guarded(claim.claim_id, effect.sentence))
            case Change.RESUMED:
                self._outbox.send(owner, Resumed(claim.claim_id, effect.sentence, effect.cpu))
            case Change.SUSPENDED:
                self._outbox.send(owner, Suspended(claim.claim_id, effect.sentence, effect.cpu))
            case Change.OFFLINE:
                self._outbox.send(owner, self._lost(claim, "offline", effect.sentence, Totals(), effect.cpu))

    def _disarm(self, effect: Disarm) -> AnyEvent:
        hits = lost = 0
        for resource_id in effect.resource_ids:
            self._watch.end(resource_id)
            batch, totals = self._machine.disarm(resource_id)
            self._page.clear(resource_id)
            self._hits.deliver(resource_id, batch)
            hits += totals.hits
            lost += totals.lost
        return Disarmed(self._clock.now_ns(), effect.claim_id, Totals(hits, lost))

    def _grant(self, effect: Grant) -> None:
        claim = effect.claim
        pieces = [
            PieceRow(piece.span.address, piece.span.length_bytes, piece.access.letters, piece.pool)
            for piece in effect.plan.pieces
        ]
        guard = claim.mode.fuse_hits
        reply = Granted(effect.request_id, claim.claim_id, pieces, claim.mode.ring_bytes, str(claim.kind), guard)
        self._reply(claim.owner.session_id, reply)
        # Here and below, the others are told while the answer is on its way: nobody needs to wait for that.
        self._decisions.tell(
            "granted",
            claim.owner,
            claim_id=claim.claim_id,
            about=describe(claim),
            kind=claim.kind,
            label=claim.label,
        )

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
        claim, totals = effect.claim, effect.totals
        flow = self._hits.flow(claim.claim_id)
        if claim.mode.delivery is Delivery.HITS:
            assert totals.hits == flow.delivered + flow.dropped + flow.filtered + totals.lost, (claim, totals)
        if effect.how in {End.FORCED, End.EXIT, End.EXEC, End.STOLEN}:
            owner = self._sessions.of(claim.owner.session_id)
            if owner is not None:
                self._outbox.send(owner, self._lost(claim, str(effect.how), effect.sentence, totals))
        if effect.asked_by is not None:
            self._reply(
                effect.asked_by.session_id,
                Released(
                    effect.request_id,
                    claim.claim_id,
                    totals.hits,
                    flow.delivered,
                    totals.lost,
                    flow.dropped,
                    flow.filtered,
                ),
            )
        self._decisions.tell(
            "ended",
            claim.owner,
            effect.sentence,
            claim_id=claim.claim_id,
            about=describe(claim),
            kind=claim.kind,
            label=claim.label,
            how=str(effect.how),
            hits=totals.hits,
            delivered=flow.delivered,
            lost=totals.lost,
            dropped=flow.dropped,
        )
        self._hits.forget(claim.claim_id)

    def _lost(self, claim: Claim, reason: str, sentence: str, totals: Totals, cpu: int | None = None) -> Lost:
        flow = self._hits.flow(claim.claim_id)
        return Lost(
            claim.claim_id,
            reason,
            sentence,
            totals.hits,
            flow.delivered,
            totals.lost,
            flow.dropped,
            flow.filtered,
            cpu,
        )

    def _reply(self, session_id: int, reply: Reply) -> None:
        session: Session | None = self._sessions.of(session_id)
        if session is not None:
            self._outbox.send(session, reply)
