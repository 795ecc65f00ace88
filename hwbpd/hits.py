"""
Ring -> routes -> one message per session and drain. No policy, and the core never sees a record.

A hit is not decoded here: what the machine drained goes out as one binary field, unless the claim is filtered or its
owner may not see all of it.

Claims may ride on one resource, and each has an account of its own, from the hit after it joined to the one before it
left, over every resource it has and every time it is suspended between. For a claim that delivers hits it is kept from
what is drained, and ``hits = delivered + lost + dropped + filtered`` holds at any time: so who joins or leaves has the
rings emptied first, for those who were there before. For a claim that only counts it is the difference of what the
machine counted. When a resource is given back, what was drained of it must be what the machine counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

from hwbpd import records
from hwbpd.core.model import Claim, Delivery, Totals
from hwbpd.hookspecs import Batch, Machine
from hwbpd.outbox import Flow, Outbox
from hwbpd.sessions import Sessions

_NOTHING = Batch(b"", 0, 0, False)
_NONE = Totals()


class Account(NamedTuple):
    """
    What has become of a claim's hits.

    ``hits``: of one that delivers them, the sum of the others; of one that only counts, those known at the last look.
    """

    hits: int
    delivered: int
    lost: int
    dropped: int
    filtered: int


_EMPTY = Account(0, 0, 0, 0, 0)


class _Ride:
    """A claim on a resource."""

    __slots__ = ("counted", "flow", "since")

    def __init__(self, flow: Flow, since: Totals) -> None:
        self.flow = flow
        self.since = since  # the resource's totals when it joined
        self.counted = since.hits  # of one that only counts: the resource's hits up to which its account goes

    @property
    def delivers(self) -> bool:
        return self.flow.claim.mode.delivery is Delivery.HITS

    def count(self, hits: int) -> None:
        """The resource has had so many hits."""
        if self.flow.claim.mode.delivery is Delivery.COUNT:
            self.flow.hits += hits - self.counted
            self.counted = hits


class _Slot:
    """A resource that has riders."""

    __slots__ = ("counted", "delivery", "drained", "is_counted", "rides")

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery  # of the resource; riders may want less
        self.rides: dict[int, _Ride] = {}  # by claim
        self.drained = _NONE  # hits that came out of its rings or were lost there, and the latter
        self.is_counted = False
        self.counted = 0  # hits at the last look, if it is


class Hits:
    """The routing table, and the way of a hit along it."""

    def __init__(self, machine: Machine, sessions: Sessions, outbox: Outbox, bytes_per_message: int) -> None:
        self._machine = machine
        self._sessions = sessions
        self._outbox = outbox
        self._bytes_per_message = bytes_per_message
        self._slots: dict[int, _Slot] = {}  # per resource
        self._flows: dict[int, Flow] = {}  # per claim

    # --- riders ------------------------------------------------------------------------------------------------------

    def route(self, resource_id: int, claim: Claim) -> Batch:
        """
        From now on the hits of this resource go to this claim's owner, too.

        :return: what was in its rings until then, which has gone to those who were there before.
        """
        flow = self._flows.get(claim.claim_id)
        if flow is None:
            flow = self._flows[claim.claim_id] = Flow(claim)
        mode = claim.mode
        slot = self._slots.get(resource_id)
        came = _NOTHING
        if slot is None:
            slot, since = _Slot(mode.delivery), _NONE
            self._slots[resource_id] = slot
        elif mode.delivery is Delivery.HITS:
            came = self._empty(resource_id)
            since = slot.drained
        else:
            since = self._machine.totals(resource_id)
        slot.rides[claim.claim_id] = _Ride(flow, since)
        if slot.delivery is Delivery.COUNT and mode.fuse_hits and not slot.is_counted:
            slot.is_counted, slot.counted = True, since.hits
        return came

    def leave(self, resource_id: int, claim_id: int) -> Batch:
        """
        No more, but others stay; nothing if the claim is not on that resource.

        :return: what was in its rings until then, which has gone to all of them.
        """
        slot = self._slots.get(resource_id)
        ride = None if slot is None else slot.rides.get(claim_id)
        if slot is None or ride is None:
            return _NOTHING
        came = _NOTHING
        if ride.delivers:
            came = self._empty(resource_id)
        else:
            ride.count(self._machine.totals(resource_id).hits)
        del slot.rides[claim_id]
        return came

    def disarmed(self, resource_id: int, batch: Batch, totals: Totals) -> None:
        """A resource was given back: deliver the rest and close every account on it."""
        slot = self._slots.get(resource_id)
        if slot is None:
            return
        self.deliver(resource_id, batch)
        for ride in slot.rides.values():
            ride.count(totals.hits)
        if slot.delivery is Delivery.HITS:
            assert slot.drained == totals, f"resource {resource_id}: {slot.drained} drained of {totals}"
        del self._slots[resource_id]

    def has_route(self, resource_id: int) -> bool:
        """Whether anybody rides on it."""
        return resource_id in self._slots

    def is_counted(self, resource_id: int) -> bool:
        """Whether a resource's hits must be looked for, because they come without records and burn a fuse."""
        slot = self._slots.get(resource_id)
        return slot is not None and slot.is_counted

    # --- accounts ----------------------------------------------------------------------------------------------------

    def account(self, claim_id: int) -> Account:
        """What is known here of a claim until ``forget``; all nought for one that never had a route."""
        flow = self._flows.get(claim_id)
        if flow is None:
            return _EMPTY
        return Account(flow.hits, flow.delivered, flow.lost, flow.dropped, flow.filtered)

    def final(self, claim_id: int) -> Totals:
        """All that a claim has had, once it is on no resource any more; every hit went one way."""
        hits, delivered, lost, dropped, filtered = self.account(claim_id)
        flow = self._flows.get(claim_id)
        if flow is not None and flow.claim.mode.delivery is Delivery.HITS:
            assert hits == delivered + lost + dropped + filtered, f"claim {claim_id}: {self.account(claim_id)}"
        return Totals(hits, lost)

    def so_far(self, claim_id: int, resource_ids: Iterable[int]) -> Totals:
        """What a claim has had by now, as the machine counts; ``resource_ids`` are those it is on."""
        hits, _, lost, _, _ = self.account(claim_id)
        for resource_id in resource_ids:
            slot = self._slots.get(resource_id)
            if slot is None or claim_id not in slot.rides or slot.delivery is Delivery.HOLD:
                continue
            ride, now = slot.rides[claim_id], self._machine.totals(resource_id)
            if ride.delivers:
                hits += now.hits - slot.drained.hits
                lost += now.lost - slot.drained.lost
            else:
                hits += now.hits - ride.counted
        return Totals(hits, lost)

    def so_far_on(self, resource_id: int, claim_id: int) -> Totals:
        """What one resource has brought a claim since it joined, as the machine counts."""
        slot = self._slots.get(resource_id)
        if slot is None or claim_id not in slot.rides or slot.delivery is Delivery.HOLD:
            return _NONE
        ride, now = slot.rides[claim_id], self._machine.totals(resource_id)
        return Totals(now.hits - ride.since.hits, now.lost - ride.since.lost if ride.delivers else 0)

    def forget(self, claim_id: int) -> None:
        """The claim is over and its last counts have been told."""
        self._flows.pop(claim_id, None)

    # --- the way of a hit --------------------------------------------------------------------------------------------

    def drain(self, resource_id: int) -> Batch:
        """
        Take one message's worth of hits from a resource's rings and send it along its routes.

        Of a resource that only counts, return how many there were since the last time, without records.
        """
        slot = self._slots.get(resource_id)
        if slot is None or slot.delivery is Delivery.HOLD:
            return _NOTHING
        if slot.is_counted:
            hits = self._machine.totals(resource_id).hits
            before, slot.counted = slot.counted, hits
            for ride in slot.rides.values():
                ride.count(hits)
            return Batch(b"", hits - before, 0, False)
        batch = self._machine.drain(resource_id, self._bytes_per_message)
        self.deliver(resource_id, batch)
        return batch

    def _empty(self, resource_id: int) -> Batch:
        """Deliver all that is in the rings now, however much: no more than they hold."""
        batch = self._machine.drain(resource_id, sys.maxsize)
        self.deliver(resource_id, batch)
        return batch

    def deliver(self, resource_id: int, batch: Batch) -> None:
        """Send a batch along the routes of a resource, counting what is lost on the way."""
        slot = self._slots.get(resource_id)
        if slot is None or not (batch.hits or batch.lost):
            return
        slot.drained = Totals(slot.drained.hits + batch.hits + batch.lost, slot.drained.lost + batch.lost)
        for ride in slot.rides.values():
            if ride.delivers:
                self._deliver_to(ride.flow, batch)

    def _deliver_to(self, flow: Flow, batch: Batch) -> None:
        flow.hits += batch.hits + batch.lost
        flow.lost += batch.lost
        hits, shown = batch.hits, batch.records
        mode = flow.claim.mode
        if mode.only_pid:
            shown, hits = records.of_process(shown, mode.only_pid)
            flow.filtered += batch.hits - hits
        if mode.hide_kernel:
            shown = records.without_kernel_addresses(shown)
        session = self._sessions.of(flow.claim.owner.session_id)
        if session is None:
            flow.dropped += hits
        elif hits or batch.lost:
            # The last of a claim's hits come all at once, as many as its rings held.
            for part, count in records.parts(shown, hits, self._bytes_per_message):
                self._outbox.send_hits(session, flow, count, part)
