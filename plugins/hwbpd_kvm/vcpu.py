"""
A virtual machine with one or more vCPUs, through /dev/kvm: the only file that talks to KVM.

It decides nothing: each method is one ioctl on values with names, and a refusal is an ``OSError`` with the kernel's
errno. What the debug registers then mean is ``x86_view``'s business, and what runs inside is ``guest``'s.

- Everything is closed in the reverse order of its making, by ``close`` or a with statement. A VM lives in the kernel
  until its last descriptor is closed *and* the last mapping of a vCPU's run page is gone; both are done here.
- ``run`` returns a value for whatever ends a KVM_RUN, a signal included: a VMM's loop is a ``match`` on it.
- A vCPU belongs to the thread that runs it. KVM lets another thread set its registers while it does not run.

Linux, Documentation/virt/kvm/api.rst; include/uapi/linux/kvm.h; arch/x86 and arch/arm64, include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from msgspec import Struct, convert

DEVICE: Final = Path("/dev/kvm")
API_VERSION: Final = 12  # the only one since Linux 2.6.22; the interface says to refuse all others


def _request(direction: int, number: int, size: int) -> int:
    """An ioctl of KVM's: direction 0 none, 1 to the kernel, 2 from it, 3 both; ``size`` of the argument in bytes."""
    return direction << 30 | size << 16 | 0xAE << 8 | number


_GET_API_VERSION: Final = _request(0, 0x00, 0)
_CREATE_VM: Final = _request(0, 0x01, 0)
_CHECK_EXTENSION: Final = _request(0, 0x03, 0)
_GET_VCPU_MMAP_SIZE: Final = _request(0, 0x04, 0)
_CREATE_VCPU: Final = _request(0, 0x41, 0)
_RUN: Final = _request(0, 0x80, 0)

_MEMORY_REGION: Final = struct.Struct("=IIQQQ")  # slot, flags, guest address, bytes, address in this process
_SET_USER_MEMORY_REGION: Final = _request(1, 0x46, _MEMORY_REGION.size)

_REGISTERS: Final = struct.Struct("=18Q")
_GET_REGS: Final = _request(2, 0x81, _REGISTERS.size)
_SET_REGS: Final = _request(1, 0x82, _REGISTERS.size)

_SEGMENT: Final = struct.Struct("=QIH10B")  # base, limit, selector, type ... avl, unusable, padding
_TABLE: Final = struct.Struct("=QH6x")
_CONTROL: Final = struct.Struct("=7Q")
_SYSTEM_BYTES: Final = 8 * _SEGMENT.size + 2 * _TABLE.size + _CONTROL.size + 32
_GET_SREGS: Final = _request(2, 0x83, _SYSTEM_BYTES)
_SET_SREGS: Final = _request(1, 0x84, _SYSTEM_BYTES)

_DEBUG_REGISTERS: Final = struct.Struct("=7Q72x")
_GET_DEBUGREGS: Final = _request(2, 0xA1, _DEBUG_REGISTERS.size)
_SET_DEBUGREGS: Final = _request(1, 0xA2, _DEBUG_REGISTERS.size)

# What a VMM hands over with KVM_SET_GUEST_DEBUG: x86 has DR0-DR7; arm64 16 each of BCR, BVR, WCR, WVR.
_WORDS: Final = 64 if os.uname().machine == "aarch64" else 8
_GUEST_DEBUG: Final = struct.Struct(f"=II{_WORDS}Q")
_SET_GUEST_DEBUG: Final = _request(1, 0x9B, _GUEST_DEBUG.size)

_ONE_REGISTER: Final = struct.Struct("=QQ")  # which, and the address of its value
_GET_ONE_REG: Final = _request(1, 0xAB, _ONE_REGISTER.size)
_SET_ONE_REG: Final = _request(1, 0xAC, _ONE_REGISTER.size)
_ARM_INIT: Final = struct.Struct("=8I")  # the kind of CPU, and seven words of features
_ARM_PREFERRED_TARGET: Final = _request(2, 0xAF, _ARM_INIT.size)
_ARM_VCPU_INIT: Final = _request(1, 0xAE, _ARM_INIT.size)


class Capability(enum.IntEnum):
    """What KVM_CHECK_EXTENSION is asked about here."""

    SET_GUEST_DEBUG = 23
    DEBUGREGS = 50
    GUEST_DEBUG_HW_BPS = 119  # how many; always 0 on x86, whose number is the architecture's
    GUEST_DEBUG_HW_WPS = 120
    IMMEDIATE_EXIT = 136
    SET_GUEST_DEBUG2 = 195  # the flags that KVM_SET_GUEST_DEBUG takes


