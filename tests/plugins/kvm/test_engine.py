"""
The engine: pure, and its actions are all there is to it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, MutableMapping

import pytest

from hwbpd_kvm.actions import Hardware, Kind, Place
from hwbpd_kvm.engine import Engine, NotNow
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.registers import Layout, arm64, arm_v7, x86
from hwbpd_kvm.state import (
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
    Put,
    Query,
    Up,
    Values,
    World,
)
from tests.plugins.kvm.steps import Steps

LAYOUTS: dict[str, list[Layout]] = {
    "armv7": [arm_v7(3, 2), arm_v7(2, 1)],
    "arm64": [arm64(3, 2), arm64(2, 2)],
    "x86": [x86(), x86()],
}
STEPS = 60


def some_events(draw: random.Random, layouts: list[Layout]) -> Iterator[Event]:
    """Yield events at random, whether they can happen or not."""
    registers = layouts[0].registers
    while True:
        slot, cpu = draw.choice(layouts[-1].slots), draw.randrange(2)
        number = layouts[-1].slots.index(slot)
        yield draw.choice(
            (
                Enter(), Enter(), Exit(), Load(cpu), Put(), Query(), DebugOff(),
                GuestRead(draw.choice(registers)),
                GuestWrite(draw.choice(registers), draw.getrandbits(16)),
                DebugOn(((slot.address, draw.getrandbits(16)), (slot.control, slot.enable))),
                HostArm(cpu, number, draw.getrandbits(16), slot.enable),
                HostDisarm(cpu, number),
            )
        )  # fmt: skip


def sets_of(engine: Engine, world: World, cpu: int) -> dict[Place, MutableMapping[str, int]]:
    """The sets in memory as dictionaries."""

    def named(values: Values | None) -> dict[str, int]:
        return dict(zip(engine.widest.registers, values or engine.reset, strict=True))

    vcpu, here = world.vcpu, world.cpus[cpu]
    return {
        Place.GUEST: named(vcpu.guest),
        Place.VMM: named(vcpu.vmm),
        Place.HOST: named(here.saved),
        Place.RECORD: named(here.record),
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_the_actions_alone_lead_to_the_hardware(preset: str) -> None:
    # Given a random history, of which each entry and exit is also carried out by hand,
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    strategy = PRESETS[preset]
    engine = Engine(strategy, LAYOUTS[strategy.architecture])
    world, carried_out = engine.start(), 0
    for event in some_events(draw, LAYOUTS[strategy.architecture]):
        try:
            after, actions = engine.step(world, event)
        except NotNow:
            continue
        if isinstance(event, Enter | Exit):
            cpu = world.vcpu.cpu
            by_hand = Hardware(
                dict(zip(engine.widest.registers, world.cpus[cpu].hardware, strict=True)),
                sets_of(engine, world, cpu),
                engine.widest.resets,
                engine.widest.enables,
                world.vcpu.traps,
            )

            # when the actions are performed in order,
            by_hand.perform(action for action in actions if action.register != "ID_AA64DFR0_EL1")

            # then the hardware, the sets and the traps are what the engine says, but for what the CPU does by itself.
            itself = engine.widest.by_hardware
            expected = dict(zip(engine.widest.registers, after.cpus[cpu].hardware, strict=True))
            guests = sets_of(engine, after, cpu)[Place.GUEST]
            told = f"seed {seed}: {event}, {[str(action) for action in actions]}"
            for name in set(expected) - itself:
                assert by_hand.registers[name] == expected[name], f"{name}, {told}"
                assert by_hand.sets[Place.GUEST][name] == guests[name], f"{name}, {told}"
            assert by_hand.traps is after.vcpu.traps, told
            carried_out += 1
        world = after
        if carried_out >= STEPS:
            return


def test_a_step_changes_nothing_but_what_it_returns() -> None:
    steps = Steps("always")
    before = steps.world

    after, _ = steps.engine.step(before, Enter())
    again, _ = steps.engine.step(before, Enter())

    assert before == steps.world != after
    assert after == again


@pytest.mark.parametrize(
    ("events", "event"),
    [
        ((), Put()),
        ((), Enter()),
        ((), GuestRead("DR0")),
        ((), DebugOff()),
        ((), Up()),
        ((Load(0),), Load(1)),
        ((Load(0),), Exit()),
        ((Load(0),), Down()),
        ((Load(0), Enter()), Put()),
        ((Load(0), Enter()), DebugOn(())),
        ((Load(0), Enter()), HostArm(0, 0, 0x1000, 3)),
        ((Down(),), Load(0)),
    ],
    ids=str,
)
def test_what_cannot_happen_is_refused(events: tuple[Event, ...], event: Event) -> None:
    steps = Steps("x86-wont-exit", loaded=False)
    steps.do(*events)

    with pytest.raises(NotNow):
        steps.do(event)


def test_a_host_that_arms_on_another_cpu_does_not_disturb_the_guest() -> None:
    steps = Steps("x86-wont-exit")
    steps.do(Enter(), HostArm(1, 0, 0x1000, 3))

    assert steps.hardware("DR0", cpu=1) == 0x1000
    assert steps.hardware("DR0", cpu=0) == 0


def test_registers_that_a_cpu_lacks_stay_in_memory() -> None:
    # Given a guest that has used a slot which only the first CPU has,
    steps = Steps("always", [arm_v7(6, 4), arm_v7(4, 2)])
    steps.do(Enter(), GuestWrite("DBGBVR5", 0x8000), Exit(), Put())

    # when it runs on the other,
    steps.do(Load(1))
    steps.do(Enter())

    # then the counts of that CPU are moved, and the value is still there when it comes back.
    assert steps.counts() == {Kind.READ: 13, Kind.WRITE: 13}
    steps.do(Exit(), Put(), Load(0), Enter())
    assert steps.hardware("DBGBVR5") == 0x8000
