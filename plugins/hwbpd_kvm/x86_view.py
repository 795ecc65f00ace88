"""
What KVM on x86 makes of one vCPU's debug registers, as user space sees it. Pure.

Two parties have a set of DR0-DR7 each: the **guest**, by MOV and through KVM_GET/SET_DEBUGREGS; and the **VMM**, whose
set comes with KVM_SET_GUEST_DEBUG and never shows in the guest's. Who is told of a debug exception, and with what,
depends on how the guest's instructions are executed, and there are two ways:

- **by the CPU**: the effective set is in the real registers, which is the VMM's while it debugs with hardware
  breakpoints and the guest's otherwise. Any #DB leaves the guest first, and KVM passes it to the VMM while that debugs.
- **by KVM's emulator**, which is the slow path of every KVM, and on hosts without hardware virtualisation of their own
  (PVM) the only one for ring 0. It looks at both sets, compares addresses by itself, and knows no data breakpoints.

The rules, with the tags that the code bears:

 1. KVM_SET_DEBUGREGS stores words as they are. Only flags, and a one in the upper half of DR6 or DR7, are refused.
 2. A MOV keeps the bits that KVM knows and forces the reserved ones. Bit 11 of DR7 (RTM) is kept on every CPU.
 3. Without ENABLE, KVM_SET_GUEST_DEBUG forgets all flags, the rest of the word unseen. No flag is refused.
 4. INJECT_DB and INJECT_BP queue an exception once, EBUSY if one waits; they need no ENABLE. DR6 is not touched by it.
 5. MOV DR: ring 3 gets #GP. Then the emulator looks at the upper half of what is written to DR6 and DR7 (#GP), at
    DR8 to DR15 and, with CR4.DE, DR4 and DR5 (#UD), and last at GD; an upper half by the name of DR4 or DR5 passes,
    and the write is dropped. The CPU looks at #UD, GD, and the upper half, by either name.
 6. GD of the effective DR7 on the CPU: the VMM is told if the set is the VMM's. The emulator heeds the guest's only.
 7. Breakpoints come before the instruction. The emulator tries the VMM's first, then the guest's unless RF is set.
 8. A breakpoint needs L or G, R/W 0 and LEN 0, and the same address, of 64 bits.
 9. Data breakpoints come after the instruction, on the CPU only; the address is compared as LEN says.
10. Single step comes after the instruction: the VMM's, or else the guest's. While the VMM's is on, KVM_GET_REGS shows
    no TF, whoever has set it, and what completes or faults loses it; so the guest's own is gone when the VMM stops
    stepping. At the very RIP where stepping was asked for, TF is set besides, and the frame of an exception that comes
    there shows it to the guest.
11. A #DB for the guest clears B0-B3 and bit 12 of DR6, sets the reserved ones and the reason, and leaves BD, BS and BT
    of earlier ones. It clears GD. For a breakpoint the CPU sets RF in the frame; the emulator leaves it as it was, so
    that the guest meets the breakpoint again unless its handler sets RF.
12. Any other fault sets RF in its frame. An instruction that completes clears RF.
13. What the VMM is told: the reserved ones of DR6 with the reason alone, never what was in DR6 before; DR7 of the
    effective set from the CPU, and 0 from the emulator, which leaves that field alone.

Not modelled: encrypted guests, whose debug registers KVM does not see; transactions and bus locks, which need a CPUID
that offers them; nested guests; pending traps under a MOV SS or STI shadow.

Linux, arch/x86/kvm/x86.c, emulate.c, vmx/vmx.c and svm/svm.c; Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import enum
import errno
from typing import Final, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from hwbpd_kvm.vcpu import DebugExit, DebugRegisters, GuestDebug

Four = tuple[int, int, int, int]

DB: Final = 1
BP: Final = 3
UD: Final = 6
GP: Final = 13

TF: Final = 1 << 8
RF: Final = 1 << 16

DR6_RESET: Final = 0xFFFF_0FF0
DR7_RESET: Final = 0x400
BD: Final = 1 << 13
BS: Final = 1 << 14
GD: Final = 1 << 13

_DR6_KEPT: Final = 0x0000_E00F  # BT, BS, BD, B0-B3: what a guest without RTM and bus-lock traps can change
_DR7_KEPT: Final = 0xFFFF_2BFF
_HIT: Final = 0xF
_DR6_BIT_12: Final = 1 << 12
_UPPER_HALF: Final = 0xFFFF_FFFF_0000_0000
_WORD: Final = 0xFFFF_FFFF
_INJECT: Final = GuestDebug.INJECT_DB | GuestDebug.INJECT_BP
_STOPS: Final = GuestDebug.SINGLE_STEP | GuestDebug.HARDWARE_BREAKPOINTS

_EXECUTE, _WRITE, _READ_WRITE = 0, 1, 3  # R/W
_LENGTHS: Final = (1, 2, 8, 4)  # by LEN


class Execution(enum.Enum):
    """What executes the guest's instructions."""

    CPU = "the CPU"
    EMULATOR = "KVM's emulator"


