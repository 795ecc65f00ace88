"""
The host's machine and the VMMs' vCPUs as one machine: a resource on a vCPU is a line in its slot file, all others are
the host's.

So whoever arms, drains and disarms need not know which it is. A VMM never refuses at once, burns no fuse and has no
descriptor to poll: what it reports comes as a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hwbpd.core.model import Mode, Piece, Pool, Process, Target, Task, Totals, Vcpu
from hwbpd.hookspecs import Batch, CpuFacts, Foreign, Machine, TargetEnd, Topology
from hwbpd.slot_file import SlotFile


class Machines:
    """
    Methods are those of ``hwbpd.hookspecs.Machine``.

    :param files: the slot files of the vCPUs there are; whoever keeps them adds and removes.
    """

    def __init__(self, host: Machine, files: Mapping[Vcpu, SlotFile]) -> None:
        self._host = host
        self._files = files
        self._file_of: dict[int, SlotFile] = {}
        self.name = host.name
        self.facts = host.facts

    # --- what a vCPU has, too ----------------------------------------------------------------------------------------

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        if target.vcpu is None:
            self._host.arm(resource_id, piece, target, mode)
            return
        file = self._file_of[resource_id] = self._files[target.vcpu]
        file.put(resource_id, piece, mode)

    def disarm(self, resource_id: int) -> tuple[Batch, Totals]:
        file = self._file_of.pop(resource_id, None)
        return self._host.disarm(resource_id) if file is None else file.take_out(resource_id)

    def top_up(self, resource_id: int, hits: int) -> bool:
        return resource_id in self._file_of or self._host.top_up(resource_id, hits)

    def is_fused(self, resource_id: int) -> bool:
        return resource_id not in self._file_of and self._host.is_fused(resource_id)

    def silence(self, resource_id: int) -> None:
        file = self._file_of.get(resource_id)
        if file is None:
            self._host.silence(resource_id)
        else:
            file.arm(resource_id, False)

    def rearm(self, resource_id: int, fuse_hits: int) -> None:
        file = self._file_of.get(resource_id)
        if file is None:
            self._host.rearm(resource_id, fuse_hits)
        else:
            file.arm(resource_id, True)

    def totals(self, resource_id: int) -> Totals:
        file = self._file_of.get(resource_id)
        return self._host.totals(resource_id) if file is None else Totals(file.entries[resource_id].totals)

    def descriptors(self, resource_id: int) -> Sequence[int]:
        return () if resource_id in self._file_of else self._host.descriptors(resource_id)

    def drain(self, resource_id: int, budget_bytes: int) -> Batch:
        file = self._file_of.get(resource_id)
        return self._host.drain(resource_id, budget_bytes) if file is None else file.drain(resource_id)

    def end_of_target(self, resource_id: int) -> TargetEnd | None:
        return None if resource_id in self._file_of else self._host.end_of_target(resource_id)

    # --- the host's alone --------------------------------------------------------------------------------------------

    def cpu_facts(self, cpu: int) -> CpuFacts:
        return self._host.cpu_facts(cpu)

    def notes(self) -> Sequence[str]:
        return self._host.notes()

    def topology(self) -> Topology:
        return self._host.topology()

    def topology_descriptor(self) -> int | None:
        return self._host.topology_descriptor()

    def topology_changed(self) -> None:
        self._host.topology_changed()

    def task(self, tid: int) -> Task:
        return self._host.task(tid)

    def process(self, pid: int) -> Process:
        return self._host.process(pid)

    def threads(self, process: Process) -> Sequence[int]:
        return self._host.threads(process)

    def attend(self, resource_id: int, target: Target, mode: Mode) -> None:
        self._host.attend(resource_id, target, mode)

    def slots_outside(self, pool: Pool, target: Target) -> int | None:
        return self._host.slots_outside(pool, target)

    def drop_cpu(self, resource_id: int, cpu: int) -> None:
        self._host.drop_cpu(resource_id, cpu)

    def add_cpu(self, resource_id: int, cpu: int) -> None:
        self._host.add_cpu(resource_id, cpu)

    def foreign(self, pool: Pool, target: Target, cpu: int | None) -> Sequence[Foreign]:
        return self._host.foreign(pool, target, cpu)

    def close(self) -> None:
        self._host.close()
