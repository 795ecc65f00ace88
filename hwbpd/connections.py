"""
Every connection from accept to loss, whether or not it ever says hello: what a stranger may cost.

1. A user other than root may have ``connections_per_uid`` at a time; one more is hung up on.
2. Whoever has not said hello within ``HELLO_WITHIN_NS`` is hung up on, root too: a half-open connection holds a
   descriptor.
3. A user other than root may make ``connections_per_uid_per_s`` new ones a second in the long run: each costs a
   handshake, and brings who chose a routing id nearer to one that libzmq will make up (``network.py``).
4. When the daemon has more memory than it should (``memory.py``), every user other than root is hung up on: who sent
   too much cannot be told.

We learn of connections a moment after libzmq has accepted them, through its monitor, and cannot close them ourselves:
shutting the socket down makes libzmq do it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from msgspec import Struct

from hwbpd import peers
from hwbpd.settings import Limits

HELLO_WITHIN_NS = 10_000_000_000
NS_PER_S = 1_000_000_000
ROOT = 0

class _Allowance(Struct):
    """A token bucket of new connections: so many are left, as of then."""

    left: float
    as_of_ns: int


class Connections:
    """
    Counted by the descriptor of each.

    :param hang_up: how to hang up on one; it must not say that it is lost before it has returned.
    """

    def __init__(self, limits: Limits, hang_up: Callable[[int], None] | None = None) -> None:
        self._limits = limits
        self._hang_up = hang_up or shut_down
        self._uid: dict[int, int] = {}
        self._of_uid: dict[int, int] = {}
        self._strangers: dict[int, int] = {}  # fd -> when it must have said hello, oldest first
        self._allowances: dict[int, _Allowance] = {}

    def may_connect(self, uid: int, now_ns: int) -> bool:
        """Rule 3, asked in the handshake."""
        if uid == ROOT:
            return True
        most = self._limits.connections_per_uid
        allowance = self._allowances.setdefault(uid, _Allowance(most, now_ns))
        earned = (now_ns - allowance.as_of_ns) * self._limits.connections_per_uid_per_s / NS_PER_S
        allowance.left, allowance.as_of_ns = min(most, allowance.left + earned), now_ns
        if allowance.left < 1:
            return False
        allowance.left -= 1
        return True

    def accepted(self, fd: int, now_ns: int) -> None:
        """A connection is there."""
        self.lost(fd)
        uid = _uid_of(fd)
        if uid is None:
            return  # gone already
        self._uid[fd] = uid
        self._of_uid[uid] = self._of_uid.get(uid, 0) + 1
        if uid != ROOT and self._of_uid[uid] > self._limits.connections_per_uid:
            self._hang_up(fd)
        self._strangers[fd] = now_ns + HELLO_WITHIN_NS

    def said_hello(self, fd: int) -> None:
        self._strangers.pop(fd, None)

    def lost(self, fd: int) -> None:
        """It is gone."""
        self._strangers.pop(fd, None)
        uid = self._uid.pop(fd, None)
        if uid is not None:
            self._of_uid[uid] -= 1
            if not self._of_uid[uid]:
                del self._of_uid[uid]

    def hang_up_on_users(self) -> None:
        """Rule 4."""
        for fd, uid in tuple(self._uid.items()):
            if uid != ROOT:
                self._hang_up(fd)

    def hang_up_on_silent(self, now_ns: int) -> None:
        """Rule 2."""
        while self._strangers:
            fd, by_ns = next(iter(self._strangers.items()))
            if by_ns > now_ns:
                return
            del self._strangers[fd]
            self._hang_up(fd)


def shut_down(fd: int) -> None:
    """Shut a connection of libzmq's down; it may be gone already."""
    with contextlib.suppress(OSError), peers.copy_of(fd) as copy:
        copy.shutdown(socket.SHUT_RDWR)


def _uid_of(fd: int) -> int | None:
    with contextlib.suppress(OSError), peers.copy_of(fd) as copy:
        return peers.credentials_of(copy)[1]
    return None
