"""
What runs on the simulated machine by itself: processes whose threads touch a few variables at known rates.

Every process has the same program and so the same addresses, as processes have; only ``pid`` and ``tid`` tell them
apart. Process n (from 0) has pid 1000 * (n + 1), and its threads have the numbers from there on. Each thread makes
``steps_per_s`` steps a second, evenly; each step is one of ``ACTS``, drawn from the seed, so that their shares are
known in the mean, and then the loop in main(), which touches nothing. Now and then a thread moves to another CPU.

The same seed, and the same times, lead to the same steps in the same order.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from hwbpd.core.errors import HwbpError
from hwbpd.core.model import Access, Mode, Plan, Pool, Span
from hwbpd.hookspecs import Backend
from hwbpd_sim.outsiders import Outsider
from hwbpd_sim.records import Step
from hwbpd_sim.world import World

NAMES: Final = ("web", "db", "cache", "batch")  # of processes, in turn
PIDS: Final = 1000  # from one process to the next, so at most as many threads

CODE: Final = 0x401000
COUNTER: Final = 0x601000
FLAGS: Final = 0x601040
BUFFER: Final = 0x601080
BUFFER_BYTES: Final = 64
INBOX: Final = 0x6010C0
FUNCTION: Final = CODE + 0x200
MAIN: Final = CODE + 0x10  # a return address in main(), which calls everything
LOOP: Final = CODE + 0x20
KERNEL_COPY: Final = 0x40_0000  # where the kernel copies into a user's buffer, from its beginning
KERNEL_READ: Final = 0x30_0000  # its caller, the system call

_INSTRUCTION_BYTES: Final = 4
_MOVES: Final = 1 / 16  # how likely a thread is on another CPU before its next step
NS_PER_S: Final = 1_000_000_000

DEBUGGER: Final = Outsider(900, "sim-gdb", evidence="tracer")


class Act(NamedTuple):
    """One thing that every program does."""

    share: int  # of ten steps
    name: str
    what: str  # for people
    access: Access
    address: int
    length_bytes: int
    elements: int = 1  # of them one at random
    in_kernel: bool = False


READ, WRITE, EXECUTE = Access.READ, Access.WRITE, Access.EXECUTE
ACTS: Final = (
    Act(4, "counter", "written", WRITE, COUNTER, 8),
    Act(2, "flags", "read", READ, FLAGS, 4),
    Act(1, "flags", "written", WRITE, FLAGS, 4),
    Act(1, "buffer", "one of eight words written", WRITE, BUFFER, 8, elements=8),
    Act(1, "inbox", "written by the kernel", WRITE, INBOX, 8, in_kernel=True),
    Act(1, "function", "executed", EXECUTE, FUNCTION, 1),
)
_LOOP: Final = Step(EXECUTE, LOOP, 1, LOOP, LOOP + _INSTRUCTION_BYTES)
_SHARES: Final = tuple(act.share for act in ACTS)
assert sum(_SHARES) == 10


class Workload:
    """
    Processes with threads on a world, and their steps.

    :param start_ns: when it begins.
    :param steps_per_s: of each thread; 0 for processes that do nothing.
    """

    def __init__(
        self, world: World, *, seed: int, processes: int, threads: int, steps_per_s: int, start_ns: int = 0
    ) -> None:
        assert threads <= PIDS, f"a process has at most {PIDS} threads here"
        self._world = world
        self._random = random.Random(seed)
        self._steps_per_s = steps_per_s
        self._tids: list[int] = []
        self._start_ns = start_ns
        self._done = 0  # steps, of all threads
        kernel = kernel_base(world.cpus[0].kind.facts.architecture)
        self._steps = {
            (act, element): _step(act, element, kernel) for act in ACTS for element in range(act.elements)
        }
        cpus = world.possible
        for process in range(processes):
            pid = PIDS * (process + 1)
            for thread in range(threads):
                cpu = cpus[len(self._tids) % len(cpus)]
                if thread:
                    world.start_thread(pid, pid + thread, cpu)
                else:
                    world.start_process(pid, NAMES[process % len(NAMES)], cpu)
                self._tids.append(pid + thread)

    def hold_outside(self, slots: int) -> None:
        """Let a debugger outside the daemon have so many slots, of every pool, on the very first thread."""
        for pool in Pool:
            for _ in range(slots if pool in self._world.pools else 0):
                self._world.take_outside(DEBUGGER, pool, self._tids[0])

    @property
    def next_ns(self) -> int | None:
        """When the next step is due, if ever. The threads take turns, so that each has its steps evenly."""
        if not (self._steps_per_s and self._tids):
            return None
        return self._start_ns + self._done * NS_PER_S // (self._steps_per_s * len(self._tids))

    def run_until(self, now_ns: int, steps_max: int = sys.maxsize) -> None:
        """Make the steps that are due, at most so many of them."""
        for _ in range(steps_max):
            due_ns = self.next_ns
            if due_ns is None or due_ns > now_ns:
                return
            self._world.now_ns = due_ns
            self._step(self._tids[self._done % len(self._tids)])
            self._done += 1

    def skip_until(self, now_ns: int) -> None:
        """Leave out what was due earlier, as on a machine that stood still."""
        if self.next_ns is not None:
            passed = max(0, now_ns - self._start_ns)
            self._done = max(self._done, passed * self._steps_per_s * len(self._tids) // NS_PER_S)

    def _step(self, tid: int) -> None:
        draw, world = self._random, self._world
        # Drawn whether or not they are used: the seed alone decides what comes, not who has exited.
        moves, cpu = draw.random() < _MOVES, draw.choice(world.possible)
        (act,) = draw.choices(ACTS, _SHARES)
        element = draw.randrange(act.elements)
        if not world.is_alive(tid):
            return
        if moves and cpu in world.online:
            world.move(tid, cpu)
        world.step(tid, self._steps[act, element])
        world.step(tid, _LOOP)


def kernel_base(architecture: str) -> int:
    """Where the kernel begins, so that nobody takes one of its instructions for a program's."""
    return 0xFFFF_FFFF_8100_0000 if "64" in architecture else 0xC100_0000


