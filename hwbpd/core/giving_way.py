"""
Waiting, giving way, and coming back: the life of a claim in the queue.

1. A claim that has to give way is told by whom, why and until when (``revoke``). It yields, or is made to at the
   deadline; kgdb asks nobody. Then it is *suspended*: it holds nothing, and waits in its old place.
2. When the last of those who give way has, the claim that displaced them is tried at once. Should it fail, or be gone
   by then, they come back first; those that have not given way yet are *spared*.
3. Whenever room comes back, those in the queue that could use it are tried, best rank first and oldest first.
4. A wait ends at its deadline, a displacement when its victims have given way: nobody waits for ever but the suspended.
"""

from __future__ import annotations

from hwbpd.core.books import ClaimRecord
from hwbpd.core.desk import Desk, Ending, done, refuse, totals_of
from hwbpd.core.effects import (
    Arm,
    Attend,
    Change,
    Effect,
    End,
    Ended,
    Grant,
    Queued,
    Refuse,
    Route,
    Suspend,
    Tell,
    Unroute,
)
from hwbpd.core.errors import BadClaim, HeldBack, HwbpError, WaitTimedOut
from hwbpd.core.events import Suspended, YieldRequested
from hwbpd.core.guard import Guard
from hwbpd.core.lifecycle import QUEUED, State, Step, after
from hwbpd.core.model import ArmedBy, Claim, Kind, Target, Totals
from hwbpd.core.placing import Placement, holder_of, may_have_room, place

_FITS = {State.SUSPENDED: Step.RESUME}  # from all other states it is a first time


