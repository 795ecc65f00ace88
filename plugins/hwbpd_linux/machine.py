"""
The Linux host as a machine: resources become perf events, all their legs or none.

Order is what is decided here and in the two files that arm:

- to arm: every leg is opened disabled and gets its ring, then a thread is looked at once more, then all are enabled.
  Nobody reports before every slot is held, and no hit falls between a slot and its ring;
- to disarm: every leg is stopped, its ring is emptied, its counts are read, and only then it is closed. So the hits
  handed over and the hits lost add up to the hits the kernel counted.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from hwbpd.core.errors import NotSupported
from hwbpd.core.model import Delivery, Mode, Piece, Pool, Process, Target, Task, Totals
from hwbpd.hookspecs import Batch, CpuFacts, Foreign, TargetEnd, Topology
from hwbpd_linux import cpus, readiness, registers, threads
from hwbpd_linux.attended import Attended
from hwbpd_linux.fixed_legs import FixedLegs
from hwbpd_linux.foreign import OtherPool, find
from hwbpd_linux.hotplug import Hotplug
from hwbpd_linux.occupancy import Counter, Place
from hwbpd_linux.perf_event import PAGE_BYTES
from hwbpd_linux.process_legs import ProcessLegs
from hwbpd_linux.watch import Post

_THREADS_LOOKED_AT: Final = 8
_PROBE_S: Final = 0.1


def make(settings: Mapping[str, Any]) -> LinuxMachine:
    """
    Return this host as a machine. It needs no settings.

    The limit of open files is raised as far as this process may: a process with many threads takes many descriptors.

    :raises NotSupported: when breakpoints do not work here; the sentence says what is missing and how to get it.
    """
    missing = readiness.what_is_missing()
    if missing is not None:
        raise NotSupported(missing)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return LinuxMachine()


class LinuxMachine:
    """Keeps ``hwbpd.hookspecs.Machine``."""

    name = "linux"

    def __init__(self) -> None:
        self.facts, self._slots = registers.look(os.uname().machine, cpus.cpu_features())
        self._held: dict[int, FixedLegs | ProcessLegs | Attended] = {}
        self._post = Post()
        self._closed = False
        self._hotplug: Hotplug | None = None
        with contextlib.suppress(OSError):
            self._hotplug = Hotplug()

    def cpu_facts(self, cpu: int) -> CpuFacts:
        """As ``Machine.cpu_facts``: the kernel counts with the least that any CPU has, and tells no more of one."""
        return self.facts

    def notes(self) -> Sequence[str]:
        if self._slots:
            return ()
        return ("ptrace is refused here, and only it tells how many registers the CPUs have: the least is assumed",)

    def topology(self) -> Topology:
        return Topology(possible=cpus.possible_cpus(), online=cpus.online_cpus())

    def topology_descriptor(self) -> int | None:
        """As ``Machine.topology_descriptor``. Other devices make it readable too; ``topology`` says what is so."""
        return None if self._hotplug is None else self._hotplug.fd

    def topology_changed(self) -> None:
        if self._hotplug is not None:
            self._hotplug.read_empty()

    def task(self, tid: int) -> Task:
        return threads.find(tid)

    def process(self, pid: int) -> Process:
        return threads.find_process(pid)

    def threads(self, process: Process) -> Sequence[int]:
        return threads.tids(process)

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        """
        As ``Machine.arm``. A leg is refused with ENODEV for a CPU that does not exist or is offline, with ESRCH for a
        thread or process that has exited or is another one than ``target`` says, and with EAGAIN for a process that
        makes threads faster than they can be followed.
        """
        assert resource_id not in self._held, f"resource {resource_id} is armed already"
        if mode.delivery is Delivery.HITS:
            pages = mode.ring_bytes / PAGE_BYTES
            assert pages in (2**power for power in range(32)), f"no ring can have {mode.ring_bytes} bytes"
        if target.process is None:
            self._held[resource_id] = FixedLegs(piece, target, mode, self._post)
        else:
            self._held[resource_id] = ProcessLegs(piece, target.process, mode, self._post, self._legs_on)

    def attend(self, resource_id: int, target: Target, mode: Mode) -> None:
        """As ``Machine.attend``. The mode does not matter: an exec takes a tracer's slots in every one."""
        assert resource_id not in self._held, f"resource {resource_id} is armed already"
        assert target.task is not None, "only threads have tracers"
        self._held[resource_id] = Attended(target.task, self._post)

    def slots_outside(self, pool: Pool, target: Target) -> int | None:
        """
        As ``Machine.slots_outside``: those that follow the thread everywhere, as a tracer's do.

        Each costs a few microseconds on every CPU; where there are none, on one CPU only.
        """
        slots = self._slots.get(pool)
        task = target.task
        if slots is None or task is None or not threads.is_alive(task.tid, task.start_ticks):
            return None
        counter = Counter(slots, pool, self._places(pool).values(), time.monotonic() + _PROBE_S)
        return counter.following(cpus.online_cpus(), task.tid)

    def top_up(self, resource_id: int, hits: int) -> bool:
        return self._held[resource_id].top_up(hits)

    def is_fused(self, resource_id: int) -> bool:
        return self._held[resource_id].is_fused

    def silence(self, resource_id: int) -> None:
        self._held[resource_id].silence()

    def rearm(self, resource_id: int, fuse_hits: int) -> None:
        """As ``Machine.rearm``. A fused resource has other descriptors afterwards."""
        self._held[resource_id].rearm(fuse_hits)

    def drop_cpu(self, resource_id: int, cpu: int) -> None:
        """As ``Machine.drop_cpu``. Its descriptor is closed; the legs of a process stay, as they belong to threads."""
        self._held[resource_id].drop_cpu(cpu)

    def add_cpu(self, resource_id: int, cpu: int) -> None:
        """As ``Machine.add_cpu``. The resource may have one more descriptor afterwards."""
        self._held[resource_id].add_cpu(cpu)

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
        new, so drain until ``more`` is false before waiting again. When the target has ended, they hang up or stay
        readable, and go on saying so.
        """
        return self._held[resource_id].descriptors()

    def drain(self, resource_id: int, budget_bytes: int) -> Batch:
        return self._held[resource_id].drain(budget_bytes)

    def end_of_target(self, resource_id: int) -> TargetEnd | None:
        return self._held[resource_id].end_of_target()

    def foreign(self, pool: Pool, target: Target, cpu: int | None) -> Sequence[Foreign]:
        """
        As ``Machine.foreign``. Of a process, its first threads are looked at.

        Other threads may arm and disarm meanwhile; what changes while it is looked at is not attributed to anybody.
        """
        slots = self._slots.get(pool)
        if slots is None:
            return ()  # without the number of all, what is missing cannot be counted
        ours = self._places(pool)
        others = [OtherPool(name, count, self._places(name)) for name, count in self._slots.items() if name is not pool]
        tids: Sequence[int | None] = (None if target.task is None else target.task.tid,)
        if target.process is not None:
            tids = threads.tids(target.process)[:_THREADS_LOOKED_AT]
        everywhere = cpus.possible_cpus()
        found = [one for tid in tids for one in find(slots, ours, everywhere, tid, cpu, pool, *others)]
        return [Foreign(one.pid, one.comm, one.uid, one.slots, one.place, one.evidence) for one in dict.fromkeys(found)]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        while self._held:
            self._held.popitem()[1].close()
        self._post.close()
        if self._hotplug is not None:
            self._hotplug.close()

    def _places(self, pool: Pool) -> dict[int, Place]:
        """Where this machine has slots of a pool, by descriptor; it may be called in any thread."""
        ours: dict[int, Place] = {}
        for held in list(self._held.values()):
            # Descriptors below zero stand for inherited slots, and are numbered anew.
            low = min(0, *ours) if ours else 0
            ours |= {fd if fd >= 0 else low + fd: place for fd, place in held.places(pool).items()}
        return ours

    def _legs_on(self, tid: int, cpu: int) -> int:
        return sum(held.legs_on(tid, cpu) for held in self._held.values())
