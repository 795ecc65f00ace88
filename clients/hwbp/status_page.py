"""
``hw_breakpoint_enabled`` without a request: reads the status page, a file that the daemon keeps up to date.

docs/status-page.md is what this is written from. Rules kept here:

- an answer is *none* only if every word that concerns the caller says so and the daemon's heartbeat is not stale;
- a thread's word counts only while the registration in it is ours. Once it is not, it never is again: the session is
  over, or the daemon was started anew. The handle then says *unknown* until its thread registers again.

The heartbeat is looked at each time. To look at every n-th only would be cheaper by a third, and pass a dead daemon's
word off as true for as long as nobody asks.
"""

from __future__ import annotations

import enum
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hwbp.errors import BadMessage, NotReachable, VersionMismatch

PAGE_SUFFIX: Final = ".page"

# docs/status-page.md, "Layout". Indices are of 64-bit words.
MAGIC: Final = int.from_bytes(b"hwbpage\0", sys.byteorder)
LAYOUT: Final = 1
MAGIC_AT: Final = 0
LAYOUT_AT: Final = 1
BYTES_AT: Final = 2
CPUS_FROM_AT: Final = 3
CPUS_AT: Final = 4
THREADS_FROM_AT: Final = 5
THREADS_AT: Final = 6
EPOCH_AT: Final = 8
VALID_UNTIL_S_AT: Final = 9
EVERYWHERE_AT: Final = 10
CHANGES_AT: Final = 11
KGDB_AT: Final = 13
HEADER_BYTES: Final = 4096
ARMED_MASK: Final = 0xFFFF
REGISTRATION_SHIFT: Final = 32
VALID_S: Final = 3


class Answer(enum.IntEnum):
    """
    May a hardware breakpoint of the host be installed here?

    Only NONE is false: whoever must not miss one writes ``if handle.enabled(cpu)``, and does not take UNKNOWN for no.
    """

    NONE = 0  # none of the daemon's; others may have some outside it
    YES = 1
    UNKNOWN = 2  # the daemon does not run, is stuck, or does not know this thread (any more)


_NONE, _YES, _UNKNOWN = Answer.NONE, Answer.YES, Answer.UNKNOWN  # looking them up in the class costs as much as a word


class StatusPage:
    """
    The page, mapped for reading. It stays right when the daemon is started anew, and need not be opened again.

    :param words: the page as 64-bit words; ``open_page`` maps a file.
    :raises VersionMismatch: when that is no page, or one with another layout.
    :raises NotReachable: when no daemon has written it since this host was started.
    """

    def __init__(self, words: memoryview[int], name: str = "the status page") -> None:
        if len(words) * 8 < HEADER_BYTES or words[MAGIC_AT] != MAGIC:
            raise VersionMismatch(f"{name} is no status page of hwbpd")
        if words[LAYOUT_AT] != LAYOUT or words[BYTES_AT] > len(words) * 8:
            raise VersionMismatch(f"{name} has layout {words[LAYOUT_AT]}, this client reads layout {LAYOUT}")
        if words[VALID_UNTIL_S_AT] > time.monotonic() + VALID_S:
            raise NotReachable(f"{name} is of before this host was started, and no daemon has run since")
        self.words = words
        self._valid_until_s = words[VALID_UNTIL_S_AT : VALID_UNTIL_S_AT + 1]
        self._everywhere = words[EVERYWHERE_AT : EVERYWHERE_AT + 1]
        self._cpus = words[words[CPUS_FROM_AT] : words[CPUS_FROM_AT] + words[CPUS_AT]]
        self._threads = words[words[THREADS_FROM_AT] : words[THREADS_FROM_AT] + words[THREADS_AT]]

    @property
    def is_valid(self) -> bool:
        """Whether a daemon keeps it up to date."""
        return time.monotonic() < self._valid_until_s[0]

    @property
    def epoch(self) -> int:
        """Which run of the daemon writes it, or did."""
        return self.words[EPOCH_AT]

    @property
    def changes(self) -> int:
        """A number that is another one once any count has changed."""
        return self.words[CHANGES_AT]

    @property
    def kgdb_claims(self) -> int:
        """How many claims of kgdb have registers, which it takes without asking; what it does outside is not known."""
        return self.words[KGDB_AT]

    def enabled(self, cpu: int) -> Answer:
        """
        Answer for a CPU, whatever runs there: its CPU-wide breakpoints, not those of any thread.

        :raises ValueError: for a number that no CPU can have.
        """
        return self._answer(self._everywhere[0] | self._cpu(cpu))

    def _cpu(self, cpu: int) -> int:
        if not 0 <= cpu < len(self._cpus):
            raise ValueError(f"there is no CPU {cpu}")
        return self._cpus[cpu]

    def _answer(self, counts: int) -> Answer:
        if not self.is_valid:
            return _UNKNOWN
        return _YES if counts & ARMED_MASK else _NONE


