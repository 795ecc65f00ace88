"""
Writes the status page, the shared file that answers ``hw_breakpoint_enabled`` without a request.

What may be installed is on it **before** the system call that arms, and goes from it **after** the one that disarms:
what it shows may come early or linger, but is never late. Who arms and disarms (``performer.py``) says so here in that
order; what is decided here is which words that concerns:

- a resource on all CPUs counts in one word, ``everywhere``. One for each CPU would cost every such claim as many stores
  as the host may ever have CPUs, and be late on a CPU that comes while the machine arms and we have not heard of yet.
  The price: on a CPU that came back and has no room for it, it still counts. It lingers there; it is not late;
- a resource on some CPUs counts in the word of each;
- a resource on a thread, on some CPUs or wherever it runs, counts in the words of that thread, and one on a process in
  those of all its threads. A thread that registers later finds what is armed for it.

The file is never unlinked, truncated or replaced while its layout is ours, so a reader that has mapped it once stays
right whichever daemon writes. Each daemon starts it with nothing armed; a thread's word then has no registration, and
its handle says *unknown* until it registers again. Registrations are numbered on over all daemons: a number that was
right once and is no more never is again.

The counts are kept here a second time, beside the books, because they follow the machine and not the decisions: books
say *held* before the machine was asked, and do not say *armed*.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from hwbpd import page_layout as layout
from hwbpd.core.errors import LimitReached
from hwbpd.core.model import Delivery, Process, Resource, Task

PAGE_SUFFIX = ".page"  # the file is beside the socket and named after it

Place = int | Task | Process | None  # a CPU, a thread, a process, or None: all CPUs


class CannotMakePage(Exception):
    """The file cannot be made or used; the message says why."""


class Count(NamedTuple):
    """Slots of ours: those the kernel counts, and of these those that may trap."""

    held: int
    armed: int


HELD: Final = 1 << 32  # counts are kept as held * HELD + armed, so that both are added up at once
ARMED: Final = 1


class Registration(NamedTuple):
    """A thread's word: the ``nth`` of those for threads, and the number in it that says whose it is."""

    nth: int
    number: int


class _Shown:
    """A resource on the page."""

    __slots__ = ("armed", "places", "resource")

    def __init__(self, resource: Resource, places: set[Place]) -> None:
        self.resource = resource
        self.places = places
        self.armed = resource.mode.delivery is not Delivery.HOLD


