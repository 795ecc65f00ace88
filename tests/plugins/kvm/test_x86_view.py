"""
The model of KVM's debug state, by its rules.

The emulator's half is also judged by a real vCPU (tests/judges/vcpu.py). For a guest that the CPU executes, the judge
is what the kernel's own self-test of KVM_SET_GUEST_DEBUG expects, and the sources and the manual for the rest.
"""

from __future__ import annotations

import errno

import pytest

from hwbpd_kvm.vcpu import DebugExit, DebugRegisters, GuestDebug
from hwbpd_kvm.x86_view import (
    BD,
    BS,
    DB,
    DR6_RESET,
    DR7_RESET,
    GD,
    GP,
    RF,
    TF,
    UD,
    Cpu,
    Data,
    Execution,
    Instruction,
    Move,
    Outcome,
    Raised,
    View,
    debug_registers,
    execute,
    set_debug_registers,
    set_guest_debug,
    set_registers,
    shown_rflags,
)

HARDWARE = GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS
STEP = GuestDebug.ENABLE | GuestDebug.SINGLE_STEP
AT = 0x1000
NOP = Instruction(1)
BOTH = tuple(Execution)
WIDE = 1 << 40

both = pytest.mark.parametrize("execution", BOTH, ids=["cpu", "emulator"])


def debugged(
    flags: int, db: tuple[int, int, int, int] = (0, 0, 0, 0), dr7: int = DR7_RESET, view: View | None = None
) -> View:
    """The view after KVM_SET_GUEST_DEBUG, asked for elsewhere than ``AT``."""
    return set_guest_debug(view or View(), Cpu(0), flags, (*db, 0, 0, 0, dr7))[0]


def raised(outcome: Outcome) -> tuple[int, int, int]:
    """Vector, RIP and DR6 after an exception for the guest."""
    assert isinstance(outcome.stop, Raised), outcome
    return outcome.stop.vector, outcome.stop.rip, outcome.view.dr6


# --- what a VMM asks -------------------------------------------------------------------------------------------------


def test_words_from_outside_are_stored_as_they_are() -> None:
    # When words come that no MOV could leave behind, then they read back the same.
    words = DebugRegisters((1, 2, 3, 1 << 63), 0, 0xFFFF_FFFF)
    assert debug_registers(set_debug_registers(View(), words)) == words


@pytest.mark.parametrize(
    "words",
    [
        DebugRegisters((0, 0, 0, 0), WIDE, DR7_RESET),
        DebugRegisters((0, 0, 0, 0), DR6_RESET, WIDE),
        DebugRegisters((0, 0, 0, 0), DR6_RESET, DR7_RESET, flags=1),
    ],
)
def test_flags_and_upper_halves_are_refused(words: DebugRegisters) -> None:
    with pytest.raises(OSError) as why:
        set_debug_registers(View(), words)
    assert why.value.errno == errno.EINVAL


def test_without_enable_every_flag_is_forgotten() -> None:
    # Given a VMM that debugs, when it leaves ENABLE out, then nothing is debugged, whatever else is set.
    view = debugged(HARDWARE | STEP)
    assert debugged(HARDWARE & ~GuestDebug.ENABLE, view=view).flags == 0


def test_an_exception_is_injected_once() -> None:
    # Given an injected #DB that waits,
    view, cpu = set_guest_debug(View(dr6=0x1234, dr7=GD), Cpu(AT), GuestDebug.INJECT_DB, (0,) * 8)
    # when another is injected, then it is refused;
    with pytest.raises(OSError) as why:
        set_guest_debug(view, cpu, GuestDebug.INJECT_BP, (0,) * 8)
    assert why.value.errno == errno.EBUSY
    # when the guest runs, then it comes, and leaves DR6 as it was;
    outcome = execute(view, cpu, NOP, Execution.EMULATOR)
    assert raised(outcome) == (DB, AT, 0x1234)
    assert outcome.view.dr7 & GD == 0
    # and a second time it does not.
    assert execute(outcome.view, cpu, NOP, Execution.EMULATOR).stop is None
    # When registers are set in between, then it is dropped.
    assert execute(*set_registers(view, cpu), NOP, Execution.EMULATOR).stop is None


# --- MOV -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("number", "written", "reads"),
    [
        (0, 1 << 63 | 5, 1 << 63 | 5),
        (6, 0, DR6_RESET),
        (6, 0xFFFF_FFFF, 0xFFFF_EFFF),
        (4, 0x4001, DR6_RESET | 0x4001),
        (7, 0, DR7_RESET),
        (7, 0xFFFF_DFFF, 0xFFFF_0FFF),  # bit 11 is kept, although no RTM was offered
        (5, 0x22, DR7_RESET | 0x22),
    ],
)
def test_a_move_keeps_what_the_register_has(execution: Execution, number: int, written: int, reads: int) -> None:
    # When a register is written and read back, then the reserved bits are as they read.
    moved = execute(View(), Cpu(AT), Instruction(3, Move(number, written)), execution)
    again = execute(moved.view, Cpu(AT), Instruction(3, Move(number)), execution)
    assert (moved.stop, again.stop, again.read) == (None, None, reads)


