"""
A strategy driven step by step, for tests that tell a story.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hwbpd_kvm.actions import Action, Kind, Place
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.presets import PRESETS, USUAL
from hwbpd_kvm.registers import Layout
from hwbpd_kvm.state import Enter, Event, HostArm, Load, World


class Steps:
    """A strategy on two CPUs, loaded on the first; ``actions`` is what the last event ordered."""

    def __init__(self, preset: str, layouts: Sequence[Layout] = (), *, loaded: bool = True, up: bool = True) -> None:
        strategy = PRESETS[preset]
        self.engine = Engine(strategy, layouts or [USUAL[strategy.architecture]] * 2)
        self.layout = self.engine.layouts[0]
        self.world: World = self.engine.start(up=up)
        self.actions: tuple[Action, ...] = ()
        if loaded:
            self.do(Load(0))

    def do(self, *events: Event) -> tuple[Action, ...]:
        """Let events happen; return what the last one ordered."""
        for event in events:
            self.world, self.actions = self.engine.step(self.world, event)
        return self.actions

    def counts(self) -> Counter[Kind]:
        """How many actions of each kind the last event ordered."""
        return Counter(action.kind for action in self.actions)

    def hardware(self, register: str, cpu: int = 0) -> int:
        """What a register of a CPU holds."""
        return self.world.cpus[cpu].hardware[self.engine.widest.position[register]]

    def guest(self, register: str) -> int:
        """What the guest's set in memory holds."""
        return self.world.vcpu.guest[self.engine.widest.position[register]]

    def moved(self, kind: Kind, place: Place) -> list[str]:
        """The registers that the last event read into, or wrote from, a place, in order."""
        return [action.register for action in self.actions if action.kind is kind and action.place is place]


def host_arms(layout: Layout, slot: int = 0, cpu: int = 0, address: int = 0x7000) -> HostArm:
    """Return the event that the host arms a slot."""
    return HostArm(cpu, slot, address, layout.slots[slot].enable)


def in_guest(preset: str, layouts: Sequence[Layout] = ()) -> Steps:
    """Return a strategy whose guest runs and has not touched anything."""
    steps = Steps(preset, layouts)
    steps.do(Enter())
    return steps
