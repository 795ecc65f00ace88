"""
Ring -> routes -> one message per session and drain. No policy, and the core never sees a record.

A hit is never decoded here: what the machine drained goes out as one binary field. Counts are kept per claim:
``hits = delivered + lost + dropped`` holds exactly once its resources are disarmed.
"""

from __future__ import annotations

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

    def route(self, resource_id: int, claim: Claim) -> None:
        """From now on the hits of this resource go to this claim's owner, too."""
        flow = self._flows.get(claim.claim_id)
        if flow is None:
            flow = self._flows[claim.claim_id] = Flow(claim)
        self._routes.setdefault(resource_id, []).append(flow)

    def unroute(self, resource_id: int, claim_id: int) -> None:
        """No more."""
        self._routes[resource_id].remove(self._flows[claim_id])
        if not self._routes[resource_id]:
            del self._routes[resource_id]

    def flow(self, claim_id: int) -> Flow:
        """The counts of a claim, from its first route until ``forget``."""
        return self._flows[claim_id]

    def forget(self, claim_id: int) -> None:
        """The claim is over and its last counts have been told."""
        del self._flows[claim_id]

    def drain(self, resource_id: int) -> Batch:
        """Take one message's worth of hits from a resource's rings and send it along its routes."""
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
            session = self._sessions.of(flow.claim.owner.session_id)
            if session is None:
                flow.dropped += batch.hits
            else:
                self._outbox.send_hits(session, flow, batch.hits, batch.records)
