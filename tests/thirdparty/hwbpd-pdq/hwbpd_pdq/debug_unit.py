"""
What the debug registers of a PDQ-1 do: which accesses trap, when, and with what status.

    DCTL           arms the slots; control.py
    DLINE0-DLINE2  the lines that the watchpoints watch: 16 bytes each, so the low four bits read as zero
    DMASK0-DMASK2  a bit for every byte of the line, the lowest first: **ones for those that are left out**
    DINST          the address of the breakpoint; bit 0 reads as zero
    DSTAT          written by an exception only: bit n for watchpoint n, bit 3 for the breakpoint, bit 4 for a write

The rules:

1. The registers of an armed slot are locked: writing its DLINE, DMASK or DINST raises an exception. So a slot is
   disarmed before it is moved.
2. The breakpoint is met by the fetch of the instruction at its address, before that is executed.
3. A watchpoint is met by an access that it reports to a byte that its mask does not leave out. **The exception comes
   before the access**; of the accesses of an instruction the first that is met counts.
4. One exception tells of all slots that the access meets, in DSTAT, and of the address of the access, in DADDR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hwbpd.core.model import Access, Pool
from hwbpd.debug_unit import Armed, MemoryAccess, RegisterFile, Trap, Write
from hwbpd_pdq.control import FIELD, FIXED_ONE, name_of, slot_mask, stored

LINE_BYTES = 16
INSTRUCTION_BYTES = 2
ADDRESSES_END = 2**32
READ_WRITE = Access.READ | Access.WRITE
DATA = (Access.READ, Access.WRITE, READ_WRITE)

_WHOLE_MASK = (1 << LINE_BYTES) - 1
_STATUS_BREAKPOINT, _STATUS_WRITE = 1 << 3, 1 << 4


class PdqDebugUnit:
    """The debug registers of one CPU, as ``hwbpd.debug_unit`` asks for them."""

    def __init__(self, watchpoints: int) -> None:
        """
        :param watchpoints: 1 to 3.
        """
        self._watchpoints = watchpoints

    def slots(self) -> Mapping[Pool, int]:
        """One breakpoint, and the watchpoints."""
        return {Pool.INST: 1, Pool.DATA: self._watchpoints}

    def reset(self) -> RegisterFile:
        """Everything zero, but for what reads as one."""
        numbered = {f"{name}{n}": 0 for n in range(self._watchpoints) for name in ("DLINE", "DMASK")}
        return {"DCTL": FIXED_ONE, "DINST": 0, "DSTAT": 0, **numbered}

    def write(self, file: RegisterFile, register: str, value: int) -> RegisterFile:
        """
        Return the file after a write by the supervisor.

        :raises ValueError: for a register that is not there or is read only, and for rule 1.
        """
        if register == "DCTL":
            return {**file, register: stored(value, self._watchpoints)}
        if register not in file or register == "DSTAT":
            raise ValueError(f"{register}: illegal instruction")
        slot = "I" if register == "DINST" else register[-1]
        if _is_armed(file["DCTL"], slot):
            raise ValueError(f"{register}: locked, as its slot is armed")
        kept = {"DLINE": ADDRESSES_END - LINE_BYTES, "DMASK": _WHOLE_MASK, "DINST": ADDRESSES_END - INSTRUCTION_BYTES}
        return {**file, register: value & kept[register[:5]]}

    def plan(self, file: RegisterFile, wanted: Mapping[tuple[Pool, int], Armed]) -> Sequence[Write]:
        """
        Return the writes in order: DCTL without the slots that change, their other registers, DCTL with them.

        :raises ValueError: for a piece that no slot of that pool can hold.
        """
        before = without = after = file["DCTL"]
        between: list[Write] = []
        for pool, count in self.slots().items():
            for number in range(count):
                slot = name_of((pool, number))
                want = wanted.get((pool, number))
                control, registers = (0, {}) if want is None else _contents(slot, want)
                stays = all(file[register] == value for register, value in registers.items())
                if before & slot_mask(slot) == control and stays:
                    continue
                without &= ~slot_mask(slot)
                after = after & ~slot_mask(slot) | control
                between += [Write(register, value) for register, value in registers.items() if file[register] != value]
        writes = [Write("DCTL", without)] if without != before else []
        writes += between
        return [*writes, Write("DCTL", after)] if after != without else writes

    def check(self, file: RegisterFile, accesses: Sequence[MemoryAccess]) -> Trap | None:
        """Return the exception that one instruction raises, or None: rules 2 to 4."""
        for access in accesses:
            if met := self._met(file, access):
                status = _STATUS_WRITE if Access.WRITE in access.access else 0
                for pool, number in met:
                    status |= _STATUS_BREAKPOINT if pool == Pool.INST else 1 << number
                return Trap(met, before=True, status={"DSTAT": status, "DADDR": access.address % ADDRESSES_END})
        return None

    def _met(self, file: RegisterFile, access: MemoryAccess) -> tuple[tuple[Pool, int], ...]:
        level = "S" if access.kernel else "U"
        if Access.EXECUTE in access.access:
            is_met = FIELD[f"{level}I"].read(file["DCTL"]) and access.address == file["DINST"]
            return ((Pool.INST, 0),) if is_met else ()
        return tuple(
            (Pool.DATA, n)
            for n in range(self._watchpoints)
            if FIELD[f"{level}{n}"].read(file["DCTL"])
            and _reported(file["DCTL"], n) & access.access
            and any(_watches(file, n, access.address + byte) for byte in range(access.length_bytes))
        )


def _is_armed(control: int, slot: str) -> bool:
    """Rules 2 and 3 of control.py."""
    for_somebody = FIELD[f"U{slot}"].read(control) or FIELD[f"S{slot}"].read(control)
    return bool(for_somebody) and (slot == "I" or bool(_reported(control, int(slot))))


def _reported(control: int, n: int) -> Access:
    return Access(Access.READ.value * FIELD[f"R{n}"].read(control) | Access.WRITE.value * FIELD[f"W{n}"].read(control))


def _watches(file: RegisterFile, n: int, byte: int) -> bool:
    return byte - byte % LINE_BYTES == file[f"DLINE{n}"] and not file[f"DMASK{n}"] >> byte % LINE_BYTES & 1


def _contents(slot: str, want: Armed) -> tuple[int, Mapping[str, int]]:
    """The bits of DCTL for a slot, and what its other registers hold."""
    span, access = want.piece.span, want.piece.access
    control = FIELD[f"U{slot}"].place(want.user) | FIELD[f"S{slot}"].place(want.kernel)
    if slot == "I":
        if access != Access.EXECUTE or span.address % INSTRUCTION_BYTES:
            raise ValueError(f"the breakpoint cannot hold {want.piece}")
        return control, {"DINST": span.address}
    offset = span.address % LINE_BYTES
    if access not in DATA or not 1 <= span.length_bytes <= LINE_BYTES - offset:
        raise ValueError(f"no watchpoint can hold {want.piece}")
    control |= FIELD[f"R{slot}"].place(Access.READ in access) | FIELD[f"W{slot}"].place(Access.WRITE in access)
    watched = ((1 << span.length_bytes) - 1) << offset
    return control, {f"DLINE{slot}": span.address - offset, f"DMASK{slot}": _WHOLE_MASK & ~watched}
