"""
A world while one step changes it: every action is performed as it is ordered.

The caller's world stays as it was. Of each CPU a copy is made when the step first touches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from hwbpd_kvm.actions import Action, Kind, Place
from hwbpd_kvm.registers import Layout, most
from hwbpd_kvm.state import Cpu, Values, Vcpu, World
from hwbpd_kvm.strategy import Strategy


class System:
    """
    A strategy on a system of CPUs, and what follows from them alone.

    :param layouts: one for each CPU.
    :param host_master: what the host writes to the register with the switch for all slots, while it needs it.
    :raises ValueError: where the CPUs' registers do not go together.
    """

    def __init__(self, strategy: Strategy, layouts: Sequence[Layout], host_master: int | None = None) -> None:
        self.strategy = strategy
        self.layouts = tuple(layouts)
        self.widest = most(self.layouts)
        narrowest = min(self.layouts, key=lambda layout: len(layout.registers))
        self.moved = (narrowest,) * len(self.layouts) if strategy.moves_least else self.layouts
        self.host_master = self.widest.master_enable if host_master is None else host_master
        self.reset: Values = tuple(self.widest.resets[name] for name in self.widest.registers)
        self.orders = _orders(self.widest.registers)


@cache  # engines come by the hundred where strategies are compared, for a handful of layouts
def _orders(registers: tuple[str, ...]) -> Mapping[tuple[Kind, str, Place], Action]:
    """Return every read and write that can be ordered, so that a step makes none."""
    return {
        (kind, name, place): Action(kind, name, place)
        for kind in (Kind.READ, Kind.WRITE)
        for name in registers
        for place in Place
    }


class Registers:
    """The registers of one CPU in a step: those of ``state.Cpu``, as lists."""

    __slots__ = ("hardware", "host", "record", "saved")

    def __init__(self, cpu: Cpu) -> None:
        self.hardware, self.host, self.record = list(cpu.hardware), list(cpu.host), list(cpu.record)
        self.saved = None if cpu.saved is None else list(cpu.saved)

    def result(self) -> Cpu:
        """Return the registers as a value."""
        saved = None if self.saved is None else tuple(self.saved)
        return Cpu(tuple(self.hardware), tuple(self.host), tuple(self.record), saved)


class Scratch:
    """A world under change; the fields are those of ``state.Vcpu``."""

    def __init__(self, system: System, world: World) -> None:
        self.system = system
        self.strategy = system.strategy
        self.actions: list[Action] = []
        self.up = world.up
        self._before = world.cpus
        self._touched: dict[int, Registers] = {}
        vcpu = world.vcpu
        self.guest, self.vmm = list(vcpu.guest), list(vcpu.vmm)
        self.debugging, self.os_locked, self.where, self.cpu = vcpu.debugging, vcpu.os_locked, vcpu.where, vcpu.cpu
        self.traps, self.touched, self.enabled = vcpu.traps, vcpu.touched, vcpu.enabled
        self.loaded, self.resident, self.aside, self.answer = vcpu.loaded, vcpu.resident, vcpu.aside, vcpu.answer
        self.layout = system.moved[max(self.cpu, 0)]
        self.position = system.widest.position

    def of(self, cpu: int) -> Registers:
        """Return the registers of a CPU, to be changed."""
        if cpu not in self._touched:
            self._touched[cpu] = Registers(self._before[cpu])
        return self._touched[cpu]

    def result(self) -> World:
        """Return the world as it is now."""
        vcpu = Vcpu(
            tuple(self.guest), tuple(self.vmm), self.debugging, self.os_locked, self.where, self.cpu, self.traps,
            self.touched, self.enabled, self.loaded, self.resident, self.aside, self.answer,
        )  # fmt: skip
        cpus = list(self._before)
        for number, registers in self._touched.items():
            cpus[number] = registers.result()
        return World(vcpu, tuple(cpus), self.up)

    def read(self, cpu: int, names: Iterable[str], into: Place) -> None:
        """Read registers of a CPU into a set."""
        here = self.of(cpu)
        hardware = here.hardware
        for name in names:
            self.actions.append(self.system.orders[Kind.READ, name, into])
            place = self.position[name]
            match into:
                case Place.GUEST:
                    self.guest[place] = hardware[place]
                case Place.VMM:
                    self.vmm[place] = hardware[place]
                case Place.HOST:
                    here.saved = here.saved or list(self.system.reset)
                    here.saved[place] = hardware[place]
                case Place.RECORD:
                    here.record[place] = hardware[place]
                case _:
                    pass

    def write(self, cpu: int, names: Iterable[str], source: Place) -> None:
        """Write registers of a CPU from a set, or with a constant."""
        here = self.of(cpu)
        hardware, record = here.hardware, here.record
        for name in names:
            self.actions.append(self.system.orders[Kind.WRITE, name, source])
            place = self.position[name]
            match source:
                case Place.GUEST:
                    hardware[place] = self.guest[place]
                case Place.VMM:
                    hardware[place] = self.vmm[place]
                case Place.HOST:
                    hardware[place] = (here.saved or self.system.reset)[place]
                case Place.RECORD:
                    hardware[place] = record[place]
                case Place.RESET:
                    hardware[place] = self.system.reset[place]
                case Place.DISARMED:
                    hardware[place] &= ~self.layout.enables[name]
                case _:
                    raise AssertionError(f"nothing can be written from {source}")
