"""
The simulated world as a machine of the daemon: descriptors that become readable, and time that passes.

Each resource has one descriptor, an eventfd that is readable while there is something to drain or its target is gone.
The built-in workload is driven by a thread, in real time; the daemon's own thread arms and drains, and a third one
looks for outsiders. So every touch of the world is under one lock, which nobody holds for more than a few steps.

A machine that stood still, or was too slow, does not catch up with more than a second.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from hwbpd.core.model import Mode, Piece, Pool, Process, Target, Task, Totals
from hwbpd.hookspecs import ArmError, Backend, Batch, CpuFacts, Foreign, TargetEnd, Topology
from hwbpd_sim import workload
from hwbpd_sim.cpus import Cpu, kind_of
from hwbpd_sim.profiles import Named, least, parse, told
from hwbpd_sim.workload import NS_PER_S, Workload
from hwbpd_sim.world import World

FACTS: Final = CpuFacts("x86_64")  # of CPUs for which no name is given
GENERIC: Final = "x86-64"
CPUS_SHOWN: Final = 8  # with their registers
TICK_S: Final = 0.01  # the workload's steps are made in batches of so much time,
STEPS_MAX: Final = 64  # of which nobody has to wait for more than so many
LOOK_LIMIT_S: Final = 10.0  # for how long a look that is told to be late is late


def make(options: Mapping[str, Any]) -> SimMachine:
    """
    Return a simulated machine with its built-in workload.

    :param options: ``cpus``, ``profile``, ``seed``, ``processes``, ``threads``, ``accesses_per_s`` and
        ``outsider_slots`` as etc/hwbpd.toml explains them; ``backend`` and ``profiles`` as hookspecs.py does.
    :raises NotSupported: for CPUs that there are not, or that cannot be together.
    """
    make_backend: Callable[[CpuFacts], Backend] = options["backend"]
    profile: str = options["profile"]
    cpus = parse(profile, options["profiles"]) if profile else [Named(GENERIC, FACTS)] * options["cpus"]
    kinds = {facts: kind_of(facts, make_backend(facts)) for facts in dict.fromkeys(cpu.facts for cpu in cpus)}
    world = World([kinds[cpu.facts] for cpu in cpus])
    amounts = {
        "processes": options["processes"],
        "threads": options["threads"],
        "steps_per_s": options["accesses_per_s"],
    }
    load = Workload(world, seed=options["seed"], start_ns=time.monotonic_ns(), **amounts)
    load.hold_outside(options["outsider_slots"])
    common = make_backend(least(kinds))
    notes = [f"its CPUs: {told(cpus)}", *workload.notes(common, **amounts)]
    machine = SimMachine(world, notes)
    if load.next_ns is not None:
        machine.drive(load)
    return machine


class SimMachine:
    """Keeps ``hwbpd.hookspecs.Machine``. ``looks_may_end`` is set; cleared, it makes looks for outsiders late."""

    name = "sim"

    def __init__(self, world: World, notes: Sequence[str] = ()) -> None:
        self._world = world
        self.facts = least(cpu.kind.facts for cpu in world.cpus)
        self._notes = ("SIMULATED: no access of this host is seen (docs/simulator.md)", *notes)
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}
        self._readable: set[int] = set()  # resources whose descriptor is
        self._topology_fd = -1  # made for whoever asks for it
        self._stop = threading.Event()
        self._driver: threading.Thread | None = None
        self.looks_may_end = threading.Event()
        self.looks_may_end.set()

    def cpu_facts(self, cpu: int) -> CpuFacts:
        """As ``Machine.cpu_facts``."""
        return self._world.cpus[cpu].kind.facts

    @contextlib.contextmanager
    def world(self) -> Iterator[World]:
        """The world to oneself, to make something happen in it; what came of it is then announced."""
        with self._lock:
            yield self._world
            self._announce()

    def drive(self, load: Workload) -> None:
        """Let a workload's time pass from now on, until ``close``."""
        self._driver = threading.Thread(target=self._drive, args=(load,), name="simulated workload", daemon=True)
        self._driver.start()

    def notes(self) -> Sequence[str]:
        """As ``Machine.notes``: with the registers of the CPUs that have something armed, as they are now."""
        with self._lock:
            armed = [number for number, cpu in enumerate(self._world.cpus) if cpu.legs]
            shown = [_registers(number, self._world.cpus[number]) for number in armed[:CPUS_SHOWN]]
        more = [f"and {len(armed) - CPUS_SHOWN} more CPUs"] if len(armed) > CPUS_SHOWN else []
        return (*self._notes, *shown, *more)

    def topology(self) -> Topology:
        with self._lock:
            return Topology(self._world.possible, self._world.online)

    def topology_descriptor(self) -> int | None:
        if self._topology_fd < 0:
            self._topology_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._topology_fd

    def topology_changed(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._topology_fd)

    def task(self, tid: int) -> Task:
        with self._lock:
            return self._world.task(tid)

    def process(self, pid: int) -> Process:
        with self._lock:
            return self._world.process(pid)

    def threads(self, process: Process) -> Sequence[int]:
        with self._lock:
            return self._world.threads(process)

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        with self._lock:
            self._world.arm(resource_id, piece, target, mode)
            self._describe(resource_id)

    def attend(self, resource_id: int, target: Target, mode: Mode) -> None:
        """As ``Machine.attend``. The mode does not matter: an exec takes a tracer's slots in every one."""
        with self._lock:
            self._world.attend(resource_id, target)
            self._describe(resource_id)

    def slots_outside(self, pool: Pool, target: Target) -> int | None:
        with self._lock:
            return self._world.slots_outside(pool, target)

    def disarm(self, resource_id: int) -> tuple[Batch, Totals]:
        with self._lock:
            os.close(self._descriptors.pop(resource_id))
            self._readable.discard(resource_id)
            return self._world.disarm(resource_id)

    def top_up(self, resource_id: int, hits: int) -> bool:
        with self._lock:
            return self._world.top_up(resource_id, hits)

    def is_fused(self, resource_id: int) -> bool:
        with self._lock:
            return self._world.armed(resource_id).is_fused

    def silence(self, resource_id: int) -> None:
        with self._lock:
            self._world.silence(resource_id)

    def rearm(self, resource_id: int, fuse_hits: int) -> None:
        with self._lock:
            self._world.rearm(resource_id, fuse_hits)

    def drop_cpu(self, resource_id: int, cpu: int) -> None:
        with self._lock:
            self._world.drop_cpu(resource_id, cpu)

    def add_cpu(self, resource_id: int, cpu: int) -> None:
        with self._lock:
            self._world.add_cpu(resource_id, cpu)

    def totals(self, resource_id: int) -> Totals:
        with self._lock:
            armed = self._world.armed(resource_id)
            return Totals(armed.hits, armed.lost)

    def descriptors(self, resource_id: int) -> Sequence[int]:
        return (self._descriptors[resource_id],)

    def drain(self, resource_id: int, budget_bytes: int) -> Batch:
        with self._lock:
            armed = self._world.armed(resource_id)
            batch = armed.drain(budget_bytes)
            if resource_id in self._readable and not armed.has_news:
                self._readable.remove(resource_id)
                os.eventfd_read(self._descriptors[resource_id])
            return batch

    def end_of_target(self, resource_id: int) -> TargetEnd | None:
        with self._lock:
            return self._world.armed(resource_id).end

    def foreign(self, pool: Pool, target: Target, cpu: int | None) -> Sequence[Foreign]:
        self.looks_may_end.wait(LOOK_LIMIT_S)
        with self._lock:
            return self._world.foreign(pool, target, cpu)

    def close(self) -> None:
        self._stop.set()
        if self._driver is not None:
            self._driver.join()
            self._driver = None
        for resource_id in list(self._descriptors):
            self.disarm(resource_id)
        if self._topology_fd >= 0:
            os.close(self._topology_fd)
            self._topology_fd = -1

    def _describe(self, resource_id: int) -> None:
        """Give a new resource its descriptor, or give it back; raises ``ArmError``."""
        try:
            self._descriptors[resource_id] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as refusal:
            self._world.disarm(resource_id)
            raise ArmError(refusal.errno or errno.EMFILE) from refusal

    def _announce(self) -> None:
        world = self._world
        for resource_id in world.news:
            if resource_id not in self._readable:
                self._readable.add(resource_id)
                os.eventfd_write(self._descriptors[resource_id], 1)
        world.news.clear()
        if world.cpus_changed:
            world.cpus_changed = False
            if self._topology_fd >= 0:
                os.eventfd_write(self._topology_fd, 1)

    def _drive(self, load: Workload) -> None:
        while (due_ns := load.next_ns) is not None:
            wait_s = max(TICK_S, (due_ns - time.monotonic_ns()) / NS_PER_S)
            if self._stop.wait(wait_s):
                return
            now_ns = time.monotonic_ns()
            load.skip_until(now_ns - NS_PER_S)
            while load.next_ns is not None and load.next_ns <= now_ns and not self._stop.is_set():
                with self.world():
                    load.run_until(now_ns, STEPS_MAX)


def _registers(number: int, cpu: Cpu) -> str:
    """Those registers of a CPU that are not as after a reset, for people."""
    reset = cpu.kind.after_reset.file
    changed = " ".join(f"{name}={value:#x}" for name, value in cpu.file.items() if value != reset[name])
    running = "whoever comes" if cpu.running is None else f"tid {cpu.running.tid}"
    stepping = "".join(f"; being stepped past: {pool} {slot}" for (pool, slot), _ in cpu.stepping)
    return f"registers of cpu {number}, running {running}: {changed}{stepping}"
