"""
The judge of the tracer's view is judged, on threads in memory whose kernel breaks one rule; then a short run on the
running kernel, and what random writes cannot show: traps, exec, fork, and a tracer that leaves.
"""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext

import pytest
from msgspec.structs import replace

from hwbpd_x86 import ptrace_view
from hwbpd_x86.dr7 import RW, SLOTS, Dr7, Len, SlotControl, encode
from hwbpd_x86.linux import Kernel
from hwbpd_x86.ptrace_view import FRESH, View, born, peek, trapped
from tests.host import HostBusy, exclusive
from tests.judges import pokes
from tests.judges.opener import KernelOpener
from tests.judges.pokes import Poke, Pokes, judge, model
from tests.judges.tracee import Tracee

KERNEL = Kernel()


class Thread:
    """A thread in memory, on a kernel that answers as ``poke`` says; at the end some slots are missing."""

    def __init__(self, poke: Poke, leaked: int = 0) -> None:
        self._poke = poke
        self._view = FRESH
        self._others = 0
        self._leaked = leaked

    def poke(self, number: int, value: int) -> int:
        self._view, answer = self._poke(KERNEL, self._view, number, value, self._free())
        return answer

    def peek(self, number: int) -> int:
        return peek(self._view, number)

    def take(self) -> None:
        self._others += 1

    def give_back(self) -> None:
        self._others -= 1

    def free(self) -> int:
        return self._free() - self._leaked

    def _free(self) -> int:
        return SLOTS - self._others - self._view.slots_held


# A difference as it is told: the sequence, what was done, and where the two part.
STORY = re.compile(
    r"^sequence (?P<number>\d+) \(--seed 7 --only (?P=number)\):\n"
    r"((DR\d = |somebody else ).*\n)*"
    r"  .*, for which it has View\(.*$",
    re.MULTILINE,
)


def run(thread: Callable[[], Thread], numbers: Sequence[int] = range(300), others: Sequence[str] = ()) -> int:
    return judge(Pokes(lambda: nullcontext(thread()), KERNEL, seed=7), numbers, lambda: others)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_a_kernel_that_agrees_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: Thread(model)) == 0
    assert re.fullmatch(r"sequences=300 writes=\d+ differences=0", last_line(capsys))


# --- kernels that break one rule each --------------------------------------------------------------------------------


def takes_no_slot_until_enabled(kernel: Kernel, view: View, number: int, value: int, free: int) -> tuple[View, int]:
    return model(kernel, view, number, value, max(free, 1) if number < SLOTS else free)


def gives_back_at_zero(kernel: Kernel, view: View, number: int, value: int, free: int) -> tuple[View, int]:
    if number < SLOTS and value == 0 and view.events[number] is not None:
        events = list(view.events)
        events[number] = None
        return replace(view, events=tuple(events)), 0
    return model(kernel, view, number, value, free)


def puts_everything_back(kernel: Kernel, view: View, number: int, value: int, free: int) -> tuple[View, int]:
    after, answer = model(kernel, view, number, value, free)
    return (view if answer else after), answer


def gives_back_what_was_made_on_the_way(
    kernel: Kernel, view: View, number: int, value: int, free: int
) -> tuple[View, int]:
    after, answer = model(kernel, view, number, value, free)
    if answer:
        events = tuple(new if old else None for old, new in zip(view.events, after.events, strict=True))
        after = replace(after, events=events)
    return after, answer


def checks_only_what_is_enabled(kernel: Kernel, view: View, number: int, value: int, free: int) -> tuple[View, int]:
    after, answer = model(kernel, view, number, value, free)
    if number == ptrace_view.CONTROL and answer == errno.EINVAL:
        for n in range(SLOTS):
            if not value >> 2 * n & 3:
                value &= ~(0xF << 16 + 4 * n)
        return model(kernel, view, number, value, free)
    return after, answer


def reads_back_what_the_register_would(
    kernel: Kernel, view: View, number: int, value: int, free: int
) -> tuple[View, int]:
    after, answer = model(kernel, view, number, value, free)
    return replace(after, control=after.control & 0xFFFF_FFFF), answer


def takes_kernel_addresses(kernel: Kernel, view: View, number: int, value: int, free: int) -> tuple[View, int]:
    return model(replace(kernel, user_top=2**64), view, number, value, free)


def ends_user_space_a_page_later(kernel: Kernel, view: View, number: int, value: int, free: int) -> tuple[View, int]:
    return model(replace(kernel, user_top=2**47), view, number, value, free)


def knows_no_length_of_eight(kernel: Kernel, view: View, number: int, value: int, free: int) -> tuple[View, int]:
    if number == ptrace_view.CONTROL and any(
        value >> 18 + 4 * n & 3 == Len.EIGHT and (value >> 2 * n & 3 or view.events[n]) for n in range(SLOTS)
    ):
        return view, errno.EINVAL
    return model(kernel, view, number, value, free)


def keeps_dr6_to_its_bits(kernel: Kernel, view: View, number: int, value: int, free: int) -> tuple[View, int]:
    after, answer = model(kernel, view, number, value, free)
    return replace(after, status=after.status & 0xFFFF_FFFF), answer


