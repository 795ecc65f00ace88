"""
Text in the cells of a terminal. Pure.

Names and labels come from whoever claims, so they may hold anything: control characters that would move the cursor,
characters that take no cell or two, and some of which terminals disagree. ``printable`` leaves only what takes one cell
or two by itself, and the width of a text is the sum over its characters: where a terminal draws several as one, a line
is too short, and never too long.
"""

from __future__ import annotations

import unicodedata

from rich.cells import cell_len

NOT_SHOWN = "?"
CUT = "~"


def printable(text: str) -> str:
    """Return the text with every character replaced that is not one visible thing in one cell or two."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(each if _is_shown(each) else NOT_SHOWN for each in text)


def _is_shown(character: str) -> bool:
    # Marks (categories M*) belong to the character before, of which a cut may have made something else.
    return (
        character.isprintable() and unicodedata.category(character)[0] != "M" and cell_len(character) in (1, 2)
    )


def width_of(text: str) -> int:
    """Return how many cells a printable text takes at most."""
    return len(text) if text.isascii() else sum(map(cell_len, text))


def fit(text: str, width: int, right: bool = False) -> str:
    """Return a printable text in exactly ``width`` cells: padded, or cut with a mark that says so."""
    missing = width - width_of(text)
    if missing < 0:
        text = head(text, width - len(CUT)) + CUT if width else ""
        missing = width - width_of(text)
    return " " * missing + text if right else text + " " * missing


def head(text: str, width: int) -> str:
    """Return as much of a printable text as has room in ``width`` cells."""
    used = 0
    for index, character in enumerate(text):
        used += width_of(character)
        if used > width:
            return text[:index]
    return text


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """
    Return a printable text in lines of at most ``width`` cells, broken between words where that is possible.

    :param indent: begins every line but the first; left out where there is no room for it.
    """
    if width_of(text) <= width:
        return [text]
    lines: list[str] = []
    line = ""
    begin = indent if width_of(indent) < width // 2 else ""
    for word in text.split():
        joined = f"{line} {word}" if line.strip() else line + word
        if width_of(joined) <= width:
            line = joined
            continue
        if line.strip():
            lines.append(line)
            line = begin
        rest = word
        while width_of(line + rest) > width:
            part = head(rest, width - width_of(line)) or rest[0]  # a wide character in one column is cut by ``fit``
            lines.append(line + part)
            rest, line = rest[len(part) :], begin
        line += rest
    return [*lines, line] if line.strip() or not lines else lines
