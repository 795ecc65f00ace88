"""
The silicon judge is judged: wrong models that it has to notice, what it takes for at liberty, and a short run.

A judge that has never found anything proves nothing. So the CPU is held against models that are wrong in one rule each,
and every one of them has to differ.
"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence

import pytest
from msgspec.structs import replace

from hwbpd.core.model import Access
from hwbpd.debug_unit import MemoryAccess, RegisterFile, Trap
from hwbpd_kvm import vcpu
from hwbpd_x86.debug_unit import PortAccess, X86DebugUnit
from hwbpd_x86.registers import CR4_DE, Cpu, Fault
from tests.host import exclusive
from tests.judges import silicon
from tests.judges.instructions import Instruction, Stub
from tests.judges.kvm_guest import EXECUTION, MOVES, STEPS, GuestJudge
from tests.judges.liberties import LIBERTIES
from tests.judges.silicon import cases
from tests.judges.stops import Case, Stop, Unit, predicted
from tests.judges.stub_process import CODE, DATA, FLAGS, StubProcess

CASES = 300
LAST = re.compile(r"cases=(\d+) differences=(\d+) at_liberty=(\d+)")

x86_only = pytest.mark.skipif("not __import__('platform').machine() == 'x86_64'", reason="it judges x86-64 CPUs only")
NO_VCPU = vcpu.what_is_missing()
needs_kvm = pytest.mark.skipif(NO_VCPU is not None, reason=str(NO_VCPU))

Accesses = Sequence[MemoryAccess]


class Altered(X86DebugUnit):
    """The model, with a change to what it is asked or to what it answers."""

    def __init__(
        self,
        *,
        accesses: Callable[[Accesses], Accesses] = lambda accesses: accesses,
        dr7: Callable[[int], int] = lambda word: word,
        trap: Callable[[Trap], Trap] = lambda trap: trap,
        resume_hides: bool = False,
        blind_to_steps: bool = False,
    ) -> None:
        super().__init__(Cpu())
        self._accesses, self._dr7, self._answer = accesses, dr7, trap
        self._resume_hides, self._blind = resume_hides, blind_to_steps

    def check(  # type: ignore[override]  # ports are not asked about here
        self, file: RegisterFile, accesses: Accesses, *, resume: bool = False, single_step: bool = False
    ) -> Trap | None:
        if resume and self._resume_hides:
            return None
        trap = super().check(
            {**file, "DR7": self._dr7(file["DR7"])},
            self._accesses(accesses),
            resume=resume,
            single_step=single_step and not self._blind,
        )
        return None if trap is None else self._answer(trap)


def every_byte_starts(accesses: Accesses) -> Accesses:
    return [
        replace(access, address=access.address + n)
        for access in accesses
        for n in range(access.length_bytes if access.access == Access.EXECUTE else 1)
    ]


def fetches_read(accesses: Accesses) -> Accesses:
    fetches = [access for access in accesses if access.access == Access.EXECUTE]
    return [*accesses, *(replace(fetch, access=Access.READ) for fetch in fetches)]


def one_slot(trap: Trap) -> Trap:
    return Trap(trap.slots[:1], trap.before, trap.status)


def reads_write(accesses: Accesses) -> Accesses:
    return [
        replace(access, access=Access.READ | Access.WRITE) if access.access == Access.READ else access
        for access in accesses
    ]


def as_long(change: Callable[[int], int]) -> Callable[[Accesses], Accesses]:
    return lambda accesses: [replace(access, length_bytes=change(access.length_bytes)) for access in accesses]


WRONG = {
    "reads meet slots for writes": Altered(accesses=reads_write),
    "writes alone meet slots for both": Altered(accesses=lambda all: [a for a in all if a.access != Access.READ]),
    "fetches are reads": Altered(accesses=fetches_read),
    "a breakpoint is met by every byte": Altered(accesses=every_byte_starts),
    "an access is its first byte": Altered(accesses=as_long(lambda _length: 1)),
    "an access is a byte longer": Altered(accesses=as_long(lambda length: length + 1)),
    "only the first access counts": Altered(accesses=lambda all: all[:2]),
    "LEN does not count": Altered(dr7=lambda word: word & ~0xCCCC_0000),
    "L does not arm": Altered(dr7=lambda word: word & ~0x55),
    "one slot for each trap": Altered(trap=one_slot),
    "data traps come before": Altered(trap=lambda trap: Trap(trap.slots, True, trap.status)),
    "breakpoints come after": Altered(trap=lambda trap: Trap(trap.slots, False, trap.status)),
    "RF hides data, too": Altered(resume_hides=True),
    "steps are not told": Altered(blind_to_steps=True),
}


@pytest.fixture(scope="module")
def process() -> Iterator[StubProcess]:
    with exclusive(), StubProcess() as process:
        yield process


@pytest.mark.hardware
@x86_only
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_model_is_noticed(wrong: Unit, process: StubProcess, capsys: pytest.CaptureFixture[str]) -> None:
    judged = silicon.Silicon(wrong, process, None, avx=False, seed=7)

    status = silicon.judge(judged, CASES)

    *before, last = capsys.readouterr().out.splitlines()
    assert status == 1
    assert judged.differences > 0
    assert last == f"cases={CASES} differences={judged.differences} at_liberty={judged.at_liberty.total()}"
    # What differs can be repeated and looked into.
    told = "\n".join(before)
    assert re.search(r"case \d+ of seed 7:\n  DR0=0x\w+, .*DR7=0x\w+.*\n  rax=.*", told)
    assert re.search(r"\n  0x1000\w+ \(\+0\): ([0-9a-f]{2} )+", told)
    assert re.search(r"\n  model:  .*\n  silicon: \+", told)


@pytest.mark.hardware
@x86_only
def test_the_cpu_agrees_with_the_model(process: StubProcess, capsys: pytest.CaptureFixture[str]) -> None:
    unit = X86DebugUnit(silicon.this_cpu())
    judged = silicon.Silicon(unit, process, None, avx="avx" in silicon.features(), seed=7)

    status = silicon.judge(judged, CASES)

    output = capsys.readouterr().out
    assert status == 0, output
    assert LAST.fullmatch(output.splitlines()[-1])
    assert re.search(rf"^silicon decided {CASES}, kvm guest decided 0, manual only: .*bus lock", output, re.MULTILINE)


@pytest.mark.hardware
@x86_only
def test_a_run_that_met_too_little_is_no_pass(process: StubProcess, capsys: pytest.CaptureFixture[str]) -> None:
    status = silicon.judge(silicon.Silicon(X86DebugUnit(Cpu()), process, None, avx=False, seed=7), 2)

    assert status == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("no verdict: only ")


@pytest.mark.hardware
@x86_only
def test_a_process_that_somebody_kills_ends_without_a_verdict(
    process: StubProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    with StubProcess() as other:  # while the first one's registers keep the host ours
        judged = silicon.Silicon(X86DebugUnit(Cpu()), other, None, avx=False, seed=7)
        os.kill(other.pid, signal.SIGKILL)

        status = silicon.judge(judged, CASES)

    assert status == 2
    assert re.fullmatch(r"no verdict: the traced process .*", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.hardware
@x86_only
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("opcode", [0x21, 0x23], ids=["read", "write"])
def test_a_mov_outside_ring_0_faults_as_the_model_says(number: int, opcode: int, process: StubProcess) -> None:
    # Given Linux, which sets CR4.DE at boot,
    registers = X86DebugUnit(Cpu()).registers
    file = {**registers.reset(), "CR4": CR4_DE}

    # when user code accesses a debug register,
    with pytest.raises(Fault) as fault:
        registers.move_from(file, number, cpl=3)
    process.poke(7, 0)
    process.store(CODE, bytes([0x0F, opcode, 0xC0 | number << 3]))
    process.set_registers({"rip": CODE, "eflags": FLAGS, "rsp": DATA})
    stopped = process.go()

    # then the signal tells which exception it was, and nothing was executed.
    assert {signal.SIGSEGV: "#GP(0)", signal.SIGILL: "#UD"}[signal.Signals(stopped.signal)] == fault.value.vector
    assert stopped.rip == CODE


# --- the vCPU --------------------------------------------------------------------------------------------------------


@needs_kvm
def test_a_vcpu_agrees_with_the_model() -> None:
    with vcpu.Kvm() as device, GuestJudge(device, random.Random(7)) as guest:
        differences = [difference for _ in range(60) if (difference := guest.judge())]
        assert differences == []
        assert MOVES not in guest.unanswered()
        assert guest.asked.total() == 60


class NoGd(X86DebugUnit):
    """A model in which GD guards nothing."""

    def __init__(self) -> None:
        super().__init__(Cpu())
        access = self.registers._accessed
        unguarded = lambda file, number, cpl: access({**file, "DR7": file["DR7"] & ~(1 << 13)}, number, cpl)  # noqa: E731
        self.registers._accessed = unguarded  # type: ignore[method-assign]


class GOnly(X86DebugUnit):
    """A model in which L does not arm."""

    def __init__(self) -> None:
        super().__init__(Cpu())

    def check(
        self,
        file: RegisterFile,
        accesses: Accesses,
        *,
        ports: Sequence[PortAccess] = (),
        resume: bool = False,
        single_step: bool = False,
    ) -> Trap | None:
        file = {**file, "DR7": file["DR7"] & ~0x55}
        return super().check(file, accesses, ports=ports, resume=resume, single_step=single_step)


@needs_kvm
@pytest.mark.parametrize(("wrong", "question"), [(NoGd, MOVES), (GOnly, EXECUTION), (GOnly, STEPS)])
def test_a_vcpu_notices_a_wrong_model(wrong: Callable[[], X86DebugUnit], question: str) -> None:
    with vcpu.Kvm() as device, GuestJudge(device, random.Random(7)) as probed:
        if question in probed.unanswered():
            pytest.skip(f"the KVM of this host does not answer: {question}")
        with GuestJudge(device, random.Random(7), wrong()) as guest:
            assert any(guest.ask(question) for _ in range(60))


# --- what is at liberty ----------------------------------------------------------------------------------------------

READS = ((MemoryAccess(Access.READ, DATA, 2),),)
WRITES = ((MemoryAccess(Access.WRITE, DATA, 1),),)
MOV_SS = Instruction("mov ss, [m]", b"\x8e\x14\x25" + DATA.to_bytes(4, "little"), READS, holds_back=True)
NOP = Instruction("nop", b"\x90", ((),))
STORE = Instruction("mov [m], al", b"\x88\x04\x25" + DATA.to_bytes(4, "little"), WRITES)
REP_STOSB = Instruction(
    "rep stosb x3",
    b"\xf3\xaa",
    tuple((MemoryAccess(Access.WRITE, DATA + n, 1),) for n in range(3)),
    left=(2, 1, 0),
    is_fast_string=True,
)
WATCHED = 0x402 | 0xF0000  # slot 0: reads and writes of four bytes


def case(*instructions: Instruction, breakpoint_at: int | None = None, steps: bool = False) -> Case:
    """DR0 watches the data; DR1 may hold a breakpoint, so far behind the start of the stub."""
    stub = Stub(CODE, instructions, {"rip": CODE, "eflags": FLAGS}, {}, DATA)
    if breakpoint_at is None:
        return Case(stub, (DATA, 0, 0, 0), WATCHED, steps=steps)
    return Case(stub, (DATA, CODE + breakpoint_at, 0, 0), WATCHED | 0b1000, steps=steps)


def allowed_by(seen: list[Stop], asked: Case) -> list[str]:
    return [liberty.name for liberty in LIBERTIES if liberty.allows(X86DebugUnit(Cpu()), asked, seen)]


def test_behind_mov_ss_a_breakpoint_may_drop_what_was_held_back_or_be_hidden() -> None:
    asked = case(MOV_SS, NOP, breakpoint_at=7)
    end = Stop(9, 0)

    assert predicted(X86DebugUnit(Cpu()), asked) == [Stop(7, 0b10), Stop(8, 0b01), end]
    assert allowed_by([Stop(7, 0b10), end], asked) == ["behind MOV SS"]
    assert allowed_by([Stop(8, 0b01), end], asked) == ["behind MOV SS"]
    for seen in ([end], [Stop(7, 0b01), end], [Stop(8, 0b11), end], [Stop(7, 0b10), Stop(7, 0b01), end]):
        assert allowed_by(seen, asked) == []


def test_a_data_trap_may_tell_of_the_breakpoint_that_comes_next() -> None:
    asked = case(STORE, NOP, breakpoint_at=7)
    end = Stop(9, 0)

    assert predicted(X86DebugUnit(Cpu()), asked) == [Stop(7, 0b01), Stop(7, 0b10), end]
    assert allowed_by([Stop(7, 0b11), end], asked) == ["one #DB for two"]
    for seen in ([Stop(7, 0b01), end], [Stop(7, 0b10), end], [Stop(7, 0b10), Stop(7, 0b01), end], [end]):
        assert allowed_by(seen, asked) == []


def test_a_fast_string_may_be_told_of_in_groups_and_not_left_out() -> None:
    asked = case(REP_STOSB)
    end = Stop(3, 0)

    assert predicted(X86DebugUnit(Cpu()), asked) == [Stop(0, 1, 2), Stop(0, 1, 1), Stop(2, 1), end]
    for seen in ([Stop(2, 1), end], [Stop(0, 1, 1), Stop(2, 1), end], [Stop(0, 1, 2), Stop(2, 1), end]):
        assert allowed_by(seen, asked) == ["fast strings"]
    for seen in ([Stop(0, 1, 2), end], [end], [Stop(0, 1, 1), Stop(0, 1, 1), Stop(2, 1), end], [Stop(2, 1, 1), end]):
        assert allowed_by(seen, asked) == []


def test_a_fast_string_may_be_told_of_a_round_late() -> None:
    # Given a slot on the first of three bytes,
    asked = replace(case(REP_STOSB), dr7=WATCHED & ~0xC0000)
    end = Stop(3, 0)

    assert predicted(X86DebugUnit(Cpu()), asked) == [Stop(0, 1, 2), end]
    assert allowed_by([Stop(0, 1, 1), end], asked) == ["fast strings"]
    assert allowed_by([Stop(0, 1, 2), Stop(0, 1, 1), end], asked) == []


def test_single_steps_go_round_by_round() -> None:
    asked = case(REP_STOSB, steps=True)

    assert allowed_by([Stop(2, 0x4001), Stop(3, 0)], asked) == []


def test_the_same_seed_asks_the_same() -> None:
    def first(seed: int) -> list[Case]:
        endless = cases(random.Random(seed), avx=True, int1=True)
        return [next(endless) for _ in range(50)]

    assert first(7) == first(7) != first(8)


def test_a_host_without_breakpoints_gets_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(silicon, "breakpoints_missing", lambda: "no registers here: " + errno.errorcode[errno.ENODEV])

    assert silicon.main(["--cases", "1", "--seed", "7"]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("no verdict: ")
