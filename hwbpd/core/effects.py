"""
What the shell is told to do. Effects are orders, carried out in the order in which a step returns them.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd.core.errors import Holder, HwbpError
from hwbpd.core.model import Claim, Owner, Plan, Pool, Resource, Target, Totals


class Arm(Struct, frozen=True):
    """Arm these, all or none; answer with ``Armed`` or ``ArmFailed``."""

    claim: Claim
    resources: tuple[Resource, ...]


class Disarm(Struct, frozen=True):
    """
    Give these back, after a last drain; answer with ``Disarmed``, whose totals are the claim's.

    ``shared`` stay armed for others: the claim gets what is in their rings, and no more (no ``Unroute`` follows).
    """

    claim_id: int
    resource_ids: tuple[int, ...]
    shared: tuple[int, ...] = ()


class Suspend(Struct, frozen=True):
    """The same for a claim that goes on later: its counts go on, too, and no ``Unroute`` follows. ``Suspended``."""

    claim_id: int
    resource_ids: tuple[int, ...]
    shared: tuple[int, ...] = ()


class Attend(Struct, frozen=True):
    """
    Take no slot, but tell when the thread ends: the slots are its tracer's. Answer with ``Armed`` or ``ArmFailed``.
    """

    claim: Claim
    resources: tuple[Resource, ...]


class Handover(Struct, frozen=True):
    """Give the slots of these back to the kernel for their tracer to take, and attend to them from now on."""

    claim_id: int
    resource_ids: tuple[int, ...]


class Probe(Struct, frozen=True):
    """Has that thread a slot which is neither armed here nor one of ``known`` others? Answer with ``Probed``."""

    claim_id: int
    target: Target
    pool: Pool
    known: int


class Attribute(Struct, frozen=True):
    """
    Look who outside is in the way of a claim; answer with ``ForeignFound``, now or later.

    ``cpu`` is where the kernel refused, if it said.
    """

    claim_id: int
    pool: Pool
    target: Target
    cpu: int | None


class TopUp(Struct, frozen=True):
    """Let a fused resource report so many more hits; answer with ``FuseBlown`` if that is too late."""

    resource_id: int
    hits: int


class Silence(Struct, frozen=True):
    """Stop these from reporting; their slots stay taken."""

    resource_ids: tuple[int, ...]


class Rearm(Struct, frozen=True):
    """Let these report again; answer with ``Rearmed`` or ``RearmFailed``."""

    claim_id: int
    resource_ids: tuple[int, ...]
    fuse_hits: int


class DropLeg(Struct, frozen=True):
    """Give back the leg on a CPU that went offline."""

    resource_id: int
    cpu: int


class AddLeg(Struct, frozen=True):
    """Take a leg on a CPU that came online; answer with ``LegTaken`` or ``LegRefused``."""

    resource_id: int
    cpu: int


class Route(Struct, frozen=True):
    """From now on the hits of this resource go to this claim's owner, too."""

    resource_id: int
    claim: Claim


class Unroute(Struct, frozen=True):
    """No more."""

    resource_id: int
    claim_id: int


class Grant(Struct, frozen=True):
    """Tell the owner that it has what it asked for."""

    claim: Claim
    request_id: int
    plan: Plan


class Refuse(Struct, frozen=True):
    """Tell whoever asked that it is not done, and why. ``claim_id`` is 0 where no claim was made."""

    to: Owner
    request_id: int
    error: HwbpError
    claim_id: int = 0


class Queued(Struct, frozen=True):
    """Tell the owner that its claim waits, in which place, and for what."""

    claim: Claim
    request_id: int
    position: int
    error: HwbpError


class Done(Struct, frozen=True):
    """Answer a request about a claim that needs no more than a word: ``what`` is the name of the reply."""

    to: Owner
    request_id: int
    what: str
    claim_id: int


class Change(enum.StrEnum):
    """What an owner is told of a claim that goes on."""

    GRANTED = "granted"  # it has waited long enough
    REVOKE = "revoke"  # it has to give way until the deadline
    SPARED = "spared"  # it has not
    CONTENDED = "contended"  # somebody was refused, or waits, because of it
    FOREIGN = "foreign"  # who outside took the slot that it was about to take

    GUARDED = "guarded"  # it reports nothing until it is armed again
    OFFLINE = "offline"  # it has lost its slot on a CPU that went offline
    RESUMED = "resumed"  # it has that slot again, or reports again
    SUSPENDED = "suspended"  # the CPU is back and has no room for it


class Tell(Struct, frozen=True):
    """Tell the owner what has become of its claim; ``cpu`` where it concerns one CPU."""

    claim: Claim
    change: Change
    sentence: str
    cpu: int | None = None
    holders: tuple[Holder, ...] = ()  # by whom, or who
    deadline_ns: int = 0
    plan: Plan | None = None  # with GRANTED


class RearmDone(Struct, frozen=True):
    """Answer whoever asked for it."""

    claim: Claim
    to: Owner
    request_id: int


class End(enum.StrEnum):
    """How a claim came to its end."""

    RELEASED = "released"  # its owner asked
    FORCED = "forced"  # an operator asked
    EXIT = "exit"  # its target exited
    EXEC = "exec"  # its target runs another program
    STOLEN = "stolen"  # its slot was gone when it was to be armed again
    SESSION = "session"  # its session ended
    TIMEOUT = "timeout"  # it has waited in vain
    REFUSED = "refused"  # it has waited, and then could not be armed
    TAKE_FAILED = "take failed"  # its tracer could not take the slot
    REUSED = "reused"  # of residue: another tracer has the slot now
    STOPPING = "stopping"  # the daemon ends


class Ended(Struct, frozen=True):
    """
    A claim is over and its slots are free: answer whoever asked for it, and tell its owner if that was not the owner.

    ``asked_by`` and ``request_id`` say who is waiting for a reply; nobody where nobody asked. ``refusal``: what a claim
    was refused with after it had waited.
    """

    claim: Claim
    how: End
    sentence: str
    totals: Totals
    asked_by: Owner | None = None
    request_id: int = 0
    refusal: HwbpError | None = None


Effect = (
    Arm
    | Disarm
    | Suspend
    | Attend
    | Handover
    | Probe
    | Queued
    | Done
    | Attribute
    | TopUp
    | Silence
    | Rearm
    | DropLeg
    | AddLeg
    | Route
    | Unroute
    | Grant
    | Refuse
    | Tell
    | RearmDone
    | Ended
)
