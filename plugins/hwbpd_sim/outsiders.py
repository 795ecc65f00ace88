"""
Simulated processes outside the daemon that have slots, and what a look at them finds.

Their slots are admitted like the daemon's and count like them. How surely somebody can be named is decided by whoever
brings him in: ``evidence`` is told as it is, and with "unattributed" nobody is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from hwbpd.core.model import Pool, Task
from hwbpd.hookspecs import Foreign

PERF_FD: Final = "perf fd"
TRACER: Final = "tracer"
LEFT: Final = "left by a tracer"  # nobody has it any more; a look names nobody
UNATTRIBUTED: Final = "unattributed"


class Outsider(NamedTuple):
    """A process that the daemon knows nothing of."""

    pid: int
    comm: str
    uid: int = 0
    evidence: str = PERF_FD  # as docs/protocol.md lists it


class OutsideSlot(NamedTuple):
    """A slot of his."""

    outsider: Outsider
    pool: Pool
    task: Task | None  # None: whatever runs on the CPU
    cpu: int | None  # None: wherever the task runs

    @property
    def is_traced(self) -> bool:
        """Whether it is in the thread's own debug registers, where a tracer has put it."""
        return self.task is not None and self.outsider.evidence in (TRACER, LEFT)

    @property
    def left_behind(self) -> OutsideSlot:
        """What is there when that tracer has left."""
        return self._replace(outsider=Outsider(0, "", 0, LEFT))


def found(
    slots: Iterable[OutsideSlot], pool: Pool, tasks: frozenset[Task] | None, cpu: int | None
) -> list[Foreign]:
    """
    Return who has slots that count against a request.

    :param tasks: for whom it was; None for a CPU-wide one, against which every task's slots count.
    :param cpu: where it was refused; None where that is not known.
    """
    counts = Counter(
        (slot.outsider, _place(slot))
        for slot in slots
        if slot.pool is pool
        and (cpu is None or slot.cpu in (None, cpu))
        and (slot.task is None or tasks is None or slot.task in tasks)
    )
    return [
        Foreign(0, "", 0, count, place, UNATTRIBUTED)
        if outsider.evidence in (UNATTRIBUTED, LEFT)
        else Foreign(outsider.pid, outsider.comm, outsider.uid, count, place, outsider.evidence)
        for (outsider, place), count in counts.items()
    ]


def _place(slot: OutsideSlot) -> str:
    if slot.task is None:
        return f"cpu-wide on cpu {slot.cpu}"
    return f"on tid {slot.task.tid}" + ("" if slot.cpu is None else f" on cpu {slot.cpu}")
