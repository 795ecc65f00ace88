"""
How people write a breakpoint: perf's ``mem:ADDRESS[/LENGTH][:ACCESS][:MODIFIERS]``, and perf's lists of CPUs.

Of perf's modifiers ``u`` and ``k`` mean something to a debug register; the others, and config terms between slashes,
are refused rather than ignored. So is ``rx`` and its like: perf parses it, and every kernel refuses it.

See perf-list(1), "To setup a hardware breakpoint".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

FORM = "mem:ADDRESS[/LENGTH][:ACCESS][:MODIFIERS]"
EXAMPLE = "mem:0x404040/8:w:u"

_PREFIX = "mem:"
_U64_MAX = 2**64 - 1
_LENGTH_MAX = 2**32  # the protocol's
_CPU_MAX = 8191  # the largest number a Linux kernel can be built for
_ADDRESS = re.compile(r"0[xX][0-9a-fA-F]{1,16}(?![0-9a-zA-Z])|[0-9]{1,20}(?![0-9a-zA-Z])")
_LENGTH = re.compile(r"/([0-9]{1,20})(?![0-9a-zA-Z])")
_LETTERS = re.compile(r":([^:/]*)")


class BadSyntax(ValueError):
    """
    The text is not an event, or not a list of CPUs.

    ``position`` is the index of the first character that is wrong; ``str()`` shows the text with a mark under it.
    """

    def __init__(self, problem: str, text: str, position: int, form: str) -> None:
        super().__init__(f"{problem}\n  {text}\n  {' ' * position}^\n{form}")
        self.problem = problem
        self.text = text
        self.position = position


@dataclass(frozen=True, slots=True)
class Event:
    """What to watch, whoever does it. ``length`` in bytes; None for what the machine has as its default."""

    address: int
    length: int | None = None
    access: str = "rw"  # "r", "w", "rw" or "x"
    user: bool = True  # whether accesses in user mode are seen
    kernel: bool = True

    def __str__(self) -> str:
        length = "" if self.length is None else f"/{self.length}"
        modifiers = "" if self.user and self.kernel else ":u" if self.user else ":k"
        return f"{_PREFIX}{self.address:#x}{length}:{self.access}{modifiers}"


def parse_event(text: str) -> Event:
    """
    Return the event that perf writes as ``text``.

    :raises BadSyntax: pointing at the first character that does not belong there.
    """
    if not text.startswith(_PREFIX):
        raise _bad(f"an event starts with {_PREFIX!r}", text, 0)
    at = len(_PREFIX)
    found = _ADDRESS.match(text, at)
    if not found:
        raise _bad("the address is decimal, or 0x and up to 16 hexadecimal digits", text, at)
    address = int(found[0], 16 if found[0][:2] in ("0x", "0X") else 10)
    if address > _U64_MAX:
        raise _bad("the address does not fit in 64 bits", text, at)
    at = found.end()

    length = None
    if text.startswith("/", at):
        found = _LENGTH.match(text, at)
        if not found:
            raise _bad("a length is decimal digits; config terms such as /name=.../ are not known here", text, at + 1)
        length = int(found[1])
        if not 1 <= length <= _LENGTH_MAX:
            raise _bad(f"the length is 1 to {_LENGTH_MAX} bytes", text, at + 1)
        at = found.end()

    access = "rw"
    found = _LETTERS.match(text, at)
    if found and found[1][:1] in tuple("rwx"):
        access = _access(found[1], text, at + 1)
        at = found.end()
        found = _LETTERS.match(text, at)
    user = kernel = True
    if found:
        user, kernel = _modes(found[1], text, at + 1)
        at = found.end()
    if at != len(text):
        raise _bad("nothing is expected here", text, at)
    return Event(address, length, access, user, kernel)


def _access(letters: str, text: str, at: int) -> str:
    for index, letter in enumerate(letters):
        if letter not in "rwx":
            raise _bad(f"{letter!r} is no access; the letters are r, w and x", text, at + index)
        if letter in letters[:index]:
            raise _bad(f"{letter!r} is said twice", text, at + index)
        if "x" in letters[: index + 1] and index > 0:
            raise _bad("one slot watches data or execution, not both", text, at + index)
    return "rw" if set(letters) == {"r", "w"} else letters


def _modes(letters: str, text: str, at: int) -> tuple[bool, bool]:
    """Return whether user mode and kernel mode are seen. As in perf, naming one leaves out the other."""
    if not letters:
        raise _bad("an access (r, w, rw, x) or a modifier (u, k) is missing", text, at)
    for index, letter in enumerate(letters):
        if letter not in "uk":
            raise _bad(f"{letter!r} is not known; accesses are r, w, rw, x; modifiers u, k", text, at + index)
        if letter in letters[:index]:
            raise _bad(f"{letter!r} is said twice", text, at + index)
    return "u" in letters, "k" in letters


def _bad(problem: str, text: str, position: int) -> BadSyntax:
    return BadSyntax(problem, text, position, f"an event is {FORM}, for instance {EXAMPLE}")


def parse_cpus(text: str) -> tuple[int, ...]:
    """
    Return the CPUs of a list such as ``0,2-3``, ascending and without repetition.

    :raises BadSyntax: pointing at the first part that is not a CPU or a range.
    """
    cpus: set[int] = set()
    at = 0
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or last > _CPU_MAX:
            problem = f"{part!r} is no CPU and no ascending range of CPUs from 0 to {_CPU_MAX}"
            raise BadSyntax(problem, text, at, "CPUs are written like 0,2-3")
        cpus.update(range(first, last + 1))
        at += len(part) + 1
    return tuple(sorted(cpus))


def format_cpus(cpus: Iterable[int]) -> str:
    """Return CPUs, ascending, as ``parse_cpus`` reads them: ``0,2-3``."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
