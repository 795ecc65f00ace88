"""
What Linux does with a debug exception of its own on Arm: whom it reports, and what is off while it steps past the hit.

Both kernels get every exception before the instruction, and let it start again once it cannot meet the slot any more;
so an instruction may bring several exceptions before it is executed. How the slots are switched off and on again is
stepping.py's, whose watchpoint it was attribution.py's. Here they are put together, in the kernel's order.

A breakpoint exception:

1. All armed breakpoints at that very address are reported. arm64 then switches all those of the level off for one step.
   ARMv7 turns each reported one into a mismatch breakpoint.
2. On ARMv7 the same exception ends steps: at another instruction than the one being stepped past, what was taken out
   for it is put back, watchpoints last.

A watchpoint exception:

3. The watchpoints that attribution names are reported. arm64 then switches off all, ARMv7 the reported ones.
4. A watchpoint of user mode's to which the kernel's access is attributed is stepped past without a report.

So on arm64 everything is armed again when the instruction has been executed, and what is missed is missed within it. On
ARMv7 a slot stays off until the thread's next instruction elsewhere in user mode, even if the thread is switched out in
between, for its event remembers the step: ``step_on``.

Linux, arch/arm/kernel/hw_breakpoint.c, breakpoint_handler(), watchpoint_handler(), arch_install_hw_breakpoint();
arch/arm64/kernel/hw_breakpoint.c, breakpoint_handler(), watchpoint_handler().
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from hwbpd.core.model import Piece, Pool
from hwbpd.debug_unit import Armed, DebugUnit, Executed, Handled, MemoryAccess, RegisterFile, Slot, Trap, Write
from hwbpd_arm import bcr, linux, stepping, wcr
from hwbpd_arm.attribution import reported_slots
from hwbpd_arm.bcr import Privilege
from hwbpd_arm.dscr import MethodOfEntry
from hwbpd_arm.plan import ARMED, Contents, Pair
from hwbpd_arm.stepping import Step
from hwbpd_arm.v7_unit import Armv7DebugUnit
from hwbpd_arm.v8_unit import Arm64DebugUnit, decode_esr

_UNDISTURBED = Executed()


class _Registers:
    """The registers of one CPU as the kernel writes to them, one write after the other."""

    def __init__(self, unit: DebugUnit, file: RegisterFile) -> None:
        self._unit = unit
        self.file = file
        self.written: list[Write] = []

    def write(self, writes: Sequence[Write]) -> None:
        for write in writes:
            self.file = self._unit.write(self.file, write.register, write.value)
        self.written += writes

    def armed(self, pairs: Sequence[Pair]) -> dict[int, Contents]:
        """What the armed ones of some pairs hold, by number."""
        held = (Contents(self.file[pair.address], self.file[pair.control]) for pair in pairs)
        return {number: contents for number, contents in enumerate(held) if contents.control & ARMED}


class _ArmHandling:
    """What both kernels have in common."""

    def __init__(self, kernel: linux.Kernel) -> None:
        self._kernel = kernel

    def refusal(self, piece: Piece, *, kernel: bool, of_task: bool) -> int:
        """By the rules of linux.py: a 32-bit kernel takes nothing that is CPU-wide."""
        request = self._request(piece, exclude_kernel=not kernel, of_task=of_task)
        return linux.parse_errno(self._kernel, request)

    def armed(self, piece: Piece) -> Armed:
        """At user addresses for user mode, whatever hits are asked for; at the kernel's as linux.py, rule 5."""
        control = linux.contents(self._kernel, self._request(piece)).control
        privilege = wcr.decode(control).privilege
        return Armed(piece, user=Privilege.USER in privilege, kernel=Privilege.KERNEL in privilege)

    def _request(self, piece: Piece, *, exclude_kernel: bool = False, of_task: bool = True) -> linux.Request:
        span = piece.span
        return linux.Request(piece.access.value, span.address, span.length_bytes, exclude_kernel, of_task)


