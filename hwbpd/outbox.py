"""
Bounded, numbered, lossy-with-count sending to sessions.

The transport takes SNDHWM messages for a connection. What finds no room there waits here, in order, and is sent as soon
as there is some: a slow reader never slows another. Hits that wait are joined into larger messages, though not larger
than ``hits_bytes_per_message``, as a transport may bound what one message is; they may wait up to
``hits_bytes_max`` for a session, and beyond that they are dropped and counted, here and now. Of the decisions that a
session follows ``DECISIONS_WAITING_MAX`` may wait, and more are dropped and counted: as one of them waits then, a
message is to come that tells the count. Replies and other notices must not be lost: ``messages_max`` of them may wait,
and a client that lets more pile up has stopped reading and is disconnected.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import msgspec

from hwbpd import wire
from hwbpd.core.model import Claim
from hwbpd.messages import Decision, Hits, Notice, Reply
from hwbpd.sessions import Session
from hwbpd.settings import Rings

HITS_BYTES_PER_MESSAGE = Rings().bytes_per_message


DECISIONS_WAITING_MAX = 64  # per connection


class Transport(Protocol):
    """Where messages leave the daemon."""

    def send(self, routing_id: bytes, data: bytes) -> bool:
        """Send without waiting; false when there is no room. To a peer that is gone everything counts as sent."""
        ...


class Flow:
    """What has gone to one claim's owner. ``delivered`` hits are on their way, or wait in order behind others."""

    __slots__ = ("claim", "delivered", "dropped", "filtered", "hits", "lost")

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.hits = 0  # all of them: those below, or those of a claim that only counts
        self.delivered = 0
        self.lost = 0  # in the ring
        self.dropped = 0  # here
        self.filtered = 0  # not for this claim


class _WaitingHits:
    """Hits of one claim that wait; later ones join them as long as nothing else came between."""

    __slots__ = ("bytes", "count", "flow", "records")

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.count = 0
        self.bytes = 0
        self.records: list[bytes] = []


class _Queue:
    """What waits for one connection, of one session or of two that follow each other on it."""

    __slots__ = ("decisions", "hits_bytes", "items", "messages")

    def __init__(self) -> None:
        self.items: deque[tuple[Session | None, Reply | Notice | _WaitingHits]] = deque()
        self.messages = 0  # of items, those that must not be lost: neither hits nor decisions
        self.decisions = 0  # of items
        self.hits_bytes = 0


class Outbox:
    """The way to the clients."""

    def __init__(
        self,
        transport: Transport,
        *,
        messages_max: int,
        hits_bytes_max: int,
        hits_bytes_per_message: int = HITS_BYTES_PER_MESSAGE,
    ) -> None:
        self._transport = transport
        self._hits_bytes_per_message = hits_bytes_per_message
        self._messages_max = messages_max
        self._hits_bytes_max = hits_bytes_max
        self._queues: dict[bytes, _Queue] = {}  # per routing id, where something waits
        self.overrun: list[Session] = []  # sessions to be ended: they do not read

    @property
    def is_waiting(self) -> bool:
        """Whether ``flush`` has something to do."""
        return bool(self._queues)

    def is_waiting_for(self, session: Session) -> bool:
        """Whether something waits for this session's connection."""
        return session.routing_id in self._queues

    def send(self, session: Session, message: Reply | Notice) -> None:
        """Send a reply or a notice; the outbox numbers notices as they leave."""
        queue = self._queues.get(session.routing_id)
        if queue is None:
            if self._transmit(session.routing_id, session, message):
                return
            queue = self._queues[session.routing_id] = _Queue()
        queue.items.append((session, message))
        queue.messages += 1
        if queue.messages == self._messages_max + 1:
            self.overrun.append(session)

    def send_decision(self, session: Session, decision: Decision) -> None:
        """Send a decision, or let it wait, or drop it; ``session.decisions_missed`` counts those dropped."""
        queue = self._queues.get(session.routing_id)
        if queue is None:
            if self._transmit(session.routing_id, session, decision):
                return
            queue = self._queues[session.routing_id] = _Queue()
        if queue.decisions >= DECISIONS_WAITING_MAX:
            session.decisions_missed += 1
            return
        queue.items.append((session, decision))
        queue.decisions += 1

    def reply_to_stranger(self, routing_id: bytes, reply: Reply) -> None:
        """Send a reply to somebody without a session, behind what waits for it; dropped if there is no room."""
        queue = self._queues.get(routing_id)
        if queue is None:
            self._transmit(routing_id, None, reply)
        elif queue.messages <= self._messages_max:
            queue.items.append((None, reply))
            queue.messages += 1

    def send_hits(self, session: Session, flow: Flow, count: int, records: bytes) -> None:
        """Send hits, or let them wait, or drop them; ``flow`` keeps the account."""
        queue = self._queues.get(session.routing_id)
        if queue is None:
            flow.delivered += count
            if self._transmit_hits(session, flow, count, records):
                return
            flow.delivered -= count
            queue = self._queues[session.routing_id] = _Queue()
        if queue.hits_bytes + len(records) > self._hits_bytes_max:
            flow.dropped += count
            return
        last = queue.items[-1][1] if queue.items else None
        if not (
            isinstance(last, _WaitingHits)
            and last.flow is flow
            and last.bytes + len(records) <= self._hits_bytes_per_message
        ):
            last = _WaitingHits(flow)
            queue.items.append((session, last))
        last.count += count
        last.bytes += len(records)
        last.records.append(records)
        queue.hits_bytes += len(records)
        flow.delivered += count

    def flush(self) -> None:
        """Send what waits, as far as there is room now."""
        for routing_id, queue in tuple(self._queues.items()):
            while queue.items and self._transmit_first(routing_id, queue):
                pass
            if not queue.items:
                del self._queues[routing_id]

    def leave_word(self, session: Session, notice: Notice) -> None:
        """Let one notice wait for a session that is over because it does not read, until it reads or hangs up."""
        queue = self._queues[session.routing_id] = _Queue()
        queue.items.append((session, notice))
        queue.messages = 1

    def forget(self, session: Session) -> None:
        """Nothing waits for that connection any more."""
        self._queues.pop(session.routing_id, None)

    def _transmit_first(self, routing_id: bytes, queue: _Queue) -> bool:
        session, first = queue.items[0]
        if isinstance(first, _WaitingHits):
            assert session is not None
            records = b"".join(first.records)
            if not self._transmit_hits(session, first.flow, first.count, records):
                first.records = [records]
                return False
            queue.hits_bytes -= len(records)
        else:
            if not self._transmit(routing_id, session, first):
                return False
            if isinstance(first, Decision):
                queue.decisions -= 1
            else:
                queue.messages -= 1
        queue.items.popleft()
        return True

    def _transmit(self, routing_id: bytes, session: Session | None, message: Reply | Notice) -> bool:
        if isinstance(message, Reply):
            return self._transport.send(routing_id, wire.encode(message))
        assert session is not None
        numbered = msgspec.structs.replace(message, n=session.notices_sent + 1)
        if isinstance(numbered, Decision):
            numbered = msgspec.structs.replace(numbered, missed=session.decisions_missed)
        if not self._transport.send(routing_id, wire.encode(numbered)):
            return False
        session.notices_sent += 1
        return True

    def _transmit_hits(self, session: Session, flow: Flow, count: int, records: bytes) -> bool:
        notice = Hits(flow.claim.claim_id, count, records, flow.lost, flow.dropped, n=session.notices_sent + 1)
        if not self._transport.send(session.routing_id, wire.encode(notice)):
            return False
        session.notices_sent += 1
        return True
