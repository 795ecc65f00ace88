"""What Linux reports of an instruction on Arm, what is off meanwhile, and what it takes to have everything back."""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.model import Access, Piece, Pool, Span
from hwbpd.debug_unit import Armed, DebugUnit, Executed, Handling, MemoryAccess, RegisterFile, Slot
from hwbpd_arm.handling import Arm64Handling, Armv7Handling
from hwbpd_arm.identification import DebugVersion
from hwbpd_arm.linux import USER_TOP, USER_TOP_32, Kernel
from hwbpd_arm.v7_unit import Armv7DebugUnit
from hwbpd_arm.v8_unit import Arm64DebugUnit
from tests.plugins.arm.units import R, W, X, armed_slots, carry_out, execute, read, update, write

HERE, CODE = 0x1_1000, 0x1_0000
KERNEL = 0xFFFF_0000_0000_1000
B0, B1, W0, W1 = (Pool.INST, 0), (Pool.INST, 1), (Pool.DATA, 0), (Pool.DATA, 1)

A57 = Arm64DebugUnit(6, 4)
A57_LINUX = Arm64Handling(A57, Kernel(user_top=USER_TOP))
VAGUE = Arm64DebugUnit(6, 4, reports_start=True)
VAGUE_LINUX = Arm64Handling(VAGUE, Kernel(user_top=USER_TOP))
A15 = Armv7DebugUnit(6, 4)
A15_LINUX = Armv7Handling(A15, Kernel(arm64=False, version=DebugVersion.V7_1, user_top=USER_TOP_32))
A9 = Armv7DebugUnit(6, 4, version=DebugVersion.V7)
A9_LINUX = Armv7Handling(A9, Kernel(arm64=False, version=DebugVersion.V7, user_top=USER_TOP_32))


class Cpu:
    """A CPU under a kernel."""

    def __init__(self, unit: DebugUnit, handling: Handling, wanted: Mapping[Slot, tuple[Access, int, int]]) -> None:
        self.unit, self.handling = unit, handling
        self.wanted: dict[Slot, Armed] = {}
        for slot, (access, address, length) in wanted.items():
            self.wanted[slot] = handling.armed(Piece(Span(address, length), access, slot[0]))
        self.file: RegisterFile = carry_out(unit, unit.reset(), self.wanted)
        self.settled = armed_slots(self.file)
        self.stepping: Mapping[Slot, Hashable] = {}

    def runs(self, *accesses: MemoryAccess) -> list[tuple[Slot, ...]]:
        """Execute an instruction; return what was reported, by exception."""
        executed = self.handling.execute(self.file, accesses, self.stepping)
        self.take(executed)
        return [handled.reported for handled in executed.handled]

    def take(self, executed: Executed) -> None:
        for step in executed.writes:
            self.file = self.unit.write(self.file, step.register, step.value)
        self.stepping = executed.stepping

    @property
    def is_settled(self) -> bool:
        """Whether all is armed as it was asked for, and nothing else."""
        return not self.stepping and armed_slots(self.file) == self.settled


def on_arm64(wanted: Mapping[Slot, tuple[Access, int, int]]) -> Cpu:
    return Cpu(A57, A57_LINUX, wanted)


def on_armv7(wanted: Mapping[Slot, tuple[Access, int, int]]) -> Cpu:
    return Cpu(A15, A15_LINUX, wanted)


# --- arm64 -----------------------------------------------------------------------------------------------------------


def test_arm64_reports_all_breakpoints_at_an_instruction_and_then_its_data() -> None:
    cpu = on_arm64({B0: (X, CODE, 4), B1: (X, CODE, 4), W1: (W, HERE, 8)})

    assert cpu.runs(execute(CODE), write(HERE, 8)) == [(B0, B1), (W1,)]
    assert cpu.is_settled
    assert cpu.runs(execute(CODE + 4), write(HERE, 8)) == [(W1,)], "and the next one, too"


def test_arm64_misses_the_second_of_two_watchpoints_that_one_access_meets() -> None:
    cpu = on_arm64({W0: (W, HERE, 8), W1: (W, HERE + 8, 8)})

    assert cpu.runs(execute(CODE), write(HERE, 16)) == [(W0,)]
    assert cpu.runs(execute(CODE), write(HERE + 8, 8)) == [(W1,)]


def test_arm64_misses_the_second_of_two_accesses_that_one_instruction_makes() -> None:
    cpu = on_arm64({W0: (R | W, HERE, 8), W1: (W, HERE + 64, 8)})

    assert cpu.runs(execute(CODE), read(HERE, 8), write(HERE + 64, 8)) == [(W0,)]


def test_arm64_reports_both_of_two_watchpoints_at_the_address_it_is_told() -> None:
    cpu = on_arm64({W0: (W, HERE, 8), W1: (R | W, HERE + 4, 4)})

    assert cpu.runs(execute(CODE), write(HERE + 4, 4)) == [(W0, W1)]


