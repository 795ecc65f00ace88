"""What a tracer reads and writes of a thread's debug registers, on arm64, on ARMv7 and of AArch32 tasks."""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOSPC

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from hwbpd.core.model import Pool
from hwbpd_arm.identification import DebugVersion
from hwbpd_arm.linux import Kernel, Usable
from hwbpd_arm.ptrace_view import FRESH, REGSET_BYTES, Numbered, Regset, View

INST, DATA = Pool.INST, Pool.DATA
A57 = Regset(Kernel(), Usable(6, 4), {INST: 6, DATA: 4})
V7 = Kernel(arm64=False, version=DebugVersion.V7_1, user_top=0xBF00_0000)
A15 = Numbered(V7, Usable(5, 4), {INST: 5, DATA: 4})
COMPAT = Numbered(Kernel(), Usable(6, 4), {INST: 6, DATA: 4}, compat=True)
HERE = 0x40_1000
RW_USER = 3 << 3 | 2 << 1
E = 1


def regset(*entries: tuple[int, int], info: int = 0) -> bytes:
    """The bytes of so many pairs of address and control word."""
    raw = info.to_bytes(8, "little")
    return raw + b"".join(address.to_bytes(8, "little") + word.to_bytes(8, "little") for address, word in entries)


def entries_of(raw: bytes) -> list[tuple[int, int]]:
    pairs = [raw[start : start + 16] for start in range(8, len(raw), 16)]
    return [(int.from_bytes(pair[:8], "little"), int.from_bytes(pair[8:], "little")) for pair in pairs]


# --- arm64 -----------------------------------------------------------------------------------------------------------


def test_the_first_word_says_how_many_slots_there_are_and_of_which_version() -> None:
    """Read so from Linux 6.1 and 6.12 on a Cortex-A57 and, with version 8, a Neoverse N1."""
    for version, first in ((DebugVersion.V8, 0x600), (DebugVersion.V8_2, 0x800)):
        tracer = replace(A57, kernel=Kernel(version=version))
        assert tracer.read(FRESH, INST) == regset(*[(0, 0)] * 16, info=first | 6)
        assert tracer.read(FRESH, DATA) == regset(*[(0, 0)] * 16, info=first | 4)
        assert len(tracer.read(FRESH, DATA)) == REGSET_BYTES == 264


@given(st.integers(0, 2**40).map(lambda n: 8 * n), st.integers(0, 7), st.integers(1, 8), st.integers(1, 3))
def test_a_watchpoint_is_read_as_the_registers_will_have_it(base: int, offset: int, length: int, kinds: int) -> None:
    # Given neighbouring bytes of a doubleword, selected by BAS at an address divisible by 8,
    length = min(length, 8 - offset)
    select = ((1 << length) - 1) << offset
    word = select << 5 | kinds << 3 | 2 << 1 | E

    # when they are written, then they read back as they were.
    view, errno = A57.write(FRESH, DATA, regset((base, word)))
    assert errno == 0
    assert entries_of(A57.read(view, DATA))[0] == (base, word)


def test_privilege_is_not_the_tracers_to_choose() -> None:
    view, errno = A57.write(FRESH, DATA, regset((HERE, 0xFF << 5 | 3 << 3 | 1 << 1 | E)))
    assert errno == 0
    assert entries_of(A57.read(view, DATA))[0] == (HERE, 0xFF << 5 | RW_USER | E)


def test_more_than_there_are_is_refused_after_what_there_is() -> None:
    for pool, slots in ((INST, 6), (DATA, 4)):
        word = (0xF << 5 | 2 << 1 | E) | (3 << 3 if pool == DATA else 0)
        view, errno = A57.write(FRESH, pool, regset(*[(HERE, word)] * 16))
        assert errno == ENOSPC
        assert view.slots_held(pool) == slots
        assert entries_of(A57.read(view, pool)) == [(HERE, word)] * slots + [(0, 0)] * (16 - slots)


def test_an_address_alone_takes_a_slot() -> None:
    view, errno = A57.write(FRESH, DATA, regset((HERE + 3, 0))[:16])
    assert errno == 0
    assert view.slots_held(DATA) == 1
    assert entries_of(A57.read(view, DATA))[0] == (HERE, 0xF << 3 << 5 | RW_USER), "disabled, of four bytes"


@pytest.mark.parametrize(
    "word",
    [E | RW_USER, 0b101 << 5 | RW_USER | E, 0xF << 5 | E],
    ids=["nothing selected", "not neighbours", "execution"],
)
def test_a_watchpoint_that_makes_no_sense_is_refused_and_keeps_its_slot(word: int) -> None:
    view, errno = A57.write(FRESH, DATA, regset((HERE, word)))
    assert errno == EINVAL
    assert view.slots_held(DATA) == 1
    assert entries_of(A57.read(view, DATA))[0] == (HERE, 0xF << 5 | RW_USER)


