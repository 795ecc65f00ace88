"""
Who outside hwbpd holds slots where the kernel has refused one.

The kernel keeps no list of owners. It can be asked how many slots are left at a place (``occupancy``), who has
descriptors of breakpoints (``perf_fds``), and who traces whom (``processes``), but not where a descriptor's breakpoint
is, nor who set a thread's debug registers. Names and numbers are put together only where nothing else is possible:

1. When no thread of the host has a slot, every descriptor's breakpoint is CPU-wide. What a process has of them, less
   all the slots that others than hwbpd have on other CPUs, is on this one. Where a CPU has two pools of slots, those of
   the other pool are subtracted as well, on every CPU: a descriptor does not tell its pool.
2. A descriptor's breakpoint may be on any thread, one that has exited included. What a traced thread has beyond all
   of them together was set through ptrace, so it is its tracer's: whoever traces a thread has the say over its debug
   registers, also over what an earlier tracer left in them.
3. Everything else is unattributed. Whoever has breakpoints that could be among it is named without a number and a
   place: that much is known.

Names are given only if the search found the same before and after the count. Turned down: to conclude from what is
likely. With one process that has a descriptor and one slot that is missing, nearly always the two belong together; but
the slot may be the kernel's own, or left behind by a debugger, and the breakpoint that of a thread that has exited.

What may still be named wrongly: a tracer, for a breakpoint that others set on its thread and keep out of sight (see
``perf_fds``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from hwbpd.core.model import Pool
from hwbpd_linux.occupancy import Counted, Counter, Place
from hwbpd_linux.perf_fds import NOBODY, Holder, Holders, find_holders
from hwbpd_linux.processes import Process, Tracers, child_ids, find_tracers, thread_ids

LOOK_S: Final = 2.0
THREADS_MAX: Final = 4  # that are told one by one; many may have as much as the busiest

PERF_FD: Final = "perf fd"  # a descriptor that was shown to be a breakpoint
PERF_FD_UNSURE: Final = "perf fd?"  # a descriptor of an event that may be one
TRACER: Final = "tracer"  # the thread is traced, and has slots that nothing else explains
UNATTRIBUTED: Final = "unattributed"

SOMEWHERE: Final = "somewhere"
NOT_FOUND: Final = "on a thread that was not found"
NOT_ALL: Final = "more was not looked at"
CHANGED: Final = "it changed while it was looked at"

_UNNAMED: Final = Process(0, UNATTRIBUTED, -1)


class OtherPool(Struct, frozen=True):
    """The pool that nobody was refused in: its slots on a CPU, and hwbpd's own events of it as ``find`` takes them."""

    pool: Pool
    slots: int
    ours: Mapping[int, Place]


class Found(Struct, frozen=True):
    """Slots that somebody outside hwbpd has, and how that is known."""

    pid: int  # 0 when nobody can be named
    comm: str
    uid: int  # -1 when nobody can be named
    slots: int  # at that place at least so many are theirs; 0 when that is not known
    place: str  # "cpu-wide on cpu 3", "on tid 812", "somewhere"
    evidence: str


def find(
    slots: int,
    ours: Mapping[int, Place],
    cpus: Sequence[int],
    tid: int | None,
    cpu: int | None,
    pool: Pool = Pool.ANY,
    other: OtherPool | None = None,
) -> tuple[Found, ...]:
    """
    Return who outside hwbpd has slots that count at a place; nothing when nobody has.

    :param slots: how many there are on a CPU, in ``pool``.
    :param ours: hwbpd's own events of that pool: their descriptors in this process, and the thread and CPU of each,
        ``None`` for CPU-wide and for any CPU.
    :param cpus: every CPU there may be; a breakpoint may still be on one that is offline.
    :param tid: the thread the kernel refused, or ``None``.
    :param cpu: the CPU it refused, or ``None``. With neither, all CPUs are looked at.
    :param other: the pool beside ``pool``, where there are two.

    It takes milliseconds, and ends soon after ``LOOK_S`` seconds; then the result says that not all was looked at. It
    may run in any thread. Requests of others, and of hwbpd, may be refused while it runs: call it seldom.
    """
    until_s = time.monotonic() + LOOK_S
    holders, tracers = find_holders(ours, until_s), find_tracers(until_s)
    counter = Counter(slots, pool, ours.values(), until_s)
    if tid is not None:
        counted = counter.of_thread(cpus, tid, cpu)
    else:
        counted = counter.of_cpus(cpus, cpu, _candidates(holders, tracers))
    if not (counted.in_the_way or counted.threads or counted.not_found):
        return ()
    beside = 0 if other is None else Counter(other.slots, other.pool, other.ours.values(), until_s).beside(cpus)
    again, tracers_again = find_holders(ours, until_s, holders), find_tracers(until_s)
    if holders != again or any(tracers.of(thread) != tracers_again.of(thread) for thread in counted.threads):
        nobody = explain(counted, NOBODY, Tracers({}, complete=True))
        return (*nobody, _found(_UNNAMED, 0, CHANGED, UNATTRIBUTED))
    return explain(counted, holders, tracers, beside)


