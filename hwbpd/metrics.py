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
from hwbpd.core.effects import Attribute, Change, Effect, End, Ended, Grant, Refuse, Tell
from hwbpd.core.errors import HwbpError
from hwbpd.core.events import (
    AnyEvent,
    ArmFailed,
    Disarmed,
    ForeignFound,
    HitsCounted,
    RearmFailed,
    SessionEnded,
    Stopping,
)
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Delivery, Kind, Pool
from hwbpd.hookspecs import Foreign
from hwbpd.outbox import Flow

BOUNDS_NS = (*(digit * 10**power for power in range(3, 7) for digit in (1, 2, 5)), 10**7, 10**8, 10**9)

EVENTS: tuple[type[AnyEvent], ...] = get_args(AnyEvent)
STATES = (State.ARMED, State.GUARDED, State.ATTRIBUTING)  # those that last longer than a turn of the loop
DELIVERIES = (Delivery.HITS, Delivery.COUNT)
ERRNOS = tuple(refusal.errno_name for refusal in HwbpError.__subclasses__())

# By whom a request was refused.
DOOR = "door"  # before it came to the books: not permitted, malformed, beyond a limit, or too late
BOOKS = "books"  # hwbpd's own books have no room for it, or nothing to do it to
ARMING = "arming"  # the books had room, and the kernel had not
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
    slots: Mapping[Pool, int]  # that each CPU has
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

    :param flow: what has gone to a claim's owner so far, of a claim that was granted and is not over.
    :param now_s: seconds since 1970.
    """

    def __init__(
        self,
        books: Books,
        flow: Callable[[int], Flow],
        sessions: Sized,
        about: About,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._books = books
        self._flow = flow
        self._sessions = sessions
        self._about = about
        self._now_s = now_s
        self.messages = self.wakeups = 0
        self.served = Histogram()
        self._steps = {event: Histogram() for event in EVENTS}
        self._claims = {(kind, state): 0 for kind in Kind for state in STATES}
        self._grants = dict.fromkeys(Kind, 0)
        self._refusals = {(by, name): 0 for by in (DOOR, BOOKS, ARMING) for name in ERRNOS}
        self._ended = dict.fromkeys(End, 0)
        self._hits = dict.fromkeys(DELIVERIES, 0)
        self._guard_trips = self._delivered = self._lost = self._dropped = self._filtered = 0
        self._foreign: dict[tuple[int, Pool], Look] = {}
        self._foreign_of_task: dict[Pool, Look] = {}
        self._guarded: set[int] = set()
        self._attributing: dict[int, Kind] = {}
        self._counted: dict[int, tuple[int, int, int]] = {}  # per claim with hits: what is counted of its flow
        self._hands: dict[type[Effect], Callable[[Any, Any], None]] = {
            Grant: self._granted,
            Attribute: self._looks,
            Refuse: self._refused,
            Tell: self._told,
            Ended: self._over,
        }

    # --- what the loop tells -----------------------------------------------------------------------------------------

    def metered(self, step: Callable[[AnyEvent], list[Effect]]) -> Callable[[AnyEvent], list[Effect]]:
        """Return a ``step`` that is timed, and whose event and effects are counted."""
        steps, hands = self._steps, self._hands

        def metered_step(event: AnyEvent) -> list[Effect]:
            if type(event) is Disarmed:
                self._disarmed(event)  # before the claim is over
            begin_ns = perf_counter_ns()
            effects = step(event)
            steps[type(event)].observe(perf_counter_ns() - begin_ns)
            if type(event) is HitsCounted:
                self._hits_counted(event)
            for effect in effects:
                hand = hands.get(type(effect))
                if hand is not None:
                    hand(event, effect)
            if type(event) is SessionEnded or type(event) is Stopping:
                self._forget_looks()
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
            slots={pool: counts.slots for pool, counts in pools.items()},
            held={
                (cpu, pool): counts.held_cpu_wide(cpu) + counts.held_by_busiest(cpu)
                for pool, counts in pools.items()
                for cpu in online
            },
            foreign=self._foreign.copy(),
            foreign_of_task=self._foreign_of_task.copy(),
            resources=len(self._books.resources),
            sessions=len(self._sessions),
            claims=self._claims.copy(),
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

    def _hits_counted(self, event: HitsCounted) -> None:
        for claim in self._books.riders.get(event.resource_id, ()):
            self._hits[claim.mode.delivery] += event.hits + event.lost
            self._lost += event.lost
            self._count_flow(claim.claim_id)

    def _disarmed(self, event: Disarmed) -> None:
        """Count what came since the last drain: the totals are the machine's last word."""
        record = self._books.claims[event.claim_id]
        delivery = record.claim.mode.delivery
        if delivery in self._hits:
            self._hits[delivery] += event.totals.hits - record.hits
            self._lost += event.totals.lost - record.lost
            self._count_flow(event.claim_id)
            self._counted.pop(event.claim_id, None)

    def _count_flow(self, claim_id: int) -> None:
        flow = self._flow(claim_id)
        delivered, dropped, filtered = self._counted.get(claim_id, (0, 0, 0))
        self._delivered += flow.delivered - delivered
        self._dropped += flow.dropped - dropped
        self._filtered += flow.filtered - filtered
        self._counted[claim_id] = flow.delivered, flow.dropped, flow.filtered

    def _granted(self, _: AnyEvent, effect: Grant) -> None:
        self._grants[effect.claim.kind] += 1
        self._claims[effect.claim.kind, State.ARMED] += 1

    def _looks(self, _: AnyEvent, effect: Attribute) -> None:
        kind = self._attributing[effect.claim_id] = self._books.claims[effect.claim_id].claim.kind
        self._claims[kind, State.ATTRIBUTING] += 1

    def _refused(self, event: AnyEvent, effect: Refuse) -> None:
        self._refusals[ARMING if type(event) in _TRIED else BOOKS, effect.error.errno_name] += 1
        if type(event) is ForeignFound:
            self._claims[self._attributing.pop(event.claim_id), State.ATTRIBUTING] -= 1

    def _forget_looks(self) -> None:
        """Claims that waited for a look have ended with their session, without a word to anybody."""
        for claim_id in [each for each in self._attributing if each not in self._books.claims]:
            self._claims[self._attributing.pop(claim_id), State.ATTRIBUTING] -= 1

    def _told(self, _: AnyEvent, effect: Tell) -> None:
        claim = effect.claim
        if effect.change is Change.GUARDED:
            self._guard_trips += 1
            self._guarded.add(claim.claim_id)
            self._move(claim.kind, State.ARMED, State.GUARDED)
        elif effect.change is Change.RESUMED and effect.cpu is None:
            self._guarded.remove(claim.claim_id)
            self._move(claim.kind, State.GUARDED, State.ARMED)

    def _move(self, kind: Kind, before: State, now: State) -> None:
        self._claims[kind, before] -= 1
        self._claims[kind, now] += 1

    def _over(self, _: AnyEvent, effect: Ended) -> None:
        claim = effect.claim
        self._ended[effect.how] += 1
        was = State.GUARDED if claim.claim_id in self._guarded else State.ARMED
        self._guarded.discard(claim.claim_id)
        self._claims[claim.kind, was] -= 1
