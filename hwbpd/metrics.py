"""
Counts what the daemon does, for whoever watches it from afar.

Everything is counted from the events that the core takes and the effects that it returns, as it happens, so that a
reading costs the same with one live claim and with 100 000. The counts are plain integers that only the loop's thread
touches. What leaves that thread is a ``Reading``, a copy that belongs to whoever got it (``metered.py`` hands it over).
Turned down: counters behind locks, which cost the loop more than the counting, and a thread that looks into the books
while they change.

No label is a peer's to choose: a reading has as many numbers as the machine has CPUs and this code has names.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence, Sized
from time import perf_counter_ns
from typing import Any, get_args

from msgspec import Struct

from hwbpd.attribution import Place
from hwbpd.core.books import Books
from hwbpd.core.effects import Change, Effect, End, Ended, Grant, Refuse, Tell
from hwbpd.core.errors import HwbpError
from hwbpd.core.events import (
    AnyEvent,
    ArmFailed,
    ClaimRequested,
    Disarmed,
    ForeignFound,
    HitsCounted,
    RearmFailed,
    SessionEnded,
    Stopping,
    Suspended,
)
from hwbpd.core.lifecycle import ENDED, HALFWAY, State
from hwbpd.core.model import Delivery, Kind, Pool
from hwbpd.hits import Account
from hwbpd.hookspecs import Foreign

BOUNDS_NS = (*(digit * 10**power for power in range(3, 7) for digit in (1, 2, 5)), 10**7, 10**8, 10**9)

EVENTS: tuple[type[AnyEvent], ...] = get_args(AnyEvent)
# Those that last longer than a turn of the loop.
STATES = tuple(state for state in State if state not in HALFWAY | ENDED | {State.REQUESTED})
_SHOWN = tuple((kind, state) for kind in Kind for state in STATES)
DELIVERIES = (Delivery.HITS, Delivery.COUNT)
ERRNOS = tuple(refusal.errno_name for refusal in HwbpError.__subclasses__())

# By whom a request was refused.
DOOR = "door"  # before it came to the books: not permitted, malformed, beyond a limit, or too late
BOOKS = "books"  # hwbpd's own books have no room for it, or nothing to do it to
ARMING = "arming"  # the books had room, and the kernel had not
_NOTHING = Account(0, 0, 0, 0, 0)
_TRIED = (ArmFailed, ForeignFound, RearmFailed)


class Histogram:
    """How often something took how long. ``counts[n]``: at most ``BOUNDS_NS[n]``, and more than the bound before."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.sum_ns = 0

    def observe(self, ns: int) -> None:
        self.counts[bisect_left(BOUNDS_NS, ns)] += 1
        self.sum_ns += ns

    def copy(self) -> Histogram:
        copied = Histogram()
        copied.counts, copied.sum_ns = self.counts.copy(), self.sum_ns
        return copied


class About(Struct, frozen=True):
    """Which daemon this is."""

    version: str
    machine: str
    backend: str


class Look(Struct, frozen=True):
    """What the last look at a place found: slots of others, and when it was done, in seconds since 1970."""

    slots: int
    at_s: float


class Reading(Struct, frozen=True):
    """Everything that is counted, at one moment between two turns of the loop."""

    at_s: float  # since 1970
    about: About
    slots: Mapping[Pool, int]  # that every CPU has
    slots_on: Mapping[tuple[int, Pool], int]  # by online CPU
    held: Mapping[tuple[int, Pool], int]  # by online CPU: CPU-wide ones, and those of the busiest task
    foreign: Mapping[tuple[int, Pool], Look]  # by CPU
    foreign_of_task: Mapping[Pool, Look]
    resources: int
    sessions: int
    claims: Mapping[tuple[Kind, State], int]
    grants: Mapping[Kind, int]
    refusals: Mapping[tuple[str, str], int]  # by whom, with which errno
    ended: Mapping[End, int]
    guard_trips: int
    hits: Mapping[Delivery, int]
    delivered: int
    lost: int
    dropped: int
    filtered: int
    messages: int
    wakeups: int
    steps: Mapping[type[AnyEvent], Histogram]
    served: Histogram


