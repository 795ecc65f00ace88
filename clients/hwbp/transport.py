"""
What carries messages between a client and the daemon: ZeroMQ, or AF_UNIX SEQPACKET where the daemon offers it.

Both keep the same promises to ``connection.py``: a message is bytes, whole and in order; waiting ends at a deadline, at
a message, when a descriptor of the caller's becomes readable, or when the connection is lost, which is told only after
all that came before it has been read. Neither reconnects: a daemon that comes back no longer knows us.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from pathlib import Path
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from hwbp.errors import NotReachable

TRANSPORTS = ("auto", "zmq", "seqpacket")
SUFFIX = ".seq"  # of the path, for SEQPACKET

# Messages that wait in this process while nobody reads. When they and the kernel's buffer are full, they wait in the
# daemon, whose own bound then drops hits and counts them as ``dropped``. Small, as one message may hold megabytes.
RECEIVE_HIGH_WATER = 256

PACKET_BYTES_MAX = 2**20  # of what the daemon sends, docs/protocol.md

MILLISECONDS_MAX = 2**31 - 1  # that poll() can wait

# As numbers: the operators of these enums cost more than what they ask for.
_EVENTS, _RCVMORE = int(zmq.EVENTS), int(zmq.RCVMORE)
_POLLIN, _NOBLOCK = int(zmq.POLLIN), int(zmq.NOBLOCK)

_credentials = struct.Struct("=iII")


class Lost(Exception):
    """There is no connection any more."""


class Unreadable(Exception):
    """Something came that cannot be a message; the connection is of no use any more."""


class Transport(Protocol):
    """One connection."""

    def send(self, data: bytes, deadline_ns: int) -> bool:
        """Send one message; false when there was no room for it until the deadline. Raises ``Lost``."""
        ...

    def receive(self, deadline_ns: int | None, until: int | None = None) -> bytes | memoryview | None:
        """
        Return the next message, which is good until the next call; None when there is none before the deadline.

        :param deadline_ns: CLOCK_MONOTONIC; None waits for ever.
        :param until: a file descriptor; when it becomes readable the wait ends.
        :raises Lost: when there is none to come; ``Unreadable`` for what is none.
        """
        ...

    def close(self) -> None:
        """Let go of the connection; what was not sent is dropped."""
        ...


def connect(path: Path, transport: str, timeout_s: float) -> Transport:
    """
    Connect to the daemon at ``path``.

    :param transport: "zmq", "seqpacket", or "auto" for SEQPACKET where it is offered, and ZeroMQ where it is not.
    :raises NotReachable: when nobody listens there.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"no transport {transport!r}: it is one of {', '.join(TRANSPORTS)}")
    if transport != "zmq":
        try:
            return Seqpacket(path, timeout_s)
        except NotReachable:
            if transport == "seqpacket":
                raise
    return Zmq(path)


class Zmq:
    """A DEALER. ZeroMQ would reconnect by itself, so that is switched off, and its monitor tells of the loss."""

    def __init__(self, path: Path) -> None:
        _probe(path)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0  # what was not sent when we close is of no use to anybody
        self._socket.rcvhwm = RECEIVE_HIGH_WATER
        self._socket.reconnect_ivl = -1
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        self._is_lost = False
        # By descriptor: zmq.Poller looks at every socket anew each time, for three times the cost.
        self._monitor_fd = int(self._monitor.get(zmq.FD))
        _is_readable(self._monitor)  # it says nothing of what came before it was first asked
        self._poll = select.poll()
        self._poll.register(int(self._socket.get(zmq.FD)), select.POLLIN)
        self._poll.register(self._monitor_fd, select.POLLIN)
        try:
            self._socket.connect(f"ipc://{path}")
        except BaseException:
            self.close()
            raise

    def send(self, data: bytes, deadline_ns: int) -> bool:
        try:
            self._socket.send(data, _NOBLOCK)
        except zmq.Again:  # only without a connection: there is one request under way at most
            raise Lost from None
        return True

    def receive(self, deadline_ns: int | None, until: int | None = None) -> bytes | None:
        if until is not None:
            self._poll.register(until, select.POLLIN)
        try:
            while True:
                # The descriptors are edge-triggered: look before sleeping. To ask (ZMQ_EVENTS) first would be
                # cheaper, but once the other side has gone, libzmq when asked forgets what had come before.
                with contextlib.suppress(zmq.Again):
                    return self._receive_one()
                if self._is_lost:  # and what came before that has been read
                    raise Lost
                ready = self._poll.poll(_milliseconds_until(deadline_ns))
                if not ready or any(fd == until for fd, _ in ready):
                    # What wakes us need not be a message, and a message may have come together with it.
                    with contextlib.suppress(zmq.Again):
                        return self._receive_one()
                    return None
                if any(fd == self._monitor_fd for fd, _ in ready):
                    while _is_readable(self._monitor):
                        recv_monitor_message(self._monitor)
                        self._is_lost = True
        finally:
            if until is not None:
                self._poll.unregister(until)

    def _receive_one(self) -> bytes:
        frame = self._socket.recv(_NOBLOCK)
        if int(self._socket.get(_RCVMORE)):
            raise Unreadable(f"{1 + len(self._socket.recv_multipart(_NOBLOCK))} frames")
        return frame

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()