class View(Struct, frozen=True):
    """The debug state of one vCPU. The default is the state after a reset."""

    db: Four = (0, 0, 0, 0)
    dr6: int = DR6_RESET
    dr7: int = DR7_RESET
    flags: int = 0  # of GuestDebug, with ENABLE or none
    vmm_db: Four = (0, 0, 0, 0)
    vmm_dr7: int = 0
    waiting: int | None = None  # the vector of an injected exception
    steps_from: int = 0  # RIP when the VMM last asked for single step

    @property
    def debugs_by_hardware(self) -> bool:
        """Whether the VMM's set is the effective one."""
        return bool(self.flags & GuestDebug.HARDWARE_BREAKPOINTS)

    @property
    def single_steps(self) -> bool:
        """Whether the VMM is told after each instruction."""
        return bool(self.flags & GuestDebug.SINGLE_STEP)

    @property
    def effective(self) -> tuple[Four, int]:
        """The addresses and DR7 that are in the registers while the CPU runs the guest."""
        return (self.vmm_db, self.vmm_dr7) if self.debugs_by_hardware else (self.db, self.dr7)


class Cpu(Struct, frozen=True):
    """What decides about debugging besides the debug registers; RFLAGS as it is, not as KVM_GET_REGS shows it."""

    rip: int
    rflags: int = 2
    ring: int = 0
    debugging_extensions: bool = False  # CR4.DE


# --- what a VMM asks -------------------------------------------------------------------------------------------------


def debug_registers(view: View) -> DebugRegisters:
    """KVM_GET_DEBUGREGS: the guest's set, whoever debugs."""
    return DebugRegisters(view.db, view.dr6, view.dr7)


def set_debug_registers(view: View, value: DebugRegisters) -> View:
    """KVM_SET_DEBUGREGS: rule 1; raises ``OSError``."""
    if value.flags or (value.dr6 | value.dr7) & _UPPER_HALF:
        raise OSError(errno.EINVAL, "flags, or an upper half")
    return replace(view, db=value.db, dr6=value.dr6, dr7=value.dr7)


def set_guest_debug(view: View, cpu: Cpu, flags: int, words: tuple[int, ...]) -> tuple[View, Cpu]:
    """
    KVM_SET_GUEST_DEBUG: rules 3, 4 and 10; raises ``OSError``.

    :param words: DR0 to DR7 of the VMM; DR4, DR5 and DR6 mean nothing there.
    """
    if flags & _INJECT:
        if view.waiting is not None:
            raise OSError(errno.EBUSY, "an exception waits")
        view = replace(view, waiting=DB if flags & GuestDebug.INJECT_DB else BP)
    shown = shown_rflags(view, cpu)
    if not flags & GuestDebug.ENABLE:
        flags = 0
    view = replace(view, flags=flags)
    if view.debugs_by_hardware:
        view = replace(view, vmm_db=(words[0], words[1], words[2], words[3]), vmm_dr7=words[7])
    if view.single_steps:
        view = replace(view, steps_from=cpu.rip)
    return view, _with_rflags(view, cpu, shown)


