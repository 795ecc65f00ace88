"""
Claims that their owner arms by ptrace.

1. The daemon holds the place: by a *placeholder*, a disabled event, from the grant until the tracer is about to take it
   (``taking``), or in the books alone where the tracer takes it at once.
2. The tracer pokes its debug registers and says ``taken`` or ``take_failed``. With ENOSPC somebody outside was faster,
   and it is looked who.
3. The kernel keeps such a slot until the thread exits or runs another program, whatever its tracer does. So what is
   released then is *residue*: in the books, without an owner, for the next tracer of that thread to reuse.
4. A tracer that dies between taking and taken may have taken it or not; the thread is looked at. So it is where a
   tracer fails to take one of several slots: it may have taken others.
"""

from __future__ import annotations

import errno

from hwbpd.core.books import ClaimRecord
from hwbpd.core.desk import Desk, Ending, done, refuse
from hwbpd.core.effects import Attribute, Change, Effect, End, Handover, Probe, Tell
from hwbpd.core.errors import BadClaim, Holder, HwbpError
from hwbpd.core.events import Probed, TakeFailed, TakenReported, TakingRequested
from hwbpd.core.lifecycle import State, Step, after
from hwbpd.core.model import ArmedBy, Claim, Owner


class Tracers(Desk):
    """See the file."""

    _half_taken: dict[int, str]  # claims whose tracer failed at one of several slots, while it is looked
    _robbed: dict[int, Claim]  # claims over whose slot somebody outside has taken, while it is looked who

    def _tracers_claim(self, claim_id: int, by: Owner, state: State, verb: str) -> ClaimRecord:
        record = self._claim_of(claim_id, by, False, verb)
        if record.claim.armed_by is not ArmedBy.TRACER or record.state is not state:
            by_whom = f"armed by its {record.claim.armed_by}"
            raise BadClaim(f"claim {claim_id} is {record.state}, {by_whom}: nothing to {verb}")
        return record

    def _taking_requested(self, event: TakingRequested) -> list[Effect]:
        try:
            record = self._tracers_claim(event.claim_id, event.by, State.ARMED, "take")
        except HwbpError as refusal:
            return [refuse(event.by, event.request_id, event.claim_id, refusal)]
        record.state = after(record.state, Step.TAKE)
        record.story.tell(event.now_ns, "its tracer is about to take the slot")
        placeholders = tuple(one for one in record.resource_ids if one not in record.reused)
        handover: list[Effect] = [Handover(event.claim_id, placeholders)] if placeholders else []
        return [*handover, done(event.by, event.request_id, "take", event.claim_id)]

    def _taken_reported(self, event: TakenReported) -> list[Effect]:
        try:
            record = self._tracers_claim(event.claim_id, event.by, State.TAKING, "have taken")
        except HwbpError as refusal:
            return [refuse(event.by, event.request_id, event.claim_id, refusal)]
        record.state = after(record.state, Step.TAKEN)
        record.story.tell(event.now_ns, "its tracer has the slot")
        return [done(event.by, event.request_id, "taken", event.claim_id)]

    def _take_failed(self, event: TakeFailed) -> list[Effect]:
        try:
            record = self._tracers_claim(event.claim_id, event.by, State.TAKING, "fail to take")
        except HwbpError as refusal:
            return [refuse(event.by, event.request_id, event.claim_id, refusal)]
        name = errno.errorcode.get(event.errno, f"errno {event.errno}")
        if record.reused:  # the slot was there before, and is there still
            self._left_behind(event.now_ns, record, f"its tracer could not take it: {name}")
            return [done(event.by, event.request_id, "take_failed", event.claim_id)]
        claim, pool = record.claim, record.plan.pieces[0].pool
        sentence = f"its tracer could not take it: {name}"
        if len(record.resource_ids) > 1:  # it may have taken some, and the thread keeps those
            self._half_taken[event.claim_id] = sentence
            effects = self._look_whether_taken(event.now_ns, record, sentence)
        else:
            effects = self._release(event.now_ns, record, Ending(End.TAKE_FAILED, sentence))
        effects.append(done(event.by, event.request_id, "take_failed", event.claim_id))
        if event.errno == errno.ENOSPC:
            self._robbed[event.claim_id] = claim
            effects.append(Attribute(event.claim_id, pool, claim.target, None))
        return effects

    def _robber_found(self, claim_id: int, holders: tuple[Holder, ...]) -> list[Effect]:
        claim = self._robbed.pop(claim_id)
        who = ", ".join(map(str, holders)) or "somebody outside hwbpd who could not be found"
        return [Tell(claim, Change.FOREIGN, f"the slot was taken first, by {who}", holders=holders)]

    def _left_behind(self, now_ns: int, record: ClaimRecord, sentence: str) -> None:
        """The thread keeps the slot; nobody owns it."""
        record.state = after(record.state, Step.LEFT_BEHIND)
        record.story.tell(now_ns, f"{sentence}; the thread keeps the slot until it exits or runs another program")
        self.books.leave_session(record)

    def _tracer_gone(self, now_ns: int, record: ClaimRecord, reason: str) -> list[Effect]:
        """The session of a claim ended that its tracer has, or was about to take."""
        if record.state is State.TAKEN:
            self._left_behind(now_ns, record, reason)
            return []
        effects = self._look_whether_taken(now_ns, record, f"{reason} while its tracer was about to take the slot")
        self.books.leave_session(record)
        return effects

    def _look_whether_taken(self, now_ns: int, record: ClaimRecord, sentence: str) -> list[Effect]:
        claim, pool = record.claim, record.plan.pieces[0].pool
        assert claim.target.task is not None
        record.story.tell(now_ns, f"{sentence}: looking whether the thread has a slot more")
        return [Probe(claim.claim_id, claim.target, pool, self.books.taken_of(claim.target.task, pool))]

    def _probed(self, event: Probed) -> list[Effect]:
        record = self.books.claims.get(event.claim_id)
        if record is None or record.state is not State.TAKING:
            return []
        failure = self._half_taken.pop(event.claim_id, None)
        if event.has_slot:
            # Of several slots perhaps not all; the books must not show less than the kernel counts.
            self._left_behind(event.now_ns, record, failure or "it was taken")
            return []
        if failure is not None:
            return self._release(event.now_ns, record, Ending(End.TAKE_FAILED, failure))
        return self._release(event.now_ns, record, Ending(End.SESSION, "its tracer has gone without taking it"))