def _candidates(holders: Holders, tracers: Tracers) -> dict[int, None]:
    """Threads that may have slots: those traced, those of who has descriptors, and those of their children."""
    candidates = dict.fromkeys(tracers.of_thread)
    for holder in holders.holders:
        for pid in (holder.process.pid, *child_ids(holder.process.pid)):
            candidates |= dict.fromkeys(thread_ids(pid))
    return candidates


def explain(counted: Counted, holders: Holders, tracers: Tracers, beside: int | None = 0) -> tuple[Found, ...]:
    """
    Put together what was counted and who was found, by the rules above.

    :param beside: how many CPU-wide slots of another pool others have on all CPUs; None where that cannot be told.
    """
    sure: list[Found] = []
    rest: list[Found] = []
    for cpu in counted.in_the_way:
        left = counted.cpu_wide[cpu]
        place = f"cpu-wide on cpu {cpu}"
        for process, count in _holders_on(cpu, counted, holders.holders, beside):
            sure.append(_found(process, count, place, PERF_FD))
            left -= count
        if left:
            rest.append(_found(_UNNAMED, left, place, UNATTRIBUTED))
    elsewhere = sum(len(holder.breakpoints) + len(holder.unknown) for holder in holders.holders)
    threads = sorted(counted.threads.items(), key=lambda each: tracers.of(each[0]) is None)
    for tid, count in threads[:THREADS_MAX]:
        left = count
        place = f"on tid {tid}"
        tracer = tracers.of(tid)
        if tracer is not None and holders.complete and left > elsewhere:
            sure.append(_found(tracer, left - elsewhere, place, TRACER))
            left = elsewhere
        elif tracer is not None:
            place += f", which {tracer} traces"
        if left:
            rest.append(_found(_UNNAMED, left, place, UNATTRIBUTED))
    if more := threads[THREADS_MAX:]:
        rest.append(_found(_UNNAMED, 0, f"on {len(more)} more threads", UNATTRIBUTED))
    if counted.not_found:
        rest.append(_found(_UNNAMED, counted.not_found, NOT_FOUND, UNATTRIBUTED))
    if rest:
        rest.extend(_somewhere(holders.holders, {found.pid for found in sure if found.evidence == PERF_FD}))
        if not (holders.complete and tracers.complete):
            rest.append(_found(_UNNAMED, 0, NOT_ALL, UNATTRIBUTED))
    return (*sure, *rest)


def _holders_on(cpu: int, counted: Counted, holders: Sequence[Holder], beside: int | None) -> list[tuple[Process, int]]:
    """Rule 1: who has how many CPU-wide breakpoints on a CPU at least."""
    if not counted.no_thread_has_any or beside is None:
        return []
    on_others = sum(counted.cpu_wide.values()) - counted.cpu_wide[cpu] + beside
    least = [(holder.process, len(holder.breakpoints) - on_others) for holder in holders]
    named = [(process, count) for process, count in least if count > 0]
    # More than there are: something has changed, or is on a CPU that was not counted.
    return named if sum(count for _, count in named) <= counted.cpu_wide[cpu] else []


def _somewhere(holders: Sequence[Holder], named: set[int]) -> Iterator[Found]:
    """Rule 3: who has breakpoints, at places that cannot be told."""
    for holder in holders:
        if holder.process.pid not in named:
            evidence = PERF_FD if holder.breakpoints else PERF_FD_UNSURE
            yield _found(holder.process, 0, SOMEWHERE, evidence)


def _found(process: Process, slots: int, place: str, evidence: str) -> Found:
    return Found(process.pid, process.comm, process.uid, slots, place, evidence)
