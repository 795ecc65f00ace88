"""
Cases for the judge of accesses: one instruction of arm64, what is armed when it runs, and what the model says of it.

The predictions are the product's own: linux.py (what is accepted, what the registers then hold), v8_unit.py (what
traps) and attribution.py (whose hit it is). Nothing here knows better.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from hwbpd.core.model import Access, Pool
from hwbpd.debug_unit import MemoryAccess, RegisterFile
from hwbpd_arm import linux
from hwbpd_arm.attribution import reported_slots
from hwbpd_arm.linux import EXECUTE, Kernel, Request
from hwbpd_arm.plan import Contents
from hwbpd_arm.v8_unit import Arm64DebugUnit, decode_esr
from tests.judges.arm64.instructions import INSTRUCTIONS, Instruction, place

MIDDLE: Final = 512  # of the data; everything accessed is near it
PAGE_BYTES: Final = 4096
KERNEL_ADDRESS: Final = 0xFFFF_8000_0800_0000
MDE: Final = 1 << 15


class Case(Struct, frozen=True):
    """One instruction, and what is to be armed when it runs."""

    index: int  # of the instruction
    pc: int
    address: int  # in x0
    requests: tuple[Request, ...]

    @property
    def instruction(self) -> Instruction:
        return INSTRUCTIONS[self.index]

    def data(self) -> MemoryAccess | None:
        """What the instruction accesses."""
        what = self.instruction
        start = self.address - self.address % what.length_bytes if what.whole_block else self.address
        return MemoryAccess(what.access, start, what.length_bytes) if what.length_bytes else None

    @property
    def is_unaligned(self) -> bool:
        return self.address % self.instruction.element_bytes != 0

    def looked_at(self) -> MemoryAccess:
        """The bytes that QEMU 7.2 looks at, of an access that is not aligned."""
        what = self.instruction
        end = self.address + what.length_bytes
        if what.access is Access.WRITE:
            start = self.address - self.address % PAGE_BYTES
        else:
            start = self.address - self.address % what.element_bytes
            end += -end % what.element_bytes
        return MemoryAccess(what.access, start, end - start)

    def __str__(self) -> str:
        armed = "\n".join(f"    {_say(request)}" for request in self.requests) or "    nothing"
        return f"  {self.instruction.name} at {self.pc:#x}, x0 = {self.address:#x}, asked for:\n{armed}"


def _say(request: Request) -> str:
    letters = {1: "r", 2: "w", 3: "rw", 4: "x"}.get(request.bp_type, f"type {request.bp_type}")
    return f"{request.bp_addr:#x}/{request.bp_len}:{letters}"


class Prediction(Struct, frozen=True):
    """What the model says; slots are told by the place of their request among those that were armed."""

    fetched: frozenset[int]  # breakpoints on the instruction
    met: frozenset[int]  # watchpoints that it meets
    behind: frozenset[int]  # breakpoints on the NOP behind it
    reported: int  # the address that goes with the watchpoint exception
    may_report: range  # what the architecture allows for it
    write: bool


class Model:
    """The product's answers for an arm64 kernel and CPU."""

    def __init__(self, breakpoints: int, watchpoints: int, version: int) -> None:
        self.kernel = Kernel(version=version)
        self.unit = Arm64DebugUnit(breakpoints, watchpoints, version=version)
        self.slots = {Pool.INST: breakpoints, Pool.DATA: watchpoints}

    def errno(self, request: Request, held: Sequence[Request]) -> int:
        """How the kernel answers one more request of a task that has such events."""
        free = self.slots[pool_of(request)] - sum(pool_of(other) is pool_of(request) for other in held)
        return linux.open_errno(self.kernel, request, free_slots=free)

    def predict(self, case: Case, armed: Sequence[Request], data: MemoryAccess | None = None) -> Prediction:
        """
        Say what a case leads to.

        :param armed: the requests that the kernel has taken.
        :param data: what is accessed, if it is not what the instruction says.
        """
        file, places = self._file(armed)
        fetches = [MemoryAccess(Access.EXECUTE, pc, 4) for pc in (case.pc, case.pc + 4)]
        fetched, behind = (self._met(file, fetch, places) for fetch in fetches)
        data = data or case.data()
        trap = None if data is None else self.unit.check(file, [data])
        if data is None or trap is None:
            return Prediction(fetched, frozenset(), behind, 0, range(0), False)
        syndrome = decode_esr(trap.status["ESR_EL1"])
        assert syndrome is not None
        met = self._met(file, data, places)
        last = max(_end(linux.contents(self.kernel, armed[place])) for place in met)
        may_report = range(data.address, min(data.address + data.length_bytes, last))
        return Prediction(fetched, met, behind, trap.status["FAR_EL1"], may_report, syndrome.write)

    def attributed(self, predicted: Prediction, armed: Sequence[Request], address: int) -> frozenset[int]:
        """Whose hit Linux takes it for when ``address`` is reported."""
        if not predicted.met:
            return frozenset()
        held = {at: linux.contents(self.kernel, one) for at, one in enumerate(armed) if one.bp_type != EXECUTE}
        return frozenset(reported_slots(held, address, write=predicted.write))

    def _file(self, armed: Sequence[Request]) -> tuple[RegisterFile, dict[tuple[Pool, int], int]]:
        """The registers as Linux fills them, and whose request each slot is for."""
        file = self.unit.write(self.unit.reset(), "OSLAR_EL1", 0)
        file = self.unit.write(file, "MDSCR_EL1", MDE)
        places: dict[tuple[Pool, int], int] = {}
        for at, request in enumerate(armed):
            pool = pool_of(request)
            number = sum(other is pool for other, _ in places)
            pair = (self.unit.breakpoints if pool is Pool.INST else self.unit.watchpoints)[number]
            held = linux.contents(self.kernel, request)
            file = self.unit.write(self.unit.write(file, pair.address, held.address), pair.control, held.control)
            places[pool, number] = at
        return file, places

    def _met(self, file: RegisterFile, made: MemoryAccess, places: dict[tuple[Pool, int], int]) -> frozenset[int]:
        trap = self.unit.check(file, [made])
        return frozenset(places[slot] for slot in trap.slots) if trap else frozenset()


