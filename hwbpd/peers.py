"""
Turns the process at the other end of a connection into somebody the core can reckon with.

Who a peer is comes from the kernel alone: SO_PEERCRED and SO_PEERPIDFD of the very socket that the message came
through, which the transport hands over as the metadata ``__fd``, checked against its ``Peer-Address``. What a message
says of its sender is never looked at. ZMTP 1.0 and 2.0 peers bring no metadata and are refused.

What a peer may do is decided in ``rights.py``.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct

import zmq
from msgspec import Struct

from hwbpd.core.errors import NotPermitted

SO_PEERPIDFD = 77  # since Linux 6.5; Python 3.11 has no name for it

_ucred = struct.Struct("=iII")


class Peer(Struct, frozen=True):
    """A process, pinned: ``pidfd`` names it even when its number is used again."""

    pid: int
    uid: int
    gid: int
    comm: str
    pidfd: int


class Connection(Struct, frozen=True):
    """A connection as libzmq names it: its descriptor here, and the credentials it was made with."""

    fd: int
    address: str


def connection_of(frame: zmq.Frame) -> Connection | None:
    """Return the connection that a frame came through, or None for peers whose transport says nothing of them."""
    try:
        return Connection(int(frame.get("__fd")), str(frame.get("Peer-Address")))
    except (zmq.ZMQError, ValueError):
        return None


def identify(connection: Connection) -> Peer:
    """
    Return the process at the other end of a connection; its ``pidfd`` then belongs to the caller.

    :raises NotPermitted: when the kernel cannot vouch for it, or it lives in other namespaces.
    """
    try:
        # A copy, because libzmq may close its descriptor at any time and the number be used again. It must not live
        # long: as long as it is open, the other end does not see ours close.
        with copy_of(connection.fd) as copy:
            peer = at_other_end(copy)
    except OSError as why:
        raise _unknown(why) from None
    if connection.address.rsplit(":", 3)[1:] != [str(peer.uid), str(peer.gid), str(peer.pid)]:
        close(peer)
        raise NotPermitted("your connection has changed hands; connect again")
    return peer


def at_other_end(connection: socket.socket) -> Peer:
    """
    Return the process at the other end of a socket; its ``pidfd`` then belongs to the caller.

    :raises NotPermitted: when the kernel cannot vouch for it.
    """
    try:
        pid, uid, gid = credentials_of(connection)
        pidfd = _pidfd_of(connection, pid)
    except OSError as why:
        raise _unknown(why) from None
    try:
        return Peer(pid, uid, gid, _comm(pid, pidfd), pidfd)
    except NotPermitted:
        os.close(pidfd)
        raise


def _unknown(why: OSError) -> NotPermitted:
    return NotPermitted(f"the kernel does not say who you are ({why.strerror}); connect again")


def credentials_of(connection: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of the other end, effective at its connect(); raises ``OSError``."""
    pid, uid, gid = _ucred.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size))
    return pid, uid, gid


def copy_of(fd: int) -> socket.socket:
    """Return a socket of our own on libzmq's descriptor, to be closed soon; raises ``OSError``."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def is_gone(pidfd: int) -> bool:
    """Whether the process has exited."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _pidfd_of(connection: socket.socket, pid: int) -> int:
    try:
        return struct.unpack("=i", connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))[0]  # type: ignore[no-any-return]
    except OSError:
        # Before Linux 6.5 there is a gap between connect() and this line in which the pid may be used again.
        return os.pidfd_open(pid)


def _comm(pid: int, pidfd: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            name = comm.read().strip()
    except OSError:
        name = None
    if name is None or is_gone(pidfd):  # what was read may then be of a later process with the same number
        raise NotPermitted("the process that connected is gone or cannot be looked at")
    return name


def close(peer: Peer) -> None:
    """Let go of the process."""
    with contextlib.suppress(OSError):
        os.close(peer.pidfd)
