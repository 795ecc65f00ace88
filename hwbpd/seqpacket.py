"""
The second way in: AF_UNIX SEQPACKET, for round trips in half of ZeroMQ's time, or a third. One packet is one message.

1. Everything happens in the thread that decides: there is no other to hand over to, which is where the time is saved.
   So nothing here may wait, neither for a peer that does not read nor for what a peer sends along.
2. Each connection that has something gets one message read, in turns: who sends much does not delay who sends little.
3. An empty packet, or one longer than ``limits.message_bytes``, ends the connection.
4. Where a packet finds no room, the peer is polled for some, and the loop wakes when there is.
5. Descriptors sent along are refused by the kernel (SO_PASSRIGHTS). To drop the last reference to somebody else's
   socket can take as long as its owner likes (SO_LINGER), and a kernel that cannot refuse them would do it in our
   ``recv``. Such a kernel gets no second way in.

A peer's packets are answered in the order they came in. What it sent before it hung up is served before the loss of its
connection is told; who is hung up on from here is not heard any more.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from hwbpd import peers
from hwbpd.clock import Clock
from hwbpd.connections import ROOT, Connections
from hwbpd.core.errors import NotPermitted
from hwbpd.network import Incoming
from hwbpd.peers import Connection, Peer
from hwbpd.settings import Limits

log = structlog.get_logger("hwbpd")

# Longer than any id that a ZeroMQ peer can choose for itself (255 bytes): nobody there can be taken for somebody here.
ROUTE_BYTES = 256

PACKET_BYTES_MAX = 2**20  # to a client: docs/protocol.md lets it prepare for as much
HEAD_BYTES = 1024  # more than a message of hits has beside its records
RECORD_BYTES_MAX = 2**16  # one that came over the budget of a message

BACKLOG = 128
CONNECTIONS_PER_LOOK = 32
LINES_PER_LOOK = 64

SO_PASSRIGHTS = 83  # since Linux 6.16; Python 3.11 has no name for either
SO_SNDBUFFORCE = 32

_NO_MEMORY = frozenset({errno.ENOBUFS, errno.ENOMEM})  # the host's, so there is nothing to poll for


class NotHere(Exception):
    """This kernel cannot do it, or not as safely as it must be; the message says why."""


class _Line:
    """One connection."""

    __slots__ = ("connection", "is_hung_up", "route", "socket", "wants_room")

    def __init__(self, accepted: socket.socket, number: int, credentials: tuple[int, int, int]) -> None:
        pid, uid, gid = credentials
        self.socket = accepted
        # No descriptor: those are used again, and libzmq, which has connections of its own, tells of their end later.
        self.connection = Connection(-number, f"localhost:{uid}:{gid}:{pid}")
        self.route = number.to_bytes(ROUTE_BYTES, "big")
        self.wants_room = False
        self.is_hung_up = False  # by us


class SeqpacketNetwork:
    """
    A SEQPACKET socket at ``path``; ``Network`` says what its methods do.

    :param mode: of the socket file: who may connect.
    :param hits_bytes: the most that one message of hits carries.
    :raises NotHere: where the kernel cannot refuse descriptors, or does not let a message of hits through.
    :raises OSError: when it cannot be bound.

    ``limits`` hold as for ZeroMQ, and are counted apart from it; beyond ``limits.sessions`` connections only root's are
    taken, so that descriptors never run out.
    """

    def __init__(self, path: Path, limits: Limits, mode: int, clock: Clock, hits_bytes: int) -> None:
        self._path = path
        self._limits = limits
        self._clock = clock
        self._send_buffer_bytes = 2 * (hits_bytes + RECORD_BYTES_MAX + HEAD_BYTES)
        self._packet_bytes_max = min(limits.message_bytes, PACKET_BYTES_MAX)
        self._made = 0
        self._lines: dict[int, _Line] = {}  # by descriptor
        self._by_route: dict[bytes, _Line] = {}
        self._ready: deque[_Line] = deque()
        self._lost: deque[int] = deque()
        self._woke = False
        self._may_have_more = True  # than was last looked at; until ``woke``, once nothing was found
        self._knocking = False  # somebody may wait to be accepted
        self._is_full = False  # and could not be, for want of descriptors or memory
        self._connections = Connections(limits, self._hang_up)
        self._epoll = select.epoll()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._check_kernel()
            self._listen(mode)
        except BaseException:
            self._listener.close()
            self._epoll.close()
            raise

    def _check_kernel(self) -> None:
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)  # those accepted inherit it
        except OSError:
            raise NotHere("it takes Linux 6.16 to refuse descriptors that a peer sends along") from None
        granted = _widen(self._listener, self._send_buffer_bytes)
        if granted < self._send_buffer_bytes // 2:
            needed = f"{self._send_buffer_bytes // 2} are needed (rings.bytes_per_message)"
            raise NotHere(f"net.core.wmem_max lets {granted} bytes wait for a client; {needed}")

    def _listen(self, mode: int) -> None:
        # Whoever has the lock beside the socket may do this: what is there was left by a daemon that was killed.
        self._path.unlink(missing_ok=True)
        old_mask = os.umask(0o777 & ~mode)
        try:
            self._listener.bind(str(self._path))
        finally:
            os.umask(old_mask)
        self._listener.listen(BACKLOG)
        # Edge-triggered: whoever cannot be accepted for want of descriptors must not keep the loop awake.
        self._epoll.register(self._listener.fileno(), select.EPOLLIN | select.EPOLLET)

    def close(self) -> None:
        """Hang up on everybody and remove the socket file. What was sent can still be read at the other end."""
        for line in self._lines.values():
            line.socket.close()
        self._listener.close()
        self._epoll.close()
        self._path.unlink(missing_ok=True)

    # --- what comes in -----------------------------------------------------------------------------------------------

    def descriptors(self) -> Sequence[int]:
        return (self._epoll.fileno(),)  # of all connections: what a turn costs does not grow with those that are idle

    def woke(self, fd: int) -> None:
        if fd == self._epoll.fileno():
            self._woke = self._may_have_more = True

    def has_news(self) -> bool:
        return bool(self._ready or self._lost or self._knocking)  # of all else the descriptor tells, and goes on to

    def receive(self) -> Incoming | None:
        while self._ready or (self._may_have_more and self._look()):
            line = self._ready.popleft()
            data = self._read(line)
            if data is not None:
                return Incoming(line.route, line.connection, data)
        return None

    def lost_connections(self, to_be_sure: bool = False) -> Iterator[int]:
        self._knocking = self._knocking or self._is_full  # a descriptor may have become free: try once more
        if (self._woke or self._knocking) and not self._ready:
            self._look()
        self._woke = False
        self._connections.hang_up_on_silent(self._clock.now_ns())
        while self._lost:
            yield self._lost.popleft()

    def _look(self) -> bool:
        """Take in what has happened to connections; return whether any has something to be read."""
        happened = self._epoll.poll(0, LINES_PER_LOOK)
        self._may_have_more = bool(happened)
        for fd, events in happened:
            line = self._lines.get(fd)
            if line is None:
                self._knocking = True
                continue
            if events & select.EPOLLOUT:
                self._await_room(line, False)
            if events & select.EPOLLHUP and (line.is_hung_up or not _has_packet(line.socket)):
                self._end(line)
            elif events & ~select.EPOLLOUT:
                self._ready.append(line)
        if self._knocking:
            self._accept()
        return bool(self._ready)

    def _read(self, line: _Line) -> bytes | None:
        """Return one message; None when there is none, or when the connection is over."""
        if line.is_hung_up:
            self._end(line)
            return None
        most = self._packet_bytes_max
        try:
            data = line.socket.recv(most + 1)
        except BlockingIOError:
            return None
        except OSError:  # it was reset: what it had sent before is still to be read, and then its end
            return None
        if not 0 < len(data) <= most:
            self._end(line)
            return None
        return data

    # --- connections -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(CONNECTIONS_PER_LOOK):
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                self._knocking = self._is_full = False
                return
            except OSError as why:
                if why.errno == errno.ECONNABORTED:
                    continue
                if not self._is_full:
                    log.warning("cannot accept", socket=str(self._path), reason=str(why))
                self._knocking, self._is_full = False, True
                return
            self._admit(accepted)

    def _admit(self, accepted: socket.socket) -> None:
        credentials = peers.credentials_of(accepted)
        uid, now_ns = credentials[1], self._clock.now_ns()
        is_crowded = uid != ROOT and len(self._lines) >= self._limits.sessions
        if is_crowded or not self._connections.may_connect(uid, now_ns):
            accepted.close()
            return
        accepted.setblocking(False)
        _widen(accepted, self._send_buffer_bytes)
        self._made += 1
        line = _Line(accepted, self._made, credentials)
        self._lines[accepted.fileno()] = line
        self._by_route[line.route] = line
        self._epoll.register(accepted.fileno(), select.EPOLLIN)
        self._connections.accepted(accepted.fileno(), now_ns)

    def identify(self, connection: Connection) -> Peer:
        line = self._by_route.get((-connection.fd).to_bytes(ROUTE_BYTES, "big"))
        if line is None:
            raise NotPermitted("your connection is gone; connect again")
        self._connections.said_hello(line.socket.fileno())
        return peers.at_other_end(line.socket)

    def hang_up_on_users(self) -> None:
        self._connections.hang_up_on_users()

    def _hang_up(self, fd: int) -> None:
        line = self._lines[fd]
        line.is_hung_up = self._may_have_more = True
        line.socket.shutdown(socket.SHUT_RDWR)  # which epoll tells us of; until then it may be somewhere in our hands

    def _end(self, line: _Line) -> None:
        fd = line.socket.fileno()
        self._connections.lost(fd)
        self._epoll.unregister(fd)
        del self._lines[fd], self._by_route[line.route]
        line.socket.close()
        self._lost.append(line.connection.fd)

    # --- what goes out -----------------------------------------------------------------------------------------------

    def send(self, routing_id: bytes, data: bytes) -> bool:
        line = self._by_route.get(routing_id)
        if line is None:
            return True
        try:
            line.socket.send(data)
        except BlockingIOError:
            self._await_room(line, True)
            return False
        except OSError as why:
            if why.errno == errno.EMSGSIZE:
                return self._send_long(line, data)
            return why.errno not in _NO_MEMORY
        return True

    def _send_long(self, line: _Line, data: bytes) -> bool:
        """Send what is longer than what may wait for a connection, if more may be allowed to; else the end of it."""
        wanted = len(data) + HEAD_BYTES  # the kernel keeps some of it for itself
        if len(data) <= PACKET_BYTES_MAX and _widen(line.socket, 2 * wanted) >= wanted:
            return self.send(line.route, data)
        log.warning("hung up", peer=line.connection.address, reason=f"a reply of {len(data)} bytes is too long")
        self._hang_up(line.socket.fileno())
        return True

    def _await_room(self, line: _Line, wants_room: bool) -> None:
        if line.wants_room is not wants_room:
            line.wants_room = wants_room
            self._epoll.modify(line.socket.fileno(), select.EPOLLIN | (select.EPOLLOUT if wants_room else 0))


def _has_packet(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except OSError:  # reset, or nothing there; a packet behind that is told of again
        return True


def _widen(connection: socket.socket, bytes_wanted: int) -> int:
    """Let more wait for the other end, as far as the kernel lets us; return how much that is now."""
    for option in (SO_SNDBUFFORCE, socket.SO_SNDBUF):
        try:
            connection.setsockopt(socket.SOL_SOCKET, option, bytes_wanted // 2)  # which Linux doubles
        except PermissionError:
            continue
        break
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
