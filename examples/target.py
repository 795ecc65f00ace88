#!/usr/bin/env python3
"""
A program to be watched: it touches one variable, or calls one function, exactly as often as it is told to.

Its loops are machine code that counts for itself, so what a watcher saw can be held against what really happened. No
compiler is needed: the code below is assembled by hand, for 64-bit x86 and Arm.

It prints one line of JSON with its addresses and thread ids, then answers each line on its standard input with one:

    write N     write the variable N times, as fast as it goes     {"did": N, "ns": ...}
    read N      read it N times
    call N      call the function N times
    copy N      have the kernel copy eight bytes into the variable N times, by read(2)
    leave       have the threads of --threads exit; the process stays
    grow N      make N more such threads, as fast as it goes
    spawn N     N times, make a thread that writes once and exits
    fork N      have a child process write N times, and wait for its end
    exec        start this program anew in the same process; answers with its first line
    abandon     have the first thread exit; another one answers from then on
    idle        do nothing
    quit        exit (as does the end of the input)

With ``--threads K`` each of K threads does all of it, and "did" is the sum. With ``--every MS`` it reads no input, and
writes once every so many milliseconds until it is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import queue
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

PAGE_BYTES = mmap.PAGESIZE
BLOCK_BYTES = 256  # each loop, and the function, in a block of its own

# Each loop is called as loop(address, n), counts in the register that holds a result, and returns it.
X86_64 = {
    "write": bytes.fromhex(
        "31c0"  #         xor  eax, eax
        "4885f6"  #       test rsi, rsi
        "740b"  #         je   done
        "488907"  # again: mov  [rdi], rax
        "48ffc0"  #       inc  rax
        "4839f0"  #       cmp  rax, rsi
        "75f5"  #         jne  again
        "c3"  # done:     ret
    ),
    "read": bytes.fromhex("31c0 4885f6 740b 488b0f 48ffc0 4839f0 75f5 c3"),  # the same with mov rcx, [rdi]
    "call": bytes.fromhex(
        "31c0"  #         xor  eax, eax
        "4885f6"  #       test rsi, rsi
        "7407"  #         je   done
        "ffd7"  # again:  call rdi        ; the function adds one to rax
        "4839f0"  #       cmp  rax, rsi
        "75f9"  #         jne  again
        "c3"  # done:     ret
    ),
    "function": bytes.fromhex("48ffc0 c3"),  # inc rax; ret
}


def _words(*instructions: int) -> bytes:
    return struct.pack(f"<{len(instructions)}I", *instructions)


AARCH64 = {
    "write": _words(
        0xAA0003E2,  #        mov  x2, x0
        0xD2800000,  #        mov  x0, #0
        0xB40000A1,  #        cbz  x1, done
        0xF9000040,  # again: str  x0, [x2]
        0x91000400,  #        add  x0, x0, #1
        0xEB01001F,  #        cmp  x0, x1
        0x54FFFFA1,  #        b.ne again
        0xD65F03C0,  # done:  ret
    ),
    "read": _words(  # the same with ldr x3, [x2]
        *(0xAA0003E2, 0xD2800000, 0xB40000A1, 0xF9400043, 0x91000400, 0xEB01001F, 0x54FFFFA1, 0xD65F03C0)
    ),
    "call": _words(
        0xA9BF7BFD,  #        stp  x29, x30, [sp, #-16]!
        0xAA0003E2,  #        mov  x2, x0
        0xD2800000,  #        mov  x0, #0
        0xB4000081,  #        cbz  x1, done
        0xD63F0040,  # again: blr  x2         ; the function adds one to x0
        0xEB01001F,  #        cmp  x0, x1
        0x54FFFFC1,  #        b.ne again
        0xA8C17BFD,  # done:  ldp  x29, x30, [sp], #16
        0xD65F03C0,  #        ret
    ),
    "function": _words(0x91000400, 0xD65F03C0),  # add x0, x0, #1; ret
}

MACHINE_CODE = {"x86_64": X86_64, "aarch64": AARCH64}
EXIT_CALL = {"x86_64": 60, "aarch64": 93}  # exit(2) as the kernel has it: of one thread


class Program:
    """The variable, on a page of its own, and the loops over it."""

    def __init__(self) -> None:
        code = MACHINE_CODE[os.uname().machine]
        self.code_bytes = BLOCK_BYTES * len(code)
        self.code = _map_executable(b"".join(block.ljust(BLOCK_BYTES, b"\0") for block in code.values()))
        addresses = {name: self.code + BLOCK_BYTES * index for index, name in enumerate(code)}
        self.function = addresses.pop("function")
        self._page = mmap.mmap(-1, PAGE_BYTES)
        self.variable = ctypes.addressof(ctypes.c_uint64.from_buffer(self._page))
        loop = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64)
        self._loops: dict[str, Callable[[int, int], int]] = {name: loop(at) for name, at in addresses.items()}
        self._zeroes = os.memfd_create("zeroes")
        os.ftruncate(self._zeroes, 8)

    def do(self, verb: str, times: int) -> int:
        """Do it that many times on the calling thread; return how often the loop says it was."""
        if verb == "copy":
            word = memoryview(self._page)[:8]
            return sum(os.preadv(self._zeroes, [word], 0) == 8 for _ in range(times))
        return self._loops[verb](self.function if verb == "call" else self.variable, times)


def _map_executable(code: bytes) -> int:
    """
    Return the address of ``code`` in executable memory.

    It goes through a file: pages that were written through memory would need their caches flushed by hand on Arm.
    """
    fd = os.memfd_create("loops")
    os.write(fd, code)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    address = libc.mmap(None, len(code), mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
    os.close(fd)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "no executable memory")
    return int(address)


class Worker(threading.Thread):
    """A thread that does what it is told to."""

    def __init__(self, program: Program) -> None:
        super().__init__(daemon=True)
        self._program = program
        self._orders: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.start()
        self.tid = self._done.get()

    def run(self) -> None:
        self._done.put(threading.get_native_id())
        while True:
            verb, times = self._orders.get()
            if verb == "leave":
                return
            self._done.put(self._program.do(verb, times))

    def begin(self, verb: str, times: int) -> None:
        self._orders.put((verb, times))

    def end(self) -> int:
        return self._done.get()


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description="A program to be watched.")
    parser.add_argument("--threads", type=int, default=0, metavar="K", help="do it on K threads, not on the main one")
    parser.add_argument("--every", type=float, metavar="MS", help="write once every MS milliseconds; read no input")
    options = parser.parse_args(arguments)
    program = Program()
    workers = [Worker(program) for _ in range(options.threads)]
    tids = [worker.tid for worker in workers] or [os.getpid()]
    _say(
        pid=os.getpid(),
        tid=tids[0],
        tids=tids,
        variable=program.variable,
        function=program.function,
        code=program.code,
        code_bytes=program.code_bytes,
    )
    while options.every is not None:
        _perform(program, workers, "write", 1)
        time.sleep(options.every / 1000)
    _serve(program, workers)


def _serve(program: Program, workers: list[Worker]) -> None:
    while True:
        verb, *rest = sys.stdin.readline().split() or ["quit"]
        began_ns = time.monotonic_ns()
        match verb:
            case "quit":
                os._exit(0)
            case "idle":
                did = 0
            case "leave":
                did = _leave(workers)
            case "grow":
                workers += [Worker(program) for _ in range(int(rest[0]))]
                did = len(workers)
            case "spawn":
                did = _spawn(program, int(rest[0]))
            case "fork":
                did = _fork(program, int(rest[0]))
            case "exec":
                os.execv(sys.executable, [sys.executable, *sys.argv])
            case "abandon":
                threading.Thread(target=_serve, args=(program, workers)).start()
                _say(did=1, ns=time.monotonic_ns() - began_ns)
                ctypes.CDLL(None).syscall(EXIT_CALL[os.uname().machine], 0)
            case _:
                did = _perform(program, workers, verb, int(rest[0]))
        _say(did=did, ns=time.monotonic_ns() - began_ns)


def _spawn(program: Program, times: int) -> int:
    did: list[int] = []
    for _ in range(times):
        thread = threading.Thread(target=lambda: did.append(program.do("write", 1)))
        thread.start()
        thread.join()
    return sum(did)


def _fork(program: Program, times: int) -> int:
    child = os.fork()
    if child == 0:
        program.do("write", times)
        os._exit(0)
    os.waitpid(child, 0)
    return times


def _perform(program: Program, workers: list[Worker], verb: str, times: int) -> int:
    if not workers:
        return program.do(verb, times)
    for worker in workers:
        worker.begin(verb, times)
    return sum(worker.end() for worker in workers)


def _leave(workers: list[Worker]) -> int:
    for worker in workers:
        worker.begin("leave", 0)
        worker.join()
    return len(workers)


def _say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


class Target:
    """
    The program as a subprocess, for tests and benchmarks.

        with Target() as target:
            target.command("write 100")["did"] == 100
    """

    def __init__(self, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        about = self.answer()
        self.pid: int = about["pid"]
        self.tid: int = about["tid"]
        self.tids: list[int] = about["tids"]
        self.variable: int = about["variable"]
        self.function: int = about["function"]
        self.code = range(about["code"], about["code"] + about["code_bytes"])

    def command(self, line: str) -> dict[str, Any]:
        """Send one command and return its answer."""
        self.send(line)
        return self.answer()

    def send(self, line: str) -> None:
        """Send one command; ``answer`` waits for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def has_answered(self) -> bool:
        """Whether the answer to a command that was sent has come."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def kill(self) -> None:
        """End it without warning, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def answer(self) -> dict[str, Any]:
        """Return the answer to the oldest command that has none yet; raises ``EOFError`` when there will be none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"the watched program has ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Target:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


if __name__ == "__main__":
    main()
