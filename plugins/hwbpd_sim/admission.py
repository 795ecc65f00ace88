"""
Does the simulated kernel have a slot? The rule of Linux, counted here from nothing but what was taken and given back.

For one pool of S(c) slots on CPU c, with C(c) the CPU-wide slots there, and T(t, c) those of task t that follow it
everywhere or are bound to c, one more is there

1. CPU-wide on c             iff  C(c) + the greatest T(t, c) of any task t, + 1 <= S(c)
2. for task t, anywhere      iff  C(c) + T(t, c) + 1 <= S(c) on every CPU c
3. for task t, while on c    iff  C(c) + T(t, c) + 1 <= S(c)

It shares nothing with the daemon's own admission, so that the two can disagree. A process is nothing here: each of its
threads has slots of its own. To ask and to count cost the same however many tasks and CPUs have slots, but that a task
pays for the CPUs it has bound slots on.

Linux, kernel/events/hw_breakpoint.c.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from hwbpd.core.model import Task

Place = TypeVar("Place")


class Levels:
    """How many stand at each number of slots. Numbers are small, so the greatest is found in a few looks."""

    def __init__(self) -> None:
        self._standing: dict[int, int] = {}

    def move(self, before: int, after: int) -> None:
        """One of them had ``before`` slots and has ``after``; who has none does not stand anywhere."""
        standing = self._standing
        if before:
            if standing[before] == 1:
                del standing[before]
            else:
                standing[before] -= 1
        if after:
            standing[after] = standing.get(after, 0) + 1

    def greatest(self) -> int:
        return max(self._standing, default=0)


class PoolCounts:
    """
    What is taken of one pool. A place is a task or None, and a CPU or None for wherever the task runs.

    :param slots: how many there are on each CPU, by its number.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self._slots = tuple(slots)
        self._cpu_wide: dict[int, int] = {}  # C
        self._anywhere: dict[Task, int] = {}  # the part of T that follows a task
        self._bound: dict[Task, dict[int, int]] = {}  # the part of T that is bound to a CPU
        self._cpus = {count: Levels() for count in self._slots}  # of CPUs with so many slots, by C
        self._tasks = Levels()  # by what follows them
        self._on_cpu: defaultdict[int, Levels] = defaultdict(Levels)  # of each CPU, tasks bound to it, by T

    def admits(self, task: Task | None, cpu: int | None) -> bool:
        """Whether the kernel would give one more slot there; nothing is taken."""
        if task is None:  # 1
            assert cpu is not None, "a slot without a task has a CPU"
            bound_there = self._on_cpu.get(cpu)
            of_tasks = max(self._tasks.greatest(), 0 if bound_there is None else bound_there.greatest())
            return self._cpu_wide.get(cpu, 0) + of_tasks < self._slots[cpu]
        if cpu is None:  # 2
            own = self._anywhere.get(task, 0)
            if any(own + cpus.greatest() >= slots for slots, cpus in self._cpus.items()):
                return False
            return all(self._has_room(task, place) for place in self._bound.get(task, ()))
        return self._has_room(task, cpu)  # 3

    def _has_room(self, task: Task, cpu: int) -> bool:
        of_task = self._anywhere.get(task, 0) + self._bound.get(task, {}).get(cpu, 0)
        return self._cpu_wide.get(cpu, 0) + of_task < self._slots[cpu]

    def take(self, task: Task | None, cpu: int | None) -> None:
        """Count one slot more."""
        self._add(task, cpu, 1)

    def give_back(self, task: Task | None, cpu: int | None) -> None:
        """Count one slot less."""
        self._add(task, cpu, -1)

    def _add(self, task: Task | None, cpu: int | None, change: int) -> None:
        if task is None:
            assert cpu is not None, "a slot without a task has a CPU"
            self._cpus[self._slots[cpu]].move(*_change(self._cpu_wide, cpu, change))
        elif cpu is None:
            before, after = _change(self._anywhere, task, change)
            self._tasks.move(before, after)
            for place, count in self._bound.get(task, {}).items():
                self._on_cpu[place].move(before + count, after + count)
        else:
            own = self._anywhere.get(task, 0)
            bound = self._bound.setdefault(task, {})
            before, after = _change(bound, cpu, change)
            if not bound:
                del self._bound[task]
            self._on_cpu[cpu].move(before and own + before, after and own + after)


def _change(counts: dict[Place, int], place: Place, change: int) -> tuple[int, int]:
    """Add to a count, which is kept only above zero; return what it was and what it is."""
    before = counts.get(place, 0)
    after = before + change
    assert after >= 0, "more was given back than was taken"
    if after:
        counts[place] = after
    else:
        del counts[place]
    return before, after
