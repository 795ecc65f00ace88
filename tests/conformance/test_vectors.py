"""
Every message of the protocol as bytes: what the daemon's door makes of them, and msgpack, which other clients use.

The bytes are frozen in docs/protocol-vectors.json. Where one of these fails after a change to the daemon, clients that
are out there would fail, too.
"""

from __future__ import annotations

import json
from typing import Any

import msgpack
import msgspec
import pytest
from msgspec import inspect
from msgspec.msgpack import Decoder

from hwbpd import messages, wire
from hwbpd.core.errors import BadMessage
from tests.conformance import vectors as of_file
from tests.conformance.vectors import Refused, Vector, class_of, messages_below, op_of, refused, vectors, with_binary


def told(vector: Vector | Refused) -> str:
    return vector.name


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    chosen = [vector for vector in vectors() if vector.kind in kinds]
    return pytest.mark.parametrize("vector", chosen, ids=told)


def as_map(message: messages.Message) -> Any:
    """A message as what msgpack would make of its bytes, with every default."""
    return {"op": op_of(type(message))} | {
        name: msgpack.unpackb(msgspec.msgpack.encode(getattr(message, name)))
        for name in message.__struct_fields__
    }


# --- what is sent ----------------------------------------------------------------------------------------------------


@of_kind("requests", "replies", "notices")
def test_msgpack_reads_the_bytes_as_the_map(vector: Vector) -> None:
    assert msgpack.unpackb(vector.data) == vector.map


@of_kind("requests", "replies", "notices")
def test_the_map_is_what_the_daemons_class_says_and_nothing_else(vector: Vector) -> None:
    message = msgspec.convert(vector.map, class_of(vector.kind, vector.op))

    written_out = as_map(message)
    assert {name: written_out[name] for name in vector.map} == vector.map


@of_kind("requests")
def test_the_door_lets_the_request_in_as_it_is_meant(vector: Vector) -> None:
    assert wire.decode_request(vector.data) == msgspec.convert(vector.map, class_of("requests", vector.op))


@of_kind("requests")
def test_the_door_does_not_mind_who_wrote_the_request(vector: Vector) -> None:
    meant = wire.decode_request(vector.data)

    for as_written in (msgpack.packb(vector.map), msgspec.msgpack.encode(vector.map), wire.encode(meant)):
        assert wire.decode_request(as_written) == meant


@of_kind("replies", "notices")
def test_the_daemon_still_writes_the_same_bytes(vector: Vector) -> None:
    message = msgspec.convert(vector.map, class_of(vector.kind, vector.op))

    assert wire.encode(message).hex() == vector.data.hex()
    assert Decoder(type(message)).decode(vector.data) == message


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [bad for bad in refused() if bad.errno == "EBADMSG"], ids=told)
def test_the_door_refuses_what_is_not_a_request_and_finds_its_id(bad: Refused) -> None:
    with pytest.raises(BadMessage) as refusal:
        wire.decode_request(bad.data)

    assert (refusal.value.errno_name, wire.request_id(bad.data)) == (bad.errno, bad.id)
    assert bad.why


def test_what_is_no_message_for_msgpack_either_is_refused_without_an_id() -> None:
    unreadable = []
    for bad in refused():
        try:
            msgpack.unpackb(bad.data, strict_map_key=False)
        except (ValueError, msgpack.UnpackException):
            unreadable.append(bad)

    assert unreadable, "none of the vectors is broken msgpack"
    assert {bad.id for bad in unreadable if bad.name != "a string that is not UTF-8"} == {0}


# --- the file itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", of_file.KINDS)
def test_no_message_lacks_a_vector(kind: str) -> None:
    ops = {vector.op for vector in vectors() if vector.kind == kind}

    assert {op_of(message) for message in messages_below(of_file.KINDS[kind])} == ops


@pytest.mark.parametrize("kind", of_file.KINDS)
def test_every_field_is_there_in_some_vector_and_left_out_in_another_if_it_may_be(kind: str) -> None:
    for message in messages_below(of_file.KINDS[kind]):
        maps = [vector.map for vector in vectors() if vector.kind == kind and vector.op == op_of(message)]
        for field in msgspec.structs.fields(message):
            if field.name == "deadline_ns":  # the same for every request
                continue
            with_it = sum(field.name in one for one in maps)
            assert with_it, f"no vector of {op_of(message)} has {field.name}"
            if not field.required and field.name != "n" and kind != "requests":
                assert with_it < len(maps), f"every vector of {op_of(message)} has {field.name}"


def test_every_bound_of_a_request_has_a_vector_just_beyond_it() -> None:
    """A bound that is widened by mistake shows in what the door then lets in."""
    beyond = set()
    for bad in refused():
        try:
            fields = msgpack.unpackb(bad.data)
        except (ValueError, msgpack.UnpackException):
            continue
        for name, value in fields.items() if isinstance(fields, dict) else ():
            size = len(value) if isinstance(value, str) else max(value) if isinstance(value, list) else value
            if isinstance(size, int):
                beyond.add((name, size))

    for message in messages_below(messages.Request):
        for field in msgspec.structs.fields(message):
            for bound in bounds_of(inspect.type_info(field.type)):
                assert (field.name, bound + 1) in beyond, f"{op_of(message)}.{field.name} beyond {bound}"


def bounds_of(type_: inspect.Type) -> list[int]:
    """The greatest number, length or element that a field may have, where there is such a bound."""
    match type_:
        case inspect.IntType(le=int(most)) | inspect.StrType(max_length=int(most)):
            return [most]
        case inspect.ListType():
            return bounds_of(type_.item_type)
        case inspect.UnionType():
            return [most for inner in type_.types for most in bounds_of(inner)]
    return []


def test_a_message_that_is_added_gets_its_bytes_and_the_others_keep_theirs(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given the file with one message more, and one whose bytes are not what would be written today,
    file = json.loads(of_file.PATH.read_text(encoding="utf-8"))
    file["requests"][0]["bytes"] = "00"
    file["notices"].append({"name": "new", "map": {"op": "closing", "n": 3, "sentence": "enough"}})
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    monkeypatch.setattr(of_file, "PATH", path)

    # when it is filled in,
    assert of_file.fill() == 1

    # then only the new one has new bytes.
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after["requests"][0]["bytes"] == "00"
    assert msgpack.unpackb(bytes.fromhex(after["notices"].pop()["bytes"])) == with_binary(file["notices"].pop()["map"])
    assert after == file


def test_the_file_is_laid_out_as_the_tool_lays_it_out() -> None:
    text = of_file.PATH.read_text(encoding="utf-8")

    assert text == of_file._layout(json.loads(text))
