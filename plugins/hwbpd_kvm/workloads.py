"""
What guests and hosts do, as events: the histories by which strategies are compared.

Each takes a layout, the number of guest intervals (entry to exit) and a source of chance, and returns the events for
two CPUs that are alike. The vCPU's thread leaves its CPU now and then, as threads do, and another vCPU may come in
between. None of them knows what strategy will meet it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from hwbpd_kvm.registers import Layout, Slot
from hwbpd_kvm.state import (
    ArmedBy,
    DebugOff,
    DebugOn,
    Enter,
    Event,
    Exit,
    GuestRead,
    GuestWrite,
    HostArm,
    HostDisarm,
    Load,
    OtherVcpu,
    Put,
)

CPUS: Final = 2
TASK_SWITCHES: Final = 3  # of a guest in an interval, where it switches tasks
PUT_EVERY: Final = 16  # intervals, in the mean
FUNCTION: Final = 0x8000
VARIABLE: Final = 0x9000


class _History:
    """Writes one down."""

    def __init__(self, layout: Layout, chance: random.Random) -> None:
        self.layout = layout
        self.chance = chance
        self.events: list[Event] = [Load(0)]
        self.cpu = 0

    def interval(self, *accesses: Event) -> None:
        """One entry, what the guest does to its registers, one exit."""
        self.events += [Enter(), *accesses, Exit()]

    def maybe_put(self) -> None:
        """The thread leaves its CPU, sometimes another vCPU comes, and it returns to the same CPU."""
        if self.chance.random() < 1 / PUT_EVERY:
            self.events.append(Put())
            if self.chance.random() < 1 / 4:
                self.events.append(OtherVcpu(self.cpu))
            self.events.append(Load(self.cpu))

    def migrate(self) -> None:
        """It returns to the other CPU."""
        self.cpu = 1 - self.cpu
        self.events += [Put(), Load(self.cpu)]

    def host_arms(self, *cpus: int, slot: int = 0, by: ArmedBy = ArmedBy.KERNEL) -> None:
        """The host arms a slot on each of these CPUs."""
        control = self.layout.slots[slot].enable
        self.events += [HostArm(cpu, slot, VARIABLE, control, by) for cpu in cpus]

    def host_disarms(self, *cpus: int, slot: int = 0, by: ArmedBy = ArmedBy.KERNEL) -> None:
        """And disarms it."""
        self.events += [HostDisarm(cpu, slot, by) for cpu in cpus]


def guest_arms(layout: Layout, number: int = 0) -> list[Event]:
    """A guest's kernel arms a slot: the switch for all slots if there is one, the address, the control."""
    slot = layout.slots[number]
    events: list[Event] = [GuestWrite(slot.address, FUNCTION), GuestWrite(slot.control, slot.enable)]
    if layout.master:
        events = [GuestRead(layout.master), GuestWrite(layout.master, layout.master_enable), *events]
    return events


def guest_disarms(layout: Layout, number: int = 0) -> list[Event]:
    """And disarms it; MDE and KDE go with the last user, MDBGEN stays."""
    events: list[Event] = [GuestWrite(layout.slots[number].control, 0)]
    if layout.master and not layout.master_always:
        events += [GuestRead(layout.master), GuestWrite(layout.master, 0)]
    return events


def _saves_all(layout: Layout, slots: tuple[Slot, ...]) -> list[Event]:
    """A guest that saves and restores every register when it switches tasks, with nothing armed in either."""
    names = list(dict.fromkeys(name for slot in slots for name in (slot.address, slot.control)))
    names += [name for name in layout.small if name not in names]
    return [*map(GuestRead, names), *(GuestWrite(name, layout.resets[name]) for name in names)]


# --- Dall's four cases -----------------------------------------------------------------------------------------------


