"""
A guest of a few pages: 64-bit code of our own bytes, page tables, and a handler for each exception.

It exists to ask a real vCPU what debug registers do, by one instruction at a time if need be, so nothing in it happens
by itself. Decisions:

- It starts in long mode, in ring 0, with every address that it has mapped to the same physical one, for both rings.
  The state of a booted CPU is written into the vCPU; there is no boot code that could go wrong.
- Every handler is one OUT to the port of its vector. So an exception ends KVM_RUN, and the frame that the CPU pushed is
  read from memory. Returning is the VMM's business: it sets the registers. KVM's own emulator of instructions, which
  runs all of ring 0 on some hosts, has no IRET for long mode.
- A program ends with an OUT to ``END_PORT``. No guest runs on for ever, so no KVM_RUN needs a watchdog.

Intel SDM Vol. 3A, "4-Level Paging", "Segment Descriptors" and "64-Bit Mode IDT".
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from msgspec.structs import replace

from hwbpd_kvm.vcpu import (
    DebugExit,
    Exit,
    IoExit,
    Kvm,
    Registers,
    Segment,
    SystemRegisters,
    Table,
    Vcpu,
    Vm,
)

# --- where things are, as guest addresses ----------------------------------------------------------------------------

MEMORY_BYTES: Final = 2 << 20
_PML4: Final = 0x1000
_PDPT: Final = 0x2000
_PD: Final = 0x3000
_GDT: Final = 0x4000
_IDT: Final = 0x5000
_TSS: Final = 0x6000
HANDLERS: Final = 0x7000  # 16 bytes for each vector
STACK: Final = 0x9000  # grows down; where the CPU pushes the frame of an exception
USER_STACK: Final = 0xA000
CODE: Final = 0x1_0000
DATA: Final = 0x2_0000

VECTORS: Final = 32
END_PORT: Final = 0xE0

# --- exceptions ------------------------------------------------------------------------------------------------------

DB: Final = 1
UD: Final = 6
GP: Final = 13
_WITH_ERROR_CODE: Final = frozenset({8, 10, 11, 12, GP, 14, 17, 21})

# RFLAGS
FIXED: Final = 1 << 1
TF: Final = 1 << 8  # a #DB after each instruction
IOPL_3: Final = 3 << 12  # ring 3 may use ports
RF: Final = 1 << 16  # no execution breakpoint of the guest's at the next instruction

# CR4
PAE: Final = 1 << 5
DE: Final = 1 << 3  # DR4 and DR5 are undefined, and I/O breakpoints mean something

_CR0: Final = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1 << 0  # PG, NE, ET, MP, PE
_EFER: Final = 1 << 10 | 1 << 8  # LMA, LME

# --- instructions ----------------------------------------------------------------------------------------------------

NOP: Final = b"\x90"
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R9, R10, R11, R12, R13, R14, R15 = range(8, 16)


def mov_to_dr(number: int, register: int) -> bytes:
    """MOV DRn, r64; numbers from 8 on are encoded, too, and undefined."""
    return _mov_dr(0x23, number, register)


def mov_from_dr(number: int, register: int) -> bytes:
    """MOV r64, DRn."""
    return _mov_dr(0x21, number, register)


def _mov_dr(opcode: int, number: int, register: int) -> bytes:
    rex = 0x40 | (number >> 3) << 2 | register >> 3
    modrm = 0xC0 | (number & 7) << 3 | register & 7
    prefix = bytes([rex]) if rex != 0x40 else b""
    return prefix + bytes([0x0F, opcode, modrm])


def store(address: int, length_bytes: int) -> bytes:
    """MOV [address], RAX or its lower part; the address is absolute, below 2 GiB."""
    return _data(0x89, 0x88, address, length_bytes)


def load(address: int, length_bytes: int) -> bytes:
    """MOV RAX or its lower part, [address]."""
    return _data(0x8B, 0x8A, address, length_bytes)


def _data(opcode: int, byte_opcode: int, address: int, length_bytes: int) -> bytes:
    prefix = {1: b"", 2: b"\x66", 4: b"", 8: b"\x48"}[length_bytes]
    chosen = byte_opcode if length_bytes == 1 else opcode
    return prefix + bytes([chosen, 0x04, 0x25]) + struct.pack("<I", address)


def out(port: int) -> bytes:
    """OUT port, AL."""
    return bytes([0xE6, port])


END: Final = out(END_PORT)
CPUID: Final = b"\x0f\xa2"  # leaves the guest under every KVM; it changes RAX, RBX, RCX and RDX
END_AGAIN: Final = END + b"\xeb\xfc"  # an OUT, and a jump back to it: one exit for each KVM_RUN


# --- what comes of running it ----------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """What the CPU pushed for a handler."""

    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int


class Ended(NamedTuple):
    """The program reached its end."""


class Raised(NamedTuple):
    """An exception reached the guest's own handler."""

    vector: int
    frame: Frame


