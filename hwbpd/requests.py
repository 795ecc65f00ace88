"""
What each request of a session does: a question is answered from the books, anything else becomes an event.

Bounds are checked here, each refusal with its number and the setting it comes from. Root is not bound by those per uid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from hwbpd import messages
from hwbpd.attribution import Attribution, Place
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.errors import Holder, HwbpError, LimitReached, NotPermitted
from hwbpd.core.events import (
    AnyEvent,
    ClaimRequested,
    RearmRequested,
    ReleaseRequested,
    TakeFailed,
    TakenReported,
    TakingRequested,
    YieldRequested,
)
from hwbpd.core.model import Access, Claim, Mode, Plan, Span, Target
from hwbpd.core.placing import place
from hwbpd.enabled import Enabled
from hwbpd.fitting import Fitted, fit, over_reported, wait_until_ns
from hwbpd.followers import Decisions
from hwbpd.hookspecs import Backend, Machine
from hwbpd.messages import PieceRow
from hwbpd.outbox import Outbox
from hwbpd.rights import Rights
from hwbpd.sessions import Session, Sessions
from hwbpd.settings import Settings
from hwbpd.views import Views
from hwbpd.vmms import OfVmms, Vmms

ROOT = 0
_LAST_IN_LINE = 2**62  # the id of a claim that is asked about and not made: everybody who waits has asked before


class Requests:
    """
    :param backend: of what all CPUs have; :param backend_on: of those CPUs that have other slots.
    :param feed: steps an event and all that comes of it.
    """

    def __init__(
        self,
        *,
        arbiter: Arbiter,
        machine: Machine,
        backend: Backend,
        backend_on: Mapping[int, Backend],
        sessions: Sessions,
        outbox: Outbox,
        decisions: Decisions,
        rights: Rights,
        attribution: Attribution,
        enabled: Enabled,
        views: Views,
        vmms: Vmms,
        settings: Settings,
        feed: Callable[[AnyEvent], None],
    ) -> None:
        self._arbiter = arbiter
        self._machine = machine
        self._backend = backend
        self._backend_on = backend_on
        self._sessions = sessions
        self._outbox = outbox
        self._decisions = decisions
        self._rights = rights
        self._attribution = attribution
        self._enabled = enabled
        self._views = views
        self._vmms = vmms
        self._settings = settings
        self._feed = feed

    def answer(self, session: Session, request: messages.AnyRequest, now_ns: int) -> messages.Reply | None:
        """Return the reply, or None where it comes by itself; raises what refuses the request."""
        event = _event(session, request, now_ns)
        if event is not None:
            self._feed(event)
            return None
        return (
            self._vmms.answer(session, request)
            if isinstance(request, OfVmms)
            else self._answer(session, request, now_ns)
        )

    def _answer(self, session: Session, request: messages.AnyRequest, now_ns: int) -> messages.Reply | None:
        match request:
            case messages.ClaimRequest():
                self._claim(session, request, now_ns)
            case messages.Fit():
                return self._fit(session, request, now_ns)
            case messages.PlanRequest():
                return self._plan(request)
            case messages.Slots():
                return self._views.slots(request, session.owner, session.privileged, now_ns)
            case messages.Counts():
                return self._views.counts(request, session.owner, session.privileged)
            case messages.Foreign():
                self._foreign(session, request)
            case messages.Capabilities():
                return self._views.capabilities(request)
            case messages.Why():
                return self._views.why(request, session.owner, session.privileged, now_ns)
            case messages.Thread() | messages.Enabled():
                return self._enabled.answer(session, request)
            case messages.Follow():
                self._decisions.follow(session)
                return messages.FollowingReply(request.id)
            case messages.Goodbye():
                return messages.Bye(request.id)
        return None

    def _fitted(self, session: Session, wish: messages.Wish) -> tuple[Fitted, bool]:
        privileged = self._rights.is_privileged(session.peer)
        vcpu = self._vmms.target(wish.vcpu) if wish.vcpu else None
        backend = self._vmms.backend(wish.vcpu) if wish.vcpu else self._backend_for(wish.cpus)
        fitted = fit(
            wish, privileged=privileged, machine=self._machine, backend=backend, settings=self._settings, vcpu=vcpu
        )
        if not privileged:
            self._rights.may_claim(session.peer, fitted.target, fitted.span, fitted.mode)
        return fitted, privileged

    def _backend_for(self, cpus: list[int] | None) -> Backend:
        """What fits a span for these CPUs: theirs, where they are alike; what all have, for wherever a task runs."""
        theirs = {id(one): one for one in (self._backend_on.get(cpu, self._backend) for cpu in cpus or ())}
        return next(iter(theirs.values())) if len(theirs) == 1 else self._backend

    def _claim(self, session: Session, request: messages.ClaimRequest, now_ns: int) -> None:
        try:
            fitted, privileged = self._fitted(session, request)
            waits_until_ns = wait_until_ns(request, now_ns, self._settings.policy.wait_max_s)
            self._check_limits(session, fitted)
        except HwbpError as refusal:
            self._decisions.tell(
                "refused",
                session.owner,
                str(refusal),
                about=_asked_for(request),
                kind=request.kind,
                label=request.label,
                errno=refusal.errno_name,
            )
            raise
        self._feed(
            ClaimRequested(
                now_ns,
                session.owner,
                request.id,
                self._rights.kind_served(request.kind, privileged),
                fitted.span,
                fitted.access,
                fitted.mode,
                fitted.target,
                request.label,
                fitted.plan,
                fitted.guard_per_s,
                privileged,
                request.priority,
                waits_until_ns,
                request.armed_by,
                request.placeholder,
            )
        )

    def _check_limits(self, session: Session, fitted: Fitted) -> None:
        limits, books = self._settings.limits, self._arbiter.books
        of_session = len(books.sessions.get(session.session_id, ()))
        if of_session >= limits.claims_per_session:
            raise LimitReached(f"this session has {of_session} claims, all it may have (limits.claims_per_session)")
        uid = session.owner.uid
        if uid == ROOT:
            return
        claims = [
            books.claims[claim_id]
            for other in self._sessions.of_uid(uid)
            for claim_id in books.sessions.get(other.session_id, ())
        ]
        if len(claims) >= limits.claims_per_uid:
            raise LimitReached(f"uid {uid} has {len(claims)} claims; more are not allowed (limits.claims_per_uid)")
        legs = sum(self._legs(record.claim.target, len(record.plan.pieces)) for record in claims)
        wanted = self._legs(fitted.target, len(fitted.plan.pieces))
        if legs + wanted > limits.legs_per_uid:
            allowed = f"{limits.legs_per_uid} are allowed (limits.legs_per_uid)"
            raise LimitReached(f"uid {uid} has {legs} legs and wants {wanted} more; {allowed}")

    def _legs(self, target: Target, pieces: int) -> int:
        online = len(self._arbiter.books.online)
        if target.process is not None:
            return pieces * online * len(self._machine.threads(target.process))
        if target.cpus is not None:
            return pieces * len(target.cpus)
        return pieces * (online if target.is_cpu_wide else 1)

    def _fit(self, session: Session, request: messages.Fit, now_ns: int) -> messages.FitReply:
        fitted, privileged = self._fitted(session, request)
        asking = Claim(
            _LAST_IN_LINE,
            session.owner,
            self._rights.kind_served(request.kind, privileged),
            fitted.span,
            fitted.access,
            fitted.mode,
            fitted.target,
            request.label,
            now_ns,
            privileged,
            request.priority,
            armed_by=request.armed_by,
            placeholder=request.placeholder,
        )
        pieces, beside = _rows(fitted.plan), over_reported(fitted.span, fitted.plan)
        arbiter = self._arbiter
        placement = place(arbiter.books, arbiter.queue, asking, fitted.plan, arbiter.policy)
        refusal = placement.refusal
        if refusal is None:
            return messages.FitReply(request.id, True, pieces, over_reported=beside)
        holders = list(refusal.holders)
        if placement.victims:
            names = ", ".join(f"claim {victim}" for victim in placement.victims)
            first = f"once {names} has given way: {refusal}"
            return messages.FitReply(request.id, True, pieces, "", first, holders, beside)
        return messages.FitReply(request.id, False, pieces, refusal.errno_name, str(refusal), holders, beside)

    def _plan(self, request: messages.PlanRequest) -> messages.PlanReply:
        span, access = Span(request.address, request.length), Access.from_letters(request.access)
        plan = self._backend.fit(span, access, Mode(request.user, request.kernel, over_report=request.over_report))
        return messages.PlanReply(
            request.id,
            _rows(plan),
            slots=dict(Counter(str(piece.pool) for piece in plan.pieces)),
            pools={str(pool): slots for pool, slots in self._backend.slots().items()},
            over_reported=over_reported(span, plan),
        )

    def _foreign(self, session: Session, request: messages.Foreign) -> None:
        if not session.privileged:
            raise NotPermitted("only root may look at what other processes hold")
        books = self._arbiter.books
        everywhere = Target()
        places = [Place(pool, everywhere, cpu) for pool in books.pools for cpu in sorted(books.online)]

        def found(holders: tuple[Holder, ...]) -> None:
            still_there = self._sessions.of(session.session_id)
            if still_there is not None:
                self._outbox.send(still_there, messages.ForeignReply(request.id, list(holders)))

        self._attribution.look(places, found, patient=True)


def _event(session: Session, request: messages.AnyRequest, now_ns: int) -> AnyEvent | None:
    """What a request about a claim comes to; the core knows whose it is and what may be done to it."""
    by, request_id = session.owner, request.id
    match request:
        case messages.Release():
            return ReleaseRequested(now_ns, by, request_id, request.claim, session.privileged)
        case messages.Rearm():
            return RearmRequested(now_ns, by, request_id, request.claim, session.privileged)
        case messages.Yield():
            return YieldRequested(now_ns, by, request_id, request.claim)
        case messages.Taking():
            return TakingRequested(now_ns, by, request_id, request.claim)
        case messages.Taken():
            return TakenReported(now_ns, by, request_id, request.claim)
        case messages.TakeFailed():
            return TakeFailed(now_ns, by, request_id, request.claim, request.errno)
    return None


def _rows(plan: Plan) -> list[PieceRow]:
    return [
        PieceRow(piece.span.address, piece.span.length_bytes, piece.access.letters, piece.pool) for piece in plan.pieces
    ]


def _asked_for(wish: messages.Wish) -> str:
    """The wish in perf's syntax, for the log."""
    named = (("vcpu", wish.vcpu), ("pid", wish.pid), ("tid", wish.tid))
    whose = next((f"{what} {number}" for what, number in named if number), "cpu-wide")
    return f"mem:{wish.address:#x}/{wish.length}:{wish.access} for {whose} as {wish.kind}"