def neither(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """Case 1: neither has any armed; now and then the guest looks, as a debugger's probing does."""
    history = _History(layout, chance)
    for _ in range(count):
        looks: list[Event] = [GuestRead(layout.slots[0].control)] if chance.random() < 1 / 100 else []
        history.interval(*looks)
        history.maybe_put()
    return history.events


def host_only(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """Case 2: the host has one slot armed on every CPU, all the time."""
    history = _History(layout, chance)
    history.host_arms(*range(CPUS))
    for _ in range(count):
        history.interval()
        history.maybe_put()
    return history.events


def guest_only(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """Case 3: the guest arms one slot at the start and leaves it."""
    history = _History(layout, chance)
    history.interval(*guest_arms(layout))
    for _ in range(count - 1):
        history.interval()
        history.maybe_put()
    return history.events


def both(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """Case 4: both have one armed."""
    history = _History(layout, chance)
    history.host_arms(*range(CPUS))
    history.interval(*guest_arms(layout))
    for _ in range(count - 1):
        history.interval()
        history.maybe_put()
    return history.events


# --- guests ----------------------------------------------------------------------------------------------------------


def idle(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """A guest that never comes near a debug register, on a host without breakpoints: nearly all of them."""
    history = _History(layout, chance)
    for _ in range(count):
        history.interval()
        history.maybe_put()
    return history.events


def master_set(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """
    A guest that sets the switch for all slots at boot and arms none: every ARMv7 kernel with hardware breakpoints.

    Where there is no such switch, it writes the control register's reset value instead.
    """
    history = _History(layout, chance)
    if layout.master:
        history.interval(GuestRead(layout.master), GuestWrite(layout.master, layout.master_enable))
    else:
        control = layout.slots[0].control
        history.interval(GuestWrite(control, layout.resets[control]))
    for _ in range(count - 1):
        history.interval()
        history.maybe_put()
    return history.events


def guest_debugger(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """
    A guest with one debugged task among others: whenever it comes and goes, its kernel arms and disarms a slot.

    The debugged task is scheduled for a while, and then not for a longer one.
    """
    history = _History(layout, chance)
    is_busy = False
    for _ in range(count):
        if chance.random() < 1 / 20:
            is_busy = not is_busy
        accesses: list[Event] = []
        if is_busy:
            for _ in range(chance.randrange(TASK_SWITCHES)):
                accesses += guest_arms(layout) + guest_disarms(layout)
        history.interval(*accesses)
        history.maybe_put()
    return history.events


def saves_all(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """A guest that has got into a state in which every context switch saves and restores its debug registers."""
    history = _History(layout, chance)
    once = _saves_all(layout, layout.slots)
    for _ in range(count):
        history.interval(*once * TASK_SWITCHES)
        history.maybe_put()
    return history.events


def probing(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """A guest that looks at one register in some intervals, evenly: the hardest for whoever wants to foresee it."""
    history = _History(layout, chance)
    for _ in range(count):
        history.interval(*([GuestRead(layout.slots[0].address)] if chance.random() < 1 / 4 else []))
        history.maybe_put()
    return history.events


# --- hosts -----------------------------------------------------------------------------------------------------------


def host_on_one_cpu(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """The host has a watchpoint on one CPU, and the vCPU moves between that CPU and the other."""
    history = _History(layout, chance)
    history.host_arms(1, slot=len(layout.slots) - 1)
    for _ in range(count):
        history.interval()
        if chance.random() < 1 / 10:
            history.migrate()
    return history.events


def vmm_debugs(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """The VMM debugs the guest for half of the time, while the guest now and then uses its own registers."""
    history = _History(layout, chance)
    slot = layout.slots[0]
    values = dict.fromkeys((slot.address,), FUNCTION) | {slot.control: slot.enable}
    if layout.master:
        values[layout.master] = layout.master_enable
    for number in range(count):
        if number == count // 4:
            history.events += [Put(), DebugOn(tuple(values.items())), Load(history.cpu)]
        if number == 3 * count // 4:
            history.events += [Put(), DebugOff(), Load(history.cpu)]
        accesses = [*guest_arms(layout, 1), *guest_disarms(layout, 1)] if chance.random() < 1 / 10 else []
        history.interval(*accesses)
        history.maybe_put()
    return history.events


def perf_comes_and_goes(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """On the host a profiler arms and disarms its breakpoint on every CPU."""
    history = _History(layout, chance)
    is_armed = False
    for _ in range(count):
        if chance.random() < 1 / 20:
            (history.host_disarms if is_armed else history.host_arms)(*range(CPUS))
            is_armed = not is_armed
        looks: list[Event] = [GuestRead(layout.slots[0].control)] if chance.random() < 1 / 50 else []
        history.interval(*looks)
        history.maybe_put()
    return history.events


Workload = Callable[[Layout, int, random.Random], list[Event]]
WORKLOADS: Final[Mapping[str, Workload]] = {
    "neither": neither,
    "host-only": host_only,
    "guest-only": guest_only,
    "both": both,
    "idle": idle,
    "master-set": master_set,
    "guest-debugger": guest_debugger,
    "saves-all": saves_all,
    "probing": probing,
    "host-on-one-cpu": host_on_one_cpu,
    "vmm-debugs": vmm_debugs,
    "perf-comes-and-goes": perf_comes_and_goes,
}


def random_history(layout: Layout, count: int, chance: random.Random) -> list[Event]:
    """
    Return a history that mixes everything, in phases: how often the guest accesses its registers, how many times, and
    whether anybody has something armed changes from phase to phase.
    """
    history = _History(layout, chance)
    for accesses in _phases(layout, count, chance):
        if chance.random() < 1 / 200:
            history.host_arms(*range(CPUS))
        elif chance.random() < 1 / 50:
            history.host_disarms(*range(CPUS))
        history.interval(*accesses)
        history.maybe_put()
        if chance.random() < 1 / 100:
            history.migrate()
    return history.events


def _phases(layout: Layout, count: int, chance: random.Random) -> Iterator[list[Event]]:
    """Yield the accesses of each interval."""
    often, times, left = 0.0, 1, 0
    register = layout.slots[0].address
    for _ in range(count):
        if left == 0:
            often, times, left = chance.random() ** 2, chance.choice((1, 2, 4, 12, 40)), chance.randrange(5, 200)
        left -= 1
        if chance.random() >= often:
            yield []
        elif chance.random() < 1 / 100:
            yield chance.choice((guest_arms, guest_disarms))(layout)
        else:
            yield [
                GuestRead(register) if chance.random() < 1 / 3 else GuestWrite(register, chance.getrandbits(20) << 2)
                for _ in range(chance.randint(1, times))
            ]
