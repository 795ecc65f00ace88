"""
``step(event) -> effects``: everything is decided here, one event at a time, in the order in which events come.

Pure and deterministic: the same events from the same start lead to the same state and the same effects. No peer can
make it raise; an assertion that fails here is our own mistake.

The order of things for a claim: ``fits`` checks, the books count the slots, the machine is asked, and only its answer
is told to the owner. For a release: the machine gives the slots back, then the books do, then the owner hears of it.
The books therefore never show less than the kernel counts.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from hwbpd.core.admission import fits, refused_by_the_kernel
from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.effects import Arm, Disarm, Effect, End, Ended, Grant, Refuse, Route, Unroute
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
    Disarmed,
    HitsCounted,
    ReleaseRequested,
    SessionEnded,
    Stopping,
    TargetExited,
)
from hwbpd.core.lifecycle import State, Step, after
from hwbpd.core.model import Claim, Owner, Piece, Pool, Resource


class _Ending:
    """Why a claim is being released, and who waits to hear of it."""

    __slots__ = ("asked_by", "how", "request_id", "sentence")

    def __init__(self, how: End, sentence: str, asked_by: Owner | None = None, request_id: int = 0) -> None:
        self.how = how
        self.sentence = sentence
        self.asked_by = asked_by
        self.request_id = request_id


class Arbiter:
    """
    The core of the daemon.

    :param slots: how many slots each pool has on a CPU.
    :param possible: every CPU that may ever come online; :param online: those that are.
    """

    def __init__(self, slots: Mapping[Pool, int], possible: Iterable[int], online: Iterable[int]) -> None:
        self.books = Books(slots, possible, online)
        self._last_claim_id = 0
        self._last_resource_id = 0
        self._asked: dict[int, int] = {}  # claim being armed -> the request it answers
        self._endings: dict[int, _Ending] = {}  # claims being released

    def step(self, event: AnyEvent) -> list[Effect]:
        """Take one event; return what the shell must now do, in order."""
        match event:
            case HitsCounted():
                return self._hits_counted(event)
            case ClaimRequested():
                return self._claim_requested(event)
            case Armed():
                return self._armed(event)
            case ArmFailed():
                return self._arm_failed(event)
            case ReleaseRequested():
                return self._release_requested(event)
            case Disarmed():
                return self._disarmed(event)
            case TargetExited():
                return self._target_exited(event)
            case SessionEnded():
                return self._session_ended(event)
            case Stopping():
                return self._stopping(event)

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
        )
        record = ClaimRecord(claim, event.plan)
        record.story.tell(event.now_ns, f"{claim.owner} asked for {describe(claim)}")
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
        record.resource_ids = tuple(resource.resource_id for resource in resources)
        record.state = after(record.state, Step.FITS)
        self.books.open_claim(record)
        self._asked[claim.claim_id] = event.request_id
        return [Arm(claim.claim_id, resources)]

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
        for resource_id in record.resource_ids:
            self.books.give_back(resource_id)
        refusal = kernel_refusal(self.books, record, event)
        record.resource_ids = ()
        record.state = after(record.state, Step.ARM_FAILED)
        record.story.tell(event.now_ns, f"refused by the kernel: {refusal}")
        self.books.close_claim(record)
        return [Refuse(record.claim.owner, self._asked.pop(event.claim_id), refusal, event.claim_id)]

    def _hits_counted(self, event: HitsCounted) -> list[Effect]:
        for claim in self.books.riders.get(event.resource_id, ()):
            record = self.books.claims[claim.claim_id]
            record.hits += event.hits + event.lost
            record.lost += event.lost
        return []

    # --- its end -----------------------------------------------------------------------------------------------------

    def _release_requested(self, event: ReleaseRequested) -> list[Effect]:
        record = self.books.claims.get(event.claim_id)
        if record is None:
            over = f"claim {event.claim_id} is over" if event.claim_id in self.books.ended else None
            missing = NoSuchClaim(over or f"there is no claim {event.claim_id}; `hwbpctl ls` lists those there are")
            return [Refuse(event.by, event.request_id, missing)]
        owner = record.claim.owner
        if owner.session_id == event.by.session_id:
            ending = _Ending(End.RELEASED, "released by its owner", event.by, event.request_id)
        elif event.operator:
            ending = _Ending(End.FORCED, f"released by {event.by}, uid {event.by.uid}", event.by, event.request_id)
        else:
            sentence = f"claim {event.claim_id} belongs to {owner}; only that session, or root, may release it"
            return [Refuse(event.by, event.request_id, NotPermitted(sentence), event.claim_id)]
        return self._release(event.now_ns, record, ending)

    def _target_exited(self, event: TargetExited) -> list[Effect]:
        effects: list[Effect] = []
        for claim in self.books.riders.get(event.resource_id, ()):
            record = self.books.claims[claim.claim_id]
            if record.state is State.ARMED:
                effects += self._release(event.now_ns, record, _Ending(End.EXIT, f"{claim.target} has exited"))
        return effects

    def _session_ended(self, event: SessionEnded) -> list[Effect]:
        return self._release_all(event.now_ns, self.books.sessions.get(event.session_id, ()), End.SESSION, event.reason)

    def _stopping(self, event: Stopping) -> list[Effect]:
        return self._release_all(event.now_ns, self.books.claims, End.STOPPING, event.reason)

    def _release_all(self, now_ns: int, claim_ids: Iterable[int], how: End, reason: str) -> list[Effect]:
        effects: list[Effect] = []
        for claim_id in tuple(claim_ids):
            effects += self._release(now_ns, self.books.claims[claim_id], _Ending(how, reason))
        return effects

    def _release(self, now_ns: int, record: ClaimRecord, ending: _Ending) -> list[Effect]:
        claim_id = record.claim.claim_id
        record.state = after(record.state, Step.RELEASE)
        record.story.tell(now_ns, f"its end: {ending.sentence}")
        self._endings[claim_id] = ending
        return [Disarm(claim_id, record.resource_ids)]

    def _disarmed(self, event: Disarmed) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        ending = self._endings.pop(event.claim_id)
        unroutes: list[Effect] = [Unroute(resource_id, event.claim_id) for resource_id in record.resource_ids]
        for resource_id in record.resource_ids:
            self.books.give_back(resource_id)
        record.resource_ids = ()
        record.hits, record.lost = event.totals.hits, event.totals.lost
        record.state = after(record.state, Step.DISARMED)
        record.story.tell(event.now_ns, f"its slots are free, after {event.totals.hits} hits")
        self.books.close_claim(record)
        told = Ended(record.claim, ending.how, ending.sentence, event.totals, ending.asked_by, ending.request_id)
        return [*unroutes, told]


def describe(claim: Claim) -> str:
    """The claim in perf's syntax with its target: ``mem:0x404040/8:w on tid 812 as perf``."""
    span = f"mem:{claim.span.address:#x}/{claim.span.length_bytes}:{claim.access.letters}"
    user, kernel = claim.mode.user, claim.mode.kernel
    modifiers = "" if user and kernel else ":u" if user else ":k" if kernel else ""
    return f"{span}{modifiers} for {claim.target} as {claim.kind}"


