"""
Carries out effects on the machine and the routes; what comes of one is the event it returns.

The status page hears of a resource before the machine does when it is to report, and after it when it is not to any
more: whoever reads there may be told too early or too long, and never too late. What a tracer has armed is not on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hwbpd.attribution import Attribution, Place
from hwbpd.clock import Clock
from hwbpd.core.effects import (
    AddLeg,
    Arm,
    Attend,
    Attribute,
    Disarm,
    DropLeg,
    Effect,
    Handover,
    Probe,
    Rearm,
    Route,
    Silence,
    Suspend,
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
    HitsCounted,
    LegRefused,
    LegTaken,
    Probed,
    Rearmed,
    RearmFailed,
    Suspended,
    TargetEnded,
)
from hwbpd.core.model import ArmedBy, Claim, Resource
from hwbpd.followers import Decisions
from hwbpd.hits import Hits
from hwbpd.hookspecs import ArmError, Batch, Machine
from hwbpd.outbox import Outbox
from hwbpd.rights import Rights
from hwbpd.sessions import Sessions
from hwbpd.status_page import StatusPage
from hwbpd.teller import Teller


class Watch(Protocol):
    """Whoever polls descriptors: the server's epoll, or a list in a test."""

    def begin(self, resource_id: int, descriptors: Sequence[int], counted: bool = False) -> None:
        """Poll these from now on, and drain once: what came before is not announced."""
        ...

    def end(self, resource_id: int) -> None:
        """No more; they are about to be closed."""
        ...


