"""
One leg: one event on one thread or CPU, which holds one slot there from ``open`` to ``close``.

All choices about the event itself are made here. It is opened disabled; it is pinned, as the kernel counts every
breakpoint anyway; it is not inherited by new threads, and stays with its thread through exec.
"""

from __future__ import annotations

import os
from typing import Final

from hwbpd.core.model import Delivery, Mode, Piece
from hwbpd_linux import perf_event
from hwbpd_linux.perf_event import Counts, Mapping
from hwbpd_linux.rings import PLAIN_BYTES, SAMPLE_BYTES_MAX, Chunk, Ring

# Together these make the record of docs/protocol.md, "Hit records".
_RECORD: Final = (
    perf_event.SAMPLE_IP
    | perf_event.SAMPLE_TID
    | perf_event.SAMPLE_TIME
    | perf_event.SAMPLE_ADDR
    | perf_event.SAMPLE_CPU
)


class Leg:
    """
    An armed or held slot in one place.

    :param tid: the thread, or ``None`` for whatever runs on ``cpu``.
    :param cpu: the CPU, or ``None`` for wherever the thread runs.
    :raises OSError: with the kernel's errno; nothing is held then.
    """

    def __init__(self, piece: Piece, mode: Mode, tid: int | None, cpu: int | None) -> None:
        self.fd = perf_event.open_breakpoint(
            piece.span.address,
            piece.span.length_bytes,
            piece.access.value,
            tid=-1 if tid is None else tid,
            cpu=-1 if cpu is None else cpu,
            flags=_flags(mode),
            sample_type=_sample_type(mode),
        )
        self._lost_known = 0
        self._mapping: Mapping | None = None
        self._ring: Ring | None = None
        if mode.delivery is Delivery.HITS:
            try:
                self._mapping = Mapping(self.fd, mode.ring_bytes)
            except BaseException:
                os.close(self.fd)
                raise
            self._ring = Ring(self._mapping.memory, SAMPLE_BYTES_MAX if _has_chain(mode) else PLAIN_BYTES)

    def enable(self) -> None:
        perf_event.enable(self.fd)

    def disable(self) -> None:
        """Stop it; when this returns, no hit is being written."""
        perf_event.disable(self.fd)

    def take(self, budget_bytes: int) -> Chunk:
        """Take records out of the ring, as ``Ring.take``."""
        assert self._ring is not None, "only a leg that delivers hits has a ring"
        return self._ring.take(budget_bytes)

    def newly_lost(self) -> int:
        """Ask the kernel how many hits were lost since this was last asked."""
        lost_before, self._lost_known = self._lost_known, self.counts().lost
        return self._lost_known - lost_before

    def counts(self) -> Counts:
        return perf_event.read_counts(self.fd)

    def close(self) -> None:
        """Give the slot back: the mapping holds the event as much as the descriptor does."""
        if self._ring is not None and self._mapping is not None:
            self._ring.close()
            self._mapping.unmap()
        os.close(self.fd)


def _has_chain(mode: Mode) -> bool:
    return mode.user_chain or mode.kernel_chain


def _sample_type(mode: Mode) -> int:
    if mode.delivery is not Delivery.HITS:
        return 0
    return _RECORD | (perf_event.SAMPLE_CALLCHAIN if _has_chain(mode) else 0)


def _flags(mode: Mode) -> int:
    flags = perf_event.DISABLED | perf_event.PINNED
    if not mode.user:
        flags |= perf_event.EXCLUDE_USER
    if not mode.kernel:
        flags |= perf_event.EXCLUDE_KERNEL | perf_event.EXCLUDE_HV
    if not mode.user_chain:
        flags |= perf_event.EXCLUDE_CALLCHAIN_USER
    if not mode.kernel_chain:
        flags |= perf_event.EXCLUDE_CALLCHAIN_KERNEL
    return flags
