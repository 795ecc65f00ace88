"""docs/protocol.md says what there is: each message, field, type, range, default, bound and error, and no other."""

from __future__ import annotations

import enum
import re
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from msgspec import inspect

from hwbpd import connections, messages, settings, vmms, wire
from hwbpd.core import errors
from hwbpd.core.books import ENDED_KEPT
from tests.conformance import document
from tests.conformance.document import Field
from tests.conformance.vectors import KINDS, messages_below, op_of, vectors

SINGULAR = {"requests": "request", "replies": "reply", "notices": "notice"}
SHARED = {  # told once, for all of a sort
    "request": {"id", "epoch", "deadline_ns"},
    "reply": {"id"},
    "notice": {"n"},
    "map": set[str](),
}
MAPS: dict[str, type[msgspec.Struct]] = {
    "piece": messages.PieceRow,
    "cpu": messages.CpuRow,
    "pools": messages.PoolsRow,
    "resource": messages.ResourceRow,
    "claim": messages.ClaimRow,
    "waiting": messages.WaitingRow,
    "vm": messages.VmRow,
    "vcpu": messages.VcpuRow,
    "slot": messages.SlotRow,
    "holder": errors.Holder,
}
MESSAGES = [(SINGULAR[kind], message) for kind, base in KINDS.items() for message in messages_below(base)]
EVERYTHING = {(what, op_of(message)): message for what, message in MESSAGES} | {
    ("map", name): row for name, row in MAPS.items()
}


def number(value: int) -> str:
    """A bound as the document writes it."""
    if value > 0 and value & (value - 1) == 0 and value.bit_length() > 16:
        return f"2^{value.bit_length() - 1}"
    return "10^9" if value == 10**9 else str(value)


def type_in_words(type_: inspect.Type) -> str:
    """A type as the document writes it."""
    match type_:
        case inspect.IntType(ge=None):
            return "integer"
        case inspect.IntType(le=None):
            return "u64"
        case inspect.IntType():
            return f"{number(type_.ge or 0)} to {number(type_.le or 0)}"
        case inspect.StrType():
            return "text" if type_.max_length is None else f"text, up to {type_.max_length}"
        case inspect.BoolType():
            return "flag"
        case inspect.BytesType():
            return "binary"
        case inspect.LiteralType():
            return ", ".join(f'"{word}"' for word in type_.values)
        case inspect.EnumType():
            return ", ".join(f'"{word.value}"' for word in type_.cls)
        case inspect.ListType() | inspect.VarTupleType():
            most = getattr(type_, "max_length", None)
            return f"list of {type_in_words(type_.item_type)}" + ("" if most is None else f", up to {most}")
        case inspect.DictType():
            return "map"
        case inspect.StructType():
            (name,) = (name for name, row in MAPS.items() if row is type_.cls)
            return f"`{name}`"
        case inspect.UnionType():
            others = [inner for inner in type_.types if not isinstance(inner, inspect.NoneType)]
            assert len(others) == len(type_.types) - 1, f"only nil can be the other: {type_}"
            return f"{type_in_words(others[0])}, or nil"
    raise AssertionError(f"the document has no word for {type_}")


def default_in_words(field: inspect.Field) -> str:
    """A default as the document writes it."""
    if field.required:
        return ""
    value: Any = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    match value:
        case None:
            return "nil"
        case bool():
            return str(value).lower()
        case enum.Enum():
            return f'"{value.value}"'
        case str():
            return f'"{value}"'
        case list() | tuple():
            return str(list(value))
        case _:
            return str(value)


def fields_of(message: type[msgspec.Struct]) -> dict[str, Field]:
    """What the document has to say of a message's fields."""
    type_ = inspect.type_info(message)
    assert isinstance(type_, inspect.StructType)
    return {field.name: Field(type_in_words(field.type), default_in_words(field)) for field in type_.fields}


# --- messages --------------------------------------------------------------------------------------------------------


