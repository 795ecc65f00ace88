"""
docs/protocol-vectors.json as values; and, run as a program, the bytes of messages that were added to it.

The bytes are frozen: a test holds the daemon to them, so they are made once and never made anew. To add a message,
write its name and map into the file and run

    python -m tests.conformance.vectors

which gives bytes to those that have none, by the daemon's own classes for what the daemon sends.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import msgspec

from hwbpd import messages, wire

PATH = Path(__file__).resolve().parents[2] / "docs" / "protocol-vectors.json"
KINDS: dict[str, type[messages.Message]] = {
    "requests": messages.Request,
    "replies": messages.Reply,
    "notices": messages.Notice,
}


class Vector(NamedTuple):
    """A message as a map and as bytes; ``kind`` is one of ``KINDS``."""

    kind: str
    name: str
    map: dict[str, Any]
    data: bytes

    @property
    def op(self) -> str:
        return str(self.map["op"])


class Refused(NamedTuple):
    """Bytes that the daemon answers with an error: ``id`` is the error's, 0 where none can be read."""

    name: str
    data: bytes
    id: int
    errno: str
    why: str


@cache
def vectors() -> tuple[Vector, ...]:
    """Every message of the file."""
    file = json.loads(PATH.read_text(encoding="utf-8"))
    return tuple(
        Vector(kind, row["name"], with_binary(row["map"]), bytes.fromhex(row["bytes"]))
        for kind in KINDS
        for row in file[kind]
    )


@cache
def refused() -> tuple[Refused, ...]:
    """Everything in the file that is refused."""
    rows = json.loads(PATH.read_text(encoding="utf-8"))["refused"]
    return tuple(Refused(row["name"], bytes.fromhex(row["bytes"]), row["id"], row["errno"], row["why"]) for row in rows)


def with_binary(value: Any) -> Any:
    """Return a value of the file with ``bytes`` for each {"bin": HEX}."""
    if isinstance(value, dict):
        if value.keys() == {"bin"}:
            return bytes.fromhex(value["bin"])
        return {key: with_binary(inner) for key, inner in value.items()}
    return [with_binary(inner) for inner in value] if isinstance(value, list) else value


def messages_below(base: type[messages.Message]) -> list[type[messages.Message]]:
    """Every message below a class; the classes between have no name on the wire."""
    below = [cls for child in base.__subclasses__() for cls in messages_below(child)]
    return below or [base]


def op_of(message: type[messages.Message]) -> str:
    """The name of a message on the wire."""
    return str(message.__struct_config__.tag)


def class_of(kind: str, op: str) -> type[messages.Message]:
    """The daemon's class for a message; raises ``KeyError`` when it has none."""
    return {op_of(message): message for message in messages_below(KINDS[kind])}[op]


def write_bytes(kind: str, as_map: dict[str, Any]) -> bytes:
    """Return the bytes of a message: as a client would write a request, and as the daemon writes the others."""
    if kind == "requests":
        return bytes(msgpack.packb(as_map))
    return wire.encode(msgspec.convert(as_map, class_of(kind, as_map["op"])))


def fill() -> int:
    """Give bytes to the messages of the file that have none; return how many there were."""
    file = json.loads(PATH.read_text(encoding="utf-8"))
    filled = 0
    for kind in KINDS:
        for row in file[kind]:
            if "bytes" not in row:
                row["bytes"] = write_bytes(kind, with_binary(row["map"])).hex()
                filled += 1
    PATH.write_text(_layout(file), encoding="utf-8")
    return filled


def _layout(file: dict[str, Any]) -> str:
    """One line for each value of a row, so that a change to one shows as that."""
    sections = []
    for name, rows in file.items():
        lines = [
            json.dumps(row)
            if isinstance(row, str)
            else "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in row.items()) + "\n}"
            for row in rows
        ]
        sections.append(f"{json.dumps(name)}: [\n" + ",\n".join(lines) + "\n]")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    print(f"{fill()} messages were given bytes")
