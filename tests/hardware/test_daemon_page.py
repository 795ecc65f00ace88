"""
The status page of a daemon on real registers: never late, and right again after the daemon was killed.

What is held against each other is what the kernel saw, hit by hit with its time, and what a thread read on the page
right before the write that was hit.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hwbp
from hwbp import Answer
from hwbpd_linux.cpus import online_cpus
from tests.hardware.daemon import MARKS, WAIT_S, Daemon
from tests.hardware.page_victim import CHANGED

pytestmark = MARKS

ROUNDS = 240
HITS_PER_ROUND = 3  # are awaited; many more come
VICTIM = Path(__file__).with_name("page_victim.py")


def until(condition: Callable[[], object]) -> None:
    """Wait for something to be seen in memory, of which nothing tells."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.001)


class Victim:
    """``page_victim`` as a process."""

    def __init__(self, daemon: Daemon, cpu: int, folder: Path) -> None:
        self.path = folder / "rows"
        command = [sys.executable, "-m", "tests.hardware.page_victim", str(daemon.socket), str(cpu), str(self.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.says: dict[str, int] = json.loads(self.process.stdout.readline())

    def rows(self) -> list[tuple[int, ...]]:
        """End it; return what it saw, a row for each write."""
        self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == 0
        columns = array("Q")
        columns.frombytes(self.path.read_bytes())
        return list(zip(*[iter(columns)] * 4, strict=True))


def test_no_hit_comes_before_the_page_has_said_so(host: None, tmp_path: Path) -> None:
    # given a thread that asks the page before and after each write of a variable
    cpu = online_cpus()[-1]
    with Daemon() as daemon, daemon.connect() as client:
        victim = Victim(daemon, cpu, tmp_path)
        tid, pid, event = victim.says["tid"], victim.says["pid"], f"mem:{victim.says['address']:#x}/8:w"
        targets: list[dict[str, Any]] = [
            {"tid": tid},
            {"pid": pid},
            {"cpus": [cpu]},
            {},
            {"tid": tid, "cpus": [cpu]},
        ]

        # when it is watched and not watched any more, in every way; each third claim takes the place of the one before
        hits: list[hwbp.Hit] = []
        earlier: hwbp.Watch | None = None
        for number in range(ROUNDS):
            watch = client.claim(event, **targets[number % len(targets)], guard=0, user=True, kernel=False)
            if earlier is not None:
                earlier.release()
                hits += earlier.hits(timeout=0)
            hits += itertools.islice(watch.hits(timeout=WAIT_S), HITS_PER_ROUND)
            if number % 3:
                watch.release()
                hits += watch.hits(timeout=0)
            earlier = None if number % 3 else watch
        if earlier is not None:
            earlier.release()
            hits += earlier.hits(timeout=0)

        # then no write was hit without the page saying, or beginning to say, that it may be
        rows = victim.rows()
        starts = [row[0] for row in rows]
        seen: Counter[str] = Counter()
        for hit in hits:
            start_ns, end_ns, before, after = rows[bisect.bisect_right(starts, hit.time_ns) - 1]
            assert start_ns <= hit.time_ns <= end_ns, "every hit is one of these writes"
            changed = after >= CHANGED
            assert before != Answer.NONE or changed, f"a hit at {hit.time_ns} of which the page said nothing"
            seen["announced" if before == Answer.YES else "announced meanwhile"] += 1
        assert seen["announced"] >= ROUNDS * HITS_PER_ROUND - ROUNDS
        assert sum(row[2] == Answer.NONE for row in rows) > ROUNDS, "it was not always watched"
        assert not any(row[2] == Answer.UNKNOWN for row in rows), "the heart beat all the time"


def test_a_daemon_that_was_killed_is_unknown_and_the_next_one_is_right(alone: None) -> None:
    # given a thread and a CPU on the page of a daemon, and a claim on that CPU
    watched = ctypes.c_uint64()
    event = f"mem:{ctypes.addressof(watched):#x}/8:w"
    with Daemon() as daemon:
        client = daemon.connect()
        page = hwbp.open_page(f"{daemon.socket}.page")
        me = client.thread()
        cpu = online_cpus()[0]
        assert me.enabled(cpu) is page.enabled(cpu) is Answer.NONE
        client.claim(event, cpus=[cpu], delivery="count")
        assert me.enabled(cpu) is page.enabled(cpu) is Answer.YES
        epoch = page.epoch

        # when it is killed, then what it said lingers until nothing is known
        daemon.kill()
        until(lambda: me.enabled(cpu) is page.enabled(cpu) is Answer.UNKNOWN)

        # when another one serves, then the CPU is right at once, by the same page; the thread once it has registered
        daemon.start()
        assert page.enabled(cpu) is Answer.NONE
        assert page.epoch != epoch
        assert me.enabled(cpu) is Answer.UNKNOWN
        assert not me.is_registered
        with daemon.connect() as again:
            again.register(me)
            assert me.enabled(cpu) is Answer.NONE
            again.claim(event, tid=me.tid, delivery="count")
            assert (me.enabled(cpu), page.enabled(cpu), me.enabled()) == (Answer.YES, Answer.NONE, Answer.YES)
            assert again.enabled(cpu, me.tid) == hwbp.Enabled(True, 1, 1)
        until(lambda: me.enabled(cpu) is Answer.UNKNOWN)  # its session is over
        client.close()
    assert page.enabled(cpu) is Answer.UNKNOWN, "a daemon that stopped says so at once"


def test_threads_that_are_born_while_their_process_is_watched_find_it_on_the_page(alone: None) -> None:
    watched = ctypes.c_uint64()
    event = f"mem:{ctypes.addressof(watched):#x}/8:w"
    cpu = online_cpus()[0]
    with Daemon() as daemon, daemon.connect() as client:
        watch = client.claim(event, pid=os.getpid(), delivery="count")
        said: list[Answer] = []

        def asks() -> None:
            with daemon.connect() as own:
                said.append(own.thread().enabled(cpu))

        born = [threading.Thread(target=asks) for _ in range(3)]
        for thread in born:
            thread.start()
        for thread in born:
            thread.join()
        assert [*said, client.thread().enabled(cpu)] == [Answer.YES] * 4
        assert client.page.enabled(cpu) is Answer.NONE
        watch.release()
        assert client.thread().enabled(cpu) is Answer.NONE
