"""
What a 32-bit Arm kernel answers to a list of orders: runs inside the armhf guest, and needs nothing but Python.

Reads orders as lines of JSON, does each on a child of its own, and prints a line of JSON for each:

    ["info"]                           register 0 of PTRACE_GETHBPREGS
    ["numbered", [[number, value]...]] PTRACE_SETHBPREGS in order: the errno of each, and all registers read after it
    ["open", [[type, address, length, task or cpu]...]]
                                       perf_event_open, all kept open: the errno of each
    ["run", offset, x, [[number, value]...]]
                                       registers set; then the child runs from that byte of the code on, with the
                                       address of its data plus ``x`` in r0: where and how it stops

Addresses in orders are as they are, or relative to the child's code or data: ["code", 4], ["data", 16].

Linux, arch/arm/kernel/ptrace.c; arch/arm/include/uapi/asm/ptrace.h: struct pt_regs; perf_event_open(2).
"""

import ctypes
import json
import mmap
import os
import signal
import struct
import sys
from typing import Any

TRACEME, CONT, GETREGS, SETREGS, GETHBPREGS, SETHBPREGS = 0, 7, 12, 13, 29, 30
GETSIGINFO, SETOPTIONS, EXITKILL = 0x4202, 0x4200, 0x100000
PERF_EVENT_OPEN = 364
READ_BACK = (*range(1, 17), *range(-1, -17, -1))  # eight of either sort, of which there never are more

libc = ctypes.CDLL(None, use_errno=True)


class Child:
    def __init__(self, code: bytes) -> None:
        libc.mmap.restype = ctypes.c_void_p
        fd = os.memfd_create("code")
        os.write(fd, code)
        self.code = libc.mmap(None, len(code), mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
        os.close(fd)
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.data = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.pid = os.fork()
        if self.pid == 0:
            self.ptrace(TRACEME, 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(1)
        os.waitpid(self.pid, 0)
        self.ptrace(SETOPTIONS, self.pid, 0, EXITKILL)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        libc.munmap(ctypes.c_void_p(self.code), mmap.PAGESIZE)

    def at(self, value: Any) -> int:
        number: int = {"code": self.code, "data": self.data}[value[0]] + value[1] if isinstance(value, list) else value
        return number

    def ptrace(self, request: int, pid: int, address: int, data: int) -> int:
        ctypes.set_errno(0)
        result = libc.ptrace(request, pid, ctypes.c_void_p(address & 0xFFFFFFFF), ctypes.c_void_p(data))
        return ctypes.get_errno() if result < 0 else 0

    def read(self, number: int) -> list[int]:
        word = ctypes.c_uint32()
        errno = self.ptrace(GETHBPREGS, self.pid, number, ctypes.addressof(word))
        return [word.value, errno]

    def write(self, number: int, value: Any) -> int:
        word = ctypes.c_uint32(self.at(value))
        return self.ptrace(SETHBPREGS, self.pid, number, ctypes.addressof(word))

    def numbered(self, writes: list[Any]) -> list[Any]:
        return [[self.write(*write), [self.read(number) for number in READ_BACK]] for write in writes]

    def open(self, requests: list[Any]) -> list[int]:
        opened: list[int] = []
        answers: list[int] = []
        for bp_type, address, length, where in requests:
            what = (5, 72, 0, 1, 0, 0, 1 | 1 << 5, 0, bp_type, self.at(address), length)
            attributes = struct.pack("=IIQQQQQIIQQ", *what)
            pid, cpu = (self.pid, -1) if where == "task" else (-1, 0)
            ctypes.set_errno(0)
            fd = libc.syscall(PERF_EVENT_OPEN, attributes, pid, cpu, -1, 8)
            answers.append(ctypes.get_errno() if fd < 0 else 0)
            if fd >= 0:
                opened.append(fd)
        for fd in opened:
            os.close(fd)
        return answers

    def run(self, offset: int, x: int, writes: list[Any]) -> dict[str, Any]:
        refused = [self.write(*write) for write in writes]
        registers = ctypes.create_string_buffer(72)
        self.ptrace(GETREGS, self.pid, 0, ctypes.addressof(registers))
        words = list(struct.unpack("=18I", registers.raw))
        words[0], words[1], words[15] = self.data + x, 0xFFFFFFFF, self.code + offset
        words[16] &= ~0x20  # A32, not T32
        ctypes.memmove(registers, struct.pack("=18I", *words), 72)
        self.ptrace(SETREGS, self.pid, 0, ctypes.addressof(registers))
        self.ptrace(CONT, self.pid, 0, 0)
        os.waitpid(self.pid, 0)
        info = ctypes.create_string_buffer(128)
        self.ptrace(GETSIGINFO, self.pid, 0, ctypes.addressof(info))
        number, errno, code, address = struct.unpack_from("=iiiI", info)
        self.ptrace(GETREGS, self.pid, 0, ctypes.addressof(registers))
        after = struct.unpack("=18I", registers.raw)
        done = any(self.memory[:]) or after[1] != 0xFFFFFFFF
        return {
            "refused": refused, "signal": number, "code": code, "number": errno, "done": done,
            "address": [address - self.data, address - self.code], "pc": after[15] - self.code,
        }  # fmt: skip


def main() -> None:
    code = bytes.fromhex(sys.stdin.readline())
    for line in sys.stdin:
        verb, *rest = json.loads(line)
        child = Child(code)
        try:
            answer = child.read(0) if verb == "info" else getattr(child, verb)(*rest)
        finally:
            child.end()
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