Stop = Ended | Raised | DebugExit | Exit


def handler(vector: int) -> int:
    """Where the handler of an exception begins."""
    return HANDLERS + 16 * vector


class Guest:
    """One VM with one vCPU, ready to run what is placed in it; a context manager."""

    def __init__(self, kvm: Kvm) -> None:
        self.vm: Vm = kvm.vm()
        try:
            self.memory = self.vm.memory(0, MEMORY_BYTES)
            self._fill()
            self.vcpu: Vcpu = self.vm.vcpu()
            self.vcpu.set_system_registers(_booted(self.vcpu.system_registers()))
        except BaseException:
            self.vm.close()
            raise

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_why: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the VM back."""
        self.vm.close()

    def place(self, code: bytes, address: int = CODE) -> None:
        """Put instructions somewhere; they should end with ``END``."""
        self.memory[address : address + len(code)] = code

    def start_at(self, address: int = CODE, *, ring: int = 0, rflags: int = FIXED, **registers: int) -> None:
        """Set where it goes on, and with what in its registers; those that are not named become zero."""
        cs, ss = (0x1B, 0x23) if ring == 3 else (0x08, 0x10)
        system = self.vcpu.system_registers()
        if system.cs.selector != cs:
            code, data = _segment(cs, code=True), _segment(ss, code=False)
            self.vcpu.set_system_registers(replace(system, cs=code, ss=data))
        values = {"rsp": USER_STACK if ring == 3 else STACK} | registers
        rflags |= FIXED | (IOPL_3 if ring == 3 else 0)
        self.vcpu.set_registers(Registers(rip=address, rflags=rflags, **values))

    def set_cr4(self, value: int) -> None:
        """Change CR4; ``PAE`` belongs in it."""
        self.vcpu.set_system_registers(replace(self.vcpu.system_registers(), cr4=value))

    def run(self) -> Stop:
        """Let it run until something stops it, and say what."""
        why = self.vcpu.run()
        if not isinstance(why, IoExit) or not why.is_write:
            return why
        if why.port == END_PORT:
            return Ended()
        if why.port < VECTORS:
            return Raised(why.port, self._frame(why.port))
        return why

    def _frame(self, vector: int) -> Frame:
        at = self.vcpu.registers().rsp + (8 if vector in _WITH_ERROR_CODE else 0)
        return Frame(*struct.unpack_from("<5Q", self.memory, at))

    def _fill(self) -> None:
        present_writable_user = 0b111
        large = 1 << 7
        self._words(_PML4, _PDPT | present_writable_user)
        self._words(_PDPT, _PD | present_writable_user)
        self._words(_PD, 0 | present_writable_user | large)
        tss_limit = 0x67
        tss = tss_limit | (_TSS & 0xFFFFFF) << 16 | 0x89 << 40
        code, data = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
        user = 3 << 45
        self._words(_GDT, 0, code, data, code | user, data | user, tss, 0)
        self.memory[_TSS + 4 : _TSS + 12] = STACK.to_bytes(8, "little")  # RSP0: the stack for exceptions in ring 3
        for vector in range(VECTORS):
            at = handler(vector)
            gate = struct.pack("<HHHHI4x", at & 0xFFFF, 0x08, 0x8E00, at >> 16 & 0xFFFF, at >> 32)
            self.memory[_IDT + 16 * vector : _IDT + 16 * vector + 16] = gate
            self.place(out(vector), at)

    def _words(self, address: int, *words: int) -> None:
        self.memory[address : address + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)


def _segment(selector: int, *, code: bool) -> Segment:
    kind = 11 if code else 3  # accessed; execute and read, or read and write
    return Segment(0, 0xFFFF_FFFF, selector, kind, 1, selector & 3, int(not code), 1, int(code), 1, 0, 0)


def _booted(reset: SystemRegisters) -> SystemRegisters:
    data = _segment(0x10, code=False)
    return replace(
        reset,
        cs=_segment(0x08, code=True),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(_TSS, 0x67, 0x28, 11, 1, 0, 0, 0, 0, 0, 0, 0),
        gdt=Table(_GDT, 7 * 8 - 1),
        idt=Table(_IDT, VECTORS * 16 - 1),
        cr0=_CR0,
        cr3=_PML4,
        cr4=PAE,
        efer=_EFER,
    )
