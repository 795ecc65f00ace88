"""
The admission rule against the running kernel: ``python -m tests.judges.oracle --operations 100000 --seed 7``.

Random claims and releases, each decided by ``fits()`` and, without it, by the kernel, to which this judge opens real
events of its own. They must agree every time. The rules of a verdict:

- An operation is a claim or a release; both sides do every one of them. A claim for several slots is opened one event
  after the other, and undone when one is refused.
- Where a CPU has a pool of slots for breakpoints and one for watchpoints, each slot of a claim is of a pool drawn at
  random: a claim for two may be for both. How many slots there are is what the freest CPU has at the start.
- Every fourth claim, at random, has to leave the reserve; the others may have it, as kgdb's may, or the machine would
  hardly ever be full. The kernel is asked for both alike and has to agree with ``fits()`` alone. Where it admits, it
  is asked about the reserve as well: so many slots more on the same target, which it has to admit exactly if the
  policy does. What only the policy refuses is given back, and counted apart.
- A run stops at the first difference. Then it gives back all it holds and looks whether every slot is free. If not,
  somebody else holds one, the kernel was right to count it, and there is no verdict.
- Somebody else's slots are looked for at the start, every so many operations, each time the machine has been emptied,
  and at the end. What should be free is known from ``slow_model``. A run that met somebody else is never a pass.
  What cannot be seen is a slot that came and went between two looks and changed no answer.
- A run that asked too little proves too little: each of the kernel's three kinds of request has to be admitted, and
  refused, in a share of its claims, or there is no verdict either.

Exit status 0 and ``differences=0`` in the last line,
``operations=N admitted=A refused=R policy=P differences=0``, 1 and ``differences=1``, or 2 and ``no verdict: ...``.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hwbpd.core.admission import check_reserve, fits, kept_free
from hwbpd.core.books import Books
from hwbpd.core.errors import HeldBack, NoFreeSlot
from hwbpd.core.model import Access, Delivery, Mode, Piece, Plan, Pool, Resource, Span, Target, Task
from tests.host import HostBusy, breakpoints_missing, exclusive, free_slots
from tests.judges.opener import PERF_EVENT_OPEN, KernelOpener, Opener
from tests.judges.sleepers import sleepers
from tests.slow_model import ANY_CPU, SlowBooks

SLOTS = 4  # of every x86 CPU
X86_SLOTS = {Pool.ANY: SLOTS}
READ_WRITE = Access.READ | Access.WRITE
PIECES = {  # neither side looks at addresses
    Pool.ANY: Piece(Span(0x1000, 1), READ_WRITE, Pool.ANY),
    Pool.DATA: Piece(Span(0x1000, 1), READ_WRITE, Pool.DATA),
    Pool.INST: Piece(Span(0x1000, 4), Access.EXECUTE, Pool.INST),
}

TASK, TASK_ON_CPU, CPU = "task anywhere", "task on one cpu", "cpu-wide on one cpu"
ALL_CPUS, PAIR = "cpu-wide on all cpus", "two slots, any target"
KERNEL_KINDS = (TASK, TASK_ON_CPU, CPU)
KINDS = (*KERNEL_KINDS, ALL_CPUS, PAIR)

CPUS = Path("/sys/devices/system/cpu")
SHARE_LEAST = 0.05  # of the claims of one kind: so many have to be admitted, and so many refused
RESERVING = 0.25  # of the claims the kernel admits: so many have to leave the reserve as well
PHASE = 500  # operations; then the machine is emptied, and filled in another way
PROBE_EVERY = 25  # operations
TAIL = 20  # operations told after a difference


class Difference(Exception):
    """The two did not agree."""


class NoVerdict(Exception):
    """What was seen proves nothing."""


class Claimed(NamedTuple):
    """What one admitted claim holds: resources in the books, events in the kernel."""

    resource_ids: tuple[int, ...]
    events: tuple[int, ...]


class Oracle:
    """One run: the same operations, done by the books and by the kernel."""

    def __init__(
        self,
        opener: Opener,
        tids: Sequence[int],
        possible: Sequence[int],
        online: Sequence[int],
        seed: int,
        reserve: int = 1,
        slots: Mapping[Pool, int] = X86_SLOTS,
    ):
        self.opener = opener
        self.pools = tuple(slots)
        self.reserve = reserve
        self.online = tuple(online)
        self.tasks = [Task(tid, start_ticks=0) for tid in tids]  # they outlive the run; a number is enough
        self.random = random.Random(seed)
        self.books = Books(slots, possible, online)
        self.slow = SlowBooks(slots, possible, online)
        self.held: list[Claimed] = []
        self.operations = 0
        self.held_back: Counter[str] = Counter()  # claims that only the policy refused
        self.answers: Counter[tuple[str, bool]] = Counter()
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._next_resource = 1
        self._releases = 0.0  # the share of releases in this phase
        self._draining = False

    # --- operations --------------------------------------------------------------------------------------------------

    def run(self, operations: int) -> None:
        """
        Do that many operations.

        :raises Difference: when the kernel and the rule did not agree, and nobody else holds a slot.
        :raises NoVerdict: when somebody else does, or the kernel fails in another way.
        """
        told = time.monotonic()
        try:
            self._start_phase()
            while self.operations < operations:
                self._operate()
                if time.monotonic() - told >= 1:
                    told = time.monotonic()
                    print(f"{self.operations} of {operations} operations", file=sys.stderr, flush=True)
            self.give_back_all()
            self._look_for_others()
        finally:
            self.give_back_all()

    def _operate(self) -> None:
        self.operations += 1
        if self.held and (self._draining or self.random.random() < self._releases):
            self._release(self.random.randrange(len(self.held)))
        else:
            self._claim(self.random.choice(KINDS))
        if self.operations % PHASE == 0:
            self._draining = True
        if self._draining and not self.held:
            self._start_phase()
        elif self.operations % PROBE_EVERY == 0:
            self._look_for_others()

    def _start_phase(self) -> None:
        assert not self.held
        self._look_for_others()
        self._draining = False
        self._releases = self.random.uniform(0.25, 0.5)

    def _claim(self, kind: str) -> None:
        target, plan = self._request(kind)
        try:
            fits(self.books, target, plan)
            fits_here = True
        except NoFreeSlot:
            fits_here = False
        events = self._open(target, plan)
        self.tail.append(f"{self.operations}: claim {len(plan.pieces)} on {target}: {_words(fits_here)}")
        if fits_here != (events is not None):
            self.answers[kind, events is not None] += 1
            self._close(events or ())
            self._differ(f"{self.tail[-1]} by fits(), {_words(events is not None)} by the kernel")
        if events is not None and self.random.random() < RESERVING and not self._leaves_reserve(target, plan, events):
            self.held_back[kind] += 1
            self._close(events)
            return
        self.answers[kind, events is not None] += 1
        if events is not None:
            self._hold(target, plan, events)

    def _leaves_reserve(self, target: Target, plan: Plan, events: tuple[int, ...]) -> bool:
        """Whether the policy grants it, and the kernel would still admit the reserve beside its ``events``."""
        try:
            check_reserve(self.books, target, plan, self.reserve)
            leaves_enough = True
        except HeldBack:
            leaves_enough = False
        wanted = dict.fromkeys(piece.pool for piece in plan.pieces)
        kept_pieces = [PIECES[pool] for pool in wanted for _ in range(kept_free(self.books.pools[pool], self.reserve))]
        kept = len(kept_pieces)
        reserved = self._open(target, Plan(tuple(kept_pieces)))
        self._close(reserved or ())
        self.tail.append(f"{self.tail.pop()}, {'leaves' if leaves_enough else 'does not leave'} {kept} free")
        if leaves_enough != (reserved is not None):
            self._close(events)
            self._differ(f"{self.tail[-1]} by the policy, and the kernel differs")
        return leaves_enough

    def _request(self, kind: str) -> tuple[Target, Plan]:
        task, cpu = self.random.choice(self.tasks), self.random.choice(self.online)
        match kind:
            case "task anywhere":
                return Target(task), self._plan(1)
            case "task on one cpu":
                return Target(task, (cpu,)), self._plan(1)
            case "cpu-wide on one cpu":
                return Target(cpus=(cpu,)), self._plan(1)
            case "cpu-wide on all cpus":
                return Target(), self._plan(1)
        forms = (Target(task), Target(task, (cpu,)), Target(task, self.online), Target(cpus=(cpu,)), Target())
        return self.random.choice(forms), self._plan(2)

    def _plan(self, slots: int) -> Plan:
        # With one pool nothing is drawn, so that a seed of old asks the same as ever.
        if len(self.pools) == 1:
            return Plan((PIECES[self.pools[0]],) * slots)
        return Plan(tuple(PIECES[self.random.choice(self.pools)] for _ in range(slots)))

    def _open(self, target: Target, plan: Plan) -> tuple[int, ...] | None:
        """Open an event for every slot, or none if the kernel has no room for one of them."""
        anywhere = self.online if target.task is None else (ANY_CPU,)
        opened: list[int] = []
        for piece in plan.pieces:
            for cpu in anywhere if target.cpus is None else target.cpus:
                event = self._open_one(target.task, cpu, piece.pool)
                if event is None:
                    self._close(opened)
                    return None
                opened.append(event)
        return tuple(opened)

    def _open_one(self, task: Task | None, cpu: int, pool: Pool) -> int | None:
        try:
            return self.opener.open(-1 if task is None else task.tid, cpu, pool)
        except OSError as refusal:
            if refusal.errno != errno.ENOSPC:
                raise NoVerdict(f"the kernel did not answer the question: {refusal.strerror}") from refusal
            return None

    def _hold(self, target: Target, plan: Plan, events: tuple[int, ...]) -> None:
        ids = []
        for piece in plan.pieces:
            resource = Resource(self._next_resource, piece, target, Mode(delivery=Delivery.HOLD))
            self._next_resource += 1
            self.books.take(resource)
            self.slow.take(resource)
            ids.append(resource.resource_id)
        self.held.append(Claimed(tuple(ids), events))

    def _release(self, nth: int) -> None:
        claimed = self.held.pop(nth)
        self._close(claimed.events)
        targets = [str(self.books.resources[resource_id].target) for resource_id in claimed.resource_ids]
        for resource_id in claimed.resource_ids:
            self.books.give_back(resource_id)
            self.slow.give_back(resource_id)
        self.tail.append(f"{self.operations}: release {len(targets)} on {targets[0]}")

    def _close(self, events: Sequence[int]) -> None:
        for event in events:
            self.opener.close(event)

    def give_back_all(self) -> None:
        """Hold nothing, in the kernel and in the books; not an operation."""
        while self.held:
            self._release(-1)

    # --- who else is there -------------------------------------------------------------------------------------------

    def _differ(self, what: str) -> None:
        story = list(self.tail)
        self.give_back_all()
        self._look_for_others()
        raise Difference("\n".join((*story[:-1], what)))

    def _look_for_others(self) -> None:
        """
        Count what the kernel still gives to every task and CPU.

        :raises NoVerdict: when it is not what our own slots leave.
        """
        places = [(None, cpu) for cpu in self.online] + [(task, ANY_CPU) for task in self.tasks]
        for (task, cpu), pool in itertools.product(places, self.pools):
            free, expected = self._count_free(task, cpu, pool), self.slow.free(task, cpu, pool)
            if free != expected:
                where = (f"tid {task.tid}" if task else f"cpu {cpu}") + ("" if pool is Pool.ANY else f" ({pool})")
                raise NoVerdict(
                    f"somebody else uses breakpoints: {free} slots free on {where} at operation {self.operations}, "
                    f"where {expected} should be beside our own"
                )

    def _count_free(self, task: Task | None, cpu: int, pool: Pool) -> int:
        opened: list[int] = []
        try:
            while (event := self._open_one(task, cpu, pool)) is not None:
                opened.append(event)
        finally:
            self._close(opened)
        return len(opened)

    # --- what was asked ----------------------------------------------------------------------------------------------

    def admitted(self) -> int:
        return sum(count for (_, admitted), count in self.answers.items() if admitted)

    def refused(self) -> int:
        return sum(count for (_, admitted), count in self.answers.items() if not admitted)

    def table(self) -> str:
        """Return, for each kind of claim, how often the kernel admitted and refused it, and what policy refused."""
        lines = [f"{'kind':24}{'claims':>9}{'admitted':>10}{'':8}{'refused':>10}{'':8}{'policy':>10}"]
        for kind in KINDS:
            admitted, refused = self.answers[kind, True], self.answers[kind, False]
            claims = admitted + refused
            counts = "".join(f"{count:10}{count / max(claims, 1):8.1%}" for count in (admitted, refused))
            lines.append(f"{kind:24}{claims:9}{counts}{self.held_back[kind]:10}")
        return "\n".join(lines)

    def check_shares(self) -> None:
        """Raise ``NoVerdict`` when a kind of request was hardly ever admitted or hardly ever refused."""
        for kind in KERNEL_KINDS:
            claims = self.answers[kind, True] + self.answers[kind, False]
            for admitted in (True, False):
                if self.answers[kind, admitted] < SHARE_LEAST * claims or not claims:
                    raise NoVerdict(
                        f"only {self.answers[kind, admitted]} of {claims} claims for {kind!r} were {_words(admitted)}, "
                        f"and at least {SHARE_LEAST:.0%} have to be: ask for more operations"
                    )


def judge(oracle: Oracle, operations: int) -> int:
    """Run, print what came of it, and return the exit status."""
    differences = 0
    try:
        oracle.run(operations)
        print(oracle.table())
        oracle.check_shares()
    except Difference as difference:
        print(difference)
        differences = 1
    except NoVerdict as reason:
        print(f"no verdict: {reason}")
        return 2
    print(
        f"operations={oracle.operations} admitted={oracle.admitted()} refused={oracle.refused()} "
        f"policy={oracle.held_back.total()} differences={differences}"
    )
    return differences


def _words(admitted: bool) -> str:
    return "admitted" if admitted else "refused"


def slots_here() -> Mapping[Pool, int]:
    """How many slots the freest CPU has now, by pool; on x86 there are four, whatever is free."""
    if os.uname().machine == "x86_64":
        return X86_SLOTS
    free = free_slots()
    return {Pool(name): max(free[cpu, name] for cpu, other in free if other == name) for _, name in free}


def cpu_list(path: Path) -> tuple[int, ...]:
    """Return the CPUs of a list as the kernel writes it: ``0-2,5``."""
    runs = [part.partition("-") for part in path.read_text().strip().split(",")]
    return tuple(cpu for first, _, last in runs for cpu in range(int(first), int(last or first) + 1))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.judges.oracle",
        description="Asks hwbpd's admission rule and the running kernel the same random questions.",
        epilog="operations = claims (admitted + refused + policy) + releases; both sides do every one. Exit status: 0 "
        "they agree, 1 a difference, 2 no verdict (somebody else uses breakpoints, or this host cannot be asked).",
    )
    parser.add_argument("--operations", type=int, default=100_000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the run is the same for the same seed (a new one)")
    parser.add_argument("--reserve", type=int, default=1, metavar="R", help="slots kept free per CPU (%(default)s)")
    options = parser.parse_args(arguments)
    if options.reserve < 0:
        parser.error("--reserve: no fewer than 0 slots can be kept free")
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed={seed} operations={options.operations} reserve={options.reserve}", flush=True)
    missing = breakpoints_missing()
    if missing is None and os.uname().machine not in PERF_EVENT_OPEN:
        missing = "this judge can ask the kernels of 64-bit x86 and Arm only"
    if missing is not None:
        print(f"no verdict: {missing}")
        return 2
    possible, online = cpu_list(CPUS / "possible"), cpu_list(CPUS / "online")
    try:
        with exclusive(), sleepers() as tids:
            judged = Oracle(KernelOpener(), tids, possible, online, seed, options.reserve, slots_here())
            return judge(judged, options.operations)
    except HostBusy as busy:
        print(f"no verdict: {busy}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
