"""
Notices when the kernel has taken a thread's events away from it: at exit, and at an exec that changes privileges.

It is an event of its own, which counts nothing and takes no slot. The descriptor hangs up in the moment the thread's
events end, and says nothing before. What was turned down:

- a pidfd: one of a single thread needs Linux 6.9, one of a process waits for its last thread, and neither tells of the
  exec, after which the legs hang up for ever while the thread lives on;
- polling a leg: that takes the leg's pending wake-up with it, and a leg without a ring always looks hung up.
"""

from __future__ import annotations

import os
import select

from hwbpd_linux import perf_event
from hwbpd_linux.perf_event import Mapping


class ThreadWatch:
    """The end of one thread's events. ``fd`` hangs up then; raises ``OSError``, ESRCH when it already came."""

    def __init__(self, tid: int) -> None:
        self.fd = perf_event.open_dummy(tid)
        try:
            # Without its control page mapped, an event looks hung up from the start.
            self._mapping = Mapping(self.fd, 0)
        except BaseException:
            os.close(self.fd)
            raise
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLHUP)

    def is_gone(self) -> bool:
        return bool(self._poll.poll(0))

    def close(self) -> None:
        self._mapping.unmap()
        os.close(self.fd)
