"""
The only socket: requests, replies, notices, and the end of a session.

Rules kept here: one request at a time, each with a deadline that the daemon is told as well; whatever arrives meanwhile
goes to the inbox of its claim; a session that is lost stays lost. ZeroMQ would reconnect by itself, to a daemon that no
longer knows us, so reconnecting is switched off and the socket's monitor tells when the connection went.

Not safe: use from several threads at once, and use after ``fork`` (refused). Open one connection for each.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from hwbp.errors import BadClaim, BadMessage, HwbpError, NotReachable, RequestTimedOut, Stale, refusal_of
from hwbp.inbox import Inbox
from hwbp.values import Change, Counts, Ended, value_of

PROTOCOL_VERSION = 1

# Messages that wait in this process while nobody reads. When they and the kernel's buffer are full, they wait in the
# daemon, whose own bound then drops hits and counts them as ``dropped``. Small, as one message may hold megabytes.
RECEIVE_HIGH_WATER = 256

_NOBODY = -1  # no request has this id


def socket_path(chosen: str | os.PathLike[str] | None = None) -> Path:
    """Return where the daemon listens: ``chosen``, else as docs/protocol.md orders it."""
    for said in (chosen, os.environ.get("HWBPD_SOCKET")):
        if said:
            return Path(said).absolute()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and (of_user := Path(runtime).absolute() / "hwbpd" / "hwbpd.sock").exists():
        return of_user
    return Path("/run/hwbpd/hwbpd.sock")


class Connection:
    """One session with the daemon."""

    def __init__(self, path: Path, name: str, timeout_s: float) -> None:
        """
        Connect and say hello.

        :param timeout_s: how long to wait for any reply.
        :raises NotReachable: when nobody answers at ``path``.
        """
        _probe(path)
        self.path = path
        self.over: Ended | None = None
        self.welcome: dict[str, Any] = {}
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._last_id = 0
        self._awaited_id = _NOBODY
        self._reply: dict[str, Any] | None = None
        self._notices = 0
        self._inboxes: dict[int, Inbox] = {}
        self._disconnected = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0  # what was not sent when we close is of no use to anybody
        self._socket.rcvhwm = RECEIVE_HIGH_WATER
        self._socket.reconnect_ivl = -1
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(f"ipc://{path}")
            self.welcome = self._hello(name)
        except BaseException:
            self._end(Ended("closed", "hello was not answered"))
            self._close_socket()
            raise

    def _hello(self, name: str) -> dict[str, Any]:
        try:
            return self.request("hello", version=PROTOCOL_VERSION, client=name)
        except RequestTimedOut as silence:
            why = f"something listens, but did not answer within {self._timeout_s:g} s; is it hwbpd, and is it running?"
            raise _not_reachable(self.path, why) from silence
        except Stale as lost:
            raise _not_reachable(self.path, "whoever listens there closed the connection") from lost

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """
        Send one request and return its reply, taking in the notices before it.

        :raises HwbpError: the class that the reply names when it is a refusal.
        :raises RequestTimedOut: when no reply comes within the time this connection was made with.
        :raises Stale: when the session is over; ``BadMessage`` when it is because the daemon could not be understood.
        """
        self._check_process()
        self._check_session()
        deadline_ns = time.monotonic_ns() + int(self._timeout_s * 1e9)
        self._reply = None
        self._awaited_id = self._send(op, fields, deadline_ns)
        try:
            while self._reply is None:
                if not self._take_in(deadline_ns):
                    self._check_session()
                    raise RequestTimedOut(f"hwbpd did not answer {op!r} within {self._timeout_s:g} s")
        finally:
            self._awaited_id = _NOBODY  # a reply that comes later finds nobody
        reply, self._reply = self._reply, None
        if reply["op"] != "error":
            return reply
        refusal = refusal_of(reply)
        if isinstance(refusal, Stale):
            self._end(Ended("stale", str(refusal)))
        raise refusal

    def wait(self, deadline_ns: int | None, until: int | None = None) -> bool:
        """
        Take in one message, or learn that the session is over.

        :param deadline_ns: CLOCK_MONOTONIC; None waits for ever.
        :param until: a file descriptor; when it becomes readable the wait ends.
        :return: whether something arrived.
        """
        self._check_process()
        return not self.over and (self._take_in(deadline_ns, until) or self.over is not None)

    def open_inbox(self, claim_id: int) -> Inbox:
        """From now on keep what arrives for that claim."""
        self._inboxes[claim_id] = inbox = Inbox()
        return inbox

    def end_claim(self, claim_id: int, ended: Ended, final: Counts | None = None) -> None:
        """The claim is over; nothing more will come for it."""
        if inbox := self._inboxes.pop(claim_id, None):
            inbox.end(ended, final)

    def close(self) -> None:
        """Say goodbye and wait for the answer: when this returns the slots are free. Every claim is over."""
        if self._context.closed or os.getpid() != self._pid:
            return
        try:
            if not self.over:
                self.request("goodbye")
        except HwbpError:
            pass  # nobody answers: the daemon ends the session when the socket closes
        finally:
            self._end(Ended("closed", "this client was closed"))
            self._close_socket()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(f"this connection belongs to process {self._pid}; connect again after fork")

    def _check_session(self) -> None:
        if self.over:
            raise (BadMessage if self.over.reason == "protocol" else Stale)(self.over.sentence)

    def _send(self, op: str, fields: dict[str, Any], deadline_ns: int) -> int:
        """Send a request and return its id."""
        self._last_id += 1
        session = {} if op == "hello" else {"epoch": self.welcome["epoch"], "deadline_ns": deadline_ns}
        try:
            data = msgpack.packb({"op": op, "id": self._last_id} | session | fields)
        except (OverflowError, ValueError) as error:
            raise BadClaim(f"a number of this {op!r} request does not fit in 64 bits") from error
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:  # only without a connection: there is one request under way at most
            self._end(Ended("connection", _lost(self.path)))
            raise Stale(_lost(self.path)) from None
        return self._last_id

    def _take_in(self, deadline_ns: int | None, until: int | None = None) -> bool:
        """Take in one message; False when none came before the deadline, ``until``, or the end of the session."""
        if until is not None:
            self._poller.register(until, zmq.POLLIN)
        try:
            while not self.over:
                try:
                    self._accept(self._socket.recv_multipart(zmq.NOBLOCK))
                    return True
                except zmq.Again:
                    pass
                if self._disconnected:  # and what came before that has been read
                    self._end(Ended("connection", _lost(self.path)))
                    break
                readable = dict(self._poller.poll(_milliseconds_until(deadline_ns)))
                if self._monitor in readable:
                    recv_monitor_message(self._monitor)
                    self._disconnected = True
                elif self._socket not in readable:
                    return False
            return False
        finally:
            if until is not None:
                self._poller.unregister(until)

    def _accept(self, frames: list[bytes]) -> None:
        try:
            (frame,) = frames
            message = msgpack.unpackb(frame)
            if "id" in message:
                self._accept_reply(message)
            else:
                self._accept_notice(message)
        except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException, BadMessage) as error:
            self._end(Ended("protocol", f"the daemon at {self.path} sent what this client cannot read: {error!r}"))

    def _accept_reply(self, message: dict[str, Any]) -> None:
        # An unreadable request is refused under id 0, which we never use; only the current one can be meant.
        if message["id"] == self._awaited_id or (message["id"] == 0 and message["op"] == "error"):
            self._reply = message
        elif message["op"] == "granted":
            # The daemon granted in time and we had stopped waiting: nobody knows this claim, so give it back.
            deadline_ns = time.monotonic_ns() + int(self._timeout_s * 1e9)
            self._send("release", {"claim": message["claim"]}, deadline_ns)

    def _accept_notice(self, message: dict[str, Any]) -> None:
        self._notices += 1
        if message["n"] != self._notices:
            # Counts would no longer add up, and the end of a claim may be what is missing.
            raise BadMessage(f"notice {message['n']} came where {self._notices} was due")
        match message["op"]:
            case "hits":
                if inbox := self._inboxes.get(message["claim"]):
                    records, count = message["records"], message["count"]
                    inbox.keep(records, count, message.get("lost", 0), message.get("dropped", 0))
            case "guarded" | "suspended" | "resumed":
                self._keep_change(message["claim"], message["op"], message)
            case "lost" if message.get("cpu") is not None:
                self._keep_change(message["claim"], message["reason"], message)
            case "lost":
                ended = Ended(message["reason"], message["sentence"])
                self.end_claim(message["claim"], ended, value_of(Counts, message))
            case "closing":
                self._end(Ended("closing", message["sentence"]))
            case _:
                pass  # a notice of a later daemon

    def _keep_change(self, claim_id: int, what: str, message: dict[str, Any]) -> None:
        if inbox := self._inboxes.get(claim_id):
            inbox.change(Change(what, message["sentence"], message.get("cpu")))

    def _end(self, ended: Ended) -> None:
        """The session is over, and with it every claim."""
        if self.over is None:
            self.over = ended
        for inbox in self._inboxes.values():
            inbox.end(ended)
        self._inboxes.clear()

    def _close_socket(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()


def _probe(path: Path) -> None:
    """
    Raise NotReachable, with the kernel's reason, when nobody listens at ``path``.

    ZeroMQ's connect never fails; a plain connect to the same socket does, and says why.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.setblocking(False)
            probe.connect(str(path))
        except BlockingIOError:
            pass  # somebody listens and is busy
        except FileNotFoundError:
            raise _not_reachable(path, "there is no such socket") from None
        except ConnectionRefusedError:
            raise _not_reachable(path, "the socket file is there, but nobody listens") from None
        except PermissionError:
            denied = f"no way to hwbpd at {path}: access is denied; its setting socket_mode says who may connect"
            raise NotReachable(denied) from None
        except OSError as error:
            raise _not_reachable(path, str(error)) from error


def _not_reachable(path: Path, why: str) -> NotReachable:
    return NotReachable(f"no hwbpd at {path}: {why}. Start the daemon with: hwbpd (as root)")


def _lost(path: Path) -> str:
    return f"the connection to hwbpd at {path} was lost; its claims are over"


def _milliseconds_until(deadline_ns: int | None) -> int | None:
    """Return the time left, rounded up, so that a wait never ends before its deadline."""
    if deadline_ns is None:
        return None
    return max(0, -((time.monotonic_ns() - deadline_ns) // 1_000_000))
