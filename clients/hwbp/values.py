"""
What the daemon answers, as values. The fields carry the names of docs/protocol.md.

Fields that this library does not know are left out: a later daemon may send more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from hwbp.errors import BadMessage

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one slot holds."""

    address: int
    length: int
    access: str
    pool: str


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the hits of a claim: at its end, ``hits = delivered + lost + dropped`` if it delivers hits."""

    hits: int  # as the kernel counted them
    delivered: int  # sent to this session
    lost: int  # for which the ring had no room
    dropped: int  # for which the way to this client had none


@dataclass(frozen=True, slots=True)
class Ended:
    """
    Why a claim is over.

    ``reason``: "released", "exit" (the thread exited), "forced" (an operator released it), "closing" (the daemon ended
    the session), "stale" or "connection" (the daemon no longer knows this session), "protocol" (its messages cannot be
    trusted), "closed" (this client was closed), or what a later daemon says.
    """

    reason: str
    sentence: str


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """A claim, as everybody may see it."""

    claim: int
    pid: int
    comm: str
    uid: int
    kind: str
    label: str
    state: str
    age_ns: int
    hits: int
    lost: int
    dropped: int


@dataclass(frozen=True, slots=True)
class ResourceRow:
    """One held slot and the claims that ride on it."""

    resource: int
    address: int
    length: int
    access: str
    pool: str
    user: bool
    kernel: bool
    delivery: str
    tid: int  # 0 for CPU-wide
    cpus: tuple[int, ...] | None  # None for all
    claims: tuple[ClaimRow, ...]


@dataclass(frozen=True, slots=True)
class CpuRow:
    """Slots used on a CPU, per pool: by CPU-wide claims, and by the most demanding task that may run there."""

    cpu: int
    online: bool
    cpu_wide: Mapping[str, int]
    busiest_task: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Slots:
    """Who holds what. ``pools``: pool name -> slots per CPU."""

    pools: Mapping[str, int]
    cpus: tuple[CpuRow, ...]
    resources: tuple[ResourceRow, ...]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the daemon's machine can do. ``registers`` and ``limits`` are as docs/protocol.md describes them."""

    machine: str
    backend: str
    architecture: str
    pools: Mapping[str, int]
    cpus_possible: tuple[int, ...]
    cpus_online: tuple[int, ...]
    registers: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Why:
    """The story of a claim: its state, and sentences, oldest first."""

    claim: int
    state: str
    lines: tuple[str, ...]


def value_of(shape: type[Value], message: Mapping[str, Any], **changes: Any) -> Value:
    """
    Return ``message`` as a ``shape``, with ``changes`` in place of its own fields; lists become tuples.

    :raises BadMessage: when a field is missing.
    """
    taken = {}
    for name in (each.name for each in fields(shape)):  # type: ignore[arg-type]
        if name in message:
            taken[name] = tuple(message[name]) if isinstance(message[name], list) else message[name]
    try:
        return shape(**(taken | changes))
    except TypeError as error:
        raise BadMessage(f"the daemon's answer is not complete: {error}") from error


def cpus_of(messages: Sequence[Mapping[str, Any]]) -> tuple[CpuRow, ...]:
    """Return the ``cpus`` of a ``slots`` reply."""
    return tuple(value_of(CpuRow, message) for message in messages)


def resources_of(messages: Sequence[Mapping[str, Any]]) -> tuple[ResourceRow, ...]:
    """Return the ``resources`` of a ``slots`` reply."""
    return tuple(
        value_of(ResourceRow, message, claims=tuple(value_of(ClaimRow, claim) for claim in message.get("claims", ())))
        for message in messages
    )
