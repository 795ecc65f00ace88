"""
What Linux does with a #DB of its own: reports all of its slots, in one go, and gets past a breakpoint by RF.

1. Every slot whose B bit is set in DR6 is reported, the lowest number first, and DR6 is cleared.
2. A fault sets RF where the instruction starts again, so its breakpoints do not stop it a second time; data breakpoints
   that it meets then raise a #DB of their own. No register is written for any of this, and nothing is missed.
3. A slot counts for user mode and the kernel alike. Hits that were not asked for are left out by perf, afterwards.

Linux, arch/x86/kernel/hw_breakpoint.c, hw_breakpoint_handler(); arch/x86/kernel/traps.c, exc_debug_user().
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from hwbpd.core.model import Piece
from hwbpd.debug_unit import Armed, Executed, Handled, MemoryAccess, RegisterFile, Slot
from hwbpd.hookspecs import CpuFacts
from hwbpd_x86.debug_unit import X86DebugUnit
from hwbpd_x86.linux import Request, kernel_of, parse_errno

_UNDISTURBED = Executed()


class X86Handling:
    """As ``hwbpd.debug_unit.Handling``."""

    def __init__(self, unit: X86DebugUnit, facts: CpuFacts) -> None:
        self._unit = unit
        self._kernel = kernel_of(facts)

    def refusal(self, piece: Piece, *, kernel: bool, of_task: bool) -> int:
        """By the rules of linux.py, which are the same for tasks and CPUs."""
        span = piece.span
        request = Request(piece.access.value, span.address, span.length_bytes, exclude_kernel=not kernel)
        return parse_errno(self._kernel, request)

    def armed(self, piece: Piece) -> Armed:
        """For everybody's accesses: rule 3."""
        return Armed(piece)

    def execute(
        self, file: RegisterFile, accesses: Sequence[MemoryAccess], stepping: Mapping[Slot, Hashable]
    ) -> Executed:
        """A fault, a trap, both or neither: rules 1 and 2."""
        trap = self._unit.check(file, accesses)
        if trap is None:
            return _UNDISTURBED
        handled = [Handled(trap, trap.slots)]
        if trap.before and (later := self._unit.check(file, accesses, resume=True)):
            handled.append(Handled(later, later.slots))
        return Executed(tuple(handled))

    def step_on(self, file: RegisterFile, slot: Slot, remembered: Hashable) -> Executed:
        """Never needed: rule 2."""
        raise AssertionError("x86 steps past nothing")
