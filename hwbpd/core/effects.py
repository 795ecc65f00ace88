"""
What the shell is told to do. Effects are orders, carried out in the order in which a step returns them.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd.core.errors import HwbpError
from hwbpd.core.model import Claim, Owner, Plan, Resource, Totals


class Arm(Struct, frozen=True):
    """Arm these, all or none; answer with ``Armed`` or ``ArmFailed``."""

    claim_id: int
    resources: tuple[Resource, ...]


class Disarm(Struct, frozen=True):
    """Give these back, after a last drain; answer with ``Disarmed``."""

    claim_id: int
    resource_ids: tuple[int, ...]


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


class End(enum.StrEnum):
    """How a claim came to its end."""

    RELEASED = "released"  # its owner asked
    FORCED = "forced"  # an operator asked
    EXIT = "exit"  # its target exited
    SESSION = "session"  # its session ended
    STOPPING = "stopping"  # the daemon ends


class Ended(Struct, frozen=True):
    """
    A claim is over and its slots are free: answer whoever asked for it, and tell its owner if that was not the owner.

    ``asked_by`` and ``request_id`` say who is waiting for a reply; nobody where nobody asked.
    """

    claim: Claim
    how: End
    sentence: str
    totals: Totals
    asked_by: Owner | None = None
    request_id: int = 0


Effect = Arm | Disarm | Route | Unroute | Grant | Refuse | Ended