class Meter:
    """
    The counts.

    :param account: what has become of a claim's hits so far.
    :param now_s: seconds since 1970.
    """

    def __init__(
        self,
        books: Books,
        account: Callable[[int], Account],
        sessions: Sized,
        about: About,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._books = books
        self._account = account
        self._sessions = sessions
        self._about = about
        self._now_s = now_s
        self.messages = self.wakeups = 0
        self.served = Histogram()
        self._steps = {event: Histogram() for event in EVENTS}
        self._claims = {(kind, state): 0 for kind in Kind for state in State}
        self._grants = dict.fromkeys(Kind, 0)
        self._refusals = {(by, name): 0 for by in (DOOR, BOOKS, ARMING) for name in ERRNOS}
        self._ended = dict.fromkeys(End, 0)
        self._hits = dict.fromkeys(DELIVERIES, 0)
        self._guard_trips = self._delivered = self._lost = self._dropped = self._filtered = 0
        self._foreign: dict[tuple[int, Pool], Look] = {}
        self._foreign_of_task: dict[Pool, Look] = {}
        self._known: dict[int, tuple[Kind, State]] = {}  # claims, as they are counted
        self._counted: dict[int, Account] = {}  # per claim with hits: what is counted of its account
        self._hands: dict[type[Effect], Callable[[Any, Any], None]] = {
            Grant: self._granted,
            Refuse: self._refused,
            Tell: self._told,
            Ended: self._over,
        }

    # --- what the loop tells -----------------------------------------------------------------------------------------

    def metered(self, step: Callable[[AnyEvent], list[Effect]]) -> Callable[[AnyEvent], list[Effect]]:
        """Return a ``step`` that is timed, and whose event and effects are counted."""
        steps, hands = self._steps, self._hands

        def metered_step(event: AnyEvent) -> list[Effect]:
            if type(event) is Disarmed or type(event) is Suspended:
                self._count_hits(event.claim_id)  # what came last, before the claim is over
            touched = self._touched(event)
            begin_ns = perf_counter_ns()
            effects = step(event)
            steps[type(event)].observe(perf_counter_ns() - begin_ns)
            if type(event) is HitsCounted:
                self._hits_counted(event)
            for effect in effects:
                hand = hands.get(type(effect))
                if hand is not None:
                    hand(event, effect)
                claim_id = _claim_of(effect)
                if claim_id:
                    touched.append(claim_id)
            if type(event) is ClaimRequested and self._books.claims:
                touched.append(next(reversed(self._books.claims)))
            for claim_id in touched:
                self._look_at(claim_id)
            return effects

        return metered_step

    def refused_at_door(self, errno_name: str) -> None:
        """A request never came to the core."""
        self._refusals[DOOR, errno_name] += 1

    def looked(self, place: Place, found: Sequence[Foreign]) -> None:
        """
        Somebody had a look made at a place, and this is what was found outside.

        On a CPU its CPU-wide slots count together with those of whichever thread has most. Of a thread or process only
        its own slots are kept, without its name: it may be gone by the time anybody reads of it.
        """
        by_place: dict[str, int] = {}
        for one in found:
            by_place[one.place] = by_place.get(one.place, 0) + one.slots
        names = {f"cpu-wide on cpu {cpu}": cpu for cpu in self._books.possible}
        on_tasks = max((slots for where, slots in by_place.items() if where not in names), default=0)
        if not place.target.is_cpu_wide:
            self._foreign_of_task[place.pool] = Look(on_tasks, self._now_s())
            return
        for where, cpu in names.items():
            if cpu == place.cpu if place.cpu is not None else cpu in self._books.online:
                self._foreign[cpu, place.pool] = Look(by_place.get(where, 0) + on_tasks, self._now_s())

    # --- what is asked of it -----------------------------------------------------------------------------------------

    def reading(self) -> Reading:
        """Everything, now."""
        pools, online = self._books.pools, sorted(self._books.online)
        return Reading(
            at_s=self._now_s(),
            about=self._about,
            slots={pool: counts.least for pool, counts in pools.items()},
            slots_on={(cpu, pool): counts.slots_on(cpu) for pool, counts in pools.items() for cpu in online},
            held={
                (cpu, pool): counts.held_cpu_wide(cpu) + counts.held_by_busiest(cpu)
                for pool, counts in pools.items()
                for cpu in online
            },
            foreign=self._foreign.copy(),
            foreign_of_task=self._foreign_of_task.copy(),
            resources=len(self._books.resources),
            sessions=len(self._sessions),
            claims={which: self._claims[which] for which in _SHOWN},
            grants=self._grants.copy(),
            refusals=self._refusals.copy(),
            ended=self._ended.copy(),
            guard_trips=self._guard_trips,
            hits=self._hits.copy(),
            delivered=self._delivered,
            lost=self._lost,
            dropped=self._dropped,
            filtered=self._filtered,
            messages=self.messages,
            wakeups=self.wakeups,
            steps={event: histogram.copy() for event, histogram in self._steps.items()},
            served=self.served.copy(),
        )

    # --- events and effects ------------------------------------------------------------------------------------------

    def _touched(self, event: AnyEvent) -> list[int]:
        """The claims whose state an event may change without an effect that names them."""
        if isinstance(event, SessionEnded):
            return list(self._books.sessions.get(event.session_id, ()))
        if isinstance(event, Stopping):
            return list(self._known)
        claim_id = getattr(event, "claim_id", 0)
        return [claim_id] if claim_id else []

    def _look_at(self, claim_id: int) -> None:
        """Count a claim as what it is now."""
        record, known = self._books.claims.get(claim_id), self._known.get(claim_id)
        if record is None:
            if known is not None:
                self._claims[known] -= 1
                del self._known[claim_id]
                self._counted.pop(claim_id, None)
            return
        now = record.claim.kind, record.state
        if now == known:
            return
        if known is not None:
            self._claims[known] -= 1
        self._claims[now] += 1
        self._known[claim_id] = now

    def _hits_counted(self, event: HitsCounted) -> None:
        for claim in self._books.riders.get(event.resource_id, ()):
            self._count_hits(claim.claim_id)

    def _count_hits(self, claim_id: int) -> None:
        """Count what is new in the account of a claim."""
        now, before = self._account(claim_id), self._counted.get(claim_id, _NOTHING)
        if now == before:
            return
        self._hits[self._books.claims[claim_id].claim.mode.delivery] += now.hits - before.hits
        self._delivered += now.delivered - before.delivered
        self._lost += now.lost - before.lost
        self._dropped += now.dropped - before.dropped
        self._filtered += now.filtered - before.filtered
        self._counted[claim_id] = now

    def _granted(self, _: AnyEvent, effect: Grant) -> None:
        self._grants[effect.claim.kind] += 1

    def _refused(self, event: AnyEvent, effect: Refuse) -> None:
        self._refusals[ARMING if type(event) in _TRIED else BOOKS, effect.error.errno_name] += 1

    def _told(self, _: AnyEvent, effect: Tell) -> None:
        if effect.change is Change.GUARDED:
            self._guard_trips += 1
        elif effect.change is Change.GRANTED:
            self._grants[effect.claim.kind] += 1

    def _over(self, _: AnyEvent, effect: Ended) -> None:
        self._ended[effect.how] += 1


def _claim_of(effect: Effect) -> int:
    """The claim that an effect is about; 0 for none."""
    claim = getattr(effect, "claim", None)
    return claim.claim_id if claim is not None else getattr(effect, "claim_id", 0)
