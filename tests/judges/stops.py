"""
Where a stub stops, by the model: what an instruction stream adds to the answers about single instructions.

The model answers for one instruction (``check``). What lies between instructions is decided here, and is what whoever
executes instructions has to know besides:

1. RF lets the instruction behind a breakpoint be executed; Linux sets it when it has told of the hit. It is good for
   one instruction.
2. A repeated string instruction raises its traps round by round, at its own address until the last round. The CPU sets
   RF there, so it is fetched once and its breakpoint is met once.
3. MOV SS keeps its trap until after the next instruction, with which it is merged. Its single step is not told at all.
4. INT1 raises #DB, and INT3 raises #BP, after itself and with nothing in DR6; a single step of either is not told.

Intel SDM Vol. 3B, "Debug Exceptions"; Vol. 3A, "Masking Exceptions and Interrupts When Switching Stacks"; AMD64 APM
Vol. 2, "Breakpoints".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from hwbpd.core.model import Access
from hwbpd.debug_unit import MemoryAccess, RegisterFile, Trap
from hwbpd_x86 import dr6
from tests.judges.instructions import INT3, LINE_BYTES, Instruction, Stub

SLOTS = 4
BREAKPOINTS = 0b1111  # B0-B3
BS = dr6.to_positive(dr6.encode(dr6.Dr6(single_step=True)))

_END = Instruction("int3", INT3, ((),), raises=True)


class Unit(Protocol):
    """What of the model is asked."""

    def reset(self) -> RegisterFile: ...

    def write(self, file: RegisterFile, register: str, value: int) -> RegisterFile: ...

    def check(
        self,
        file: RegisterFile,
        accesses: Sequence[MemoryAccess],
        *,
        resume: bool = False,
        single_step: bool = False,
    ) -> Trap | None: ...


class Stop(NamedTuple):
    """One stop: how far from the start of the stub, DR6 in its positive form, and what a repetition has left to do."""

    offset: int
    dr6: int
    rcx: int = 0


class Case(Struct, frozen=True):
    """What is asked once."""

    stub: Stub
    addresses: tuple[int, ...]
    dr7: int
    resume: bool = False  # it begins with RF set
    steps: bool = False  # TF is set throughout

    def told(self) -> str:
        """The registers and the bytes, for somebody who has to look into it."""
        slots = ", ".join(f"DR{n}={address:#x}" for n, address in enumerate(self.addresses))
        lines = [f"  {slots}, DR7={self.dr7:#x}" + ", RF" * self.resume + ", TF" * self.steps]
        lines.append("  " + ", ".join(f"{name}={value:#x}" for name, value in self.stub.registers.items()))
        for start, instruction in zip(self.stub.starts(), self.stub.instructions, strict=False):
            offset = start - self.stub.address
            lines.append(f"  {start:#x} (+{offset}): {instruction.code.hex(' ')}  {instruction.text}")
        return "\n".join(lines)


class Shadow(NamedTuple):
    """What a CPU does with the instruction behind MOV SS; the default is rule 3."""

    forgets: bool = False  # a breakpoint there drops what MOV SS holds back
    hides: bool = False  # a breakpoint there is not met


AS_MODELLED = Shadow()


def predicted(unit: Unit, case: Case, shadow: Shadow = AS_MODELLED) -> list[Stop]:
    """Return every stop of a case, the INT3 at its end included."""
    file = unit.reset()
    for n, address in enumerate(case.addresses):
        file = unit.write(file, f"DR{n}", address)
    file = unit.write(file, "DR7", case.dr7)
    stops: list[Stop] = []
    resume = case.resume
    rcx = case.stub.registers.get("rcx", 0)
    waiting = 0  # rule 3
    in_shadow = False
    for at, instruction in zip(case.stub.starts(), (*case.stub.instructions, _END), strict=True):
        start, end = at - case.stub.address, at + len(instruction.code) - case.stub.address
        fetch = MemoryAccess(Access.EXECUTE, at, len(instruction.code))
        resume = resume or (in_shadow and shadow.hides)
        step = case.steps and not instruction.raises  # rule 4
        for n, accesses in enumerate(instruction.rounds, start=1):
            fetched = (fetch,) if n == 1 else ()  # rule 2
            trap = unit.check(file, (*fetched, *accesses), resume=resume, single_step=step)
            if trap is not None and trap.before:
                stops.append(Stop(start, _reasons(trap), rcx))
                if shadow.forgets:
                    waiting = 0
                trap = unit.check(file, (*fetched, *accesses), resume=True, single_step=step)  # rule 1
            rcx = instruction.left[n - 1] if instruction.left else rcx
            reasons = waiting | (_reasons(trap) if trap else 0)
            waiting = reasons & ~BS if instruction.holds_back else 0  # rule 3
            if reasons and not instruction.holds_back:
                is_whole = n == len(instruction.rounds) and not (trap is not None and trap.before)
                stops.append(Stop(end if is_whole else start, reasons, rcx))
        resume = False
        in_shadow = instruction.holds_back
        if instruction.raises:
            stops.append(Stop(end, 0, rcx))
    return stops


def _reasons(trap: Trap) -> int:
    """What Linux shows of a trap: of the B bits, those of armed slots."""
    bits = sum(1 << n for _pool, n in trap.slots)
    status = positive(trap.status["DR6"])
    assert status & bits == bits, f"the slots of the model's {trap} are not in its DR6"
    return status & ~BREAKPOINTS | bits


def positive(hardware: int) -> int:
    """DR6 in its positive form."""
    return dr6.to_positive(hardware)


def executing(case: Case) -> int:
    """The B bits of the slots that hold breakpoints."""
    return sum(1 << n for n in range(SLOTS) if not case.dr7 >> 16 + 4 * n & 0b11)


def met_by(case: Case, stops: Sequence[Stop]) -> Iterator[str]:
    """Name what a case is about, for the count of what a run has met."""
    if stops[:-1] == []:
        yield "no trap"
    starts = [start - case.stub.address for start in case.stub.starts()]
    slots = [stop for stop in stops if stop.dr6 & BREAKPOINTS]
    executes = executing(case)
    if any(stop.dr6 & executes for stop in slots):
        yield "before"
    if any(stop.dr6 & BREAKPOINTS & ~executes for stop in slots):
        yield "after"
    if any((stop.dr6 & BREAKPOINTS).bit_count() > 1 for stop in slots):
        yield "several slots"
    if any(stop.dr6 & BS for stop in stops):
        yield "step"
    if any(stop.dr6 & BS for stop in slots):
        yield "step and slot"
    for start, instruction in zip(starts, case.stub.instructions, strict=False):
        if len(instruction.rounds) > 1 and any(stop.offset == start and not stop.dr6 & executes for stop in slots):
            yield "repeated"
            break
    if slots and any(
        access.address // LINE_BYTES != (access.address + access.length_bytes - 1) // LINE_BYTES
        for instruction in case.stub.instructions
        for access in instruction.accesses
    ):
        yield "straddles a line"
