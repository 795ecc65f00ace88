"""
The simulated world: CPUs, processes and their threads, the slots they have, and what comes of each instruction.

It is pure: it has no clock, descriptor, thread or randomness, and does only what it is told, in the order in which it
is told; the same calls lead to the same hits. ``workload.py`` makes things happen in it, ``machine.py`` shows it to the
daemon. What it keeps to:

1. A CPU runs the thread that has made the last step there, until another makes one, or it moves, exits or the CPU goes.
   Armed in its registers are the legs of the CPU and those of the thread it runs, but for what is only held, has been
   silenced or has blown its fuse. What an instruction meets there, the registers decide, and what Linux then reports,
   its handling on that architecture: hwbpd/debug_unit.py. Of that, hits in a mode that is not to be seen do not count.
2. A slot is taken by the kernel's rule and counts until it is given back, whether or not it can still trap.
3. A thread is born with the slots its process is covered by. They go when it exits; every other slot of a thread stays
   until it is given back, though the thread be gone.
4. After an exec nothing traps for what was not to go on across it. Its slot stays, too.
5. What is bound to a CPU that goes offline is dead, and stays so when the CPU is back. Tasks move on to another.
6. What a tracer sets is the thread's: it stays when the tracer leaves, and nobody can be named for it then. It goes
   when the thread exits or runs another program.

7. The kernel refuses, after it has found a slot, what its architecture cannot take there.

Turned down: to schedule threads by ourselves. A thread is on one CPU, and moves when it is told to. And to put what
outsiders have into registers: of their slots there is a number, and nobody has said what they are for.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from hwbpd.core.errors import TargetGone
from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Process, Span, Target, Task, Totals
from hwbpd.debug_unit import Handled
from hwbpd.hookspecs import ArmError, Batch, Foreign, TargetEnd
from hwbpd_sim.admission import PoolCounts
from hwbpd_sim.armed import Armed, Leg
from hwbpd_sim.cpus import Cpu, Kind
from hwbpd_sim.outsiders import Outsider, OutsideSlot, found
from hwbpd_sim.records import Step, pack

_NO_LEGS: Mapping[Leg, None] = {}
_NOTHING_HELD = Piece(Span(0, 1), Access.WRITE, Pool.ANY)  # of a resource that has no leg

Key = TypeVar("Key", int, Task)


class World:
    """
    Everything there is.

    :param kinds: of each CPU what it is, all of one architecture; all are online.

    ``cpus`` are the CPUs with their registers, by number, for whoever wants to look.
    ``now_ns`` is what records say the time is; whoever makes things happen sets it. ``faults`` is for the legs to come:
    each leg that is to be taken uses up one entry, 0 to be asked for as always, or an errno to be refused with.
    ``news`` holds the resources that have something to drain or have lost their target since it was last emptied, and
    ``cpus_changed`` says that CPUs came or went.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.cpus = tuple(map(Cpu, kinds))
        self._kinds = tuple(dict.fromkeys(kinds))
        self.possible = self.online = tuple(range(len(self.cpus)))
        self._possible = self._online = frozenset(self.possible)  # the same, to look one up
        self.now_ns = 0
        self.faults: deque[int] = deque()
        self.news: set[int] = set()
        self.cpus_changed = False
        self.cpu_of: dict[Task, int] = {}  # the live threads, and where they run
        self._tasks: dict[int, Task] = {}
        self._threads: dict[Process, list[Task]] = {}
        self._processes: dict[int, Process] = {}
        self._names: dict[Process, str] = {}
        self.pools = frozenset(kinds[0].slots)
        self._counts = {pool: PoolCounts([kind.slots[pool] for kind in kinds]) for pool in self.pools}
        self._armed: dict[int, Armed] = {}
        self._ids: dict[Armed, int] = {}
        self._legs_on: dict[int, dict[Leg, None]] = {}  # by CPU, those that are not dead
        self._legs_of: dict[Task, dict[Leg, None]] = {}
        self._attended: dict[Task, list[Armed]] = {}
        self._outside: list[OutsideSlot] = []
        self._born = 0

    # --- processes and threads ---------------------------------------------------------------------------------------

    def start_process(self, pid: int, name: str, cpu: int = 0) -> Task:
        """Start a process; return its first thread, whose number is ``pid``."""
        assert pid not in self._tasks, f"{pid} is in use"
        process = Process(pid, self._born + 1)
        self._processes[pid] = process
        self._threads[process] = []
        self._names[process] = name
        return self._start(process, pid, cpu)

    def start_thread(self, pid: int, tid: int, cpu: int = 0) -> Task:
        """Start one more thread of a process."""
        assert tid not in self._tasks, f"{tid} is in use"
        process = self.process(pid)
        parent = self._threads[process][0]
        task = self._start(process, tid, cpu)
        for leg in list(self._legs_of.get(parent, _NO_LEGS)):  # 3
            if leg.armed.target.process is not None:
                assert self._counts[leg.armed.piece.pool].admits(task, None), "a child has no more than its parent"
                self._add(Leg(leg.armed, task, None, inherited=True))
        return task

    def exit_thread(self, tid: int) -> None:
        """End a thread; with the last one its process ends."""
        task = self._tasks.pop(tid)
        assert task.process is not None
        threads = self._threads[task.process]
        threads.remove(task)
        self._leave(task)
        del self.cpu_of[task]
        if not threads:
            del self._threads[task.process], self._processes[task.process.pid], self._names[task.process]
        self._forget_traced(task, TargetEnd.EXIT)
        for leg in self._legs_of.pop(task, _NO_LEGS):
            if leg.inherited:
                self._remove(leg)
            if leg.armed.target.task is not None or not threads:
                self._end(leg.armed, TargetEnd.EXIT)

    def exec_process(self, pid: int, name: str) -> None:
        """Let the first thread of a process run another program; the others exit before."""
        process = self.process(pid)
        for other in [task.tid for task in self._threads[process] if task.tid != pid]:
            self.exit_thread(other)
        self._names[process] = name
        self._forget_traced(self._tasks[pid], TargetEnd.EXEC)
        legs = self._legs_of.get(self._tasks[pid], {})
        for leg in [leg for leg in legs if not leg.armed.mode.across_exec]:  # 4
            del legs[leg]
            self._end(leg.armed, TargetEnd.EXEC)
        self._settle(self.cpu_of[self._tasks[pid]])

    def move(self, tid: int, cpu: int) -> None:
        """Let a thread run on another CPU from now on."""
        assert cpu in self._online, f"cpu {cpu} is offline"
        task = self._tasks[tid]
        if self.cpu_of[task] != cpu:
            self._leave(task)
            self.cpu_of[task] = cpu

    def is_alive(self, tid: int) -> bool:
        return tid in self._tasks

    def task(self, tid: int) -> Task:
        """As ``Machine.task``."""
        if tid not in self._tasks:
            raise TargetGone(f"the simulated machine has no thread {tid}{self._there_are()}")
        return self._tasks[tid]

    def process(self, pid: int) -> Process:
        """As ``Machine.process``."""
        if pid not in self._processes:
            raise TargetGone(f"the simulated machine has no process {pid}{self._there_are()}")
        return self._processes[pid]

    def processes(self) -> Sequence[tuple[Process, str]]:
        """Those that live, with their names."""
        return list(self._names.items())

    def threads(self, process: Process) -> Sequence[int]:
        """As ``Machine.threads``."""
        return [task.tid for task in self._threads.get(process, ())]

    def _start(self, process: Process, tid: int, cpu: int) -> Task:
        self._born += 1
        task = Task(tid, self._born, process)
        self._tasks[tid] = task
        self._threads[process].append(task)
        self.cpu_of[task] = cpu
        return task

    def _there_are(self) -> str:
        pids = list(self._processes)
        if not pids:
            return ""
        named = ", ".join(map(str, pids[:4])) + (", ..." if len(pids) > 4 else "")
        return f"; its processes are {named} (`hwbpctl caps`)"

    # --- CPUs --------------------------------------------------------------------------------------------------------

    def take_cpu_offline(self, cpu: int) -> None:
        """Take a CPU away; the last one stays."""
        assert cpu in self.online, f"cpu {cpu} is offline"
        assert len(self.online) > 1, "a machine keeps one CPU"
        self._are_online(self._online - {cpu})
        self._legs_on.pop(cpu, None)  # 5
        self.cpus[cpu].reset()
        for number, task in enumerate([task for task, where in self.cpu_of.items() if where == cpu]):
            self.cpu_of[task] = self.online[number % len(self.online)]

    def bring_cpu_online(self, cpu: int) -> None:
        """Bring a CPU back."""
        assert cpu in self.possible, f"there is no cpu {cpu}"
        self._are_online(self._online | {cpu})

    def _are_online(self, cpus: frozenset[int]) -> None:
        self._online = cpus
        self.online = tuple(sorted(cpus))
        self.cpus_changed = True

    # --- what traps --------------------------------------------------------------------------------------------------

    def step(self, tid: int, step: Step) -> None:
        """Let a thread execute one instruction on the CPU that it is on: 1."""
        task = self._tasks[tid]
        number = self.cpu_of[task]
        cpu = self.cpus[number]
        if cpu.running is not task:
            self._run(task, number)
        if not cpu.legs:
            return
        blown = False
        for handled in cpu.execute(step):
            for slot in handled.reported:
                blown |= self._report(cpu.legs[slot], handled, step, task, number)
        if blown:
            self._settle(number)

    def _report(self, leg: Leg, handled: Handled, step: Step, task: Task, cpu: int) -> bool:
        """Count a hit and write its record; return whether the leg's fuse has blown."""
        armed = leg.armed
        mode = armed.mode
        if not (leg.left and (mode.kernel if step.in_kernel else mode.user)):
            return False
        if leg.left > 0:
            leg.left -= 1
        armed.hits += 1
        if armed.delivers_hits:
            armed.put(leg, cpu, pack(armed.piece, mode, step, task, cpu, self.now_ns, not handled.trap.before))
            self.news.add(self._ids[armed])
        return not leg.left

    def _run(self, task: Task, cpu: int) -> None:
        """Switch a thread in, and whoever runs there out."""
        earlier, self.cpus[cpu].running = self.cpus[cpu].running, task
        if task in self._legs_of or earlier in self._legs_of:
            self._settle(cpu)

    def _leave(self, task: Task) -> None:
        """Switch a thread out, if it is running."""
        cpu = self.cpu_of[task]
        if self.cpus[cpu].running is task:
            self.cpus[cpu].running = None
            self._settle(cpu)

    def _settle(self, cpu: int) -> None:
        """Have just that armed on a CPU which belongs there now: 1."""
        running = self.cpus[cpu].running
        on_cpu = self._legs_on.get(cpu, _NO_LEGS)
        of_task = _NO_LEGS if running is None else self._legs_of.get(running, _NO_LEGS)
        legs = (*on_cpu, *of_task)
        self.cpus[cpu].arm_just(
            [leg for leg in legs if leg.armed.reports and leg.left and (leg.cpu is None or leg.cpu == cpu)]
        )

    def _settle_for(self, leg: Leg) -> None:
        """The same where a leg is, or was until now."""
        if leg.task is None:
            assert leg.cpu is not None, "a slot without a task has a CPU"
            self._settle(leg.cpu)
        elif (cpu := self.cpu_of.get(leg.task)) is not None and self.cpus[cpu].running is leg.task:
            self._settle(cpu)

    # --- slots -------------------------------------------------------------------------------------------------------

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        """As ``Machine.arm``: ENODEV for a CPU that is not there, ESRCH for a thread or process that is gone."""
        assert resource_id not in self._armed, f"resource {resource_id} is armed already"
        armed = Armed(piece, target, mode)
        self._take(armed, list(self._places(target)))
        self._armed[resource_id] = armed
        self._ids[armed] = resource_id

    def attend(self, resource_id: int, target: Target) -> None:
        """As ``Machine.attend``: a resource without a leg, which ends with what the thread's tracer has: 6."""
        assert resource_id not in self._armed, f"resource {resource_id} is armed already"
        task = target.task
        assert task is not None, "only threads have tracers"
        if task not in self.cpu_of:
            raise ArmError(errno.ESRCH, tid=task.tid)
        armed = Armed(_NOTHING_HELD, target, Mode(delivery=Delivery.HOLD))
        self._armed[resource_id] = armed
        self._ids[armed] = resource_id
        self._attended.setdefault(task, []).append(armed)

    def disarm(self, resource_id: int) -> tuple[Batch, Totals]:
        """As ``Machine.disarm``."""
        armed = self._armed.pop(resource_id)
        del self._ids[armed]
        if armed.target.task is not None and armed in (attended := self._attended.get(armed.target.task, [])):
            attended.remove(armed)
            if not attended:
                del self._attended[armed.target.task]
        self.news.discard(resource_id)
        self._remove_all(armed)
        return armed.drain(armed.mode.ring_bytes * (1 + len(self.possible))), Totals(armed.hits, armed.lost)

    def top_up(self, resource_id: int, hits: int) -> bool:
        """As ``Machine.top_up``."""
        armed = self._armed[resource_id]
        if not (armed.is_fused and armed.reports):
            return True
        blown = [leg for leg in armed.legs if not leg.left]
        for leg in armed.legs:
            leg.left += hits if leg.left else 0
        return not blown

    def silence(self, resource_id: int) -> None:
        """As ``Machine.silence``."""
        armed = self._armed[resource_id]
        armed.reports = False
        for leg in armed.legs:
            self._settle_for(leg)

    def rearm(self, resource_id: int, fuse_hits: int) -> None:
        """As ``Machine.rearm``. As in Linux, a new fuse takes new slots in place of those given up for it."""
        armed = self._armed[resource_id]
        if armed.mode.delivery is Delivery.HOLD or armed.end is TargetEnd.EXEC:  # 4
            return
        armed.reports = True
        armed.fuse(fuse_hits)
        if armed.may_be_fused:
            places = [(leg.task, leg.cpu) for leg in armed.legs]
            self._remove_all(armed)
            self._take(armed, places)
        for leg in armed.legs:
            self._settle_for(leg)

    def drop_cpu(self, resource_id: int, cpu: int) -> None:
        """As ``Machine.drop_cpu``."""
        for leg in [leg for leg in self._armed[resource_id].legs if leg.cpu == cpu]:
            self._remove(leg)

    def add_cpu(self, resource_id: int, cpu: int) -> None:
        """As ``Machine.add_cpu``."""
        armed = self._armed[resource_id]
        target = armed.target
        belongs = target.is_cpu_wide if target.cpus is None else cpu in target.cpus
        if belongs and all(leg.cpu != cpu for leg in armed.legs):
            self._take(armed, [(target.task, cpu)])

    def armed(self, resource_id: int) -> Armed:
        """The resource of that number."""
        return self._armed[resource_id]

    def armed_ids(self) -> Sequence[int]:
        """The resources there are."""
        return list(self._armed)

    def _places(self, target: Target) -> Iterator[tuple[Task | None, int | None]]:
        """Where a target needs a slot; raises ``ArmError``."""
        if target.process is not None:
            if self._processes.get(target.process.pid) != target.process:
                raise ArmError(errno.ESRCH, tid=target.process.pid)
            yield from ((task, None) for task in self._threads[target.process])
            return
        task = target.task
        if target.cpus is not None:
            yield from ((task, cpu) for cpu in target.cpus)
        elif task is not None:
            yield task, None
        else:
            yield from ((None, cpu) for cpu in self.online)

    def _take(self, armed: Armed, places: Sequence[tuple[Task | None, int | None]]) -> None:
        """Take a leg in each place, or none of them: 2. What does not exist is told before what has no room."""
        counts = self._counts[armed.piece.pool]
        for task, cpu in places:
            if task is not None and task not in self.cpu_of:
                raise ArmError(errno.ESRCH, cpu=cpu, tid=task.tid)
            if cpu is not None and cpu not in (self._online if task is None else self._possible):
                raise ArmError(errno.ENODEV, cpu=cpu, tid=None if task is None else task.tid)
        taken: list[Leg] = []
        for task, cpu in places:
            refusal = self.faults.popleft() if self.faults else 0
            if not refusal and not counts.admits(task, cpu):
                refusal = errno.ENOSPC
            refusal = refusal or self._not_taken(armed, task, cpu)
            if refusal:
                for leg in taken:
                    self._remove(leg)
                raise ArmError(refusal, cpu=cpu, tid=None if task is None else task.tid)
            taken.append(Leg(armed, task, cpu))
            self._add(taken[-1])

    def _not_taken(self, armed: Armed, task: Task | None, cpu: int | None) -> int:
        """The errno with which the kernel refuses such a leg although there is room, or 0: 7."""
        kinds = self._kinds if cpu is None else (self.cpus[cpu].kind,)
        refusals = (kind.refusal(armed.piece, kernel=armed.mode.kernel, of_task=task is not None) for kind in kinds)
        return next(filter(None, refusals), 0)

    def _add(self, leg: Leg) -> None:
        leg.armed.legs.append(leg)
        self._counts[leg.armed.piece.pool].take(leg.task, leg.cpu)
        if leg.task is not None:
            self._legs_of.setdefault(leg.task, {})[leg] = None
        elif leg.cpu is not None:
            self._legs_on.setdefault(leg.cpu, {})[leg] = None
        self._settle_for(leg)

    def _remove_all(self, armed: Armed) -> None:
        for leg in list(armed.legs):
            self._remove(leg)

    def _remove(self, leg: Leg) -> None:
        leg.armed.legs.remove(leg)
        self._counts[leg.armed.piece.pool].give_back(leg.task, leg.cpu)
        if leg.task is not None:
            _forget(self._legs_of, leg.task, leg)
        elif leg.cpu is not None:
            _forget(self._legs_on, leg.cpu, leg)
        self._settle_for(leg)

    def _end(self, armed: Armed, end: TargetEnd) -> None:
        armed.end = armed.end or end
        self.news.add(self._ids[armed])

    # --- outside the daemon ------------------------------------------------------------------------------------------

    def take_outside(self, who: Outsider, pool: Pool, tid: int | None = None, cpu: int | None = None) -> None:
        """Let somebody outside the daemon take a slot of a thread or a CPU; raises ``ArmError`` where there is none."""
        task = None if tid is None else self._tasks[tid]
        if not self._counts[pool].admits(task, cpu):
            raise ArmError(errno.ENOSPC, cpu=cpu, tid=tid)
        self._counts[pool].take(task, cpu)
        self._outside.append(OutsideSlot(who, pool, task, cpu))

    def leave_outside(self, who: Outsider) -> None:
        """Let him give back all that he has, but for what he set as a tracer: 6."""
        for slot in [slot for slot in self._outside if slot.outsider == who]:
            if slot.is_traced:
                self._outside[self._outside.index(slot)] = slot.left_behind
            else:
                self._give_back_outside(slot)

    def slots_outside(self, pool: Pool, target: Target) -> int | None:
        """As ``Machine.slots_outside``: those that follow the thread."""
        if target.task not in self.cpu_of:
            return None
        return sum((slot.pool, slot.task, slot.cpu) == (pool, target.task, None) for slot in self._outside)

    def _give_back_outside(self, slot: OutsideSlot) -> None:
        self._outside.remove(slot)
        self._counts[slot.pool].give_back(slot.task, slot.cpu)

    def _forget_traced(self, task: Task, end: TargetEnd) -> None:
        """What a tracer has set on a thread goes, and with that who attends to it: 6."""
        for slot in [slot for slot in self._outside if slot.task == task and slot.is_traced]:
            self._give_back_outside(slot)
        for armed in self._attended.get(task, ()):
            self._end(armed, end)

    def foreign(self, pool: Pool, target: Target, cpu: int | None) -> Sequence[Foreign]:
        """As ``Machine.foreign``."""
        tasks: frozenset[Task] | None = None
        if not target.is_cpu_wide:
            tasks = frozenset(self._threads.get(target.process, ()) if target.process else filter(None, (target.task,)))
        return found(self._outside, pool, tasks, cpu)


def _forget(table: dict[Key, dict[Leg, None]], key: Key, leg: Leg) -> None:
    """Take a leg out of a table, if it is still there: one that is dead is not."""
    legs = table.get(key)
    if legs is not None:
        legs.pop(leg, None)
        if not legs:
            del table[key]
