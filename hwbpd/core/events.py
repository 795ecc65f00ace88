"""
What can happen. Events are past; each carries the time at which the shell saw it, as CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from msgspec import Struct

from hwbpd.core.model import Access, Kind, Mode, Owner, Plan, Span, Target, Totals


class Event(Struct, frozen=True):
    """One thing that happened."""

    now_ns: int


class ClaimRequested(Event, frozen=True):
    """An owner asks for slots; the backend has already cut the span into the pieces of ``plan``."""

    owner: Owner
    request_id: int
    kind: Kind
    span: Span
    access: Access
    mode: Mode
    target: Target
    label: str
    plan: Plan


class Armed(Event, frozen=True):
    """The machine has armed every resource of the claim."""

    claim_id: int


class ArmFailed(Event, frozen=True):
    """The machine was refused with ``errno`` on the leg of that CPU or thread, and has undone the others."""

    claim_id: int
    errno: int
    cpu: int | None
    tid: int | None


class ReleaseRequested(Event, frozen=True):
    """Somebody asks to end a claim; ``operator`` may end those of others."""

    by: Owner
    request_id: int
    claim_id: int
    operator: bool


class Disarmed(Event, frozen=True):
    """The machine has given back every slot of the claim; ``totals`` are final."""

    claim_id: int
    totals: Totals


class HitsCounted(Event, frozen=True):
    """A drain brought hits, or news of lost ones, since the last."""

    resource_id: int
    hits: int
    lost: int


class TargetExited(Event, frozen=True):
    """The thread that a resource is for has exited. Its slot stays taken until we give it back."""

    resource_id: int


class SessionEnded(Event, frozen=True):
    """A client said goodbye, its connection was lost, or its process died."""

    session_id: int
    reason: str


class Stopping(Event, frozen=True):
    """The daemon is about to end."""

    reason: str


AnyEvent = (
    ClaimRequested
    | Armed
    | ArmFailed
    | ReleaseRequested
    | Disarmed
    | HitsCounted
    | TargetExited
    | SessionEnded
    | Stopping
)