def test_every_message_has_a_table_and_every_table_a_message() -> None:
    assert set(document.messages()) == set(EVERYTHING)


@pytest.mark.parametrize(("what", "op"), EVERYTHING)
def test_a_table_tells_every_field_with_its_type_range_and_default(what: str, op: str) -> None:
    told = document.messages()[what, op]

    meant = fields_of(EVERYTHING[what, op])
    assert told == {name: field for name, field in meant.items() if name not in SHARED[what]}


def test_what_all_messages_of_a_sort_share_is_told_once() -> None:
    told_of_all = document.shared_fields("every request")
    told_of_most = document.shared_fields("every request but `hello`")

    for message in messages_below(messages.Request):
        fields = fields_of(message)
        expected = told_of_all if message is messages.Hello else told_of_all | told_of_most
        assert {name: field for name, field in fields.items() if name in SHARED["request"]} == expected
    for message in messages_below(messages.Reply):
        assert fields_of(message)["id"] == document.shared_fields("every reply")["id"]
    for message in messages_below(messages.Notice):
        # The outbox always fills it in, so the default of the class is nobody's business.
        assert fields_of(message)["n"].type == document.shared_fields("every notice")["n"].type


def test_each_request_is_told_with_its_reply_in_one_section() -> None:
    sections = re.split(r"^##+ ", document.text(), flags=re.MULTILINE)
    requests = {op_of(message) for message in get_args(messages.AnyRequest)}

    for op in requests:
        (section,) = (section for section in sections if f"| request `{op}` |" in section)
        assert "| reply `" in section, op


# --- bounds and errors -----------------------------------------------------------------------------------------------


def test_the_bounds_are_those_of_the_settings() -> None:
    defaults = msgspec.to_builtins(settings.Settings())

    told = {}
    for _, bound, setting, *_ in document.columns("what", "at most", "setting", "beyond it"):
        if setting:
            section, name = setting.strip("`").split(".")
            assert int(bound) == defaults[section][name], setting
            told[section, name] = bound
    assert {name for section, name in told if section == "limits"} == set(defaults["limits"])


def test_the_bounds_without_a_setting_are_those_of_the_code() -> None:
    told = {what: bound for what, bound, setting, *_ in document.columns("what", "at most", "setting", "beyond it")}

    assert int(told["seconds until a hello is accepted"]) * 10**9 == connections.HELLO_WITHIN_NS
    assert int(told["reports on a vCPU, a second"]) * vmms.REPORT_EVERY_NS == 10**9
    assert f"one of the last {ENDED_KEPT} that are over" in document.text()


def test_the_errors_are_those_of_the_daemon_with_their_classes() -> None:
    told = {(errno, name) for errno, name, _ in document.columns("errno", "class", "when")}

    assert told == {(refusal.errno_name, refusal.__name__) for refusal in errors.HwbpError.__subclasses__()}


def test_every_kind_of_evidence_is_explained() -> None:
    told = {evidence.strip("`") for evidence, _ in document.columns("evidence", "")}

    assert {errors.BOOKS, errors.KERNEL_REFUSED} <= told


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_the_examples_are_vectors_and_make_a_session() -> None:
    in_file = {vector.data: vector for vector in vectors()}

    for example in document.examples():
        assert msgpack.unpackb(example.data) == in_file[example.data].map
        assert msgpack.unpackb(example.data)["op"] == example.map["op"]
    ops = [example.map["op"] for example in document.examples()]
    assert (ops[0], ops[-1]) == ("hello", "bye")
    assert isinstance(wire.decode_request(document.examples()[0].data), messages.Hello)


def test_the_states_of_a_session_are_drawn() -> None:
    (diagram,) = re.findall(r"```mermaid\n(stateDiagram.*?)```", document.text(), re.DOTALL)
    states = set(re.findall(r"(\w+) -->", diagram)) | set(re.findall(r"--> (\w+)", diagram))

    assert states == {"stranger", "open", "lost"}