def test_arm64_takes_an_atomic_for_a_read_where_its_read_is_watched() -> None:
    cpu = on_arm64({W0: (W, HERE, 8), W1: (R, HERE, 8)})

    assert cpu.runs(execute(CODE), update(HERE, 8)) == [(W1,)]


def test_arm64_takes_the_nearest_watchpoint_where_the_address_is_not_exact() -> None:
    # given a CPU that reports where an access begins
    cpu = Cpu(VAGUE, VAGUE_LINUX, {W0: (W, HERE + 16, 8), W1: (W, HERE - 8, 4)})

    # then a store to the first is put down to the one that is nearer to its beginning
    assert cpu.runs(execute(CODE), write(HERE, 32)) == [(W1,)]
    assert cpu.runs(execute(CODE), write(HERE + 8, 16)) == [(W0,)]


def test_arm64_arms_for_the_side_that_the_address_is_on() -> None:
    users, kernels = (Piece(Span(address, 8), W, Pool.DATA) for address in (HERE, KERNEL))

    assert A57_LINUX.armed(users) == Armed(users, user=True, kernel=False)
    assert A57_LINUX.armed(kernels) == Armed(kernels, user=False, kernel=True)


@pytest.mark.parametrize("is_privileged", [True, False])
def test_arm64_reports_no_access_of_the_kernels_to_what_a_user_watches(is_privileged: bool) -> None:
    cpu = on_arm64({W0: (W, HERE, 8)})

    # when the kernel writes there, or does it with the rights of a user, as in copying to user memory
    told = cpu.runs(execute(KERNEL, kernel=True), write(HERE, 8, kernel=is_privileged))

    # then there is no report, with an exception or without
    assert told == ([] if is_privileged else [()])
    assert cpu.is_settled


def test_arm64_refuses_kernel_addresses_of_tasks_and_takes_them_cpu_wide() -> None:
    piece = Piece(Span(KERNEL, 8), W, Pool.DATA)

    assert A57_LINUX.refusal(piece, kernel=True, of_task=True) == errno.EINVAL
    assert A57_LINUX.refusal(piece, kernel=True, of_task=False) == 0
    assert A57_LINUX.refusal(piece, kernel=False, of_task=False) == errno.EINVAL


# --- ARMv7 -----------------------------------------------------------------------------------------------------------


def test_armv7_has_a_watchpoint_back_at_the_next_instruction_elsewhere() -> None:
    cpu = on_armv7({W0: (R | W, HERE, 4)})

    # given a store that was hit, then it is not seen at the same instruction again
    assert cpu.runs(execute(CODE), write(HERE, 4)) == [(W0,)]
    assert set(cpu.stepping) == {W0}
    assert cpu.runs(execute(CODE), write(HERE, 4)) == []

    # nor while the kernel runs, whose instructions no mismatch breakpoint meets
    assert cpu.runs(execute(CODE + 64, kernel=True)) == []
    assert set(cpu.stepping) == {W0}

    # but the next one in user mode ends the step before it is executed
    assert cpu.runs(execute(CODE + 4), write(HERE, 4)) == [(), (W0,)]
    assert cpu.runs(execute(CODE + 8)) == [()]
    assert cpu.is_settled


def test_armv7_steps_past_the_kernels_copying_in_silence_and_is_blind_until_user_mode() -> None:
    cpu = on_armv7({W0: (R | W, HERE, 4)})
    copy = execute(0xC000_1000, kernel=True), write(HERE, 4)

    assert cpu.runs(*copy) == [()]
    assert cpu.runs(*copy) == [], "the second time without an exception"
    assert cpu.runs(execute(CODE), write(HERE, 4)) == [(), (W0,)]


def test_armv7_misses_a_second_short_instruction_in_the_same_word() -> None:
    cpu = on_armv7({W0: (R | W, HERE, 4)})

    assert cpu.runs(execute(CODE, 2), write(HERE, 4)) == [(W0,)]
    assert cpu.runs(execute(CODE + 2, 2), write(HERE, 4)) == []
    assert cpu.runs(execute(CODE + 4, 2), write(HERE, 4)) == [(), (W0,)]


def test_armv7_reports_both_of_two_watchpoints_that_one_access_meets() -> None:
    cpu = on_armv7({W0: (R | W, HERE, 8), W1: (R | W, HERE + 8, 8)})

    assert cpu.runs(execute(CODE), write(HERE, 16)) == [(W0,), (W1,)]
    assert set(cpu.stepping) == {W0, W1}
    assert cpu.runs(execute(CODE + 4)) == [()]
    assert cpu.is_settled


def test_armv7_reports_all_breakpoints_at_an_instruction_and_then_its_data() -> None:
    cpu = on_armv7({B0: (X, CODE, 4), B1: (X, CODE, 4), W0: (R | W, HERE, 4)})

    assert cpu.runs(execute(CODE), write(HERE, 4)) == [(B0, B1), (W0,)]
    assert set(cpu.stepping) == {B0, B1, W0}
    assert cpu.runs(execute(CODE + 4)) == [()]
    assert cpu.is_settled


