"""
Where the manuals leave the CPU a choice, and what exactly else is right there.

Each class names the other right answers for one case; a run counts, by class, the cases in which the CPU gave one of
them and not the model's. What no class allows is a difference. docs/registers-x86.md tells of them, under "At liberty".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from msgspec.structs import replace

from tests.judges.instructions import Instruction
from tests.judges.stops import BS, Case, Shadow, Stop, Unit, executing, predicted


class Liberty(NamedTuple):
    """One class: its name, what leaves the answer open, and whether it allows what was seen."""

    name: str
    rule: str
    allows: Callable[[Unit, Case, list[Stop]], bool]


def _behind_mov_ss(unit: Unit, case: Case, seen: list[Stop]) -> bool:
    """A breakpoint on the instruction behind MOV SS: it drops what was held back, or is not met itself."""
    if not any(instruction.holds_back for instruction in case.stub.instructions):
        return False
    return any(seen == predicted(unit, case, shadow) for shadow in (Shadow(forgets=True), Shadow(hides=True)))


def _together(unit: Unit, case: Case, seen: list[Stop]) -> bool:
    """A data trap and the breakpoint at the next instruction in one #DB, and not in two."""
    return any(seen == merged for merged in _merged(predicted(unit, case), executing(case)))


def _merged(stops: list[Stop], breakpoints: int) -> Iterator[list[Stop]]:
    """Every pair of stops at one place, a data trap that is no step and a breakpoint, made one; then further pairs."""
    for n, (first, second) in enumerate(pairwise(stops)):
        is_data = first.dr6 & ~breakpoints == first.dr6 and not first.dr6 & BS
        if first.offset == second.offset and is_data and second.dr6 & breakpoints:
            merged = [*stops[:n], second._replace(dr6=first.dr6 | second.dr6), *stops[n + 2 :]]
            yield merged
            yield from _merged(merged, breakpoints)


def _fast_string(unit: Unit, case: Case, seen: list[Stop]) -> bool:
    """Rounds of a repeated MOVS or STOS done at once, with one trap for all of them; or each told a round late."""
    if case.steps:
        return False
    return any(seen == predicted(unit, grouped) for grouped in _grouped(case))


def _grouped(case: Case) -> Iterator[Case]:
    instructions = case.stub.instructions
    for n, instruction in enumerate(instructions):
        if instruction.is_fast_string:
            for other in (*_groups(instruction), _late(instruction)):
                others = (*instructions[:n], other, *instructions[n + 1 :])
                yield replace(case, stub=replace(case.stub, instructions=others))


def _groups(repeated: Instruction) -> Iterator[Instruction]:
    """Every way to do neighbouring rounds at once."""
    for cuts in range(1 << len(repeated.rounds) - 1):
        rounds, left = [repeated.rounds[0]], [repeated.left[0]]
        for n, (accesses, count) in enumerate(zip(repeated.rounds[1:], repeated.left[1:], strict=True)):
            if cuts >> n & 1:
                rounds.append(accesses)
                left.append(count)
            else:
                rounds[-1] += accesses
                left[-1] = count
        yield repeated._replace(rounds=tuple(rounds), left=tuple(left))


def _late(repeated: Instruction) -> Instruction:
    """Every trap but the last is told at the end of the round behind its own."""
    *early, last = repeated.rounds
    if not early:
        return repeated
    return repeated._replace(rounds=((), *early[:-1], early[-1] + last))


LIBERTIES = (
    Liberty(
        "behind MOV SS",
        "debug traps are held back over the next instruction; nobody says what a breakpoint there does to them",
        _behind_mov_ss,
    ),
    Liberty(
        "one #DB for two",
        "a B bit may be set although its condition did not cause this #DB, and Linux takes it for a hit",
        _together,
    ),
    Liberty(
        "fast strings",
        "MOVS and STOS may work in groups of elements, and data breakpoints are recognised between groups only",
        _fast_string,
    ),
)