def kernel_refusal(books: Books, record: ClaimRecord, event: ArmFailed) -> HwbpError:
    """
    Turn the kernel's errno into a refusal. The claim's own slots are out of the books by now.

    ENOSPC after our own rule said yes means that somebody outside hwbpd holds slots there. EINVAL means that the
    backend promised what the kernel does not accept: our own mistake, told as it is.
    """
    what = describe(record.claim)
    name = errno.errorcode.get(event.errno, f"errno {event.errno}")
    where = " on ".join(
        name for name in (event.tid and f"tid {event.tid}", event.cpu is not None and f"cpu {event.cpu}") if name
    ) or "the target"
    match event.errno:
        case errno.ENOSPC:
            return refused_by_the_kernel(books, record.claim.target, record.plan, event.cpu)
        case errno.ESRCH:
            return TargetGone(f"{where} does not exist any more")
        case errno.ENODEV:
            return CpuOffline(f"{where} is offline")
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM:
            return NoResources(f"the daemon has no descriptors or ring memory left ({name}) for {what}")
        case errno.EACCES | errno.EPERM:
            return NotPermitted(f"the kernel does not let the daemon arm {what} ({name})")
        case errno.EINVAL:
            return BadClaim(f"the kernel does not accept {what}; the backend should have said so")
        case _:
            return NotSupported(f"the kernel refused {what} on {where} with {name}")