def test_a_breakpoint_counts_no_loads_or_stores() -> None:
    view, errno = A57.write(FRESH, INST, regset((HERE, 0xF << 5 | 1 << 3 | E)))
    assert (errno, view.slots_held(INST)) == (EINVAL, 1)


def test_to_disable_is_enough_to_clear_e() -> None:
    view, _ = A57.write(FRESH, DATA, regset((HERE, 0x3 << 5 | RW_USER | E)))
    view, errno = A57.write(view, DATA, regset((HERE, 0)))
    assert errno == 0
    assert entries_of(A57.read(view, DATA))[0] == (HERE, 0x3 << 5 | RW_USER)


def test_the_control_word_written_again_moves_the_address_again() -> None:
    word = 0b1100 << 5 | RW_USER | E
    view, errno = COMPAT.poke(FRESH, -1, HERE)
    assert errno == 0
    addresses = []
    for _ in range(3):
        view, errno = COMPAT.poke(view, -2, word)
        assert errno == 0
        addresses.append(view.events[DATA, 0].bp_addr)
    assert addresses == [HERE + 2, HERE + 4, HERE + 6]


def test_kernel_addresses_are_refused() -> None:
    for pool in (INST, DATA):
        view, errno = A57.write(FRESH, pool, regset((0xFFFF_8000_0000_0000, 0)))
        assert (errno, view.slots_held(pool)) == (EINVAL, 1)


@pytest.mark.parametrize(
    ("length", "errno", "held"), [(0, 0, 0), (8, 0, 0), (10, EINVAL, 0), (12, EINVAL, 0), (20, 0, 1), (28, EINVAL, 1)]
)
def test_half_an_address_is_refused_and_half_a_pair_is_not(length: int, errno: int, held: int) -> None:
    raw = regset((HERE, 0xF << 5 | RW_USER | E), (HERE, 0))[:length]
    view, found = A57.write(FRESH, DATA, raw)
    assert (found, view.slots_held(DATA)) == (errno, held)


def test_what_the_two_sorts_hold_does_not_compete() -> None:
    view, _ = A57.write(FRESH, DATA, regset(*[(HERE, 0xF << 5 | RW_USER | E)] * 4))
    view, errno = A57.write(view, INST, regset(*[(HERE, 0xF << 5 | 2 << 1 | E)] * 6))
    assert errno == 0
    assert (view.slots_held(INST), view.slots_held(DATA)) == (6, 4)


# --- ARMv7 and AArch32 tasks -----------------------------------------------------------------------------------------


def test_register_0_says_what_there_is() -> None:
    """Read so from Linux 6.1 on a Cortex-A15, and of an AArch32 task on a Cortex-A57."""
    assert A15.peek(FRESH, 0) == (0x0508_0405, 0)
    assert COMPAT.peek(FRESH, 0) == (0x0608_0406, 0)
    assert A15.poke(FRESH, 0, 0xFFFF_FFFF) == (FRESH, 0)


@given(st.integers(0, 0x3FFF).map(lambda n: 4 * n), st.sampled_from([(0, 4), (0, 2), (1, 1), (2, 2), (3, 1)]))
def test_armv7_reads_the_address_as_it_was_written(base: int, place: tuple[int, int]) -> None:
    offset, length = place
    word = ((1 << length) - 1) << 5 | RW_USER | E
    # The length first: an address that does not suit the four bytes of a fresh watchpoint would be refused.
    view, errno = A15.poke(FRESH, -2, word)
    assert errno == 0
    view, errno = A15.poke(view, -1, base + offset)
    assert errno == 0
    assert (A15.peek(view, -1), A15.peek(view, -2)) == ((base + offset, 0), (word, 0))


def test_an_address_that_does_not_suit_the_length_is_refused() -> None:
    view, errno = A15.poke(FRESH, -1, HERE + 1)
    assert (errno, view.slots_held(DATA)) == (EINVAL, 1)
    assert A15.peek(view, -1) == (0, 0)


def test_to_disable_on_armv7_is_not_to_write_zero() -> None:
    view, _ = A15.poke(FRESH, 1, HERE)
    view, _ = A15.poke(view, 2, 0xF << 5 | 2 << 1 | E)
    assert A15.poke(view, 2, 0) == (view, EINVAL)
    view, errno = A15.poke(view, 2, 0xF << 5 | 2 << 1)
    assert errno == 0
    assert A15.peek(view, 2) == (0xF << 5 | 2 << 1, 0)


@pytest.mark.parametrize("select", [0x2, 0x6, 0x7, 0xC, 0xF0])
def test_armv7_wants_bas_at_its_lowest_bit_and_of_a_known_length(select: int) -> None:
    _, errno = A15.poke(FRESH, -2, select << 5 | RW_USER | E)
    assert errno == EINVAL


