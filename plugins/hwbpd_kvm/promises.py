"""
What no strategy may break, as sentences with a check each.

A value tells whose it is: its owner is in the high bits, where no register has any, and what arms something in the low
ones, as the layout says. So "the guest sees a value of the host" is a look at one number. Nothing here reads what a
strategy believes; it is judged by what the guest has written (``believed``), what the host wants (``Cpu.host``), what
the VMM has set, and the hardware.

What the search is about is who sees and meets whose values. That a written slot traps where it should is the register
models' affair.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

from hwbpd_kvm.actions import Place
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.registers import Layout
from hwbpd_kvm.state import Values, Where, World
from hwbpd_kvm.strategy import Small

OWNER_BIT = 40


class Owner(enum.IntEnum):
    """Whose a value is; zero, or the value after a reset, is nobody's."""

    NOBODY = 0
    HOST = 1
    GUEST = 2
    VMM = 3
    OTHER = 4  # another guest


def owned(owner: Owner, bits: int = 0) -> int:
    """Return a value of an owner, with bits that a register has."""
    return owner << OWNER_BIT | bits


def owner_of(value: int) -> Owner:
    """Return whose a value is."""
    return Owner(value >> OWNER_BIT)


class Promise(enum.Enum):
    """The sentences."""

    OWN_VALUES = "the guest sees no value of the host, the VMM or another guest"
    NO_WRITE_LOST = "no write of the guest is lost"
    HOST_QUIET = "no breakpoint of the host is in force in the guest"
    AS_ARMED = "in the guest is in force what it has armed, and while the VMM debugs what the VMM has armed"
    GUEST_QUIET = "no breakpoint of a guest or a VMM is in force in the host"
    HOST_RESTORED = "in the host is in force what the host has armed"
    STATUS_CLEAN = "the host's DR6 is clean"
    TRAPS_MATCH = "only a guest whose own registers are loaded is not trapped"
    DEBUG_TRAPS = "while the VMM debugs the guest traps (never WONT_EXIT together with guest debug)"


def live(layout: Layout, position: dict[str, int], values: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return the slots in force with their (control, address): armed, and the switch for all slots on."""
    if layout.master and not values[position[layout.master]] & layout.master_enable:
        return {}
    return {
        number: (values[position[slot.control]], values[position[slot.address]])
        for number, slot in enumerate(layout.slots)
        if values[position[slot.control]] & slot.enable
    }


def guest_view(engine: Engine, world: World) -> Values:
    """Return what the guest would read, register by register."""
    vcpu = world.vcpu
    if vcpu.where is Where.IN:
        if vcpu.traps:
            return vcpu.guest
        cpu, apart = vcpu.cpu, frozenset[str]()
    elif vcpu.resident != -1:
        # What the exit has taken out by itself, or has switched off, is in memory.
        layout = engine.layouts[vcpu.resident]
        small = layout.small if engine.strategy.small is Small.QUIET else ()
        cpu, apart = vcpu.resident, layout.by_hardware | frozenset(small)
    else:
        return vcpu.guest
    names, hardware = engine.layouts[cpu].position, world.cpus[cpu].hardware
    return tuple(
        hardware[place] if name in names and name not in apart else vcpu.guest[place]
        for place, name in enumerate(engine.widest.registers)
    )


def broken(engine: Engine, world: World, believed: Values) -> Iterator[Promise]:
    """
    Yield the promises that this world breaks.

    :param believed: what the guest has last written to each register.
    """
    vcpu = world.vcpu
    seen = guest_view(engine, world)
    if any(owner_of(value) not in {Owner.NOBODY, Owner.GUEST} for value in seen):
        yield Promise.OWN_VALUES
    if seen != believed:
        yield Promise.NO_WRITE_LOST
    if vcpu.where is Where.IN:
        yield from _broken_in_guest(engine, world, believed)
    for cpu in range(len(world.cpus)):
        if vcpu.where is not Where.IN or vcpu.cpu != cpu:
            yield from _broken_in_host(engine, world, cpu)


def _broken_in_guest(engine: Engine, world: World, believed: Values) -> Iterator[Promise]:
    vcpu, position = world.vcpu, engine.widest.position
    layout = engine.layouts[vcpu.cpu]
    in_force = live(layout, position, world.cpus[vcpu.cpu].hardware)
    if any(owner_of(value) is Owner.HOST for slot in in_force.values() for value in slot):
        yield Promise.HOST_QUIET
    if vcpu.debugging:
        wanted = live(engine.widest, position, vcpu.vmm)
    else:
        wanted = {} if vcpu.os_locked else live(engine.widest, position, believed)
    others = {number: slot for number, slot in in_force.items() if owner_of(slot[0]) is not Owner.HOST}
    if others != wanted:
        yield Promise.AS_ARMED
    if not vcpu.traps and vcpu.loaded is not Place.GUEST:
        yield Promise.TRAPS_MATCH
    if not vcpu.traps and vcpu.debugging:
        yield Promise.DEBUG_TRAPS


def _broken_in_host(engine: Engine, world: World, number: int) -> Iterator[Promise]:
    cpu, layout, position = world.cpus[number], engine.layouts[number], engine.widest.position
    in_force, wanted = live(layout, position, cpu.hardware), live(layout, position, cpu.host)
    if any(owner_of(control) is not Owner.HOST for control, _ in in_force.values()):
        yield Promise.GUEST_QUIET
    if wanted != {slot: values for slot, values in in_force.items() if owner_of(values[0]) is Owner.HOST}:
        yield Promise.HOST_RESTORED
    if layout.status and cpu.hardware[position[layout.status]] != layout.resets[layout.status]:
        yield Promise.STATUS_CLEAN