class Thread:
    """
    A thread that asks: may a breakpoint be installed where I run, at my next instruction?

    Made by ``Client.thread`` for the calling thread. Another thread may use it and gets the first one's answer. It is
    not for use after ``fork``: the child is another thread.
    """

    __slots__ = ("_cpus", "_everywhere", "_number", "_page", "_quiet", "_valid_until_s", "_word", "tid")

    def __init__(self, page: StatusPage, tid: int, index: int, number: int) -> None:
        """:param index: which of the threads' words is its own, and ``number`` its registration, as the daemon said."""
        self.tid = tid
        self.renew(page, index, number)

    def renew(self, page: StatusPage, index: int, number: int) -> None:
        """It has registered again; ``Client.register`` does it."""
        if not 0 <= index < len(page._threads):
            raise BadMessage(f"the daemon gave thread {self.tid} word {index}, and the page has {len(page._threads)}")
        self._page = page
        self._number = number
        self._quiet = number << REGISTRATION_SHIFT  # the word while nothing is held for it
        self._word = page._threads[index : index + 1]
        self._everywhere = page._everywhere
        self._cpus = page._cpus
        self._valid_until_s = page._valid_until_s

    @property
    def page(self) -> StatusPage:
        """The page that its answers come from."""
        return self._page

    @property
    def is_registered(self) -> bool:
        """Whether the daemon knows this thread; if not, every answer is UNKNOWN until ``Client.register``."""
        return self._word[0] >> REGISTRATION_SHIFT == self._number

    def enabled(self, cpu: int | None = None, _now: Callable[[], float] = time.monotonic) -> Answer:
        """
        Answer for this thread while it runs on a CPU.

        A claim for this thread on certain CPUs only counts on all of them.

        :param cpu: where it runs and will run: it has to be pinned there, or not be moved until the answer is used.
            Without, the answer is for all CPUs it may run on (``sched_getaffinity``), at the cost of a system call.
        :raises ValueError: for a number that no CPU can have.
        """
        # Most threads have none, on a CPU without any: three words and the time. All else is looked at more closely.
        try:
            if (
                cpu is not None
                and self._word[0] == self._quiet
                and not self._everywhere[0]
                and cpu >= 0
                and not self._cpus[cpu]
                and _now() < self._valid_until_s[0]
            ):
                return _NONE
        except IndexError:
            pass  # there is no such CPU, as will be said below
        return self._look(os.sched_getaffinity(self.tid) if cpu is None else (cpu,))

    def _look(self, cpus: set[int] | tuple[int, ...]) -> Answer:
        word = self._word[0]
        counts = word | self._everywhere[0]
        for cpu in cpus:
            counts |= self._page._cpu(cpu)
        return self._page._answer(counts) if word >> REGISTRATION_SHIFT == self._number else _UNKNOWN

    def __repr__(self) -> str:
        return f"<hwbp.Thread {self.tid}: {'registered' if self.is_registered else 'not registered'}>"


def page_path(socket: Path) -> Path:
    """Return where the page of the daemon on that socket is."""
    return socket.with_name(socket.name + PAGE_SUFFIX)


def open_page(path: str | os.PathLike[str]) -> StatusPage:
    """
    Map a page.

    :raises NotReachable: when there is none, or none since this host was started; ``VersionMismatch`` when it is
        another sort of file, or has another layout.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size < HEADER_BYTES or size % 8:
                raise VersionMismatch(f"{path} is no status page of hwbpd")
            return StatusPage(memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ)).cast("Q"), str(path))
        finally:
            os.close(fd)
    except OSError as why:
        if isinstance(why, NotReachable | VersionMismatch):
            raise
        raise NotReachable(f"no status page at {path}: {why.strerror}") from why