class Seqpacket:
    """A SEQPACKET socket at ``PATH.seq``: a packet is a message, and an empty one the end."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """:raises NotReachable: also when it is not served by whom PATH belongs to."""
        beside = path.with_name(path.name + SUFFIX)
        self._buffer = bytearray(PACKET_BYTES_MAX)  # only as much of it as is used takes memory
        self._view = memoryview(self._buffer)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # While others wait to be let in, connect() waits, and this bounds how long.
            seconds, microseconds = divmod(max(1, int(timeout_s * 1e6)), 1_000_000)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", seconds, microseconds))
            _connect(self._socket, beside)
            self._check_who_listens(path, beside)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def _check_who_listens(self, path: Path, beside: Path) -> None:
        """Where everybody may make files, somebody else may have made this one."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _credentials.size)
        _, uid, _ = _credentials.unpack(credentials)
        try:
            owner = path.stat().st_uid
        except OSError:
            raise not_reachable(path, "there is no such socket") from None
        if uid != owner:
            raise not_reachable(beside, f"uid {uid} listens there, and {path} belongs to uid {owner}")

    def send(self, data: bytes, deadline_ns: int) -> bool:
        while True:
            try:
                self._socket.send(data)
            except BlockingIOError:
                pass
            except OSError:  # nobody reads it any more, or it is longer than anybody would
                raise Lost from None
            else:
                return True
            room = select.poll()
            room.register(self._socket, select.POLLOUT)
            if not room.poll(_milliseconds_until(deadline_ns)):
                return False

    def receive(self, deadline_ns: int | None, until: int | None = None) -> memoryview | None:
        if until is not None:
            self._poll.register(until, select.POLLIN)
        try:
            ready = self._poll.poll(_milliseconds_until(deadline_ns))
        finally:
            if until is not None:
                self._poll.unregister(until)
        if not any(fd == self._socket.fileno() for fd, _ in ready):
            return None
        try:
            size = self._socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)
        except ConnectionResetError:
            # Told once, when the daemon had not read all, and before what it had sent: that comes now.
            return self.receive(deadline_ns, until)
        if size > PACKET_BYTES_MAX:
            raise Unreadable(f"a packet of {size} bytes")
        if not size:
            raise Lost
        return self._view[:size]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # also where a fork has a copy of it
        self._socket.close()


def _is_readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.get(_EVENTS)) & _POLLIN)


def _probe(path: Path) -> None:
    """
    Raise NotReachable, with the kernel's reason, when nobody listens at ``path``.

    ZeroMQ's connect never fails; a plain connect to the same socket does, and says why.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # somebody listens and is busy
            _connect(probe, path)


def _connect(connection: socket.socket, path: Path) -> None:
    try:
        connection.connect(str(path))
    except BlockingIOError:
        if connection.getblocking():
            raise not_reachable(path, "so many wait to be let in that there is no room") from None
        raise
    except FileNotFoundError:
        raise not_reachable(path, "there is no such socket") from None
    except ConnectionRefusedError:
        raise not_reachable(path, "the socket file is there, but nobody listens") from None
    except PermissionError:
        denied = f"no way to hwbpd at {path}: access is denied; its setting socket_mode says who may connect"
        raise NotReachable(denied) from None
    except OSError as error:
        raise not_reachable(path, str(error)) from error


def not_reachable(path: Path, why: str) -> NotReachable:
    return NotReachable(f"no hwbpd at {path}: {why}. Start the daemon with: hwbpd (as root)")


def _milliseconds_until(deadline_ns: int | None) -> int | None:
    """Return the time left, rounded up, so that a wait never ends before its deadline."""
    if deadline_ns is None:
        return None
    return min(max(0, -((time.monotonic_ns() - deadline_ns) // 1_000_000)), MILLISECONDS_MAX)
