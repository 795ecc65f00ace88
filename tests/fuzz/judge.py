"""
Whether what the daemon sends to one connection is what docs/protocol.md promises.

Every message has exactly one reply, replies come in the order of the messages, each is one that the protocol has for
that request, and a refusal says why. Notices are numbered without a gap within a session, hits add up. Written from the
page, not from the daemon's own classes.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

from tests.fuzz.said import Said

SENTENCE_LEAST = 10  # characters; a refusal is a sentence

ERRNOS = frozenset(
    {"ENOSPC", "EAGAIN", "EPERM", "EINVAL", "EOPNOTSUPP", "ENOENT", "ESTALE", "ESRCH", "ENODEV", "ETIMEDOUT", "EDQUOT"}
    | {"EMFILE", "EPROTO", "EBADMSG"}
)
COUNTS: dict[str, type] = {"claim": int, "hits": int, "delivered": int, "lost": int, "dropped": int, "filtered": int}
HOLDER: dict[str, type] = {
    "pid": int,
    "comm": str,
    "uid": int,
    "kind": str,
    "slots": int,
    "place": str,
    "claim_ids": list,
    "evidence": str,
}
REPLIES: dict[str, dict[str, type]] = {
    "welcome": {"version": int, "epoch": int, "session": int, "machine": str, "backend": str},
    "granted": {"claim": int, "pieces": list, "ring_bytes": int, "kind": str, "guard": int},
    "released": COUNTS,
    "counts": COUNTS,
    "rearmed": {"claim": int},
    "fit": {"fits": bool, "pieces": list, "errno": str, "sentence": str, "holders": list}
    | {"over_reported": int},
    "plan": {"pieces": list, "slots": dict, "pools": dict, "over_reported": int},
    "slots": {"pools": dict, "cpus": list, "resources": list, "more": bool, "waiting": list},
    "foreign": {"holders": list},
    "capabilities": {
        "machine": str,
        "backend": str,
        "architecture": str,
        "pools": dict,
        "cpus_possible": list,
        "cpus_online": list,
        "registers": dict,
        "limits": dict,
        "pools_on": list,
    },
    "why": {"claim": int, "state": str, "lines": list},
    "following": {},
    "bye": {},
    "error": {"errno": str, "sentence": str, "holders": list, "claim": int},
}
NOTICES: dict[str, dict[str, type]] = {
    "hits": {"claim": int, "count": int, "records": bytes, "lost": int, "dropped": int},
    "lost": COUNTS | {"reason": str, "sentence": str, "cpu": int},
    "guarded": {"claim": int, "sentence": str},
    "resumed": {"claim": int, "sentence": str, "cpu": int},
    "suspended": {"claim": int, "sentence": str, "cpu": int},
    "contended": {"claim": int, "by": dict, "sentence": str},
    "revoke": {"claim": int, "by": dict, "sentence": str, "deadline_ns": int},
    "spared": {"claim": int, "sentence": str},
    "foreign": {"claim": int, "sentence": str, "holders": list},
    "closing": {"sentence": str},
    "decision": {
        "what": str,
        "at_ns": int,
        "session": int,
        "pid": int,
        "comm": str,
        "uid": int,
        "claim": int,
        "about": str,
        "kind": str,
        "label": str,
        "errno": str,
        "reason": str,
        "sentence": str,
        "cpu": int,
        "missed": int,
    },
}
REPLY_TO = {"hello": "welcome", "claim": "granted", "release": "released", "rearm": "rearmed", "goodbye": "bye"} | {
    "follow": "following"
}

# What was asked in a session and waits for a look at others is not answered any more when the session is over.
ENDS_SESSION = frozenset({"welcome", "bye"})


class Broken(AssertionError):
    """The daemon did not keep its word."""


class Judge:
    """Follows one connection. ``claims`` are those it has now."""

    def __init__(self) -> None:
        self.claims: list[int] = []
        self.has_session = False
        self.replies = 0
        self._awaited: deque[Said] = deque()  # as they were sent
        self._late: dict[int, Said] = {}  # by their ids: what was overtaken by the replies to others
        self._notices = 0
        self._delivered: dict[int, int] = {}

    def said(self, said: Said) -> None:
        """A message was sent."""
        self._awaited.append(said)

    @property
    def is_settled(self) -> bool:
        """Whether every message that is answered at once has been answered."""
        return all(said.may_be_late for said in self._awaited)

    def hear(self, message: Any) -> None:
        """Take in what the daemon sent; raises ``Broken``."""
        _demand(isinstance(message, dict), f"not a map: {message!r:.200}")
        op = message.get("op")
        if "n" in message:
            self._notice(op, message)
        else:
            self._reply(op, message)

    def _reply(self, op: Any, reply: dict[str, Any]) -> None:
        _demand(op in REPLIES, f"no such reply: {reply!r:.300}")
        _check_fields(reply, REPLIES[op], "id")
        said = self._answered_by(reply)
        self.replies += 1
        _check_answer(said, op, reply)
        match op:
            case "welcome":
                self._session(True)
            case "bye":
                self._session(False)
            case "granted":
                self.claims.append(reply["claim"])
                self._delivered[reply["claim"]] = 0
            case "released":
                self._over(reply)

    def _answered_by(self, reply: dict[str, Any]) -> Said:
        """Return the message that this is the reply to: the oldest without one, or one that was overtaken."""
        late = self._late.pop(reply["id"], None)
        if late is not None:
            return late
        while self._awaited:
            said = self._awaited.popleft()
            if reply["id"] in said.ids:
                if reply["op"] in ENDS_SESSION:
                    self._late.clear()
                return said
            _demand(said.may_be_late, f"{_told(said)} has no reply, but a later one has: {reply!r:.300}")
            self._late[next(iter(said.ids))] = said
        raise Broken(f"a reply that nobody asked for: {reply!r:.300}")

    def _notice(self, op: Any, notice: dict[str, Any]) -> None:
        _demand(op in NOTICES, f"no such notice: {notice!r:.300}")
        _check_fields(notice, NOTICES[op], "n")
        self._notices += 1
        _demand(notice["n"] == self._notices, f"notice {notice['n']} where {self._notices} was due")
        match op:
            case "hits":
                _demand(notice["claim"] in self._delivered, f"hits of claim {notice['claim']}, which is not ours")
                _demand(_records(notice["records"]) == notice["count"], "as many records as counted")
                self._delivered[notice["claim"]] += notice["count"]
            case "lost" if "cpu" not in notice:
                self._over(notice)
            case "closing":
                self._session(False)

    def _session(self, has_one: bool) -> None:
        self.has_session = has_one
        self._notices = 0
        self.claims.clear()
        self._delivered.clear()

    def _over(self, ended: dict[str, Any]) -> None:
        seen = self._delivered.pop(ended["claim"], None)
        if seen is None:
            return  # somebody else's, released by us as operator
        self.claims.remove(ended["claim"])
        _demand(ended["delivered"] == seen, f"{ended['delivered']} hits were delivered, and {seen} came")


def _check_answer(said: Said, op: str, reply: dict[str, Any]) -> None:
    if op != "error":
        _demand(said.wrong is None, f"{said.op} with a wrong {said.wrong!r} was served: {reply!r:.300}")
        wanted = said.op and REPLY_TO.get(said.op, said.op)
        _demand(wanted in (op, None), f"{said.op} was answered with {op}")
        return
    _check_error(reply)
    if said.right:
        _demand(reply["errno"] != "EBADMSG", f"{_told(said)} is a request of the protocol: {reply!r:.300}")
    if said.wrong is not None:
        _demand(reply["errno"] == "EBADMSG", f"{_told(said)} has a wrong {said.wrong!r}: {reply!r:.300}")
        _demand(said.wrong in reply["sentence"], f"the refusal does not name {said.wrong!r}: {reply!r:.300}")


def _check_error(error: dict[str, Any]) -> None:
    _demand(error["errno"] in ERRNOS, f"no such errno: {error!r:.300}")
    _demand(len(error["sentence"]) >= SENTENCE_LEAST, f"a refusal without a reason: {error!r:.300}")
    for holder in error.get("holders", ()):
        _check_fields(holder, HOLDER, None)


def _check_fields(message: dict[str, Any], fields: dict[str, type], number: str | None) -> None:
    if number is not None:
        _demand(type(message.get(number)) is int, f"without {number}: {message!r:.300}")
    for name, value in message.items():
        if name in ("op", number):
            continue
        _demand(name in fields, f"a field that the protocol does not have, {name!r}: {message!r:.300}")
        _demand(type(value) is fields[name], f"{name!r} is not of type {fields[name].__name__}: {message!r:.300}")


def _records(records: bytes) -> int:
    """How many records there are, by the size in each."""
    count = at = 0
    while at < len(records):
        kind, _misc, size = struct.unpack_from("=IHH", records, at)
        _demand(kind == 9 and size >= 48, f"a record of type {kind} and {size} bytes")
        at += size
        count += 1
    _demand(at == len(records), "records end where they end")
    return count


def _told(said: Said) -> str:
    return f"{said.op or 'what cannot be read'} ({said.data[:100].hex()})"


def _demand(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise Broken(otherwise)
