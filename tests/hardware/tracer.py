"""
A tracer: a process that attaches to a thread and sets its debug registers when it is told to.

Run as a program (``python -m tests.hardware.tracer TID``) it answers each line on its standard input with one:

    attach            stop the thread and trace it
    poke N ADDRESS    write address register N: this takes a slot, whatever the control register says
    enable N          let it watch eight bytes for writes, by the control register
    go                let the thread run on, which stays traced; it stops at a hit
    stop              wait until it has
    detach            let it go

The answer is 0, or the errno of what the kernel refused. It ends with its input, and the kernel then lets the thread
go: as a debugger that died. 64-bit x86 and Arm only. On Arm the registers are the watchpoints', which one call writes
from the first to the one that is meant; and a stop comes before the write that was watched, so the tracer stops
watching then, or the thread would never get past it.

Linux, arch/x86/kernel/ptrace.c, ptrace_set_debugreg(); arch/arm64/kernel/ptrace.c, hw_break_set(); ptrace(2),
PTRACE_POKEUSER, PTRACE_SETREGSET.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

X86: Final = os.uname().machine == "x86_64"
TRACES: Final = os.uname().machine in ("x86_64", "aarch64")
WAIT_S = 20.0 * float(os.environ.get("HWBPD_TEST_PATIENCE", "1"))
ADDRESS: Final = 0x10000  # of user space; nobody need have mapped it

_POKEUSER, _CONT, _ATTACH, _DETACH = 6, 7, 16, 17
_DEBUG_REGISTERS: Final = 848  # offsetof(struct user, u_debugreg)
_CONTROL: Final = 7
_WRITES_OF_EIGHT_BYTES: Final = 0b1001  # LEN and R/W
_GETREGSET, _SETREGSET, _HW_WATCH = 0x4204, 0x4205, 0x403
_STATE_BYTES: Final = 264
_ENTRY: Final = struct.Struct("=QII")  # of struct user_hwdebug_state: address, control, padding
_ARM_WRITES_OF_EIGHT_BYTES: Final = 0xFF << 5 | 2 << 3 | 1  # BAS, LSC and E
_WALL: Final = 0x40000000  # wait for threads, too


class Tracer:
    """Such a process, from outside, which traces from the start of the block to its end."""

    def __init__(self, tid: int) -> None:
        command = [sys.executable, "-m", "tests.hardware.tracer", str(tid)]
        self._process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid

    def poke(self, number: int, address: int = ADDRESS) -> None:
        """Write an address register; raises ``OSError`` with the kernel's errno."""
        self.do(f"poke {number} {address}")

    def do(self, order: str) -> None:
        """Give an order, and return when it is carried out; raises ``OSError`` with the kernel's errno."""
        pipes = self._process.stdin, self._process.stdout
        assert pipes[0] is not None
        assert pipes[1] is not None
        pipes[0].write(f"{order}\n".encode())
        assert select.select([pipes[1]], [], [], WAIT_S)[0], f"the tracer does not get done with {order!r}"
        number = int(pipes[1].readline())
        if number:
            raise OSError(number, f"{order}: {os.strerror(number)}")

    def die(self) -> None:
        """End it without warning; return when it is gone, and the thread is no longer traced."""
        self._process.kill()
        self._process.wait(WAIT_S)

    def __enter__(self) -> Self:
        self.do("attach")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(WAIT_S)
        finally:
            self._process.kill()


# --- the program -----------------------------------------------------------------------------------------------------


class _Program:
    def __init__(self, tid: int) -> None:
        self._tid = tid
        self._control = 0
        self._watched: list[tuple[int, int]] = []  # on Arm: address and control of each register so far
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.argtypes = [ctypes.c_long] * 4
        self._ptrace.restype = ctypes.c_long

    def do(self, verb: str, numbers: list[int]) -> int:
        """Return 0, or the kernel's errno."""
        orders: dict[str, Callable[..., None]] = {
            "attach": self._attach,
            "poke": self._poke,
            "enable": self._enable,
            "go": lambda: self._call(_CONT),
            "stop": self._stop,
            "detach": lambda: self._call(_DETACH),
        }
        try:
            orders[verb](*numbers)
        except OSError as refusal:
            return refusal.errno or -1
        return 0

    def _attach(self) -> None:
        self._call(_ATTACH)
        os.waitpid(self._tid, _WALL)
        if not X86:
            self._watched = self._left_behind()

    def _poke(self, number: int, address: int) -> None:
        if X86:
            self._call(_POKEUSER, _DEBUG_REGISTERS + 8 * number, address)
        else:
            self._set_watched(number, address, 0)

    def _enable(self, number: int) -> None:
        if not X86:
            self._set_watched(number, self._watched[number][0], _ARM_WRITES_OF_EIGHT_BYTES)
            return
        self._control |= 1 << 2 * number | _WRITES_OF_EIGHT_BYTES << 16 + 4 * number
        self._poke(_CONTROL, self._control)

    def _stop(self) -> None:
        _, status = os.waitpid(self._tid, _WALL)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGTRAP
        for number, (address, _) in enumerate(self._watched):
            self._set_watched(number, address, 0)

    def _left_behind(self) -> list[tuple[int, int]]:
        """What tracers before this one have set: the kernel keeps it as long as the thread lives."""
        state = ctypes.create_string_buffer(_STATE_BYTES)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(state), len(state))
        self._call(_GETREGSET, _HW_WATCH, ctypes.addressof(vector))
        entries = [entry[:2] for entry in _ENTRY.iter_unpack(state.raw[8:])]
        return list(itertools.takewhile(lambda entry: entry[1], entries))  # there, and disabled, reads as no zero

    def _set_watched(self, number: int, address: int, control: int) -> None:
        assert number <= len(self._watched), "a register before it would take a slot as well"
        watched = [*self._watched[:number], (address, control), *self._watched[number + 1 :]]
        state = bytes(8) + b"".join(_ENTRY.pack(*entry, 0) for entry in watched)
        buffer = ctypes.create_string_buffer(state, len(state))
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), len(state))
        self._call(_SETREGSET, _HW_WATCH, ctypes.addressof(vector))
        self._watched = watched

    def _call(self, request: int, at: int = 0, value: int = 0) -> None:
        if self._ptrace(request, self._tid, at, value) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def main() -> None:
    program = _Program(int(sys.argv[1]))
    for line in sys.stdin:
        verb, *numbers = line.split()
        print(program.do(verb, list(map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()