def pool_of(request: Request) -> Pool:
    """The pool that the kernel takes a slot from: linux.py, rule 1."""
    return Pool.INST if request.bp_type & 3 == 0 else Pool.DATA


def _end(held: Contents) -> int:
    """One past the highest byte that a slot watches."""
    return held.address + (held.control >> 5 & 0xFF).bit_length()


class Cases:
    """Draws cases: near each other more often than chance would have them."""

    def __init__(self, draw: random.Random, code: int, data: int) -> None:
        self._draw = draw
        self._code = code
        self._data = data + MIDDLE

    def draw(self, *, watchpoints: int, breakpoints: int, wild: bool) -> Case:
        """
        Draw one.

        :param watchpoints: so many at most; :param breakpoints: so many at most.
        :param wild: whether a request may be malformed.
        """
        draw = self._draw
        index = draw.randrange(len(INSTRUCTIONS))
        what = INSTRUCTIONS[index]
        address = self._data + draw.randrange(64)
        if what.aligned:
            address -= address % what.length_bytes
        pc = self._code + place(index)
        requests = [self._watch(address) for _ in range(draw.randint(0, watchpoints))]
        # Breakpoints hide from a tracer what the instruction accesses, so most cases have none.
        requests += [self._break(pc) for _ in range(draw.randint(0, breakpoints) if draw.random() < 0.4 else 0)]
        if wild and draw.random() < 0.3:
            requests.append(self._odd(address))
        draw.shuffle(requests)
        return Case(index, pc, address, tuple(requests))

    def _watch(self, near: int) -> Request:
        draw = self._draw
        start = near + draw.randint(-10, 40 if draw.random() < 0.3 else 10)
        return Request(draw.choice((1, 2, 3)), start, draw.randint(1, 8))

    def _break(self, pc: int) -> Request:
        # On the instruction, the NOP behind it, or what does not run.
        return Request(EXECUTE, pc + self._draw.choice((0, 4, -4, 400)), 4)

    def _odd(self, near: int) -> Request:
        draw = self._draw
        forms = (
            Request(draw.choice((0, 5, 6, 7, 8, 12)), near, 4),
            Request(draw.choice((1, 2, 3, 4)), near, draw.choice((0, 9, 10, 16, 64))),
            Request(EXECUTE, near, draw.randint(1, 8)),
            Request(draw.choice((1, 2, 3, 4)), KERNEL_ADDRESS, 4),
            Request(3, (1 << 64) - 4, draw.randint(1, 8)),
        )
        return draw.choice(forms)