class GuestDebug(enum.IntFlag):
    """
    What a VMM asks for with KVM_SET_GUEST_DEBUG. Without ENABLE every other flag is forgotten.

    The upper half means something else on each architecture: bit 17 is USE_HW_BP on x86 and USE_HW on arm64.
    """

    ENABLE = 1 << 0
    SINGLE_STEP = 1 << 1
    SOFTWARE_BREAKPOINTS = 1 << 16
    HARDWARE_BREAKPOINTS = 1 << 17
    INJECT_DB = 1 << 18  # x86
    INJECT_BP = 1 << 19  # x86
    BLOCK_IRQ = 1 << 20  # x86


class Registers(Struct, frozen=True):
    """The general registers of an x86 vCPU, in the kernel's order."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2  # bit 1 is always one


class Segment(NamedTuple):
    """A segment register with what the CPU keeps of its descriptor."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741  as the manual names it: 64-bit code
    g: int
    avl: int
    unusable: int


class Table(NamedTuple):
    """GDTR or IDTR."""

    base: int
    limit: int


class SystemRegisters(Struct, frozen=True):
    """Segments, tables and control registers of an x86 vCPU; ``interrupts`` is KVM's bitmap of a pending one."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Table
    idt: Table
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupts: bytes


class DebugRegisters(NamedTuple):
    """The debug registers as the guest believes them to be: KVM_GET_DEBUGREGS."""

    db: tuple[int, int, int, int]
    dr6: int
    dr7: int
    flags: int = 0


# --- why a KVM_RUN ended ---------------------------------------------------------------------------------------------


class IoExit(NamedTuple):
    """The guest used a port; ``data`` is what it wrote, or zeros where it reads."""

    port: int
    is_write: bool
    data: bytes


class DebugExit(NamedTuple):
    """The VMM's debugging stopped an x86 guest."""

    exception: int
    pc: int  # linear
    dr6: int
    dr7: int  # zero from KVM's instruction emulator, which leaves the field alone


class ArmDebugExit(NamedTuple):
    """The VMM's debugging stopped an arm64 guest: ESR_EL2, and FAR_EL2 for a watchpoint."""

    esr: int
    far: int


class MmioExit(NamedTuple):
    """The guest touched an address without memory."""

    address: int
    is_write: bool
    data: bytes


class Halted(NamedTuple):
    """HLT."""


class ShutDown(NamedTuple):
    """A triple fault, or a guest that switched itself off."""


class Interrupted(NamedTuple):
    """A signal, or ``Vcpu.leave_at_once``."""


class OtherExit(NamedTuple):
    """Anything else; ``detail`` is the first word beside the reason, as the suberror of an internal error (17)."""

    reason: int
    detail: int


Exit = IoExit | DebugExit | ArmDebugExit | MmioExit | Halted | ShutDown | Interrupted | OtherExit

_EXIT_IO: Final = 2
_EXIT_DEBUG: Final = 4
_EXIT_HLT: Final = 5
_EXIT_MMIO: Final = 6
_EXIT_SHUTDOWN: Final = 8
_EXIT_INTR: Final = 10
_EXIT_SYSTEM_EVENT: Final = 24

# struct kvm_run: where its fields are.
_IMMEDIATE_EXIT_AT: Final = 1
_REASON: Final = struct.Struct("=8xI20xI")  # the reason, and the first word of what it says
_IO: Final = struct.Struct("=32xBBHIQ")  # direction, size, port, count, where the data is
_DEBUG: Final = struct.Struct("=32xI4xQQQ")
_ARM_DEBUG: Final = struct.Struct("=32xIIQ")
_MMIO: Final = struct.Struct("=32xQ8sIB")


