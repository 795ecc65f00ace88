"""
The documents about registers, and docs/plugins.md, show what the code does: pictures of words, plans, answers, sources.

A block between ``<!-- from: MODULE.FUNCTION -->`` and ``<!-- end -->`` is what that function of tests/registers writes.
``python -m tests.test_registers_doc`` brings the documents up to date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.judges.liberties import LIBERTIES
from tests.registers import arm64, armv7, common, example, x86

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENTS = ("registers.md", "registers-x86.md", "registers-armv7.md", "registers-arm64.md", "plugins.md")
BLOCK = re.compile(r"<!-- from: (?P<name>[\w.]+) -->\n(?P<lines>.*?)<!-- end -->\n", re.DOTALL)

WRITERS: Mapping[str, Callable[[], list[str]]] = {
    f"{module.__name__.rpartition('.')[2]}.{writer.__name__}": writer
    for module in (common, x86, armv7, arm64, example)
    for writer in module.BLOCKS
}


def text(document: str) -> str:
    return (DOCS / document).read_text(encoding="utf-8")


def up_to_date(old: str) -> str:
    """The document with its blocks written anew."""
    return BLOCK.sub(lambda block: written(block["name"]), old)


def written(name: str) -> str:
    """A block as the document has it."""
    lines = "\n".join(WRITERS[name]())
    return f"<!-- from: {name} -->\n\n{lines}\n\n<!-- end -->\n"


@pytest.mark.parametrize("name", WRITERS)
def test_what_the_documents_show_is_what_the_code_does(name: str) -> None:
    blocks = [block for document in DOCUMENTS for block in BLOCK.finditer(text(document)) if block["name"] == name]

    assert blocks, "in no document"
    for block in blocks:
        assert block["lines"].strip("\n").splitlines() == WRITERS[name](), f"bring it up to date: python -m {__name__}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_of_a_document_is_made_here(document: str) -> None:
    made = [block["name"] for block in BLOCK.finditer(text(document))]

    assert len(made) == text(document).count("<!-- from: ") == text(document).count("<!-- end -->")
    assert set(made) <= WRITERS.keys()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_points_to_is_there(document: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(document))
    files = re.findall(r"`((?:hwbpd|plugins|tests|docs|clients)/[\w./-]+)`", text(document))

    assert not [link for link in links if not (DOCS / link).exists()]
    assert not [file for file in files if not (DOCS.parent / file).exists()]


def test_every_class_in_which_the_cpu_is_at_liberty_is_told_of() -> None:
    told = re.findall(r"^\| ([^|]+) \| .*$", text("registers-x86.md"), re.MULTILINE)

    assert {liberty.name for liberty in LIBERTIES} <= set(told)


if __name__ == "__main__":
    for each in DOCUMENTS:
        (DOCS / each).write_text(up_to_date(text(each)), encoding="utf-8")