class StatusPage:
    """
    The writer.

    :param words: the page as 64-bit words, all zero or as an earlier daemon left them.
    :param epoch: names this run of the daemon.
    """

    def __init__(self, words: memoryview[int], epoch: int) -> None:
        assert len(words) * layout.WORD_BYTES == layout.BYTES
        self._words = words
        self._counts: dict[Place, int] = {}  # where there is something
        self._shown: dict[int, _Shown] = {}  # by resource
        self._free = list(range(layout.THREADS - 1, -1, -1))
        self._of_session: dict[int, dict[Task, Registration]] = {}
        self._words_of: dict[Task | Process, dict[int, Task]] = {}  # the threads' words that show what a place counts
        self.next_beat_ns = 0
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        words = self._words
        words[layout.VALID_UNTIL_S_AT] = 0  # first: until all is as it should be, readers know nothing
        for at in (layout.EVERYWHERE_AT, layout.KGDB_AT, *range(layout.CPUS_FROM, len(words))):
            if words[at]:
                words[at] = 0
        words[layout.CHANGES_AT] = (words[layout.CHANGES_AT] + 1) % 2**64
        words[layout.EPOCH_AT] = epoch
        words[layout.BYTES_AT] = layout.BYTES
        words[layout.CPUS_FROM_AT], words[layout.CPUS_AT] = layout.CPUS_FROM, layout.CPUS
        words[layout.THREADS_FROM_AT], words[layout.THREADS_AT] = layout.THREADS_FROM, layout.THREADS
        words[layout.LAYOUT_AT] = layout.LAYOUT
        words[layout.MAGIC_AT] = layout.MAGIC  # last: what has it is whole

    # --- is it true? -------------------------------------------------------------------------------------------------

    def beat(self, now_ns: int) -> None:
        """Say that the page is true for a while, if it is time to; ``next_beat_ns`` is when it is again."""
        if now_ns >= self.next_beat_ns:
            self._words[layout.VALID_UNTIL_S_AT] = now_ns // 10**9 + layout.VALID_S
            self.next_beat_ns = now_ns + layout.BEAT_NS

    def stop(self) -> None:
        """From now on it says nothing."""
        self._words[layout.VALID_UNTIL_S_AT] = 0

    # --- resources ---------------------------------------------------------------------------------------------------

    def show(self, resource: Resource) -> None:
        """It is about to be armed, or held."""
        target = resource.target
        places: set[Place] = {target.task or target.process}
        if target.is_cpu_wide and target.cpus is not None:
            places = set(target.cpus)
        if target.vcpu is not None:
            places = set()  # no register of the host's
        shown = self._shown[resource.resource_id] = _Shown(resource, places)
        self._add(places, HELD + shown.armed)

    def clear(self, resource_id: int) -> None:
        """It has been given back."""
        shown = self._shown.pop(resource_id)
        self._add(shown.places, -HELD - shown.armed)

    def __contains__(self, resource_id: int) -> bool:
        """Whether a resource is shown."""
        return resource_id in self._shown

    def show_armed(self, resource_id: int) -> None:
        """It is about to report again."""
        shown = self._shown[resource_id]
        if not shown.armed and shown.resource.mode.delivery is not Delivery.HOLD:
            shown.armed = True
            self._add(shown.places, ARMED)

    def clear_armed(self, resource_id: int) -> None:
        """It has been silenced, and is held."""
        shown = self._shown[resource_id]
        if shown.armed:
            shown.armed = False
            self._add(shown.places, -ARMED)

    def show_on(self, resource_id: int, cpu: int) -> None:
        """It is about to get a leg on a CPU that came online."""
        shown = self._shown[resource_id]
        if cpu not in shown.places and shown.resource.target.cpus is not None:
            shown.places.add(cpu)
            self._add((cpu,), HELD + shown.armed)

    def clear_on(self, resource_id: int, cpu: int) -> None:
        """Its leg on a CPU has been given back, or could not be had."""
        shown = self._shown[resource_id]
        if cpu in shown.places:
            shown.places.remove(cpu)
            self._add((cpu,), -HELD - shown.armed)

    def show_kgdb(self, claims: int) -> None:
        """kgdb is about to have registers by so many claims, or has given them back."""
        self._words[layout.KGDB_AT] = claims
        self._words[layout.CHANGES_AT] = (self._words[layout.CHANGES_AT] + 1) % 2**64

    def count(self, cpu: int | None, task: Task | None) -> Count:
        """What there is on a CPU, for a thread, or for both together, as a reader of the page would add it up."""
        counts = self._counts
        count = 0 if cpu is None else counts.get(None, 0) + counts.get(cpu, 0)
        if task is not None:
            count += self._of_thread(task)
        return Count(*divmod(count, HELD))

    def _of_thread(self, task: Task) -> int:
        of_process = 0 if task.process is None else self._counts.get(task.process, 0)
        return self._counts.get(task, 0) + of_process

    def _add(self, places: Iterable[Place], slots: int) -> None:
        words = self._words
        for place in places:
            count = self._counts.get(place, 0) + slots
            assert 0 <= count % HELD <= count // HELD, (place, count)
            if count:
                self._counts[place] = count
            else:
                del self._counts[place]
            if place is None:
                words[layout.EVERYWHERE_AT] = _word(count)
            elif isinstance(place, int):
                words[layout.CPUS_FROM + place] = _word(count)
            else:
                for at, task in self._words_of.get(place, {}).items():
                    self._write_thread(at, task, words[at] >> layout.REGISTRATION_SHIFT)
        words[layout.CHANGES_AT] = (words[layout.CHANGES_AT] + 1) % 2**64

    # --- threads -----------------------------------------------------------------------------------------------------

    def register(self, session_id: int, task: Task) -> Registration:
        """
        Give a thread a word for as long as the session lasts; the one it has, if it has one.

        :raises LimitReached: when all are taken.
        """
        mine = self._of_session.setdefault(session_id, {})
        for other in [other for other in mine if other.tid == task.tid and other != task]:
            self._unregister(session_id, other)  # it has exited, and its number is another thread's now
        if task not in mine:
            if not self._free:
                raise LimitReached(f"{layout.THREADS} threads are registered, all that the status page has words for")
            number = self._words[layout.REGISTRATIONS_AT] % layout.REGISTRATION_MAX + 1
            self._words[layout.REGISTRATIONS_AT] = number
            mine[task] = Registration(self._free.pop(), number)
            at = layout.THREADS_FROM + mine[task].nth
            for place in _places_of(task):
                self._words_of.setdefault(place, {})[at] = task
            self._write_thread(at, task, number)
        return mine[task]

    def registered(self, session_id: int) -> tuple[Task, ...]:
        """The threads that are registered in a session."""
        return tuple(self._of_session.get(session_id, ()))

    def unregister(self, session_id: int, task: Task) -> None:
        """Take a thread's word back: its handle says *unknown* from now on."""
        if task in self._of_session.get(session_id, ()):
            self._unregister(session_id, task)

    def unregister_all(self, session_id: int) -> None:
        """The same for all threads of a session."""
        for task in self.registered(session_id):
            self._unregister(session_id, task)
        self._of_session.pop(session_id, None)

    def _unregister(self, session_id: int, task: Task) -> None:
        nth = self._of_session[session_id].pop(task).nth
        at = layout.THREADS_FROM + nth
        self._words[at] = 0
        for place in _places_of(task):
            del self._words_of[place][at]
            if not self._words_of[place]:
                del self._words_of[place]
        self._free.append(nth)

    def _write_thread(self, at: int, task: Task, number: int) -> None:
        self._words[at] = number << layout.REGISTRATION_SHIFT | _word(self._of_thread(task))