class _Held:
    """Something with a descriptor, given back at the end of a with statement."""

    fd: int

    def close(self) -> None:
        """Give it back; a second time does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Vcpu(_Held):
    """
    One vCPU. Made by ``Vm.vcpu``.

    The state of x86 and of arm64 is read and written by different methods; those of the other one fail with EINVAL
    or ENOTTY.
    """

    def __init__(self, fd: int, run_bytes: int) -> None:
        self.fd = fd
        self._run = mmap.mmap(fd, run_bytes)

    def close(self) -> None:
        """Give it back; a second time does nothing."""
        self._run.close()
        super().close()

    def run(self) -> Exit:
        """
        Enter the guest and return why it was left.

        :raises OSError: where KVM cannot run it at all.
        """
        try:
            fcntl.ioctl(self.fd, _RUN, 0)
        except InterruptedError:
            return Interrupted()
        return self._why()

    def leave_at_once(self, wanted: bool) -> None:
        """Let ``run`` return ``Interrupted`` without entering the guest, once pending I/O is completed; or not."""
        self._run[_IMMEDIATE_EXIT_AT] = wanted

    def answer_read(self, data: bytes) -> None:
        """Hand over what the port holds that the guest has just read: after an ``IoExit``, before the next ``run``."""
        _direction, _size, _port, _count, offset = _IO.unpack_from(self._run)
        self._run[offset : offset + len(data)] = data

    def _why(self) -> Exit:
        reason, detail = _REASON.unpack_from(self._run)
        if reason == _EXIT_IO:
            direction, size, port, count, offset = _IO.unpack_from(self._run)
            data = self._run[offset : offset + size * count] if direction else bytes(size * count)
            return IoExit(port, bool(direction), data)
        if reason == _EXIT_DEBUG:
            if _WORDS == 8:
                return DebugExit(*_DEBUG.unpack_from(self._run))
            low, high, far = _ARM_DEBUG.unpack_from(self._run)
            return ArmDebugExit(high << 32 | low, far)
        if reason == _EXIT_MMIO:
            address, data, length, is_write = _MMIO.unpack_from(self._run)
            return MmioExit(address, bool(is_write), data[:length])
        if reason == _EXIT_HLT:
            return Halted()
        if reason in (_EXIT_SHUTDOWN, _EXIT_SYSTEM_EVENT):
            return ShutDown()
        if reason == _EXIT_INTR:
            return Interrupted()
        return OtherExit(reason, detail)

    # --- what a VMM debugs with --------------------------------------------------------------------------------------

    def set_guest_debug(self, flags: int, words: tuple[int, ...] = ()) -> None:
        """
        Debug the guest, or stop doing so with ``flags`` 0.

        :param flags: of ``GuestDebug``.
        :param words: on x86 DR0 to DR7, on arm64 16 each of BCR, BVR, WCR and WVR; what is left out is zero.
        :raises OSError: EINVAL for a flag that this KVM does not know, EBUSY for INJECT_* while an exception waits.
        """
        _set(self.fd, _SET_GUEST_DEBUG, _GUEST_DEBUG.pack(flags, 0, *words, *(0,) * (_WORDS - len(words))))

    # --- x86 ---------------------------------------------------------------------------------------------------------

    def registers(self) -> Registers:
        """KVM_GET_REGS."""
        return Registers(*_REGISTERS.unpack(_get(self.fd, _GET_REGS, _REGISTERS.size)))

    def set_registers(self, value: Registers) -> None:
        """KVM_SET_REGS. It drops an exception that waits to be delivered."""
        _set(self.fd, _SET_REGS, _REGISTERS.pack(*(getattr(value, name) for name in Registers.__struct_fields__)))

    def system_registers(self) -> SystemRegisters:
        """KVM_GET_SREGS."""
        raw = _get(self.fd, _GET_SREGS, _SYSTEM_BYTES)
        segments = [Segment(*fields[:12]) for fields in _SEGMENT.iter_unpack(raw[: 8 * _SEGMENT.size])]
        at = 8 * _SEGMENT.size
        tables = [Table(*_TABLE.unpack_from(raw, at + n * _TABLE.size)) for n in (0, 1)]
        at += 2 * _TABLE.size
        values = (*segments, *tables, *_CONTROL.unpack_from(raw, at), raw[at + _CONTROL.size :])
        return convert(dict(zip(SystemRegisters.__struct_fields__, values, strict=True)), SystemRegisters)

    def set_system_registers(self, value: SystemRegisters) -> None:
        """:raises OSError: EINVAL for a combination that no CPU can be in."""
        segments = (value.cs, value.ds, value.es, value.fs, value.gs, value.ss, value.tr, value.ldt)
        control = (value.cr0, value.cr2, value.cr3, value.cr4, value.cr8, value.efer, value.apic_base)
        raw = b"".join(_SEGMENT.pack(*segment, 0) for segment in segments)
        raw += _TABLE.pack(*value.gdt) + _TABLE.pack(*value.idt) + _CONTROL.pack(*control) + value.interrupts
        _set(self.fd, _SET_SREGS, raw)

    def debug_registers(self) -> DebugRegisters:
        """KVM_GET_DEBUGREGS."""
        *db, dr6, dr7, flags = _DEBUG_REGISTERS.unpack(_get(self.fd, _GET_DEBUGREGS, _DEBUG_REGISTERS.size))
        return DebugRegisters((db[0], db[1], db[2], db[3]), dr6, dr7, flags)

    def set_debug_registers(self, value: DebugRegisters) -> None:
        """:raises OSError: EINVAL for flags, and for an upper half of DR6 or DR7 that is not zero."""
        _set(self.fd, _SET_DEBUGREGS, _DEBUG_REGISTERS.pack(*value.db, value.dr6, value.dr7, value.flags))

    # --- arm64 -------------------------------------------------------------------------------------------------------

    def init_arm(self, target: bytes) -> None:
        """Reset it to the kind of CPU that ``Vm.preferred_arm_target`` named: the first thing to be done with it."""
        _set(self.fd, _ARM_VCPU_INIT, target)

    def one_register(self, which: int) -> int:
        """KVM_GET_ONE_REG, for a register of 64 bits."""
        value = ctypes.c_uint64()
        _set(self.fd, _GET_ONE_REG, _ONE_REGISTER.pack(which, ctypes.addressof(value)))
        return value.value

    def set_one_register(self, which: int, value: int) -> None:
        """KVM_SET_ONE_REG, for a register of 64 bits."""
        held = ctypes.c_uint64(value)
        _set(self.fd, _SET_ONE_REG, _ONE_REGISTER.pack(which, ctypes.addressof(held)))


class Vm(_Held):
    """One virtual machine: its memory and its vCPUs. Made by ``Kvm.vm``."""

    def __init__(self, fd: int, run_bytes: int) -> None:
        self.fd = fd
        self._run_bytes = run_bytes
        self._memory: list[mmap.mmap] = []
        self._vcpus: list[Vcpu] = []

    def memory(self, guest_address: int, length_bytes: int) -> mmap.mmap:
        """Give the guest memory from ``guest_address`` on, both of whole pages; return it, shared with the guest."""
        memory = mmap.mmap(-1, length_bytes)
        self._memory.append(memory)
        region = _MEMORY_REGION.pack(len(self._memory) - 1, 0, guest_address, length_bytes, address_of(memory))
        _set(self.fd, _SET_USER_MEMORY_REGION, region)
        return memory

    def vcpu(self) -> Vcpu:
        """Add a vCPU; it is closed with its VM."""
        vcpu = Vcpu(fcntl.ioctl(self.fd, _CREATE_VCPU, len(self._vcpus)), self._run_bytes)
        self._vcpus.append(vcpu)
        return vcpu

    def preferred_arm_target(self) -> bytes:
        """The kind of arm64 CPU that suits this host; for ``Vcpu.init_arm``."""
        return _get(self.fd, _ARM_PREFERRED_TARGET, _ARM_INIT.size)

    def close(self) -> None:
        """Give back its vCPUs, itself, and then its memory."""
        for vcpu in reversed(self._vcpus):
            vcpu.close()
        super().close()
        for memory in self._memory:
            memory.close()


class Kvm(_Held):
    """
    /dev/kvm.

    :raises OSError: ENOENT where there is none, EACCES without the right to it, ENOTSUP for another API version.
    """

    def __init__(self) -> None:
        self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        version = fcntl.ioctl(self.fd, _GET_API_VERSION, 0)
        if version != API_VERSION:
            self.close()
            raise OSError(errno.ENOTSUP, f"{DEVICE} has API version {version}, only {API_VERSION} is known")

    def capability(self, which: int) -> int:
        """What KVM_CHECK_EXTENSION says: 0 for no, 1 for yes, or a number with a meaning of its own."""
        return fcntl.ioctl(self.fd, _CHECK_EXTENSION, which)

    def vm(self) -> Vm:
        """Make a virtual machine without memory or vCPUs."""
        return Vm(fcntl.ioctl(self.fd, _CREATE_VM, 0), fcntl.ioctl(self.fd, _GET_VCPU_MMAP_SIZE, 0))


def what_is_missing() -> str | None:
    """Return what this host lacks to run a vCPU and how to get it, or ``None`` when there is nothing."""
    if not DEVICE.exists():
        return f"there is no {DEVICE}: load kvm_intel or kvm_amd, and let a virtual machine nest (cpu=host)"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} may not be opened: run as root, or join the group that owns it (kvm)"
    try:
        with Kvm() as kvm, kvm.vm() as vm:
            vm.vcpu()
            if not kvm.capability(Capability.SET_GUEST_DEBUG):
                return "this KVM has no KVM_CAP_SET_GUEST_DEBUG"
    except OSError as why:
        return f"{DEVICE} makes no vCPU: {why.strerror}"
    return None


def address_of(memory: mmap.mmap) -> int:
    """Return where a mapping is in this process."""
    # The view is dropped at once: while one lives, the mapping cannot be closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _get(fd: int, request: int, length_bytes: int) -> bytes:
    buffer = bytearray(length_bytes)
    fcntl.ioctl(fd, request, buffer)
    return bytes(buffer)


def _set(fd: int, request: int, value: bytes) -> None:
    fcntl.ioctl(fd, request, value)
