"""
One leg: one event on one thread or CPU, which holds one slot there from ``open`` to ``close``.

All choices about the event itself are made here. It is opened disabled; it is pinned, as the kernel counts every
breakpoint anyway; the kernel takes it from its thread at exec, unless the mode says otherwise.

A leg is *fused* when the kernel stops it after so many hits by itself. The kernel offers that only for events that are
not inherited, and the legs of a process are: those that its threads are born with have to be stopped from here.
"""

from __future__ import annotations

import contextlib
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
    :param inherited: whether threads that the thread makes are born with such a leg. Its hits go into no ring of its
        own, as the kernel does not allow one that follows a thread; see ``write_into``.
    :raises OSError: with the kernel's errno; nothing is held then.
    """

    def __init__(self, piece: Piece, mode: Mode, tid: int | None, cpu: int | None, *, inherited: bool = False) -> None:
        self.tid = tid
        self.cpu = cpu
        self.fd = perf_event.open_breakpoint(
            piece.span.address,
            piece.span.length_bytes,
            piece.access.value,
            tid=-1 if tid is None else tid,
            cpu=-1 if cpu is None else cpu,
            flags=_flags(mode, tid, inherited),
            sample_type=_sample_type(mode),
            overflows=is_fused(mode) and not inherited,
        )
        self._counts = Counts(0, 0, 0, 0)
        self._lost_known = 0
        self._allowed = 0  # hits, so far, of a fused leg
        self._mapping: Mapping | None = None
        self._ring: Ring | None = None
        if mode.delivery is Delivery.HITS and not inherited:
            try:
                self._mapping = Mapping(self.fd, mode.ring_bytes)
            except BaseException:
                os.close(self.fd)
                raise
            self._ring = Ring(self._mapping.memory, sample_bytes_max(mode))

    def write_into(self, ring_fd: int) -> None:
        """Let the hits go into the ring of an event on the same CPU; raises ``OSError``."""
        perf_event.set_output(self.fd, ring_fd)

    def enable(self) -> None:
        """Let it report; raises ``OSError``."""
        perf_event.enable(self.fd)

    def top_up(self, hits: int) -> bool:
        """
        Let a fused leg report so many more hits, the first ones included; raises ``OSError``.

        :return: whether it was in time. A fuse that has blown stays dead, and the kernel takes the refill without a
            word; but then the leg had counted all that it was allowed before.
        """
        allowed, self._allowed = self._allowed, self._allowed + hits
        perf_event.refresh(self.fd, hits)
        return not allowed or self.counts().hits < allowed

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
        """What the kernel counted; of a leg that it has given up, what was last known."""
        with contextlib.suppress(OSError):
            self._counts = perf_event.read_counts(self.fd)
        return self._counts

    def close(self) -> None:
        """Give the slot back: the mapping holds the event as much as the descriptor does."""
        if self._ring is not None and self._mapping is not None:
            self._ring.close()
            self._mapping.unmap()
        os.close(self.fd)


def is_fused(mode: Mode) -> bool:
    """Whether legs of this mode stop by themselves, where the kernel offers it."""
    return mode.fuse_hits > 0 and mode.delivery is not Delivery.HOLD


def sample_bytes_max(mode: Mode) -> int:
    """How long a record can get."""
    return SAMPLE_BYTES_MAX if _has_chain(mode) else PLAIN_BYTES


def _has_chain(mode: Mode) -> bool:
    return mode.user_chain or mode.kernel_chain


def _sample_type(mode: Mode) -> int:
    if mode.delivery is not Delivery.HITS:
        return 0
    return _RECORD | (perf_event.SAMPLE_CALLCHAIN if _has_chain(mode) else 0)


def _flags(mode: Mode, tid: int | None, inherited: bool) -> int:
    flags = perf_event.DISABLED | perf_event.PINNED
    if inherited:
        flags |= perf_event.INHERIT | perf_event.INHERIT_THREAD
    if tid is not None and not mode.across_exec:
        flags |= perf_event.REMOVE_ON_EXEC
    if not mode.user:
        flags |= perf_event.EXCLUDE_USER
    if not mode.kernel:
        flags |= perf_event.EXCLUDE_KERNEL | perf_event.EXCLUDE_HV
    if not mode.user_chain:
        flags |= perf_event.EXCLUDE_CALLCHAIN_USER
    if not mode.kernel_chain:
        flags |= perf_event.EXCLUDE_CALLCHAIN_KERNEL
    return flags
