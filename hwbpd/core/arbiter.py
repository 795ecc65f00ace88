"""
``step(event) -> effects``: everything is decided here, one event at a time, in the order in which events come.

Pure and deterministic: the same events from the same start lead to the same state and the same effects. No peer can
make it raise; an assertion that fails here is our own mistake.

The order of things for a claim: ``placing.py`` decides, the books count the slots, the machine is asked, and only its
answer is told to the owner. For a release: the machine gives the slots back, then the books do, then the owner hears of
it, then those who wait for the room. The books therefore never show less than the kernel counts.

This file has claims from request to end; giving way, tracers, floods and CPUs have files of their own (``desk.py``).
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from hwbpd.core.admission import refused_by_the_kernel
from hwbpd.core.books import ClaimRecord
from hwbpd.core.desk import Ending, done, refuse, totals_of
from hwbpd.core.effects import Attribute, Effect, End, Ended, Refuse, Unroute
from hwbpd.core.errors import (
    BadClaim,
    CpuOffline,
    HwbpError,
    NoResources,
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
    NotLoaded,
    Probed,
    Rearmed,
    RearmFailed,
    RearmRequested,
    ReleaseRequested,
    SessionEnded,
    Stopping,
    Suspended,
    TakeFailed,
    TakenReported,
    TakingRequested,
    TargetEnded,
    Tick,
    VcpuCame,
    VcpuWent,
    YieldRequested,
)
from hwbpd.core.floods import Floods
from hwbpd.core.giving_way import GivingWay
from hwbpd.core.hotplug import Hotplug
from hwbpd.core.lifecycle import ARMED_BY_US, QUEUED, State, Step, after
from hwbpd.core.model import ArmedBy, Claim, Pool
from hwbpd.core.policy import Policy
from hwbpd.core.tracers import Tracers
from hwbpd.core.worlds import Worlds


class _Asked(Struct, frozen=True):
    """How a story begins."""

    claim: Claim

    def __str__(self) -> str:
        return f"{self.claim.owner} asked for {describe(self.claim)}"


class Arbiter(Worlds, GivingWay, Tracers, Floods, Hotplug):
    """
    The core of the daemon.

    :param slots: how many slots each pool has on a CPU.
    :param possible: every CPU that may ever come online; :param online: those that are.
    :param slots_on: of CPUs that have other numbers of slots, how many.
    :param rearm_after_ns: how long a flooded claim stays silent before it is armed again by itself; 0 for ever.
    """

    def __init__(
        self,
        slots: Mapping[Pool, int],
        possible: Iterable[int],
        online: Iterable[int],
        rearm_after_ns: int = 0,
        policy: Policy | None = None,
        slots_on: Mapping[int, Mapping[Pool, int]] | None = None,
    ) -> None:
        super().__init__(slots, possible, online, rearm_after_ns, policy, slots_on)
        self._no_room_at: dict[int, int | None] = {}  # claim being attributed -> the CPU where the kernel refused
        self._rearming = {}
        self._together = {}
        self._half_taken = {}
        self._robbed = {}
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
            CpuWentOffline: self._cpu_is_gone,
            CpuCameOnline: self._cpu_is_back,
            LegTaken: self._leg_taken,
            LegRefused: self._leg_is_not_back,
            YieldRequested: self._yield_requested,
            Suspended: self._suspended,
            TakingRequested: self._taking_requested,
            TakenReported: self._taken_reported,
            TakeFailed: self._take_failed,
            Probed: self._probed,
            ReleaseRequested: self._release_requested,
            Disarmed: self._disarmed,
            TargetEnded: self._target_ended,
            VcpuCame: self._vcpu_came,
            VcpuWent: self._vcpu_went,
            NotLoaded: self._not_loaded,
            SessionEnded: self._session_ended,
            Tick: self._tick,
            Stopping: self._stopping,
        }

    def step(self, event: AnyEvent) -> list[Effect]:
        """Take one event; return what the shell must now do, in order."""
        return self._steps[type(event)](event)

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
            priority=event.priority,
            wait_until_ns=event.wait_until_ns,
            armed_by=event.armed_by,
            placeholder=event.placeholder,
        )
        record = ClaimRecord(claim, event.plan)
        record.guard_per_s = event.guard_per_s
        record.story.tell(event.now_ns, _Asked(claim))
        self.books.open_claim(record)
        self._asked[claim.claim_id] = event.request_id
        return self._try(event.now_ns, record)

    def _armed(self, event: Armed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        claim, resumed = record.claim, record.state is State.RESUMING
        takes_at_once = claim.armed_by is ArmedBy.TRACER and not claim.placeholder
        record.state = after(record.state, Step.ARMED)
        if takes_at_once:
            record.state = after(record.state, Step.TAKE)
        what_now = "its tracer takes it now" if takes_at_once else "the kernel has taken the slots"
        record.story.tell(event.now_ns, f"{'resumed' if resumed else 'granted'}: {what_now}")
        granted = self._granted(record, resumed)
        return [*granted, *self._serve_alike(event.now_ns, record)]

    def _arm_failed(self, event: ArmFailed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        claim = record.claim
        resumed = record.state is State.RESUMING
        effects: list[Effect] = []
        self._undo(record)
        if event.errno == errno.ENOSPC and resumed:
            record.state = after(record.state, Step.NO_ROOM)
            record.story.tell(event.now_ns, "the kernel has no room although the books have: it goes on waiting")
            self.queue.add(record)
            self._retry_later(event.now_ns, record)
            return self._serve(event.now_ns, claim.target, refused_too=False)
        if event.errno == errno.ENOSPC:
            record.state = after(record.state, Step.NO_ROOM)
            record.story.tell(event.now_ns, "the kernel has no room although the books have: looking who is in the way")
            self._no_room_at[event.claim_id] = event.cpu
            pool = record.plan.pieces[0].pool
            effects.append(Attribute(event.claim_id, pool, claim.target, event.cpu))
        elif resumed:
            refusal = kernel_refusal(record, event)
            record.state = after(record.state, Step.ARM_FAILED)
            record.story.tell(event.now_ns, f"its end: it could not be armed again: {refusal}")
            self.books.close_claim(record)
            how = End.EXIT if event.errno == errno.ESRCH else End.STOLEN
            effects.append(Ended(claim, how, str(refusal), totals_of(record), refusal=refusal))
        else:
            record.state = after(record.state, Step.ARM_FAILED)
            effects += self._refuse(event.now_ns, record, kernel_refusal(record, event))
        return [*effects, *self._serve(event.now_ns, claim.target, refused_too=False)]

    def _undo(self, record: ClaimRecord) -> None:
        """Take what was counted for a claim out of the books again; what it rides on goes on without it."""
        claim_id = record.claim.claim_id
        own, shared = self._split(record)
        for resource_id in shared:
            self.books.get_off(resource_id, claim_id)
        self._let_go(record, own)

    def _foreign_found(self, event: ForeignFound) -> list[Effect]:
        if event.claim_id in self._robbed:
            return self._robber_found(event.claim_id, event.holders)
        record = self.books.claims.get(event.claim_id)
        if record is None or record.state is not State.ATTRIBUTING:
            return []  # its session ended meanwhile
        claim = record.claim
        cpu = self._no_room_at.pop(event.claim_id)
        refusal = refused_by_the_kernel(self.books, claim.target, record.plan, cpu, event.holders)
        if claim.wait_until_ns > event.now_ns and not record.has_displaced:
            self._retry_later(event.now_ns, record)
            return self._wait(event.now_ns, record, refusal)
        record.state = after(record.state, Step.ATTRIBUTED)
        return self._refuse(event.now_ns, record, refusal)

    def _refuse(self, now_ns: int, record: ClaimRecord, refusal: HwbpError) -> list[Effect]:
        claim = record.claim
        record.story.tell(now_ns, f"refused by the kernel: {refusal}")
        self.books.close_claim(record)
        contended = self._contended(now_ns, claim, refusal)
        if claim.claim_id in self._asked:
            return [Refuse(claim.owner, self._asked.pop(claim.claim_id), refusal, claim.claim_id), *contended]
        return [Ended(claim, End.REFUSED, str(refusal), totals_of(record), refusal=refusal), *contended]

    # --- what is due -------------------------------------------------------------------------------------------------

    def _tick(self, event: Tick) -> list[Effect]:
        effects: list[Effect] = []
        while self._deadlines and self._deadlines[0][0] <= event.now_ns:
            when_ns, claim_id = heapq.heappop(self._deadlines)
            record = self.books.claims.get(claim_id)
            if record is not None:
                effects += self._due_now(event.now_ns, when_ns, record)
        return effects

    def _due_now(self, now_ns: int, when_ns: int, record: ClaimRecord) -> list[Effect]:
        """What a claim had planned for then, unless things have changed and it has planned anew."""
        if record.state is State.GUARDED and record.rearm_at_ns == when_ns:
            return self._rearm(now_ns, record)
        if record.state is State.YIELDING and record.yield_by_ns == when_ns:
            record.story.tell(now_ns, "it has not given way in time, and is made to")
            return self._suspend(now_ns, record)
        if record.state is State.WAITING and record.claim.wait_until_ns == when_ns:
            return self._wait_is_over(now_ns, record)
        if record.state in {State.WAITING, State.SUSPENDED} and record.retry_at_ns == when_ns:
            return self._try(now_ns, record)
        return []

    def _cpu_is_back(self, event: CpuCameOnline) -> list[Effect]:
        return [*self._cpu_came_online(event), *self._serve(event.now_ns, None)]

    def _cpu_is_gone(self, event: CpuWentOffline) -> list[Effect]:
        # What was bound to it is in nobody's way there any more.
        return [*self._cpu_went_offline(event), *self._serve(event.now_ns, None)]

    def _leg_is_not_back(self, event: LegRefused) -> list[Effect]:
        return [*self._leg_refused(event), *self._serve(event.now_ns, None)]

    # --- its end -----------------------------------------------------------------------------------------------------

    def _release_requested(self, event: ReleaseRequested) -> list[Effect]:
        try:
            record = self._claim_of(event.claim_id, event.by, event.operator, "release")
            if record.state is State.RESIDUE:
                raise BadClaim(f"{record.claim.target} keeps this slot until it exits or runs another program")
            if record.state is State.TAKING:
                raise BadClaim("its tracer is taking the slot: first say whether it has, `taken` or `take_failed`")
            if record.state is State.TAKEN and record.claim.owner.session_id != event.by.session_id:
                raise BadClaim(f"{record.claim.owner} has this slot by ptrace: nobody else can take it away")
        except HwbpError as refusal:
            return [refuse(event.by, event.request_id, event.claim_id, refusal)]
        if record.claim.owner.session_id == event.by.session_id:
            ending = Ending(End.RELEASED, "released by its owner", event.by, event.request_id)
        else:
            ending = Ending(End.FORCED, f"released by {event.by}, uid {event.by.uid}", event.by, event.request_id)
        if record.state in QUEUED:
            return self._leave_queue(event.now_ns, record, ending)
        if record.state is State.TAKEN or record.reused:
            return self._leave_behind(event, record, ending)
        return self._release(event.now_ns, record, ending)

    def _leave_behind(self, event: ReleaseRequested, record: ClaimRecord, ending: Ending) -> list[Effect]:
        if record.state is not State.TAKEN:
            record.state = after(record.state, Step.TAKE)  # it was granted what the thread has already
        self._left_behind(event.now_ns, record, ending.sentence)
        told: list[Effect] = []
        if ending.how is End.FORCED:
            told = [Ended(record.claim, ending.how, ending.sentence, totals_of(record))]
        return [*told, done(event.by, event.request_id, "released", event.claim_id)]

    def _target_ended(self, event: TargetEnded) -> list[Effect]:
        effects: list[Effect] = []
        for claim in self.books.riders.get(event.resource_id, ()):
            record = self.books.claims[claim.claim_id]
            if record.state in ARMED_BY_US | {State.TAKING, State.TAKEN, State.RESIDUE}:
                how = End.EXEC if event.execed else End.EXIT
                what = "runs another program now" if event.execed else "has exited"
                effects += self._release(event.now_ns, record, Ending(how, f"{claim.target} {what}"))
        return effects

    def _session_ended(self, event: SessionEnded) -> list[Effect]:
        effects: list[Effect] = []
        self._room_at = []  # nobody who ends in this step shall get what another one gives back
        for claim_id in tuple(self.books.sessions.get(event.session_id, ())):
            record = self.books.claims.get(claim_id)
            if record is None:
                continue  # another's end was its own
            if record.state is State.TAKEN or record.state is State.TAKING:
                effects += self._tracer_gone(event.now_ns, record, event.reason)
            elif record.reused:
                record.state = after(record.state, Step.TAKE)
                self._left_behind(event.now_ns, record, event.reason)
            else:
                effects += self._end(event.now_ns, record, Ending(End.SESSION, event.reason))
        room_at, self._room_at = self._room_at, None
        for target in dict.fromkeys(room_at):
            effects += self._serve(event.now_ns, target)
        return effects

    def _stopping(self, event: Stopping) -> list[Effect]:
        effects: list[Effect] = []
        self._room_at = []  # from now on nobody gets anything
        for record in tuple(self.books.claims.values()):
            effects += self._end(event.now_ns, record, Ending(End.STOPPING, event.reason))
        return effects

    def _end(self, now_ns: int, record: ClaimRecord, ending: Ending) -> list[Effect]:
        if record.state is State.ATTRIBUTING:  # it holds nothing, and nobody waits for the answer any more
            record.state = after(record.state, Step.ATTRIBUTED)
            self._asked.pop(record.claim.claim_id, None)
            self._no_room_at.pop(record.claim.claim_id)
            self.books.close_claim(record)
            return []
        if record.state in QUEUED:
            self._asked.pop(record.claim.claim_id, None)
            return self._leave_queue(now_ns, record, ending)
        return self._release(now_ns, record, ending)

    def _disarmed(self, event: Disarmed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        claim = record.claim
        ending = self._endings.pop(event.claim_id)
        unroutes: list[Effect] = [Unroute(resource_id, event.claim_id) for resource_id in record.resource_ids]
        self._let_go(record, record.resource_ids)
        record.hits, record.lost = event.totals.hits, event.totals.lost
        record.state = after(record.state, Step.DISARMED)
        record.story.tell(event.now_ns, f"its slots are free, after {event.totals.hits} hits")
        self.books.close_claim(record)
        told = Ended(claim, ending.how, ending.sentence, event.totals, ending.asked_by, ending.request_id)
        return [*unroutes, told, *self._gave_way(event.now_ns, record)]


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
