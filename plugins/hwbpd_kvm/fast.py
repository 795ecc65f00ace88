"""
The same engine at the speed of a table: what it costs to run long histories.

The actions of a step name registers and never values, so what a step orders depends on little: which slots are armed,
which flags are set. A table of what the engine answered, by world and event, is soon complete, and from then on a step
is one look. The engine stays the only one who knows the rules, and is asked whenever the table does not know; nothing
is written twice, so a new strategy is fast without further work. We turned down arrays (numpy): to vectorise over time
each strategy has to be written once more, by hand, and a table in plain Python is already past a million world switches
a second.

Addresses do not matter for what is ordered, so events are stripped of them first (``stripped``). Worlds in the table
are therefore not the real ones; whoever needs registers' values asks the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from hwbpd_kvm.actions import Action
from hwbpd_kvm.costs import Tally, tally, total
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.registers import Layout
from hwbpd_kvm.state import DebugOn, Event, GuestWrite, HostArm, OtherVcpu, World

WORLDS_MAX: Final = 100_000  # in one table; a strategy has some dozens, unless somebody arms slots in every pattern


def stripped(layout: Layout, event: Event) -> Event:
    """Return the event without what no strategy can look at: addresses, and control bits that arm nothing."""
    match event:
        case GuestWrite(register, value):
            return GuestWrite(register, value & layout.enables.get(register, 0))
        case DebugOn(values):
            return DebugOn(tuple((name, value & layout.enables.get(name, 0)) for name, value in values))
        case HostArm(cpu, slot, _, control, by):
            return HostArm(cpu, slot, 0, control & layout.slots[slot].enable, by)
        case OtherVcpu(cpu, _):
            return OtherVcpu(cpu)
        case _:
            return event


class Row(dict[int, tuple["Row", int]]):
    """A world's line of the table: number of an event -> (line of the world after it, number of its cost)."""

    __slots__ = ("world",)

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world


class Table:
    """
    What an engine answered so far.

    ``encode`` a history once, ``run`` it as often as needed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows: dict[World, Row] = {}
        self._numbers: dict[Event, int] = {}
        self._events: list[Event] = []
        self._costs: dict[tuple[type[Event], tuple[Action, ...]], int] = {}
        self._tallies: list[tuple[type[Event], Tally]] = []
        self._row = self._row_of(engine.start())

    @property
    def worlds(self) -> int:
        """How many worlds the table knows."""
        return len(self._rows)

    def encode(self, events: Iterable[Event]) -> list[int]:
        """Return the numbers that stand for ``events``."""
        numbers = self._numbers
        seen: dict[Event, int] = {}
        encoded = []
        for event in events:
            number = seen.get(event)
            if number is None:
                bare = stripped(self._engine.widest, event)
                number = numbers.setdefault(bare, len(numbers))
                if number == len(self._events):
                    self._events.append(bare)
                seen[event] = number
            encoded.append(number)
        return encoded

    def run(self, encoded: Sequence[int]) -> dict[type[Event], Tally]:
        """
        Let the events happen, from a world after a reset on; return what each kind of event cost in all.

        :raises NotNow: as the engine does.
        """
        counts = [0] * len(self._tallies)
        row = self._row
        for number in encoded:
            entry = row.get(number)
            if entry is None:
                entry = self._learn(row, number)
                counts += [0] * (len(self._tallies) - len(counts))
            row, cost = entry
            counts[cost] += 1
        kinds: dict[type[Event], list[Tally]] = {}
        for (kind, once), count in zip(self._tallies, counts, strict=True):
            if count:
                kinds.setdefault(kind, []).append(Tally(*(count * each for each in once)))
        return {kind: total(tallies) for kind, tallies in kinds.items()}

    def _learn(self, row: Row, number: int) -> tuple[Row, int]:
        """Ask the engine, and remember."""
        event = self._events[number]
        world, actions = self._engine.step(row.world, event)
        key = (type(event), actions)
        cost = self._costs.setdefault(key, len(self._costs))
        if cost == len(self._tallies):
            self._tallies.append((type(event), tally(actions)))
        entry = (self._row_of(world), cost)
        row[number] = entry
        return entry

    def _row_of(self, world: World) -> Row:
        row = self._rows.get(world)
        if row is None:
            row = Row(world)
            if len(self._rows) < WORLDS_MAX:
                self._rows[world] = row
        return row


def scalar(engine: Engine, events: Iterable[Event]) -> dict[type[Event], Tally]:
    """Return the same without a table: every step asked of the engine, nothing stripped. The judge of the table."""
    world = engine.start()
    kinds: dict[type[Event], Tally] = {}
    for event in events:
        world, actions = engine.step(world, event)
        kinds[type(event)] = total((kinds.get(type(event), Tally()), tally(actions)))
    return kinds
