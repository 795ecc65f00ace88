"""
One strategy carried out: an event in, the world after it and the ordered actions out. Pure.

A trapped access is an exit and an entry, and its list of actions has both. What an edge does is in ``crossing.py``;
here is what happens between them: to the guest's registers, the vCPU's thread, the VMM's debugging, and the host.
"""

from __future__ import annotations

from hwbpd_kvm.actions import HOST_TRAP, TRAP, Action, Place
from hwbpd_kvm.crossing import Crossing
from hwbpd_kvm.registers import Layout
from hwbpd_kvm.scratch import System
from hwbpd_kvm.state import (
    ArmedBy,
    Cpu,
    DebugOff,
    DebugOn,
    Down,
    Enter,
    Event,
    Exit,
    GuestRead,
    GuestWrite,
    HostArm,
    HostDisarm,
    Load,
    OsLock,
    OtherVcpu,
    Put,
    Query,
    Up,
    Vcpu,
    Where,
    World,
)
from hwbpd_kvm.strategy import Horizon, HostKnown, Trigger


class NotNow(Exception):
    """The event cannot happen in this world: a guest that does not run accesses nothing."""


class Engine(System):
    """A strategy on a system of CPUs, ready to be stepped; made like ``System``."""

    def start(self, *, up: bool = True) -> World:
        """Return a world after a reset, the vCPU not loaded; with ``up`` False the hypervisor is yet to come."""
        host = list(self.reset)
        if self.widest.master_always:
            host[self.widest.position[self.widest.master]] = self.host_master
        values = tuple(host)
        # Whoever keeps the record has seen the boot, but for a hypervisor that was not there.
        record = values if up or self.strategy.host_known is not HostKnown.TRAPPED else self.reset
        cpu = Cpu(values, values, record)
        return World(Vcpu(self.reset, self.reset), (cpu,) * len(self.layouts), up)

    def step(self, world: World, event: Event) -> tuple[World, tuple[Action, ...]]:
        """
        Return the world after ``event``, and what was ordered.

        :raises NotNow: where it cannot happen: ``Load`` of a loaded vCPU; ``Put``, ``Query`` and ``Enter`` of one that
            is not loaded and out of the guest; ``Exit``, guest accesses and ``OsLock`` out of the guest; ``DebugOn``,
            ``DebugOff``, ``Up`` and ``Down`` while it runs or, the last two, is loaded; the host's arming on a CPU
            whose guest runs; another vCPU on a CPU that has ours loaded; anything of a vCPU while not up.
        """
        step = Step(self, world)
        step.take(event)
        return step.result(), tuple(step.actions)


