"""
How many slots others than hwbpd have, counted by asking the kernel for what is left.

A place is full when the kernel refuses one more, so a disabled breakpoint is opened there again and again, up to the
number of slots, and all are closed at once. The kernel counts, on one CPU,

    for a CPU-wide breakpoint   those that are CPU-wide, and those of the thread that has most
    for one of a thread         those that are CPU-wide, and those of that thread

so a thread that has none shows what is CPU-wide, and with that known, each thread's own is left. What is hwbpd's is
subtracted at the end.

While a place is asked, somebody else's request there may be refused. Where a CPU is full, asking its threads adds
nothing to the thread that has most, and so disturbs nobody but openers on the very thread.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from hwbpd.core.model import Pool
from hwbpd_linux import perf_event

Place = tuple[int | None, int | None]  # (thread, CPU); None for CPU-wide, and for any CPU

_ADDRESS: Final = 0x1000  # of user space, and aligned; the probe is never enabled
_WRITE, _EXECUTE = 2, 4
_EXECUTE_BYTES = 4  # only Arm has a pool of its own for breakpoints, and its instructions have four bytes
_FLAGS: Final = perf_event.DISABLED | perf_event.PINNED | perf_event.EXCLUDE_KERNEL

# Whom to ask for what is CPU-wide: the least of their answers is nearest, as each may be watched by somebody. The
# calling thread, and kthreadd, whom nobody can trace and nobody watches; in a container 2 is somebody else, or nobody.
_BYSTANDERS: Final = (0, 2)


class Counted(NamedTuple):
    """
    Slots that others have.

    ``cpu_wide`` is by CPU, and has every CPU that was counted. ``in_the_way`` names the CPUs whose CPU-wide slots
    count at the place that was asked about. ``threads`` has the threads whose slots count there, and ``not_found``
    the slots of one that has most but is not among those that were asked. ``no_thread_has_any`` is true when that
    has been shown for every thread of the host, dead ones with open events included.
    """

    cpu_wide: Mapping[int, int]
    in_the_way: tuple[int, ...]
    threads: Mapping[int, int]
    not_found: int
    no_thread_has_any: bool


NOTHING: Final = Counted({}, (), {}, 0, False)


class Counter:
    """
    One count.

    :param slots: how many there are on a CPU, in ``pool``.
    :param ours: where hwbpd's own events of that pool are.
    :param until_s: when to stop asking more threads, by ``time.monotonic()``.
    """

    def __init__(self, slots: int, pool: Pool, ours: Collection[Place], until_s: float) -> None:
        self._slots = slots
        self._bp_type, self._bytes = (_EXECUTE, _EXECUTE_BYTES) if pool is Pool.INST else (_WRITE, 1)
        self._ours = ours
        self._until_s = until_s

    def of_thread(self, cpus: Sequence[int], tid: int, cpu: int | None) -> Counted:
        """
        Count what is in the way of a breakpoint of a thread, on one CPU or on any.

        :param cpus: every CPU; ``cpu`` is one of them.
        """
        wide = self._cpu_wide(cpus)
        at_thread: dict[int, int] = {}  # the thread's own and hwbpd's, by CPU
        for where in cpus if cpu is None else (cpu,):
            taken = self._taken(tid, where)
            if taken is not None and where in wide:
                at_thread[where] = max(0, taken - wide[where])
        if not at_thread:
            return NOTHING  # the thread is gone
        most = max(wide[where] + own for where, own in at_thread.items())
        fullest = [where for where, own in at_thread.items() if wide[where] + own == most]
        others = max(at_thread[where] - self._own_of_thread(tid, where) for where in fullest)
        return self._counted(wide, fullest, {tid: others}, 0)

    def of_cpus(self, cpus: Sequence[int], cpu: int | None, candidates: Collection[int]) -> Counted:
        """
        Count what is in the way of a CPU-wide breakpoint, on one CPU or on any.

        :param candidates: threads that may have slots; the one that has most on the CPU is looked for among them.
        """
        wide = self._cpu_wide(cpus)
        threads: dict[int, int] = {}
        not_found = 0
        own_threads = {tid for tid, _ in self._ours if tid is not None}
        asked = (*own_threads, *(tid for tid in candidates if tid not in own_threads))
        places = [where for where in (cpus if cpu is None else (cpu,)) if where in wide]
        for where in places:
            taken = self._taken(-1, where)
            most = 0 if taken is None else max(0, taken - wide[where])
            if most == 0:
                continue
            answers = self._ask_threads(asked, where, wide[where])
            busiest = {tid: self._others(tid, where, count) for tid, count in answers.items() if count == most}
            threads |= {tid: max(others, threads.get(tid, 0)) for tid, others in busiest.items() if others > 0}
            if not busiest:
                # hwbpd's own events of a thread that has exited count on, and cannot be asked for.
                gone = max((self._own_of_thread(tid, where) for tid in own_threads - answers.keys()), default=0)
                not_found = max(not_found, most - gone)
        return self._counted(wide, places, threads, not_found)

    def following(self, cpus: Sequence[int], tid: int) -> int | None:
        """
        Count the slots that others have on a thread wherever it runs: as many as on the CPU where they have least.

        :return: None when the thread is gone, no CPU can be asked, or there was no time to ask all.
        """
        least: int | None = None
        for where in cpus:
            if time.monotonic() > self._until_s:
                return None
            wide = self._cpu_wide((where,)).get(where)
            taken = self._taken(tid, where)
            if wide is None or taken is None:
                continue
            others = max(0, self._others(tid, where, taken - wide))
            least = others if least is None else min(least, others)
            if not least:
                break
        return least

    def beside(self, cpus: Sequence[int]) -> int | None:
        """
        Count the CPU-wide slots that others have on all CPUs together.

        :return: None where threads have slots of this pool as well, or may have.
        """
        wide = self._cpu_wide(cpus)
        if len(wide) < len(cpus) or not self._no_thread_has_any(wide):
            return None
        return sum(max(0, count - self._own_cpu_wide(where)) for where, count in wide.items())

    def _counted(self, wide: Mapping[int, int], fullest: Sequence[int], threads: dict[int, int], lost: int) -> Counted:
        others_wide = {where: max(0, count - self._own_cpu_wide(where)) for where, count in wide.items()}
        others_threads = {tid: count for tid, count in threads.items() if count > 0}
        in_the_way = tuple(where for where in fullest if others_wide[where] > 0)
        none = not others_threads and not lost and bool(in_the_way) and self._no_thread_has_any(wide)
        return Counted(others_wide, in_the_way, others_threads, lost, none)

    def _no_thread_has_any(self, wide: Mapping[int, int]) -> bool:
        """Whether every CPU that is online takes as many CPU-wide breakpoints as its CPU-wide slots leave."""
        taken = {where: self._taken(-1, where) for where in wide}
        return all(count in (None, wide[where]) for where, count in taken.items())

    def _cpu_wide(self, cpus: Sequence[int]) -> dict[int, int]:
        """The CPU-wide slots of each CPU, hwbpd's included; without the CPUs that cannot be asked."""
        wide: dict[int, int] = {}
        for where in cpus:
            answers = [taken for tid in _BYSTANDERS if (taken := self._taken(tid, where)) is not None]
            if answers:
                wide[where] = min(answers)
        return wide

    def _ask_threads(self, tids: Collection[int], where: int, wide: int) -> dict[int, int]:
        """The slots of each thread on a CPU, hwbpd's included."""
        answers: dict[int, int] = {}
        for tid in tids:
            if time.monotonic() > self._until_s:
                break
            taken = self._taken(tid, where)
            if taken is not None:
                answers[tid] = taken - wide
        return answers

    def _taken(self, tid: int, cpu: int) -> int | None:
        """Return how many slots are taken at a place, CPU-wide for a tid of -1; ``None`` when it cannot be asked."""
        held: list[int] = []
        try:
            for _ in range(self._slots):
                held.append(
                    perf_event.open_breakpoint(
                        _ADDRESS, self._bytes, self._bp_type, tid=tid, cpu=cpu, flags=_FLAGS, read_lost=False
                    )
                )
        except OSError as refusal:
            if refusal.errno != errno.ENOSPC:
                return None
        finally:
            for fd in held:
                os.close(fd)
        return self._slots - len(held)

    def _others(self, tid: int, where: int, count: int) -> int:
        return count - self._own_of_thread(tid, where)

    def _own_of_thread(self, tid: int, where: int) -> int:
        return sum(place in ((tid, None), (tid, where)) for place in self._ours)

    def _own_cpu_wide(self, where: int) -> int:
        return sum(place == (None, where) for place in self._ours)
