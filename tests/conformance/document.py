"""
docs/protocol.md as a reader takes it: the tables of its messages, its bounds, its errors and its examples.

A table of a message has a heading that names it: request, reply, notice or map, and its op. Whatever else the document
says is for people.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"

Rows = list[list[str]]

_HEADING = re.compile(r"(request|reply|notice|map) `(\w+)`")
_CELL = re.compile(r"(?<!\\)\|")


class Field(NamedTuple):
    """One row: ``default`` is empty for a field that has to be there."""

    type: str
    default: str


class Example(NamedTuple):
    """A message of the last section, as a map and as bytes."""

    map: dict[str, Any]
    data: bytes


def text() -> str:
    return PATH.read_text(encoding="utf-8")


def tables() -> list[Rows]:
    """Every table: its heading and its rows, each a list of cells."""
    found: list[Rows] = []
    inside = False
    for line in text().splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        cells = [cell.strip() for cell in _CELL.split(line)[1:-1]]
        if not all(set(cell) <= set("-: ") and cell for cell in cells):
            found[-1].append(cells)
    return found


def messages() -> dict[tuple[str, str], dict[str, Field]]:
    """What is said of each message and map, by what it is and its op: each field, but for those that all share."""
    said: dict[tuple[str, str], dict[str, Field]] = {}
    for (first, *_), *rows in tables():
        heading = _HEADING.fullmatch(first)
        if heading is None:
            continue
        what, op = heading.groups()
        assert (what, op) not in said, f"{what} {op} has two tables"
        said[what, op] = {}
        for name, *rest in rows:
            if name.startswith("as "):
                other, _, without = name.removeprefix("as ").partition(", without ")
                of_other = said[what, _name(other)]
                said[what, op] |= {each: field for each, field in of_other.items() if f"`{each}`" != without}
            else:
                said[what, op][_name(name)] = Field(rest[0], rest[1])
    return said


def shared_fields(heading: str) -> dict[str, Field]:
    """The fields of a table whose heading begins so: those of every message of a sort."""
    ((_, *rows),) = [table for table in tables() if table[0][0] == heading]
    return {_name(name): Field(type_, default) for name, type_, default, *_ in rows}


def columns(*heading: str) -> Rows:
    """The rows of the one table that has this heading."""
    ((_, *rows),) = [table for table in tables() if table[0] == list(heading)]
    return rows


def examples() -> list[Example]:
    """The messages of the section "Examples", in order."""
    blocks = re.findall(r"```json\n(.*?)```\n```hex\n(.*?)```", text(), re.DOTALL)
    return [Example(json.loads(as_map), bytes.fromhex(as_bytes)) for as_map, as_bytes in blocks]


def _name(cell: str) -> str:
    name = re.fullmatch(r"`(\w+)`", cell)
    assert name is not None, f"not the name of a field: {cell}"
    return name[1]