def test_armv7_goes_from_one_breakpoint_to_the_next() -> None:
    cpu = on_armv7({B0: (X, CODE, 4), B1: (X, CODE + 4, 4)})

    for at, slot in ((CODE, B0), (CODE + 4, B1), (CODE, B0)):
        assert cpu.runs(execute(at)) == [(slot,)]
        assert set(cpu.stepping) == {slot}


def test_armv7_reports_a_breakpoint_again_that_comes_to_one_that_is_being_stepped_past() -> None:
    # given a breakpoint that is being stepped past, and another that is set at that instruction meanwhile
    cpu = on_armv7({B0: (X, CODE, 4)})
    cpu.runs(execute(CODE))
    remembered = cpu.stepping[B0]
    cpu.wanted[B1] = A15_LINUX.armed(Piece(Span(CODE, 4), X, Pool.INST))
    cpu.file = carry_out(A15, cpu.file, cpu.wanted)
    cpu.settled = armed_slots(cpu.file)
    cpu.take(A15_LINUX.step_on(cpu.file, B0, remembered))

    # when it is executed once more
    assert cpu.runs(execute(CODE)) == [(B0, B1)]

    # then both are put back as they were
    assert cpu.runs(execute(CODE + 4)) == [()]
    assert cpu.is_settled


def test_armv7_goes_on_stepping_in_another_slot_after_a_switch_of_threads() -> None:
    # given a watchpoint that is being stepped past, whose thread is switched out
    cpu = on_armv7({W0: (R | W, HERE, 4)})
    cpu.runs(execute(CODE), write(HERE, 4))
    remembered, piece = cpu.stepping[W0], cpu.wanted[W0]
    away = carry_out(A15, cpu.file, {})
    assert not armed_slots(away), "the mismatch breakpoint is gone, too"
    assert A15.check(away, [execute(CODE + 4)]) is None

    # when it is switched in and has another register
    cpu.file = carry_out(A15, away, {W1: piece})
    cpu.settled = armed_slots(cpu.file)
    cpu.take(A15_LINUX.step_on(cpu.file, W1, remembered))

    # then it is still off at that instruction, and on from the next
    assert cpu.runs(execute(CODE), write(HERE, 4)) == []
    assert cpu.runs(execute(CODE + 4), write(HERE, 4)) == [(), (W1,)]


def test_before_v7_1_the_one_watchpoint_is_reported_without_an_address() -> None:
    cpu = Cpu(A9, A9_LINUX, {W0: (R | W, HERE, 4)})

    assert cpu.runs(execute(CODE), write(HERE + 2, 1)) == [(W0,)]
    assert cpu.runs(execute(CODE + 4)) == [()]
    assert cpu.is_settled


@pytest.mark.parametrize(
    ("access", "of_task", "refusal"), [(R | W, True, 0), (R | W, False, errno.EINVAL), (W, True, errno.EINVAL)]
)
def test_armv7_refuses_what_it_cannot_step_past(access: Access, of_task: bool, refusal: int) -> None:
    piece = Piece(Span(HERE, 4), access, Pool.DATA)

    assert A15_LINUX.refusal(piece, kernel=True, of_task=of_task) == refusal


# --- both ------------------------------------------------------------------------------------------------------------


BLOCKS = [HERE, HERE + 8, HERE + 16]
instructions = st.tuples(
    st.sampled_from([CODE, CODE + 4, CODE + 8]), st.sampled_from([None, *BLOCKS]), st.sampled_from([R, W, R | W])
)


@pytest.mark.parametrize("made", [on_arm64, on_armv7])
def test_of_apart_slots_each_access_is_reported_once_and_all_is_as_it_was(
    made: Callable[[Mapping[Slot, tuple[Access, int, int]]], Cpu]
) -> None:
    @given(st.lists(instructions, max_size=12))
    def reports(program: Sequence[tuple[int, int | None, Access]]) -> None:
        # given breakpoints and watchpoints at different places
        slots = {(Pool.INST, n): (X, CODE + 4 * n, 4) for n in range(2)}
        watched = {(Pool.DATA, n): (R | W, block, 8) for n, block in enumerate(BLOCKS[:2])}
        cpu = made({**slots, **watched})

        # when a program runs that never executes the same instruction twice in a row
        for at, block, access in program:
            accesses = [execute(at), *([] if block is None else [MemoryAccess(access, block, 8)])]
            told = [slot for reported in cpu.runs(*accesses) for slot in reported]

            # then each slot that is met is reported, once
            met = [slot for slot, (_, address, _) in {**slots, **watched}.items() if address in (at, block)]
            assert told == met
            cpu.runs(execute(CODE + 64))
            assert cpu.is_settled

    reports()
