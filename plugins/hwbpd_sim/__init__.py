"""The simulated machine: CPUs, tasks and memory accesses that exist in this process only."""

from __future__ import annotations

from collections.abc import Sequence

from hwbpd.hookspecs import MachineFactory, hookimpl
from hwbpd_sim.machine import make


@hookimpl
def hwbpd_machines() -> Sequence[MachineFactory]:
    return (MachineFactory(name="sim", real=False, make=make),)
