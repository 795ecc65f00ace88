"""The requests that refusals speak of, read back from perf's syntax."""

from __future__ import annotations

import re

from hwbpd.core.errors import HwbpError
from hwbpd.core.model import Access, Mode, Span
from hwbpd_x86.fit import X86Backend

_REQUEST = re.compile(r"mem:(0x[0-9a-f]+)/(\d+):(r|w|rw|x)(?::([ukh]))?")
_NEAREST = re.compile(rf"; nearest: ({_REQUEST.pattern})(?:, (\d+) of the (\d+) bytes)?$")

Request = tuple[Span, Access, Mode]


def read_request(text: str) -> Request:
    match = _REQUEST.fullmatch(text)
    assert match is not None, text
    address, length, letters, seen = match.groups()
    mode = Mode(user=seen in (None, "u"), kernel=seen in (None, "k"))
    return Span(int(address, 16), int(length)), Access.from_letters(letters), mode


def recommends(refusal: HwbpError) -> bool:
    """Whether a refusal names a request that comes near."""
    return "; nearest: " in str(refusal)


def nearest_of(refusal: HwbpError) -> tuple[Request, tuple[int, int] | None]:
    """Return the request a refusal recommends and, where it says so, how many of how many bytes that covers."""
    match = _NEAREST.search(str(refusal))
    assert match is not None, str(refusal)
    covered, asked = match.group(6), match.group(7)
    return read_request(match.group(1)), (int(covered), int(asked)) if covered else None


def refusal_of(backend: X86Backend, request: Request) -> HwbpError | None:
    """Return how the backend refuses a request, or ``None`` when it does not."""
    try:
        backend.fit(*request)
    except HwbpError as refusal:
        return refusal
    return None
