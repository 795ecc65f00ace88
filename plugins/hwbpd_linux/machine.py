"""
The Linux host as a machine: resources become perf events, all their legs or none.

Order is what is decided here:

- to arm: every leg is opened disabled and gets its ring, then a thread is looked at once more, then all are enabled.
  Nobody reports before every slot is held, and no hit falls between a slot and its ring;
- to disarm: every leg is stopped, its ring is emptied, its counts are read, and only then it is closed. So the hits
  handed over and the hits lost add up to the hits the kernel counted;
- a drain goes round: each leg gets its share of the budget, and what one leaves goes to those after it. The next drain
  starts with another leg.

A CPU that goes offline takes its legs' events with it, silently; that is not handled here yet.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from hwbpd.core.errors import NotSupported, TargetGone
from hwbpd.core.model import Delivery, Mode, Piece, Target, Task, Totals
from hwbpd.hookspecs import ArmError, Batch, CpuFacts, Topology
from hwbpd_linux import cpus, readiness, threads
from hwbpd_linux.legs import Leg
from hwbpd_linux.perf_event import PAGE_BYTES
from hwbpd_linux.watch import ThreadWatch


def make(settings: Mapping[str, Any]) -> LinuxMachine:
    """
    Return this host as a machine. It needs no settings.

    :raises NotSupported: when breakpoints do not work here; the sentence says what is missing and how to get it.
    """
    missing = readiness.what_is_missing()
    if missing is not None:
        raise NotSupported(missing)
    return LinuxMachine()


class LinuxMachine:
    """Keeps ``hwbpd.hookspecs.Machine``."""

    name = "linux"

    def __init__(self) -> None:
        self.facts = CpuFacts(os.uname().machine, cpus.cpu_features())
        self._held: dict[int, _Held] = {}

    def topology(self) -> Topology:
        return Topology(possible=cpus.possible_cpus(), online=cpus.online_cpus())

    def task(self, tid: int) -> Task:
        return threads.find(tid)

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        """
        As ``Machine.arm``. A leg is refused with ENODEV for a CPU that does not exist or is offline, and with ESRCH
        for a thread that has exited or is another one than ``target`` says.
        """
        assert resource_id not in self._held, f"resource {resource_id} is armed already"
        if mode.delivery is Delivery.HITS:
            pages = mode.ring_bytes / PAGE_BYTES
            assert pages in (2**power for power in range(32)), f"no ring can have {mode.ring_bytes} bytes"
        self._held[resource_id] = _Held.take(piece, target, mode)

    def disarm(self, resource_id: int) -> tuple[Batch, Totals]:
        held = self._held.pop(resource_id)
        try:
            return held.stop()
        finally:
            held.close()

    def totals(self, resource_id: int) -> Totals:
        return self._held[resource_id].totals()

    def descriptors(self, resource_id: int) -> Sequence[int]:
        """
        As ``Machine.descriptors``. All of them may be polled for reading; each says once that its ring got something
        new, so drain until ``more`` is false before waiting again. A thread's descriptors hang up when it is gone, and
        go on saying so.
        """
        return self._held[resource_id].descriptors()

    def drain(self, resource_id: int, budget_bytes: int) -> Batch:
        return self._held[resource_id].drain(budget_bytes)

    def target_is_gone(self, resource_id: int) -> bool:
        return self._held[resource_id].target_is_gone()

    def close(self) -> None:
        while self._held:
            self._held.popitem()[1].close()


class _Held:
    """The legs of one resource."""

    def __init__(self, legs: list[Leg], watch: ThreadWatch | None, delivery: Delivery) -> None:
        self._legs = legs
        self._watch = watch
        self._delivers_hits = delivery is Delivery.HITS
        self._next_leg = 0

    @classmethod
    def take(cls, piece: Piece, target: Target, mode: Mode) -> _Held:
        tid = None if target.task is None else target.task.tid
        legs: list[Leg] = []
        watch: ThreadWatch | None = None
        cpu: int | None = None
        with ExitStack() as undo:
            try:
                if target.task is not None:
                    watch = ThreadWatch(target.task.tid)
                    undo.callback(watch.close)
                for cpu in _cpus_of(target):
                    legs.append(Leg(piece, mode, tid, cpu))
                    undo.callback(legs[-1].close)
                cpu = None
                if target.task is not None:
                    # The kernel knows threads by number only. The thread that had the number when the target was
                    # named, and has it still, had it at every open between.
                    _check_same(target.task)
                if mode.delivery is not Delivery.HOLD:
                    for leg in legs:
                        leg.enable()
            except OSError as refusal:
                raise ArmError(refusal.errno or errno.EIO, cpu=cpu, tid=tid) from refusal
            undo.pop_all()
        return cls(legs, watch, mode.delivery)

    def stop(self) -> tuple[Batch, Totals]:
        for leg in self._legs:
            leg.disable()
        if not self._delivers_hits:
            return Batch(b"", 0, 0, False), self.totals()
        rest = self.drain(sys.maxsize)
        lost = rest.lost + sum(leg.newly_lost() for leg in self._legs)
        return Batch(rest.records, rest.hits, lost, False), self.totals()

    def totals(self) -> Totals:
        counts = [leg.counts() for leg in self._legs]
        return Totals(hits=sum(count.hits for count in counts), lost=sum(count.lost for count in counts))

    def descriptors(self) -> list[int]:
        fds = [leg.fd for leg in self._legs] if self._delivers_hits else []
        return fds if self._watch is None else [*fds, self._watch.fd]

    def drain(self, budget_bytes: int) -> Batch:
        if not self._delivers_hits:
            return Batch(b"", 0, 0, False)
        chunks: list[bytes] = []
        hits = lost = 0
        more = False
        left_bytes = budget_bytes
        round_ = self._legs[self._next_leg :] + self._legs[: self._next_leg]
        for waiting, leg in zip(range(len(round_), 0, -1), round_, strict=True):
            chunk = leg.take(left_bytes // waiting)
            left_bytes = max(0, left_bytes - len(chunk.records))
            hits += chunk.hits
            more = more or chunk.more
            if chunk.records:
                chunks.append(chunk.records)
            if chunk.loss_possible:
                lost += leg.newly_lost()
        self._next_leg = (self._next_leg + 1) % len(self._legs)
        return Batch(chunks[0] if len(chunks) == 1 else b"".join(chunks), hits, lost, more)

    def target_is_gone(self) -> bool:
        return self._watch is not None and self._watch.is_gone()

    def close(self) -> None:
        for leg in self._legs:
            leg.close()
        if self._watch is not None:
            self._watch.close()


def _cpus_of(target: Target) -> Sequence[int | None]:
    """The CPU of each leg; ``None`` for a leg that follows its thread. Raises ``ArmError`` for a CPU there is not."""
    if target.cpus is None:
        return cpus.online_cpus() if target.task is None else (None,)
    possible = cpus.possible_cpus()
    for cpu in target.cpus:
        # The kernel would say EINVAL, and ENODEV only for one that is offline.
        if cpu not in possible:
            raise ArmError(errno.ENODEV, cpu=cpu, tid=None if target.task is None else target.task.tid)
    return target.cpus


def _check_same(task: Task) -> None:
    try:
        if threads.find(task.tid) == task:
            return
    except TargetGone:
        pass
    raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