class Step(Crossing):
    """One event under way."""

    def take(self, event: Event) -> None:  # noqa: PLR0912 -- one branch for each event
        """Let the event happen; what it may not meet is refused."""
        match event:
            case GuestRead(register):
                self.needs(self.where is Where.IN, event)
                self.access(register, None)
            case GuestWrite(register, value):
                self.needs(self.where is Where.IN, event)
                self.access(register, value)
            case Enter():
                self.needs(self.where is Where.LOADED, event)
                self.enter()
            case Exit():
                self.needs(self.where is Where.IN, event)
                self.exit()
            case Load(cpu):
                self.needs(self.where is Where.OUT and self.up, event)
                self.load(cpu)
            case Put():
                self.needs(self.where is Where.LOADED, event)
                self.put()
            case Query():
                self.needs(self.where is Where.LOADED, event)
                self.answer = self.host_enabled()
            case HostArm():
                self.needs(self.where is not Where.IN or self.cpu != event.cpu, event)
                self.host_sets(event.cpu, event.slot, event.by, event.address, event.control)
            case HostDisarm():
                self.needs(self.where is not Where.IN or self.cpu != event.cpu, event)
                self.host_sets(event.cpu, event.slot, event.by, None, None)
            case DebugOn(values):
                self.needs(self.where is not Where.IN and self.up, event)
                self.debug_on(values)
            case DebugOff():
                self.needs(self.where is not Where.IN and self.debugging, event)
                self.debug_off()
            case OsLock(locked):
                self.needs(self.where is Where.IN, event)
                self.os_lock(locked)
            case OtherVcpu(cpu, leftover):
                self.needs(self.cpu != cpu and self.up, event)
                self.other_vcpu(cpu, leftover)
            case Up():
                self.needs(not self.up, event)
                self.bring_up()
            case Down():
                self.needs(self.where is Where.OUT and self.up, event)
                self.tear_down()

    def needs(self, allowed: bool, event: Event) -> None:
        """Refuse what cannot happen."""
        if not allowed:
            raise NotNow(f"{event} while the vCPU is {self.where.value}" + ("" if self.up else ", and KVM is not up"))

    # --- the guest ----------------------------------------------------------------------------------------------------

    def access(self, register: str, value: int | None) -> None:
        """The guest reads (``value`` None) or writes a register: in the hardware, or with a trap."""
        place = self.position[register]
        if not self.traps:
            if value is not None and register in self.layout.position:
                self.of(self.cpu).hardware[place] = value
            return
        strategy = self.strategy
        self.actions.append(TRAP)
        self.exit()
        is_trigger = Trigger.ACCESSED in strategy.triggers or (
            Trigger.WRITTEN in strategy.triggers and value is not None
        )
        if is_trigger and not (self.debugging or self.os_locked):
            self.touched = True
        is_rerun = strategy.reruns and not (self.debugging or self.os_locked)
        if value is not None and not is_rerun:
            self.guest[place] = value
            self.note_enabled()
        self.enter()
        if value is not None and is_rerun:
            assert not self.traps, f"{strategy.name} runs an access again that would trap again"
            self.of(self.cpu).hardware[place] = value

    def note_enabled(self) -> None:
        """Keep the flag beside the registers, as whoever emulates a write does."""
        self.enabled = self.any_armed(self.guest)

    def os_lock(self, locked: bool) -> None:
        """OSLAR_EL1 is written: an exit, the vCPU put and loaded again, and an entry."""
        self.actions.append(TRAP)
        self.exit()
        self.os_locked = locked and self.strategy.os_lock
        if self.strategy.horizon is Horizon.PUT:
            self.touched = False
        self.enter()

    # --- the vCPU's thread and the VMM --------------------------------------------------------------------------------

    def load(self, cpu: int) -> None:
        """Put the vCPU on a CPU; what it left in another's hardware is fetched."""
        if self.resident not in {-1, cpu}:
            if self.strategy.leaves_remotely:
                self.leave()
            else:
                self.resident, self.loaded = -1, None
        self.cpu, self.layout, self.where = cpu, self.system.moved[cpu], Where.LOADED

    def put(self) -> None:
        """Take the vCPU from its CPU."""
        if self.strategy.horizon is Horizon.PUT:
            self.touched = False
        self.cpu, self.where = -1, Where.OUT

    def debug_on(self, values: tuple[tuple[str, int], ...]) -> None:
        """The VMM debugs: its set is selected from now on."""
        if self.resident != -1:
            self.leave()
        self.vmm = list(self.system.reset)
        for name, value in values:
            self.vmm[self.position[name]] = value
        self.debugging = True
        if self.strategy.debug_retraps:
            self.touched = False

    def debug_off(self) -> None:
        """The guest's own set is selected again."""
        self.debugging = False
        self.vmm = list(self.system.reset)
        self.note_enabled()

    def other_vcpu(self, cpu: int, leftover: int) -> None:
        """Another vCPU uses the CPU's registers, by the same strategy."""
        if self.resident == cpu:
            self.leave()
        here = self.of(cpu)
        hardware, host = here.hardware, here.host
        for slot in self.system.layouts[cpu].slots:
            if not host[self.position[slot.control]] & slot.enable:
                hardware[self.position[slot.address]] = leftover

    # --- the host -----------------------------------------------------------------------------------------------------

    def host_sets(self, cpu: int, number: int, by: ArmedBy, address: int | None, control: int | None) -> None:
        """The host arms or disarms (``address`` None) a slot: in its intention, the hardware, and the record."""
        layout, strategy = self.system.layouts[cpu], self.strategy
        here = self.of(cpu)
        hardware, host, record = here.hardware, here.host, here.record
        is_caught = strategy.host_known is HostKnown.TRAPPED and self.up
        changed = self.intend(host, layout, number, address, control)
        if is_caught:
            self.actions.append(HOST_TRAP)
        if is_caught or (by in strategy.host_told and strategy.host_known is not HostKnown.TRAPPED):
            for place in changed:
                record[place] = host[place]
        if is_caught and self.resident == cpu:
            self.leave()
        for place in changed:
            hardware[place] = host[place]

    def intend(
        self, host: list[int], layout: Layout, number: int, address: int | None, control: int | None
    ) -> list[int]:
        """Change what the host wants; return the positions of the registers it writes for that."""
        slot, reset = layout.slots[number], self.system.reset
        at_address, at_control = self.position[slot.address], self.position[slot.control]
        others = layout.enables[slot.control] & ~slot.enable
        if address is not None and control is not None:
            host[at_address] = address
            host[at_control] = control if not others else host[at_control] | control
        else:
            host[at_address] = reset[at_address]
            still = host[at_control] & ~slot.enable
            host[at_control] = still if still & others else reset[at_control]
        changed = [at_address, at_control]
        if layout.master and not layout.master_always:
            at_master = self.position[layout.master]
            armed = any(host[self.position[one.control]] & one.enable for one in layout.slots)
            host[at_master] = self.system.host_master if armed else reset[at_master]
            changed.append(at_master)
        return changed

    def bring_up(self) -> None:
        """The hypervisor comes: what the host has armed before is read, once, if anybody keeps a record below it."""
        self.up = True
        if self.strategy.host_known is HostKnown.TRAPPED and self.strategy.adopts:
            for cpu, layout in enumerate(self.system.layouts):
                self.read(cpu, layout.registers, Place.RECORD)

    def tear_down(self) -> None:
        """The hypervisor goes: nothing of a guest stays behind, and the host's accesses trap no more."""
        if self.resident != -1:
            if self.strategy.gives_back:
                self.leave()
            else:
                self.resident, self.loaded = -1, None
        self.up = False
