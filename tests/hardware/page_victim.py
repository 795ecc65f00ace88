"""
A thread that asks the status page before and after each of its writes, for a test that knows which writes were hits.

It is pinned to a CPU and registers with the daemon on a socket. It prints a line of JSON, writes until its input ends,
and leaves four columns of 64-bit words in a file, a row for each write: the time before and after it, the answer before
it, and the answer after it plus 4 if anything on the page changed between.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import sys
import time
from array import array

import hwbp

CHANGED = 4
WRITES_PER_LOOK = 64  # at the input


def main(socket: str, cpu: int, path: str) -> None:
    os.sched_setaffinity(0, {cpu})
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    word = memoryview(memory).cast("Q")
    address = ctypes.addressof(ctypes.c_uint64.from_buffer(memory))
    rows = array("Q")
    with hwbp.connect(socket, "victim", timeout=20.0) as client:
        me, page = client.thread(), client.page
        print(json.dumps({"pid": os.getpid(), "tid": me.tid, "address": address}), flush=True)
        now_ns = time.monotonic_ns
        while not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(WRITES_PER_LOOK):
                changes = page.changes
                before = me.enabled(cpu)
                start_ns = now_ns()
                word[0] = start_ns
                end_ns = now_ns()
                after = me.enabled(cpu)
                rows.extend((start_ns, end_ns, before, after + CHANGED * (page.changes != changes)))
    with open(path, "wb") as file:
        rows.tofile(file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
