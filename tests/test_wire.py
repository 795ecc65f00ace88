"""
The door: bytes either become a request whose every field has been checked, or are refused, and nothing else can happen.

What we write is held against msgpack, the reference implementation, which our own clients read it with.
"""

from __future__ import annotations

import builtins
import collections.abc
import types
from typing import Any, get_args, get_origin

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd import messages, wire
from hwbpd.core.errors import BadMessage
from hwbpd.messages import CPU_MAX, LENGTH_MAX, TID_MAX, U64_MAX, AnyRequest, Message

CLAIM: dict[str, Any] = {"op": "claim", "id": 1, "epoch": 2, "address": 3, "length": 8, "access": "w"}
EVERY_REQUEST: list[dict[str, Any]] = [
    {"op": "hello", "id": 1, "version": 1, "client": "gdb"},
    CLAIM
    | {"tid": 812, "cpus": [0, 3], "user": False, "delivery": "count", "user_chain": True}
    | {"kernel_chain": True, "ring_bytes": 4096, "kind": "kgdb", "label": "the list", "deadline_ns": 77}
    | {"across_exec": True, "guard": 500, "only_pid": 900, "priority": -5, "wait_until_ns": 99}
    | {"armed_by": "tracer", "placeholder": False, "over_report": True, "vcpu": 5},
    {"op": "release", "id": 1, "epoch": 2, "claim": 3, "deadline_ns": 7},
    {"op": "counts", "id": 1, "epoch": 2, "claim": 3, "deadline_ns": 7},
    {"op": "slots", "id": 1, "epoch": 2, "after": 5, "most": 1000, "deadline_ns": 7},
    {"op": "capabilities", "id": 1, "epoch": 2, "deadline_ns": 7},
    {"op": "why", "id": 1, "epoch": 2, "claim": 3, "deadline_ns": 7},
    {"op": "goodbye", "id": 1, "epoch": 2, "deadline_ns": 7},
    {"op": "fit", "id": 1, "epoch": 2, "address": 3, "length": 8, "access": "x", "pid": 812, "kernel": False},
    {"op": "rearm", "id": 1, "epoch": 2, "claim": 3, "deadline_ns": 7},
    {"op": "foreign", "id": 1, "epoch": 2, "deadline_ns": 7},
    {"op": "follow", "id": 1, "epoch": 2, "deadline_ns": 7},
    {"op": "thread", "id": 1, "epoch": 2, "deadline_ns": 7, "tid": 812},
    {"op": "enabled", "id": 1, "epoch": 2, "deadline_ns": 7, "cpu": 3, "tid": 812},
    {"op": "yield", "id": 1, "epoch": 2, "claim": 3, "deadline_ns": 7},
    {"op": "taking", "id": 1, "epoch": 2, "claim": 3, "deadline_ns": 7},
    {"op": "taken", "id": 1, "epoch": 2, "claim": 3, "deadline_ns": 7},
    {"op": "take_failed", "id": 1, "epoch": 2, "claim": 3, "errno": 28, "deadline_ns": 7},
    {"op": "why", "id": 1, "epoch": 2, "errno": "ENOSPC", "deadline_ns": 7},
    {"op": "plan", "id": 1, "epoch": 2, "address": 3, "length": 7, "access": "w", "user": False, "deadline_ns": 7},
    {"op": "vm", "id": 1, "epoch": 2, "label": "guest", "deadline_ns": 7},
    {"op": "vcpu", "id": 1, "epoch": 2, "vm": 1, "number": 3, "tid": 812, "strategy": "always-x86", "profile": "intel"},
    {"op": "vcpu_loaded", "id": 1, "epoch": 2, "vcpu": 1, "version": 3, "errno": 22, "deadline_ns": 7},
    {"op": "vcpu_hit", "id": 1, "epoch": 2, "vcpu": 1, "resources": [3, 4], "ip": 5, "kernel": False, "deadline_ns": 7},
    {"op": "vcpu_report", "id": 1, "epoch": 2, "vcpu": 1, "entries": 3, "switches": 2, "traps": 1, "owner": "guest"},
    {"op": "vms", "id": 1, "epoch": 2, "deadline_ns": 7},
    {"op": "host_contents", "id": 1, "epoch": 2, "cpu": 3, "tid": 812, "deadline_ns": 7},
]


