"""What a check of ``hwbpctl doctor`` found, and how that reads. Pure: nothing here looks or prints."""

from __future__ import annotations

import enum
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hwbpctl.render import plural

_WIDTH = 80
_INDENT = 8 + 17  # columns of the grade and of the name

Progress = Callable[[str], None]
"""Takes what is being looked at just now; an empty text ends it."""


class Grade(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"  # works, but somebody will miss something
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's: what was looked at, how it is, and where something is amiss, what to do."""

    name: str
    grade: Grade
    sentence: str
    remedy: str = ""


def ok(name: str, sentence: str) -> Finding:
    """All is well."""
    return Finding(name, Grade.OK, sentence)


def note(name: str, sentence: str, remedy: str = "") -> Finding:
    """Worth knowing; nothing is broken."""
    return Finding(name, Grade.NOTE, sentence, remedy)


def broken(name: str, sentence: str, remedy: str) -> Finding:
    """Somebody has to do something, and the remedy says what."""
    return Finding(name, Grade.BROKEN, sentence, remedy)


def line(finding: Finding) -> str:
    """Return a finding as people read it, wrapped at 80 columns, with its remedy below it."""
    head = f"{finding.grade:<8}{finding.name:<17}"
    lines = _wrapped(head, finding.sentence)
    if finding.remedy:
        lines += _wrapped(" " * _INDENT, f"-> {finding.remedy}")
    return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    # A command or a path that is too long for a line is still one thing to copy.
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def summary(findings: Sequence[Finding]) -> str:
    """Return the last line: whether breakpoints can be relied on here."""
    bad = sum(finding.grade is Grade.BROKEN for finding in findings)
    notes = sum(finding.grade is Grade.NOTE for finding in findings)
    noted = f", {plural(notes, 'note')}" if notes else ""
    if bad:
        return f"{plural(bad, 'thing')} broken{noted}"
    return f"nothing is broken{noted}" if notes else "all is well"
