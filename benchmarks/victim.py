"""
A program that is watched and says when: it notes the time, then writes the watched word, again and again.

``python -m benchmarks.victim FILE`` prints its thread and the word's address. Each line ``N MICROSECONDS`` on its
standard input makes it write N times, at least so long apart, and answer ``done``. FILE is shared memory: the word on
its first page, the times of the last N writes (CLOCK_MONOTONIC, ns) on the pages behind it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

WRITES_MAX = 1_000
FILE_BYTES = mmap.PAGESIZE + 8 * WRITES_MAX
DONE = "done"


def main(path: str) -> None:
    """Write when told to, until the end of the input."""
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), FILE_BYTES)
    words = memoryview(memory).cast("Q")
    written_ns = words[mmap.PAGESIZE // 8 :]
    print(os.getpid(), ctypes.addressof(ctypes.c_uint64.from_buffer(memory)), flush=True)
    for line in sys.stdin:
        times, microseconds = (int(word) for word in line.split())
        write(words, written_ns, times, microseconds / 1e6)
        print(DONE, flush=True)


def write(words: memoryview, written_ns: memoryview, times: int, pause_s: float) -> None:
    clock, sleep = time.monotonic_ns, time.sleep
    for number in range(times):
        sleep(pause_s)
        written_ns[number] = clock()
        words[0] = number


class Victim:
    """The program as a subprocess."""

    def __init__(self, folder: Path) -> None:
        path = folder / "victim"
        path.write_bytes(bytes(FILE_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), FILE_BYTES)
        command = [sys.executable, "-m", "benchmarks.victim", str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self._process.stdout is not None
        self.tid, self.address = (int(word) for word in self._process.stdout.readline().split())

    def write(self, times: int, pause_us: int) -> Sequence[int]:
        """Have it write; return when it did each time, in ns of CLOCK_MONOTONIC."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{times} {pause_us}\n")
        answer = self._process.stdout.readline().strip()
        assert answer == DONE, answer
        with memoryview(self._memory) as whole, whole[mmap.PAGESIZE :] as behind, behind.cast("Q") as written_ns:
            return list(written_ns[:times])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._memory.close()


if __name__ == "__main__":
    main(sys.argv[1])
