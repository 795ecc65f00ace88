"""
From a peer's wish to the terms of the core: asks the backend to fit the span, and the machine for the thread or
process, before anything is counted.
"""

from __future__ import annotations

import mmap
from errno import errorcode

import msgspec
from msgspec import Struct

from hwbpd.core.errors import BadClaim, LimitReached, NotPermitted
from hwbpd.core.model import Access, ArmedBy, Delivery, Kind, Mode, Plan, Span, Target
from hwbpd.hookspecs import Backend, Machine
from hwbpd.messages import ClaimRequest, Wish
from hwbpd.refusals import Asked
from hwbpd.settings import Rings, Settings


def over_reported(span: Span, plan: Plan) -> int:
    """How many bytes beside the span a plan reports accesses to."""
    return max(0, sum(piece.span.length_bytes for piece in plan.pieces) - span.length_bytes)


class Fitted(Struct, frozen=True):
    """A wish in the terms of the core."""

    span: Span
    access: Access
    mode: Mode
    target: Target
    plan: Plan
    guard_per_s: int


def fit(
    wish: Wish,
    *,
    privileged: bool,
    machine: Machine,
    backend: Backend,
    settings: Settings,
    vcpu: Target | None = None,
) -> Fitted:
    """
    Return what a wish comes down to.

    :param vcpu: of a wish for a vCPU, which that is; ``backend`` is then its own.
    :param privileged: whether the peer may know where the kernel runs, and may go without a guard.
    :raises HwbpError: for what no slot can express, a thread or process that does not exist, or a bound that is passed.
    """
    if wish.priority > 0 and not privileged:
        raise NotPermitted(f"priority {wish.priority} is for root only; others may ask for 0 or less")
    if wish.armed_by is ArmedBy.TRACER:
        wish = _of_a_tracer(wish)
    if vcpu is not None:
        _check_for_a_vcpu(wish)
    span = Span(wish.address, wish.length)
    access = Access.from_letters(wish.access)
    guard_per_s = _guard(wish, privileged, settings)
    mode = _mode(wish, privileged, guard_per_s, settings)
    if vcpu is not None:
        mode = msgspec.structs.replace(mode, ring_bytes=0)  # its VMM tells of each hit
    target = _target(wish, machine) if vcpu is None else vcpu
    plan = backend.fit(span, access, mode)
    if vcpu is None:
        _check_for_target(plan, Asked(span, access, mode), target, backend)
    return Fitted(span, access, mode, target, plan, guard_per_s)


def wait_until_ns(request: ClaimRequest, now_ns: int, wait_max_s: float) -> int:
    """
    Return until when a claim may wait, 0 for not at all: a time that has passed is no wait.

    :raises BadClaim: for a longer wait than this daemon allows.
    """
    if request.wait_until_ns <= now_ns:
        return 0
    wait_s = (request.wait_until_ns - now_ns) / 1e9
    if wait_s > wait_max_s:
        raise BadClaim(f"a wait of {wait_s:.0f} s is more than the {wait_max_s:g} s of this daemon (policy.wait_max_s)")
    return request.wait_until_ns


def _of_a_tracer(wish: Wish) -> Wish:
    """
    Return the wish as what the daemon does for it: it holds a place on one thread, and sees no hits.

    :raises BadClaim: for what a debug register that is set by ptrace cannot do.
    """
    if not wish.tid or wish.pid or wish.cpus is not None:
        raise BadClaim("armed_by 'tracer' is for one thread, wherever it runs: name a tid, and no pid or cpus")
    if wish.user_chain or wish.kernel_chain or wish.ring_bytes or wish.guard is not None or wish.only_pid:
        raise BadClaim("what a tracer arms reports to the tracer: without chain, ring_bytes, guard or only_pid")
    if wish.across_exec:
        raise BadClaim("the kernel takes what a tracer has armed from a thread at exec; leave across_exec out")
    return msgspec.structs.replace(wish, delivery=Delivery.HOLD)


def _check_for_a_vcpu(wish: Wish) -> None:
    """
    Return if a vCPU's registers, loaded by its VMM, can do that.

    :raises BadClaim: for what they cannot.
    """
    if wish.tid or wish.pid or wish.only_pid or wish.cpus is not None:
        raise BadClaim("vcpu is a world of its own: it does not go with tid, pid, only_pid or cpus")
    if wish.armed_by is ArmedBy.TRACER:
        raise BadClaim("a vcpu is armed by its VMM, as the daemon tells it; leave armed_by out")
    if wish.user_chain or wish.kernel_chain or wish.ring_bytes or wish.across_exec:
        raise BadClaim("a VMM tells of each hit by itself: without chains, ring_bytes or across_exec")
    if not (wish.user and wish.kernel):
        raise BadClaim("a vcpu's slots see every level of the guest; leave user and kernel as they are")


