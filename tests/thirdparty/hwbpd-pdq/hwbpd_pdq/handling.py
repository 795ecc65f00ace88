"""
What a kernel does with the exceptions of a PDQ-1: reports every slot, and steps past the hit with those slots disarmed.

Every exception comes before the access, which would meet the same slots again. So what was met is disarmed, the
instruction starts again, maybe to meet others, and once it has been executed everything is armed as it was. The CPU can
stop after one instruction without help of the debug registers, so nothing is missed and no slot is kept for that.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from hwbpd.core.model import Piece
from hwbpd.debug_unit import Armed, Executed, Handled, MemoryAccess, RegisterFile, Slot, Write
from hwbpd_pdq.control import stored_without
from hwbpd_pdq.debug_unit import PdqDebugUnit


class PdqHandling:
    """As ``hwbpd.debug_unit.Handling``."""

    def __init__(self, unit: PdqDebugUnit) -> None:
        self._unit = unit

    def refusal(self, piece: Piece, *, kernel: bool, of_task: bool) -> int:
        """What has been fitted is never refused."""
        return 0

    def armed(self, piece: Piece) -> Armed:
        """For everybody's accesses; hits that were not asked for are left out afterwards."""
        return Armed(piece)

    def execute(
        self, file: RegisterFile, accesses: Sequence[MemoryAccess], stepping: Mapping[Slot, Hashable]
    ) -> Executed:
        """As many exceptions as there are sets of slots that the instruction meets one after the other."""
        handled: list[Handled] = []
        writes: list[Write] = []
        now = file
        while trap := self._unit.check(now, accesses):
            handled.append(Handled(trap, trap.slots))
            writes.append(Write("DCTL", stored_without(now["DCTL"], trap.slots)))
            now = self._unit.write(now, "DCTL", writes[-1].value)
        if writes:
            writes.append(Write("DCTL", file["DCTL"]))
        return Executed(tuple(handled), tuple(writes))

    def step_on(self, file: RegisterFile, slot: Slot, remembered: Hashable) -> Executed:
        """Never needed: no step lasts longer than its instruction."""
        raise AssertionError("a PDQ-1 has stepped past everything when an instruction has been executed")
