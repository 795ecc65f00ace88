"""
``step(event) -> effects``: everything is decided here, one event at a time, in the order in which events come.

Pure and deterministic: the same events from the same start lead to the same state and the same effects. No peer can
make it raise; an assertion that fails here is our own mistake.

The order of things for a claim: ``fits`` checks, the books count the slots, the machine is asked, and only its answer
is told to the owner. For a release: the machine gives the slots back, then the books do, then the owner hears of it.
The books therefore never show less than the kernel counts.

When a CPU goes offline, claims on it live on without their slots there; when it is back they get them again, oldest
first, as far as there is room by then.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from hwbpd.core.admission import fits, refused_by_the_kernel
from hwbpd.core.books import Books, ClaimRecord
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
from hwbpd.core.errors import (
    BadClaim,
    CpuOffline,
    HwbpError,
    NoResources,
    NoSuchClaim,
    NotPermitted,
    NotSupported,
    TargetGone,
)
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
    Stopping,
    TargetEnded,
    Tick,
)
from hwbpd.core.guard import Guard
from hwbpd.core.lifecycle import SETTLED, State, Step, after
from hwbpd.core.model import Claim, Owner, Piece, Plan, Pool, Resource, Target


class _Ending:
    """Why a claim is being released, and who waits to hear of it."""

    __slots__ = ("asked_by", "how", "request_id", "sentence")

    def __init__(self, how: End, sentence: str, asked_by: Owner | None = None, request_id: int = 0) -> None:
        self.how = how
        self.sentence = sentence
        self.asked_by = asked_by
        self.request_id = request_id


class _Asked(Struct, frozen=True):
    """How a story begins."""

    claim: Claim

    def __str__(self) -> str:
        return f"{self.claim.owner} asked for {describe(self.claim)}"


class Arbiter:
    """
    The core of the daemon.

    :param slots: how many slots each pool has on a CPU.
    :param possible: every CPU that may ever come online; :param online: those that are.
    :param rearm_after_ns: how long a flooded claim stays silent before it is armed again by itself; 0 for ever.
    """

    def __init__(
        self, slots: Mapping[Pool, int], possible: Iterable[int], online: Iterable[int], rearm_after_ns: int = 0
    ) -> None:
        self.books = Books(slots, possible, online)
        self._rearm_after_ns = rearm_after_ns
        self._deadlines: list[tuple[int, int]] = []  # (when, claim): guarded claims to be armed again by themselves
        self._guards: dict[int, Guard] = {}  # per resource
        self._last_claim_id = 0
        self._last_resource_id = 0
        self._asked: dict[int, int] = {}  # claim being armed, or attributed -> the request it answers
        self._rearming: dict[int, tuple[Owner, int]] = {}  # claim -> who asked for it, with which request
        self._no_room_at: dict[int, int | None] = {}  # claim being attributed -> the CPU where the kernel refused
        self._endings: dict[int, _Ending] = {}  # claims being released
        self._steps: dict[type[AnyEvent], Callable[[Any], list[Effect]]] = {
            ClaimRequested: self._claim_requested,
            Armed: self._armed,
            ArmFailed: self._arm_failed,
            ForeignFound: self._foreign_found,
            HitsCounted: self._hits_counted,
            FuseBlown: self._fuse_blown,
            RearmRequested: self._rearm_requested,
            Rearmed: self._rearmed,
            RearmFailed: self._rearm_failed,
            CpuWentOffline: self._cpu_went_offline,
            CpuCameOnline: self._cpu_came_online,
            LegTaken: self._leg_taken,
            LegRefused: self._leg_refused,
            ReleaseRequested: self._release_requested,
            Disarmed: self._disarmed,
            TargetEnded: self._target_ended,
            SessionEnded: self._session_ended,
            Tick: self._tick,
            Stopping: self._stopping,
        }

    def step(self, event: AnyEvent) -> list[Effect]:
        """Take one event; return what the shell must now do, in order."""
        return self._steps[type(event)](event)

    def next_deadline_ns(self) -> int | None:
        """When a ``Tick`` is due next, if ever."""
        return self._deadlines[0][0] if self._deadlines else None

    def record(self, claim_id: int) -> ClaimRecord | None:
        """The claim with that id, over or not, or None if there never was one or its story is forgotten."""
        return self.books.claims.get(claim_id) or self.books.ended.get(claim_id)

    # --- a claim -----------------------------------------------------------------------------------------------------

    def _claim_requested(self, event: ClaimRequested) -> list[Effect]:
        self._last_claim_id += 1
        claim = Claim(
            claim_id=self._last_claim_id,
            owner=event.owner,
            kind=event.kind,
            span=event.span,
            access=event.access,
            mode=event.mode,
            target=event.target,
            label=event.label,
            requested_ns=event.now_ns,
            privileged=event.privileged,
        )
        record = ClaimRecord(claim, event.plan)
        record.story.tell(event.now_ns, _Asked(claim))
        try:
            fits(self.books, claim.target, event.plan)
        except HwbpError as refusal:
            record.state = after(record.state, Step.DOES_NOT_FIT)
            record.story.tell(event.now_ns, f"refused: {refusal}")
            self.books.close_claim(record)
            return [Refuse(claim.owner, event.request_id, refusal, claim.claim_id)]
        resources = tuple(self._resource(claim, piece) for piece in event.plan.pieces)
        for resource in resources:
            self.books.take(resource, claim)
            if event.guard_per_s:
                self._guards[resource.resource_id] = Guard(event.guard_per_s, event.now_ns)
        record.guard_per_s = event.guard_per_s
        record.resource_ids = tuple(resource.resource_id for resource in resources)
        record.state = after(record.state, Step.FITS)
        self.books.open_claim(record)
        self._asked[claim.claim_id] = event.request_id
        return [Arm(claim, resources)]

    def _resource(self, claim: Claim, piece: Piece) -> Resource:
        self._last_resource_id += 1
        return Resource(self._last_resource_id, piece, claim.target, claim.mode)

    def _armed(self, event: Armed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        record.state = after(record.state, Step.ARMED)
        record.story.tell(event.now_ns, "granted: the kernel has taken the slots")
        routes: list[Effect] = [Route(resource_id, record.claim) for resource_id in record.resource_ids]
        return [*routes, Grant(record.claim, self._asked.pop(event.claim_id), record.plan)]

    def _arm_failed(self, event: ArmFailed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        self._give_back(record)
        if event.errno == errno.ENOSPC:
            record.state = after(record.state, Step.NO_ROOM)
            record.story.tell(event.now_ns, "the kernel has no room although the books have: looking who is in the way")
            self._no_room_at[event.claim_id] = event.cpu
            claim, pool = record.claim, record.plan.pieces[0].pool
            return [Attribute(event.claim_id, pool, claim.target, event.cpu)]
        record.state = after(record.state, Step.ARM_FAILED)
        return self._refuse(event.now_ns, record, kernel_refusal(record, event))

    def _foreign_found(self, event: ForeignFound) -> list[Effect]:
        record = self.books.claims.get(event.claim_id)
        if record is None or record.state is not State.ATTRIBUTING:
            return []  # its session ended meanwhile
        target, plan = record.claim.target, record.plan
        cpu = self._no_room_at.pop(event.claim_id)
        refusal = refused_by_the_kernel(self.books, target, plan, cpu, event.holders)
        record.state = after(record.state, Step.ATTRIBUTED)
        return self._refuse(event.now_ns, record, refusal)

    def _refuse(self, now_ns: int, record: ClaimRecord, refusal: HwbpError) -> list[Effect]:
        claim_id = record.claim.claim_id
        record.story.tell(now_ns, f"refused by the kernel: {refusal}")
        self.books.close_claim(record)
        return [Refuse(record.claim.owner, self._asked.pop(claim_id), refusal, claim_id)]

    # --- hits, and too many of them ----------------------------------------------------------------------------------

    def _hits_counted(self, event: HitsCounted) -> list[Effect]:
        hits = event.hits + event.lost
        for claim in self.books.riders.get(event.resource_id, ()):
            record = self.books.claims[claim.claim_id]
            record.hits += hits
            record.lost += event.lost
        guard = self._guards.get(event.resource_id)
        if guard is None:
            return []
        refill = guard.count(hits, event.now_ns)
        if refill is None:
            return self._flooded(event.now_ns, event.resource_id)
        return [TopUp(event.resource_id, refill)] if refill else []

    def _fuse_blown(self, event: FuseBlown) -> list[Effect]:
        return self._flooded(event.now_ns, event.resource_id) if event.resource_id in self._guards else []

    def _flooded(self, now_ns: int, resource_id: int) -> list[Effect]:
        effects: list[Effect] = []
        for claim in self.books.riders.get(resource_id, ()):
            record = self.books.claims[claim.claim_id]
            if record.state is not State.ARMED:
                continue
            sentence = f"silenced: more than {record.guard_per_s} hits a second; it keeps its slot, `rearm` goes on"
            record.state = after(record.state, Step.FLOODED)
            record.story.tell(now_ns, sentence)
            if self._rearm_after_ns:
                record.rearm_at_ns = now_ns + self._rearm_after_ns
                heapq.heappush(self._deadlines, (record.rearm_at_ns, claim.claim_id))
            effects += [Silence(record.resource_ids), Tell(claim, Change.GUARDED, sentence)]
        return effects

    def _rearm_requested(self, event: RearmRequested) -> list[Effect]:
        try:
            record = self._claim_of(event.claim_id, event.by, event.operator, "rearm")
            if record.state is not State.GUARDED:
                raise BadClaim(f"claim {event.claim_id} is {record.state}; only a guarded one is to be armed again")
        except HwbpError as refusal:
            return [_refuse(event, refusal)]
        self._rearming[event.claim_id] = event.by, event.request_id
        return self._rearm(event.now_ns, record)

    def _tick(self, event: Tick) -> list[Effect]:
        effects: list[Effect] = []
        while self._deadlines and self._deadlines[0][0] <= event.now_ns:
            when_ns, claim_id = heapq.heappop(self._deadlines)
            record = self.books.claims.get(claim_id)
            # It may have been armed again meanwhile, and flooded again: then a later deadline counts.
            if record is not None and record.state is State.GUARDED and record.rearm_at_ns == when_ns:
                effects += self._rearm(event.now_ns, record)
        return effects

    def _rearm(self, now_ns: int, record: ClaimRecord) -> list[Effect]:
        record.state = after(record.state, Step.REARM)
        for resource_id in record.resource_ids:
            self._guards[resource_id] = Guard(record.guard_per_s, now_ns)
        return [Rearm(record.claim.claim_id, record.resource_ids, record.guard_per_s)]

    def _rearmed(self, event: Rearmed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        record.state = after(record.state, Step.ARMED)
        record.story.tell(event.now_ns, "reports again")
        told: list[Effect] = [Tell(record.claim, Change.RESUMED, "it reports again")]
        asked = self._rearming.pop(event.claim_id, None)
        return told if asked is None else [*told, RearmDone(record.claim, *asked)]

    def _rearm_failed(self, event: RearmFailed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        name = errno.errorcode.get(event.errno, str(event.errno))
        sentence = f"its slot was taken by somebody else while it was armed again ({name})"
        refused: list[Effect] = []
        if event.claim_id in self._rearming:
            to, request_id = self._rearming.pop(event.claim_id)
            refused.append(Refuse(to, request_id, NoResources(sentence), event.claim_id))
        return [*refused, *self._release(event.now_ns, record, _Ending(End.STOLEN, sentence))]

    # --- CPUs that come and go ---------------------------------------------------------------------------------------

    def _cpu_went_offline(self, event: CpuWentOffline) -> list[Effect]:
        effects: list[Effect] = []
        for resource_id in self.books.resources_on(event.cpu):
            if event.cpu in self.books.absent.get(resource_id, ()):
                continue
            self.books.leave(resource_id, event.cpu)
            effects.append(DropLeg(resource_id, event.cpu))
            sentence = f"cpu {event.cpu} went offline; the slot there is free, and is taken again when it is back"
            effects += self._tell_riders(event.now_ns, resource_id, Change.OFFLINE, sentence, event.cpu)
        self.books.go_offline(event.cpu)
        return effects

    def _cpu_came_online(self, event: CpuCameOnline) -> list[Effect]:
        self.books.come_online(event.cpu)
        effects: list[Effect] = []
        for resource_id in self.books.resources_on(event.cpu):
            piece = self.books.resources[resource_id].piece
            try:
                fits(self.books, Target(cpus=(event.cpu,)), Plan((piece,)))
            except HwbpError as refusal:
                sentence = f"cpu {event.cpu} is back, without it: {refusal}"
                effects += self._tell_riders(event.now_ns, resource_id, Change.SUSPENDED, sentence, event.cpu)
                continue
            self.books.come_to(resource_id, event.cpu)
            effects.append(AddLeg(resource_id, event.cpu))
        return effects

    def _leg_taken(self, event: LegTaken) -> list[Effect]:
        sentence = f"cpu {event.cpu} is back, and so is the slot there"
        return self._tell_riders(event.now_ns, event.resource_id, Change.RESUMED, sentence, event.cpu)

    def _leg_refused(self, event: LegRefused) -> list[Effect]:
        self.books.leave(event.resource_id, event.cpu)
        name = errno.errorcode.get(event.errno, str(event.errno))
        sentence = f"cpu {event.cpu} is back, without it: the kernel refused with {name}"
        return self._tell_riders(event.now_ns, event.resource_id, Change.SUSPENDED, sentence, event.cpu)

    def _tell_riders(self, now_ns: int, resource_id: int, change: Change, sentence: str, cpu: int) -> list[Effect]:
        effects: list[Effect] = []
        for claim in self.books.riders.get(resource_id, ()):
            self.books.claims[claim.claim_id].story.tell(now_ns, sentence)
            effects.append(Tell(claim, change, sentence, cpu))
        return effects

    # --- its end -----------------------------------------------------------------------------------------------------

    def _release_requested(self, event: ReleaseRequested) -> list[Effect]:
        try:
            record = self._claim_of(event.claim_id, event.by, event.operator, "release")
        except HwbpError as refusal:
            return [_refuse(event, refusal)]
        if record.claim.owner.session_id == event.by.session_id:
            ending = _Ending(End.RELEASED, "released by its owner", event.by, event.request_id)
        else:
            ending = _Ending(End.FORCED, f"released by {event.by}, uid {event.by.uid}", event.by, event.request_id)
        return self._release(event.now_ns, record, ending)

    def _claim_of(self, claim_id: int, by: Owner, operator: bool, verb: str) -> ClaimRecord:
        """Return a claim that ``by`` may do something to; raises what refuses it."""
        record = self.books.claims.get(claim_id)
        if record is None or record.state not in SETTLED:
            over = f"claim {claim_id} is over" if claim_id in self.books.ended else None
            raise NoSuchClaim(over or f"there is no claim {claim_id}; `hwbpctl ls` lists those there are")
        owner = record.claim.owner
        if owner.session_id != by.session_id and not operator:
            raise NotPermitted(f"claim {claim_id} belongs to {owner}; only that session, or root, may {verb} it")
        return record

    def _target_ended(self, event: TargetEnded) -> list[Effect]:
        effects: list[Effect] = []
        for claim in self.books.riders.get(event.resource_id, ()):
            record = self.books.claims[claim.claim_id]
            if record.state in SETTLED:
                how = End.EXEC if event.execed else End.EXIT
                what = "runs another program now" if event.execed else "has exited"
                effects += self._release(event.now_ns, record, _Ending(how, f"{claim.target} {what}"))
        return effects

    def _session_ended(self, event: SessionEnded) -> list[Effect]:
        return self._release_all(event.now_ns, self.books.sessions.get(event.session_id, ()), End.SESSION, event.reason)

    def _stopping(self, event: Stopping) -> list[Effect]:
        return self._release_all(event.now_ns, self.books.claims, End.STOPPING, event.reason)

    def _release_all(self, now_ns: int, claim_ids: Iterable[int], how: End, reason: str) -> list[Effect]:
        effects: list[Effect] = []
        for claim_id in tuple(claim_ids):
            record = self.books.claims[claim_id]
            if record.state is State.ATTRIBUTING:  # it holds nothing, and nobody waits for the answer any more
                record.state = after(record.state, Step.ATTRIBUTED)
                self._asked.pop(claim_id)
                self._no_room_at.pop(claim_id)
                self.books.close_claim(record)
            else:
                effects += self._release(now_ns, record, _Ending(how, reason))
        return effects

    def _release(self, now_ns: int, record: ClaimRecord, ending: _Ending) -> list[Effect]:
        claim_id = record.claim.claim_id
        record.state = after(record.state, Step.RELEASE)
        record.story.tell(now_ns, f"its end: {ending.sentence}")
        self._endings[claim_id] = ending
        return [Disarm(claim_id, record.resource_ids)]

    def _give_back(self, record: ClaimRecord) -> None:
        for resource_id in record.resource_ids:
            self.books.give_back(resource_id)
            self._guards.pop(resource_id, None)
        record.resource_ids = ()

    def _disarmed(self, event: Disarmed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        ending = self._endings.pop(event.claim_id)
        unroutes: list[Effect] = [Unroute(resource_id, event.claim_id) for resource_id in record.resource_ids]
        self._give_back(record)
        record.hits, record.lost = event.totals.hits, event.totals.lost
        record.state = after(record.state, Step.DISARMED)
        record.story.tell(event.now_ns, f"its slots are free, after {event.totals.hits} hits")
        self.books.close_claim(record)
        told = Ended(record.claim, ending.how, ending.sentence, event.totals, ending.asked_by, ending.request_id)
        return [*unroutes, told]


def _refuse(event: ReleaseRequested | RearmRequested, refusal: HwbpError) -> Refuse:
    claim_id = 0 if isinstance(refusal, NoSuchClaim) else event.claim_id
    return Refuse(event.by, event.request_id, refusal, claim_id)


def describe(claim: Claim) -> str:
    """The claim in perf's syntax with its target: ``mem:0x404040/8:w on tid 812 as perf``."""
    span = f"mem:{claim.span.address:#x}/{claim.span.length_bytes}:{claim.access.letters}"
    user, kernel = claim.mode.user, claim.mode.kernel
    modifiers = "" if user and kernel else ":u" if user else ":k" if kernel else ""
    return f"{span}{modifiers} for {claim.target} as {claim.kind}"


