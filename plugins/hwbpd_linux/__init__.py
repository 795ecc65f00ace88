"""The real machine: this Linux host's debug registers, through perf_event_open."""

from __future__ import annotations

from collections.abc import Sequence

from hwbpd.hookspecs import MachineFactory, hookimpl
from hwbpd_linux.machine import make


@hookimpl
def hwbpd_machines() -> Sequence[MachineFactory]:
    return (MachineFactory(name="linux", real=True, make=make),)
