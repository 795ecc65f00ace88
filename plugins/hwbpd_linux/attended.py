"""
A thread whose slots are its tracer's: none is taken here, only its end is told.

A tracer's slots are the thread's own. They go when it runs another program, whatever was asked for, and when it exits:

- at an exec the kernel has given them back before it takes the thread's events away, which is what the watch hears;
- at an exit it gives them back a moment after that, and before the thread is a zombie. So the end is told from then on;
  until it is, the descriptor goes on saying that there is something to ask for.

Linux, kernel/exit.c, do_exit(), and fs/exec.c, begin_new_exec().
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from hwbpd.core.model import Pool, Task, Totals
from hwbpd.hookspecs import ArmError, Batch, TargetEnd
from hwbpd_linux import threads
from hwbpd_linux.occupancy import Place
from hwbpd_linux.watch import Post, ThreadWatch

_NOTHING: Final = Batch(b"", 0, 0, False)


class Attended:
    """
    A thread that is attended to. Methods are those of ``hwbpd.hookspecs.Machine``, of a resource that sees nothing.

    :raises ArmError: ESRCH when the thread is gone.
    """

    is_fused = False

    def __init__(self, task: Task, post: Post) -> None:
        self._task = task
        try:
            self._watch = ThreadWatch(post, task, across_exec=False)
        except OSError as refusal:
            raise ArmError(refusal.errno or errno.ESRCH, tid=task.tid) from refusal
        # The kernel knows threads by number only: see that it was this one all the time.
        if not threads.is_alive(task.tid, task.start_ticks):
            self._watch.close()
            raise ArmError(errno.ESRCH, tid=task.tid)

    def legs_on(self, tid: int, cpu: int) -> int:
        return 0

    def places(self, pool: Pool) -> dict[int, Place]:
        return {}

    def top_up(self, hits: int) -> bool:
        return True

    def silence(self) -> None:
        pass

    def rearm(self, fuse_hits: int) -> None:
        pass

    def drop_cpu(self, cpu: int) -> None:
        pass

    def add_cpu(self, cpu: int) -> None:
        pass

    def stop(self) -> tuple[Batch, Totals]:
        return _NOTHING, Totals()

    def totals(self) -> Totals:
        return Totals()

    def descriptors(self) -> Sequence[int]:
        return [self._watch.fd]

    def drain(self, budget_bytes: int) -> Batch:
        return _NOTHING

    def end_of_target(self) -> TargetEnd | None:
        end = self._watch.end()
        if end is TargetEnd.EXIT and threads.may_have_slots(self._task.tid, self._task.start_ticks):
            return None
        return end

    def close(self) -> None:
        self._watch.close()
