"""
A message of a hostile client, and what can be known of its reply before it comes.

A reply repeats the id of its message, or is under 0 where that could not be read. Messages are answered in their order,
but for those for which the daemon has to look at others first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack

ID_MAX = 2**62
LATE = frozenset({"foreign", "claim"})


class Said(NamedTuple):
    """One message, and what is known of its reply."""

    data: bytes
    ids: frozenset[int]  # that the reply may have
    op: str | None  # of a request; None where the bytes are none that we can read
    wrong: str | None = None  # the field that must be named
    right: bool = False  # a request of the protocol, whatever becomes of it
    may_be_late: bool = False  # the daemon may have to look at others first, and serve later messages meanwhile


def pack(message: Any) -> bytes:
    """Return it as the daemon is to read it, right or wrong."""
    packed: bytes = msgpack.packb(message)
    return packed


def right_request(request: dict[str, Any]) -> Said:
    """A request of the protocol, as it is meant to be."""
    op = request["op"]
    return Said(pack(request), frozenset({request["id"]}), op, right=True, may_be_late=op in LATE)


def read(data: bytes) -> Said:
    """What can be said of the reply to any bytes: it repeats something in them that looks like an id, or is under 0."""
    ids = {0}
    at = data.find(b"id")
    while at >= 0:
        ids.update(_number_at(data[at + 2 : at + 11]))
        at = data.find(b"id", at + 1)
    message = unpacked(data)
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        return Said(data, frozenset(ids), None)
    if message["op"] in LATE and _is_id(message.get("id")) and all(isinstance(key, str) for key in message):
        return Said(data, frozenset({message["id"]}), message["op"], may_be_late=True)
    return Said(data, frozenset(ids), message["op"])


def _number_at(data: bytes) -> list[int]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    try:
        found = unpacker.unpack()
    except (ValueError, TypeError, msgpack.UnpackException):
        return []
    return [found] if _is_id(found) else []


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= ID_MAX


def unpacked(data: bytes) -> Any:
    """Return what is in there; None also if it cannot be read."""
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):  # TypeError: a key that is a list or a map
        return None
