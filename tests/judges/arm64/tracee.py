"""
A traced process of our own on arm64: code and data that both sides see, its registers, and its debug registers.

The code is fixed when it starts and its data is shared memory, so a case needs three system calls: registers, continue,
wait. It shares no line with the machine plugin.

Linux, ptrace(2): PTRACE_GETREGSET, PTRACE_SETREGSET with NT_PRSTATUS, NT_ARM_HW_BREAK and NT_ARM_HW_WATCH;
arch/arm64/include/uapi/asm/ptrace.h, struct user_hwdebug_state.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

TRACEME, CONT, KILL = 0, 7, 8
GETSIGINFO, GETREGSET, SETREGSET, SETOPTIONS = 0x4202, 0x4204, 0x4205, 0x4200
EXITKILL: Final = 0x100000

PRSTATUS, HW_BREAK, HW_WATCH = 1, 0x402, 0x403
REGISTERS: Final = struct.Struct("=34Q")  # x0-x30, sp, pc, pstate
PC: Final = 32
STATE_HEAD: Final = struct.Struct("=II")  # dbg_info, and four bytes of nothing
STATE_ENTRY: Final = struct.Struct("=QII")  # address, control, and four bytes of nothing
STATE_BYTES: Final = STATE_HEAD.size + 16 * STATE_ENTRY.size

TRAP_BRKPT, TRAP_HWBKPT = 1, 4  # si_code
DATA_BYTES: Final = mmap.PAGESIZE


class Stop(NamedTuple):
    """Why the child stopped: the signal's code and address, and where it stood."""

    signal: int
    code: int
    address: int
    pc: int


class Tracee:
    """
    A child that is stopped unless it is told to run.

    :param code: instruction words; they are at ``self.code``.
    """

    def __init__(self, code: Sequence[int]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.restype = ctypes.c_long
        self._libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.code = self._map_code(struct.pack(f"={len(code)}I", *code))
        self.memory = mmap.mmap(-1, DATA_BYTES)
        self.data = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._ptrace(TRACEME, 0, 0, pid=0)
                os.kill(os.getpid(), signal.SIGSTOP)
            finally:
                os._exit(1)
        os.waitpid(self.pid, 0)
        self._ptrace(SETOPTIONS, 0, EXITKILL)
        self.registers = list(REGISTERS.unpack(self.read_regset(PRSTATUS, REGISTERS.size)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def run(self, pc: int, **x: int) -> Stop:
        """Run from ``pc`` on until it stops, with such values in registers: ``run(pc, x0=address)``."""
        registers = [*self.registers]
        registers[PC] = pc
        for name, value in x.items():
            registers[int(name[1:])] = value
        self.write_regset(PRSTATUS, REGISTERS.pack(*registers))
        self._ptrace(CONT, 0, 0)
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSTOPPED(status), f"the child ended: status {status:#x}"
        info = ctypes.create_string_buffer(128)
        self._ptrace(GETSIGINFO, 0, ctypes.addressof(info))
        number, _, code, _, address = struct.unpack_from("=iiiiQ", info)
        return Stop(number, code, address, self.now()[PC])

    def now(self) -> tuple[int, ...]:
        """x0 to x30, sp, pc and pstate."""
        return REGISTERS.unpack(self.read_regset(PRSTATUS, REGISTERS.size))

    def read_regset(self, regset: int, size: int) -> bytes:
        """Raises ``OSError``."""
        buffer = ctypes.create_string_buffer(size)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), size)
        self._ptrace(GETREGSET, regset, ctypes.addressof(vector))
        return buffer.raw[: vector[1]]

    def write_regset(self, regset: int, data: bytes) -> None:
        """Raises ``OSError``."""
        buffer = ctypes.create_string_buffer(data, len(data))
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), len(data))
        self._ptrace(SETREGSET, regset, ctypes.addressof(vector))

    def arm(self, regset: int, entries: Sequence[tuple[int, int]]) -> int:
        """Write (address, control) pairs from the first slot on; return 0 or the kernel's errno."""
        written = b"".join(STATE_ENTRY.pack(*entry, 0) for entry in entries)
        try:
            self.write_regset(regset, STATE_HEAD.pack(0, 0) + written)
        except OSError as refusal:
            return refusal.errno or -1
        return 0

    def armed(self, regset: int) -> tuple[int, list[tuple[int, int]]]:
        """Return ``dbg_info``, and the (address, control) pairs of all sixteen entries."""
        state = self.read_regset(regset, STATE_BYTES)
        pairs = [entry[:2] for entry in STATE_ENTRY.iter_unpack(state[STATE_HEAD.size :])]
        return STATE_HEAD.unpack_from(state)[0], pairs

    def _ptrace(self, request: int, address: int, data: int, pid: int | None = None) -> None:
        if self._libc.ptrace(request, self.pid if pid is None else pid, address, data) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"ptrace {request:#x}: {os.strerror(number)}")

    def _map_code(self, code: bytes) -> int:
        # Through a file: what is written through memory would need its caches flushed by hand.
        fd = os.memfd_create("code")
        os.write(fd, code)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        address = self._libc.mmap(None, len(code), mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
        os.close(fd)
        assert address != ctypes.c_void_p(-1).value, "no executable memory"
        return int(address)
