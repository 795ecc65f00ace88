"""
Every world that a strategy can come to, looked at: ``python -m hwbpd_kvm.isolation``.

The worlds are small and the search is complete: a value is the host's, the guest's, the VMM's, another guest's or
nobody's, and what it is otherwise decides nothing, so there are finitely many, and the search comes to an end by
itself. Breadth first: the first history to break a promise is a shortest one. What can follow on a broken world is not
looked at, as it would be a list of consequences; where the host is asked some time before the entry it is, because
there the question is what still holds: the promises not named hold also after the others are broken.

Not in the model: a host that arms on a CPU whose guest runs. To reach that CPU it has to interrupt it, and an
interrupt, an NMI included, is an exit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import msgspec
from msgspec import Struct

from hwbpd_kvm.actions import Action
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.promises import Owner, Promise, broken, owned
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
    OsLock,
    OtherVcpu,
    Put,
    Query,
    Up,
    Values,
    Where,
    World,
)
from hwbpd_kvm.strategy import Strategy
from hwbpd_kvm.surroundings import Case, Surroundings, cases, host_slots, layouts


class Found(Struct, frozen=True):
    """What a search has seen; ``histories`` has the shortest history that breaks each broken promise."""

    strategy: str
    states: int
    edges: int
    complete: bool
    seconds: float
    histories: dict[Promise, tuple[tuple[Event, tuple[Action, ...]], ...]]


Node = tuple[World, Values]  # a world, and what the guest believes


class Search:
    """A strategy in its surroundings."""

    def __init__(self, strategy: Strategy, around: Surroundings) -> None:
        self.around, self.strategy = around, strategy
        widest, least = layouts(strategy.architecture, alike=around.alike)
        self.engine = Engine(strategy, (widest, least), owned(Owner.HOST, widest.master_enable))
        shown = widest if around.most_shown else least
        enables = shown.enables
        self.written = tuple(
            GuestWrite(name, value)
            for name in shown.registers
            for value in (0, owned(Owner.GUEST, enables.get(name, 0)))
            # A second address is moved and lost like the first; the control registers are what differs.
            if name not in {slot.address for slot in shown.slots[1:]}
        )
        self.read = GuestRead(shown.slots[0].address)
        vmm_registers = [name for name in shown.registers if name != shown.status]
        self.debug_on = DebugOn(tuple((name, owned(Owner.VMM, enables.get(name, 0))) for name in vmm_registers))
        self.armed = tuple(
            HostArm(cpu, slot, owned(Owner.HOST), owned(Owner.HOST, widest.slots[slot].enable), by)
            for cpu, slot, by in host_slots(strategy.architecture, around)
        )

    def events(self, world: World) -> Iterator[Event]:
        """Everything that may happen next."""
        vcpu, around = world.vcpu, self.around
        if vcpu.where is Where.IN:
            yield Exit()
            if vcpu.traps:
                yield self.read  # from the hardware it changes nothing
            yield from self.written
            if self.strategy.os_lock:
                yield OsLock(not vcpu.os_locked)
        else:
            if vcpu.where is Where.LOADED:
                yield Enter()
                if not around.pinned or vcpu.answer is None:
                    yield Put()
                if around.asked_before:
                    yield Query()
            elif world.up:
                yield from (Load(cpu) for cpu in range(len(world.cpus)))  # on the same CPU or another
            if world.up:
                yield DebugOff() if vcpu.debugging else self.debug_on
        yield from self._host_events(world)
        if around.others and world.up:
            yield from (OtherVcpu(cpu, owned(Owner.OTHER)) for cpu in range(len(world.cpus)) if cpu != vcpu.cpu)
        if around.lifecycle and vcpu.where is Where.OUT:
            yield Down() if world.up else Up()

    def _host_events(self, world: World) -> Iterator[Event]:
        position, slots = self.engine.widest.position, self.engine.widest.slots
        if self.around.settled and world.vcpu.answer is not None:
            return
        for arm in self.armed:
            if world.vcpu.where is Where.IN and world.vcpu.cpu == arm.cpu:
                continue
            slot = slots[arm.slot]
            if world.cpus[arm.cpu].host[position[slot.control]] & slot.enable:
                yield HostDisarm(arm.cpu, arm.slot, arm.by)
            else:
                yield arm

    def run(self, *, states_max: int = 1_000_000) -> Found:
        """
        Look at every world there is.

        :param states_max: give up beyond; then the search is not complete.
        """
        began, around = time.process_time(), self.around
        start: Node = (self.engine.start(up=not self.around.lifecycle), self.engine.reset)
        came_from: dict[Node, tuple[Node, Event] | None] = {start: None}
        ends: dict[Promise, Node] = {}
        frontier, edges = [start], 0
        step, position = self.engine.step, self.engine.widest.position
        while frontier and len(came_from) <= states_max:
            following: list[Node] = []
            for node in frontier:
                world, believed = node
                for event in self.events(world):
                    edges += 1
                    after, _ = step(world, event)
                    now = believed
                    if isinstance(event, GuestWrite):
                        place = position[event.register]
                        now = (*believed[:place], event.value, *believed[place + 1 :])
                    next_node = (after, now)
                    if next_node in came_from:
                        continue
                    came_from[next_node] = (node, event)
                    is_broken = False
                    for promise in broken(self.engine, after, now):
                        ends.setdefault(promise, next_node)
                        is_broken = True
                    if around.asked_before or not is_broken:
                        following.append(next_node)
            frontier = following
        histories = {promise: self._history(came_from, ends[promise]) for promise in Promise if promise in ends}
        seconds = time.process_time() - began
        return Found(self.strategy.name, len(came_from), edges, not frontier, seconds, histories)

    def _history(
        self, came_from: dict[Node, tuple[Node, Event] | None], end: Node
    ) -> tuple[tuple[Event, tuple[Action, ...]], ...]:
        """Return the events from the start to a node, each with what was ordered."""
        events: list[Event] = []
        while (before := came_from[end]) is not None:
            end, event = before
            events.append(event)
        told, world = [], end[0]
        for event in reversed(events):
            world, actions = self.engine.step(world, event)
            told.append((event, actions))
        return tuple(told)


def told(found: Found) -> Iterator[str]:
    """Yield the lines for people: what was broken, and how, with all that was ordered on the way."""
    for promise, history in found.histories.items():
        yield f"  broken: {promise.value}"
        for event, actions in history:
            yield f"    {event_told(event)}"
            yield from (f"        {action}" for action in actions)


def event_told(event: Event) -> str:  # noqa: PLR0912 -- one branch for each event
    """Return an event of a small world in words."""
    match event:
        case Load(cpu):
            return f"the vCPU is loaded on CPU {cpu}"
        case Put():
            return "the vCPU is put"
        case Query():
            return "hw_breakpoint_enabled is asked"
        case Enter():
            return "entry"
        case Exit():
            return "exit"
        case GuestRead(register):
            return f"the guest reads {register}"
        case GuestWrite(register, value):
            return f"the guest writes {register}: {'a value of its own' if value else 'zero'}"
        case OsLock(locked):
            return f"the guest {'sets' if locked else 'clears'} its OS Lock"
        case DebugOn():
            return "the VMM begins to debug"
        case DebugOff():
            return "the VMM ends debugging"
        case HostArm(cpu, slot, _, _, by):
            return f"the host arms slot {slot} of CPU {cpu} ({by.value})"
        case HostDisarm(cpu, slot, by):
            return f"the host disarms slot {slot} of CPU {cpu} ({by.value})"
        case OtherVcpu(cpu, _):
            return f"another vCPU uses CPU {cpu}"
        case Up():
            return "the hypervisor is initialised"
        case Down():
            return "the hypervisor is torn down"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search every case, or those of some strategies; 0 if each search was complete and broke just what is expected."""
    parser = argparse.ArgumentParser(
        prog="python -m hwbpd_kvm.isolation", description="Every world that a switch strategy can come to."
    )
    parser.add_argument("strategies", nargs="*", metavar="STRATEGY", help="only these; all without")
    parser.add_argument("--histories", action="store_true", help="tell the shortest history of each broken promise")
    parser.add_argument("--json", action="store_true", help="one JSON object for each search")
    asked = parser.parse_args(arguments)
    unknown = set(asked.strategies) - set(PRESETS)
    if unknown:
        parser.error(f"no strategy {', '.join(sorted(unknown))}; there are {', '.join(PRESETS)}")
    chosen = [case for case in cases() if not asked.strategies or case.preset in asked.strategies]
    states = edges = complete = as_expected = 0
    seconds = 0.0
    for case in chosen:
        found = Search(PRESETS[case.preset], case.around).run()
        is_expected = found.histories.keys() == case.breaks
        states, edges, complete = states + found.states, edges + found.edges, complete + found.complete
        as_expected, seconds = as_expected + is_expected, seconds + found.seconds
        if asked.json:
            print(msgspec.json.encode(_plain(case, found, is_expected)).decode())
            continue
        outcome = f"breaks {len(found.histories)}" if found.histories else "keeps all"
        print(
            f"{case.preset:26} {found.states:7} states {found.edges:8} edges {found.seconds:5.1f} s  {outcome:9}  "
            f"{case.around}" + ("" if found.complete else "  NOT COMPLETE") + ("" if is_expected else "  UNEXPECTED"),
            flush=True,
        )
        is_told = asked.histories or not is_expected
        for line in told(found) if is_told else (f"  broken: {promise.value}" for promise in found.histories):
            print(line)
    if not asked.json:
        print(
            f"searches={len(chosen)} states={states} edges={edges} complete={complete} "
            f"unexpected={len(chosen) - as_expected} cpu_seconds={seconds:.1f}"
        )
    return 0 if complete == as_expected == len(chosen) else 1


def _plain(case: Case, found: Found, is_expected: bool) -> dict[str, object]:
    """Return a search's outcome as plain values."""
    return {
        "strategy": case.preset,
        "source": PRESETS[case.preset].source,
        "surroundings": str(case.around),
        "states": found.states,
        "edges": found.edges,
        "complete": found.complete,
        "seconds": round(found.seconds, 2),
        "as_expected": is_expected,
        "broken": {
            promise.value: [
                {"event": event_told(event), "actions": [str(action) for action in actions]}
                for event, actions in history
            ]
            for promise, history in found.histories.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