def _check_for_target(plan: Plan, asked: Asked, target: Target, backend: Backend) -> None:
    """
    Return if the kernel takes such pieces of a thread or process, or for a CPU, whichever the target is.

    A slot can hold them, or they would not have been fitted; but some kernels have threads step past a hit, and others
    keep threads away from the kernel's addresses.

    :raises BadClaim: where it does not.
    """
    handling = backend.handling()
    if handling is None:
        return  # nobody has written down what it takes: it answers for itself
    of_task = not target.is_cpu_wide
    names = {True: "of a thread or process", False: "cpu-wide"}
    for piece in plan.pieces:
        if errno := handling.refusal(piece, kernel=asked.mode.kernel, of_task=of_task):
            rule = f"Linux does not take it {names[of_task]} on these CPUs ({errorcode.get(errno, str(errno))})"
            if not handling.refusal(piece, kernel=asked.mode.kernel, of_task=not of_task):
                rule += f"; {names[not of_task]} it does"
            raise BadClaim(f"{asked}: {rule}")


def _target(wish: Wish, machine: Machine) -> Target:
    cpus = wish.cpus
    if cpus is not None and not cpus:
        raise BadClaim("cpus is an empty list: name at least one cpu, or leave it out for all of them")
    if wish.pid and (wish.tid or cpus is not None):
        raise BadClaim("pid is a process with all its threads on every cpu; it does not go with tid or cpus")
    if wish.only_pid and (wish.pid or wish.tid or wish.delivery is not Delivery.HITS):
        raise BadClaim("only_pid filters the hits of a cpu-wide claim; it does not go with pid, tid or mere counts")
    return Target(
        task=machine.task(wish.tid) if wish.tid else None,
        cpus=None if cpus is None else tuple(sorted(set(cpus))),
        process=machine.process(wish.pid) if wish.pid else None,
    )


def _mode(wish: Wish, privileged: bool, guard_per_s: int, settings: Settings) -> Mode:
    if not (wish.user or wish.kernel):
        raise BadClaim("neither user nor kernel hits are wanted: nothing could ever be seen; set one of them")
    wants_hits = wish.delivery is Delivery.HITS
    if (wish.user_chain or wish.kernel_chain) and not wants_hits:
        raise BadClaim(f"a call chain comes with a hit, and delivery {wish.delivery!r} brings none; ask for 'hits'")
    if wish.ring_bytes and not wants_hits:
        raise BadClaim(f"delivery {wish.delivery!r} has no ring; leave ring_bytes out")
    if wish.kernel_chain and not privileged:
        raise NotPermitted("kernel call chains are for root only: they tell where the kernel runs")
    return Mode(
        user=wish.user,
        kernel=wish.kernel,
        delivery=wish.delivery,
        user_chain=wish.user_chain,
        kernel_chain=wish.kernel_chain,
        ring_bytes=_ring_bytes(wish.ring_bytes, settings.rings) if wants_hits else 0,
        across_exec=wish.across_exec,
        hide_kernel=wish.kernel and not privileged,
        fuse_hits=0 if wish.delivery is Delivery.HOLD else guard_per_s,
        only_pid=wish.only_pid,
        over_report=wish.over_report or _compares_values(wish),
    )


def _compares_values(wish: Wish) -> bool:
    """
    Whether the owner itself tells hits of bytes beside its span from those it asked about.

    A debugger that stops its thread at each hit of a watchpoint on writes compares the bytes with what they were. Of a
    read there is nothing to compare.
    """
    return wish.armed_by is ArmedBy.TRACER and wish.kind is Kind.PTRACE and wish.access == "w"


def _guard(wish: Wish, privileged: bool, settings: Settings) -> int:
    usual = settings.guard.hits_per_s
    if wish.guard is None:
        return usual
    if not privileged and usual and not 0 < wish.guard <= usual:
        asked = f"{wish.guard} hits a second" if wish.guard else "no bound"
        raise LimitReached(f"guard: {asked} is for root only; others get at most {usual} (guard.hits_per_s)")
    return wish.guard


def _ring_bytes(asked: int, rings: Rings) -> int:
    if not asked:
        return rings.bytes_default
    if asked > rings.bytes_max:
        raise LimitReached(f"ring_bytes {asked} is more than this daemon allows: {rings.bytes_max} (rings.bytes_max)")
    if asked < mmap.PAGESIZE or asked & (asked - 1):
        nearest = max(mmap.PAGESIZE, 1 << (asked - 1).bit_length())
        raise BadClaim(f"ring_bytes {asked} is not a power of two of at least {mmap.PAGESIZE}; nearest: {nearest}")
    return asked
