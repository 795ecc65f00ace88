"""
The x86 register model against the CPU under it: ``python -m tests.judges.silicon --cases 20000 --seed 7``.

A case is a random content of the debug registers, as PTRACE_POKEUSER takes it, and a few random instructions that a
traced process runs on them, whole or one step at a time. The model says beforehand where it stops and with which DR6;
then it runs. The rules of a verdict:

- The whole way counts: every stop to the end of the stub, with its address, every bit of DR6, and RCX. Where the
  address is tells whether the instruction has been executed, "before" or "after"; RCX, how many rounds of it.
- The registers are given to the model by its own ``write``, and what an instruction accesses comes from the table in
  instructions.py, so the CPU judges the model and that table together.
- Where the manuals leave the answer open, a difference may be *at liberty*: only by a class of liberties.py, which says
  what else would be right; counted by name, and together in at most one case of a hundred. All else is a difference.
- What ptrace cannot arrange is asked of a vCPU of /dev/kvm (kvm_guest.py), one case in ``GUEST_EVERY``. Which of its
  questions this host's KVM answers is probed first; the others are left to the manual, and are no cases. So is INT1
  where a hypervisor does not get past it.
- A run that met too little proves too little: every kind of stop in ``MET_LEAST`` has to come up.

What Linux shows is not all of the CPU. Of a tracer's slots it installs the armed ones only, with G, in registers of its
own choosing, and translates DR6 back. So the B bits of slots that are not armed, L against G, and misaligned addresses
cannot be seen this way.

Exit status 0 and ``differences=0`` in the last line, ``cases=N differences=0 at_liberty=K``; 1 with the first cases
that differed, or 2 and ``no verdict: ...``.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from hwbpd.hookspecs import CpuFacts
from hwbpd_kvm import vcpu
from hwbpd_x86.debug_unit import X86DebugUnit
from hwbpd_x86.registers import Cpu, cpu_of
from tests.host import HostBusy, breakpoints_missing, exclusive
from tests.judges import kvm_guest
from tests.judges.instructions import INT1, WINDOW_BYTES, Composer, Instruction, Stub
from tests.judges.kvm_guest import GuestJudge
from tests.judges.liberties import LIBERTIES
from tests.judges.stops import SLOTS, Case, Stop, Unit, met_by, positive, predicted
from tests.judges.stub_process import CODE, DATA, FLAGS, RF, ProcessEnded, StubProcess

LIBERTY_MOST = 0.01  # of the cases
GUEST_EVERY = 20  # cases
TOLD = 5  # differences that are printed; the others are only counted
STOPS_MOST = 200  # of one case
MET_LEAST = {  # of the cases; about a tenth of what ``cases`` brings
    "no trap": 0.02,
    "before": 0.03,
    "after": 0.06,
    "several slots": 0.02,
    "step": 0.02,
    "step and slot": 0.01,
    "repeated": 0.001,
    "straddles a line": 0.01,
}


class NoVerdict(Exception):
    """What was seen proves nothing."""


def observed(process: StubProcess, case: Case) -> list[Stop]:
    """Run a case on the CPU, and return every stop to the end of the stub."""
    process.poke(7, 0)  # now they are breakpoints that are not armed, and may have any address
    for n, address in enumerate(case.addresses):
        process.poke(n, address)
    process.poke(7, case.dr7)
    for address, content in case.stub.memory.items():
        process.store(address, content)
    process.store(case.stub.address, case.stub.code)
    flags = case.stub.registers["eflags"] | (RF if case.resume else 0)
    process.set_registers({**case.stub.registers, "eflags": flags, "rip": case.stub.address})
    stops: list[Stop] = []
    while not stops or stops[-1].offset != len(case.stub.code):
        stopped = process.go(step=case.steps)
        if not stopped.is_trap or len(stops) == STOPS_MOST:
            raise NoVerdict(f"signal {stopped.signal} at {stopped.rip:#x} after {len(stops)} stops of\n{case.told()}")
        stops.append(Stop(stopped.rip - case.stub.address, positive(stopped.dr6), process.register("rcx")))
    return stops


# --- cases -----------------------------------------------------------------------------------------------------------


def cases(source: random.Random, *, avx: bool, int1: bool) -> Iterator[Case]:
    """Random cases without end; the same from the same source, where the CPU can do the same."""
    composer = Composer(source, avx=avx, int1=int1)
    while True:
        stub = composer.stub()
        addresses, dr7 = _registers(source, stub)
        mood = source.random()
        yield Case(stub, addresses, dr7, resume=mood < 0.1, steps=0.1 <= mood < 0.3)


def _registers(source: random.Random, stub: Stub) -> tuple[tuple[int, ...], int]:
    """What Linux takes: no I/O, no length for execution, aligned addresses of user space; and noise in other bits."""
    accesses = [access for instruction in stub.instructions for access in instruction.accesses]
    starts = stub.starts()
    dr7 = source.getrandbits(32) & 0xFF00  # LE, GE, RTM, GD and reserved bits: Linux takes them, and installs none
    addresses = []
    for n in range(SLOTS):
        rw = source.choice((0, 1, 1, 3, 3))
        length_code = source.choice((0, 1, 2, 3)) if rw else 0
        length = (1, 2, 8, 4)[length_code]
        near = source.random()
        if near < 0.03:
            address = source.randrange((1 << 47) - 4096)
        elif (rw == 0) != (near < 0.08):  # seldom a breakpoint among data, or a watchpoint on code
            address = source.choice(starts) + source.choice((0, 0, 0, 0, 1, 2, -1))
        elif accesses and near < 0.7:
            access = source.choice(accesses)
            address = access.address + source.randrange(-length, access.length_bytes + length)
        else:
            address = stub.window + source.randrange(-8, WINDOW_BYTES + 8)
        addresses.append(address - address % length)
        dr7 |= source.choice((0, 1, 2, 2, 2, 3)) << 2 * n | (length_code << 2 | rw) << 16 + 4 * n
    return tuple(addresses), dr7


def passes_int1(process: StubProcess) -> bool:
    """Whether INT1 gets anywhere here: some hypervisors raise its exception again and again, at the instruction."""
    stub = Stub(CODE, (Instruction("int1", INT1, ((),), raises=True),), {"eflags": FLAGS, "rsp": DATA}, {}, DATA)
    process.poke(7, 0)
    process.store(stub.address, stub.code)
    process.set_registers({**stub.registers, "rip": stub.address})
    return process.go().rip == stub.address + len(INT1)


# --- the verdict -----------------------------------------------------------------------------------------------------


class Silicon:
    """One run: cases for the CPU and for the vCPU, and what came of them."""

    def __init__(self, unit: Unit, process: StubProcess, guest: GuestJudge | None, *, avx: bool, seed: int) -> None:
        self.process = process
        self.unit = unit
        self.guest = guest
        self.int1 = passes_int1(process)
        self.differences = 0
        self.decided: Counter[str] = Counter()
        self.at_liberty: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self._cases = cases(random.Random(seed), avx=avx, int1=self.int1)
        self._seed = seed

    def run(self, wanted: int) -> None:
        """
        Judge that many cases.

        :raises NoVerdict: when the process ends up where no debug exception leads.
        """
        told = time.monotonic()
        for number in range(1, wanted + 1):
            if self.guest is not None and self.guest.answers and number % GUEST_EVERY == 0:
                self.decided["kvm guest"] += 1
                if difference := self.guest.judge():
                    self._differs(number, difference)
            else:
                self.decided["silicon"] += 1
                self._judge(number, next(self._cases))
            if time.monotonic() - told >= 1:
                told = time.monotonic()
                print(f"{number} of {wanted} cases", file=sys.stderr, flush=True)

    def _judge(self, number: int, case: Case) -> None:
        expected = predicted(self.unit, case)
        seen = observed(self.process, case)
        self.met.update(met_by(case, expected))
        if seen == expected:
            return
        for liberty in LIBERTIES:
            if liberty.allows(self.unit, case, seen):
                self.at_liberty[liberty.name] += 1
                return
        self._differs(number, f"{case.told()}\n  model:   {_written(expected)}\n  silicon: {_written(seen)}")

    def _differs(self, number: int, what: str) -> None:
        self.differences += 1
        if self.differences <= TOLD:
            print(f"case {number} of seed {self._seed}:\n{what}")

    def check_met(self) -> None:
        """:raises NoVerdict: when a kind of stop came up too seldom, or too much was left open."""
        total = self.decided["silicon"]
        for kind, least in MET_LEAST.items():
            if self.met[kind] < least * total:
                raise NoVerdict(f"only {self.met[kind]} of {total} cases had {kind!r}")
        if self.at_liberty.total() > LIBERTY_MOST * self.decided.total():
            raise NoVerdict(f"{self.at_liberty.total()} of {self.decided.total()} cases were left open by the manuals")

    def table(self) -> str:
        """What was met, what was left open, and who decided how many cases."""
        lines = [f"{kind}: {self.met[kind]} cases" for kind in MET_LEAST]
        lines += [f"at liberty, {name}: {self.at_liberty[name]} ({rule})" for name, rule, _allows in LIBERTIES]
        if self.guest is not None:
            lines.append(f"kvm guest: {self.guest.told()}")
        unanswered = list(kvm_guest.QUESTIONS) if self.guest is None else self.guest.unanswered()
        unanswered += [kvm_guest.BUS_LOCK] + ["INT1"] * (not self.int1)
        lines.append(
            f"silicon decided {self.decided['silicon']}, kvm guest decided {self.decided['kvm guest']}, "
            f"manual only: {', '.join(unanswered)}"
        )
        return "\n".join(lines)


def _written(stops: Sequence[Stop]) -> str:
    return " ".join(f"+{stop.offset}:dr6={stop.dr6:#x},rcx={stop.rcx}" for stop in stops)


def judge(silicon: Silicon, wanted: int) -> int:
    """Run, print the verdict, and return the exit status."""
    try:
        silicon.run(wanted)
        print(silicon.table())
        if not silicon.differences:
            silicon.check_met()
    except (NoVerdict, ProcessEnded) as reason:
        print(f"no verdict: {reason}")
        return 2
    print(
        f"cases={silicon.decided.total()} differences={silicon.differences} at_liberty={silicon.at_liberty.total()}"
    )
    return 1 if silicon.differences else 0


def features() -> frozenset[str]:
    """The CPU's features, as /proc/cpuinfo names them."""
    with open("/proc/cpuinfo", encoding="ascii") as lines:
        line = next((line for line in lines if line.startswith("flags")), "flags:")
    return frozenset(line.partition(":")[2].split())