def messages_below(base: type[Message]) -> list[type[Message]]:
    """Every message below a class; the classes between have no name on the wire."""
    below = [cls for child in base.__subclasses__() for cls in messages_below(child)]
    return below or [base]


REQUESTS = messages_below(messages.Request)
ANSWERS = messages_below(messages.Reply) + messages_below(messages.Notice)

words = st.text(max_size=5) | st.binary(max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), U64_MAX) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def decoded(**fields: Any) -> AnyRequest:
    return wire.decode_request(msgpack.packb(CLAIM | fields))


def is_refused(data: bytes) -> bool:
    try:
        wire.decode_request(data)
    except BadMessage:
        return True
    return False


# --- whatever comes --------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused_and_have_an_id(data: bytes) -> None:
    is_refused(data)
    assert 0 <= wire.request_id(data) <= 2**62


@given(values)
def test_any_message_pack_is_a_request_or_refused(value: Any) -> None:
    data = msgpack.packb(value)
    is_refused(data)
    assert 0 <= wire.request_id(data) <= 2**62


@given(st.sampled_from(EVERY_REQUEST), st.dictionaries(st.integers(0, 10**6), st.integers(0, 255), max_size=4))
def test_any_damage_to_a_request_makes_another_or_is_refused(request: dict[str, Any], damage: dict[int, int]) -> None:
    data = bytearray(msgpack.packb(request))
    for place, byte in damage.items():
        data[place % len(data)] = byte

    is_refused(bytes(data))
    assert 0 <= wire.request_id(bytes(data)) <= 2**62


@given(st.sampled_from(EVERY_REQUEST), st.sampled_from(sorted({field for r in EVERY_REQUEST for field in r})), values)
def test_a_field_of_any_value_is_in_range_or_refused(request: dict[str, Any], field: str, value: Any) -> None:
    try:
        changed = wire.decode_request(msgpack.packb(request | {field: value}))
    except BadMessage:
        return
    if field != "op":
        assert getattr(changed, field) == value, "nothing is bent to fit"
    assert type(value) is not float


@pytest.mark.parametrize("request_", EVERY_REQUEST, ids=lambda request: str(request["op"]))
def test_a_request_cut_short_or_followed_by_more_is_refused(request_: dict[str, Any]) -> None:
    data = msgpack.packb(request_)

    assert not is_refused(data)
    assert all(is_refused(data[:end]) for end in range(len(data)))
    assert is_refused(data + b"\0")
    assert is_refused(data + data)