@both
@pytest.mark.parametrize("number", [4, 5, 8, 15])
def test_what_does_not_exist_is_undefined(execution: Execution, number: int) -> None:
    with_extensions = Cpu(AT, debugging_extensions=True)
    outcome = execute(View(), with_extensions, Instruction(3, Move(number)), execution)
    assert raised(outcome) == (UD, AT, DR6_RESET)
    assert isinstance(outcome.stop, Raised)
    assert outcome.stop.rflags & RF


@both
@pytest.mark.parametrize("number", [6, 7])
def test_an_upper_half_faults(execution: Execution, number: int) -> None:
    outcome = execute(View(), Cpu(AT), Instruction(3, Move(number, WIDE)), execution)
    assert raised(outcome) == (GP, AT, DR6_RESET)
    assert outcome.view == View()


@pytest.mark.parametrize("number", [4, 5])
def test_by_its_other_name_an_upper_half_faults_on_a_cpu_and_is_dropped_by_the_emulator(number: int) -> None:
    written = Instruction(3, Move(number, WIDE | 0xF))
    assert raised(execute(View(), Cpu(AT), written, Execution.CPU))[0] == GP
    dropped = execute(View(), Cpu(AT), written, Execution.EMULATOR)
    assert (dropped.stop, dropped.view) == (None, View())


@both
def test_ring_3_may_not(execution: Execution) -> None:
    view = View(dr7=DR7_RESET | GD)
    assert raised(execute(view, Cpu(AT, ring=3), Instruction(3, Move(0)), execution)) == (GP, AT, DR6_RESET)


@both
def test_general_detect_is_the_guests_while_nobody_debugs(execution: Execution) -> None:
    # Given the guest's GD and an old reason in DR6, when it reads a register,
    outcome = execute(View(dr7=DR7_RESET | GD, dr6=DR6_RESET | 1), Cpu(AT), Instruction(3, Move(0)), execution)
    # then #DB comes instead, with that reason alone, and GD is off.
    assert raised(outcome) == (DB, AT, DR6_RESET | BD)
    assert outcome.view.dr7 == DR7_RESET


def test_general_detect_of_the_vmm_is_told_to_it_by_the_cpu_only() -> None:
    view = debugged(HARDWARE, dr7=DR7_RESET | GD)
    told = execute(view, Cpu(AT), Instruction(3, Move(0)), Execution.CPU)
    assert told.stop == DebugExit(DB, AT, 0xFFFF_2FF0, DR7_RESET | GD)
    unseen = execute(view, Cpu(AT), Instruction(3, Move(0)), Execution.EMULATOR)
    assert (unseen.stop, unseen.read) == (None, 0)


def test_the_guests_general_detect_is_out_of_force_while_the_vmms_set_is_in_the_registers() -> None:
    view = debugged(HARDWARE, view=View(dr7=DR7_RESET | GD))
    assert execute(view, Cpu(AT), Instruction(3, Move(0)), Execution.CPU).stop is None
    assert raised(execute(view, Cpu(AT), Instruction(3, Move(0)), Execution.EMULATOR))[0] == DB


# --- breakpoints -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("slot", range(4))
def test_the_vmm_is_told_before_the_instruction(execution: Execution, slot: int) -> None:
    addresses = [0, 0, 0, 0]
    addresses[slot] = AT
    dr7 = DR7_RESET | 2 << 2 * slot
    db = (addresses[0], addresses[1], addresses[2], addresses[3])
    outcome = execute(debugged(HARDWARE, db, dr7, View(dr6=0x4321)), Cpu(AT), NOP, execution)
    assert outcome.stop == DebugExit(DB, AT, 0xFFFF_0FF0 | 1 << slot, dr7 if execution is Execution.CPU else 0)
    # The guest's own DR6 is not touched, and the instruction is still to come.
    assert (outcome.view.dr6, outcome.cpu.rip) == (0x4321, AT)


@both
@pytest.mark.parametrize(
    ("address", "dr7", "hits"),
    [
        (AT, 1, True),
        (AT, 2, True),
        (AT, 0, False),  # not armed
        (AT, 1 | 1 << 16, False),  # for writes
        (AT, 1 | 3 << 16, False),
        (AT + 1, 1, False),
        (AT | 1 << 60, 1, False),
    ],
)
def test_a_breakpoint_needs_to_be_armed_for_execution_at_that_address(
    execution: Execution, address: int, dr7: int, hits: bool
) -> None:
    view = View(db=(address, 0, 0, 0), dr7=DR7_RESET | dr7)
    assert (execute(view, Cpu(AT), NOP, execution).stop is not None) is hits


@both
def test_a_hit_of_the_guests_replaces_the_old_hits_and_keeps_the_other_reasons(execution: Execution) -> None:
    view = View(db=(0, 0, AT, 0), dr6=DR6_RESET | BS | 0b1001, dr7=DR7_RESET | 1 << 4)
    assert raised(execute(view, Cpu(AT), NOP, execution)) == (DB, AT, DR6_RESET | BS | 0b0100)