class Armv7Handling(_ArmHandling):
    """A 32-bit kernel, as ``hwbpd.debug_unit.Handling``; it remembers a ``Step`` of each slot."""

    def __init__(self, unit: Armv7DebugUnit, kernel: linux.Kernel) -> None:
        super().__init__(kernel)
        self._unit = unit
        self._usable = unit.breakpoints[: unit.slots()[Pool.INST]]

    def execute(
        self, file: RegisterFile, accesses: Sequence[MemoryAccess], being_stepped: Mapping[Slot, Hashable]
    ) -> Executed:
        """Exceptions until there is none: rules 1 to 4."""
        if self._unit.check(file, accesses) is None:
            return Executed(stepping=being_stepped) if being_stepped else _UNDISTURBED
        registers = _Registers(self._unit, file)
        steps = {slot: _step(remembered) for slot, remembered in being_stepped.items()}
        handled = []
        while trap := self._unit.check(registers.file, accesses):
            before = len(registers.written)
            handle = self._breakpoint if trap.status["DBGDSCR.MOE"] == MethodOfEntry.BREAKPOINT else self._watchpoint
            handled.append(Handled(trap, handle(registers, steps, trap, accesses[0])))
            assert len(registers.written) > before, f"{trap} comes again for ever"
        return Executed(tuple(handled), tuple(registers.written), steps)

    def step_on(self, file: RegisterFile, slot: Slot, remembered: Hashable) -> Executed:
        """Begin once more, at the same instruction."""
        step, writes = stepping.begin(self._unit, file, slot, _step(remembered).address)
        return Executed(writes=tuple(writes), stepping={slot: step})

    def _breakpoint(
        self, registers: _Registers, steps: dict[Slot, Step], trap: Trap, fetch: MemoryAccess
    ) -> tuple[Slot, ...]:
        """Rules 1 and 2."""
        at, reported = fetch.address, []
        for number, held in registers.armed(self._usable).items():
            slot = (Pool.INST, number)
            if held.address == at & ~0b11 and bcr.decode(held.control).byte_select >> at % 4 & 1:
                reported.append(slot)
                if slot not in steps:  # else another breakpoint has come here meanwhile, and it is one already
                    self._begin(registers, steps, slot, at)
            elif slot in steps:
                registers.write(stepping.end(self._unit, steps.pop(slot)))
        for slot, step in list(steps.items()):
            if slot[0] == Pool.DATA and stepping.ends(step, at):
                registers.write(stepping.end(self._unit, steps.pop(slot)))
        return tuple(reported)

    def _watchpoint(
        self, registers: _Registers, steps: dict[Slot, Step], trap: Trap, fetch: MemoryAccess
    ) -> tuple[Slot, ...]:
        """Rules 3 and 4."""
        armed = registers.armed(self._unit.watchpoints)
        direction = trap.status.get("DFSR.WnR")
        write = None if direction is None else bool(direction)
        hit = reported_slots(armed, trap.status.get("DFAR"), write=write)
        for number in hit:
            self._begin(registers, steps, (Pool.DATA, number), fetch.address)
        return _told(armed, hit, fetch)

    def _begin(self, registers: _Registers, steps: dict[Slot, Step], slot: Slot, at: int) -> None:
        steps[slot], writes = stepping.begin(self._unit, registers.file, slot, at)
        registers.write(writes)


class Arm64Handling(_ArmHandling):
    """arm64, as ``hwbpd.debug_unit.Handling``; no step lasts longer than its instruction."""

    def __init__(self, unit: Arm64DebugUnit, kernel: linux.Kernel) -> None:
        super().__init__(kernel)
        self._unit = unit

    def execute(
        self, file: RegisterFile, accesses: Sequence[MemoryAccess], being_stepped: Mapping[Slot, Hashable]
    ) -> Executed:
        """At most a breakpoint exception and then one watchpoint exception: rules 1, 3 and 4."""
        if self._unit.check(file, accesses) is None:
            return _UNDISTURBED
        registers = _Registers(self._unit, file)
        handled = []
        while trap := self._unit.check(registers.file, accesses):
            before = registers.file
            syndrome = decode_esr(trap.status["ESR_EL1"])
            assert syndrome is not None
            reported, pool = trap.slots, Pool.INST
            if syndrome.watchpoint:
                pool, armed = Pool.DATA, registers.armed(self._unit.watchpoints)
                hit = reported_slots(armed, trap.status["FAR_EL1"], write=syndrome.write)
                reported = _told(armed, hit, accesses[0])
            handled.append(Handled(trap, reported))
            registers.write(stepping.switch_off(self._unit, registers.file, pool, kernel=accesses[0].kernel))
            assert registers.file != before, f"{trap} comes again for ever"
        registers.write(stepping.switch_on(self._unit, file, registers.file))
        return Executed(tuple(handled), tuple(registers.written))

    def step_on(self, file: RegisterFile, slot: Slot, remembered: Hashable) -> Executed:
        """Never needed."""
        raise AssertionError("arm64 has stepped past everything when an instruction has been executed")


def _told(armed: Mapping[int, Contents], hit: Sequence[int], fetch: MemoryAccess) -> tuple[Slot, ...]:
    """Those of the watchpoints that were hit of which a report is made: rule 4."""
    silent = Privilege.USER if fetch.kernel else None
    return tuple((Pool.DATA, number) for number in hit if wcr.decode(armed[number].control).privilege != silent)


def _step(remembered: Hashable) -> Step:
    assert isinstance(remembered, Step)
    return remembered
