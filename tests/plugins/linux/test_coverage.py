"""However threads are born and end while legs are opened, each of them has one leg on each CPU in the end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd_linux.coverage import Coverage
from hwbpd_linux.outlets import Birth

PID = 100
CPUS = (0, 1, 2)
STEP_NS = 1_000
SLOTS = 4


@dataclass
class FakeThread:
    """
    What it has inherited or was given, and how far it is in making another.

    A leg is known by the thread it was opened on, and its CPU.
    """

    legs: set[tuple[int, int]] = field(default_factory=set)
    making: int | None = None  # legs copied
    listed: bool = False  # that one is in /proc, and its birth not reported
    asleep: bool = False
    ended: bool = False


class FakeProcess:
    """
    A process whose threads run between any two things that are done to it.

    :param births_max: how many threads are made, after the ones there are.
    :param ends: whether threads end, too; all but the last of those there are at first.
    """

    def __init__(self, rng: random.Random, threads: int, births_max: int, *, ends: bool) -> None:
        self.threads = {PID + index: FakeThread() for index in range(threads)}
        self.proc = list(self.threads)
        self._running = list(self.threads)  # a new thread does not run before its birth is reported
        self._rng = rng
        self._births_max = births_max
        self._ends = ends
        self._next_tid = PID + threads
        self._survivor = PID + threads - 1
        self._reported: list[Birth] = []
        self._now_ns = 1
        self._run(rng.randrange(30))

    def now_ns(self) -> int:
        self._now_ns += STEP_NS
        return self._now_ns

    def listed(self) -> Iterable[int]:
        self._run(self._rng.randrange(4))
        return list(self.proc)

    def births(self) -> Iterable[Birth]:
        self._run(self._rng.randrange(4))
        read: list[Birth] = []
        for cpu in CPUS:  # one ring after the other, and more is reported meanwhile
            self._run(self._rng.randrange(15))
            read += [birth for birth in self._reported if birth.tid % len(CPUS) == cpu]
            self._reported = [birth for birth in self._reported if birth.tid % len(CPUS) != cpu]
        return sorted(read)

    def is_asleep(self, tid: int) -> bool:
        self._run(self._rng.randrange(3))
        return self.threads[tid].asleep or self.threads[tid].ended

    def open(self, tid: int, cpus: Sequence[int]) -> bool:
        for cpu in cpus:
            self._run(self._rng.randrange(6))
            if self.threads[tid].ended:
                for thread in self.threads.values():  # what was inherited is closed along with what was opened
                    thread.legs -= {(tid, opened) for opened in cpus}
                return False
            self.threads[tid].legs.add((tid, cpu))
        self._run(self._rng.randrange(3))
        return True

    def slots_free(self, tid: int, cpu: int) -> int | None:
        self._run(self._rng.randrange(3))
        thread = self.threads[tid]
        return None if thread.ended else SLOTS - 1 - sum(on == cpu for _, on in thread.legs)

    def rest(self) -> None:
        self._run(20)

    def finish(self) -> dict[int, Counter[int]]:
        """Let every birth be completed; return the legs of the threads that live."""
        self._births_max = 0
        for tid in list(self.threads):
            while self.threads[tid].making is not None:
                self._step(tid)
        return {tid: Counter(cpu for _, cpu in thread.legs) for tid, thread in self.threads.items() if not thread.ended}

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            self._now_ns += STEP_NS
            tid = self._rng.choice(self._running)
            if not self.threads[tid].ended:
                self._step(tid)

    def _step(self, tid: int) -> None:
        thread = self.threads[tid]
        if thread.making is not None:
            if not thread.listed:
                thread.listed = True
                self.proc.append(thread.making)
            else:
                self._reported.append(Birth(self._now_ns, PID, thread.making, tid))
                self._running.append(thread.making)
                thread.making, thread.listed = None, False
            return
        thread.asleep = False
        what = self._rng.random()
        if what < 0.4 and self._births_max:
            self._births_max -= 1
            thread.making, self._next_tid = self._next_tid, self._next_tid + 1
            self.threads[thread.making] = FakeThread(legs=set(thread.legs))
        elif what < 0.5 and self._ends and tid != self._survivor:
            thread.ended = True
            if tid != PID:  # the first stays listed as long as there are others
                self.proc.remove(tid)
        elif what < 0.8:
            thread.asleep = True


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 30), st.booleans())
def test_each_thread_has_one_leg_on_each_cpu(seed: int, threads: int, births: int, ends: bool) -> None:
    process = FakeProcess(random.Random(seed), threads, births, ends=ends)

    Coverage(process, CPUS).complete()

    wrong = {tid: legs for tid, legs in process.finish().items() if legs != dict.fromkeys(CPUS, 1)}
    assert wrong == {}


def test_a_process_that_never_stops_making_threads_is_given_up() -> None:
    class Rabbits(FakeProcess):
        def listed(self) -> Iterable[int]:
            self._now_ns += 20_000_000
            self.proc.append(self._next_tid)
            self.threads[self._next_tid] = FakeThread()
            self._next_tid += 1
            return list(self.proc)

    with pytest.raises(BlockingIOError, match="faster than they can be followed"):
        Coverage(Rabbits(random.Random(0), 1, 0, ends=False), CPUS).complete()