def test_rf_is_set_in_the_frame_by_the_cpu_and_not_by_the_emulator() -> None:
    view = View(db=(AT, 0, 0, 0), dr7=DR7_RESET | 1)
    by = {execution: execute(view, Cpu(AT), NOP, execution).stop for execution in BOTH}
    assert by == {Execution.CPU: Raised(DB, AT, 2 | RF), Execution.EMULATOR: Raised(DB, AT, 2)}


@both
def test_rf_hides_the_guests_breakpoint_for_one_instruction(execution: Execution) -> None:
    view = View(db=(AT, 0, 0, 0), dr7=DR7_RESET | 1)
    outcome = execute(view, Cpu(AT, rflags=2 | RF), NOP, execution)
    assert (outcome.stop, outcome.cpu.rflags) == (None, 2)


def test_who_is_told_when_both_have_a_breakpoint_there() -> None:
    # Given a breakpoint of the guest's and, in another slot, one of the VMM's,
    view = debugged(HARDWARE, (0, AT, 0, 0), DR7_RESET | 1 << 2, View(db=(AT, 0, 0, 0), dr7=DR7_RESET | 1))
    # then it is the VMM, with its slot;
    for execution in BOTH:
        stop = execute(view, Cpu(AT), NOP, execution).stop
        assert isinstance(stop, DebugExit)
        assert stop.dr6 == DR6_RESET | 2
    # and where the VMM's is elsewhere, the guest's own is in force only with the emulator.
    view = debugged(HARDWARE, (0, AT + 9, 0, 0), DR7_RESET | 1 << 2, View(db=(AT, 0, 0, 0), dr7=DR7_RESET | 1))
    assert execute(view, Cpu(AT), NOP, Execution.CPU).stop is None
    assert raised(execute(view, Cpu(AT), NOP, Execution.EMULATOR))[0] == DB


@pytest.mark.parametrize(
    ("control", "data", "hits"),
    [
        (0xD, Data(0x2000, 4, True), True),  # four bytes, writes
        (0xD, Data(0x2000, 4, False), False),
        (0xF, Data(0x2000, 4, False), True),
        (0xD, Data(0x2003, 1, True), True),
        (0xD, Data(0x2004, 1, True), False),
        (0xD, Data(0x1FFD, 4, True), True),
        (0x9, Data(0x2007, 1, True), True),  # eight bytes
        (0x1, Data(0x2001, 1, True), False),  # one byte
    ],
)
def test_the_cpu_reports_data_after_the_access_and_the_emulator_does_not(control: int, data: Data, hits: bool) -> None:
    dr7 = DR7_RESET | 1 << 2 | control << 20
    view = debugged(HARDWARE, (0, 0x2000, 0, 0), dr7)
    told = execute(view, Cpu(AT), Instruction(7, data), Execution.CPU).stop
    assert told == (DebugExit(DB, AT + 7, DR6_RESET | 2, dr7) if hits else None)
    assert execute(view, Cpu(AT), Instruction(7, data), Execution.EMULATOR).stop is None


# --- single step -----------------------------------------------------------------------------------------------------


@both
def test_the_vmms_single_step_hides_the_guests(execution: Execution) -> None:
    # Given a guest that steps itself, when the VMM steps it, then the VMM is told, and TF is gone for good.
    outcome = execute(debugged(STEP), Cpu(AT, rflags=2 | TF), NOP, execution)
    assert isinstance(outcome.stop, DebugExit)
    assert (outcome.stop.pc, outcome.stop.dr6) == (AT + 1, 0xFFFF_4FF0)
    assert outcome.cpu.rflags == 2
    # Without the VMM, the guest is.
    outcome = execute(View(), Cpu(AT, rflags=2 | TF), NOP, execution)
    assert raised(outcome) == (DB, AT + 1, DR6_RESET | BS)


def test_a_frame_shows_tf_only_where_stepping_was_asked_for() -> None:
    # Given a VMM that has asked for single step with RIP on an instruction that is undefined,
    undefined = Instruction(3, Move(8))
    view, cpu = set_guest_debug(View(), Cpu(AT), STEP, (0,) * 8)
    # then KVM_GET_REGS shows no TF, and the frame does;
    assert shown_rflags(view, cpu) == 2
    assert execute(view, cpu, undefined, Execution.EMULATOR).stop == Raised(UD, AT, 2 | TF | RF)
    # elsewhere it has none, even where the guest had set it itself.
    view, cpu = set_registers(view, Cpu(AT + 8, rflags=2 | TF))
    assert execute(view, cpu, undefined, Execution.EMULATOR).stop == Raised(UD, AT + 8, 2 | RF)


def test_a_stop_of_the_guests_own_goes_to_a_vmm_that_steps_where_the_cpu_executes() -> None:
    view = debugged(STEP, view=View(db=(AT, 0, 0, 0), dr7=DR7_RESET | 1))
    told = execute(view, Cpu(AT), NOP, Execution.CPU).stop
    assert told == DebugExit(DB, AT, DR6_RESET | 1, DR7_RESET | 1)
    assert raised(execute(view, Cpu(AT), NOP, Execution.EMULATOR)) == (DB, AT, DR6_RESET | 1)
