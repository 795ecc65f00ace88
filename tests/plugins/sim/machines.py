"""CPUs for simulated worlds: those of a profile, and some that only have slots."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from hwbpd.core.model import Piece, Pool
from hwbpd.debug_unit import Armed, Executed, MemoryAccess, RegisterFile, Slot, Trap, Write
from hwbpd.hookspecs import Backend, CpuFacts
from hwbpd.plugins import Plugins
from hwbpd_sim.cpus import Kind, kind_of
from hwbpd_sim.profiles import parse

PLUGINS = Plugins()
_KINDS: dict[CpuFacts, Kind] = {}


def kinds(profile: str) -> list[Kind]:
    """Return the CPUs of a profile; equal ones are one kind, in every test."""
    cpus = parse(profile, PLUGINS.profiles)
    for cpu in cpus:
        if cpu.facts not in _KINDS:
            _KINDS[cpu.facts] = kind_of(cpu.facts, PLUGINS.backend(cpu.facts))
    return [_KINDS[cpu.facts] for cpu in cpus]


def x86(cpus: int = 2) -> list[Kind]:
    return kinds(f"x86-64x{cpus}")


def backend_of(kind: Kind) -> Backend:
    return PLUGINS.backend(kind.facts)


class Bare:
    """A debug unit and its handling where nothing is ever armed: slots that are only held."""

    def __init__(self, slots: Mapping[Pool, int]) -> None:
        self._slots = slots

    def slots(self) -> Mapping[Pool, int]:
        return self._slots

    def reset(self) -> RegisterFile:
        return {}

    def write(self, file: RegisterFile, register: str, value: int) -> RegisterFile:
        raise ValueError(f"there is no {register}")

    def plan(self, file: RegisterFile, wanted: Mapping[Slot, Armed]) -> Sequence[Write]:
        raise AssertionError("something is armed")

    def check(self, file: RegisterFile, accesses: Sequence[MemoryAccess]) -> Trap | None:
        raise AssertionError("something is asked for")

    def refusal(self, piece: Piece, *, kernel: bool, of_task: bool) -> int:
        return 0

    def armed(self, piece: Piece) -> Armed:
        raise AssertionError("something is armed")

    def execute(
        self, file: RegisterFile, accesses: Sequence[MemoryAccess], stepping: Mapping[Slot, Hashable]
    ) -> Executed:
        raise AssertionError("something is asked for")

    def step_on(self, file: RegisterFile, slot: Slot, remembered: Hashable) -> Executed:
        raise AssertionError("something is stepped past")


def bare(slots: Mapping[Pool, int]) -> Kind:
    """Return a CPU of which only the numbers of slots matter."""
    cpu = Bare(slots)
    return Kind(cpu, cpu, CpuFacts("bare"))
