"""Linux on x86 reports every slot that an instruction meets, breakpoints before it and watchpoints after it."""

from __future__ import annotations

import errno

import pytest

from hwbpd.core.model import Access, Piece, Pool, Span
from hwbpd.debug_unit import Handled, MemoryAccess, RegisterFile
from hwbpd.hookspecs import CpuFacts
from hwbpd_x86.debug_unit import X86DebugUnit
from hwbpd_x86.handling import X86Handling
from hwbpd_x86.registers import cpu_of

FACTS = CpuFacts("x86_64")
UNIT = X86DebugUnit(cpu_of(FACTS))
LINUX = X86Handling(UNIT, FACTS)
AT, CODE = 0x1000, 0x400
FETCH = MemoryAccess(Access.EXECUTE, CODE, 1)
STORE = MemoryAccess(Access.WRITE, AT, 16)


def armed(*pieces: tuple[Access, int, int]) -> RegisterFile:
    file = UNIT.reset()
    wanted = {
        (Pool.ANY, n): LINUX.armed(Piece(Span(address, length), access, Pool.ANY))
        for n, (access, address, length) in enumerate(pieces)
    }
    for write in UNIT.plan(file, wanted):
        file = UNIT.write(file, write.register, write.value)
    return file


def told(handled: tuple[Handled, ...]) -> list[tuple[bool, list[int]]]:
    return [(one.trap.before, [number for _, number in one.reported]) for one in handled]


def test_a_fault_comes_before_and_a_trap_after_and_nothing_is_missed() -> None:
    file = armed((Access.WRITE, AT, 8), (Access.EXECUTE, CODE, 8), (Access.WRITE, AT + 8, 8), (Access.EXECUTE, CODE, 8))

    executed = LINUX.execute(file, [FETCH, STORE], {})

    assert told(executed.handled) == [(True, [1, 3]), (False, [0, 2])]
    assert (executed.writes, executed.stepping) == ((), {})


@pytest.mark.parametrize(
    ("accesses", "expected"), [([FETCH], [(True, [1])]), ([STORE], [(False, [0])]), ([], [])]
)
def test_either_comes_alone(accesses: list[MemoryAccess], expected: list[tuple[bool, list[int]]]) -> None:
    file = armed((Access.WRITE, AT, 8), (Access.EXECUTE, CODE, 8))

    assert told(LINUX.execute(file, accesses, {}).handled) == expected


def test_the_kernels_accesses_are_met_like_those_of_programs() -> None:
    file = armed((Access.WRITE, AT, 8))

    in_kernel = [MemoryAccess(Access.WRITE, AT, 8, kernel=True)]

    assert told(LINUX.execute(file, in_kernel, {}).handled) == [(False, [0])]


@pytest.mark.parametrize(
    ("piece", "kernel", "refusal"),
    [
        ((Access.WRITE, AT, 8), True, 0),
        ((Access.WRITE, AT + 1, 8), True, errno.EINVAL),
        ((Access.WRITE, 2**63, 8), False, errno.EINVAL),
        ((Access.WRITE, AT, 16), True, errno.EOPNOTSUPP),
    ],
)
def test_a_refusal_is_that_of_the_kernel(piece: tuple[Access, int, int], kernel: bool, refusal: int) -> None:
    access, address, length = piece
    for of_task in (True, False):
        asked = Piece(Span(address, length), access, Pool.ANY)
        assert LINUX.refusal(asked, kernel=kernel, of_task=of_task) == refusal
