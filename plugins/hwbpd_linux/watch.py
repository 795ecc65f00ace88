"""
Notices when the kernel has taken a thread's events away from it: at exit and at exec.

A watch is an event of its own, which counts nothing and takes no slot. Its descriptor hangs up in the moment the
thread's events end, and says nothing before. An event without a ring looks hung up from the start, and a ring of its
own would be most of its cost: so all watches share one, of a single page, into which nothing is ever written. What was
turned down:

- a pidfd: one of a single thread needs Linux 6.9, and none tells of an exec;
- polling a leg: that takes the leg's pending wake-up with it, and a leg without a ring always looks hung up.

Whether it was an exit or an exec is seen from the thread. When a thread other than the first of its process execs, the
kernel gives it the first one's number: its own number is gone then, which reads as an exit.
"""

from __future__ import annotations

import os
import select

from hwbpd.core.model import Process, Task
from hwbpd.hookspecs import TargetEnd
from hwbpd_linux import cpus, perf_event, threads
from hwbpd_linux.perf_event import Mapping


class Post:
    """What every watch of a machine needs: the ring they share. It belongs to this process's first thread."""

    def __init__(self) -> None:
        self.cpu = cpus.online_cpus()[0]  # events share rings by CPU; no watch minds when it goes offline
        self.fd = perf_event.open_dummy(os.getpid(), cpu=self.cpu)
        try:
            self._mapping = Mapping(self.fd, 0)
        except BaseException:
            os.close(self.fd)
            raise

    def watch(self, tid: int, across_exec: bool) -> int:
        """Return a descriptor that hangs up when the thread's events end; raises ``OSError``, ESRCH if they have."""
        flags = perf_event.DISABLED | (0 if across_exec else perf_event.REMOVE_ON_EXEC)
        fd = perf_event.open_dummy(tid, cpu=self.cpu, flags=flags)
        try:
            perf_event.set_output(fd, self.fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        self._mapping.unmap()
        os.close(self.fd)


class ThreadWatch:
    """The end of one thread's events. ``fd`` hangs up then; raises ``OSError``, ESRCH when it already came."""

    def __init__(self, post: Post, task: Task, across_exec: bool) -> None:
        self._task = task
        self.fd = post.watch(task.tid, across_exec)
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLHUP)

    def end(self) -> TargetEnd | None:
        if not self._poll.poll(0):
            return None
        return TargetEnd.EXEC if threads.is_alive(self._task.tid, self._task.start_ticks) else TargetEnd.EXIT

    def close(self) -> None:
        os.close(self.fd)


class ProcessWatch:
    """
    The end of a process's events: all its threads have exited, or it has execed. ``fd`` becomes readable then.

    An exec ends every thread, and the one that goes on has the first one's number. So it is enough to watch one
    thread, the first while it lives: when its events end and a first thread is alive, it was an exec; when none is,
    and others live, the watch passes to one of them. ``fd`` stays the same; behind it is an epoll of one.
    """

    def __init__(self, post: Post, process: Process, across_exec: bool) -> None:
        self._post = post
        self._process = process
        self._across_exec = across_exec
        self._epoll = select.epoll(1)
        self._watched_fd = -1
        try:
            if self._pass_on() is TargetEnd.EXIT:
                raise ProcessLookupError(f"process {process.pid} has exited")
        except BaseException:
            self._epoll.close()
            raise

    @property
    def fd(self) -> int:
        return self._epoll.fileno()

    def end(self) -> TargetEnd | None:
        if not self._epoll.poll(0):
            return None
        if threads.is_alive(self._process.pid, self._process.start_ticks):
            return TargetEnd.EXEC
        return self._pass_on()

    def close(self) -> None:
        self._epoll.close()
        if self._watched_fd >= 0:
            os.close(self._watched_fd)

    def _pass_on(self) -> TargetEnd | None:
        for tid in threads.tids(self._process):
            if not threads.is_alive(tid):
                continue
            try:
                fd = self._post.watch(tid, self._across_exec)
            except ProcessLookupError:
                continue
            if self._watched_fd >= 0:
                os.close(self._watched_fd)  # which takes it out of the epoll
            self._watched_fd = fd
            self._epoll.register(fd, 0)  # a hang-up is always reported
            return None
        return TargetEnd.EXIT
