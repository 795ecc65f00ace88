"""
The server with its meter running: the one that is made where metrics are asked for.

What is counted is told by the places through which everything goes: one message, one step, one look at others, one turn
of the loop. The plain server knows nothing of it and pays nothing for it.
"""

from __future__ import annotations

import importlib.metadata
import os
import select
import threading
from time import perf_counter_ns
from typing import Any

from hwbpd import messages
from hwbpd.metrics import About, Meter, Reading
from hwbpd.network import Incoming, Unreadable
from hwbpd.server import Server


class Window:
    """
    Where one other thread asks for readings.

    ``fileno`` is for an edge-triggered poll, as it is never read: each question is one edge.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Lock()
        self._is_open = True
        self._answered = threading.Event()
        self._reading: Reading | None = None
        self.is_asked = False

    def fileno(self) -> int:
        return self._fd

    def ask(self, patience_s: float) -> Reading | None:
        """Return a new reading; when none comes in time, the last one, or None when there never was one."""
        with self._closing:
            if self._is_open:
                self._answered.clear()
                self.is_asked = True
                os.eventfd_write(self._fd, 1)
        self._answered.wait(patience_s)
        return self._reading

    def answer(self, reading: Reading) -> None:
        """For the loop's thread, when ``is_asked``."""
        self.is_asked = False
        self._reading = reading
        self._answered.set()

    def close(self) -> None:
        """For the loop's thread: nobody answers any more. Whoever waits, waits no longer."""
        with self._closing:
            self._is_open = False
            os.close(self._fd)
        self._answered.set()


class MeteredServer(Server):
    """
    A server that counts.

    :param parts: those of ``Server``.

    ``window`` is for one other thread.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        about = About(importlib.metadata.version("hwbpd"), self._machine.name, self._backend.name)
        self.meter = Meter(self._arbiter.books, self._hits.account, self._sessions, about)
        self.window = Window()
        self._step = self.meter.metered(self._step)
        self._attribution.looked = self.meter.looked
        self._epoll.register(self.window.fileno(), select.EPOLLIN | select.EPOLLET)

    def turn(self, block: bool = True) -> bool:
        goes_on = super().turn(block)
        self.meter.wakeups += 1
        if self.window.is_asked:
            self.window.answer(self.meter.reading())
        return goes_on

    def stop(self) -> None:
        super().stop()
        self.window.close()

    def _turn_away(self, message: Unreadable) -> None:
        self.meter.messages += 1
        super()._turn_away(message)

    def _serve(self, incoming: Incoming) -> None:
        begin_ns = perf_counter_ns()
        super()._serve(incoming)
        self.meter.served.observe(perf_counter_ns() - begin_ns)
        self.meter.messages += 1

    def _send(self, routing_id: bytes, reply: messages.Reply) -> None:
        if isinstance(reply, messages.Error):
            self.meter.refused_at_door(reply.errno)
        super()._send(routing_id, reply)
