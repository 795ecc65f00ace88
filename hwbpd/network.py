"""
The ROUTER and its monitor: what came in, through which connection, and which connections are lost.

Everything the daemon knows of ZeroMQ's ways is here and in ``daemon.py``, which binds the socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import zmq
from msgspec import Struct
from zmq.utils.monitor import recv_monitor_message

from hwbpd import peers
from hwbpd.core.errors import BadMessage
from hwbpd.peers import Connection, Peer

OWN_ID_BYTES = 5  # a nought and a number: what a ROUTER calls those who do not name themselves


class Incoming(Struct, frozen=True):
    """One message, and where it came from; ``connection`` is None for peers whose transport says nothing of them."""

    routing_id: bytes
    connection: Connection | None
    data: bytes


class Network(Protocol):
    """What the server needs of a transport."""

    def descriptors(self) -> Sequence[int]:
        """To be polled. They are edge-triggered: ask ``has_news`` before sleeping on them."""
        ...

    def has_news(self) -> bool:
        """Whether something waits to be received."""
        ...

    def receive(self) -> Incoming | None:
        """Return the next message, or None; raises ``Unreadable`` for what cannot be one."""
        ...

    def lost_connections(self) -> Iterator[int]:
        """The descriptors of connections lost since the last call."""
        ...

    def identify(self, connection: Connection) -> Peer:
        """Return the process at the other end; raises ``NotPermitted``."""
        ...

    def send(self, routing_id: bytes, data: bytes) -> bool:
        """Send without waiting; false when there is no room. To a peer that is gone everything counts as sent."""
        ...


class Unreadable(Exception):
    """A message that is refused before it is looked into; ``why`` goes back to ``routing_id``."""

    def __init__(self, routing_id: bytes, why: BadMessage) -> None:
        super().__init__(why)
        self.routing_id = routing_id
        self.why = why


class RouterNetwork:
    """
    A bound ZeroMQ ROUTER.

    :param router: with ROUTER_MANDATORY set, or it drops without a word, and MAXMSGSIZE.
    """

    def __init__(self, router: zmq.Socket[bytes]) -> None:
        self._router = router
        self._monitor: zmq.Socket[bytes] = router.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def close(self) -> None:
        """Stop watching connections; the ROUTER belongs to the caller."""
        self._router.disable_monitor()
        self._monitor.close()

    def descriptors(self) -> Sequence[int]:
        return int(self._router.getsockopt(zmq.FD)), int(self._monitor.getsockopt(zmq.FD))

    def has_news(self) -> bool:
        return _is_readable(self._router) or _is_readable(self._monitor)

    def receive(self) -> Incoming | None:
        try:
            frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        routing_id = frames[0].bytes
        if len(frames) != 2:
            raise Unreadable(routing_id, BadMessage(f"a message is one frame, not {len(frames) - 1}"))
        if len(routing_id) != OWN_ID_BYTES or _chose_its_id(frames[1]):
            told_apart = "connections are told apart by ids of this daemon"
            raise Unreadable(routing_id, BadMessage(f"do not set ZMQ_ROUTING_ID: {told_apart}"))
        return Incoming(routing_id, peers.connection_of(frames[1]), frames[1].bytes)

    def lost_connections(self) -> Iterator[int]:
        while _is_readable(self._monitor):
            yield recv_monitor_message(self._monitor, zmq.NOBLOCK)["value"]

    def identify(self, connection: Connection) -> Peer:
        return peers.identify(connection)

    def send(self, routing_id: bytes, data: bytes) -> bool:
        try:
            self._router.send_multipart((routing_id, data), zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        return True


def _chose_its_id(frame: zmq.Frame) -> bool:
    """
    Whether the peer named itself in its handshake.

    libzmq hands the name over up to its first nought. One that looks just like an id of the ROUTER's own (a nought and
    four bytes, made by hand) is therefore not seen here, and gains nothing: a session hangs on the connection.
    """
    try:
        return bool(frame.get("Identity"))
    except UnicodeDecodeError:  # some name that is not even text
        return True
    except zmq.ZMQError:
        return False


def _is_readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
