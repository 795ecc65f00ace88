"""
Who is in the way, against what was arranged: ``python -m tests.judges.foreigners --scenarios 300 --seed 7``.

Each scenario lets a few random foreign users take slots on this host: perf, gdb, tracers that stay or leave something
behind, openers for CPUs, for threads and for threads that exit, holders that keep out of sight, decoys that hold events
of other kinds, and hwbpd itself. Then it asks who is in the way at a random place. The rules of a verdict:

- Whoever is named has what is said of him: at least so many breakpoints at that place, or one at all where no place is
  given. A tracer must trace the thread, and its slots must have been set through ptrace, by him or one before him.
- The numbers told for a place add up to what others have there, so nothing is hidden, and nothing of hwbpd's is blamed.
- Somebody or something is told whenever others have slots that count at the place.
- A run in which too few are named proves too little.

Exit status 0 and ``wrong=0`` in the last line, 1 with what was wrong, or 2 and ``no verdict: ...``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from hwbpd_linux import foreign
from hwbpd_linux.foreign import Found
from tests.host import HostBusy, breakpoints_missing, exclusive, slots_taken
from tests.judges.opener import KernelOpener
from tests.judges.oracle import CPUS, cpu_list
from tests.judges.users import Gdb, Perf, Sleeper, User, taken, wait_until

SLOTS = 4  # of every x86 CPU
HELPERS = 3
NAMED_LEAST = 0.1  # of the scenarios

FD, PTRACE, HIDDEN, OURS = "descriptor", "ptrace", "hidden", "ours"


class Slot(NamedTuple):
    """One slot that was taken: how, by whom, and where; -1 as the kernel means it."""

    how: str
    pid: int
    tid: int
    cpu: int


class Scenario:
    """A few users, and the truth about them."""

    def __init__(self, helpers: Sequence[User], online: Sequence[int], seed: int) -> None:
        self.random = random.Random(seed)
        self.online = tuple(online)
        self.story: list[str] = []
        self.slots: list[Slot] = []
        self.tracer_of: dict[int, int] = {}
        self.ours: dict[int, tuple[int | None, int | None]] = {}
        self._helpers = helpers
        self._ends = ExitStack()
        self._targets: list[int] = []

    def __enter__(self) -> Scenario:
        self._targets = [self._sleeper().tid for _ in range(2)]
        kinds: list[Callable[[], None]] = [
            *[self._cpu_wide, self._of_thread, self._of_dead_thread, self._tracer, self._residue] * 3,
            *[self._hidden, self._decoy, self._ours, self._perf] * 3,
            *[self._squeeze, self._gdb] * 2,
        ]
        try:
            for arrange in self.random.choices(kinds, k=self.random.randint(1, 4)):
                arrange()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # First of all: who is traced and killed stays until its tracer lets it go.
        for helper in self._helpers:
            helper.do("reset")
        self._ends.close()
        wait_until(lambda: not slots_taken(), "every slot is free again")

    # --- users -------------------------------------------------------------------------------------------------------

    def _cpu_wide(self) -> None:
        self._open(self.random.choice(self._helpers), -1, self.random.choice(self.online), self.random.randint(1, 4))

    def _of_thread(self) -> None:
        cpu = self.random.choice([-1, -1, *self.online])
        self._open(self.random.choice(self._helpers), self.random.choice(self._targets), cpu, self.random.randint(1, 4))

    def _of_dead_thread(self) -> None:
        sleeper = self._sleeper()
        self._open(self.random.choice(self._helpers), sleeper.tid, -1, self.random.randint(1, 3))
        sleeper.close()
        self.story.append(f"tid {sleeper.tid} exits")

    def _squeeze(self) -> None:
        """One process has everything on a CPU, as a careless profiler would."""
        self._open(self._helpers[0], -1, self.random.choice(self.online), SLOTS)

    def _hidden(self) -> None:
        helper, cpu = self.random.choice(self._helpers), self.random.choice(self.online)
        tid = self.random.choice([-1, *(target for target in self._targets if target not in self.tracer_of)])
        self._take(HIDDEN, helper.pid, tid, cpu, helper.do("hide", tid, cpu))

    def _decoy(self) -> None:
        helper = self.random.choice(self._helpers)
        helper.do("decoy")
        self.story.append(f"{helper.pid} holds other events")

    def _tracer(self) -> None:
        target = self._untraced()
        if target is not None:
            helper = self.random.choice(self._helpers)
            self.tracer_of[target] = helper.pid
            # What an earlier tracer left would be used again, and no slot taken.
            count = helper.do("trace", target, 0 if self._has_residue(target) else self.random.randint(0, 4))
            self._take(PTRACE, helper.pid, target, -1, count)
            self.story.append(f"{helper.pid} traces {target}")

    def _residue(self) -> None:
        target = self._untraced()
        if target is not None and not self._has_residue(target):
            helper = self.random.choice(self._helpers)
            self._take(PTRACE, helper.pid, target, -1, helper.do("trace", target, self.random.randint(1, 4)))
            helper.do("leave", target)

    def _ours(self) -> None:
        tid, cpu = self.random.choice([*((-1, cpu) for cpu in self.online), *((tid, -1) for tid in self._targets)])
        try:
            fd = KernelOpener().open(tid, cpu)
        except OSError:
            return
        self.ours[fd] = (None if tid == -1 else tid, None if cpu == -1 else cpu)
        self._ends.callback(os.close, fd)
        self._take(OURS, os.getpid(), tid, cpu, 1)

    def _perf(self) -> None:
        cpu, target = self.random.choice(self.online), self.random.choice(self._targets)
        where: dict[str, list[tuple[int, int]]]
        where = {"-a": [(-1, each) for each in self.online], "-C": [(-1, cpu)], "-p": [(target, -1)]}
        option = self.random.choice(list(where))
        number = {"-a": [], "-C": [str(cpu)], "-p": [str(target)]}[option]
        perf = Perf(option, *number)
        self._ends.callback(perf.close)
        self.story.append(f"perf[{perf.pid}] {option}")
        for tid, on in where[option] if perf.counts else []:
            self._take(FD, perf.pid, tid, on, 1)

    def _gdb(self) -> None:
        target, count = self._untraced(), self.random.randint(1, 3)
        if target is None or self._has_residue(target):
            return
        room = min(SLOTS - taken(target, cpu) for cpu in self.online)
        if room < count:
            return  # it would stop, and hold some or none
        gdb = Gdb(target, count)
        self._ends.callback(gdb.close)
        self.tracer_of[target] = gdb.pid
        self._take(PTRACE, gdb.pid, target, -1, count)

    def _open(self, helper: User, tid: int, cpu: int, times: int) -> None:
        self._take(FD, helper.pid, tid, cpu, sum(helper.do("open", tid, cpu) for _ in range(times)))

    def _take(self, how: str, pid: int, tid: int, cpu: int, count: int) -> None:
        self.slots += [Slot(how, pid, tid, cpu)] * count
        self.story.append(f"{pid} takes {count} by {how} on tid {tid} cpu {cpu}")

    def _has_residue(self, target: int) -> bool:
        return any((slot.how, slot.tid) == (PTRACE, target) for slot in self.slots)

    def _untraced(self) -> int | None:
        """A target that nobody traces, and that nobody has slots of who keeps out of sight."""
        hidden = {slot.tid for slot in self.slots if slot.how == HIDDEN}
        free = [target for target in self._targets if target not in self.tracer_of and target not in hidden]
        return self.random.choice(free) if free else None

    def _sleeper(self) -> Sleeper:
        sleeper = Sleeper()
        self._ends.callback(sleeper.close)
        return sleeper

    # --- the question and the verdict --------------------------------------------------------------------------------

    def ask(self) -> tuple[list[str], tuple[Found, ...]]:
        """Ask who is in the way at a random place; return what is wrong with the answer, and the answer."""
        places: list[tuple[int | None, int | None]] = [*((None, cpu) for cpu in self.online)] * 2
        places += [(target, cpu) for target in self._targets for cpu in (None, *self.online)]
        places.append((None, None))
        tid, cpu = self.random.choice(places)
        self.story.append(f"asked for tid {tid} cpu {cpu}")
        found = foreign.find(SLOTS, self.ours, self.online, tid, cpu)
        self.story += map(str, found)
        wrong = [f"{each} is not so" for each in found if not self._is_true(each)]
        wrong += self._miscounted(found)
        if not found and self._others_count_at(tid, cpu):
            wrong.append("nobody is told of, and others have slots")
        return wrong, found

    def _is_true(self, found: Found) -> bool:
        if found.pid == 0:
            return True
        theirs = [slot for slot in self.slots if slot.pid == found.pid and slot.how == FD]
        if found.evidence == foreign.PERF_FD and found.place == foreign.SOMEWHERE:
            return bool(theirs)
        if found.evidence == foreign.PERF_FD and (wide := re.fullmatch(r"cpu-wide on cpu (\d+)", found.place)):
            return 0 < found.slots <= sum((slot.tid, slot.cpu) == (-1, int(wide[1])) for slot in theirs)
        if found.evidence == foreign.TRACER and (thread := re.fullmatch(r"on tid (\d+)", found.place)):
            tid = int(thread[1])
            set_ = sum((slot.how, slot.tid) == (PTRACE, tid) for slot in self.slots)
            return self.tracer_of.get(tid) == found.pid and 0 < found.slots <= set_
        return False

    def _miscounted(self, found: Sequence[Found]) -> list[str]:
        told: Counter[str] = Counter()
        for each in found:
            told[each.place.split(",")[0]] += each.slots
        wrong = []
        for place, count in told.items():
            if wide := re.fullmatch(r"cpu-wide on cpu (\d+)", place):
                least = most = self._count(-1, int(wide[1]))
            elif thread := re.fullmatch(r"on tid (\d+)", place):
                # On which CPU is not told; where it is not one for all, it is one of them.
                counts = [self._count(int(thread[1]), cpu) for cpu in self.online]
                least, most = min(counts), max(counts)
            else:
                continue
            if not least <= count <= most:
                wrong.append(f"{count} told {place}, and others have {least} to {most}")
        return wrong

    def _count(self, tid: int, cpu: int) -> int:
        """Slots of others at exactly that place."""
        return sum(slot.how != OURS and slot.tid == tid and slot.cpu in (cpu, -1) for slot in self.slots)

    def _others_count_at(self, tid: int | None, cpu: int | None) -> bool:
        """Whether some of others' slots count there, were hwbpd's own not."""
        if any(slot.how == OURS for slot in self.slots):
            return False  # these may be what counts, on a busier thread or CPU
        cpus = self.online if cpu is None else (cpu,)
        threads = {slot.tid for slot in self.slots} if tid is None else {tid}
        return any(self._count(-1, each) or any(self._count(one, each) for one in threads) for each in cpus)


def judge(scenarios: int, seed: int) -> int:
    """Run, print what came of it, and return the exit status."""
    online = cpu_list(CPUS / "online")
    outcomes: Counter[str] = Counter()
    with ExitStack() as ends:
        helpers = [User() for _ in range(HELPERS)]
        for helper in helpers:
            ends.callback(helper.close)
        for number in range(scenarios):
            with Scenario(helpers, online, seed + number) as scenario:
                wrong, found = scenario.ask()
            if wrong:
                print("\n".join((f"scenario {number}, seed {seed + number}:", *scenario.story, *wrong)))
            outcomes["wrong"] += bool(wrong)
            named = any(each.pid for each in found)
            outcomes["named"] += named
            outcomes["unattributed"] += bool(found) and not named
            for how in {f"{each.evidence}, {'with' if each.slots else 'without'} a number" for each in found}:
                outcomes[f"told by {how}"] += 1
    print(*(f"{count} {how}" for how, count in sorted(outcomes.items()) if how.startswith("told ")), sep="\n")
    if outcomes["named"] < NAMED_LEAST * scenarios:
        print(f"no verdict: somebody was named in {outcomes['named']} of {scenarios} scenarios only")
        return 2
    print(
        f"scenarios={scenarios} named={outcomes['named']} unattributed={outcomes['unattributed']} "
        f"wrong={outcomes['wrong']}"
    )
    return 1 if outcomes["wrong"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.judges.foreigners",
        description="Lets random users take breakpoints, and asks hwbpd's search for others who they are.",
    )
    parser.add_argument("--scenarios", type=int, default=300, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the run is the same for the same seed (a new one)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed={seed} scenarios={options.scenarios}", flush=True)
    missing = breakpoints_missing()
    if missing is None and (os.uname().machine != "x86_64" or os.geteuid() != 0):
        missing = "this judge needs root, on x86-64"
    if missing is not None:
        print(f"no verdict: {missing}")
        return 2
    try:
        with exclusive():
            return judge(options.scenarios, seed)
    except HostBusy as busy:
        print(f"no verdict: {busy}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