BROKEN = (
    takes_no_slot_until_enabled,
    gives_back_at_zero,
    puts_everything_back,
    gives_back_what_was_made_on_the_way,
    checks_only_what_is_enabled,
    reads_back_what_the_register_would,
    takes_kernel_addresses,
    ends_user_space_a_page_later,
    knows_no_length_of_eight,
    keeps_dr6_to_its_bits,
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_kernel_that_breaks_one_rule_is_found_out(broken: Poke, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(lambda: Thread(broken))

    told = capsys.readouterr().out
    assert status == 1
    assert STORY.search(told)
    assert re.fullmatch(r"sequences=300 writes=\d+ differences=[1-9]\d*", told.splitlines()[-1])


def test_a_difference_comes_back_when_its_sequence_is_repeated_alone(capsys: pytest.CaptureFixture[str]) -> None:
    # Given a run with differences,
    run(lambda: Thread(puts_everything_back), range(300))
    first = STORY.search(capsys.readouterr().out)
    assert first is not None

    # when the first of them is run alone, then it tells the same story.
    assert run(lambda: Thread(puts_everything_back), [int(first["number"])]) == 1
    again = STORY.search(capsys.readouterr().out)
    assert again is not None
    assert again[0] == first[0]


def test_a_slot_that_nobody_accounts_for_is_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: Thread(model, leaked=1), range(20)) == 1
    told = capsys.readouterr().out
    assert len(re.findall(r"^  -?\d slots are free; the model says \d, for which", told, re.MULTILINE)) == pokes.TOLD
    assert told.endswith("differences=20\n")


def test_somebody_elses_slots_end_without_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: Thread(model, leaked=1), range(20), ["3 of 4 slots free on cpu 1"]) == 2
    assert last_line(capsys) == "no verdict: somebody else uses breakpoints: 3 of 4 slots free on cpu 1"


def test_a_run_that_asked_too_little_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: Thread(model), range(2)) == 2
    assert last_line(capsys).startswith("no verdict: never answered: ")


# --- the running kernel ----------------------------------------------------------------------------------------------

x86_only = pytest.mark.skipif("not __import__('platform').machine() == 'x86_64'", reason="needs an x86_64 kernel")

@pytest.mark.hardware
@x86_only
def test_the_running_kernel_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    status = pokes.main(["--sequences", "300"])  # a new seed each time, which it prints

    output = capsys.readouterr().out
    assert status == 0, output
    assert re.fullmatch(r"sequences=300 writes=\d+ differences=0", output.splitlines()[-1])


# It says where its word is. At the next line it writes there; then it makes a child and says which; then it execs.
PROGRAM = """
import ctypes, os, signal, sys
word = ctypes.c_uint64()
print(ctypes.addressof(word), flush=True)
sys.stdin.readline()
word.value = 1
sys.stdin.readline()
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
sys.stdin.readline()
os.execlp("sleep", "sleep", "infinity")
"""


class Program:
    """That program, traced, and its view as the model has it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.opener = KernelOpener()
        self._process = process
        self.word = self.said()
        self.tracee = Tracee(self.opener, process.pid)
        self.view = FRESH

    def said(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def poke(self, number: int, value: int) -> None:
        assert self.tracee.poke(number, value) == 0
        self.view, answer = model(pokes.running_kernel(), self.view, number, value, SLOTS - self.view.slots_held)
        assert answer == 0


def read(tracee: Tracee) -> list[int]:
    return [tracee.peek(n) for n in range(8)]


def shown(view: View) -> list[int]:
    return [peek(view, n) for n in range(8)]


@pytest.fixture
def program() -> Iterator[Program]:
    with ExitStack() as held:
        try:
            held.enter_context(exclusive())
        except HostBusy as busy:
            pytest.skip(f"breakpoints of this host are in use: {busy}")
        command = [sys.executable, "-c", PROGRAM]
        process = held.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        program = Program(process)
        held.enter_context(program.tracee)
        # DR0 and DR2 watch the word, DR1 and DR3 something else; DR3 is not even enabled.
        eight, one = (SlotControl(global_=True, access=RW.WRITE, length=n) for n in (Len.EIGHT, Len.ONE))
        for number, address in enumerate((program.word, 0x10000, program.word, program.word)):
            program.poke(number, address)
        program.poke(7, encode(Dr7(slots=(eight, one, replace(one, local=True, global_=False), SlotControl()))))
        program.poke(6, 0x1234_5678_9ABC_DEF0)
        yield program


@pytest.mark.hardware
@x86_only
def test_a_trap_writes_dr6_anew_by_the_numbers_of_the_view(program: Program) -> None:
    # Given two of four slots on the word and noise in DR6, when it is written to,
    program.tell()
    program.tracee.go()
    assert program.tracee.wait() == signal.SIGTRAP

    # then DR6 names the two and has lost the noise;
    program.view = trapped(program.view, [0, 2])
    assert read(program.tracee) == shown(program.view)

    # and when the next instruction is stepped, it names the step alone.
    program.tracee.go(step=True)
    assert program.tracee.wait() == signal.SIGTRAP
    assert read(program.tracee) == shown(trapped(program.view, [], single_step=True))


@pytest.mark.hardware
@x86_only
def test_a_tracer_that_leaves_leaves_everything_to_the_next(program: Program) -> None:
    program.tracee.detach()
    program.tracee.attach()

    assert read(program.tracee) == shown(program.view)
    assert program.tracee.free() == SLOTS - program.view.slots_held == 0


@pytest.mark.hardware
@x86_only
def test_a_child_has_no_slots_and_an_exec_gives_them_back(program: Program) -> None:
    # Given a program with every slot taken, none enabled, and noise in DR6, when it makes a child,
    program.poke(7, 0)
    for _ in range(2):
        program.tell()
    program.tracee.go()
    with Tracee(program.opener, program.said()) as child:
        # then the child has nothing but the noise;
        assert read(child) == shown(born(program.view))
        assert child.free() == SLOTS

    # and when the program execs, it has nothing at all.
    assert program.tracee.wait() == signal.SIGCHLD
    program.tracee.go()
    program.tell()
    assert program.tracee.wait() == signal.SIGTRAP
    assert read(program.tracee) == shown(FRESH)
    assert program.tracee.free() == SLOTS
