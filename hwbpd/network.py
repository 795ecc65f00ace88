"""
The ROUTER and its monitor: what came in, through which connection, and which connections are lost.

Everything the daemon knows of ZeroMQ's ways is here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import zmq
from msgspec import Struct
from zmq.utils.monitor import recv_monitor_message

from hwbpd import peers
from hwbpd.clock import Clock
from hwbpd.connections import Connections
from hwbpd.core.errors import BadMessage
from hwbpd.peers import Connection, Peer
from hwbpd.settings import Limits

# As numbers: the operators of these enums cost more than what they ask for.
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
NOBLOCK, NOBLOCK_AND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

OWN_ID_BYTES = 5  # a nought and a number: what a ROUTER calls those who do not name themselves
HANDSHAKES = "inproc://zeromq.zap.01"  # where libzmq asks
BACKLOG = 128
SO_PASSRIGHTS = 83  # since Linux 6.16; Python 3.11 has no name for it

LINGER_MS = 500  # how long the last notices may take on their way out


class Incoming(Struct, frozen=True):
    """One message, and where it came from; ``connection`` is None for peers whose transport says nothing of them."""

    routing_id: bytes
    connection: Connection | None
    data: bytes


class Network(Protocol):
    """What the server needs of a transport."""

    def descriptors(self) -> Sequence[int]:
        """To be polled, and ``woke`` told when one is ready. What waits for ``receive`` may need none: ``has_news``."""
        ...

    def woke(self, fd: int) -> None:
        """A descriptor was reported ready; those of others are ignored."""
        ...

    def has_news(self) -> bool:
        """Whether something waits to be received; ask before sleeping."""
        ...

    def receive(self) -> Incoming | None:
        """Return the next message, or None; raises ``Unreadable`` for what cannot be one."""
        ...

    def lost_connections(self, to_be_sure: bool = False) -> Iterator[int]:
        """The descriptors of connections lost since the last call; ``woke`` says whether to look, but to be sure."""
        ...

    def identify(self, connection: Connection) -> Peer:
        """Return the process at the other end; raises ``NotPermitted``."""
        ...

    def hang_up_on_users(self) -> None:
        """End every connection of users other than root."""
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


def _listener(path: Path, mode: int) -> int:
    """
    Return a listening socket of our own making; what is at ``path`` was left by a daemon that was killed.

    The kernel is asked to refuse descriptors that a peer sends along, which libzmq would receive and drop: to drop the
    last reference to somebody else's socket takes as long as its owner likes (SO_LINGER), and meanwhile nobody is
    served. Linux before 6.16 cannot refuse them.

    :raises OSError: when it cannot be made.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        path.unlink(missing_ok=True)
        old_mask = os.umask(0o777 & ~mode)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old_mask)
        listener.listen(BACKLOG)
        return listener.detach()


