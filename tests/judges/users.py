"""
Foreign users of breakpoints, each a process of its own: a helper that does what it is told, perf, and gdb.

The helper (``python -m tests.judges.users``) answers each line on its standard input with one, and holds what it has
taken until ``reset`` or the end of its input:

    open TID CPU    a breakpoint; -1 for CPU-wide, and for any CPU
    hide TID CPU    the same, kept by a mapping alone: its descriptor is closed
    decoy           events that take no slot: software events, and a tracepoint where tracefs is mounted
    trace TID N     attach, and set N address registers; the thread stays stopped
    leave TID       detach
    reset

It answers with how many slots it got, so 0 where the kernel had no room. x86-64 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.judges.opener import ATTRIBUTES, DISABLED, X86_64_PERF_EVENT_OPEN, KernelOpener

ROOT = Path(__file__).parents[2]
# For what takes milliseconds, on a machine that is busy with something else; an emulated one needs more.
WAIT_S = 30.0 * float(os.environ.get("HWBPD_TEST_PATIENCE", "1"))
POLL_S = 0.002  # between two looks at what the kernel does not announce

PTRACE_POKEUSER, PTRACE_ATTACH, PTRACE_DETACH = 6, 16, 17
DEBUG_REGISTERS = 848  # offsetof(struct user, u_debugreg)
WALL = 0x40000000  # wait for threads too
ADDRESS = 0x10000
RING_BYTES = 2 * mmap.PAGESIZE


# --- in the helper ---------------------------------------------------------------------------------------------------


class Helper:
    """What the helper process does."""

    def __init__(self) -> None:
        self._opener = KernelOpener()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = [ctypes.c_long] * 4
        self._libc.ptrace.restype = ctypes.c_long
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._held: list[int] = []
        self._mapped: list[int] = []
        self._traced: set[int] = set()

    def do(self, verb: str, numbers: list[int]) -> int:
        orders: dict[str, Callable[..., int]] = {
            "open": self._open,
            "hide": self._hide,
            "decoy": self._decoy,
            "trace": self._trace,
            "leave": self._leave,
            "reset": self._reset,
        }
        return orders[verb](*numbers)

    def _open(self, tid: int, cpu: int) -> int:
        try:
            self._held.append(self._opener.open(tid, cpu))
        except OSError:
            return 0
        return 1

    def _hide(self, tid: int, cpu: int) -> int:
        if not self._open(tid, cpu):
            return 0
        fd = self._held.pop()
        # Not by mmap.mmap, which keeps a descriptor of its own.
        address = self._libc.mmap(None, RING_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        self._mapped.append(address)
        os.close(fd)
        return 1

    def _decoy(self) -> int:
        wanted = [(1, config) for config in (0, 2, 9)]  # clock, page faults, dummy
        for number in Path("/sys/kernel/tracing/events/sched/sched_switch").glob("id"):
            wanted.append((2, int(number.read_text())))
        for kind, config in wanted:
            attributes = ATTRIBUTES.pack(kind, ATTRIBUTES.size, config, 0, 0, 0, DISABLED, 0, 0, 0, 0)
            arguments = (ctypes.c_long(value) for value in (0, -1, -1, 8))
            fd = self._libc.syscall(ctypes.c_long(X86_64_PERF_EVENT_OPEN), attributes, *arguments)
            assert fd >= 0, os.strerror(ctypes.get_errno())
            self._held.append(fd)
        return 0

    def _trace(self, tid: int, count: int) -> int:
        if tid not in self._traced:
            if self._libc.ptrace(PTRACE_ATTACH, tid, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "PTRACE_ATTACH")
            os.waitpid(tid, WALL)
            self._traced.add(tid)
        set_ = 0
        for register in range(4):
            at = DEBUG_REGISTERS + 8 * register
            if set_ < count and self._libc.ptrace(PTRACE_POKEUSER, tid, at, ADDRESS) == 0:
                set_ += 1
        return set_

    def _leave(self, tid: int) -> int:
        self._traced.discard(tid)
        self._libc.ptrace(PTRACE_DETACH, tid, 0, 0)
        return 0

    def _reset(self) -> int:
        for tid in tuple(self._traced):
            self._leave(tid)
        while self._mapped:
            self._libc.munmap(self._mapped.pop(), RING_BYTES)
        while self._held:
            os.close(self._held.pop())
        return 0


def main() -> None:
    helper = Helper()
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *numbers = line.split()
        print(helper.do(verb, [int(number) for number in numbers]), flush=True)


# --- beside it -------------------------------------------------------------------------------------------------------


class User:
    """The helper, from outside."""

    def __init__(self) -> None:
        self.process = _start([sys.executable, "-m", "tests.judges.users"])
        self.pid = self.process.pid
        _read_line(self.process)

    def do(self, *words: object) -> int:
        """Give an order, and return how many slots came of it."""
        _write_line(self.process, " ".join(map(str, words)))
        return int(_read_line(self.process))

    def close(self) -> None:
        _end(self.process)


class Perf:
    """``perf stat`` with one watchpoint, counting until it is closed. ``pid`` is perf's."""

    def __init__(self, *where: str) -> None:
        # The command that perf times starts when its events are open, so its echo tells that they are.
        self.process = _start(["perf", "stat", "-e", f"mem:{ADDRESS:#x}:w", *where, "--", "cat"])
        self.pid = self.process.pid
        _write_line(self.process, "counting")
        self.counts = _read_line(self.process) == "counting"  # false when there was no room

    def close(self) -> None:
        _end(self.process)


