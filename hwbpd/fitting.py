"""
From a peer's request to the event that the core decides on: asks the backend to fit the span, and the machine for the
thread, before anything is counted.
"""

from __future__ import annotations

import mmap

from hwbpd.core.errors import BadClaim, LimitReached
from hwbpd.core.events import ClaimRequested
from hwbpd.core.model import Access, Delivery, Mode, Owner, Span, Target
from hwbpd.hookspecs import Backend, Machine
from hwbpd.messages import ClaimRequest
from hwbpd.settings import Rings


def claim_requested(
    request: ClaimRequest, owner: Owner, now_ns: int, *, machine: Machine, backend: Backend, rings: Rings
) -> ClaimRequested:
    """
    Return the event for a request.

    :raises HwbpError: for what no slot can express, a thread that does not exist, or a bound that is passed.
    """
    span = Span(request.address, request.length)
    access = Access.from_letters(request.access)
    mode = mode_of(request, rings)
    plan = backend.fit(span, access, mode)
    return ClaimRequested(
        now_ns=now_ns,
        owner=owner,
        request_id=request.id,
        kind=request.kind,
        span=span,
        access=access,
        mode=mode,
        target=target_of(request, machine),
        label=request.label,
        plan=plan,
    )


def target_of(request: ClaimRequest, machine: Machine) -> Target:
    """Return the target of a request; raises ``TargetGone`` for a thread that does not exist."""
    cpus = request.cpus
    if cpus is not None and not cpus:
        raise BadClaim("cpus is an empty list: name at least one cpu, or leave it out for all of them")
    return Target(
        task=machine.task(request.tid) if request.tid else None,
        cpus=None if cpus is None else tuple(sorted(set(cpus))),
    )


def mode_of(request: ClaimRequest, rings: Rings) -> Mode:
    """Return the mode of a request; raises ``BadClaim`` for combinations that could never show anything."""
    if not (request.user or request.kernel):
        raise BadClaim("neither user nor kernel hits are wanted: nothing could ever be seen; set one of them")
    wants_hits = request.delivery is Delivery.HITS
    if (request.user_chain or request.kernel_chain) and not wants_hits:
        raise BadClaim(f"a call chain comes with a hit, and delivery {request.delivery!r} brings none; ask for 'hits'")
    if request.ring_bytes and not wants_hits:
        raise BadClaim(f"delivery {request.delivery!r} has no ring; leave ring_bytes out")
    return Mode(
        user=request.user,
        kernel=request.kernel,
        delivery=request.delivery,
        user_chain=request.user_chain,
        kernel_chain=request.kernel_chain,
        ring_bytes=_ring_bytes(request.ring_bytes, rings) if wants_hits else 0,
    )


def _ring_bytes(asked: int, rings: Rings) -> int:
    if not asked:
        return rings.bytes_default
    if asked > rings.bytes_max:
        raise LimitReached(f"ring_bytes {asked} is more than this daemon allows: {rings.bytes_max} (rings.bytes_max)")
    if asked < mmap.PAGESIZE or asked & (asked - 1):
        nearest = max(mmap.PAGESIZE, 1 << (asked - 1).bit_length())
        raise BadClaim(f"ring_bytes {asked} is not a power of two of at least {mmap.PAGESIZE}; nearest: {nearest}")
    return asked
