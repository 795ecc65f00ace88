"""
An armed resource of the simulated machine: its legs, what they let through, and the rings in which hits wait.

- A leg holds one slot of a task or CPU. A fused one lets a number of hits through and stops at the very last.
- Hits are counted whether or not there is room for their record; a record for which a ring has none is lost, and that
  is counted too. A ring keeps one byte empty, as the kernel's do.
- A CPU, or a task that is followed everywhere, has a ring of its own; of a process, each CPU has one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from hwbpd.core.model import Delivery, Mode, Piece, Target, Task
from hwbpd.hookspecs import Batch, TargetEnd

FOLLOWING = -1  # the ring of a task that is followed wherever it runs

NOTHING = Batch(b"", 0, 0, False)


class Leg:
    """One slot in one place."""

    __slots__ = ("armed", "cpu", "inherited", "left", "step", "task")

    def __init__(self, armed: Armed, task: Task | None, cpu: int | None, inherited: bool = False) -> None:
        self.armed = armed
        self.task = task  # None: whatever runs on the CPU
        self.cpu = cpu  # None: wherever the task runs
        self.inherited = inherited  # its thread was born with it, so it goes when the thread does
        self.left = armed.lets_through  # hits that it still lets through; below 0: all
        self.step: Hashable = None  # while it is being stepped past: what the kernel remembers of that


class Ring:
    """Records on their way, and how many bytes they are."""

    __slots__ = ("records", "used_bytes")

    def __init__(self) -> None:
        self.records: deque[bytes] = deque()
        self.used_bytes = 0


class Armed:
    """One resource from ``arm`` to ``disarm``."""

    def __init__(self, piece: Piece, target: Target, mode: Mode) -> None:
        self.piece = piece
        self.target = target
        self.mode = mode
        self.lets_through = -1  # hits, by a leg that is taken now; below 0: all
        self.reports = mode.delivery is not Delivery.HOLD
        self.legs: list[Leg] = []
        self.end: TargetEnd | None = None
        self.hits = 0
        self.lost = 0
        self._untold_lost = 0
        self._rings: dict[int, Ring] = {}
        self.fuse(mode.fuse_hits)

    @property
    def may_be_fused(self) -> bool:
        """As the kernel offers it: not for what threads are born with."""
        return self.mode.fuse_hits > 0 and self.mode.delivery is not Delivery.HOLD and self.target.process is None

    @property
    def is_fused(self) -> bool:
        return self.lets_through > 0

    def fuse(self, hits: int) -> None:
        """Fuse the legs that are taken from now on; 0 for none."""
        self.lets_through = hits if hits and self.may_be_fused else -1

    @property
    def delivers_hits(self) -> bool:
        return self.mode.delivery is Delivery.HITS

    @property
    def has_news(self) -> bool:
        """Whether there is something to drain, or to know of the target."""
        return self.end is not None or self._untold_lost > 0 or any(ring.records for ring in self._rings.values())

    def put(self, leg: Leg, cpu: int, record: bytes) -> None:
        """Take in the record of a hit on ``cpu``, or lose it."""
        key = FOLLOWING if leg.cpu is None and self.target.process is None else cpu
        ring = self._rings.get(key)
        if ring is None:
            ring = self._rings[key] = Ring()
        if ring.used_bytes + len(record) >= self.mode.ring_bytes:
            self.lost += 1
            self._untold_lost += 1
            return
        ring.records.append(record)
        ring.used_bytes += len(record)

    def drain(self, budget_bytes: int) -> Batch:
        """As ``Machine.drain``: fair over rings, by an equal part of the budget for each that holds something."""
        if not self.delivers_hits:
            return NOTHING
        chunks: list[bytes] = []
        left_bytes = budget_bytes
        waiting = [key for key, ring in self._rings.items() if ring.records]
        for others, key in zip(range(len(waiting), 0, -1), waiting, strict=True):
            part_bytes = left_bytes // others
            ring = self._rings[key]
            while ring.records and (len(ring.records[0]) <= part_bytes or not chunks):
                record = ring.records.popleft()
                chunks.append(record)
                ring.used_bytes -= len(record)
                part_bytes -= len(record)
                left_bytes -= len(record)
            self._rings[key] = self._rings.pop(key)  # whoever was first is last the next time
        lost, self._untold_lost = self._untold_lost, 0
        more = any(self._rings[key].records for key in waiting)
        return Batch(b"".join(chunks), len(chunks), lost, more)