class Kgdb(Protocol):
    """Whoever tells VMMs that kgdb takes what it wants."""

    def kgdb_has(self, claim: Claim) -> None:
        """That claim is about to have registers; called for every claim, and more than once."""
        ...

    def kgdb_has_not(self, claim_id: int) -> None:
        """It has given them back."""
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
        kgdb: Kgdb,
        later: Callable[[AnyEvent], None],
    ) -> None:
        """:param later: takes the events that come of an effect after ``perform`` has returned."""
        self._hands: dict[type[Effect], Callable[[Any], AnyEvent | None]] = {
            Arm: self._arm,
            Attend: self._attend,
            Handover: self._handover,
            Probe: self._probe,
            Disarm: self._disarm,
            Suspend: self._suspend,
            Attribute: self._attribute,
            TopUp: self._top_up,
            Silence: self._silence,
            Rearm: self._rearm,
            DropLeg: self._drop_leg,
            AddLeg: self._add_leg,
            Route: self._route,
            Unroute: self._unroute,
            **Teller(hits, sessions, outbox, decisions).hands,
        }
        self._rights = rights
        self._attribution = attribution
        self._later = later
        self._machine = machine
        self._page = page
        self._kgdb = kgdb
        self._sessions = sessions
        self._hits = hits
        self._watch = watch
        self._clock = clock
        self._placeholders: dict[int, Resource] = {}  # armed for a tracer that has not taken them yet
        self._gone: set[int] = set()  # handed over when their thread was gone already: the machine has them no more

    def perform(self, effect: Effect) -> AnyEvent | None:
        """Carry out one effect; return what came of it, if the core waits for that."""
        return self._hands[type(effect)](effect)

    # --- routes ------------------------------------------------------------------------------------------------------

    def _route(self, effect: Route) -> AnyEvent | None:
        if effect.claim.armed_by is ArmedBy.TRACER:
            return None  # no hits come of it here, and its thread is watched since the slot was armed
        self._kgdb.kgdb_has(effect.claim)  # where it shares what is armed already
        resource_id = effect.resource_id
        was_watched, was_counted = self._hits.has_route(resource_id), self._hits.is_counted(resource_id)
        batch = self._hits.route(resource_id, effect.claim)
        if was_watched and self._hits.is_counted(resource_id) != was_counted:
            self._watch.end(resource_id)
            was_watched = False
        if not was_watched:
            self._watch_anew(resource_id)
        return self._counted(resource_id, batch)

    def _unroute(self, effect: Unroute) -> AnyEvent | None:
        return self._counted(effect.resource_id, self._hits.leave(effect.resource_id, effect.claim_id))

    def _counted(self, resource_id: int, batch: Batch) -> AnyEvent | None:
        """What was drained out of turn counts for the guard like all else."""
        if not (batch.hits or batch.lost):
            return None
        return HitsCounted(self._clock.now_ns(), resource_id, batch.hits, batch.lost)

    def _watch_anew(self, resource_id: int) -> None:
        self._watch.begin(resource_id, self._machine.descriptors(resource_id), self._hits.is_counted(resource_id))

    # --- slots -------------------------------------------------------------------------------------------------------

    def _top_up(self, effect: TopUp) -> AnyEvent | None:
        if not self._hits.has_route(effect.resource_id):
            return None  # it has been given back since its hits were counted
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

    def _arm(self, effect: Arm) -> AnyEvent:
        self._kgdb.kgdb_has(effect.claim)
        for resource in effect.resources:
            self._page.show(resource)

        def arm(resource: Resource) -> None:
            self._machine.arm(resource.resource_id, resource.piece, resource.target, resource.mode)

        outcome = self._take(effect.claim, effect.resources, arm)
        if isinstance(outcome, ArmFailed):
            for resource in effect.resources:
                self._page.clear(resource.resource_id)
            self._kgdb.kgdb_has_not(effect.claim.claim_id)
        elif effect.claim.armed_by is ArmedBy.TRACER:
            self._placeholders |= {resource.resource_id: resource for resource in effect.resources}
        return outcome

    def _attend(self, effect: Attend) -> AnyEvent:
        def attend(resource: Resource) -> None:
            self._machine.attend(resource.resource_id, resource.target, resource.mode)

        return self._take(effect.claim, effect.resources, attend)

    def _take(self, claim: Claim, resources: Sequence[Resource], take: Callable[[Resource], None]) -> AnyEvent:
        """Take all of these or none, and only if the owner may have them still."""
        taken: list[int] = []
        try:
            for resource in resources:
                take(resource)
                taken.append(resource.resource_id)
        except ArmError as refusal:
            self._undo(taken)
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
            self._undo(taken)
            now_ns = self._clock.now_ns()
            return ArmFailed(now_ns, claim.claim_id, refusal.errno, None, None, sentence=str(refusal))
        if claim.armed_by is ArmedBy.TRACER:
            for resource_id in taken:
                self._watch_anew(resource_id)  # no hits come from it, but the end of the thread does
        return Armed(self._clock.now_ns(), claim.claim_id)

    def _undo(self, taken: Sequence[int]) -> None:
        for resource_id in taken:
            self._machine.disarm(resource_id)

    def _handover(self, effect: Handover) -> AnyEvent | None:
        gone: AnyEvent | None = None
        for resource_id in effect.resource_ids:
            resource = self._placeholders.pop(resource_id)
            self._watch.end(resource_id)
            self._machine.disarm(resource_id)
            self._page.clear(resource_id)
            try:
                self._machine.attend(resource_id, resource.target, resource.mode)
            except ArmError:
                gone = TargetEnded(self._clock.now_ns(), resource_id, execed=False)
                self._gone.add(resource_id)
                continue
            self._watch_anew(resource_id)
        return gone

    def _probe(self, effect: Probe) -> AnyEvent:
        outside = self._machine.slots_outside(effect.pool, effect.target)
        # Where it cannot be told, the books must not show less than the kernel counts.
        has_slot = outside is None or outside > effect.known
        return Probed(self._clock.now_ns(), effect.claim_id, has_slot)

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

    def _disarm(self, effect: Disarm) -> AnyEvent:
        self._give_back(effect)
        return Disarmed(self._clock.now_ns(), effect.claim_id, self._hits.final(effect.claim_id))

    def _suspend(self, effect: Suspend) -> AnyEvent:
        self._give_back(effect)
        return Suspended(self._clock.now_ns(), effect.claim_id)

    def _give_back(self, effect: Disarm | Suspend) -> None:
        for resource_id in effect.shared:
            counted = self._counted(resource_id, self._hits.leave(resource_id, effect.claim_id))
            if counted is not None:
                self._later(counted)
        for resource_id in effect.resource_ids:
            self._placeholders.pop(resource_id, None)
            if resource_id in self._gone:
                self._gone.remove(resource_id)
                continue
            self._watch.end(resource_id)
            batch, totals = self._machine.disarm(resource_id)
            if resource_id in self._page:
                self._page.clear(resource_id)
            self._hits.disarmed(resource_id, batch, totals)
        self._kgdb.kgdb_has_not(effect.claim_id)
