"""How Linux steps past a hit, on simulated registers, with what it misses; and what a query has to look at."""

from __future__ import annotations

import pytest

from hwbpd.core.model import Pool
from hwbpd.debug_unit import DebugUnit, MemoryAccess, RegisterFile, Write
from hwbpd_arm import stepping
from hwbpd_arm.stepping import Bookkeeping, OnReg
from hwbpd_arm.v7_unit import Armv7DebugUnit
from hwbpd_arm.v8_unit import Arm64DebugUnit
from tests.plugins.arm.units import R, W, X, armed, carry_out, execute, slots_of, write

A15 = Armv7DebugUnit(6, 4)
A57 = Arm64DebugUnit(6, 4)
HERE, CODE = 0x1_1000, 0x1_0000
WATCH, BREAK = (Pool.DATA, 1), (Pool.INST, 2)
RESERVED = (Pool.INST, 5)


def apply(unit: DebugUnit, file: RegisterFile, writes: list[Write] | tuple[Write, ...] | object) -> RegisterFile:
    assert isinstance(writes, list | tuple)
    for step in writes:
        file = unit.write(file, step.register, step.value)
    return file


@pytest.fixture
def watching() -> RegisterFile:
    return carry_out(A15, A15.reset(), {WATCH: armed(R | W, HERE, 4)})


def store_at(pc: int, length: int = 4, *, kernel: bool = False) -> list[MemoryAccess]:
    return [execute(pc, length, kernel=kernel), write(HERE, 4, kernel=kernel)]


def test_armv7_gets_past_a_watchpoint_and_has_it_back_at_the_next_instruction(watching: RegisterFile) -> None:
    # Given a store that meets a watchpoint,
    assert slots_of(A15.check(watching, store_at(CODE))) == {WATCH}

    # when the kernel steps past it,
    step, writes = stepping.begin(A15, watching, WATCH, CODE)
    file = apply(A15, watching, writes)

    # then the store runs, the next instruction traps at the reserved breakpoint, and that ends the step.
    assert A15.check(file, store_at(CODE)) is None
    assert slots_of(A15.check(file, [execute(CODE + 4)])) == {RESERVED}
    assert stepping.ends(step, CODE + 4)
    assert not stepping.ends(step, CODE)

    # And with everything put back the watchpoint is as it was, with the reserved breakpoint disarmed.
    file = apply(A15, file, stepping.end(A15, step))
    assert slots_of(A15.check(file, store_at(CODE + 4))) == {WATCH}
    assert {name: word for name, word in file.items() if not name.startswith("DBGBVR")} == {
        name: word for name, word in watching.items() if not name.startswith("DBGBVR")
    }


def test_armv7_steps_past_a_breakpoint_in_its_own_register() -> None:
    file = carry_out(A15, A15.reset(), {BREAK: armed(X, CODE, 4)})
    step, writes = stepping.begin(A15, file, BREAK, CODE)
    during = apply(A15, file, writes)
    assert A15.check(during, [execute(CODE)]) is None
    assert slots_of(A15.check(during, [execute(CODE + 4)])) == {BREAK}
    assert apply(A15, during, stepping.end(A15, step)) == file


def test_known_miss_a_second_t32_instruction_of_the_same_word_is_not_seen(watching: RegisterFile) -> None:
    _, writes = stepping.begin(A15, watching, WATCH, CODE)
    file = apply(A15, watching, writes)
    assert A15.check(file, store_at(CODE, 2)) is None
    assert A15.check(file, store_at(CODE + 2, 2)) is None, "it writes, and nobody hears of it"
    assert slots_of(A15.check(file, store_at(CODE + 4, 2))) == {RESERVED}


def test_known_miss_the_kernel_goes_on_unseen_until_it_returns(watching: RegisterFile) -> None:
    _, writes = stepping.begin(A15, watching, WATCH, 0xC000_1000)
    file = apply(A15, watching, writes)
    assert A15.check(file, store_at(0xC000_1004, kernel=True)) is None
    assert A15.check(file, store_at(0xC000_1008, kernel=True)) is None
    assert slots_of(A15.check(file, [execute(CODE)])) == {RESERVED}