def _step(act: Act, element: int, kernel: int) -> Step:
    address = act.address + element * act.length_bytes
    if act.access is Access.EXECUTE:
        return Step(act.access, address, 1, address, address + _INSTRUCTION_BYTES, callers=(MAIN,))
    in_user = CODE + 0x100 + 0x10 * ACTS.index(act)
    ip = kernel + KERNEL_COPY if act.in_kernel else in_user
    return Step(
        act.access,
        address,
        act.length_bytes,
        ip,
        ip + _INSTRUCTION_BYTES,
        act.in_kernel,
        callers=(in_user, MAIN) if act.in_kernel else (MAIN,),
        kernel_callers=(kernel + KERNEL_READ,) if act.in_kernel else (),
    )


def event_for(backend: Backend, act: Act) -> tuple[str, Plan] | None:
    """
    Return what to claim to see an act, as perf writes it, and how; None where no slot can see it.

    Where the slots cannot tell reads from writes, it is both.
    """
    mode = Mode(user=not act.in_kernel, kernel=act.in_kernel or act.access is not EXECUTE)
    lengths = backend.describe()["default_lengths"]
    for access in (act.access, READ | WRITE):
        length = lengths["x"] if access is EXECUTE else act.length_bytes
        modifier = ":k" if not mode.user else ":u" if not mode.kernel else ""
        try:
            plan = backend.fit(Span(act.address, length), access, mode)
        except HwbpError:
            continue
        return f"mem:{act.address:#x}/{length}:{access.letters}{modifier}", plan
    return None


def notes(backend: Backend, *, processes: int, threads: int, steps_per_s: int) -> Sequence[str]:
    """
    What there is to be watched, as sentences for people.

    :param backend: of what all CPUs have.
    """
    if not processes:
        return ["it has no processes"]
    names = [f"{PIDS * (n + 1)} {NAMES[n % len(NAMES)]}" for n in range(min(processes, len(NAMES)))]
    more = ", ..." if processes > len(NAMES) else ""
    tids = f"threads PID to PID+{threads - 1}" if threads > 1 else "one thread each"
    told = [f"its processes: {', '.join(names)}{more}; {tids}; all have the same program at the same addresses"]
    for act in ACTS if steps_per_s else ():
        rate = steps_per_s * act.share / 10
        event = event_for(backend, act)
        if event is None:
            told.append(f"{act.address:#x}  {act.name}: {act.what}, which no slot of these CPUs can see")
            continue
        in_slots = f", in {len(event[1].pieces)} slots" if len(event[1].pieces) > 1 else ""
        told.append(f"{event[0]}  {act.name}: {act.what} {rate:g} times a second by each thread{in_slots}")
    return told
