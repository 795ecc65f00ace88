"""
A ring on one CPU for events of many threads, and the news of births there.

The kernel lets events share a ring when they are bound to the same CPU. The ring belongs to an event of its own, which
counts nothing and takes no slot: so it does not end when a thread ends, and its descriptor wakes for all who write into
it. While it listens, that event reports every thread that is born on its CPU, whoever made it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from hwbpd_linux import perf_event
from hwbpd_linux.perf_event import PAGE_BYTES, Mapping
from hwbpd_linux.rings import Chunk, Ring

LISTENING_BYTES: Final = 16 * PAGE_BYTES  # room for 2000 births on a CPU between two looks

_BIRTH: Final = struct.Struct("=IHHIIIIQ")  # PERF_RECORD_FORK: header, pid, ppid, tid, ptid, time
_BIRTH_TYPE: Final = 7


class Birth(NamedTuple):
    """A thread was made. It was in /proc a moment before this was reported."""

    time_ns: int  # CLOCK_MONOTONIC
    pid: int
    tid: int
    parent: int  # the thread that made it


class Outlet:
    """
    A ring on ``cpu``.

    :param data_bytes: the size of the ring.
    :param sample_bytes_max: the longest record that any event writes into it.
    :raises OSError: ENODEV when the CPU is offline; else the kernel's errno.
    """

    def __init__(self, cpu: int, data_bytes: int, sample_bytes_max: int) -> None:
        self.cpu = cpu
        self.fd = perf_event.open_dummy(-1, cpu=cpu, flags=perf_event.DISABLED | perf_event.BIRTHS)
        try:
            self._mapping = Mapping(self.fd, data_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self._ring = Ring(self._mapping.memory, sample_bytes_max)

    def listen(self) -> None:
        perf_event.enable(self.fd)

    def stop_listening(self) -> None:
        """Report births no more, and forget those not asked for."""
        perf_event.disable(self.fd)
        for _ in self._ring.others():
            pass

    def births(self) -> Iterator[Birth]:
        """
        The births since this was last asked, while no event writes samples.

        :raises BlockingIOError: when there was no room for some.
        """
        for record in self._ring.others():
            if len(record) == _BIRTH.size:
                record_type, _, _, pid, _, tid, parent, time_ns = _BIRTH.unpack(record)
                if record_type == _BIRTH_TYPE:
                    yield Birth(time_ns, pid, tid, parent)
        if perf_event.read_counts(self.fd).lost:
            raise BlockingIOError("too many threads are born to follow")

    def take(self, budget_bytes: int) -> Chunk:
        """Take records out of the ring, as ``Ring.take``."""
        return self._ring.take(budget_bytes)

    def close(self) -> None:
        self._ring.close()
        self._mapping.unmap()
        os.close(self.fd)
