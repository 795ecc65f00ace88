"""
What ends a verb that runs until further notice: Ctrl-C or SIGTERM, the end of a command, a time limit.

All of them make one descriptor readable, or bound the wait for it, so the verb waits in one place and no exception
cuts it short between a request and its reply. A second Ctrl-C is the usual KeyboardInterrupt.
"""

from __future__ import annotations

import os
import select
import signal
import time
from types import FrameType
from typing import Self

from hwbpctl.command import Command


class Stop:
    """A context manager, for the main thread: while it is open, signals set ``signalled`` and nothing else."""

    def __init__(self, command: Command | None = None) -> None:
        self.signalled: int | None = None  # which signal came
        self._command = command
        self._ends: float | None = None

    def __enter__(self) -> Self:
        self._readable, self._writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._readable, select.EPOLLIN)
        if self._command:
            self._epoll.register(self._command.pidfd, select.EPOLLIN)
        self._handlers = {each: signal.signal(each, self._take) for each in (signal.SIGINT, signal.SIGTERM)}
        self._wakeup_fd = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_fd)
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        self._epoll.close()
        os.close(self._readable)
        os.close(self._writable)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.signalled = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def fileno(self) -> int:
        """The descriptor that becomes readable when a signal came or the command ended."""
        return self._epoll.fileno()

    def limit(self, timeout_s: float | None) -> None:
        """From now on so many seconds are left; None for no limit."""
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Return the seconds that are left, None without a limit."""
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())

    def asked(self) -> bool:
        """Whether it is time to stop."""
        return self.signalled is not None or self.left_s() == 0.0 or bool(self._epoll.poll(0))
