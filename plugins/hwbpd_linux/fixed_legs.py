"""
A resource on one thread or on CPUs: a leg in each place, which come and go one by one.

- A drain goes round: each leg gets its share of the budget, and what one leaves goes to those after it. The next drain
  starts with another leg.
- A leg that is given up while the resource lives (its CPU went offline, or its fuse is replaced) is *retired*: stopped,
  its ring emptied into a buffer for the next drain, its counts kept, and only then closed. So the hits handed over and
  the hits lost always add up to the hits the kernel counted.
- Each leg has a fuse of its own: a resource with L legs may report L times ``fuse_hits`` before it stops everywhere.
- A blown fuse cannot be replaced in place: there are kernels that leave such an event stopped for good. So a new one is
  opened after the old one was closed; a holder outside hwbpd may take the slot in between.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from hwbpd.core.model import Delivery, Mode, Piece, Pool, Target, Totals
from hwbpd.hookspecs import ArmError, Batch, TargetEnd
from hwbpd_linux import cpus, threads
from hwbpd_linux.legs import Leg, is_fused
from hwbpd_linux.occupancy import Place
from hwbpd_linux.rings import Chunk
from hwbpd_linux.watch import Post, ThreadWatch

_NOTHING: Final = Batch(b"", 0, 0, False)
_BITE_BYTES: Final = 65536  # of what a retired leg leaves; a drain takes one at least, so its budget holds about


class FixedLegs:
    """
    The legs of a resource on a thread or on CPUs. Methods are those of ``hwbpd.hookspecs.Machine``.

    :raises ArmError: as ``Machine.arm``; nothing is held then.
    """

    def __init__(self, piece: Piece, target: Target, mode: Mode, post: Post) -> None:
        self._piece = piece
        self._target = target
        self._mode = mode
        self._fuse_hits = mode.fuse_hits
        self._reports = mode.delivery is not Delivery.HOLD
        self._delivers_hits = mode.delivery is Delivery.HITS
        self._watch: ThreadWatch | None = None
        self._legs: list[Leg] = []
        self._next_leg = 0
        self._left: deque[Chunk] = deque()  # what retired legs have left for the next drains
        self._left_lost = 0
        self._totals = Totals()
        with ExitStack() as undo:
            if target.task is not None:
                try:
                    self._watch = ThreadWatch(post, target.task, mode.across_exec)
                except OSError as refusal:
                    raise self._refused(refusal, None) from refusal
                undo.callback(self._watch.close)
            self._take(_cpus_of(target))
            undo.pop_all()

    @property
    def is_fused(self) -> bool:
        return is_fused(self._mode) and self._fuse_hits > 0

    def legs_on(self, tid: int, cpu: int) -> int:
        """How many slots it has on a thread, for the time that thread runs on a CPU."""
        return sum(leg.tid == tid and leg.cpu in (None, cpu) for leg in self._legs)

    def places(self, pool: Pool) -> dict[int, Place]:
        """Where it has slots of a pool, by descriptor."""
        return {leg.fd: (leg.tid, leg.cpu) for leg in list(self._legs)} if self._piece.pool is pool else {}

    def top_up(self, hits: int) -> bool:
        if not (self.is_fused and self._reports):
            return True
        blown = [leg for leg in self._legs if not leg.top_up(hits)]
        return not blown

    def silence(self) -> None:
        self._reports = False
        for leg in self._legs:
            leg.disable()

    def rearm(self, fuse_hits: int) -> None:
        if self._mode.delivery is Delivery.HOLD:
            return
        self._reports = True
        self._fuse_hits = fuse_hits
        if not is_fused(self._mode):
            for leg in self._legs:
                leg.enable()
            return
        places = [leg.cpu for leg in self._legs]
        for leg in self._legs:
            self._retire(leg)
        self._legs = []
        self._take(places)

    def drop_cpu(self, cpu: int) -> None:
        for leg in [leg for leg in self._legs if leg.cpu == cpu]:
            self._retire(leg)
            self._legs.remove(leg)

    def add_cpu(self, cpu: int) -> None:
        belongs = self._target.task is None if self._target.cpus is None else cpu in self._target.cpus
        if belongs and all(leg.cpu != cpu for leg in self._legs):
            self._take([cpu])

    def stop(self) -> tuple[Batch, Totals]:
        for leg in self._legs:
            self._retire(leg)
        self._legs = []
        return self.drain(sys.maxsize), self._totals

    def totals(self) -> Totals:
        counts = [leg.counts() for leg in self._legs]
        return Totals(
            hits=self._totals.hits + sum(count.hits for count in counts),
            lost=self._totals.lost + sum(count.lost for count in counts),
        )

    def descriptors(self) -> Sequence[int]:
        """A leg with a ring hangs up by itself when its thread's events end; for the others there is the watch."""
        if self._delivers_hits:
            return [leg.fd for leg in self._legs]
        return [] if self._watch is None else [self._watch.fd]

    def drain(self, budget_bytes: int) -> Batch:
        if not self._delivers_hits:
            return _NOTHING
        chunks: list[bytes] = []
        hits, lost, left_bytes = 0, self._left_lost, budget_bytes
        self._left_lost = 0
        while self._left and (left_bytes > 0 or not chunks):
            chunk = self._left.popleft()
            chunks.append(chunk.records)
            hits += chunk.hits
            left_bytes = max(0, left_bytes - len(chunk.records))
        if self._left:
            return Batch(b"".join(chunks), hits, lost, True)
        more = False
        round_ = self._legs[self._next_leg :] + self._legs[: self._next_leg]
        for waiting, leg in zip(range(len(round_), 0, -1), round_, strict=True):
            chunk = leg.take(left_bytes // waiting)
            left_bytes = max(0, left_bytes - len(chunk.records))
            hits += chunk.hits
            more = more or chunk.more
            if chunk.records:
                chunks.append(chunk.records)
            if chunk.loss_possible:
                lost += leg.newly_lost()
        self._next_leg = (self._next_leg + 1) % max(1, len(self._legs))
        return Batch(chunks[0] if len(chunks) == 1 else b"".join(chunks), hits, lost, more)

    def end_of_target(self) -> TargetEnd | None:
        return None if self._watch is None else self._watch.end()

    def close(self) -> None:
        for leg in self._legs:
            leg.close()
        self._legs = []
        if self._watch is not None:
            self._watch.close()

    def _take(self, places: Sequence[int | None]) -> None:
        """Open a leg in each place, or none; then let them report, if the resource does."""
        tid = None if self._target.task is None else self._target.task.tid
        taken: list[Leg] = []
        place: int | None = None
        with ExitStack() as undo:
            try:
                for place in places:
                    taken.append(Leg(self._piece, self._mode, tid, place))
                    undo.callback(taken[-1].close)
                place = None
                task = self._target.task
                # The kernel knows threads by number only. The thread that had the number when the target was named,
                # and has it still, had it at every open between.
                if task is not None and not threads.is_alive(task.tid, task.start_ticks):
                    raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
                if self._reports:
                    for leg in taken:
                        if self.is_fused:
                            leg.top_up(self._fuse_hits)
                        else:
                            leg.enable()
            except OSError as refusal:
                raise self._refused(refusal, place) from refusal
            undo.pop_all()
        self._legs += taken

    def _refused(self, refusal: OSError, cpu: int | None) -> ArmError:
        tid = None if self._target.task is None else self._target.task.tid
        return ArmError(refusal.errno or errno.EIO, cpu=cpu, tid=tid)

    def _retire(self, leg: Leg) -> None:
        """Give a leg's slot back, and keep what it has seen. ``_legs`` is the caller's."""
        leg.disable()
        if self._delivers_hits:
            more = True
            while more:
                chunk = leg.take(_BITE_BYTES)
                if chunk.hits:
                    self._left.append(chunk)
                more = chunk.more
            self._left_lost += leg.newly_lost()
        counts = leg.counts()
        self._totals = Totals(self._totals.hits + counts.hits, self._totals.lost + counts.lost)
        leg.close()


def _cpus_of(target: Target) -> Sequence[int | None]:
    """The CPU of each leg; ``None`` for a leg that follows its thread. Raises ``ArmError`` for a CPU there is not."""
    if target.cpus is None:
        return cpus.online_cpus() if target.task is None else (None,)
    possible = cpus.possible_cpus()
    for cpu in target.cpus:
        # The kernel would say EINVAL, and ENODEV only for one that is offline.
        if cpu not in possible:
            raise ArmError(errno.ENODEV, cpu=cpu, tid=None if target.task is None else target.task.tid)
    return target.cpus
