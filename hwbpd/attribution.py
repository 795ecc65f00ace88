"""
Looks, in a worker thread, for those outside hwbpd who hold slots: it takes milliseconds, and nobody else shall wait.

At most one look a second: it reads all of /proc and its probes take slots for an instant. A refusal that comes sooner
is answered with what the last look found there, or with nothing, and then tells only how many slots are held outside.
Somebody who asks on purpose waits for the next look.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence

import structlog
from msgspec import Struct

from hwbpd.clock import Clock
from hwbpd.core.errors import Holder
from hwbpd.core.model import Pool, Target
from hwbpd.hookspecs import Foreign, Machine

log = structlog.get_logger("hwbpd")

NS_PER_S = 1_000_000_000
LOOK_EVERY_NS = NS_PER_S
PATIENT_MAX = 16  # looks that may wait their turn


class Place(Struct, frozen=True):
    """Where to look: what was refused, and on which CPU if the kernel said."""

    pool: Pool
    target: Target
    cpu: int | None


Answer = Callable[[tuple[Holder, ...]], None]
Looked = tuple[Place, Sequence[Foreign]]  # a place that was looked at, and all that was found there


def nobody_counts(place: Place, found: Sequence[Foreign]) -> None:
    """What becomes of the findings at a place where nobody keeps count."""


class Attribution:
    """One worker, one look at a time. ``fileno`` becomes readable when ``answers`` has something to do."""

    def __init__(self, machine: Machine, clock: Clock) -> None:
        self._machine = machine
        self._clock = clock
        self.looked = nobody_counts  # is told of each place when a look is done, in the thread of ``answers``
        self._done_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._jobs: queue.SimpleQueue[tuple[Sequence[Place], Answer, int] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Sequence[Place], Answer, Sequence[Looked]]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._under_way = 0  # looks, so that most turns of the loop need not even ask
        self._looked_ns = -LOOK_EVERY_NS
        self._looked_at: tuple[Place, ...] = ()
        self._found: tuple[Holder, ...] | None = ()
        self._waiting: dict[tuple[Place, ...], list[Answer]] = {}  # for a look under way at the same places
        self._worker = threading.Thread(target=self._work, name="attribution", daemon=True)
        self._worker.start()

    def fileno(self) -> int:
        return self._done_fd

    def look(self, places: Sequence[Place], answer: Answer, patient: bool = False) -> None:
        """
        Call ``answer`` with who was found: at once, or from ``answers`` when the worker has looked.

        :param patient: whether to wait for the next look rather than be answered with nothing.
        """
        now_ns = self._clock.now_ns()
        is_due = now_ns - self._looked_ns >= LOOK_EVERY_NS and self._found is not None
        if is_due or (patient and tuple(places) != self._looked_at and self._jobs.qsize() < PATIENT_MAX):
            not_before_ns = max(now_ns, self._looked_ns + LOOK_EVERY_NS)
            self._looked_ns, self._looked_at, self._found = not_before_ns, tuple(places), None
            self._under_way += 1
            self._jobs.put((places, answer, not_before_ns - now_ns))
        elif tuple(places) != self._looked_at:
            answer(())
        elif self._found is None:
            self._waiting.setdefault(self._looked_at, []).append(answer)
        else:
            answer(self._found)

    def answers(self) -> None:
        """Call those who wait for a look that is done."""
        if not self._under_way:
            return
        try:
            done = os.eventfd_read(self._done_fd)
        except BlockingIOError:
            return
        self._under_way -= done
        for _ in range(done):
            places, answer, looked = self._done.get()
            for place, there in looked:
                self.looked(place, there)
            found = tuple(dict.fromkeys(holder_of(one) for _, there in looked for one in there))
            if tuple(places) == self._looked_at:  # else a later look is under way, elsewhere
                self._found = found
            for one in (answer, *self._waiting.pop(tuple(places), ())):
                one(found)

    def close(self) -> None:
        """Let the worker end; a look that is under way is not waited for."""
        self._closing.set()
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            places, answer, wait_ns = job
            if self._closing.wait(wait_ns / NS_PER_S):
                return
            looked: list[Looked] = []
            try:
                for place in places:
                    looked.append((place, self._machine.foreign(place.pool, place.target, place.cpu)))
            except Exception:  # whatever /proc holds, a look that fails must not take the daemon with it
                log.exception("looking for foreign holders failed")
            self._done.put((places, answer, looked))
            os.eventfd_write(self._done_fd, 1)


def holder_of(found: Foreign) -> Holder:
    """In the terms of a refusal."""
    return Holder(found.pid, found.comm, found.uid, "", found.slots, found.place, (), found.evidence)
