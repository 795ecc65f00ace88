"""
A process of a few bytes under ptrace: it runs what it is given, and says how far it came.

It is an executable made here, with one mapping that may be read, written and executed, so that code and data lie at
known addresses and nothing else runs in it: no loader, no library, no signal handler. Its debug registers are written
through PTRACE_POKEUSER, so what it runs meets the registers of the CPU under it. Nobody else's slots are touched, and
those it takes end with it. x86-64 only.

ptrace(2); Linux, arch/x86/kernel/ptrace.c; System V ABI, "Object Files", for the executable.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import subprocess
from collections.abc import Mapping
from types import TracebackType
from typing import Final, NamedTuple, Self

BASE: Final = 0x1000_0000  # below 2 GiB, so that an absolute address fits the displacement of an instruction
SIZE: Final = 0x1_0000
CODE: Final = BASE + 0x2000  # some pages for stubs
DATA: Final = BASE + 0x8000  # some pages for what they access

TF: Final = 1 << 8  # of EFLAGS
DF: Final = 1 << 10
RF: Final = 1 << 16
FLAGS: Final = 0x202  # reserved bit 1, and IF, which user code has set

NO_REASON: Final = 0xFFFF_0FF0  # DR6, when there is none

_PEEKUSER, _POKEUSER, _CONT, _SINGLESTEP, _GETREGS, _SETREGS, _SEIZE, _INTERRUPT = 3, 6, 7, 9, 12, 13, 0x4206, 0x4207
_EXITKILL: Final = 0x10_0000
_WALL: Final = 0x4000_0000
_DEBUG_REGISTERS: Final = 848  # offsetof(struct user, u_debugreg)
_REGISTERS: Final = (  # struct user_regs_struct
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_INDEX: Final = {name: n for n, name in enumerate(_REGISTERS)}

_SLEEP: Final = bytes.fromhex("b822000000 0f05 ebf7")  # mov eax, SYS_pause; syscall; jmp to the start

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_size_t, ctypes.c_size_t]
_ptrace.restype = ctypes.c_long


class ProcessEnded(Exception):
    """It is gone, or nobody lets us trace it any more."""


class Stopped(NamedTuple):
    """Where the process stopped, by which signal, and what DR6 then says as ptrace shows it (the hardware form)."""

    signal: int
    rip: int
    dr6: int

    @property
    def is_trap(self) -> bool:
        """Whether it was a debug exception or INT3, and no fault."""
        return self.signal == signal.SIGTRAP


class StubProcess:
    """Such a process, stopped and traced from the start of the block to its end."""

    def __init__(self) -> None:
        self._file = (ctypes.c_ulong * len(_REGISTERS))()

    def __enter__(self) -> Self:
        program = os.memfd_create("stub")
        try:
            os.write(program, _executable())
            self._process = subprocess.Popen([f"/proc/self/fd/{program}"], pass_fds=[program], stdin=subprocess.DEVNULL)
        finally:
            os.close(program)
        self.pid = self._process.pid
        try:
            # On one CPU with us: each stop is then a switch, and no message to another CPU.
            os.sched_setaffinity(self.pid, {min(os.sched_getaffinity(0))})
            self._call(_SEIZE, data=_EXITKILL)
            self._call(_INTERRUPT)
            os.waitpid(self.pid, _WALL)
            self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            self._call(_GETREGS, data=ctypes.addressof(self._file))
            self._at_start = list(self._file)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._memory)
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def poke(self, number: int, value: int) -> None:
        """
        Write a debug register as tracers do.

        :raises OSError: with the errno of the kernel's refusal.
        :raises ProcessEnded: when nobody is there.
        """
        self._call(_POKEUSER, _DEBUG_REGISTERS + 8 * number, value)

    def peek(self, number: int) -> int:
        """Read a debug register as tracers do."""
        # libc's wrapper returns the word, and tells an error by errno alone.
        ctypes.set_errno(0)
        word: int = _ptrace(_PEEKUSER, self.pid, _DEBUG_REGISTERS + 8 * number, 0)
        if number_of_error := ctypes.get_errno():
            raise OSError(number_of_error, os.strerror(number_of_error))
        return word & 0xFFFF_FFFF_FFFF_FFFF

    def store(self, address: int, content: bytes) -> None:
        """Write its memory. No debug register sees that."""
        os.pwrite(self._memory, content, address)

    def set_registers(self, values: Mapping[str, int]) -> None:
        """Give it these registers, and the others as they were when it began; it is in no system call."""
        self._file[:] = self._at_start
        self._file[_INDEX["orig_rax"]] = 0xFFFF_FFFF_FFFF_FFFF  # or the kernel would restart the interrupted pause()
        for name, value in values.items():
            self._file[_INDEX[name]] = value
        self._call(_SETREGS, data=ctypes.addressof(self._file))

    def go(self, *, step: bool = False) -> Stopped:
        """
        Let it run to its next stop, or to the end of one instruction.

        DR6 is cleared first: what it says then is of this stop.

        :raises ProcessEnded: when it does not stop again.
        """
        self.poke(6, NO_REASON)
        self._call(_SINGLESTEP if step else _CONT)
        _, status = os.waitpid(self.pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise ProcessEnded(f"the traced process ended with status {status:#x}")
        self._call(_GETREGS, data=ctypes.addressof(self._file))
        return Stopped(os.WSTOPSIG(status), self._file[_INDEX["rip"]], self.peek(6))

    def register(self, name: str) -> int:
        """What a register held at the last stop."""
        return self._file[_INDEX[name]]

    def _call(self, request: int, at: int = 0, data: int = 0) -> None:
        if _ptrace(request, self.pid, at, data) != 0:
            number = ctypes.get_errno()
            if number == errno.ESRCH:
                raise ProcessEnded("the traced process is gone")
            raise OSError(number, f"ptrace request {request} at {at:#x}: {os.strerror(number)}")


def _executable() -> bytes:
    """An executable with one segment: it sleeps, and has ``SIZE`` bytes at ``BASE`` to do anything with."""
    header, segment = 64, 56
    length = header + segment + len(_SLEEP)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, BASE + header + segment, header, 0, 0, 64, 56, 1, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, 0, BASE, BASE, length, SIZE, 0x1000)  # read, write, execute
    return elf + load + _SLEEP
