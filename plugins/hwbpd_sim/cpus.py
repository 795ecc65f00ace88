"""
The CPUs of the simulated machine: the registers of each, what is armed in them, and what an instruction meets there.

The rules:

1. Registers change by the writes that the backend plans when something is armed or disarmed, and by those of the
   kernel's handling of a hit; and by a reset of the CPU. Nobody else touches them.
2. As Linux does it, a leg is armed in the lowest free slot of its pool, and keeps that one until it is disarmed. Which
   one it is may change each time its thread is switched in.
3. A leg that is being stepped past goes on being so wherever it is armed next: its event remembers.

CPUs of one kind give the same answers, and the same few questions are asked over and over. So answers are kept, with
the contents of the registers they are for; they are functions of nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

from hwbpd.core.errors import NotSupported
from hwbpd.core.model import Access, Piece, Pool, Task
from hwbpd.debug_unit import Armed, DebugUnit, Executed, Handled, Handling, MemoryAccess, RegisterFile, Slot, Write
from hwbpd.hookspecs import Backend, CpuFacts
from hwbpd_sim.armed import Leg
from hwbpd_sim.records import Step

_ANSWERS_KEPT = 65536  # of each sort, of one kind of CPU

Stepping = tuple[tuple[Slot, Hashable], ...]  # the slots that are being stepped past, and what is remembered of each


class Contents:
    """What the registers of a CPU hold. Equal ones of one kind are one object, so that they are cheap to tell apart."""

    __slots__ = ("__weakref__", "file")

    def __init__(self, file: RegisterFile) -> None:
        self.file = file


class Outcome(NamedTuple):
    """What came of one instruction."""

    handled: tuple[Handled, ...]
    contents: Contents
    stepping: Stepping


class Kind:
    """CPUs that are alike: their debug unit, what Linux does with it, and answers already found."""

    def __init__(self, unit: DebugUnit, handling: Handling, facts: CpuFacts) -> None:
        self.unit = unit
        self.handling = handling
        self.facts = facts
        self.slots: Mapping[Pool, int] = unit.slots()
        self._known: WeakValueDictionary[frozenset[tuple[str, int]], Contents] = WeakValueDictionary()
        self.after_reset = self._one(unit.reset())
        self.armed = lru_cache(_ANSWERS_KEPT)(handling.armed)
        self.refusal = lru_cache(_ANSWERS_KEPT)(handling.refusal)
        self.holding = lru_cache(_ANSWERS_KEPT)(self._holding)
        self.executed = lru_cache(_ANSWERS_KEPT)(self._executed)

    def _holding(self, contents: Contents, wanted: tuple[tuple[Slot, Piece], ...]) -> Contents:
        """The contents after the planned writes, with which exactly ``wanted`` is armed."""
        forms: dict[Slot, Armed] = {slot: self.armed(piece) for slot, piece in wanted}
        return self._written(contents, self.unit.plan(contents.file, forms))

    def _executed(
        self, contents: Contents, stepping: Stepping, access: int, address: int, bytes_: int, ip: int, kernel: bool
    ) -> Outcome:
        """
        What comes of one instruction.

        :param access: the value of an ``Access``, to data at ``address``; of ``EXECUTE`` there is no data.
        :param ip: where the instruction is.
        """
        accesses = [MemoryAccess(Access.EXECUTE, ip, 1, kernel)]
        if access != Access.EXECUTE.value:
            accesses.append(MemoryAccess(Access(access), address, bytes_, kernel))
        told = self.handling.execute(contents.file, accesses, dict(stepping))
        return Outcome(told.handled, self._written(contents, told.writes), _sorted(told))

    def stepped_on(self, contents: Contents, stepping: Stepping) -> tuple[Contents, Stepping]:
        """Rule 3, for slots that have just been armed."""
        gone_on: list[tuple[Slot, Hashable]] = []
        for slot, remembered in stepping:
            told = self.handling.step_on(contents.file, slot, remembered)
            contents = self._written(contents, told.writes)
            gone_on += _sorted(told)
        return contents, tuple(gone_on)

    def _written(self, contents: Contents, writes: Sequence[Write]) -> Contents:
        if not writes:
            return contents
        file = contents.file
        for write in writes:
            file = self.unit.write(file, write.register, write.value)
        return self._one(file)

    def _one(self, file: RegisterFile) -> Contents:
        return self._known.setdefault(frozenset(file.items()), Contents(file))


class Cpu:
    """
    One CPU.

    ``running`` is the thread that it runs, if any. ``legs`` says what is armed in which slot.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.running: Task | None = None
        self.legs: dict[Slot, Leg] = {}
        self._slot_of: dict[Leg, Slot] = {}
        self._contents = kind.after_reset
        self._stepping: Stepping = ()

    @property
    def file(self) -> RegisterFile:
        """The registers."""
        return self._contents.file

    @property
    def stepping(self) -> Stepping:
        """The slots that are being stepped past."""
        return self._stepping

    def reset(self) -> None:
        """Lose everything, and run nothing."""
        self.running = None
        self.legs.clear()
        self._slot_of.clear()
        self._contents = self.kind.after_reset
        self._stepping = ()

    def arm_just(self, due: Sequence[Leg]) -> None:
        """Have these armed and no others: rules 1 to 3."""
        new = [leg for leg in due if leg not in self._slot_of]
        gone = [leg for leg in self._slot_of if leg not in due]
        if not new and not gone:
            return
        for leg in gone:
            del self.legs[self._slot_of.pop(leg)]
        for leg in new:
            slot = self._free(leg.armed.piece.pool)
            self.legs[slot] = leg
            self._slot_of[leg] = slot
        wanted = tuple([(slot, leg.armed.piece) for slot, leg in self.legs.items()])
        self._contents = self.kind.holding(self._contents, wanted)
        self._stepping = tuple([(slot, leg.step) for slot, leg in self.legs.items() if leg.step is not None])
        if self._stepping:
            self._contents, self._stepping = self.kind.stepped_on(self._contents, self._stepping)
            self._remember()

    def execute(self, step: Step) -> tuple[Handled, ...]:
        """Execute one instruction; return the debug exceptions it took."""
        access = step.access.value
        ip = step.address if access == Access.EXECUTE.value else step.ip
        handled, self._contents, stepping = self.kind.executed(
            self._contents, self._stepping, access, step.address, step.length_bytes, ip, step.in_kernel
        )
        if stepping or self._stepping:
            self._stepping = stepping
            self._remember()
        return handled

    def _remember(self) -> None:
        steps = dict(self._stepping)
        for slot, leg in self.legs.items():
            leg.step = steps.get(slot)

    def _free(self, pool: Pool) -> Slot:
        """The lowest free slot of a pool."""
        number = 0
        while (pool, number) in self.legs:
            number += 1
        assert number < self.kind.slots[pool], "that there is room was seen to when it was admitted"
        return pool, number


def kind_of(facts: CpuFacts, backend: Backend) -> Kind:
    """
    Return the kind of CPU that a backend is for.

    :raises NotSupported: where nobody has modelled its registers.
    """
    unit, handling = backend.debug_unit(), backend.handling()
    if unit is None or handling is None:
        raise NotSupported(f"backend {backend.name} has no model of its registers, which a simulated machine takes")
    return Kind(unit, handling, facts)


def _sorted(told: Executed) -> Stepping:
    return tuple(sorted(told.stepping.items(), key=lambda item: item[0]))
