"""
Bounded, numbered, lossy-with-count sending to sessions.

The transport's own queue (SNDHWM messages per connection) is the only one for hits: when it is full they are dropped
and counted, here and now, so a slow reader never slows another nor makes the daemon grow. Replies and other notices
must not be lost: they wait, as many as ``waiting_max``, and a client that lets more pile up has stopped reading and is
disconnected. While something waits no hits are sent, so notices keep their order.
"""

from __future__ import annotations

from typing import Protocol

from hwbpd import wire
from hwbpd.messages import Closing, Hits, Lost, Reply
from hwbpd.sessions import Session


class Transport(Protocol):
    """Where messages leave the daemon."""

    def send(self, routing_id: bytes, data: bytes) -> bool:
        """Send without waiting; false when there is no room. To a peer that is gone everything counts as sent."""
        ...


class Outbox:
    """The way to the clients."""

    def __init__(self, transport: Transport, waiting_max: int) -> None:
        self._transport = transport
        self._waiting_max = waiting_max
        self._waiting: dict[int, Session] = {}  # sessions with something waiting
        self.overrun: list[Session] = []  # sessions to be ended: they do not read

    @property
    def is_waiting(self) -> bool:
        """Whether ``flush`` has something to do."""
        return bool(self._waiting)

    def reply(self, session: Session, reply: Reply) -> None:
        """Send a reply."""
        self._send_or_wait(session, wire.encode(reply))

    def reply_to_stranger(self, routing_id: bytes, reply: Reply) -> None:
        """Send a reply to somebody without a session; it is dropped if there is no room."""
        self._transport.send(routing_id, wire.encode(reply))

    def notify(self, session: Session, notice: Lost | Closing) -> None:
        """Send a notice that must arrive."""
        session.notices_sent += 1
        assert notice.n == session.notices_sent, "a notice is numbered by next_number"
        self._send_or_wait(session, wire.encode(notice))

    def next_number(self, session: Session) -> int:
        """The number of the next notice."""
        return session.notices_sent + 1

    def hits(self, session: Session, claim_id: int, count: int, records: bytes, lost: int, dropped: int) -> bool:
        """Send hits; return false if there is no room and they are dropped."""
        if session.waiting:
            return False
        notice = Hits(session.notices_sent + 1, claim_id, count, records, lost, dropped)
        if not self._transport.send(session.routing_id, wire.encode(notice)):
            return False
        session.notices_sent += 1
        return True

    def flush(self) -> None:
        """Send what waits, as far as there is room now."""
        for session_id, session in tuple(self._waiting.items()):
            while session.waiting and self._transport.send(session.routing_id, session.waiting[0]):
                session.waiting.popleft()
            if not session.waiting:
                del self._waiting[session_id]

    def forget(self, session: Session) -> None:
        """The session is over; nothing waits for it any more."""
        self._waiting.pop(session.session_id, None)
        session.waiting.clear()

    def _send_or_wait(self, session: Session, data: bytes) -> None:
        if not session.waiting and self._transport.send(session.routing_id, data):
            return
        session.waiting.append(data)
        self._waiting[session.session_id] = session
        if len(session.waiting) == self._waiting_max + 1:
            self.overrun.append(session)