def kernel_refusal(record: ClaimRecord, event: ArmFailed) -> HwbpError:
    """
    Turn an errno of the kernel, other than ENOSPC, into a refusal.

    EINVAL means that the backend promised what the kernel does not accept: our own mistake, told as it is, or a rule of
    that one kernel, which forbids some addresses of its own.
    """
    what = describe(record.claim)
    name = errno.errorcode.get(event.errno, f"errno {event.errno}")
    where = " on ".join(
        name for name in (event.tid and f"tid {event.tid}", event.cpu is not None and f"cpu {event.cpu}") if name
    ) or "the target"
    match event.errno:
        case errno.ESRCH:
            return TargetGone(f"{where} does not exist any more")
        case errno.ENODEV:
            return CpuOffline(f"{where} is offline")
        case errno.EMFILE if event.needed:
            pieces = len(record.plan.pieces)
            return NoResources(
                f"{what} takes {event.needed * pieces} descriptors, one for each thread on each cpu, and the daemon "
                f"may open {event.allowed} more; claim cpu-wide on all cpus, filtered by process, instead"
            )
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM:
            return NoResources(f"the daemon has no descriptors or ring memory left ({name}) for {what}")
        case errno.EACCES | errno.EPERM:
            return NotPermitted(event.sentence or f"the kernel does not let the daemon arm {what} ({name})")
        case errno.EINVAL:
            return BadClaim(
                f"the kernel does not accept {what} (EINVAL): it forbids some addresses of its own, and where it is "
                "none of those, the backend should have said so"
            )
        case _:
            return NotSupported(f"the kernel refused {what} on {where} with {name}")