def this_cpu() -> Cpu:
    """The CPU under us, as the model knows it."""
    return cpu_of(CpuFacts("x86_64", features()))


def what_is_missing() -> str | None:
    """Return what this host lacks for this judge, and how to get it; None if nothing."""
    if os.uname().machine != "x86_64":
        return "this judge needs an x86-64 CPU under it"
    return breakpoints_missing()


def run(unit: Unit, wanted: int, seed: int, *, kvm: bool = True) -> int:
    """
    Judge a model on this host, which nobody else uses for breakpoints; return the exit status.

    :param kvm: whether to ask /dev/kvm, too, where there is one.
    """
    missing = vcpu.what_is_missing() if kvm else "not asked"
    with StubProcess() as process:
        if missing is not None:
            print(f"kvm guest: {missing}")
            return judge(Silicon(unit, process, None, avx="avx" in features(), seed=seed), wanted)
        with vcpu.Kvm() as device, GuestJudge(device, random.Random(seed)) as guest:
            return judge(Silicon(unit, process, guest, avx="avx" in features(), seed=seed), wanted)


def main(arguments: Sequence[str] | None = None, make_unit: Callable[[Cpu], Unit] = X86DebugUnit) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.judges.silicon",
        description="Asks the x86 register model and the CPU under it what random instructions do to random registers.",
        epilog="Exit status: 0 they agree, 1 a difference, 2 no verdict (somebody else uses breakpoints, or this host "
        "cannot be asked).",
    )
    parser.add_argument("--cases", type=int, default=20_000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the run is the same for the same seed (a new one)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed={seed} cases={options.cases}", flush=True)
    if missing := what_is_missing():
        print(f"no verdict: {missing}")
        return 2
    try:
        with exclusive():
            return run(make_unit(this_cpu()), options.cases, seed)
    except HostBusy as busy:
        print(f"no verdict: {busy}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
