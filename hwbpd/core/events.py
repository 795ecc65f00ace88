"""
What can happen. Events are past; each carries the time at which the shell saw it, as CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from msgspec import Struct

from hwbpd.core.errors import Holder
from hwbpd.core.model import Access, ArmedBy, Kind, Mode, Owner, Plan, Pool, Span, Target, Totals, Vcpu


class Event(Struct, frozen=True):
    """One thing that happened."""

    now_ns: int


class ClaimRequested(Event, frozen=True):
    """
    An owner asks for slots; the backend has already cut the span into the pieces of ``plan``.

    ``guard_per_s``: how many hits a second are let through, 0 for any number.
    """

    owner: Owner
    request_id: int
    kind: Kind
    span: Span
    access: Access
    mode: Mode
    target: Target
    label: str
    plan: Plan
    guard_per_s: int = 0
    privileged: bool = False
    priority: int = 0
    wait_until_ns: int = 0
    armed_by: ArmedBy = ArmedBy.DAEMON
    placeholder: bool = True


class Armed(Event, frozen=True):
    """The machine has armed every resource of the claim."""

    claim_id: int


class ArmFailed(Event, frozen=True):
    """The machine was refused with ``errno`` on the leg of that CPU or thread, and has undone the others."""

    claim_id: int
    errno: int
    cpu: int | None
    tid: int | None
    needed: int = 0  # with EMFILE: how many descriptors it would have taken
    allowed: int = 0
    sentence: str = ""  # the reason, where it is not the machine's


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


class Suspended(Event, frozen=True):
    """The machine has given back every slot of a claim that gave way."""

    claim_id: int


class YieldRequested(Event, frozen=True):
    """An owner gives way, as it was asked to."""

    by: Owner
    request_id: int
    claim_id: int


class TakingRequested(Event, frozen=True):
    """A tracer is about to take its slot: it must be free in the kernel."""

    by: Owner
    request_id: int
    claim_id: int


class TakenReported(Event, frozen=True):
    """A tracer has it."""

    by: Owner
    request_id: int
    claim_id: int


class TakeFailed(Event, frozen=True):
    """A tracer could not: the kernel refused it with ``errno``."""

    by: Owner
    request_id: int
    claim_id: int
    errno: int


class Probed(Event, frozen=True):
    """Whether the thread of a claim has the slot that its tracer, now gone, was about to take."""

    claim_id: int
    has_slot: bool


class ForeignFound(Event, frozen=True):
    """What was found of those outside hwbpd who are in the way of a claim; ``holders`` may be empty."""

    claim_id: int
    holders: tuple[Holder, ...]


class HitsCounted(Event, frozen=True):
    """A drain brought hits, or news of lost ones, since the last."""

    resource_id: int
    hits: int
    lost: int


class TargetEnded(Event, frozen=True):
    """The thread or process that a resource is for has exited, or runs another program. The slot stays taken."""

    resource_id: int
    execed: bool


class VcpuCame(Event, frozen=True):
    """A VMM has a vCPU, with so many slots of each pool and nothing armed."""

    vcpu: Vcpu
    slots: dict[Pool, int]


class VcpuWent(Event, frozen=True):
    """Its thread or its VMM's session has ended; nobody has anything there any more."""

    vcpu: Vcpu
    reason: str


class NotLoaded(Event, frozen=True):
    """A VMM could not load what a resource on its vCPU holds: the kernel said ``errno``."""

    resource_id: int
    errno: int


class FuseBlown(Event, frozen=True):
    """A top-up came too late: the resource has stopped by itself."""

    resource_id: int


class RearmRequested(Event, frozen=True):
    """Somebody asks to let a guarded claim report again."""

    by: Owner
    request_id: int
    claim_id: int
    operator: bool


class Rearmed(Event, frozen=True):
    """The machine lets every resource of the claim report again."""

    claim_id: int


class RearmFailed(Event, frozen=True):
    """The machine had to give up a slot for that and could not have it back."""

    claim_id: int
    errno: int


class CpuWentOffline(Event, frozen=True):
    """What was armed there is gone from the CPU, and still held by the kernel until we give it back."""

    cpu: int


class CpuCameOnline(Event, frozen=True):
    """It is back, with nothing armed."""

    cpu: int


class LegTaken(Event, frozen=True):
    """The machine has armed a resource on a CPU that came online."""

    resource_id: int
    cpu: int


class LegRefused(Event, frozen=True):
    """It could not."""

    resource_id: int
    cpu: int
    errno: int


class Tick(Event, frozen=True):
    """A deadline that the arbiter named has passed."""


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
    | Suspended
    | YieldRequested
    | TakingRequested
    | TakenReported
    | TakeFailed
    | Probed
    | ForeignFound
    | HitsCounted
    | TargetEnded
    | VcpuCame
    | VcpuWent
    | NotLoaded
    | FuseBlown
    | RearmRequested
    | Rearmed
    | RearmFailed
    | CpuWentOffline
    | CpuCameOnline
    | LegTaken
    | LegRefused
    | Tick
    | SessionEnded
    | Stopping
)