class RouterNetwork:
    """
    A ZeroMQ ROUTER on ``ipc://path``.

    :param limits: what a peer may send, and how many messages may wait for it.
    :param mode: of the socket file: who may connect.
    :raises zmq.ZMQError: or ``OSError`` when it cannot be bound.

    Connections are told apart by ids that the ROUTER makes up, counting from a random number. A peer that names itself
    is refused when it speaks, but libzmq takes the name at once, and aborts the process when it later makes up that
    very id. libzmq does not seed the C library's random numbers, so each process would count from the same: we do.

    Handshakes are answered here (ZAP, ZeroMQ RFC 27), because libzmq then turns away peers of ZMTP 1.0 and 2.0, whose
    messages come without credentials.
    """

    def __init__(self, path: Path, limits: Limits, mode: int, clock: Clock) -> None:
        self._clock = clock
        ctypes.CDLL(None).srand(secrets.randbits(31))
        self._path = path
        self._context = zmq.Context()
        self._handshakes = self._context.socket(zmq.REP)
        self._handshakes.bind(HANDSHAKES)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else a full queue drops without a word
        self._router.setsockopt(zmq.MAXMSGSIZE, limits.message_bytes)
        self._router.setsockopt(zmq.SNDHWM, limits.messages_queued_per_session)
        self._router.setsockopt(zmq.LINGER, LINGER_MS)
        self._router.setsockopt(zmq.ZAP_DOMAIN, b"hwbpd")  # without one, libzmq asks nobody
        self._monitor: zmq.Socket[bytes] = self._router.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        )
        self._connections = Connections(limits)
        self._monitor_woke = True  # what it had to tell before it is first asked wakes nobody
        self._is_likely = False  # that a message can be received
        self._is_empty = False  # for certain, until the ROUTER's descriptor says otherwise
        self._router_fd, self._monitor_fd, self._handshakes_fd = (
            int(one.getsockopt(zmq.FD)) for one in (self._router, self._monitor, self._handshakes)
        )
        try:
            self._router.setsockopt(zmq.USE_FD, _listener(path, mode))  # which is libzmq's from now on
            self._router.bind(f"ipc://{path}")
        except (zmq.ZMQError, OSError):
            self.close()
            raise

    def close(self) -> None:
        """Let the last messages go and remove the socket file."""
        self._router.disable_monitor()
        for one in (self._monitor, self._router, self._handshakes):
            one.close()
        self._context.term()
        self._path.unlink(missing_ok=True)

    def descriptors(self) -> Sequence[int]:
        return self._router_fd, self._monitor_fd, self._handshakes_fd

    def woke(self, fd: int) -> None:
        if fd == self._router_fd:
            self._is_empty = False
            self._is_likely = True
        elif fd == self._monitor_fd:
            self._monitor_woke = True
        elif fd == self._handshakes_fd:
            self._answer_handshakes()

    def has_news(self) -> bool:
        # The ROUTER's descriptor is edge-triggered, and a send takes the edge away; so after one it must be asked. The
        # other two sockets are read empty whenever they wake us.
        return not self._is_empty and _is_readable(self._router)

    def receive(self) -> Incoming | None:
        if self._is_empty:
            return None
        likely, self._is_likely = self._is_likely, False
        if not likely and not _is_readable(self._router):  # to be told so by an exception costs three times that
            self._is_empty = True
            return None
        try:
            routing_id = self._router.recv(NOBLOCK)
        except zmq.Again:
            self._is_empty = True
            return None
        frame = self._router.recv(NOBLOCK, copy=False)
        if frame.more:
            frames = 1 + len(self._router.recv_multipart(NOBLOCK))
            raise Unreadable(routing_id, BadMessage(f"a message is one frame, not {frames}"))
        if len(routing_id) != OWN_ID_BYTES or _chose_its_id(frame):
            told_apart = "connections are told apart by ids of this daemon"
            raise Unreadable(routing_id, BadMessage(f"do not set ZMQ_ROUTING_ID: {told_apart}"))
        return Incoming(routing_id, peers.connection_of(frame), frame.bytes)

    def _answer_handshakes(self) -> None:
        while _is_readable(self._handshakes):
            version, request_id, _domain, address, *_ = self._handshakes.recv_multipart(zmq.NOBLOCK)
            _, uid, _, _ = address.decode().rsplit(":", 3)
            welcome = self._connections.may_connect(int(uid), self._clock.now_ns())
            status, text = (b"200", b"") if welcome else (b"300", b"too many new connections; try again in a second")
            self._handshakes.send_multipart((version, request_id, status, text, b"", b""))

    def lost_connections(self, to_be_sure: bool = False) -> Iterator[int]:
        now_ns = self._clock.now_ns()
        self._monitor_woke = self._monitor_woke or to_be_sure
        while self._monitor_woke and _is_readable(self._monitor):
            message = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            if message["event"] == zmq.EVENT_ACCEPTED:
                self._connections.accepted(message["value"], now_ns)
            else:
                self._connections.lost(message["value"])
                yield message["value"]
        self._monitor_woke = False
        self._connections.hang_up_on_silent(now_ns)

    def identify(self, connection: Connection) -> Peer:
        self._connections.said_hello(connection.fd)
        return peers.identify(connection)

    def hang_up_on_users(self) -> None:
        self._connections.hang_up_on_users()

    def send(self, routing_id: bytes, data: bytes) -> bool:
        self._is_empty = False
        try:
            self._router.send(routing_id, NOBLOCK_AND_MORE)
            self._router.send(data, NOBLOCK)
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


def _is_readable(one: zmq.Socket[bytes]) -> bool:
    return bool(int(one.getsockopt(EVENTS)) & POLLIN)