class Gdb:
    """
    gdb that has attached to a process, set watchpoints, and let it go on, which is when it takes its slots.

    That it has is read from the state of the process. To ask the kernel for free slots would be in gdb's way: for a
    moment there are none.
    """

    def __init__(self, pid: int, watchpoints: int) -> None:
        with open(f"/proc/{pid}/maps", encoding="ascii") as maps:
            stack = next(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith("[stack]"))
        command = ["gdb", "-nx", "-q", "-p", str(pid), "-ex", "set confirm off"]
        for index in range(watchpoints):
            command += ["-ex", f"watch *(long *) {stack + 8 * index:#x}"]
        self.process = _start([*command, "-ex", "continue"])
        self.pid = self.process.pid
        try:
            wait_until(lambda: _state(pid) == "t", f"gdb stops {pid}")
            wait_until(lambda: _state(pid) == "S", f"gdb takes {watchpoints} slots of {pid}, and lets it go on")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.process.kill()  # asked to quit it would first want the process to stop
        _end(self.process)


class Sleeper:
    """A process that sleeps, to have breakpoints set on it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "1000"])
        self.tid = self.process.pid

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that nobody announces; raises ``TimeoutError`` that says what it was."""
    until = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(what)
        time.sleep(POLL_S)


def taken(tid: int, cpu: int, slots: int = 4) -> int:
    """Return how many slots the kernel counts against a breakpoint at a place."""
    opener = KernelOpener()
    held: list[int] = []
    try:
        while len(held) < slots:
            held.append(opener.open(tid, cpu))
    except OSError:
        pass
    finally:
        for fd in held:
            opener.close(fd)
    return slots - len(held)


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=ROOT, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def _write_line(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended; the next line read is empty
        process.stdin.write(f"{line}\n".encode())


def _read_line(process: subprocess.Popen[bytes]) -> str:
    """Return the next line of output, "" when the process has ended; raises ``TimeoutError``."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], WAIT_S)[0]:
            raise TimeoutError(f"{process.args!r} says nothing")
        byte = os.read(process.stdout.fileno(), 1)
        if not byte:
            break
        line += byte
    return line.decode().strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_S)
    process.stdout.close()


if __name__ == "__main__":
    main()
