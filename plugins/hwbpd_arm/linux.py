"""
Which breakpoints Linux takes on Arm, with which errno it refuses the others, and what it writes to the registers.

Everything that asks for a slot, perf_event_open and ptrace alike, is an event with a type, an address and a length. The
rules, in the order in which Linux tries them; the first that is broken gives the errno:

1. Type 0 (nothing) and 7 (all) are EINVAL. No room in the pool is ENOSPC: INST for type X, DATA for any other.
2. Types are X, R, W and RW (EINVAL); lengths of data 1 to 8 on arm64, and 1, 2, 4 and, where BAS is wide enough, 8 on
   ARMv7 (EINVAL).
3. X on arm64 has the length 4: **any other from 1 to 8 is taken for 4**, since perf used to say sizeof(long). ARMv7,
   and arm64 for an AArch32 task, want 2 (T32) or 4 (EINVAL).
4. arm64 moves BAS to where the address stands in its doubleword (X: in its word) and **loses what does not fit**: eight
   bytes at offset 4 watch four. ARMv7, and arm64 for an AArch32 task, refuse that (EINVAL), and more: in a word, or in
   a doubleword for length 8, at offset 1 or 2 only lengths 1 and 2, at offset 3 only 1.
5. Slots are for one privilege by address: the kernel's from TASK_SIZE on, user mode's below (ARMv7: both, at a kernel
   address). So at a user address the kernel's own accesses are never seen.
6. ARMv7 gets past a hit of perf's with a mismatch breakpoint in user mode. So, for an event without a handler of its
   own: EINVAL without mismatch breakpoints; EPERM at a kernel address; EINVAL for a CPU-wide one; EINVAL for R and W
   alone before Armv8, where the fault status does not tell reads from writes. An event of ptrace's has a handler, and
   its tracer has to get past the hit.
7. arm64 refuses a task's event at a kernel address (EINVAL); CPU-wide ones are fine.
8. A kernel address is EINVAL with exclude_kernel, and EPERM without, unless the caller has CAP_SYS_ADMIN.
9. On ARMv7 without monitor debug-mode everything that has got a slot is ENODEV, first of all but rule 1.

How many there are of what the CPU has (``usable_v7``, ``usable_v8``):

10. arm64: all BRPs and WRPs, of the CPU that has the least; up to 16.
11. ARMv7: where there are mismatch breakpoints (v7, more than one BRP), all BRPs but the last, which is kept for
    stepping past watchpoints. Of the WRPs **one before v7.1**, where DFAR does not say where a hit was; all since.

Linux, arch/arm/kernel/hw_breakpoint.c, arch_build_bp_info(), hw_breakpoint_arch_parse(), get_num_brps(),
get_num_wrps(); arch/arm64/kernel/hw_breakpoint.c, the same; kernel/events/hw_breakpoint.c, hw_breakpoint_parse().
The first kernels reserved one BRP for each watchpoint, and allowed one watchpoint: the same numbers by another way.
"""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOSPC, EPERM

from msgspec import Struct

from hwbpd_arm import wcr
from hwbpd_arm.bcr import Privilege
from hwbpd_arm.identification import REGISTERS_MAX, DebugVersion
from hwbpd_arm.plan import Contents
from hwbpd_arm.wcr import LoadStore, Wcr

# perf_event_attr.bp_type
EMPTY, READ, WRITE, READ_WRITE, EXECUTE, INVALID = 0, 1, 2, 3, 4, 7
TYPES = (READ, WRITE, READ_WRITE, EXECUTE)

# Where the kernel's addresses begin is a choice of its configuration. None puts it higher than these.
USER_TOP = 1 << 52
USER_TOP_32 = 0xBF00_0000


class Usable(Struct, frozen=True):
    """How many slots Linux hands out on one CPU."""

    breakpoints: int
    watchpoints: int


class Kernel(Struct, frozen=True):
    """What of a kernel, and of the CPU it runs on, decides."""

    arm64: bool = True
    version: int = DebugVersion.V8
    user_top: int = 1 << 48  # TASK_SIZE
    lanes: int = 8  # how many bytes BAS can select
    has_mismatch: bool = True  # ARMv7: rule 11
    monitor: bool = True  # ARMv7: DBGDSCR.MDBGen could be set

    @property
    def end(self) -> int:
        """One past the last address."""
        return 1 << (64 if self.arm64 else 32)


class Request(Struct, frozen=True):
    """The fields of struct perf_event_attr that matter, and whose event it is."""

    bp_type: int
    bp_addr: int
    bp_len: int
    exclude_kernel: bool = True
    of_task: bool = True  # not CPU-wide
    compat: bool = False  # arm64: of a task in AArch32 state
    own_handler: bool = False  # as ptrace has, and perf has not


def usable_v8(breakpoints: int, watchpoints: int) -> Usable:
    """Return what Linux hands out of so many BRPs and WRPs on arm64: rule 10."""
    return Usable(min(breakpoints, REGISTERS_MAX), min(watchpoints, REGISTERS_MAX))


