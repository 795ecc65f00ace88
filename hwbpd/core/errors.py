"""
Every refusal, with the errno that debuggers already know, and the holders it names.

A sentence says what could not be done, to what, and who is in the way or what would work instead.
The wire carries the errno's name, the sentence and the holders; a client raises its class of the same name.
"""

from __future__ import annotations

import errno
from typing import ClassVar

from msgspec import Struct

BOOKS = "books"  # evidence of a holder with a claim of this daemon
KERNEL_REFUSED = "the kernel refused"  # evidence of a holder nobody has looked for yet


class Holder(Struct, frozen=True):
    """Somebody who has slots that a refused claim would have needed."""

    pid: int  # 0 where nobody can be named
    comm: str
    uid: int
    kind: str  # as claimed, or "residue": left on its thread by a tracer; "" for holders outside hwbpd
    slots: int  # on the place where there was no room
    place: str  # "on tid 812", "cpu-wide on cpu 3"
    claim_ids: tuple[int, ...] = ()
    evidence: str = BOOKS  # how we know: books, or what was found outside them

    def __str__(self) -> str:
        if self.evidence == BOOKS:
            return f"{self.comm}[{self.pid}] as {self.kind}: {self.slots} {self.place}"
        who = f"{self.comm}[{self.pid}]" if self.pid else "somebody"
        how_many = f"at least {self.slots}" if self.evidence == KERNEL_REFUSED else self.slots or "some"
        how_known = f" ({self.evidence})" if self.pid else ""
        return f"{who} outside hwbpd: {how_many} {self.place}{how_known}"


class HwbpError(Exception):
    """A refusal. ``str()`` is the whole sentence; ``holders`` are those named in it."""

    errno_name: ClassVar[str]

    def __init__(self, sentence: str, holders: tuple[Holder, ...] = ()) -> None:
        super().__init__(sentence)
        self.holders = holders

    @property
    def errno(self) -> int:
        return int(getattr(errno, self.errno_name))


class NoFreeSlot(HwbpError):
    """Every slot the claim could use is held."""

    errno_name = "ENOSPC"


class HeldBack(HwbpError):
    """It would fit, but a policy keeps the room for others: a reserve, a higher rank, or somebody who waits for it."""

    errno_name = "EAGAIN"


class WaitTimedOut(HwbpError):
    """No room came in the time that the claim was to wait."""

    errno_name = "ETIMEDOUT"


class NotPermitted(HwbpError):
    """This peer may not do that."""

    errno_name = "EPERM"


class BadClaim(HwbpError):
    """No slot can express what was asked; the sentence says which rule, and the nearest request that would work."""

    errno_name = "EINVAL"


class NotSupported(HwbpError):
    """This machine, or this version, cannot do that at all."""

    errno_name = "EOPNOTSUPP"


class NoSuchClaim(HwbpError):
    """No claim has that id, or it is somebody else's, or it is over."""

    errno_name = "ENOENT"


class Stale(HwbpError):
    """The request was meant for an earlier daemon or session."""

    errno_name = "ESTALE"


class TargetGone(HwbpError):
    """The thread does not exist, or no longer."""

    errno_name = "ESRCH"


class CpuOffline(HwbpError):
    """The CPU does not exist or is offline."""

    errno_name = "ENODEV"


class RequestExpired(HwbpError):
    """The request's own deadline had passed when the daemon came to it; nothing was done."""

    errno_name = "ETIMEDOUT"


class LimitReached(HwbpError):
    """A bound of this daemon; the sentence gives the number and the setting."""

    errno_name = "EDQUOT"


class NoResources(HwbpError):
    """The daemon ran out of descriptors or memory for rings."""

    errno_name = "EMFILE"


class VersionMismatch(HwbpError):
    """Client and daemon speak different versions of the protocol."""

    errno_name = "EPROTO"


class BadMessage(HwbpError):
    """The bytes are not a message of this protocol."""

    errno_name = "EBADMSG"
