"""
Which breakpoints Linux takes, and with which errno it refuses the others: less than the hardware can do.

Everything that asks for a slot, perf_event_open and ptrace alike, is an event with a type, an address and a length of
Linux's own. The rules, in the order in which Linux tries them; the first that is broken gives the errno:

1. Type 0 (nothing) and 7 (all) are EINVAL.
2. No room is ENOSPC. So a request that can never fit says ENOSPC while there is no room, and its own errno later.
3. The type is W, RW or X; any other is EINVAL. Hardware has no reads alone, and execution and data in one slot neither.
   Of what it does have, Linux leaves out I/O ports.
4. X has the length ``sizeof(long)`` and no other (EINVAL), which has nothing to do with the instruction: LEN is 0.
5. Data has the length 1, 2, 4, or on a 64-bit kernel 8, which LEN can say. Another power of two, aligned, is for the
   address masks of AMD's bpext, and EOPNOTSUPP without; then LEN is 0. Everything else is EINVAL. Linux uses no masks
   for X, though hardware could, and knows no greatest length: beyond 2^32 it arms less than it was asked for.
6. The address is a multiple of the length (EINVAL); for X it may be any.
7. A range that wraps around the end of the address space is EINVAL.
8. An address of the kernel is EINVAL with exclude_kernel, and EPERM without, unless the caller has CAP_SYS_ADMIN. What
   is not canonical counts as the kernel's. The first byte and the last are looked at, by LEN: of X one byte, and of a
   masked range also one.

Not decided here, because only the running kernel knows: the ranges that it keeps for itself, which fit.py names in
KERNEL_NOTES; a module's or BPF's places without kprobes; and whether the caller may have events on that target at all.

What Linux writes to the registers for an event: DRn the address, R/Wn and LENn as above, Gn, and GE; never L, GD, RTM
or R/W 2. Which n is open until the task runs.

Linux, arch/x86/kernel/hw_breakpoint.c, arch_build_bp_info(), hw_breakpoint_arch_parse(), encode_dr7(); and
kernel/events/hw_breakpoint.c, __reserve_bp_slot(), hw_breakpoint_parse().
"""

from __future__ import annotations

from errno import EINVAL, ENOSPC, EOPNOTSUPP, EPERM

from msgspec import Struct

from hwbpd.hookspecs import CpuFacts
from hwbpd_x86.dr7 import SLOTS

# Where the kernel's addresses begin. User space stops a page short of the half, so that SYSRET never sees a
# non-canonical return address. What is not canonical lies above and so counts as the kernel's.
USER_TOP = 2**47 - 4096
USER_TOP_LA57 = 2**56 - 4096
# On a 32-bit kernel this is a choice of its configuration; none puts it higher, so we refuse nothing that one of them
# takes, and leave the rest to the kernel.
USER_TOP_32 = 0xC000_0000

# perf_event_attr.bp_type
EMPTY, WRITE, READ_WRITE, EXECUTE, INVALID = 0, 2, 3, 4, 7


class Kernel(Struct, frozen=True):
    """What of a kernel, and of the CPU it runs on, decides."""

    word_bytes: int = 8  # sizeof(long)
    user_top: int = USER_TOP  # TASK_SIZE_MAX
    has_masks: bool = False  # X86_FEATURE_BPEXT

    @property
    def end(self) -> int:
        """One past the last address."""
        return 1 << 8 * self.word_bytes


class Request(Struct, frozen=True):
    """The fields of struct perf_event_attr that matter."""

    bp_type: int
    bp_addr: int
    bp_len: int
    exclude_kernel: bool = True


def kernel_of(facts: CpuFacts) -> Kernel:
    """Return the kernel that runs where ``facts`` are so; ``architecture`` is the kernel's, "la57" means in use."""
    wide = facts.architecture == "x86_64"
    top = (USER_TOP_LA57 if "la57" in facts.features else USER_TOP) if wide else USER_TOP_32
    return Kernel(8 if wide else 4, top, "bpext" in facts.features)


def open_errno(kernel: Kernel, request: Request, *, free_slots: int = SLOTS, is_admin: bool = True) -> int:
    """
    Return the errno with which the kernel refuses a new event, or 0.

    :param free_slots: how many more the target can have.
    :param is_admin: whether the caller has CAP_SYS_ADMIN.
    """
    if request.bp_type in (EMPTY, INVALID):  # rule 1
        return EINVAL
    if free_slots <= 0:  # rule 2
        return ENOSPC
    return parse_errno(kernel, request, is_admin=is_admin)


def parse_errno(kernel: Kernel, request: Request, *, is_admin: bool = True) -> int:
    """Return the errno with which the kernel refuses what an event that has its slot is to be, or 0: rules 3 to 8."""
    address, length = request.bp_addr, request.bp_len
    if address + length > kernel.end:  # rule 7; with another rule broken too, it is EINVAL either way
        return EINVAL
    if request.bp_type == EXECUTE:
        if length != kernel.word_bytes:  # rule 4
            return EINVAL
        last = address
    elif request.bp_type in (WRITE, READ_WRITE):
        if length.bit_count() != 1 or address % length:  # rules 5 and 6
            return EINVAL
        if length > kernel.word_bytes and not kernel.has_masks:
            return EOPNOTSUPP
        last = address + length - 1 if length <= kernel.word_bytes else address
    else:  # rule 3
        return EINVAL
    if last >= kernel.user_top:  # rule 8
        if request.exclude_kernel:
            return EINVAL
        return 0 if is_admin else EPERM
    return 0
