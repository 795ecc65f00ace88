"""
Which accesses of one instruction raise #DB, when, and what DR6 then says.

The rules:

1. An instruction breakpoint (R/W 0) is met by the address of the instruction's first byte, prefixes included, and by
   nothing else of it. It is a **fault**: the instruction has not been executed, so its data accesses have not happened
   and say nothing in DR6. RF suppresses instruction breakpoints for one instruction, or nobody could step past one; it
   does not suppress data breakpoints.
2. A data breakpoint (R/W 1: writes; 3: reads and writes, no fetches) is met by an access that touches at least one byte
   of its block: the address with as many low bits left out as LEN and the address mask cover. It is a **trap**: the
   instruction has been executed. A read-modify-write is both a read and a write.
3. An I/O breakpoint (R/W 2) exists only while CR4.DE is set. It is met by ports as data breakpoints are by addresses,
   and is a trap, too.
4. A slot raises #DB only if it is armed, by L or by G. One #DB tells of all armed slots that were met by the same
   instruction, over all its accesses.
5. A single step (TF) is a trap, and shares the #DB with data breakpoints: DR6 then has BS beside the B bits. A fault by
   rule 1 comes first and alone: the step has not been made.
6. The B bit of a slot that was met and is not armed: the CPU is at liberty. Intel says that it may be set, AMD that it
   is not. We leave it clear, and ``at_liberty`` names those bits, so that a comparison can leave them out.
7. Undefined, and not met here: R/W 2 while CR4.DE is clear. Undefined, and met as if LEN were 0: execution with another
   LEN. ``undefined`` names such slots; Linux lets nobody arm one.

The registers know neither ring nor task: whether user mode or the kernel made an access is for the operating system to
tell apart, so ``Armed.user`` and ``Armed.kernel`` leave no trace in them, and ``MemoryAccess.kernel`` does not matter.

What is not here, and belongs to whoever executes instructions: MOV SS and POP SS hold a trap back until after the next
instruction; a repeated string instruction reports after each iteration (ask ``check`` for each; some CPUs delay that of
fast strings); an instruction that faults otherwise reports no data. What an access is to the hardware, where an
instruction's definition leaves it open (masked vector stores, XSAVE, gather), may differ between CPUs.

Intel SDM Vol. 3B, "Breakpoint Field Recognition", "Instruction-Breakpoint Exception Condition", "Data Memory and I/O
Breakpoint Exception Conditions", "Single-Step Exception Condition"; AMD64 APM Vol. 2, "Setting Breakpoints", "Debug
Breakpoint Address Masking".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from msgspec import Struct

from hwbpd.core.model import Access, Piece, Pool
from hwbpd.debug_unit import Armed, MemoryAccess, RegisterFile, Trap, Write
from hwbpd.fields import by_name
from hwbpd_x86 import dr6, dr7
from hwbpd_x86.dr7 import RW, SLOTS, Len, SlotControl
from hwbpd_x86.registers import ADDRESSES, CR4_DE, MASK_BITS, MASKS, Cpu, Registers, masks_of

READ_WRITE = Access.READ | Access.WRITE

_ACCESS_CODE = {Access.EXECUTE: RW.EXECUTE, Access.WRITE: RW.WRITE, READ_WRITE: RW.READ_WRITE}
_LENGTH_CODE = {code.length_bytes: code for code in Len}
_DR6 = by_name(dr6.FIELDS)
_DR7 = by_name(dr7.FIELDS)


class PortAccess(Struct, frozen=True):
    """One access of IN, OUT, INS or OUTS to ports; reads and writes meet the same breakpoints."""

    port: int
    length_bytes: int


class _Slot(Struct, frozen=True):
    """One slot as the comparators see it."""

    control: SlotControl
    address: int
    mask: int  # of DRn_ADDR_MASK; 0 without

    def is_met_by(self, instruction: _Instruction, *, before: bool) -> bool:
        """Whether the condition is met by the fetch (rule 1), or else by what the instruction does (rules 2 and 3)."""
        access = self.control.access
        if before or access == RW.EXECUTE:
            return before and access == RW.EXECUTE and any(map(self._starts, instruction.starts))
        return any(self._touches(first, length) for first, length in instruction.touched[access])

    def _starts(self, address: int) -> bool:
        return (address ^ self.address) & ~self.mask == 0

    def _touches(self, first: int, length_bytes: int) -> bool:
        left_out = (self.control.length.length_bytes - 1) | self.mask
        return any((address ^ self.address) & ~left_out == 0 for address in range(first, first + length_bytes))


class _Instruction:
    """What one instruction accesses, sorted by what it can meet."""

    def __init__(self, accesses: Sequence[MemoryAccess], ports: Sequence[PortAccess], *, has_io: bool) -> None:
        """
        :param has_io: CR4.DE; without it there are no I/O breakpoints.
        """
        written = [(access.address, access.length_bytes) for access in accesses if access.access & Access.WRITE]
        accessed = [(access.address, access.length_bytes) for access in accesses if access.access & READ_WRITE]
        ported = [(port.port, port.length_bytes) for port in ports] if has_io else []
        self.starts = [access.address for access in accesses if access.access & Access.EXECUTE]
        self.touched = {RW.WRITE: written, RW.READ_WRITE: accessed, RW.IO: ported}


class X86DebugUnit:
    """The debug registers of one CPU, as ``hwbpd.debug_unit`` asks for them."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self.registers = Registers(cpu)  # with the faults, rings and aliases that the contract does not know

    def slots(self) -> Mapping[Pool, int]:
        """Four, each for a breakpoint or a watchpoint."""
        return {Pool.ANY: SLOTS}

    def reset(self) -> RegisterFile:
        """The registers after a reset; see registers.py for their names."""
        return self.registers.reset()

    def write(self, file: RegisterFile, register: str, value: int) -> RegisterFile:
        """
        Return the file after a write in ring 0.

        :raises Fault: a ``ValueError`` that names the exception.
        """
        return self.registers.write(file, register, value)

    # --- which accesses trap -----------------------------------------------------------------------------------------

    def check(
        self,
        file: RegisterFile,
        accesses: Sequence[MemoryAccess],
        *,
        ports: Sequence[PortAccess] = (),
        resume: bool = False,
        single_step: bool = False,
    ) -> Trap | None:
        """
        Return the #DB that one instruction raises, or None; ``Trap.status`` is DR6 as the handler reads it.

        The contract's question needs the first two only. The others are what this architecture has besides:

        :param ports: the ports it accesses.
        :param resume: RFLAGS.RF when it starts.
        :param single_step: RFLAGS.TF when it starts.
        """
        if not file["DR7"] & 0xFF and not single_step:
            return None  # nearly always, on nearly every CPU
        instruction = _Instruction(accesses, ports, has_io=bool(file["CR4"] & CR4_DE))
        if not resume and (met := self._met(file, instruction, before=True, armed=True)):
            return self._trap(file, met, before=True)  # its data has not been accessed, and the step not been made
        met = self._met(file, instruction, before=False, armed=True)
        return self._trap(file, met, before=False, step=single_step) if met or single_step else None

    def at_liberty(
        self, file: RegisterFile, accesses: Sequence[MemoryAccess], *, ports: Sequence[PortAccess] = (), before: bool
    ) -> int:
        """
        Return the bits of DR6 that the CPU may or may not set beside those of a #DB: rule 6.

        :param before: whether the #DB came before the instruction.
        """
        instruction = _Instruction(accesses, ports, has_io=bool(file["CR4"] & CR4_DE))
        return sum(_DR6[f"B{n}"].mask for n in self._met(file, instruction, before=before, armed=False))

    def undefined(self, file: RegisterFile) -> frozenset[int]:
        """Return the armed slots of which nobody says what they do: rule 7."""
        return frozenset(
            n
            for n, slot in _slots(file)
            if slot.control.armed
            and (
                (slot.control.access == RW.IO and not file["CR4"] & CR4_DE)
                or (slot.control.access == RW.EXECUTE and slot.control.length != Len.ONE)
                or (slot.control.length == Len.EIGHT and self._cpu.word_bytes < Len.EIGHT.length_bytes)
            )
        )

    def _met(self, file: RegisterFile, instruction: _Instruction, *, before: bool, armed: bool) -> tuple[int, ...]:
        """The slots that are armed, or are not, and whose condition is met."""
        return tuple(
            n
            for n, slot in _slots(file)
            if slot.control.armed == armed and slot.is_met_by(instruction, before=before)
        )

    def _trap(self, file: RegisterFile, met: tuple[int, ...], *, before: bool, step: bool = False) -> Trap:
        reasons = _DR6["BS"].place(step)
        for n in met:
            reasons |= _DR6[f"B{n}"].mask
        status = {"DR6": self.registers.raised(file, reasons)["DR6"]}
        return Trap(tuple((Pool.ANY, n) for n in met), before, status)

    # --- from one register file to another ---------------------------------------------------------------------------

    def plan(self, file: RegisterFile, wanted: Mapping[tuple[Pool, int], Armed]) -> Sequence[Write]:
        """
        Return the writes after which exactly ``wanted`` is armed: DR7, then addresses and masks, then DR7.

        Slots that hold what is wanted are left alone, armed throughout. Slots are armed by G, and GE is set with them,
        as Linux does it; the other bits of DR7 stay. GD is taken to be clear, or the first write traps.

        :raises ValueError: for a piece that no slot of this CPU can hold.
        """
        disarmed = armed = file["DR7"]
        between: list[Write] = []
        for n, slot in _slots(file):
            want = self._slot_for(wanted[Pool.ANY, n].piece) if (Pool.ANY, n) in wanted else None
            if slot.control.armed and want is not None and _alike(slot, want):
                continue
            if slot.control.armed:
                disarmed &= ~_control_mask(n)
                armed &= ~_control_mask(n)
            if want is None:
                continue
            armed = (armed & ~_control_mask(n)) | _control_bits(n, want.control) | _DR7["GE"].mask
            if want.address != slot.address:
                between.append(Write(ADDRESSES[n], want.address))
            if want.mask != slot.mask:
                between.append(Write(MASKS[n], want.mask))
        writes = [Write("DR7", disarmed)] if disarmed != file["DR7"] else []
        writes += between
        if armed != disarmed:
            writes.append(Write("DR7", armed))
        return writes

    def _slot_for(self, piece: Piece) -> _Slot:
        address, length = piece.span.address, piece.span.length_bytes
        if piece.access not in _ACCESS_CODE or not 0 <= address <= self._cpu.word_mask:
            raise ValueError(f"no debug register holds {piece}")
        access = _ACCESS_CODE[piece.access]
        if access == RW.EXECUTE:
            # Its length is Linux's word for a breakpoint, not a span that hardware compares.
            return _Slot(SlotControl(global_=True), address, 0)
        if address % length == 0 and length <= self._cpu.word_bytes and length in _LENGTH_CODE:
            return _Slot(SlotControl(global_=True, access=access, length=_LENGTH_CODE[length]), address, 0)
        if address % length == 0 and self._cpu.masks and length.bit_count() == 1 and length <= 1 << MASK_BITS:
            return _Slot(SlotControl(global_=True, access=access), address, length - 1)
        raise ValueError(f"no debug register holds {piece}")


@lru_cache(maxsize=256)  # a machine asks about the same few words for every access
def _controls(word: int) -> tuple[SlotControl, ...]:
    return dr7.decode(word).slots


def _slots(file: RegisterFile) -> Iterator[tuple[int, _Slot]]:
    for n, (control, mask) in enumerate(zip(_controls(file["DR7"]), masks_of(file), strict=True)):
        yield n, _Slot(control, file[ADDRESSES[n]], mask)


def _alike(slot: _Slot, want: _Slot) -> bool:
    """Whether two armed slots report the same."""
    same_control = (slot.control.access, slot.control.length) == (want.control.access, want.control.length)
    return same_control and slot.address == want.address and slot.mask == want.mask


def _control_bits(n: int, control: SlotControl) -> int:
    return (
        _DR7[f"L{n}"].place(control.local)
        | _DR7[f"G{n}"].place(control.global_)
        | _DR7[f"R/W{n}"].place(control.access)
        | _DR7[f"LEN{n}"].place(control.length)
    )


def _control_mask(n: int) -> int:
    return _DR7[f"L{n}"].mask | _DR7[f"G{n}"].mask | _DR7[f"R/W{n}"].mask | _DR7[f"LEN{n}"].mask