def test_armv7_keeps_breakpoints_and_watchpoints_apart() -> None:
    for number, word in ((2, 0xF << 5 | 1 << 3 | E), (-2, 0xF << 5 | E)):
        view, errno = A15.poke(FRESH, number, word)
        assert errno == EINVAL
        assert A15.peek(view, number)[0] & E == 0


def test_a_32_bit_tracer_may_watch_reads_or_writes_alone() -> None:
    for kind in (1, 2, 3):
        view, errno = A15.poke(FRESH, -2, 0xF << 5 | kind << 3 | 2 << 1 | E)
        assert errno == 0
        assert A15.peek(view, -2) == (0xF << 5 | kind << 3 | 2 << 1 | E, 0)


def test_each_number_has_its_own_place() -> None:
    roomy = replace(A15, free={INST: 16, DATA: 16})
    view = FRESH
    numbers = [sign * number for sign in (1, -1) for number in range(1, 33, 2)]
    for number in numbers:
        view, errno = roomy.poke(view, number, 4 * abs(number))
        assert errno == 0
    assert [roomy.peek(view, number)[0] for number in numbers] == [4 * abs(number) for number in numbers]
    assert (view.slots_held(INST), view.slots_held(DATA)) == (16, 16)


def test_beyond_the_breakpoints_armv7_reads_the_watchpoints_and_arm64_refuses() -> None:
    view, _ = A15.poke(FRESH, -1, HERE)
    assert A15.peek(view, 33) == (HERE, 0)
    for number in (65, -33, 1000, -1000):
        assert A15.peek(view, number) == (0, EINVAL)
        assert A15.poke(view, number, 0) == (view, EINVAL)
    for number in (33, -33):
        assert COMPAT.peek(FRESH, number) == (0, EINVAL)


def test_a_watchpoint_made_as_a_breakpoint_moves_to_the_other_pool_if_there_is_room() -> None:
    view, errno = A15.poke(FRESH, 33, HERE)
    assert (errno, view.slots_held(INST), view.slots_held(DATA)) == (0, 1, 0)
    moved, errno = A15.poke(view, -2, 0xF << 5 | RW_USER)
    assert (errno, moved.slots_held(INST), moved.slots_held(DATA)) == (0, 0, 1)
    full = replace(A15, free={INST: 5, DATA: 0})
    assert full.poke(view, -2, 0xF << 5 | RW_USER) == (view, ENOSPC)


def test_an_aarch32_task_has_armv7s_lengths_and_arm64s_words() -> None:
    view, _ = COMPAT.poke(FRESH, -1, HERE)
    for select, errno in ((0xF, 0), (0x3, 0), (0xFF, 0), (0x7, 0), (0x7 << 1, EINVAL), (0, EINVAL)):
        _, found = COMPAT.poke(view, -2, select << 5 | RW_USER | E)
        assert found == errno, hex(select)
    view, errno = COMPAT.poke(FRESH, 2, 0x3 << 5 | 2 << 1 | E)
    assert errno == 0
    assert COMPAT.peek(view, 2) == (0x3 << 5 | 2 << 1 | E, 0)
    assert COMPAT.poke(FRESH, 2, 0xFF << 5 | E)[1] == EINVAL


def test_without_monitor_debug_mode_a_tracer_gets_no_device_and_no_slot() -> None:
    tracer = replace(A15, kernel=replace(V7, monitor=False))
    assert tracer.poke(FRESH, 1, HERE) == (FRESH, ENODEV)


# --- whatever is written ---------------------------------------------------------------------------------------------

POKES = st.tuples(
    st.one_of(st.integers(-34, 34), st.integers(-8, 8)),
    st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 2**13 - 1), st.integers(0, 9).map(lambda n: HERE + n)),
)


@pytest.mark.parametrize("tracer", [A15, COMPAT], ids=["armv7", "compat"])
def test_no_sequence_of_writes_takes_more_than_there_is_or_loses_what_was_read(tracer: Numbered) -> None:
    @given(st.lists(POKES, max_size=12))
    def keeps(pokes: list[tuple[int, int]]) -> None:
        view: View = FRESH
        for number, value in pokes:
            after, errno = tracer.poke(view, number, value)
            assert all(after.slots_held(pool) <= tracer.free[pool] for pool in (INST, DATA))
            assert after.events.keys() >= view.events.keys(), "a slot, once taken, stays taken"
            if errno:
                kept = {index: after.events[index] for index in view.events}
                assert kept == view.events, "what was refused changed nothing"
            elif number % 2 and not tracer.kernel.arm64:
                assert tracer.peek(after, number) == (value, 0)
            view = after

    keeps()
