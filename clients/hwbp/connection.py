"""
One connection: requests, replies, notices, and the end of a session.

Rules kept here: one request at a time, each with a deadline that the daemon is told as well; whatever arrives meanwhile
goes to the inbox of its claim; a session that is lost stays lost. What carries the messages is in ``transport.py``.

Not safe: use from several threads at once, and use after ``fork`` (refused). Open one connection for each.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgpack

from hwbp import transport
from hwbp.errors import (
    BadClaim,
    BadMessage,
    HwbpError,
    RequestTimedOut,
    Stale,
    holder_of,
    holders_of,
    refusal_of,
)
from hwbp.follow import Decisions
from hwbp.inbox import Inbox
from hwbp.values import Change, Counts, Ended, value_of

PROTOCOL_VERSION = 1

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

    def __init__(self, path: Path, name: str, timeout_s: float, carrier: str = "auto") -> None:
        """
        Connect and say hello.

        :param timeout_s: how long to wait for any reply.
        :param carrier: one of ``transport.TRANSPORTS``.
        :raises NotReachable: when nobody answers at ``path``.
        """
        self._transport = transport.connect(path, carrier, timeout_s)
        self._is_closed = False
        self.path = path
        self.over: Ended | None = None
        self.welcome: dict[str, Any] = {}
        self.decisions: Decisions | None = None  # where they are kept, in a session that follows
        self.timeout_s = timeout_s
        self._pid = os.getpid()
        self._last_id = 0
        self._awaited_id = _NOBODY
        self._reply: dict[str, Any] | None = None
        self._notices = 0
        self._inboxes: dict[int, Inbox] = {}
        self.told_of_vcpu: dict[int, dict[str, Any] | None] = {}  # vCPUs of this session: what to load, if anything
        self.kgdb_claims = 0  # claims of kgdb that have registers of the host, as last heard
        self._looked_into: set[int] = set()  # claims of which it will be told, after their end, who took their slot
        try:
            self.welcome = self._hello(name)
        except BaseException:
            self._end(Ended("closed", "hello was not answered"))
            self._close_transport()
            raise

    def _hello(self, name: str) -> dict[str, Any]:
        try:
            return self.request("hello", version=PROTOCOL_VERSION, client=name)
        except RequestTimedOut as silence:
            why = f"something listens, but did not answer within {self.timeout_s:g} s; is it hwbpd, and is it running?"
            raise transport.not_reachable(self.path, why) from silence
        except Stale as lost:
            raise transport.not_reachable(self.path, "whoever listens there closed the connection") from lost
        except BadMessage as gibberish:
            if self.over is None:  # a daemon has refused it, in words
                raise
            why = "whoever listens there says what hwbpd would not; is it hwbpd?"
            raise transport.not_reachable(self.path, why) from gibberish

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """
        Send one request and return its reply, taking in the notices before it.

        :raises HwbpError: the class that the reply names when it is a refusal.
        :raises RequestTimedOut: when no reply comes within the time this connection was made with.
        :raises Stale: when the session is over; ``BadMessage`` when it is because the daemon could not be understood.
        """
        self._check_process()
        self._check_session()
        deadline_ns = time.monotonic_ns() + int(self.timeout_s * 1e9)
        self._reply = None
        self._awaited_id = self._send(op, fields, deadline_ns)
        try:
            while self._reply is None:
                if not self._take_in(deadline_ns):
                    self._check_session()
                    raise RequestTimedOut(f"hwbpd did not answer {op!r} within {self.timeout_s:g} s")
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

    def look_into(self, claim_id: int, whether: bool = True) -> None:
        """From now on expect to be told who took its slot (``foreign``), or no more."""
        (self._looked_into.add if whether else self._looked_into.discard)(claim_id)

    def is_looked_into(self, claim_id: int) -> bool:
        """Whether that is still to be told."""
        return claim_id in self._looked_into and not self.over

    def end_claim(self, claim_id: int, ended: Ended, final: Counts | None = None) -> None:
        """The claim is over; nothing more will come for it, but who took its slot if it is looked into."""
        if inbox := self._inboxes.get(claim_id):
            inbox.end(ended, final)
            if claim_id not in self._looked_into:
                del self._inboxes[claim_id]

    def close(self) -> None:
        """Say goodbye and wait for the answer: when this returns the slots are free. Every claim is over."""
        if self._is_closed or os.getpid() != self._pid:
            return
        try:
            if not self.over:
                self.request("goodbye")
        except HwbpError:
            pass  # nobody answers: the daemon ends the session when the socket closes
        finally:
            self._end(Ended("closed", "this client was closed"))
            self._close_transport()

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
            if not self._transport.send(data, deadline_ns):
                raise RequestTimedOut(f"hwbpd read nothing for {self.timeout_s:g} s, so {op!r} could not be asked")
        except transport.Lost:
            while self._take_in(0):  # what came before; it may say why
                pass
            self._end(Ended("connection", _lost(self.path)))
            self._check_session()
        return self._last_id

    def _take_in(self, deadline_ns: int | None, until: int | None = None) -> bool:
        """Take in one message; False when none came before the deadline, ``until``, or the end of the session."""
        if self.over:
            return False
        try:
            data = self._transport.receive(deadline_ns, until)
        except transport.Lost:
            self._end(Ended("connection", _lost(self.path)))
            return False
        except transport.Unreadable as what:
            self._end_unreadable(what)
            return True
        if data is None:
            return False
        self._accept(data)
        return True

    def _accept(self, data: bytes | memoryview) -> None:
        try:
            message = msgpack.unpackb(data)
            if "id" in message:
                self._accept_reply(message)
            else:
                self._accept_notice(message)
        except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException, BadMessage) as error:
            self._end_unreadable(error)

    def _end_unreadable(self, error: Exception) -> None:
        self._end(Ended("protocol", f"the daemon at {self.path} sent what this client cannot read: {error!r}"))

    def _accept_reply(self, message: dict[str, Any]) -> None:
        # An unreadable request is refused under id 0, which we never use; only the current one can be meant.
        if message["id"] == self._awaited_id or (message["id"] == 0 and message["op"] == "error"):
            self._reply = message
        elif message["op"] in ("granted", "queued"):
            # The daemon read it in time and we had stopped waiting: nobody knows this claim, so give it back.
            deadline_ns = time.monotonic_ns() + int(self.timeout_s * 1e9)
            self._send("release", {"claim": message["claim"]}, deadline_ns)

    def _accept_notice(self, message: dict[str, Any]) -> None:
        self._notices += 1
        if message["n"] != self._notices:
            # Counts would no longer add up, and the end of a claim may be what is missing.
            raise BadMessage(f"notice {message['n']} came where {self._notices} was due")
        match message["op"]:
            case "decision":
                if self.decisions is not None:
                    self.decisions.keep(message)
            case "registers":
                self.told_of_vcpu[message["vcpu"]] = message
            case "kgdb":
                self.kgdb_claims = message["claims"]
            case "closing":
                self._end(Ended("closing", message["sentence"]))
            case "lost" if message.get("cpu") is None:
                errno, holders = message.get("errno", ""), holders_of(message)
                ended = Ended(message["reason"], message["sentence"], errno, holders)
                self.end_claim(message["claim"], ended, value_of(Counts, message))
            case _:
                if inbox := self._inboxes.get(message.get("claim", _NOBODY)):
                    self._accept_about(inbox, message)

    def _accept_about(self, inbox: Inbox, message: dict[str, Any]) -> None:
        """Keep what is told of a claim of this session that goes on, or was looked into."""
        match message["op"]:
            case "hits":
                records, count = message["records"], message["count"]
                inbox.keep(records, count, message.get("lost", 0), message.get("dropped", 0))
            case "granted":
                inbox.granted = message
            case "lost":
                inbox.change(_change(message["reason"], message))
            case "guarded" | "revoke" | "spared" | "suspended" | "resumed" | "contended" | "loaded" as what:
                inbox.change(_change(what, message))
            case "foreign":
                inbox.change(_change("foreign", message))
                self._looked_into.discard(message["claim"])
                if inbox.ended:
                    del self._inboxes[message["claim"]]
            case _:
                pass  # a notice of a later daemon

    def _end(self, ended: Ended) -> None:
        """The session is over, and with it every claim."""
        if self.over is None:
            self.over = ended
        for inbox in self._inboxes.values():
            inbox.end(ended)
        self._inboxes.clear()

    def _close_transport(self) -> None:
        self._is_closed = True
        self._transport.close()


def _lost(path: Path) -> str:
    return f"the connection to hwbpd at {path} was lost; its claims are over"


def _change(what: str, message: dict[str, Any]) -> Change:
    holders = (holder_of(message["by"]),) if "by" in message else holders_of(message)
    return Change(what, message["sentence"], message.get("cpu"), holders, message.get("deadline_ns", 0))