def usable_v7(breakpoints: int, watchpoints: int, version: int) -> Usable:
    """Return what Linux hands out of so many BRPs and WRPs on ARMv7: rule 11. Without CP14 that is nothing."""
    if version == DebugVersion.V7_MEMORY_MAPPED:
        return Usable(0, 0)
    reserved = 1 if version >= DebugVersion.V7 and breakpoints > 1 else 0
    return Usable(breakpoints - reserved, watchpoints if version >= DebugVersion.V7_1 else min(watchpoints, 1))


def open_errno(kernel: Kernel, request: Request, *, free_slots: int, is_admin: bool = True) -> int:
    """
    Return the errno with which the kernel refuses a new event, or 0.

    :param free_slots: how many more the target can have, of the pool that the type belongs to.
    :param is_admin: whether the caller has CAP_SYS_ADMIN.
    """
    if request.bp_type in (EMPTY, INVALID):  # rule 1
        return EINVAL
    if free_slots <= 0:
        return ENOSPC
    return parse_errno(kernel, request, is_admin=is_admin)


def parse_errno(kernel: Kernel, request: Request, *, is_admin: bool = True) -> int:
    """Return the errno with which the kernel refuses what an event that has its slot is to be, or 0: rules 2 to 9."""
    if not kernel.arm64 and not kernel.monitor:  # rule 9
        return ENODEV
    if request.bp_type not in TYPES or not _has_length(kernel, request):  # rules 2 and 3
        return EINVAL
    if _is_strict(kernel, request) and not _is_aligned(request):  # rule 4
        return EINVAL
    contents = _event(kernel, request)
    in_kernel = _is_kernels(kernel, contents.base, _length_of(kernel, contents.byte_select))
    if kernel.arm64:
        if contents.privilege == Privilege.KERNEL and request.of_task:  # rule 7
            return EINVAL
    elif not request.own_handler:  # rule 6
        if not kernel.has_mismatch:
            return EINVAL
        if in_kernel:
            return EPERM
        if not request.of_task or (kernel.version < DebugVersion.V8 and request.bp_type in (READ, WRITE)):
            return EINVAL
    if in_kernel:  # rule 8
        if request.exclude_kernel:
            return EINVAL
        return 0 if is_admin else EPERM
    return 0


def contents(kernel: Kernel, request: Request, *, enabled: bool = True) -> Contents:
    """
    Return what Linux writes to the pair of registers for an event that it has taken.

    Of X, BAS may reach beyond its four bits into reserved ones, which the register then drops. A kernel at EL2 (VHE)
    sets HMC besides, at a kernel address.
    """
    event = _event(kernel, request)
    kind = LoadStore(0) if request.bp_type == EXECUTE else LoadStore(request.bp_type)
    # As a watchpoint's word; of a breakpoint, all that it has stands in the same places.
    return Contents(event.base, wcr.encode(Wcr(enabled, event.privilege, kind, event.byte_select)))


class _Event(Struct, frozen=True):
    """What Linux makes of a request: struct arch_hw_breakpoint."""

    base: int  # the address, aligned
    byte_select: int
    privilege: Privilege


def _event(kernel: Kernel, request: Request) -> _Event:
    length = 4 if request.bp_type == EXECUTE and kernel.arm64 and not request.compat else request.bp_len  # rule 3
    is_dword = length == 8 if _is_strict(kernel, request) else request.bp_type != EXECUTE
    within = 8 if is_dword else 4
    offset = request.bp_addr % within
    privilege = Privilege.USER  # rule 5
    if _is_kernels(kernel, request.bp_addr, length):
        privilege = Privilege.KERNEL if kernel.arm64 else Privilege.KERNEL | Privilege.USER
    return _Event(request.bp_addr - offset, ((1 << length) - 1) << offset & wcr.ALL_BYTES, privilege)


def _is_strict(kernel: Kernel, request: Request) -> bool:
    """Whether rule 4 is ARMv7's."""
    return not kernel.arm64 or request.compat


def _has_length(kernel: Kernel, request: Request) -> bool:
    if request.bp_type == EXECUTE and _is_strict(kernel, request):
        return request.bp_len in (2, 4)
    if kernel.arm64:
        return 1 <= request.bp_len <= 8
    return request.bp_len in (1, 2, 4) or (request.bp_len == 8 and kernel.lanes == 8)


def _is_aligned(request: Request) -> bool:
    offset = request.bp_addr % (8 if request.bp_len == 8 else 4)
    return offset == 0 or (offset in (1, 2) and request.bp_len in (1, 2)) or (offset == 3 and request.bp_len == 1)


def _length_of(kernel: Kernel, byte_select: int) -> int:
    """The length that Linux reads out of BAS; 0 for one that it has moved up, or that ARMv7 does not have."""
    length = byte_select.bit_length()
    known = byte_select == (1 << length) - 1 and (kernel.arm64 or length in (1, 2, 4, 8))
    return length if known else 0


def _is_kernels(kernel: Kernel, address: int, length: int) -> bool:
    """Whether Linux takes a range for the kernel's: the first byte and the last one are, in unsigned arithmetic."""
    return address >= kernel.user_top and (address + length - 1) % kernel.end >= kernel.user_top
