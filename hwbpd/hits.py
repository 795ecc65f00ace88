"""
Ring -> routes -> one message per session and drain. No policy, and the core never sees a record.

A hit is not decoded here: what the machine drained goes out as one binary field, unless the claim is filtered or its
owner may not see all of it. Counts are kept per claim: ``hits = delivered + lost + dropped + filtered`` holds exactly
once its resources are disarmed.
"""

from __future__ import annotations

from hwbpd import records
from hwbpd.core.model import Claim, Delivery
from hwbpd.hookspecs import Batch, Machine
from hwbpd.outbox import Flow, Outbox
from hwbpd.sessions import Sessions


class Hits:
    """The routing table, and the way of a hit along it."""

    def __init__(self, machine: Machine, sessions: Sessions, outbox: Outbox, bytes_per_message: int) -> None:
        self._machine = machine
        self._sessions = sessions
        self._outbox = outbox
        self._bytes_per_message = bytes_per_message
        self._routes: dict[int, list[Flow]] = {}  # per resource
        self._flows: dict[int, Flow] = {}  # per claim
        self._counted: dict[int, int] = {}  # per resource that only counts, with a fuse: hits seen so far

    def route(self, resource_id: int, claim: Claim) -> None:
        """From now on the hits of this resource go to this claim's owner, too."""
        flow = self._flows.get(claim.claim_id)
        if flow is None:
            flow = self._flows[claim.claim_id] = Flow(claim)
        self._routes.setdefault(resource_id, []).append(flow)
        if claim.mode.delivery is Delivery.COUNT and claim.mode.fuse_hits:
            self._counted.setdefault(resource_id, 0)

    def is_counted(self, resource_id: int) -> bool:
        """Whether a resource's hits must be looked for, because they come without records and burn a fuse."""
        return resource_id in self._counted

    def unroute(self, resource_id: int, claim_id: int) -> None:
        """No more."""
        self._routes[resource_id].remove(self._flows[claim_id])
        if not self._routes[resource_id]:
            del self._routes[resource_id]
            self._counted.pop(resource_id, None)

    def flow(self, claim_id: int) -> Flow:
        """The counts of a claim, from its first route until ``forget``."""
        return self._flows[claim_id]

    def forget(self, claim_id: int) -> None:
        """The claim is over and its last counts have been told."""
        del self._flows[claim_id]

    def drain(self, resource_id: int) -> Batch:
        """
        Take one message's worth of hits from a resource's rings and send it along its routes.

        Of a resource that only counts, return how many there were since the last time, without records.
        """
        if resource_id in self._counted:
            hits = self._machine.totals(resource_id).hits
            before, self._counted[resource_id] = self._counted[resource_id], hits
            return Batch(b"", hits - before, 0, False)
        batch = self._machine.drain(resource_id, self._bytes_per_message)
        self.deliver(resource_id, batch)
        return batch

    def deliver(self, resource_id: int, batch: Batch) -> None:
        """Send a batch along the routes of a resource, counting what is lost on the way."""
        if not (batch.hits or batch.lost):
            return
        for flow in self._routes.get(resource_id, ()):
            if flow.claim.mode.delivery is not Delivery.HITS:
                continue
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