def _word(count: int) -> int:
    return layout.counts(*divmod(count, HELD))


def _places_of(task: Task) -> tuple[Task | Process, ...]:
    return (task,) if task.process is None else (task, task.process)


def page_path(socket: Path) -> Path:
    """Where the page of the daemon on that socket is."""
    return socket.with_name(socket.name + PAGE_SUFFIX)


def map_page(path: Path) -> memoryview[int]:
    """
    Return the words of the page in that file, which is made if there is none; the caller keeps other daemons away.

    A page of another layout is told to its readers to be over, and makes room for a new one.

    :raises CannotMakePage: saying why; for a file that is no page, too, which is left as it is.
    """
    try:
        words = _map_file(path)
        if words is not None and words[layout.MAGIC_AT] and words[layout.LAYOUT_AT] != layout.LAYOUT:
            words[layout.VALID_UNTIL_S_AT] = 0
            words = None
        if words is None:
            path.unlink()
            words = _map_file(path)
    except OSError as why:
        raise CannotMakePage(f"cannot make the status page {path}: {why.strerror}") from None
    assert words is not None
    return words


def _map_file(path: Path) -> memoryview[int] | None:
    """Map the file, made if need be; None for a page of another size, which is over then."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise CannotMakePage(f"{path} is no status page of ours; remove it, or give another --socket")
        size = status.st_size
        if size not in (0, layout.BYTES):
            if size < layout.CPUS_FROM * layout.WORD_BYTES:
                raise CannotMakePage(f"{path} is no status page; remove it, or give another --socket")
            words = memoryview(mmap.mmap(fd, layout.CPUS_FROM * layout.WORD_BYTES)).cast("Q")
            if words[layout.MAGIC_AT] != layout.MAGIC:
                raise CannotMakePage(f"{path} is no status page; remove it, or give another --socket")
            words[layout.VALID_UNTIL_S_AT] = 0
            return None
        # All of it is taken from the file system now: where there is no room, a store would end this process later.
        os.posix_fallocate(fd, 0, layout.BYTES)
        os.fchmod(fd, 0o644)
        words = memoryview(mmap.mmap(fd, layout.BYTES)).cast("Q")
        if words[layout.MAGIC_AT] not in (0, layout.MAGIC):  # 0: whoever began it did not live to finish
            raise CannotMakePage(f"{path} is no status page; remove it, or give another --socket")
        return words
    finally:
        os.close(fd)
