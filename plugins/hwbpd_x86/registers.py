"""
The debug registers of one CPU: what is there, what a MOV or WRMSR to one leaves in it, and when it faults instead.

    DR0-DR3          linear addresses; every bit is kept, canonical or not
    DR4, DR5         no registers: other names of DR6 and DR7 while CR4.DE is clear
    DR6, DR7         status and control: dr6.py, dr7.py
    DRn_ADDR_MASK    AMD's address masks, one MSR for each slot (0xc0011027 of DR0, 0xc0011019 to 0xc001101b of the
                     others): ones for the bits that its comparison leaves out
    CR4.DE           "debugging extensions"; of CR4 only this bit is modelled, and kept in its place

The rules for a MOV to or from a debug register, in the order in which they are tried; the first that applies wins:

1. Outside ring 0 every MOV raises #GP(0). That is why a debugger has to ask the kernel. The manuals do not rank this
   rule and the next; AMD's CPUs try it first.
2. DR4 and DR5 raise #UD while CR4.DE is set, and mean DR6 and DR7 while it is clear.
3. While DR7.GD is set, every MOV raises #DB with DR6.BD before it does anything, reads too. GD is cleared on entry to
   the handler of any #DB, so the handler itself may use the registers.
4. A one in the upper half of DR6 or DR7 raises #GP(0). On a 32-bit CPU there is no upper half.
5. Otherwise the register holds what was written, reserved bits as they read. The polarity of what came later follows
   the CPU's features: RTM in DR6 and DR7, BLD in DR6; see dr6.py, rules 1 and 2.

The masks are MSRs, so of these rules only that of ring 0 concerns them, and GD does not; their upper halves are
reserved, and a one there raises #GP(0). They exist where CPUID says so, for which Linux has the name "bpext". To
hardware a mask is good for execution as well as for data. Linux uses them for data only: see linux.py.

What a #DB leaves in DR6: the reasons are added to those that nobody has cleared, but B0-B3 are written anew by each
breakpoint and by each general detect (AMD); Intel says that some exceptions may clear them, and nothing else does.

What is not here: DEBUGCTL (BTF, the bus-lock trap, RTM), the LBRs, and what INIT keeps. A MOV in 32-bit mode on a
64-bit CPU zeroes the upper half; ``write`` is the MOV of the CPU's widest mode.

Intel SDM Vol. 3B, "Debug Registers" and its parts, "Debug Exception (#DB): Interrupt Vector 1"; Vol. 2B, "MOV: Move
to/from Debug Registers". AMD64 APM Vol. 2, "Debug Registers", "Debug Breakpoint Address Masking".
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from hwbpd.debug_unit import RegisterFile
from hwbpd.fields import by_name, mask_of
from hwbpd.hookspecs import CpuFacts
from hwbpd_x86 import dr6, dr7
from hwbpd_x86.dr7 import SLOTS

ADDRESSES = tuple(f"DR{n}" for n in range(SLOTS))
MASKS = tuple(f"DR{n}_ADDR_MASK" for n in range(SLOTS))
MASK_BITS = 32

CR4_DE = 1 << 3

_DR6 = by_name(dr6.FIELDS)
_DR7 = by_name(dr7.FIELDS)
_BREAKPOINTS = mask_of(dr6.FIELDS[:SLOTS])  # B0-B3
_ALIASES = {"DR4": "DR6", "DR5": "DR7"}


class Fault(ValueError):
    """The exception that hardware raises instead of the access; nothing was changed."""

    def __init__(self, vector: str, why: str) -> None:
        super().__init__(f"{vector}: {why}")
        self.vector = vector  # "#UD", "#GP(0)", "#DB"


class Cpu(Struct, frozen=True):
    """What of a CPU decides about its debug registers."""

    word_bytes: int = 8
    rtm: bool = False
    bus_lock: bool = False  # it can trap on bus locks
    masks: bool = False

    @property
    def word_mask(self) -> int:
        return (1 << 8 * self.word_bytes) - 1


def cpu_of(facts: CpuFacts) -> Cpu:
    """Return what the facts, by the names of /proc/cpuinfo, say of the debug registers."""
    return Cpu(
        word_bytes=8 if facts.architecture == "x86_64" else 4,
        rtm="rtm" in facts.features,
        bus_lock="bus_lock_detect" in facts.features,
        masks="bpext" in facts.features,
    )


class Registers:
    """The rules above for one kind of CPU."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def reset(self) -> RegisterFile:
        """The registers after a reset. Linux sets CR4.DE at boot; here it is clear, as the CPU comes."""
        masks = dict.fromkeys(MASKS, 0) if self._cpu.masks else {}
        return {**dict.fromkeys(ADDRESSES, 0), "DR6": dr6.RESET, "DR7": dr7.RESET, "CR4": 0, **masks}

    def write(self, file: RegisterFile, register: str, value: int) -> RegisterFile:
        """
        Return the file after a write in ring 0: a MOV, or a WRMSR for a mask.

        :param register: a key of the file, "DR4" or "DR5".
        :raises Fault: where hardware raises an exception instead.
        :raises KeyError: for a register that this CPU does not have.
        """
        assert 0 <= value <= self._cpu.word_mask, f"{register} has {8 * self._cpu.word_bytes} bits: {value:#x}"
        if register == "CR4":
            return {**file, "CR4": value & CR4_DE}
        if register in MASKS:
            if register not in file:
                raise KeyError(register)
            if value >> MASK_BITS:
                raise Fault("#GP(0)", f"{register} has {MASK_BITS} bits")
            return {**file, register: value}
        number = int(register.removeprefix("DR"))
        return self.move_to(file, number, value)

    def move_to(self, file: RegisterFile, number: int, value: int, *, cpl: int = 0) -> RegisterFile:
        """
        Return the file after ``mov value, %drN``.

        :param number: 0 to 7.
        :param cpl: the ring it is executed in.
        :raises Fault: by rules 1 to 4.
        """
        register = self._accessed(file, number, cpl)
        if register in ADDRESSES:
            return {**file, register: value}
        faults = dr6.faults if register == "DR6" else dr7.faults
        if faults(value):
            raise Fault("#GP(0)", f"the upper half of {register} must be zero")  # rule 4
        return {**file, register: self._stored(register, value)}

    def move_from(self, file: RegisterFile, number: int, *, cpl: int = 0) -> int:
        """
        Return what ``mov %drN, ...`` reads.

        :raises Fault: by rules 1 to 3.
        """
        return file[self._accessed(file, number, cpl)]

    def raised(self, file: RegisterFile, reasons: int) -> RegisterFile:
        """
        Return the file as the handler of a #DB finds it: the reasons in DR6, and GD clear.

        :param reasons: in the positive form of DR6; BD when rule 3 is why.
        """
        held = dr6.to_positive(file["DR6"])
        if reasons & (_BREAKPOINTS | _DR6["BD"].mask):
            held &= ~_BREAKPOINTS
        status = self._stored("DR6", dr6.to_hardware(held | reasons))
        return {**file, "DR6": status, "DR7": file["DR7"] & ~_DR7["GD"].mask}

    def _accessed(self, file: RegisterFile, number: int, cpl: int) -> str:
        register = f"DR{number}"
        if cpl > 0:  # rule 1
            raise Fault("#GP(0)", f"{register} is for ring 0, and this is ring {cpl}")
        if register in _ALIASES:  # rule 2
            if file["CR4"] & CR4_DE:
                raise Fault("#UD", f"{register} is reserved while CR4.DE is set")
            register = _ALIASES[register]
        if file["DR7"] & _DR7["GD"].mask:  # rule 3
            raise Fault("#DB", "DR7.GD guards the debug registers; DR6.BD says so")
        return register

    def _stored(self, register: str, value: int) -> int:
        """Rule 5."""
        if register == "DR6":
            return dr6.stored(value, rtm=self._cpu.rtm, bus_lock=self._cpu.bus_lock)
        return dr7.stored(value, rtm=self._cpu.rtm)


def masks_of(file: Mapping[str, int]) -> tuple[int, ...]:
    """Return the address masks of the slots, by number; zeros where the CPU has none."""
    return tuple(file.get(register, 0) for register in MASKS)