def set_registers(view: View, cpu: Cpu) -> tuple[View, Cpu]:
    """KVM_SET_REGS to what ``cpu`` says. An exception that waits is dropped."""
    return replace(view, waiting=None), _with_rflags(view, cpu, cpu.rflags)


def shown_rflags(view: View, cpu: Cpu) -> int:
    """RFLAGS as KVM_GET_REGS shows it: rule 10."""
    return cpu.rflags & ~TF if view.single_steps else cpu.rflags


def _with_rflags(view: View, cpu: Cpu, rflags: int) -> Cpu:
    steps_here = view.single_steps and view.steps_from == cpu.rip
    return replace(cpu, rflags=rflags | TF if steps_here else rflags)


# --- what the guest does ---------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """MOV to a debug register, with what is written, or from one; the number is 0 to 15."""

    number: int
    written: int | None = None


class Data(NamedTuple):
    """One access to memory."""

    address: int
    length_bytes: int
    is_write: bool


class Instruction(Struct, frozen=True):
    """One instruction: how long it is, and what of it concerns debugging."""

    length_bytes: int
    what: Move | Data | None = None


class Raised(NamedTuple):
    """An exception for the guest: its vector, and RIP and RFLAGS of its frame."""

    vector: int
    rip: int
    rflags: int


class Outcome(NamedTuple):
    """What one instruction came to; without a stop the next one follows."""

    view: View
    cpu: Cpu
    stop: DebugExit | Raised | None = None
    read: int | None = None  # by a MOV from a debug register


def execute(view: View, cpu: Cpu, instruction: Instruction, execution: Execution) -> Outcome:
    """Return what becomes of one instruction: at most one stop, the first that comes."""
    if view.waiting is not None:
        vector = view.waiting
        return _raise(replace(view, waiting=None), cpu, vector, fault=False)  # rule 4
    emulated = execution is Execution.EMULATOR
    before = breakpoint_at(view, cpu, execution)
    if before is not None:
        return before
    read = None
    if isinstance(instruction.what, Move):
        moved = _move(view, cpu, instruction.what, emulated)
        if isinstance(moved, Outcome):
            return moved
        view, read = moved
    after = replace(cpu, rip=cpu.rip + instruction.length_bytes, rflags=shown_rflags(view, cpu) & ~RF)  # rules 10, 12
    reason = 0
    if isinstance(instruction.what, Data) and not emulated:
        reason |= _hit_by_data(*view.effective, instruction.what)  # rule 9
    if view.single_steps or cpu.rflags & TF:
        reason |= BS  # rule 10
    if not reason:
        return Outcome(view, after, None, read)
    is_vmms = view.single_steps if emulated else bool(view.flags & _STOPS)
    if is_vmms:
        return Outcome(view, after, _tell_vmm(view, after.rip, reason, emulated), read)
    return _raise_db(view, after, reason)._replace(read=read)


def breakpoint_at(view: View, cpu: Cpu, execution: Execution) -> Outcome | None:
    """Return the stop before the instruction at RIP, if there is one: rule 7."""
    emulated = execution is Execution.EMULATOR
    resumes = bool(cpu.rflags & RF)
    if not emulated:
        hit = 0 if resumes else _hit_by_fetch(*view.effective, cpu.rip)
        if hit and view.flags & _STOPS:
            return Outcome(view, cpu, _tell_vmm(view, cpu.rip, hit, emulated))
        return _raise_db(view, replace(cpu, rflags=cpu.rflags | RF), hit) if hit else None  # rule 11
    if view.debugs_by_hardware and (hit := _hit_by_fetch(view.vmm_db, view.vmm_dr7, cpu.rip)):
        return Outcome(view, cpu, _tell_vmm(view, cpu.rip, hit, emulated))
    hit = 0 if resumes else _hit_by_fetch(view.db, view.dr7, cpu.rip)
    return _raise_db(view, cpu, hit) if hit else None


