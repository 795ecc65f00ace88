"""
The tracer's view against the running kernel: ``python -m tests.judges.pokes --sequences 10000 --seed 7``.

Random writes to the DR0-DR7 of fresh threads by PTRACE_POKEUSER, each answered by ``ptrace_view.poke`` and by the
kernel. The rules of a verdict:

- After each write the errno has to be the same, and then all eight registers as PTRACE_PEEKUSER reads them.
- A view has a hidden part, types and lengths. It shows when addresses are moved, so sequences are long enough for that.
- Between the writes somebody else takes some of the thread's slots and gives them back, so that every number of free
  slots is met. At the end of a sequence the free ones are counted: they have to be those that the view leaves.
- A sequence stops at its first difference, which is told with everything before it; the next one has another thread.
- A run that asked too little proves too little: each answer that there is has to occur, or there is no verdict. Nor is
  there one when somebody outside the judge has had slots.

Each sequence has a seed of its own, so ``--only K`` repeats the K-th of a run without those before it.

Exit status 0 and ``differences=0`` in the last line, ``sequences=N writes=M differences=0``, 1 and another number, or 2
and ``no verdict: ...``.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from hwbpd.hookspecs import CpuFacts
from hwbpd_x86 import ptrace_view
from hwbpd_x86.dr7 import RW, SLOTS, Dr7, Len, SlotControl, encode
from hwbpd_x86.linux import Kernel, kernel_of
from hwbpd_x86.ptrace_view import FRESH, View
from tests.host import HostBusy, breakpoints_missing, exclusive, slots_taken
from tests.judges.opener import KernelOpener
from tests.judges.tracee import Registers, sleeper

WRITES = (6, 24)  # in a sequence, at least and at most
OTHERS = 0.15  # how often somebody else takes or gives back a slot before a write
TOLD = 5  # differences told in full

NEW, MOVED, ALIAS, STATUS, CONTROL = "a new address", "another address", "DR4 or DR5", "DR6", "DR7"
ANSWERS = {
    NEW: {0, errno.EINVAL, errno.ENOSPC},
    MOVED: {0, errno.EINVAL},
    ALIAS: {errno.EIO},
    STATUS: {0},
    CONTROL: {0, errno.EINVAL, errno.ENOSPC},
}

_LONG = 2**64 - 1
_NUMBERS = (0, 1, 2, 3) * 3 + (7,) * 8 + (6, 4, 5)
_NOISE = 0xFFFF_FFFF_0000_FF00  # of DR7: all that says nothing about a slot
_EXECUTION = SlotControl(access=RW.EXECUTE)
_GOOD = (_EXECUTION, *(SlotControl(access=access, length=n) for access in (RW.WRITE, RW.READ_WRITE) for n in Len))
_BAD = (SlotControl(access=RW.IO), *(SlotControl(access=RW.EXECUTE, length=n) for n in Len if n != Len.ONE))

Poke = Callable[[Kernel, View, int, int, int], tuple[View, int]]


def model(kernel: Kernel, view: View, number: int, value: int, free_slots: int) -> tuple[View, int]:
    """What is judged."""
    return ptrace_view.poke(kernel, view, number, value, free_slots=free_slots)


class Difference(Exception):
    """The two did not agree; told with the whole sequence."""


class Pokes:
    """One run. Each sequence is drawn from the seed and its number, and from nothing that an earlier one did."""

    def __init__(
        self, threads: Callable[[], AbstractContextManager[Registers]], kernel: Kernel, seed: int, poke: Poke = model
    ) -> None:
        """
        :param threads: gives a fresh thread for each sequence.
        """
        self._threads = threads
        self._kernel = kernel
        self._seed = seed
        self._poke = poke
        self.writes = 0
        self.differences = 0
        self.answers: Counter[tuple[str, int]] = Counter()

    def run(self, numbers: Iterable[int]) -> None:
        """Do the sequences with these numbers; tell of the first differences."""
        for number in numbers:
            try:
                with self._threads() as registers:
                    self._sequence(registers, random.Random(f"{self._seed} {number}"))
            except Difference as difference:
                self.differences += 1
                if self.differences <= TOLD:
                    print(f"sequence {number} (--seed {self._seed} --only {number}):\n{difference}")

    def _sequence(self, registers: Registers, draw: random.Random) -> None:
        view, others = FRESH, 0
        story: list[str] = []
        for _ in range(draw.randint(*WRITES)):
            free = SLOTS - others - view.slots_held
            if draw.random() < OTHERS:
                taken = self._let_others(registers, draw, free, others)
                story += ["somebody else takes a slot" if taken > 0 else "somebody else gives one back"] * abs(taken)
                others, free = others + taken, free - taken
            number = draw.choice(_NUMBERS)
            value = _word(draw, self._kernel, number)
            kind = _kind(view, number)
            view, expected = self._poke(self._kernel, view, number, value, free)
            got = registers.poke(number, value)
            self.writes += 1
            self.answers[kind, got] += 1
            story.append(f"DR{number} = {value:#x}, {free} free: {_name(got)}")
            if got != expected:
                raise _difference(story, f"the model says {_name(expected)}", view)
            for n in range(8):
                read, told = registers.peek(n), ptrace_view.peek(view, n)
                if read != told:
                    raise _difference(story, f"DR{n} reads {read:#x}; the model says {told:#x}", view)
        left, expected = registers.free(), SLOTS - others - view.slots_held
        if left != expected:
            raise _difference(story, f"{left} slots are free; the model says {expected}", view)

    @staticmethod
    def _let_others(registers: Registers, draw: random.Random, free: int, others: int) -> int:
        """Return by how many slots somebody else has more now."""
        if free > 0 and draw.random() < 0.6:
            registers.take()
            return 1
        if others > 0:
            registers.give_back()
            return -1
        return 0

    def missing(self) -> list[str]:
        """Return the answers that never came."""
        return [
            f"{kind}: {_name(answer)}"
            for kind, answers in ANSWERS.items()
            for answer in sorted(answers)
            if not self.answers[kind, answer]
        ]

    def table(self) -> str:
        """Return how often each answer came, by what was written."""
        lines = [f"{kind:16}{_name(answer):>8}{count:10}" for (kind, answer), count in sorted(self.answers.items())]
        return "\n".join(lines)


def _difference(story: list[str], what: str, view: View) -> Difference:
    return Difference("\n".join([*story, f"  {what}, for which it has {view}"]))


def _word(draw: random.Random, kernel: Kernel, number: int) -> int:
    if draw.random() < 0.05:
        return draw.getrandbits(64)
    if number < SLOTS:
        return _address(draw, kernel)
    return _control(draw) if number == ptrace_view.CONTROL else draw.getrandbits(draw.choice((17, 32, 64)))


def _address(draw: random.Random, kernel: Kernel) -> int:
    """Mostly of user space, half of them aligned to all lengths; the edges of what is a user's, and beyond."""
    if draw.random() < 0.75:
        address = draw.getrandbits(draw.choice((12, 32, 46)))
        return address & ~7 if draw.random() < 0.5 else address
    edge = draw.choice((0, kernel.user_top, 2**47, 2**56, 2**63, 0xFFFF_8000_0000_0000, 2**64))
    return (edge + draw.randint(-9, 9)) & _LONG


