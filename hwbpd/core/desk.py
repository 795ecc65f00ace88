"""
What the parts of the arbiter share: the books, the queue, who waits for an answer, and what is due when.

The arbiter is one state machine. Its parts are classes only to have a file for each subject: claims and their ends
(``arbiter.py``), giving way (``giving_way.py``), tracers (``tracers.py``), floods (``floods.py``), CPUs that come and
go (``hotplug.py``), the worlds of vCPUs (``worlds.py``).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.effects import Change, Disarm, Done, Effect, End, Refuse, Tell
from hwbpd.core.errors import Holder, HwbpError, NoSuchClaim, NotPermitted
from hwbpd.core.guard import Guard
from hwbpd.core.lifecycle import HALFWAY, State, Step, after
from hwbpd.core.model import Claim, Owner, Piece, Pool, Resource, Target, Totals
from hwbpd.core.placing import holder_of
from hwbpd.core.policy import NS_PER_S, Policy
from hwbpd.core.queue import Queue

CONTENDED_EVERY_NS = NS_PER_S  # an owner is told so often at most that others want its room


class Ending:
    """Why a claim is being released, and who waits to hear of it."""

    __slots__ = ("asked_by", "how", "request_id", "sentence")

    def __init__(self, how: End, sentence: str, asked_by: Owner | None = None, request_id: int = 0) -> None:
        self.how = how
        self.sentence = sentence
        self.asked_by = asked_by
        self.request_id = request_id


class Desk:
    """See ``Arbiter`` for the parameters."""

    def __init__(
        self,
        slots: Mapping[Pool, int],
        possible: Iterable[int],
        online: Iterable[int],
        rearm_after_ns: int = 0,
        policy: Policy | None = None,
        slots_on: Mapping[int, Mapping[Pool, int]] | None = None,
    ) -> None:
        self.books = Books(slots, possible, online, slots_on)
        self.queue = Queue()
        self.policy = Policy() if policy is None else policy
        self._rearm_after_ns = rearm_after_ns
        self._deadlines: list[tuple[int, int]] = []  # (when, claim); what is due then, the claim knows
        self._guards: dict[int, Guard] = {}  # per resource
        self._last_claim_id = 0
        self._last_resource_id = 0
        self._asked: dict[int, int] = {}  # claim whose owner waits for an answer -> the request
        self._endings: dict[int, Ending] = {}  # claims being released
        self._room_at: list[Target | None] | None = None  # where it came back, while many claims end in one step

    def next_deadline_ns(self) -> int | None:
        """When a ``Tick`` is due next, if ever."""
        return self._deadlines[0][0] if self._deadlines else None

    def _due(self, when_ns: int, claim_id: int) -> None:
        heapq.heappush(self._deadlines, (when_ns, claim_id))
        if len(self._deadlines) > 64 + 4 * len(self.books.claims):
            # Most are of claims that are over; who waits and gives up all day long must not fill the memory.
            self._deadlines = [due for due in self._deadlines if due[1] in self.books.claims]
            heapq.heapify(self._deadlines)

    def _claim_of(self, claim_id: int, by: Owner, operator: bool, verb: str) -> ClaimRecord:
        """Return a claim that ``by`` may do something to; raises what refuses it."""
        record = self.books.claims.get(claim_id)
        if record is None or record.state in HALFWAY or record.state is State.ATTRIBUTING:
            over = f"claim {claim_id} is over" if claim_id in self.books.ended else None
            raise NoSuchClaim(over or f"there is no claim {claim_id}; `hwbpctl ls` lists those there are")
        owner = record.claim.owner
        if owner.session_id != by.session_id and not operator:
            raise NotPermitted(f"claim {claim_id} belongs to {owner}; only that session, or root, may {verb} it")
        return record

    def _resource(self, claim: Claim, piece: Piece) -> Resource:
        self._last_resource_id += 1
        return Resource(self._last_resource_id, piece, claim.target, claim.mode)

    def _split(self, record: ClaimRecord) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Its resources that nobody else rides on, and those that others go on with."""
        own = tuple(one for one in record.resource_ids if not self.books.is_shared(one))
        return own, tuple(one for one in record.resource_ids if self.books.is_shared(one))

    def _let_go(self, record: ClaimRecord, resource_ids: Iterable[int]) -> None:
        """Count these as free again; its others are free already, or others'."""
        for resource_id in resource_ids:
            self.books.give_back(resource_id)
            self._guards.pop(resource_id, None)
        record.resource_ids = record.reused = ()

    def _tell(
        self, now_ns: int, record: ClaimRecord, change: Change, sentence: str, holders: tuple[Holder, ...] = ()
    ) -> Tell:
        record.story.tell(now_ns, sentence)
        return Tell(record.claim, change, sentence, holders=holders)

    def _release(self, now_ns: int, record: ClaimRecord, ending: Ending) -> list[Effect]:
        """Begin the end of a claim that holds something."""
        claim_id = record.claim.claim_id
        record.state = after(record.state, Step.RELEASE)
        record.story.tell(now_ns, f"its end: {ending.sentence}")
        self._endings[claim_id] = ending
        own, shared = self._split(record)
        for resource_id in shared:
            self.books.get_off(resource_id, claim_id)
        record.resource_ids = own
        return [Disarm(claim_id, own, shared)]

    def _contended(self, now_ns: int, wanting: Claim, refusal: HwbpError) -> list[Effect]:
        """Tell those in the way that somebody wants their room."""
        effects: list[Effect] = []
        for claim_id in dict.fromkeys(claim_id for holder in refusal.holders for claim_id in holder.claim_ids):
            record = self.books.claims.get(claim_id)
            if record is None or record.claim.owner.session_id == wanting.owner.session_id:
                continue
            if claim_id in self._asked:
                continue  # its owner has not heard yet that there is such a claim
            if record.contended_ns and now_ns - record.contended_ns < CONTENDED_EVERY_NS:
                continue
            record.contended_ns = now_ns
            sentence = f"{wanting.owner} wants its room, as {wanting.kind}"
            effects.append(self._tell(now_ns, record, Change.CONTENDED, sentence, (holder_of(wanting),)))
        return effects


def totals_of(record: ClaimRecord) -> Totals:
    """What a claim has seen, as far as the core has heard."""
    return Totals(record.hits, record.lost)


def refuse(by: Owner, request_id: int, claim_id: int, refusal: HwbpError) -> Refuse:
    """Answer a request about a claim with a refusal."""
    return Refuse(by, request_id, refusal, 0 if isinstance(refusal, NoSuchClaim) else claim_id)


def done(by: Owner, request_id: int, what: str, claim_id: int) -> Done:
    """Answer a request about a claim with a word."""
    return Done(by, request_id, what, claim_id)