def _move(view: View, cpu: Cpu, move: Move, emulated: bool) -> Outcome | tuple[View, int | None]:
    """Rules 5 and 6: the exception, or the state after it and what was read."""
    number, written = move
    too_wide = written is not None and bool(written & _UPPER_HALF)
    aliased = number in (4, 5)
    if cpu.ring:
        return _raise(view, cpu, GP)
    if emulated and too_wide and number in (6, 7):
        return _raise(view, cpu, GP)
    if number > 7 or (aliased and cpu.debugging_extensions):
        return _raise(view, cpu, UD)
    if not emulated and view.effective[1] & GD and view.debugs_by_hardware:
        return Outcome(view, cpu, _tell_vmm(view, cpu.rip, BD, emulated))
    if (view.dr7 if emulated else view.effective[1]) & GD:
        return _raise_db(view, cpu, BD)
    number += 2 * aliased
    if written is None:
        return view, (*view.db, 0, 0, view.dr6, view.dr7)[number]
    if number < 4:
        db = list(view.db)
        db[number] = written
        return replace(view, db=(db[0], db[1], db[2], db[3])), None
    if too_wide and emulated:
        return view, None
    if too_wide:
        return _raise(view, cpu, GP)
    if number == 6:
        return replace(view, dr6=written & _DR6_KEPT | DR6_RESET), None  # rule 2
    return replace(view, dr7=written & _DR7_KEPT | DR7_RESET), None


def _hit_by_fetch(addresses: Four, dr7: int, rip: int) -> int:
    """B0-B3 for an instruction at ``rip``: rule 8."""
    return sum(
        1 << n
        for n, address in enumerate(addresses)
        if _is_armed(dr7, n) and dr7 >> (16 + 4 * n) & 0xF == 0 and address == rip
    )


def _hit_by_data(addresses: Four, dr7: int, data: Data) -> int:
    """B0-B3 for an access: rule 9."""
    hit = 0
    for n, address in enumerate(addresses):
        access, length = dr7 >> (16 + 4 * n) & 3, _LENGTHS[dr7 >> (18 + 4 * n) & 3]
        first = address & -length
        overlaps = data.address < first + length and first < data.address + data.length_bytes
        sees = access == _READ_WRITE or (access == _WRITE and data.is_write)
        if _is_armed(dr7, n) and sees and overlaps:
            hit |= 1 << n
    return hit


def _is_armed(dr7: int, slot: int) -> bool:
    return bool(dr7 >> 2 * slot & 3)


def _tell_vmm(view: View, pc: int, reason: int, emulated: bool) -> DebugExit:
    return DebugExit(DB, pc, DR6_RESET | reason, 0 if emulated else view.effective[1])  # rule 13


def _raise_db(view: View, cpu: Cpu, reason: int) -> Outcome:
    """A #DB for the guest: rule 11."""
    dr6 = (view.dr6 & ~(_HIT | _DR6_BIT_12) | DR6_RESET | reason) & _WORD
    return _raise(replace(view, dr6=dr6), cpu, DB, fault=False)


def _raise(view: View, cpu: Cpu, vector: int, *, fault: bool = True) -> Outcome:
    """An exception for the guest; its handler is entered with TF and RF clear, which is the caller's to follow."""
    if vector == DB:
        view = replace(view, dr7=view.dr7 & ~GD)
    if fault:
        cpu = _with_rflags(view, cpu, shown_rflags(view, cpu) | RF)  # rules 10, 12
    return Outcome(view, cpu, Raised(vector, cpu.rip, cpu.rflags))
