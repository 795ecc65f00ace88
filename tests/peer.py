"""
A process with credentials of one's choice, which opens breakpoints itself and says what the kernel answered.

Run as a program it becomes what its argument says, writes its pid, and then answers one question per line. It shares
nothing with what it judges and needs only the standard library. Making one takes root.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import struct
import subprocess
import sys
from types import TracebackType
from typing import Any, NamedTuple

CAP_NET_RAW, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON = 1 << 13, 1 << 19, 1 << 21, 1 << 38
WAIT_S = 20.0 * float(os.environ.get("HWBPD_TEST_PATIENCE", "1"))

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}.get(os.uname().machine)
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP = 4, 8, 22
_CLONE_NEWUSER, _CLONE_NEWPID = 0x10000000, 0x20000000
_DISABLED, _EXCLUDE_KERNEL, _EXCLUDE_HV = 1 << 0, 1 << 5, 1 << 6
_TYPE_BREAKPOINT, _WRITE = 5, 2

USER_ADDRESS = 0x1000
KERNEL_ADDRESS = 0xFFFF_8000_8000_0000  # in the kernel's half on x86 and Arm


def readable(fd: int, wait_s: float) -> bool:
    """Whether there is something to read before that; poll() also knows descriptors above 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


class Identity(NamedTuple):
    """What to become. Capabilities of None are all there are."""

    uids: tuple[int, int, int] = (60001, 60001, 60001)  # real, effective, saved
    gids: tuple[int, int, int] = (60001, 60001, 60001)
    groups: tuple[int, ...] = ()
    capabilities: int | None = 0
    dumpable: bool = True
    user_namespace: bool = False  # be root of a new one
    pid_namespace: bool = False
    strict_seccomp: bool = False  # then it can only wait


class Peer:
    """Such a process, until the end of the block."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        command = [sys.executable, "-I", "-S", __file__, json.dumps(identity)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        self.pid = int(self._line())
        self.pidfd = os.pidfd_open(self.pid)

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.pidfd)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        if self.identity.strict_seccomp:
            self._process.kill()  # the end of its input leads it to a system call that kills it anyway
        self._process.wait(WAIT_S)
        self._process.stdout.close()

    def open(self, *, tid: int, cpu: int, kernel: bool, address: int) -> int:
        """Let it open a breakpoint and close it; return 0 or the kernel's errno. ``tid`` is -1 for CPU-wide."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([tid, cpu, kernel, address]).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._line())

    def _line(self) -> bytes:
        output = self._process.stdout
        assert output is not None
        assert readable(output.fileno(), WAIT_S), "the peer says nothing"
        line = output.readline()
        assert line, "the peer has ended"
        return line


# --- the program -----------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: Any) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _become(identity: Identity) -> None:
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups(identity.groups)
    os.setresgid(*identity.gids)
    os.setresuid(*identity.uids)
    if identity.capabilities is not None:
        low, high = identity.capabilities & 0xFFFFFFFF, identity.capabilities >> 32
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
        _call("capset", header, data)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
    if identity.user_namespace:
        _call("unshare", _CLONE_NEWUSER)
        for name, line in (
            ("uid_map", f"0 {identity.uids[1]} 1"),
            ("setgroups", "deny"),
            ("gid_map", f"0 {identity.gids[1]} 1"),
        ):
            _write(f"/proc/self/{name}", line)
    _call("prctl", _PR_SET_DUMPABLE, int(identity.dumpable), 0, 0, 0)


def _write(path: str, text: str) -> None:
    # Not through a text file: its codec may not have been loaded yet, and this process can no longer read modules.
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, text.encode())
    os.close(fd)


def _try_breakpoint(tid: int, cpu: int, kernel: bool, address: int) -> int:
    flags = _DISABLED | (0 if kernel else _EXCLUDE_KERNEL | _EXCLUDE_HV)
    attr = struct.pack("=IIQQQQQIIQQ", _TYPE_BREAKPOINT, 72, 0, 0, 0, 0, flags, 0, _WRITE, address, 4)
    arguments = (ctypes.c_long(number) for number in (tid, cpu, -1, 8))
    fd = _libc.syscall(ctypes.c_long(_PERF_EVENT_OPEN or -1), attr, *arguments)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def _answer() -> None:
    for line in sys.stdin:
        print(_try_breakpoint(*json.loads(line)), flush=True)


def _main() -> None:
    identity = Identity(*json.loads(sys.argv[1]))
    if identity.pid_namespace:
        _be_two(identity)
        return
    _become(identity)
    print(os.getpid(), flush=True)
    if identity.strict_seccomp:
        _call("prctl", _PR_SET_SECCOMP, 1, 0, 0, 0)
        os.read(0, 1)
    _answer()


def _be_two(identity: Identity) -> None:
    """Only a child enters the new pid namespace, and only we know its number as others do."""
    reader, writer = os.pipe()
    _call("unshare", _CLONE_NEWPID)
    child = os.fork()
    if child == 0:
        _become(identity)
        os.write(writer, b"1")
        _answer()
        return
    os.read(reader, 1)
    print(child, flush=True)
    os.close(0)  # the questions are the child's
    os.waitpid(child, 0)


if __name__ == "__main__":
    _main()
