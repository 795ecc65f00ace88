"""
Every refusal, as an exception: one class for each name in the protocol's table of errors.

``str()`` is the daemon's whole sentence. ``NotReachable`` and ``RequestTimedOut`` are found out on this side and never
come over the wire; ``WaitTimedOut`` comes as the end of a claim that waited, so ETIMEDOUT in a reply is always
``RequestExpired``.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KERNEL_REFUSED = "the kernel refused"  # nobody looked who it is
_SAYS_NOTHING_MORE = frozenset({"books", "unattributed", _KERNEL_REFUSED})  # the rest of the text says the same


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who has slots that a refused claim would have needed."""

    pid: int  # 0 where nobody can be named
    comm: str
    uid: int
    kind: str  # as claimed; "" for holders outside hwbpd
    slots: int  # how many it has where there was no room; 0 where that is not known
    place: str  # "on tid 812", "cpu-wide on cpu 3"
    claim_ids: tuple[int, ...] = ()
    evidence: str = "books"  # "books": a claim of this daemon; otherwise how it was found out

    def __str__(self) -> str:
        who = f"{self.comm}[{self.pid}]" if self.pid else self.comm
        kind = f" as {self.kind}" if self.kind else ""
        number = "some" if self.slots == 0 else f"at least {self.slots}" if self.is_at_least else str(self.slots)
        text = f"{who}{kind}: {number} {self.place}"
        if self.claim_ids:
            plural = "s" if len(self.claim_ids) > 1 else ""
            text += f" (claim{plural} {','.join(map(str, self.claim_ids))})"
        return text if self.evidence in _SAYS_NOTHING_MORE else f"{text}, known from {self.evidence}"

    @property
    def is_at_least(self) -> bool:
        """Whether there may be more slots than ``slots``."""
        return self.evidence == _KERNEL_REFUSED


class HwbpError(Exception):
    """
    What was asked could not be done.

    ``claim_id`` is the id under which ``Client.why`` explains the refusal, 0 where there is none. An errno name that
    this library has no class for is raised as this one.
    """

    errno_name: str = "EIO"

    def __init__(self, sentence: str, holders: tuple[Holder, ...] = (), claim_id: int = 0) -> None:
        super().__init__(sentence)
        self.holders = holders
        self.claim_id = claim_id

    @property
    def errno(self) -> int:
        """The number of ``errno_name`` on this system."""
        return int(getattr(errno, self.errno_name, errno.EIO))


class NoFreeSlot(HwbpError):
    """Every slot the claim could use is held; ``holders`` says by whom."""

    errno_name = "ENOSPC"


class HeldBack(HwbpError):
    """There is room, and a policy keeps it: a reserve, a claim of a higher rank, or one that waits for it."""

    errno_name = "EAGAIN"


class WaitTimedOut(HwbpError):
    """The claim has waited as long as it was to wait, in vain. Nothing is held."""

    errno_name = "ETIMEDOUT"


class NotPermitted(HwbpError):
    """This process may not do that."""

    errno_name = "EPERM"


class BadClaim(HwbpError):
    """No slot can express what was asked; the sentence names the rule and the nearest request that would work."""

    errno_name = "EINVAL"


class NotSupported(HwbpError):
    """The daemon's machine cannot do that at all."""

    errno_name = "EOPNOTSUPP"


class NoSuchClaim(HwbpError):
    """No claim has that id, or it is somebody else's, or it is over."""

    errno_name = "ENOENT"


class Stale(HwbpError):
    """The session this request belongs to is over, and so are its claims. Connect again."""

    errno_name = "ESTALE"


class TargetGone(HwbpError):
    """The thread does not exist, or no longer."""

    errno_name = "ESRCH"


class CpuOffline(HwbpError):
    """The CPU does not exist or is offline."""

    errno_name = "ENODEV"


class RequestExpired(HwbpError):
    """The daemon came to the request after its deadline; nothing was done."""

    errno_name = "ETIMEDOUT"


class LimitReached(HwbpError):
    """A bound of the daemon; the sentence gives the number."""

    errno_name = "EDQUOT"


class NoResources(HwbpError):
    """The daemon has no descriptors or ring memory left."""

    errno_name = "EMFILE"


class VersionMismatch(HwbpError):
    """The daemon speaks another version of the protocol."""

    errno_name = "EPROTO"


class BadMessage(HwbpError):
    """One side sent what is not a message of this protocol."""

    errno_name = "EBADMSG"


class NotReachable(HwbpError):
    """No daemon answers at the path; the sentence says which path, why, and how to start it."""

    errno_name = "ECONNREFUSED"


class RequestTimedOut(HwbpError):
    """No reply came in time. The daemon was told the deadline; a claim it grants too late is given back."""

    errno_name = "ETIMEDOUT"


BY_ERRNO_NAME: Mapping[str, type[HwbpError]] = {
    refusal.errno_name: refusal
    for refusal in (
        NoFreeSlot,
        HeldBack,
        NotPermitted,
        BadClaim,
        NotSupported,
        NoSuchClaim,
        Stale,
        TargetGone,
        CpuOffline,
        RequestExpired,
        LimitReached,
        NoResources,
        VersionMismatch,
        BadMessage,
    )
}


def refusal_of(message: Mapping[str, Any]) -> HwbpError:
    """Return the exception for an ``error`` reply."""
    name = str(message.get("errno", "EIO"))
    sentence = str(message.get("sentence", name))
    return refusal_named(name, sentence, holders_of(message), message.get("claim", 0))


def refusal_named(name: str, sentence: str, holders: tuple[Holder, ...], claim_id: int) -> HwbpError:
    """Return the exception for an errno name; one of a later daemon becomes a plain ``HwbpError``."""
    refusal = BY_ERRNO_NAME.get(name, HwbpError)(sentence, holders, claim_id)
    refusal.errno_name = name
    return refusal


def holders_of(message: Mapping[str, Any]) -> tuple[Holder, ...]:
    """Return the ``holders`` of a reply or notice that has some."""
    return tuple(holder_of(holder) for holder in message.get("holders", ()))


def holder_of(message: Mapping[str, Any]) -> Holder:
    """Return one holder as a value."""
    # Explanations must not fail for want of a detail: what a daemon leaves out reads as unknown.
    return Holder(
        pid=message.get("pid", 0),
        comm=message.get("comm", "unknown"),
        uid=message.get("uid", 0),
        kind=message.get("kind", ""),
        slots=message.get("slots", 0),
        place=message.get("place", "an unnamed place"),
        claim_ids=tuple(message.get("claim_ids", ())),
        evidence=message.get("evidence", "books"),
    )
