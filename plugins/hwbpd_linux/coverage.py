"""
Gives every thread of a running process one leg on each CPU: no thread without, and none with two.

A thread is *covered* when it has legs of its own, which are opened here, or when it was born of a covered thread and so
inherited them. Threads may be made and may end at any moment meanwhile. What is known for certain:

1. What /proc lists before the first leg is opened was born without.
2. A thread makes one thread at a time: it copies its legs, then the new thread appears in /proc, then the kernel
   reports the birth. So a birth reported before the parent's legs were opened copied none; and of those reported after,
   only the first can have copied its legs before they were complete. From the second on they are.
3. A thread that sleeps is not in the midst of making another. Once it has been seen asleep, every birth that may have
   come too early has been reported.

For the one birth that 2 leaves open, the kernel's own count decides: a thread that inherited a leg has no more slots
free than its parent. A leg is opened exactly where it is missing.

What is left open: a thread that never sleeps is given ``GRACE_NS`` to report a birth. If it is kept from running for
longer than that, between copying its legs and the report, while its legs are opened, the thread it makes is not
covered. To stop the whole process first would rule that out; but an observer should not interrupt what it observes.
And a tracer that has slots on the one of two threads only, in that moment, misleads the count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from hwbpd_linux.outlets import Birth

GRACE_NS: Final = 5_000_000
_PATIENCE_NS: Final = 1_000_000_000  # a process that is still not followed then makes threads faster than we look


class Surroundings(Protocol):
    """The process, as far as it matters here."""

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC, as births have it."""
        ...

    def listed(self) -> Iterable[int]:
        """The threads that /proc lists now."""
        ...

    def births(self) -> Iterable[Birth]:
        """The births reported since this was last asked, in order of time."""
        ...

    def is_asleep(self, tid: int) -> bool:
        """Whether the thread is not making another one for certain; so it is when it has ended."""
        ...

    def open(self, tid: int, cpus: Sequence[int]) -> bool:
        """Open a leg on each of these CPUs; false if the thread has ended."""
        ...

    def slots_free(self, tid: int, cpu: int) -> int | None:
        """How many more legs would fit on a thread, those not inherited set aside; None if the thread has ended."""
        ...

    def rest(self) -> None:
        """Let others run for a moment."""
        ...


class _Opened(NamedTuple):
    began_ns: int
    done_ns: int


class Coverage:
    """What is known of each thread while legs are opened."""

    def __init__(self, process: Surroundings, cpus: Sequence[int]) -> None:
        self._process = process
        self._cpus = cpus
        self._opened: dict[int, _Opened] = {}
        self._inherited: set[int] = set()
        self._without: set[int] = set()  # born, and certain to have no leg
        self._unsure: dict[int, int] = {}  # born, and nobody knows yet: thread -> its parent
        self._partly: set[int] = set()  # was born with some legs, or nobody will ever know
        self._early: list[Birth] = []  # read before the parent's
        self._fertile: set[int] = set()  # has made a thread since its legs were complete
        self._seen_asleep: set[int] = set()  # the same
        self._ended: set[int] = set()

    def complete(self) -> None:
        """
        Cover all threads.

        :raises BlockingIOError: when threads are born faster than they can be followed.
        :raises OSError: when a leg is refused.
        """
        process = self._process
        self._note(process.births())
        for tid in process.listed():
            self._open(tid, self._cpus)
        deadline_ns = process.now_ns() + _PATIENCE_NS
        while True:
            quiet = self._is_quiet()
            news = [tid for tid in process.listed() if not self._is_done_with(tid)]
            self._note(process.births())
            if quiet and not news:
                return
            if process.now_ns() > deadline_ns:
                raise BlockingIOError("threads are born faster than they can be followed")
            for tid in news:
                if tid in self._without:
                    self._open(tid, self._cpus)
                elif tid in self._unsure:
                    self._open_where_missing(tid)
                # Else it has inherited its legs, or its birth is about to be reported.
            if not quiet:
                process.rest()

    def _is_done_with(self, tid: int) -> bool:
        return tid in self._opened or tid in self._inherited or tid in self._ended

    def _is_quiet(self) -> bool:
        """Whether every thread has reported what it was making while its legs were opened."""
        now_ns = self._process.now_ns()
        for tid, opened in self._opened.items():
            if tid in self._fertile or tid in self._seen_asleep or now_ns > opened.done_ns + GRACE_NS:
                continue
            if not self._process.is_asleep(tid):
                return False
            self._seen_asleep.add(tid)
        return True

    def _note(self, births: Iterable[Birth]) -> None:
        """
        Note what each birth says of the new thread's legs.

        A birth may be read before that of the parent, from another CPU's ring; it waits for the next reading then. A
        parent that is unknown even so was there before the first look, and had ended by then.
        """
        again, self._early = self._early, []
        for birth in sorted((*again, *births)):
            if not self._is_known(birth.parent) and birth not in again:
                self._early.append(birth)
            elif birth.parent in self._inherited:
                self._inherited.add(birth.tid)
            elif self._may_have_some(birth):
                self._unsure[birth.tid] = birth.parent
            elif birth.parent in self._opened and birth.time_ns >= self._opened[birth.parent].began_ns:
                self._note_child_of_opened(birth)
            else:
                self._without.add(birth.tid)

    def _note_child_of_opened(self, birth: Birth) -> None:
        if birth.parent in self._fertile:
            self._inherited.add(birth.tid)
            return
        self._unsure[birth.tid] = birth.parent
        if birth.time_ns > self._opened[birth.parent].done_ns:
            self._fertile.add(birth.parent)

    def _may_have_some(self, birth: Birth) -> bool:
        """Whether the parent may have had some legs before it was given others, if it was."""
        if birth.parent in self._unsure:
            return True
        opened = self._opened.get(birth.parent)
        return birth.parent in self._partly and (opened is None or birth.time_ns < opened.began_ns)

    def _is_known(self, tid: int) -> bool:
        return self._is_done_with(tid) or tid in self._unsure or tid in self._without

    def _open(self, tid: int, cpus: Sequence[int]) -> None:
        began_ns = self._process.now_ns()
        if self._process.open(tid, cpus):
            self._opened[tid] = _Opened(began_ns, self._process.now_ns())
        else:
            self._ended.add(tid)

    def _open_where_missing(self, tid: int) -> None:
        missing = []
        for cpu in self._cpus:
            free = self._process.slots_free(tid, cpu)
            free_if_covered = self._slots_free_if_covered(self._unsure[tid], cpu)
            if free is None:
                self._ended.add(tid)
            elif free > free_if_covered:
                missing.append(cpu)
        del self._unsure[tid]
        if tid not in self._ended and not missing:
            self._inherited.add(tid)
            return
        if tid in self._ended or len(missing) < len(self._cpus):
            self._partly.add(tid)
        if tid not in self._ended:
            self._open(tid, missing)

    def _slots_free_if_covered(self, parent: int, cpu: int) -> int:
        """How many slots a covered thread has free: the parent if it is one, else any that lives."""
        for tid in (parent, *self._opened):
            if tid in self._opened or tid in self._inherited:
                free = self._process.slots_free(tid, cpu)
                if free is not None:
                    return free
        raise BlockingIOError("no thread lives for long enough to be compared with")
