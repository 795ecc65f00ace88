"""
How many slots are held: per pool, the counts that the kernel's admission rule needs.

They are arranged so that nobody pays for what is not involved:

- C, the CPU-wide slots of a CPU: a count per CPU that has some, and one offset for all online CPUs;
- T, the slots of a task: one count for wherever it runs, and counts per CPU only for tasks that have CPU-bound ones; a
  process is one count for all its threads, however many there are;
- each of them also in buckets by value, so that the greatest is found in as many looks as a CPU has slots.

CPUs need not have the same number of slots. Those that have are one kind, with buckets of their own; there are never
more kinds than a CPU may have slots, and mostly there is one.

Linux keeps the same counts since commit ecdfb8896f2a ("perf/hw_breakpoint: Optimize toggle_bp_slot() for
CPU-independent task targets") (in v6.1), with per-CPU copies where we have the offset. We decided against
its per-CPU histograms of bound tasks on every possible CPU: a task with one bound claim would touch all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from hwbpd.core.model import Process, Target, Task

K = TypeVar("K", bound=Hashable)


class Buckets(Generic[K]):
    """Keys by a small count: what ``dict[K, int]`` holds, and who has the greatest, both at once."""

    def __init__(self) -> None:
        self._count: dict[K, int] = {}
        self._having: list[dict[K, None]] = [{}]  # _having[n]: the keys with count n, for n >= 1, in order of arrival

    def __getitem__(self, key: K) -> int:
        return self._count.get(key, 0)

    def __len__(self) -> int:
        return len(self._count)

    def keys(self) -> Iterable[K]:
        return self._count.keys()

    def set(self, key: K, count: int) -> None:
        """Give ``key`` that count; nought forgets it."""
        before = self._count.get(key, 0)
        if before:
            del self._having[before][key]
        if count:
            while len(self._having) <= count:
                self._having.append({})
            self._count[key] = count
            self._having[count][key] = None
        elif before:
            del self._count[key]

    def greatest(self) -> int:
        """The greatest count, or 0."""
        for count in range(len(self._having) - 1, 0, -1):
            if self._having[count]:
                return count
        return 0

    def above(self, count: int) -> Iterable[K]:
        """The keys whose count is greater, the greatest counts first."""
        for level in range(len(self._having) - 1, max(count, 0), -1):
            yield from self._having[level]

    def as_dict(self) -> dict[K, int]:
        return dict(self._count)


class CpuKind:
    """The CPUs that have one number of slots."""

    __slots__ = ("any_cpu", "cpu_wide", "online", "slots")

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.any_cpu = 0
        self.online: set[int] = set()
        self.cpu_wide: Buckets[int] = Buckets()  # per CPU: CPU-wide slots beside those that are everywhere


class PoolBooks:
    """
    The counts of one pool.

    :param slots: per possible CPU: how many it has.
    """

    def __init__(self, slots: Mapping[int, int], online: set[int]) -> None:
        numbers = sorted(set(slots.values()))
        self.least, self.slots = numbers[0], numbers[-1]  # that every CPU has, and that some have
        self.online = online  # shared with the other pools
        by_number = {number: CpuKind(number) for number in numbers}
        self.kinds = tuple(by_number.values())  # those with fewest slots first
        self._kind_of = {cpu: by_number[number] for cpu, number in slots.items()}
        for cpu, kind in self._kind_of.items():
            kind.any_cpu = cpu
        for cpu in online:
            self._kind_of[cpu].online.add(cpu)
        self.everywhere = 0  # CPU-wide slots on each online CPU
        self.not_on: dict[int, int] = {}  # online CPUs that some of these have not come back to
        self.process: Buckets[Process] = Buckets()  # per process: slots that each of its threads has
        self.own: dict[Task, int] = {}  # per task: slots of its own that follow it wherever it runs
        self.bound: dict[Task, dict[int, int]] = {}  # per task: slots for single CPUs beside them
        self.anywhere: Buckets[Task] = Buckets()  # tasks with slots of their own, by own and process's together
        self.on_cpu: dict[int, Buckets[Task]] = {}  # per CPU: tasks bound there, by all that counts for them there
        self.threads: dict[Process, dict[Task, None]] = {}  # per process: those of its tasks with slots of their own

    def kind_of(self, cpu: int) -> CpuKind:
        """Of a CPU that does not exist it is the greatest: nothing is held there, and it is refused for that."""
        return self._kind_of.get(cpu, self.kinds[-1])

    def slots_on(self, cpu: int) -> int:
        """S(cpu)."""
        return self.kind_of(cpu).slots

    def held_cpu_wide(self, cpu: int) -> int:
        """C(cpu)."""
        everywhere = self.everywhere - self.not_on.get(cpu, 0) if cpu in self.online else 0
        return self.kind_of(cpu).cpu_wide[cpu] + everywhere

    def most_cpu_wide(self, kind: CpuKind) -> int:
        """A CPU of that kind with the greatest C(cpu)."""
        if self.not_on:
            cpus = {*kind.cpu_wide.keys(), *kind.online} or {kind.any_cpu}
            return max(cpus, key=self.held_cpu_wide)
        return next(iter(kind.cpu_wide.above(0)), next(iter(kind.online), kind.any_cpu))

    def have_of_their_own(self) -> set[int]:
        """The online CPUs with counts that the others of their kind do not have."""
        cpus = {*self.not_on, *self.on_cpu}
        for kind in self.kinds:
            cpus.update(kind.cpu_wide.keys())
        return {cpu for cpu in cpus if cpu in self.online}

    def held_anywhere(self, task: Task) -> int:
        """What follows a task wherever it runs."""
        return self.own.get(task, 0) + (self.process[task.process] if task.process is not None else 0)

    def held_by_task(self, task: Task, cpu: int) -> int:
        """T(task, cpu)."""
        bound = self.bound.get(task)
        return self.held_anywhere(task) + (bound.get(cpu, 0) if bound else 0)

    def held_by_busiest(self, cpu: int) -> int:
        """The greatest T(task, cpu) of any task."""
        on_cpu = self.on_cpu.get(cpu)
        return max(self.anywhere.greatest(), self.process.greatest(), on_cpu.greatest() if on_cpu else 0)

    def busy_tasks(self, cpu: int, above: int) -> Iterable[Task]:
        """The tasks with slots of their own for which T(task, cpu) is greater than ``above``, each once."""
        seen = set()
        on_cpu = self.on_cpu.get(cpu)
        for task in on_cpu.above(above) if on_cpu else ():
            seen.add(task)
            yield task
        for task in self.anywhere.above(above):
            if task not in seen:
                yield task

    def add(self, target: Target, slots: int) -> None:
        """Count ``slots`` more (or fewer, below 0) for ``target``."""
        if target.process is not None:
            self.process.set(target.process, self.process[target.process] + slots)
            for task in tuple(self.threads.get(target.process, ())):
                self._recount(task, tuple(self.bound.get(task, ())))
        elif target.task is not None:
            if target.cpus is None:
                self.own[target.task] = self.own.get(target.task, 0) + slots
            else:
                bound = self.bound.setdefault(target.task, {})
                for cpu in target.cpus:
                    bound[cpu] = bound.get(cpu, 0) + slots
            self._recount(target.task, tuple(self.bound.get(target.task, ())))
        elif target.cpus is None:
            self.everywhere += slots
        else:
            for cpu in target.cpus:
                self.add_on(cpu, slots)

    def add_on(self, cpu: int, slots: int) -> None:
        """Count ``slots`` more (or fewer) on that CPU, for what is CPU-wide there."""
        cpu_wide = self._kind_of[cpu].cpu_wide
        cpu_wide.set(cpu, cpu_wide[cpu] + slots)

    def is_offline(self, cpu: int) -> None:
        """A CPU is gone."""
        self._kind_of[cpu].online.discard(cpu)
        self.not_on.pop(cpu, None)

    def is_online(self, cpu: int) -> None:
        """A CPU is back."""
        self._kind_of[cpu].online.add(cpu)

    def _recount(self, task: Task, cpus: Iterable[int]) -> None:
        """Bring the buckets in line with what ``task`` holds; forget what it holds no more."""
        bound = self.bound.get(task, {})
        for cpu in cpus:
            on_cpu = self.on_cpu.setdefault(cpu, Buckets())
            if bound[cpu]:
                on_cpu.set(task, self.held_anywhere(task) + bound[cpu])
                continue
            del bound[cpu]
            on_cpu.set(task, 0)
            if not len(on_cpu):
                del self.on_cpu[cpu]
        if not bound:
            self.bound.pop(task, None)
        if not self.own.get(task):
            self.own.pop(task, None)
        has_own = task in self.own or task in self.bound
        self.anywhere.set(task, self.held_anywhere(task) if has_own else 0)
        if task.process is None:
            return
        if has_own:
            self.threads.setdefault(task.process, {})[task] = None
        elif task in self.threads.get(task.process, ()):
            del self.threads[task.process][task]
            if not self.threads[task.process]:
                del self.threads[task.process]

    def dump(self) -> dict[str, Any]:
        """Everything, as plain values that compare equal when nothing has changed."""
        return {
            "everywhere": self.everywhere,
            "not_on": dict(self.not_on),
            "cpu_wide": {cpu: count for kind in self.kinds for cpu, count in kind.cpu_wide.as_dict().items()},
            "process": self.process.as_dict(),
            "own": dict(self.own),
            "bound": {task: dict(cpus) for task, cpus in self.bound.items()},
            "anywhere": self.anywhere.as_dict(),
            "on_cpu": {cpu: tasks.as_dict() for cpu, tasks in self.on_cpu.items()},
            "threads": {process: set(tasks) for process, tasks in self.threads.items()},
        }
