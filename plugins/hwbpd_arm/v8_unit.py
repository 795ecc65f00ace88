"""
Which accesses trap on arm64, and what ESR_EL1 and FAR_EL1 then say.

The rules, in the order in which an instruction meets them:

1. No slot traps while the OS Lock is set or MDE is clear; none at the kernel's own accesses while KDE is clear.
2. A breakpoint is met by the fetch of an instruction that starts at a byte it selects. The exception is taken before
   the instruction is executed, so its data accesses have not been made and no watchpoint has been met.
3. A watchpoint is met by an access to a byte it watches, of a kind that LSC names. The exception is synchronous and
   taken **before** the access is made: the register or the memory is as it was, and the same instruction meets the same
   slot again unless it is disarmed or stepped over. Of several accesses of one instruction the first one that is met is
   reported; the later ones have not been made.
4. Everything the access meets is in ``Trap.slots``. The hardware does not say which slot it was; an operating system
   works that out (attribution.py).
5. ESR_EL1.EC says breakpoint or watchpoint, from below or from the same level; WnR that it was a write. Of an
   instruction that reads and writes the same place at once (an atomic), WnR is clear if its read would have been
   reported.
6. FAR_EL1 after a watchpoint is an address between the lowest byte of the access and the highest byte of it that is
   watched. We give the lowest byte that is watched, as QEMU does; with ``reports_start`` the lowest byte of the access,
   as some cores do. After a breakpoint FAR_EL1 is not defined, and ``Trap.status`` does not have it; ELR_EL1 has the
   address.
7. The top byte of a user address does not take part in comparisons (TCR_EL1.TBI0, which Linux sets).
8. For whom a slot counts is said by PMC and PAC. A kernel at EL2 (VHE) needs HMC, too; so do our plans there.

Breakpoints for A64 and A32 instructions select all four bytes of a word, and those for T32 a half; where a 4-byte T32
instruction has only its second half selected the architecture is at liberty, and the model does not trap. Nor does it
where PMC and HMC are combined in a way that is reserved.

Not here, because it needs more than registers: software step, which takes precedence over a breakpoint; PSTATE.D; which
accesses an instruction makes (a Store-Exclusive that fails may or may not be met; DC ZVA is a store to its whole block;
other cache maintenance and prefetches meet nothing).

Arm Architecture Reference Manual for A-profile, "Breakpoint exceptions", "Watchpoint exceptions", "Determining the
memory location that caused a Watchpoint exception" and "ESR_EL1, Exception Syndrome Register (EL1)".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from hwbpd.core.model import Access, Pool
from hwbpd.debug_unit import Armed, MemoryAccess, RegisterFile, Trap, Write
from hwbpd.fields import Field, by_name
from hwbpd_arm import bcr, mdscr, plan, wcr
from hwbpd_arm.bcr import Bcr, BreakpointType, Privilege
from hwbpd_arm.contents import instruction_control, levels, watchpoint_contents
from hwbpd_arm.identification import DebugVersion
from hwbpd_arm.mdscr import Mdscr
from hwbpd_arm.plan import Contents, Pair
from hwbpd_arm.wcr import LoadStore, Wcr

READ_WRITE = Access.READ | Access.WRITE

ESR: tuple[Field, ...] = (
    Field("DFSC", 0, 6, "how the access ended: 0x22 by a debug exception"),
    Field("WnR", 6, 1, "a write, not a read"),
    Field("CM", 8, 1, "a cache maintenance instruction"),
    Field("IL", 25, 1, "set for every debug exception but a software breakpoint"),
    Field("EC", 26, 6, "what sort of exception"),
)
_ESR = by_name(ESR)
EC_BREAKPOINT = 0x30  # from below; one more from the same level
EC_WATCHPOINT = 0x34
DEBUG_STATUS = 0x22  # IFSC and DFSC

_TRAPS = mdscr.encode(Mdscr(monitor=True, kernel=True))  # MDE and KDE

ADDRESS_BITS = 49  # VA of the address registers: bit 48 and those below
WORD = 2**64


class Syndrome(Struct, frozen=True):
    """What ESR_EL1 says of a debug exception."""

    watchpoint: bool
    kernel: bool  # taken from the kernel's own level
    write: bool = False


def encode_esr(value: Syndrome) -> int:
    """Return ESR_EL1 for a breakpoint or watchpoint exception."""
    exception = (EC_WATCHPOINT if value.watchpoint else EC_BREAKPOINT) + value.kernel
    return (
        _ESR["EC"].place(exception)
        | _ESR["IL"].place(1)
        | _ESR["WnR"].place(value.write)
        | _ESR["DFSC"].place(DEBUG_STATUS)
    )


def decode_esr(word: int) -> Syndrome | None:
    """Return what ESR_EL1 says; None for an exception that is neither a breakpoint nor a watchpoint."""
    exception = _ESR["EC"].read(word)
    if exception & ~1 not in (EC_BREAKPOINT, EC_WATCHPOINT):
        return None
    watchpoint = exception & ~1 == EC_WATCHPOINT
    return Syndrome(watchpoint, kernel=bool(exception & 1), write=watchpoint and bool(_ESR["WnR"].read(word)))


class Arm64DebugUnit:
    """The debug registers of one arm64 CPU, as ``hwbpd.debug_unit`` asks for them."""

    def __init__(
        self,
        breakpoints: int,
        watchpoints: int,
        *,
        version: int = DebugVersion.V8,
        kernel_el: int = 1,
        reports_start: bool = False,
    ) -> None:
        """
        :param breakpoints: BRPs, 1 to 16.
        :param watchpoints: WRPs, 1 to 16.
        :param kernel_el: the exception level the kernel runs at: 1, or 2 (VHE).
        :param reports_start: rule 6.
        """
        assert kernel_el in (1, 2)
        self._version = version
        self._kernel_el = kernel_el
        self._reports_start = reports_start
        self.breakpoints = tuple(Pair(f"DBGBVR{n}_EL1", f"DBGBCR{n}_EL1") for n in range(breakpoints))
        self.watchpoints = tuple(Pair(f"DBGWVR{n}_EL1", f"DBGWCR{n}_EL1") for n in range(watchpoints))
        self._pairs = (*self.breakpoints, *self.watchpoints)

    def slots(self) -> Mapping[Pool, int]:
        """Breakpoints and watchpoints have registers of their own."""
        return {Pool.INST: len(self.breakpoints), Pool.DATA: len(self.watchpoints)}

    def reset(self) -> RegisterFile:
        """
        The registers after a cold reset: the OS Lock set.

        What the architecture leaves open there, address and control registers among it, is zero.
        """
        file = dict.fromkeys((name for pair in self._pairs for name in (pair.address, pair.control)), 0)
        return {**file, "MDSCR_EL1": mdscr.RESET, "OSLSR_EL1": mdscr.OSLM | mdscr.OSLK}

    def write(self, file: RegisterFile, register: str, value: int) -> RegisterFile:
        """
        Return the file after MSR at the kernel's level; OSLAR_EL1 may be written, and changes OSLSR_EL1.

        :raises ValueError: for a register that is not there, or OSLSR_EL1, which is read only: UNDEFINED.
        """
        value %= WORD
        if register == "OSLAR_EL1":
            locked = mdscr.OSLK if value & mdscr.OS_LOCK else 0
            return {**file, "OSLSR_EL1": file["OSLSR_EL1"] & ~mdscr.OSLK | locked}
        if register == "MDSCR_EL1":
            locked = bool(file["OSLSR_EL1"] & mdscr.OSLK)
            return {**file, register: mdscr.stored(file[register], value, locked=locked)}
        if register not in file or register == "OSLSR_EL1":
            raise ValueError(f"MSR {register}: UNDEFINED")
        if register.startswith("DBGBCR"):
            return {**file, register: bcr.stored(value, self._version)}
        if register.startswith("DBGWCR"):
            return {**file, register: wcr.stored(value, self._version)}
        return {**file, register: stored_address(value)}

    # --- what arms a slot --------------------------------------------------------------------------------------------

    def plan(self, file: RegisterFile, wanted: Mapping[tuple[Pool, int], Armed]) -> Sequence[Write]:
        """
        Return the writes in order; see plan.py.

        :raises ValueError: for a piece that no slot of that pool can hold.
        """
        contents = {
            self._pair(pool, number): self._contents(pool, armed)
            for (pool, number), armed in wanted.items()
            if armed.user or armed.kernel  # a slot for nobody's accesses stays disarmed
        }
        common: dict[str, int] = {}
        if contents and file["OSLSR_EL1"] & mdscr.OSLK:
            common["OSLAR_EL1"] = 0
        held = file["MDSCR_EL1"]
        kernel = any(armed.kernel for armed in wanted.values())
        traps = held & ~_TRAPS | mdscr.encode(Mdscr(monitor=bool(contents), kernel=kernel))
        if traps != held:
            common["MDSCR_EL1"] = traps
        return plan.writes(file, self._pairs, contents, common)

    def _pair(self, pool: Pool, number: int) -> Pair:
        return (self.breakpoints if pool == Pool.INST else self.watchpoints)[number]

    def _contents(self, pool: Pool, armed: Armed) -> Contents:
        span, access = armed.piece.span, armed.piece.access
        privilege = levels(armed)
        higher = self._kernel_el == 2 and armed.kernel
        if pool == Pool.INST:
            control = instruction_control(span, access, privilege, higher_modes=higher)
            return Contents(stored_address(span.address), bcr.stored(bcr.encode(control), self._version))
        address, watch = watchpoint_contents(span, access, privilege, lanes=8, higher_modes=higher)
        return Contents(stored_address(address), wcr.stored(wcr.encode(watch), self._version))

    # --- what traps --------------------------------------------------------------------------------------------------

    def check(self, file: RegisterFile, accesses: Sequence[MemoryAccess]) -> Trap | None:
        """Return the exception that one instruction raises, or None: rules 1 to 6."""
        enabled = mdscr.decode(file["MDSCR_EL1"])
        if not enabled.monitor or file["OSLSR_EL1"] & mdscr.OSLK:
            return None
        for access in accesses:
            if access.kernel and not enabled.kernel:
                continue
            if trap := self._fetched(file, access) or self._accessed(file, access):
                return trap
        return None

    def _fetched(self, file: RegisterFile, access: MemoryAccess) -> Trap | None:
        if Access.EXECUTE not in access.access:
            return None
        address = _comparable(access.address)
        met = []
        for number, pair in enumerate(self.breakpoints):
            control = bcr.decode(file[pair.control])
            if not control.enabled or not self._selects(control, access.kernel):
                continue
            if _starts(control, file[pair.address], address):
                met.append((Pool.INST, number))
        if not met:
            return None
        return Trap(tuple(met), before=True, status={"ESR_EL1": encode_esr(Syndrome(False, access.kernel))})

    def _accessed(self, file: RegisterFile, access: MemoryAccess) -> Trap | None:
        met: list[tuple[Pool, int]] = []
        lowest: list[int] = []
        is_read = False
        for number, control, address in self._watching(file, access):
            byte = next((n for n in range(access.length_bytes) if _at(control, address, access.address + n)), None)
            if byte is not None:
                met.append((Pool.DATA, number))
                lowest.append(byte)
                is_read |= Access.READ in access.access and LoadStore.LOAD in control.load_store
        if not met:
            return None
        reported = access.address + (0 if self._reports_start else min(lowest))
        syndrome = Syndrome(True, access.kernel, write=not is_read)
        status = {"ESR_EL1": encode_esr(syndrome), "FAR_EL1": reported % WORD}
        return Trap(tuple(met), before=True, status=status)

    def _watching(self, file: RegisterFile, access: MemoryAccess) -> Iterator[tuple[int, Wcr, int]]:
        """The armed watchpoints that count accesses of this kind, whatever the address."""
        kind = LoadStore.LOAD if Access.READ in access.access else LoadStore(0)
        if Access.WRITE in access.access:
            kind |= LoadStore.STORE
        for number, pair in enumerate(self.watchpoints):
            control = wcr.decode(file[pair.control])
            if control.enabled and control.load_store & kind and self._selects(control, access.kernel):
                yield number, control, file[pair.address]

    def _selects(self, control: Bcr | Wcr, kernel: bool) -> bool:
        """Rule 8. HMC without EL1's own bit is a reserved combination, and disables the slot."""
        if not control.is_simulated or (isinstance(control, Bcr) and control.type != BreakpointType.ADDRESS):
            return False
        if control.higher_modes and Privilege.KERNEL not in control.privilege:
            return False
        if not kernel:
            return Privilege.USER in control.privilege
        if self._kernel_el == 2:
            return control.higher_modes
        return Privilege.KERNEL in control.privilege


def stored_address(written: int) -> int:
    """Return what DBGBVR or DBGWVR hold after a write: no bits below a word, and the sign above bit 48."""
    kept = written & (1 << ADDRESS_BITS) - 1 & ~0b11
    return kept | (WORD - (1 << ADDRESS_BITS) if kept >> ADDRESS_BITS - 1 else 0)


def _comparable(address: int) -> int:
    """Rule 7: the address with the sign that bit 55 gives in place of its top byte."""
    kept = address & (1 << 56) - 1
    return kept | (WORD - (1 << 56) if kept >> 55 else 0)


def _starts(control: Bcr, held: int, address: int) -> bool:
    return address // 4 == held // 4 and bool(control.byte_select >> address % 4 & 1)


def _at(control: Wcr, held: int, byte: int) -> bool:
    return wcr.watches(control, held, _comparable(byte % WORD))
