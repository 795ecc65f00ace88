"""
The kernel of a simulated world: who has which slots, by a count of its own.

It grants by the formula of Linux (see ``tests/slow_model.py``, with which it is compared now and then) and knows what
the daemon does not: users outside hwbpd, slots that tracers have taken, threads that are gone. A slot that a tracer
took stays taken until the thread exits or runs another program; the thread's next tracer finds it there.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Mapping, Sequence

from hwbpd.core.model import Piece, Pool, Process, Target, Task
from hwbpd.hookspecs import ArmError
from tests.slow_model import ANY_CPU, Event


class Counts:
    """How many slots are held where, by a count for each thread and CPU."""

    def __init__(self, slots: Mapping[Pool, int], possible: Sequence[int]) -> None:
        self.slots = dict(slots)
        self.possible = tuple(possible)
        self._counts: Counter[Event] = Counter()
        self._whose: Counter[Task | Process] = Counter()

    def add(self, event: Event, by: int = 1) -> None:
        self._counts[event] += by
        if not self._counts[event]:
            del self._counts[event]
        if event.task is not None:
            self._whose[event.task] += by
            if not self._whose[event.task]:
                del self._whose[event.task]

    def admits(self, event: Event) -> bool:
        """Whether there is room for one more event."""
        whose, cpu, pool = event
        slots = self.slots[pool]
        if whose is None:
            return self.cpu_wide(cpu, pool) + self.busiest(cpu, pool) < slots
        tasks: list[Task | Process] = [whose]
        if isinstance(whose, Process):
            tasks += [task for task in self._whose if isinstance(task, Task) and task.process == whose]
        places = self.possible if cpu == ANY_CPU else (cpu,)
        held = (self.cpu_wide(place, pool) + self.of(task, place, pool) for place in places for task in tasks)
        return max(held) < slots

    def cpu_wide(self, cpu: int, pool: Pool) -> int:
        return self._counts.get(Event(None, cpu, pool), 0)

    def of(self, whose: Task | Process, cpu: int, pool: Pool) -> int:
        """What counts for a thread on a CPU, or for a thread of a process that has nothing of its own."""
        get = self._counts.get
        held = get(Event(whose, cpu, pool), 0) + get(Event(whose, ANY_CPU, pool), 0)
        if isinstance(whose, Task) and whose.process is not None:
            held += get(Event(whose.process, ANY_CPU, pool), 0)
        return held

    def busiest(self, cpu: int, pool: Pool) -> int:
        return max([self.of(whose, cpu, pool) for whose in self._whose], default=0)


class Kernel(Counts):
    """
    Slots, CPUs and tasks.

    :param tasks: threads there are; ``tasks[n]`` and ``tasks[n + 1]``, for an even n, are one process.
    """

    def __init__(self, slots: Mapping[Pool, int], cpus: int, tasks: int) -> None:
        super().__init__(slots, range(cpus))
        self.online = self.possible
        self.held: dict[int, list[Event]] = {}  # what the daemon has armed; by users outside, under ids below 0
        self.tasks: dict[int, Task] = {}  # those alive, by number
        self.refusals: list[int] = []  # with these it refuses what it is asked for next, whatever there is
        self.made: Counter[tuple[Task, Pool]] = Counter()  # slots that tracers have taken since the thread's last exec
        self._poked: dict[int, list[tuple[Task, Pool]]] = {}  # of these, per claim, those in use
        self._started = 0
        for number in range(tasks):
            self.start(number)

    # --- threads and CPUs --------------------------------------------------------------------------------------------

    def start(self, number: int) -> None:
        """Start a thread, in a new process if no other of its threads is alive."""
        sibling = self.tasks.get(number ^ 1)
        self._started += 1
        process = Process(800 + number - number % 2, self._started) if sibling is None else sibling.process
        self.tasks[number] = Task(800 + number, self._started, process)

    def end(self, number: int) -> Task:
        """A thread exits: what tracers had there is free."""
        task = self.tasks.pop(number)
        self._clear(task)
        return task

    def exec(self, number: int) -> Task:
        """A thread runs another program: the same."""
        self._clear(self.tasks[number])
        return self.tasks[number]

    def is_alive(self, whose: Task | Process) -> bool:
        if isinstance(whose, Task):
            return whose in self.tasks.values()
        return any(task.process == whose for task in self.tasks.values())

    # --- slots -------------------------------------------------------------------------------------------------------

    def arm(self, resource_id: int, piece: Piece, target: Target) -> None:
        """
        Take a slot on every leg, or none.

        :raises ArmError: with ENOSPC, ESRCH or ENODEV, or what it was told to refuse with.
        """
        if self.refusals:
            raise ArmError(self.refusals.pop(0))
        whose = target.task or target.process
        if whose is not None and not self.is_alive(whose):
            raise ArmError(errno.ESRCH, tid=whose.tid if isinstance(whose, Task) else whose.pid)
        for cpu in target.cpus or ():
            if target.is_cpu_wide and cpu not in self.online:
                raise ArmError(errno.ENODEV, cpu=cpu)
        taken: list[Event] = []
        for event in self.expand(target, piece.pool):
            if not self.admits(event):
                for undone in taken:
                    self.add(undone, -1)
                raise ArmError(errno.ENOSPC, cpu=None if event.cpu == ANY_CPU else event.cpu)
            self.add(event, 1)
            taken.append(event)
        self.held[resource_id] = taken

    def give_back(self, resource_id: int) -> None:
        for event in self.held.pop(resource_id):
            self.add(event, -1)

    def drop_leg(self, resource_id: int, cpu: int) -> None:
        """Give back the leg on one CPU."""
        (event,) = (event for event in self.held[resource_id] if event.cpu == cpu)
        self.held[resource_id].remove(event)
        self.add(event, -1)

    def add_leg(self, resource_id: int, piece: Piece, cpu: int) -> None:
        """Take a leg on one CPU; raises ``ArmError``."""
        event = Event(None, cpu, piece.pool)
        if self.refusals or not self.admits(event):
            raise ArmError(self.refusals.pop(0) if self.refusals else errno.ENOSPC, cpu=cpu)
        self.held[resource_id].append(event)
        self.add(event, 1)

    def poke(self, claim_id: int, task: Task, pool: Pool) -> int:
        """A tracer writes a debug register: return 0, or the errno that it gets."""
        if task not in self.tasks.values():
            return errno.ESRCH
        in_use = sum(of.count((task, pool)) for of in self._poked.values())
        if in_use == self.made[task, pool]:  # it has none left over
            event = Event(task, ANY_CPU, pool)
            if not self.admits(event):
                return errno.ENOSPC
            self.add(event, 1)
            self.made[task, pool] += 1
        self._poked.setdefault(claim_id, []).append((task, pool))
        return 0

    def unpoke(self, claim_id: int) -> None:
        """A tracer lets go of its registers, or dies; the slots stay."""
        self._poked.pop(claim_id, None)

    def outside(self, task: Task, pool: Pool) -> int:
        """How many slots a thread has of its own that the daemon did not take."""
        thieves = sum(events.count(Event(task, ANY_CPU, pool)) for name, events in self.held.items() if name < 0)
        return self.made[task, pool] + thieves

    # --- counts ------------------------------------------------------------------------------------------------------

    def expand(self, target: Target, pool: Pool) -> list[Event]:
        """The events that one piece on ``target`` comes down to; all CPUs are those online now."""
        cpus: Sequence[int] = self.online if target.is_cpu_wide else (ANY_CPU,)
        return [Event(target.task or target.process, cpu, pool) for cpu in target.cpus or cpus]

    def events(self) -> list[Event]:
        """Every slot held, whoever has it."""
        held = [event for events in self.held.values() for event in events]
        return held + [Event(task, ANY_CPU, pool) for task, pool in self.made.elements()]

    def _clear(self, task: Task) -> None:
        for pool in self.slots:
            for _ in range(self.made.pop((task, pool), 0)):
                self.add(Event(task, ANY_CPU, pool), -1)
        for claim_id, poked in self._poked.items():
            self._poked[claim_id] = [one for one in poked if one[0] != task]
