"""
Hits, and too many of them.

A flood silences a resource, and so every claim that rides on it; each of them keeps its slots. Whoever lets one of them
report again does so for all, as the resource is one.
"""

from __future__ import annotations

import errno

from hwbpd.core.books import ClaimRecord
from hwbpd.core.desk import Desk, Ending, refuse
from hwbpd.core.effects import Change, Effect, End, Rearm, RearmDone, Refuse, Silence, Tell, TopUp
from hwbpd.core.errors import BadClaim, HwbpError, NoResources
from hwbpd.core.events import FuseBlown, HitsCounted, Rearmed, RearmFailed, RearmRequested
from hwbpd.core.guard import Guard
from hwbpd.core.lifecycle import State, Step, after
from hwbpd.core.model import Owner


class Floods(Desk):
    """See the file."""

    _rearming: dict[int, tuple[Owner, int]]  # claim -> who asked for it, with which request
    _together: dict[int, tuple[ClaimRecord, ...]]  # claim being armed again -> all that report again with it

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
                self._due(record.rearm_at_ns, claim.claim_id)
            effects += [Silence(record.resource_ids), Tell(claim, Change.GUARDED, sentence)]
        return effects

    def _rearm_requested(self, event: RearmRequested) -> list[Effect]:
        try:
            record = self._claim_of(event.claim_id, event.by, event.operator, "rearm")
            if record.state is not State.GUARDED:
                raise BadClaim(f"claim {event.claim_id} is {record.state}; only a guarded one is to be armed again")
        except HwbpError as refusal:
            return [refuse(event.by, event.request_id, event.claim_id, refusal)]
        self._rearming[event.claim_id] = event.by, event.request_id
        return self._rearm(event.now_ns, record)

    def _rearm(self, now_ns: int, record: ClaimRecord) -> list[Effect]:
        together, resource_ids = self._silenced_with(record)
        for one in together:
            one.state = after(one.state, Step.REARM)
        for resource_id in resource_ids:
            self._guards[resource_id] = Guard(record.guard_per_s, now_ns)
        self._together[record.claim.claim_id] = together
        return [Rearm(record.claim.claim_id, resource_ids, record.guard_per_s)]

    def _silenced_with(self, record: ClaimRecord) -> tuple[tuple[ClaimRecord, ...], tuple[int, ...]]:
        """The guarded claims that share resources with this one, directly or through others, and all they have."""
        together = {record.claim.claim_id: record}
        resource_ids: dict[int, None] = {}
        todo = [record]
        while todo:
            for resource_id in todo.pop().resource_ids:
                resource_ids[resource_id] = None
                for rider in self.books.riders[resource_id]:
                    other = self.books.claims[rider.claim_id]
                    if rider.claim_id not in together and other.state is State.GUARDED:
                        together[rider.claim_id] = other
                        todo.append(other)
        return tuple(together.values()), tuple(resource_ids)

    def _rearmed(self, event: Rearmed) -> list[Effect]:
        effects: list[Effect] = []
        for record in self._together.pop(event.claim_id):
            record.state = after(record.state, Step.ARMED)
            effects.append(self._tell(event.now_ns, record, Change.RESUMED, "it reports again"))
        asked = self._rearming.pop(event.claim_id, None)
        if asked is not None:
            effects.append(RearmDone(self.books.claims[event.claim_id].claim, *asked))
        return effects

    def _rearm_failed(self, event: RearmFailed) -> list[Effect]:
        name = errno.errorcode.get(event.errno, str(event.errno))
        sentence = f"its slot was taken by somebody else while it was armed again ({name})"
        effects: list[Effect] = []
        if event.claim_id in self._rearming:
            to, request_id = self._rearming.pop(event.claim_id)
            effects.append(Refuse(to, request_id, NoResources(sentence), event.claim_id))
        for record in self._together.pop(event.claim_id):
            effects += self._release(event.now_ns, record, Ending(End.STOLEN, sentence))
        return effects
