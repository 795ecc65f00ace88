"""
Which accesses trap on ARMv7 (and in the AArch32 state of Armv8 under a 32-bit kernel), and what is then known of it.

The rules, in the order in which an instruction meets them:

1. No slot traps but in monitor debug-mode (dscr.py), nor while the OS Lock is set.
2. A breakpoint is met by the fetch of an instruction that starts at a byte it selects; a **mismatch** breakpoint by
   that of any other. It is a Prefetch Abort, before the instruction is executed, with MOE 1. IFAR is not defined then.
3. A mismatch breakpoint that would trap in the kernel's modes is UNPREDICTABLE, for there it could stop the handler
   itself; it is ignored here. Linux uses them for user mode only.
4. A watchpoint is met by an access to a byte it watches, of a kind that LSC names. It is a Data Abort, synchronous,
   taken **before** the access is made, with MOE 10. Of several accesses of one instruction the first one that is met
   counts.
5. Where it was is in DFAR since v7.1, as exact as FAR_EL1 on arm64 (see v8_unit.py, rule 6). **Before v7.1 DFAR is not
   defined**, and ``Trap.status`` does not have it: with more than one watchpoint nobody could tell them apart.
6. Whether it was a read or a write is in DFSR.WnR since Armv8 only; ``Trap.status`` has "DFSR.WnR" there.

Asynchronous watchpoints (MOE 2), which report after the access and possibly instructions later, were left open to CPUs
before v7.1; not simulated. Nor is DBGWFAR, the address of the instruction, which Linux does not read.

``slots`` has what Linux hands out: all BRPs but the last where there are mismatch breakpoints, for that one is reserved
for stepping (stepping.py); and one WRP before v7.1, by rule 5. The register file has all of them.

Arm Architecture Reference Manual, ARMv7-A and ARMv7-R edition, "Breakpoint debug events", "Watchpoint debug events",
"Debug exceptions" and "Method of Debug entry"; Linux, arch/arm/kernel/hw_breakpoint.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hwbpd.core.model import Access, Pool
from hwbpd.debug_unit import Armed, MemoryAccess, RegisterFile, Trap, Write
from hwbpd_arm import bcr, dscr, plan, wcr
from hwbpd_arm.bcr import Bcr, BreakpointType, Privilege
from hwbpd_arm.contents import instruction_control, levels, watchpoint_contents
from hwbpd_arm.dscr import Dscr, MethodOfEntry
from hwbpd_arm.identification import DebugVersion
from hwbpd_arm.linux import usable_v7
from hwbpd_arm.plan import Contents, Pair
from hwbpd_arm.wcr import LoadStore, Wcr

WORD = 2**32
_MONITOR = dscr.encode(Dscr(monitor=True))


class Armv7DebugUnit:
    """The debug registers of one CPU as a 32-bit kernel has them, as ``hwbpd.debug_unit`` asks for them."""

    def __init__(
        self,
        breakpoints: int,
        watchpoints: int,
        *,
        version: int = DebugVersion.V7_1,
        lanes: int = 8,
        permitted: bool = True,
        reports_start: bool = False,
    ) -> None:
        """
        :param breakpoints: BRPs, 2 to 16, the reserved one included.
        :param watchpoints: WRPs, 1 to 16.
        :param lanes: how many bytes BAS of a watchpoint can select: 8, or 4 on some CPUs before v7.1.
        :param permitted: whether the CPU's debug signals allow monitor debug-mode.
        :param reports_start: whether DFAR is where the access starts, not its first byte that is watched.
        """
        assert lanes in (4, 8)
        self._version = version
        self._lanes = lanes
        self._permitted = permitted
        self._reports_start = reports_start
        self.breakpoints = tuple(Pair(f"DBGBVR{n}", f"DBGBCR{n}") for n in range(breakpoints))
        self.watchpoints = tuple(Pair(f"DBGWVR{n}", f"DBGWCR{n}") for n in range(watchpoints))
        self._pairs = (*self.breakpoints, *self.watchpoints)
        usable = usable_v7(breakpoints, watchpoints, version)
        self._slots = {Pool.INST: usable.breakpoints, Pool.DATA: usable.watchpoints}
        self._has_os_lock = version >= DebugVersion.V7_1

    def slots(self) -> Mapping[Pool, int]:
        """What Linux hands out."""
        return self._slots

    @property
    def reserved(self) -> Pair | None:
        """The BRP that Linux keeps for stepping past watchpoints; None where there is none."""
        usable = self._slots[Pool.INST]
        return self.breakpoints[usable] if usable < len(self.breakpoints) else None

    def reset(self) -> RegisterFile:
        """
        The registers after a reset: monitor debug-mode off and the OS Lock, where there is one, set.

        What the architecture leaves open there, address and control registers among it, is zero.
        """
        file = dict.fromkeys((name for pair in self._pairs for name in (pair.address, pair.control)), 0)
        file["DBGDSCR"] = 0
        return {**file, "DBGOSLSR": dscr.OSLM | dscr.OSLK} if self._has_os_lock else file

    def write(self, file: RegisterFile, register: str, value: int) -> RegisterFile:
        """
        Return the file after MCR in the kernel's modes; DBGOSLAR may be written, and changes DBGOSLSR.

        :raises ValueError: for a register that is not there, or DBGOSLSR, which is read only: UNDEFINED.
        """
        value %= WORD
        if register == "DBGOSLAR" and self._has_os_lock:
            locked = dscr.OSLK if value == dscr.OS_LOCK_KEY else 0
            return {**file, "DBGOSLSR": file["DBGOSLSR"] & ~dscr.OSLK | locked}
        if register == "DBGDSCR":
            return {**file, register: dscr.stored(file[register], value, permitted=self._permitted)}
        if register not in file or register == "DBGOSLSR":
            raise ValueError(f"MCR {register}: UNDEFINED")
        if register.startswith("DBGBCR"):
            return {**file, register: bcr.stored(value, self._version)}
        if register.startswith("DBGWCR"):
            return {**file, register: wcr.stored(value, self._version, lanes=self._lanes)}
        return {**file, register: value & ~0b11}

    # --- what arms a slot --------------------------------------------------------------------------------------------

    def plan(self, file: RegisterFile, wanted: Mapping[tuple[Pool, int], Armed]) -> Sequence[Write]:
        """
        Return the writes in order; see plan.py. The reserved BRP ends disarmed.

        MDBGen is left set when nothing is wanted any more, as Linux does: it sets it once, when the CPU comes up.

        :raises ValueError: for a piece that no slot of that pool can hold, and while HDBGen is set: then the CPU halts
            for an external debugger, and whatever is armed raises no exception.
        """
        contents = {
            self._pair(pool, number): self._contents(pool, armed)
            for (pool, number), armed in wanted.items()
            if armed.user or armed.kernel  # a slot for nobody's accesses stays disarmed
        }
        if contents and dscr.decode(file["DBGDSCR"]).halting:
            raise ValueError("DBGDSCR.HDBGen is set, and no slot raises an exception")
        common: dict[str, int] = {}
        if contents and self._is_locked(file):
            common["DBGOSLAR"] = 0
        if contents and not dscr.decode(file["DBGDSCR"]).monitor:
            common["DBGDSCR"] = file["DBGDSCR"] | _MONITOR
        return plan.writes(file, self._pairs, contents, common)

    def _pair(self, pool: Pool, number: int) -> Pair:
        if not 0 <= number < self._slots.get(pool, 0):
            raise ValueError(f"no slot {number} in pool {pool}")
        return (self.breakpoints if pool == Pool.INST else self.watchpoints)[number]

    def _contents(self, pool: Pool, armed: Armed) -> Contents:
        span, access = armed.piece.span, armed.piece.access
        if pool == Pool.INST:
            control = instruction_control(span, access, levels(armed))
            return Contents(span.address & ~0b11, bcr.encode(control))
        address, watch = watchpoint_contents(span, access, levels(armed), lanes=self._lanes, prefers_words=True)
        return Contents(address, wcr.encode(watch))

    # --- what traps --------------------------------------------------------------------------------------------------

    def check(self, file: RegisterFile, accesses: Sequence[MemoryAccess]) -> Trap | None:
        """Return the exception that one instruction raises, or None: rules 1 to 6."""
        if not dscr.decode(file["DBGDSCR"]).takes_exceptions or self._is_locked(file):
            return None
        for access in accesses:
            if trap := self._fetched(file, access) or self._accessed(file, access):
                return trap
        return None

    def _is_locked(self, file: RegisterFile) -> bool:
        return bool(file.get("DBGOSLSR", 0) & dscr.OSLK)

    def _fetched(self, file: RegisterFile, access: MemoryAccess) -> Trap | None:
        if Access.EXECUTE not in access.access:
            return None
        met = []
        for number, pair in enumerate(self.breakpoints):
            control = bcr.decode(file[pair.control])
            if control.enabled and _traps(control, file[pair.address], access.address % WORD, kernel=access.kernel):
                met.append((Pool.INST, number))
        return Trap(tuple(met), before=True, status={"DBGDSCR.MOE": MethodOfEntry.BREAKPOINT}) if met else None

    def _accessed(self, file: RegisterFile, access: MemoryAccess) -> Trap | None:
        met: list[tuple[Pool, int]] = []
        lowest: list[int] = []
        is_read = False
        for number, control, address in self._watching(file, access):
            touched = range(access.address, access.address + access.length_bytes)
            byte = next((byte for byte in touched if wcr.watches(control, address, byte % WORD)), None)
            if byte is not None:
                met.append((Pool.DATA, number))
                lowest.append(byte)
                is_read |= Access.READ in access.access and LoadStore.LOAD in control.load_store
        if not met:
            return None
        status: dict[str, int] = {"DBGDSCR.MOE": MethodOfEntry.SYNCHRONOUS_WATCHPOINT}
        if self._version >= DebugVersion.V7_1:
            status["DFAR"] = (access.address if self._reports_start else min(lowest)) % WORD
        if self._version >= DebugVersion.V8:
            status["DFSR.WnR"] = int(not is_read)
        return Trap(tuple(met), before=True, status=status)

    def _watching(self, file: RegisterFile, access: MemoryAccess) -> Iterator[tuple[int, Wcr, int]]:
        """The armed watchpoints that count accesses of this kind, whatever the address."""
        kind = LoadStore.LOAD if Access.READ in access.access else LoadStore(0)
        if Access.WRITE in access.access:
            kind |= LoadStore.STORE
        whose = Privilege.KERNEL if access.kernel else Privilege.USER
        for number, pair in enumerate(self.watchpoints):
            control = wcr.decode(file[pair.control])
            if control.enabled and control.is_simulated and control.load_store & kind and whose & control.privilege:
                yield number, control, file[pair.address]


def _traps(control: Bcr, held: int, address: int, *, kernel: bool) -> bool:
    """Whether a fetch meets a breakpoint: rules 2 and 3. PMC 0 stands for User, System and Supervisor modes
    together."""
    whose = Privilege.KERNEL if kernel else Privilege.USER
    if not control.is_simulated or (control.privilege and whose not in control.privilege):
        return False
    if control.mask:
        if control.mask < wcr.MASK_MIN:
            return False  # reserved
        selected = address >> control.mask == held >> control.mask
    else:
        selected = address // 4 == held // 4 and bool(control.byte_select >> address % 4 & 1)
    if control.type == BreakpointType.MISMATCH:
        return not selected and not kernel
    return selected