class GivingWay(Desk):
    """See the file."""

    # --- trying ------------------------------------------------------------------------------------------------------

    def _try(self, now_ns: int, record: ClaimRecord) -> list[Effect]:
        """Give a claim what it wants if there is room, else decide what becomes of it."""
        only_waits = record.state is State.SUSPENDED or record.state is State.WAITING
        if only_waits and not may_have_room(self.books, record.claim, record.plan, self.policy):
            return []
        placement = place(self.books, self.queue, record.claim, record.plan, self.policy)
        if placement.refusal is None:
            return self._begin(now_ns, record, placement)
        if only_waits:
            return []  # it goes on waiting
        if placement.victims:
            return self._displace(now_ns, record, placement)
        if record.claim.wait_until_ns > now_ns and not placement.hopeless:
            return self._wait(now_ns, record, placement.refusal)
        return self._give_up(now_ns, record, placement.refusal)

    def _begin(self, now_ns: int, record: ClaimRecord, placement: Placement) -> list[Effect]:
        """There is room: count it, and have it armed."""
        claim = record.claim
        claim_id = claim.claim_id
        resumed = record.state is State.SUSPENDED
        was_queued = record.state in QUEUED
        if was_queued:
            self.queue.remove(claim_id)
        resources = tuple(self._resource(claim, piece) for piece in placement.pieces)
        for resource in resources:
            self.books.take(resource, claim)
            if record.guard_per_s:
                self._guards[resource.resource_id] = Guard(record.guard_per_s, now_ns)
        for resource_id in placement.shared:
            self.books.ride(resource_id, claim)
        effects: list[Effect] = []
        for resource_id in placement.reused:
            effects += self._reuse(now_ns, resource_id, record)
        new = tuple(resource.resource_id for resource in resources)
        record.reused = placement.reused
        record.resource_ids = (*placement.shared, *placement.reused, *new)
        record.retry_at_ns = 0
        if not resources:
            record.state = after(record.state, Step.REUSED if placement.reused else Step.RIDES)
            if placement.reused and not claim.placeholder:
                record.state = after(record.state, Step.TAKE)
            how = "its thread has a tracer's slot already" if placement.reused else "it shares what is armed already"
            record.story.tell(now_ns, f"granted without a slot of its own: {how}")
            effects += self._granted(record, resumed)
            # Whom it has held up finds its room free.
            return [*effects, *self._serve(now_ns, claim.target)] if was_queued else effects
        record.state = after(record.state, _FITS.get(record.state, Step.FITS))
        if claim.armed_by is ArmedBy.TRACER and not claim.placeholder:
            return [*effects, Attend(claim, resources)]
        effects.append(Arm(claim, resources))
        # It takes less room than it waited for where it shares some.
        return [*effects, *self._serve(now_ns, claim.target)] if was_queued and placement.shared else effects

    def _reuse(self, now_ns: int, resource_id: int, record: ClaimRecord) -> list[Effect]:
        """What an earlier tracer left behind is this one's."""
        earlier = self.books.claims[self.books.riders[resource_id][0].claim_id]
        self.books.pass_on(resource_id, record.claim)
        earlier.resource_ids = tuple(one for one in earlier.resource_ids if one != resource_id)
        unroute = Unroute(resource_id, earlier.claim.claim_id)
        if earlier.resource_ids:
            return [unroute]
        sentence = f"claim {record.claim.claim_id} of {record.claim.owner} has its slot now"
        earlier.state = after(earlier.state, Step.REUSED)
        earlier.story.tell(now_ns, f"its end: {sentence}")
        self.books.close_claim(earlier)
        return [unroute, Ended(earlier.claim, End.REUSED, sentence, Totals())]

    def _granted(self, record: ClaimRecord, resumed: bool) -> list[Effect]:
        """Route its hits and tell its owner, as the answer to the request or unasked."""
        claim = record.claim
        routes: list[Effect] = [Route(resource_id, claim) for resource_id in record.resource_ids]
        if resumed:
            return [*routes, Tell(claim, Change.RESUMED, "it has its slots again")]
        if claim.claim_id in self._asked:
            return [*routes, Grant(claim, self._asked.pop(claim.claim_id), record.plan)]
        return [*routes, Tell(claim, Change.GRANTED, "there is room now", plan=record.plan)]

    # --- waiting -----------------------------------------------------------------------------------------------------

    def _wait(self, now_ns: int, record: ClaimRecord, refusal: HwbpError) -> list[Effect]:
        """Let a claim wait for room."""
        claim = record.claim
        if record.state is State.DISPLACING:
            self.queue.remove(claim.claim_id)
        record.state = after(record.state, Step.MUST_WAIT)
        record.story.tell(now_ns, f"waits: {refusal}")
        self.queue.add(record)
        self._due(claim.wait_until_ns, claim.claim_id)
        effects: list[Effect] = []
        if claim.claim_id in self._asked:
            position = self.queue.position(claim.claim_id)
            effects.append(Queued(claim, self._asked.pop(claim.claim_id), position, refusal))
        return [*effects, *self._contended(now_ns, claim, refusal)]

    def _give_up(self, now_ns: int, record: ClaimRecord, refusal: HwbpError) -> list[Effect]:
        """Refuse a claim, or tell its owner that it has waited in vain."""
        claim = record.claim
        was_queued = record.state in QUEUED
        spared: list[Effect] = []
        if was_queued:
            self.queue.remove(claim.claim_id)
            spared = self._spare(now_ns, record)
        record.state = after(record.state, Step.GIVE_UP if was_queued else Step.DOES_NOT_FIT)
        record.story.tell(now_ns, f"refused: {refusal}")
        self.books.close_claim(record)
        if claim.claim_id in self._asked:
            told: Effect = Refuse(claim.owner, self._asked.pop(claim.claim_id), refusal, claim.claim_id)
        else:
            how = End.TIMEOUT if isinstance(refusal, WaitTimedOut) else End.REFUSED
            told = Ended(claim, how, str(refusal), Totals(), refusal=refusal)
        effects = [told, *spared, *self._contended(now_ns, claim, refusal)]
        return [*effects, *self._serve(now_ns, claim.target)] if was_queued else effects

    def _leave_queue(self, now_ns: int, record: ClaimRecord, ending: Ending) -> list[Effect]:
        """End a claim that holds nothing."""
        claim = record.claim
        self.queue.remove(claim.claim_id)
        spared = self._spare(now_ns, record)
        record.state = after(record.state, Step.LEAVE)
        record.story.tell(now_ns, f"its end: {ending.sentence}")
        self.books.close_claim(record)
        told: list[Effect] = []
        if claim.claim_id in self._asked:
            # To its owner it is a request that was refused, so there is no end to be told of.
            request_id = self._asked.pop(claim.claim_id)
            told.append(Refuse(claim.owner, request_id, HeldBack(ending.sentence), claim.claim_id))
            if ending.asked_by is not None:
                told.append(done(ending.asked_by, ending.request_id, "released", claim.claim_id))
        else:
            totals = totals_of(record)
            told.append(Ended(claim, ending.how, ending.sentence, totals, ending.asked_by, ending.request_id))
        return [*told, *spared, *self._serve(now_ns, claim.target)]

    def _serve(self, now_ns: int, target: Target | None, refused_too: bool = True) -> list[Effect]:
        """
        Room has come back there, or anywhere: try those who could use it.

        :param refused_too: those, too, whom the kernel has refused lately. False where it has just refused somebody.
        """
        effects: list[Effect] = []
        if self._room_at is not None:
            self._room_at.append(target)
        elif len(self.queue):
            for record in self.queue.candidates(target):
                if record.victims or (record.retry_at_ns > now_ns and not refused_too):
                    continue
                if record.claim.claim_id in self.queue:
                    effects += self._try(now_ns, record)
        return effects

    def _serve_alike(self, now_ns: int, record: ClaimRecord) -> list[Effect]:
        """Who waits for the very slots that one has now may share them."""
        effects: list[Effect] = []
        if len(self.queue) and self._room_at is None:
            for piece in record.plan.pieces:
                for other in self.queue.wanting(record.claim.target, piece):
                    if other.claim.claim_id in self.queue and not other.victims:
                        effects += self._try(now_ns, other)
        return effects

    def _wait_is_over(self, now_ns: int, record: ClaimRecord) -> list[Effect]:
        waited = (now_ns - record.claim.requested_ns) / 1e9
        still = place(self.books, self.queue, record.claim, record.plan, self.policy).refusal
        why, holders = (f": {still}", still.holders) if still is not None else ("", ())
        sentence = f"no room came for {record.claim.target} in {waited:.3f} s{why}"
        return self._give_up(now_ns, record, WaitTimedOut(sentence, holders))

    def _retry_later(self, now_ns: int, record: ClaimRecord) -> None:
        """The kernel had no room although the books have."""
        record.retry_at_ns = now_ns + self.policy.retry_ns
        self._due(record.retry_at_ns, record.claim.claim_id)

    # --- giving way --------------------------------------------------------------------------------------------------

    def _displace(self, now_ns: int, record: ClaimRecord, placement: Placement) -> list[Effect]:
        """Ask the victims to give way to a claim."""
        claim = record.claim
        assert placement.refusal is not None
        if record.state is not State.DISPLACING:
            record.state = after(record.state, Step.DISPLACES)
            self.queue.add(record)
        record.has_displaced = True
        record.victims = set(placement.victims)
        names = ", ".join(f"claim {victim}" for victim in placement.victims)
        record.story.tell(now_ns, f"displaces {names}: {placement.refusal}")
        grace_ns = 0 if claim.kind is Kind.KGDB else self.policy.revoke_grace_ns
        effects: list[Effect] = []
        for victim in placement.victims:
            effects += self._revoke(now_ns, self.books.claims[victim], claim, grace_ns)
        return effects

    def _revoke(self, now_ns: int, victim: ClaimRecord, displacer: Claim, grace_ns: int) -> list[Effect]:
        by_ns = now_ns + grace_ns
        victim.displacers.add(displacer.claim_id)
        if victim.state is not State.YIELDING:
            victim.was_guarded = victim.state is State.GUARDED
            victim.state = after(victim.state, Step.REVOKE)
        elif by_ns >= victim.yield_by_ns:
            victim.story.tell(now_ns, f"claim {displacer.claim_id} of {displacer.owner} waits for that, too")
            return []
        victim.yield_by_ns = by_ns
        sentence = f"has to give way to claim {displacer.claim_id} of {displacer.owner}, as {displacer.kind}"
        victim.story.tell(now_ns, sentence)
        told = Tell(
            victim.claim, Change.REVOKE, sentence, holders=(holder_of(displacer),), deadline_ns=victim.yield_by_ns
        )
        if not grace_ns:
            return [told, *self._suspend(now_ns, victim)]
        self._due(victim.yield_by_ns, victim.claim.claim_id)
        return [told]

    def _yield_requested(self, event: YieldRequested) -> list[Effect]:
        try:
            record = self._claim_of(event.claim_id, event.by, False, "let it give way for")
            if record.state is not State.YIELDING:
                raise BadClaim(f"claim {event.claim_id} is {record.state}; it was not asked to give way")
        except HwbpError as refusal:
            return [refuse(event.by, event.request_id, event.claim_id, refusal)]
        return [*self._suspend(event.now_ns, record), done(event.by, event.request_id, "yielded", event.claim_id)]

    def _suspend(self, now_ns: int, record: ClaimRecord) -> list[Effect]:
        claim_id = record.claim.claim_id
        record.state = after(record.state, Step.SUSPEND)
        own, shared = self._split(record)
        for resource_id in shared:
            self.books.get_off(resource_id, claim_id)
        record.resource_ids = own
        return [Suspend(claim_id, own, shared)]

    def _suspended(self, event: Suspended) -> list[Effect]:
        record = self.books.claims[event.claim_id]
        self._let_go(record, record.resource_ids)
        record.state = after(record.state, Step.DISARMED)
        self.queue.add(record)
        sentence = "it has given way, and waits for room in its old place"
        told = self._tell(event.now_ns, record, Change.SUSPENDED, sentence)
        return [told, *self._gave_way(event.now_ns, record)]

    def _gave_way(self, now_ns: int, record: ClaimRecord) -> list[Effect]:
        """One claim less stands in the way of its displacers, because it gave way or has ended."""
        displacers, record.displacers = record.displacers, set()
        effects: list[Effect] = []
        for displacer in self.queue.among(displacers):
            displacer.victims.discard(record.claim.claim_id)
            if not displacer.victims:
                effects += self._try(now_ns, displacer)
        return [*effects, *self._serve(now_ns, record.claim.target)]

    def _spare(self, now_ns: int, displacer: ClaimRecord) -> list[Effect]:
        """Those that have not given way to it yet need not."""
        effects: list[Effect] = []
        for claim_id in sorted(displacer.victims):
            record = self.books.claims.get(claim_id)
            if record is None or record.state is not State.YIELDING:
                continue
            record.displacers.discard(displacer.claim.claim_id)
            if record.displacers:
                continue  # others still ask it to
            record.state = after(record.state, Step.SPARED_GUARDED if record.was_guarded else Step.SPARED)
            effects.append(self._tell(now_ns, record, Change.SPARED, "it need not give way any more"))
        displacer.victims = set()
        return effects
