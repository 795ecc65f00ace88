"""
An admission rule too simple to be wrong: a list of kernel events, and the kernel's formula applied to it by counting.

``hwbpd.core.admission`` must agree with it at random and over every small world; the running kernel is asked by
``tests.judges.oracle``. It keeps no count between two questions, so nothing in it can drift. It looks at every CPU and
every task each time, which is why the daemon cannot use it.

The formula is that of Linux, kernel/events/hw_breakpoint.c, for one pool of S(c) slots on CPU c: with C(c) the CPU-wide
events on CPU c, and T(t, c) the events of task t that are bound to c or to no CPU, one more event is admitted

- CPU-wide on c             iff  C(c) + max over all tasks t of T(t, c) + 1 <= S(c)
- for task t on any CPU     iff  C(c) + T(t, c) + 1 <= S(c) for all possible CPUs c
- for task t on CPU c       iff  C(c) + T(t, c) + 1 <= S(c)

A process is all its threads, each with an event of its own; a thread that has nothing else stands for the others.

Pools never meet. Enabled or not, an event counts from its creation to its end.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hwbpd.core.model import Plan, Pool, Process, Resource, Target, Task

ANY_CPU = -1


class Event(NamedTuple):
    """What the kernel counts: one slot of a pool, for a task or for none, on one CPU or on any.

    With a process, it stands for one such event on each of its threads.
    """

    task: Task | Process | None
    cpu: int
    pool: Pool


class Answer(enum.StrEnum):
    FITS = "fits"
    FULL = "full"  # ENOSPC
    OFFLINE = "offline"  # ENODEV


def cpu_wide(events: Iterable[Event], cpu: int, pool: Pool) -> int:
    """C(cpu)."""
    return sum(event.task is None and event.cpu == cpu and event.pool is pool for event in events)


def of_task(events: Iterable[Event], task: Task, cpu: int, pool: Pool) -> int:
    """T(task, cpu)."""
    whose = (task, task.process)
    return sum(
        event.task is not None and event.task in whose and event.cpu in (cpu, ANY_CPU) and event.pool is pool
        for event in events
    )


def threads_of(events: Iterable[Event], process: Process) -> set[Task]:
    """The threads of a process that have events, and one that has none of its own."""
    named = {event.task for event in events if isinstance(event.task, Task) and event.task.process == process}
    return named | {Task(0, 0, process)}


def of_busiest(events: Sequence[Event], cpu: int, pool: Pool) -> int:
    """The greatest T(task, cpu) of any task, or 0."""
    tasks = {event.task for event in events if isinstance(event.task, Task)}
    for process in {event.task for event in events if isinstance(event.task, Process)}:
        tasks |= threads_of(events, process)
    return max((of_task(events, task, cpu, pool) for task in tasks), default=0)


class SlowBooks:
    """The same questions as ``Books`` and ``fits``, answered by counting."""

    def __init__(
        self,
        slots: Mapping[Pool, int],
        possible: Iterable[int],
        online: Iterable[int],
        slots_on: Mapping[int, Mapping[Pool, int]] | None = None,
    ) -> None:
        self.slots = dict(slots)
        self.slots_on = {cpu: dict(of_cpu) for cpu, of_cpu in (slots_on or {}).items()}  # where they are others
        self.possible = tuple(possible)
        self.online = tuple(online)
        self.held: dict[int, list[Event]] = {}  # per resource

    def events(self) -> list[Event]:
        return [event for events in self.held.values() for event in events]

    def expand(self, target: Target, pool: Pool) -> list[Event]:
        """Return the events that one piece on ``target`` comes down to; all CPUs are those online now."""
        cpus = self.online if target.is_cpu_wide else (ANY_CPU,)
        if target.cpus is not None:
            cpus = target.cpus
        return [Event(target.task or target.process, cpu, pool) for cpu in cpus]

    def admits(self, event: Event, events: Sequence[Event]) -> bool:
        """Whether the kernel would add ``event`` to ``events``."""
        whose, cpu, pool = event
        if whose is None:
            used = cpu_wide(events, cpu, pool) + of_busiest(events, cpu, pool)
            return used + 1 <= self.has(cpu, pool)
        tasks = threads_of(events, whose) if isinstance(whose, Process) else {whose}
        places = self.possible if cpu == ANY_CPU else (cpu,)
        return all(
            cpu_wide(events, place, pool) + of_task(events, task, place, pool) + 1 <= self.has(place, pool)
            for place in places
            for task in tasks
        )

    def has(self, cpu: int, pool: Pool) -> int:
        """S(cpu)."""
        return self.slots_on.get(cpu, self.slots)[pool]

    def ask(self, target: Target, plan: Plan) -> Answer:
        """Add the events of the whole request one after the other, as somebody who opens them does; forget them."""
        for cpu in target.cpus or ():
            if cpu not in (self.online if target.is_cpu_wide else self.possible):
                return Answer.OFFLINE
        events = self.events()
        for piece in plan.pieces:
            for event in self.expand(target, piece.pool):
                if not self.admits(event, events):
                    return Answer.FULL
                events.append(event)
        return Answer.FITS

    def take(self, resource: Resource) -> None:
        self.held[resource.resource_id] = self.expand(resource.target, resource.piece.pool)

    def give_back(self, resource_id: int) -> None:
        del self.held[resource_id]

    def free(self, task: Task | None, cpu: int, pool: Pool) -> int:
        """Return how many events for that task and CPU would be admitted, one after the other."""
        events = self.events()
        held = len(events)
        while self.admits(Event(task, cpu, pool), events):
            events.append(Event(task, cpu, pool))
        return len(events) - held