def _control(draw: random.Random) -> int:
    """A word that says something of each slot, at times with noise where nothing is said, or something unheard of."""
    form = draw.random()
    if form < 0.1:
        return draw.choice((0, 0x400, 0xFF, draw.getrandbits(32)))
    bad = draw.randrange(SLOTS) if form < 0.25 else None
    armed = draw.choice((0.15, 0.4, 0.8))
    slots = tuple(_slot(draw, armed, n == bad) for n in range(SLOTS))
    word = encode(Dr7(slots=(slots[0], slots[1], slots[2], slots[3])))
    return word ^ (draw.getrandbits(64) & _NOISE) if form > 0.75 else word


def _slot(draw: random.Random, armed: float, bad: bool) -> SlotControl:
    local, global_ = (draw.random() < armed / 2 for _ in range(2))
    said = draw.choice(_BAD if bad else _GOOD)
    return SlotControl(local, global_, said.access, said.length)


def _kind(view: View, number: int) -> str:
    if number < SLOTS:
        return NEW if view.events[number] is None else MOVED
    return {ptrace_view.STATUS: STATUS, ptrace_view.CONTROL: CONTROL}.get(number, ALIAS)


def _name(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "taken"


def running_kernel() -> Kernel:
    """Return what of this kernel and its CPU decides."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return kernel_of(CpuFacts(os.uname().machine, frozenset(flags.partition(":")[2].split())))


def judge(pokes: Pokes, numbers: Sequence[int], others: Callable[[], Sequence[str]]) -> int:
    """
    Run, print what came of it, and return the exit status.

    :param others: asked when all is given back: who has slots all the same.
    """
    pokes.run(numbers)
    print(pokes.table())
    if taken := others():
        print(f"no verdict: somebody else uses breakpoints: {'; '.join(taken)}")
        return 2
    if not pokes.differences and len(numbers) > 1 and (missing := pokes.missing()):
        print(f"no verdict: never answered: {', '.join(missing)}; ask for more sequences")
        return 2
    print(f"sequences={len(numbers)} writes={pokes.writes} differences={pokes.differences}")
    return 1 if pokes.differences else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.judges.pokes",
        description="Writes random words to debug registers by ptrace, and compares the kernel with the model.",
        epilog="Exit status: 0 they agree, 1 differences, 2 no verdict (somebody else uses breakpoints, or this host "
        "cannot be asked).",
    )
    parser.add_argument("--sequences", type=int, default=10_000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the run is the same for the same seed (a new one)")
    parser.add_argument("--only", type=int, default=None, metavar="K", help="the K-th sequence alone, from 0")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed={seed} sequences={options.sequences}", flush=True)
    missing = breakpoints_missing()
    if missing is None and os.uname().machine != "x86_64":
        missing = "this judge knows the debug registers of x86-64 only"
    if missing is not None:
        print(f"no verdict: {missing}")
        return 2
    numbers = range(options.sequences) if options.only is None else range(options.only, options.only + 1)
    try:
        with exclusive():
            opener = KernelOpener()
            return judge(Pokes(lambda: sleeper(opener), running_kernel(), seed), numbers, slots_taken)
    except HostBusy as busy:
        print(f"no verdict: {busy}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