def test_the_mismatch_breakpoint_is_written_as_linux_writes_it(watching: RegisterFile) -> None:
    _, writes = stepping.begin(A15, watching, WATCH, CODE + 2)
    mismatch_in_user_mode = 1 << 22 | 0xF << 5 | 2 << 1 | 1
    assert writes == [Write("DBGWCR1", 0), Write("DBGBVR5", CODE), Write("DBGBCR5", mismatch_in_user_mode)]


@pytest.mark.parametrize("bookkeeping", Bookkeeping)
def test_a_query_sees_a_watchpoint_that_is_stepped_if_it_looks_where_the_kernel_notes_it(
    bookkeeping: Bookkeeping,
) -> None:
    usable = A15.slots()[Pool.INST]
    tables = stepping.noted(bookkeeping, OnReg(watchpoints=frozenset({1})), WATCH, usable)
    assert stepping.hw_breakpoint_enabled(tables, stepping.looks_at(bookkeeping, usable))


def test_a_query_of_the_usable_entries_misses_what_the_first_kernels_step() -> None:
    usable = A15.slots()[Pool.INST]
    before = OnReg(watchpoints=frozenset({1}))
    assert stepping.hw_breakpoint_enabled(before, range(usable))
    during = stepping.noted(Bookkeeping.TABLE, before, WATCH, usable)
    assert not stepping.hw_breakpoint_enabled(during, range(usable))
    assert stepping.noted(Bookkeeping.TABLE, OnReg(frozenset({2})), BREAK, usable) == OnReg(frozenset({2}))


def test_a_switch_of_the_usable_registers_leaves_a_mismatch_breakpoint_live(watching: RegisterFile) -> None:
    # Given a watchpoint being stepped when a guest is to be entered,
    _, writes = stepping.begin(A15, watching, WATCH, CODE)
    file = apply(A15, watching, writes)

    # when only the usable registers are disabled, then the guest traps at its first instruction;
    usable = [*A15.breakpoints[: A15.slots()[Pool.INST]], *A15.watchpoints]
    disabled = apply(A15, file, [Write(pair.control, 0) for pair in usable])
    assert slots_of(A15.check(disabled, [execute(0x8000)])) == {RESERVED}

    # when all are, it does not.
    disabled = apply(A15, file, [Write(pair.control, 0) for pair in stepping.pairs_to_switch(A15)])
    assert A15.check(disabled, [execute(0x8000)]) is None


# --- arm64 -----------------------------------------------------------------------------------------------------------


def test_arm64_switches_all_of_a_sort_off_for_one_instruction() -> None:
    # Given two watchpoints and a breakpoint of user mode, and a watchpoint of the kernel's,
    kernels = 0xFFFF_8000_0000_0000
    slots = {
        (Pool.DATA, 0): armed(W, HERE, 4),
        (Pool.DATA, 1): armed(W, HERE + 8, 4),
        (Pool.DATA, 2): armed(W, kernels, 4),
        (Pool.INST, 0): armed(X, CODE, 4),
    }
    before = carry_out(A57, A57.reset(), slots)

    # when one of user mode's watchpoints is stepped past,
    during = apply(A57, before, stepping.switch_off(A57, before, Pool.DATA, kernel=False))

    # then the other is off, too, which is a known miss; breakpoints and the kernel's are not; and SS is set.
    assert A57.check(during, [execute(CODE + 4), write(HERE, 4), write(HERE + 8, 4)]) is None
    assert slots_of(A57.check(during, [execute(CODE)])) == {(Pool.INST, 0)}
    assert slots_of(A57.check(during, [write(kernels, 4, kernel=True)])) == {(Pool.DATA, 2)}
    assert during["MDSCR_EL1"] & 1

    # And afterwards everything is as it was.
    assert apply(A57, during, stepping.switch_on(A57, before, during)) == before


def test_arm64_switches_user_modes_watchpoints_off_for_the_kernels_too() -> None:
    kernels = 0xFFFF_8000_0000_0000
    before = carry_out(A57, A57.reset(), {(Pool.DATA, 0): armed(W, HERE, 4), (Pool.DATA, 2): armed(W, kernels, 4)})
    during = apply(A57, before, stepping.switch_off(A57, before, Pool.DATA, kernel=True))
    assert not during["DBGWCR0_EL1"] & 1
    assert not during["DBGWCR2_EL1"] & 1
    assert apply(A57, during, stepping.switch_on(A57, before, during)) == before
