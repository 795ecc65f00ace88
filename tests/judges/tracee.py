"""
A stopped thread whose debug registers are written and read by ptrace, and of whose slots others take some.

It is the judge's own way to the kernel and shares no line with what it judges. A thread once traced keeps what it was
given, so whoever wants a fresh one starts another ``sleeper``. x86-64 only.

ptrace(2), PTRACE_SEIZE, PTRACE_PEEKUSER; the C library's wrapper returns what it reads in place of the errno, so these
are the bare system calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
from types import TracebackType
from typing import Final, Protocol, Self

from tests.judges.opener import KernelOpener

_PTRACE: Final = 101  # the number of the system call on x86_64
_PEEKUSER, _POKEUSER, _CONT, _SINGLESTEP, _DETACH, _SEIZE, _INTERRUPT = 3, 6, 7, 9, 17, 0x4206, 0x4207
_STOP_AT_EXEC: Final = 0x10  # PTRACE_O_TRACEEXEC
_DEBUG_REGISTERS: Final = 848  # offsetof(struct user, u_debugreg)
_WALL: Final = 0x40000000

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long] * 3 + [ctypes.c_size_t] * 2
_syscall.restype = ctypes.c_long


class Registers(Protocol):
    """Who answers for one thread's debug registers."""

    def poke(self, number: int, value: int) -> int:
        """Write DR``number``; return 0 or the errno."""
        ...

    def peek(self, number: int) -> int:
        """Read DR``number``."""
        ...

    def take(self) -> None:
        """Let somebody else take one of the thread's slots; one is free."""
        ...

    def give_back(self) -> None:
        """Let somebody else give back the last one."""
        ...

    def free(self) -> int:
        """How many slots the thread can have yet."""
        ...


class Tracee:
    """A child of this process, its only thread stopped and traced from the start of the block; killed at its end."""

    def __init__(self, opener: KernelOpener, pid: int) -> None:
        self._opener = opener
        self._taken: list[int] = []
        self._word = ctypes.c_uint64()
        self.pid = pid

    def poke(self, number: int, value: int) -> int:
        return self._ptrace(_POKEUSER, _DEBUG_REGISTERS + 8 * number, value)

    def peek(self, number: int) -> int:
        failed = self._ptrace(_PEEKUSER, _DEBUG_REGISTERS + 8 * number, ctypes.addressof(self._word))
        assert not failed, f"DR{number} cannot be read: {errno.errorcode[failed]}"
        return self._word.value

    def take(self) -> None:
        self._taken.append(self._opener.open(self.pid, -1))

    def give_back(self) -> None:
        self._opener.close(self._taken.pop())

    def free(self) -> int:
        probes: list[int] = []
        try:
            while True:
                probes.append(self._opener.open(self.pid, -1))
        except OSError as refusal:
            if refusal.errno != errno.ENOSPC:
                raise
            return len(probes)
        finally:
            for probe in probes:
                self._opener.close(probe)

    def attach(self) -> None:
        """Stop and trace it. The kernel lets nobody attach in the middle of an exec, so no exec takes a slot away."""
        self._must(_SEIZE, _STOP_AT_EXEC)
        self._must(_INTERRUPT)
        self.wait()

    def detach(self) -> None:
        """Let it go, and run."""
        self._must(_DETACH)

    def go(self, *, step: bool = False) -> None:
        """Let it run, or execute one instruction; ``wait`` tells how it stopped."""
        self._must(_SINGLESTEP if step else _CONT)

    def wait(self) -> int:
        """Return the signal at which it has stopped."""
        _, status = os.waitpid(self.pid, _WALL)
        assert os.WIFSTOPPED(status)
        return os.WSTOPSIG(status)

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._taken:
            self.give_back()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, _WALL)

    def _must(self, request: int, data: int = 0) -> None:
        failed = self._ptrace(request, 0, data)
        assert not failed, f"process {self.pid} cannot be traced: {errno.errorcode[failed]}"

    def _ptrace(self, request: int, address: int, data: int) -> int:
        """Return 0 or the errno."""
        return ctypes.get_errno() if _syscall(_PTRACE, request, self.pid, address, data) else 0


def sleeper(opener: KernelOpener) -> Tracee:
    """Start a process that sleeps, and return it."""
    program = shutil.which("sleep")
    assert program is not None, "there is no `sleep` on PATH"
    return Tracee(opener, os.posix_spawn(program, [program, "infinity"], {}))