# --- each field ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("id", [0, 2**62], [-1, 2**62 + 1, 1.0, True, None, "1"]),
        ("epoch", [0, U64_MAX], [-1, 2.0, None]),
        ("deadline_ns", [0, U64_MAX], [-1, 1.5, None]),
        ("address", [0, U64_MAX], [-1, 3.0, True, "3", None]),
        ("length", [1, LENGTH_MAX], [0, -1, LENGTH_MAX + 1, 8.0, True]),
        ("access", ["r", "w", "rw", "x"], ["", "wr", "rwx", "W", "w ", "w\n", None, 2]),
        ("tid", [0, TID_MAX], [-1, TID_MAX + 1, 1.0, None]),
        ("pid", [0, TID_MAX], [-1, TID_MAX + 1, 1.0, None]),
        ("only_pid", [0, TID_MAX], [-1, TID_MAX + 1, 1.0, None]),
        ("across_exec", [True, False], [0, 1, None]),
        ("guard", [None, 0, 10**9], [-1, 10**9 + 1, 1.0, True]),
        ("cpus", [None, [], [0, CPU_MAX], [0] * (CPU_MAX + 1)], [[-1], [CPU_MAX + 1], [0] * (CPU_MAX + 2), [0.0], 0]),
        ("user", [True, False], [0, 1, None, "true"]),
        ("kernel", [True, False], [0, None]),
        ("user_chain", [True, False], [1]),
        ("kernel_chain", [True, False], [1]),
        ("delivery", ["hits", "count", "hold"], ["", "Hits", 0, None]),
        ("ring_bytes", [0, 2**30], [-1, 2**30 + 1, 4096.0]),
        ("kind", ["kgdb", "kvm", "ptrace", "perf", "background"], ["gdb", "", 1, None]),
        ("label", ["", "x" * 64, "\u00e4" * 64], ["x" * 65, b"bytes", 5, None]),
        ("priority", [-100, 0, 100], [-101, 101, 1.0, True, None]),
        ("armed_by", ["daemon", "tracer"], ["", "gdb", 1, None]),
        ("placeholder", [True, False], [0, 1, None]),
        ("wait_until_ns", [0, U64_MAX], [-1, 1.5, None]),
    ],
)
def test_each_field_of_a_claim_has_its_bounds(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(decoded(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(BadMessage) as refused:
            decoded(**{field: value})
        assert f"$.{field}" in str(refused.value)


@pytest.mark.parametrize(
    ("request_", "field", "good", "bad"),
    [
        (EVERY_REQUEST[0], "version", [0, 65535], [-1, 65536, "1", None]),
        (EVERY_REQUEST[0], "client", ["", "x" * 64], ["x" * 65, None]),
        (EVERY_REQUEST[2], "claim", [0, 2**62], [-1, 2**62 + 1, None]),
        (EVERY_REQUEST[3], "claim", [0, 2**62], [-1, 2**62 + 1, None]),
        (EVERY_REQUEST[6], "claim", [0, 2**62], [-1, 2**62 + 1, None]),
        (EVERY_REQUEST[8], "pid", [0, TID_MAX], [-1, TID_MAX + 1, None]),
        (EVERY_REQUEST[9], "claim", [0, 2**62], [-1, 2**62 + 1, None]),
        (EVERY_REQUEST[14], "claim", [0, 2**62], [-1, 2**62 + 1, None]),
        (EVERY_REQUEST[15], "claim", [0, 2**62], [-1, 2**62 + 1, None]),
        (EVERY_REQUEST[16], "claim", [0, 2**62], [-1, 2**62 + 1, None]),
        (EVERY_REQUEST[17], "claim", [0, 2**62], [-1, 2**62 + 1, None]),
        (EVERY_REQUEST[17], "errno", [1, 4095], [0, 4096, -1, "ENOSPC", None]),
        (EVERY_REQUEST[18], "errno", ["", "ENOSPC"], ["enospc", "EIO", 28, None]),
        (EVERY_REQUEST[8], "priority", [-100, 100], [-101, 101]),
        (EVERY_REQUEST[4], "after", [0, 2**62], [-1, None]),
        (EVERY_REQUEST[4], "most", [1, 1000], [0, 1001, None]),
    ],
)
def test_each_field_of_the_others_has_its_bounds(
    request_: dict[str, Any], field: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert getattr(wire.decode_request(msgpack.packb(request_ | {field: value})), field) == value
    for value in bad:
        assert is_refused(msgpack.packb(request_ | {field: value}))


@pytest.mark.parametrize("request_", EVERY_REQUEST, ids=lambda request: str(request["op"]))
def test_a_field_that_is_unknown_or_missing_is_named(request_: dict[str, Any]) -> None:
    with pytest.raises(BadMessage, match="surprise"):
        wire.decode_request(msgpack.packb(request_ | {"surprise": 1}))
    fields = msgspec.structs.fields(next(cls for cls in REQUESTS if cls.__struct_config__.tag == request_["op"]))
    for field in {"op"} | {each.name for each in fields if each.required}:
        rest = {name: value for name, value in request_.items() if name != field}
        with pytest.raises(BadMessage, match=field):
            wire.decode_request(msgpack.packb(rest))


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 10_000,
        b"\x81\xa1x" * 10_000,
        msgpack.packb(CLAIM)[:-1] + b"\xa4cpus" + b"\x91" * 10_000,
        msgpack.packb(CLAIM | {"label": msgpack.ExtType(5, b"data")}),
        msgpack.packb(CLAIM | {"id": msgpack.Timestamp(1, 0)}),
        msgpack.packb(CLAIM).replace(b"\xa5claim", b"\xa5cla\xffm"),
        msgpack.packb(CLAIM | {"label": "zzzz"}).replace(b"zzzz", b"\xff\xfe\xc0\x80"),
        msgpack.packb({1: 2}),
        msgpack.packb(CLAIM | {b"bytes": 1}),
        msgpack.packb([CLAIM]),
        msgpack.packb(CLAIM | {"op": "welcome"}),
        msgpack.packb(CLAIM | {"op": 5}),
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ],
)
def test_the_ways_of_msgpack_that_are_not_ours_are_refused(data: bytes) -> None:
    assert is_refused(data)
    assert 0 <= wire.request_id(data) <= 2**62


def test_deep_nesting_beside_an_id_is_refused_and_costs_no_stack() -> None:
    deep = b"\x91" * 10_000 + b"\x01"
    data = b"\x82" + msgpack.packb("id") + b"\x07" + msgpack.packb("x") + deep

    assert is_refused(data)
    assert wire.request_id(data) in (0, 7)


@pytest.mark.parametrize(
    ("message", "request_id"),
    [
        ({"id": 7}, 7),
        ({"op": "claim", "id": 7, "length": -1, "surprise": [1]}, 7),
        ({"id": 2**62}, 2**62),
        ({"id": 2**62 + 1}, 0),
        ({"id": -1}, 0),
        ({"id": "7"}, 0),
        ({"id": 7.0}, 0),
        ({}, 0),
        ([7], 0),
    ],
)
def test_a_bad_request_is_answered_under_its_id_where_it_has_one(message: Any, request_id: int) -> None:
    assert wire.request_id(msgpack.packb(message)) == request_id


# --- what we write and what msgpack reads ----------------------------------------------------------------------------


def test_every_message_is_tried_here() -> None:
    assert {request["op"] for request in EVERY_REQUEST} == {cls.__struct_config__.tag for cls in REQUESTS}
    assert set(REQUESTS) == set(AnyRequest.__args__)
    assert {cls.__name__ for cls in ANSWERS} >= {"Welcome", "Granted", "Error", "SlotsReply", "Hits", "Lost", "Closing"}


@pytest.mark.parametrize("request_", EVERY_REQUEST, ids=lambda request: str(request["op"]))
def test_a_request_written_with_msgpack_is_read_in_full(request_: dict[str, Any]) -> None:
    request = wire.decode_request(msgpack.packb(request_))

    assert {"op": request.__struct_config__.tag} | msgspec.to_builtins(request) == request_
    assert msgpack.unpackb(wire.encode(request)) == request_


def anything(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type that occurs in a message."""
    arguments = get_args(kind)
    match get_origin(kind) or kind:
        case builtins.int:
            return st.integers(0, U64_MAX)
        case builtins.list:
            return st.lists(anything(arguments[0]), max_size=3)
        case builtins.tuple:
            return st.lists(anything(arguments[0]), max_size=3).map(tuple)
        case builtins.dict:
            return st.dictionaries(anything(arguments[0]), anything(arguments[1]), max_size=3)
        case collections.abc.Mapping:
            return st.just({"lengths": {"w": [1, 2]}, "notes": ["one"]})
        case types.UnionType:
            return st.one_of([anything(argument) for argument in arguments])
        case struct if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
            return st.builds(struct, **{field.name: anything(field.type) for field in msgspec.structs.fields(struct)})
    return st.from_type(kind)


@pytest.mark.parametrize("cls", ANSWERS, ids=lambda cls: str(cls.__name__))
def test_what_we_write_is_what_msgpack_reads(cls: type[Message]) -> None:
    @given(anything(cls))
    def agree(message: Message) -> None:
        # given a message with anything in its fields, when it is written by us and read with msgpack
        read = msgpack.unpackb(wire.encode(message))

        # then every field is there but those that may be left out, under the name of the message
        fields = {field.encode_name for field in msgspec.structs.fields(cls)}
        needed = {field.encode_name for field in msgspec.structs.fields(cls) if field.required}
        assert needed <= read.keys() - {"op"} <= fields
        assert read.pop("op") == cls.__struct_config__.tag
        for name, value in read.items():
            assert msgspec.convert(value, type=dict(msgspec_types(cls))[name]) == getattr(message, name)

        # and what msgpack writes of it reads the same
        again = msgpack.packb({"op": cls.__struct_config__.tag, **read})
        assert msgspec.msgpack.decode(again, type=cls) == message

    agree()


def msgspec_types(cls: type[Message]) -> list[tuple[str, Any]]:
    return [(field.encode_name, field.type) for field in msgspec.structs.fields(cls)]
