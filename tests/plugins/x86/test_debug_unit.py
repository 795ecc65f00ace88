"""
Which accesses raise #DB: the manuals' examples, a second model that works on sets of bytes, and rules one at a time.

What real registers do with the same questions is asked in tests/judges.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.model import Access, Piece, Pool, Span
from hwbpd.debug_unit import Armed, DebugUnit, MemoryAccess, RegisterFile
from hwbpd.hookspecs import CpuFacts
from hwbpd_x86 import dr6, dr7
from hwbpd_x86.debug_unit import PortAccess, X86DebugUnit
from hwbpd_x86.dr7 import RW, Dr7, Len, SlotControl
from hwbpd_x86.fit import X86Backend
from hwbpd_x86.registers import ADDRESSES, CR4_DE, MASKS, Cpu, masks_of

READ, WRITE, EXECUTE = Access.READ, Access.WRITE, Access.EXECUTE
BOTH = READ | WRITE
UNIT = X86DebugUnit(Cpu())
MASKED = X86DebugUnit(Cpu(masks=True))
FULL = X86DebugUnit(Cpu(rtm=True, bus_lock=True, masks=True))

OFF = SlotControl()
SPOT = SlotControl(global_=True, access=RW.EXECUTE)


def watch(access: RW, length: Len = Len.ONE, *, armed: bool = True) -> SlotControl:
    return SlotControl(global_=armed, access=access, length=length)


def registers(
    slots: Sequence[tuple[int, SlotControl]], *, unit: X86DebugUnit = UNIT, cr4: int = 0, masks: Sequence[int] = ()
) -> RegisterFile:
    """A file in which the first slots are so."""
    file = unit.write(unit.reset(), "CR4", cr4)
    controls = [OFF] * 4
    for n, (address, control) in enumerate(slots):
        file = unit.write(file, ADDRESSES[n], address)
        controls[n] = control
    for n, mask in enumerate(masks):
        file = unit.write(file, MASKS[n], mask)
    return unit.write(file, "DR7", dr7.encode(Dr7(slots=(controls[0], controls[1], controls[2], controls[3]))))


def hit(trap: object) -> set[int]:
    """The numbers of the slots that DR6 names."""
    if trap is None:
        return set()
    status = dr6.decode(trap.status["DR6"])  # type: ignore[attr-defined]
    return {n for n, is_hit in enumerate(status.hit) if is_hit}


def test_the_backend_brings_it() -> None:
    unit = X86Backend(CpuFacts("x86_64", frozenset({"bpext", "rtm"}))).debug_unit()

    assert isinstance(unit, DebugUnit)
    assert unit.slots() == {Pool.ANY: 4}
    assert set(MASKS) <= set(unit.reset())


# --- the manuals' examples -------------------------------------------------------------------------------------------

# Intel SDM Vol. 3B, "Breakpoint Field Recognition", table "Breakpoint Examples".
EXAMPLE = registers(
    [
        (0xA0001, watch(RW.READ_WRITE, Len.ONE)),
        (0xA0002, watch(RW.WRITE, Len.ONE)),
        (0xB0002, watch(RW.READ_WRITE, Len.TWO)),
        (0xC0000, watch(RW.WRITE, Len.FOUR)),
    ]
)
TRAPS = [
    (READ, 0xA0001, 1),
    (WRITE, 0xA0001, 1),
    (READ, 0xA0001, 2),
    (WRITE, 0xA0001, 2),
    (WRITE, 0xA0002, 1),
    (WRITE, 0xA0002, 2),
    (READ, 0xB0001, 4),
    (WRITE, 0xB0001, 4),
    (READ, 0xB0002, 1),
    (WRITE, 0xB0002, 1),
    (READ, 0xB0002, 2),
    (WRITE, 0xB0002, 2),
    (WRITE, 0xC0000, 4),
    (WRITE, 0xC0001, 2),
    (WRITE, 0xC0003, 1),
]
DOES_NOT = [
    (READ, 0xA0000, 1),
    (WRITE, 0xA0000, 1),
    (READ, 0xA0002, 1),
    (READ, 0xA0003, 4),
    (WRITE, 0xA0003, 4),
    (READ, 0xB0000, 2),
    (WRITE, 0xB0000, 2),
    (READ, 0xC0000, 2),
    (READ, 0xC0004, 4),
    (WRITE, 0xC0004, 4),
]


@pytest.mark.parametrize(
    ("access", "address", "length", "traps"), [(*row, True) for row in TRAPS] + [(*row, False) for row in DOES_NOT]
)
def test_the_examples_of_the_manual(access: Access, address: int, length: int, traps: bool) -> None:
    trap = UNIT.check(EXAMPLE, [MemoryAccess(access, address, length)])

    assert (trap is not None) == traps
    assert trap is None or not trap.before


# --- a second model --------------------------------------------------------------------------------------------------

NEAR = 0x40_0000
addresses = st.integers(NEAR, NEAR + 40)
controls = st.builds(SlotControl, st.booleans(), st.booleans(), st.sampled_from(RW), st.sampled_from(Len))
slots = st.lists(st.tuples(addresses, controls), min_size=4, max_size=4)
instructions = st.tuples(
    addresses,
    st.lists(st.builds(MemoryAccess, st.sampled_from([READ, WRITE, BOTH]), addresses, st.integers(1, 16)), max_size=3),
)
LOW_MASKS = [0, 0, 1, 7, 31, 5, 0xFFFF_FFFF]


def bytes_of(address: int, length: int, mask: int) -> set[int]:
    """The bytes near ``NEAR`` that differ from the address only where the mask or the length has ones."""
    left_out = mask | length - 1
    return {byte for byte in range(NEAR - 64, NEAR + 128) if byte | left_out == address | left_out}


@given(slots, instructions, st.lists(st.sampled_from(LOW_MASKS), min_size=4, max_size=4), st.booleans(), st.booleans())
def test_it_agrees_with_a_model_that_works_on_sets_of_bytes(
    held: list[tuple[int, SlotControl]],
    instruction: tuple[int, list[MemoryAccess]],
    masks: list[int],
    resume: bool,
    step: bool,
) -> None:
    file = registers(held, unit=MASKED, masks=masks)
    start, data = instruction
    written = {a.address + n for a in data if a.access & WRITE for n in range(a.length_bytes)}
    accessed = {a.address + n for a in data for n in range(a.length_bytes)}

    fetched, touched = set(), set()
    for n, (address, control) in enumerate(held):
        if control.access == RW.EXECUTE and start in bytes_of(address, 1, masks[n]):
            fetched.add(n)
        block = bytes_of(address, control.length.length_bytes, masks[n])
        if block & {RW.WRITE: written, RW.READ_WRITE: accessed}.get(control.access, set()):
            touched.add(n)
    armed = {n for n, (_, control) in enumerate(held) if control.local or control.global_}
    before = bool(fetched & armed) and not resume
    met = fetched if before else touched

    trap = MASKED.check(file, [MemoryAccess(EXECUTE, start, 5), *data], resume=resume, single_step=step)

    assert (trap is not None) == bool(met & armed or step)
    assert hit(trap) == met & armed
    at_liberty = MASKED.at_liberty(file, [MemoryAccess(EXECUTE, start, 5), *data], before=before)
    assert {n for n in range(4) if at_liberty >> n & 1} == met - armed
    assert at_liberty < 16
    if trap is not None:
        assert trap.before == before
        assert trap.slots == tuple((Pool.ANY, n) for n in sorted(met & armed))
        assert dr6.decode(trap.status["DR6"]).single_step == (step and not before)


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", range(-1, 6))
def test_only_the_first_byte_of_an_instruction_counts(offset: int) -> None:
    file = registers([(0x401000 + offset, SPOT)])
    trap = UNIT.check(file, [MemoryAccess(EXECUTE, 0x401000, 5)])
    assert (trap is not None) == (offset == 0)
    assert trap is None or trap.before


def test_a_fault_leaves_the_data_accesses_for_later() -> None:
    # Given a breakpoint on an instruction and a watchpoint on what it writes,
    file = registers([(0x401000, SPOT), (0x5000, watch(RW.WRITE))])
    instruction = [MemoryAccess(EXECUTE, 0x401000, 3), MemoryAccess(WRITE, 0x5000, 1)]

    # when it is about to be executed, then the breakpoint is reported alone, even where it is stepped;
    trap = UNIT.check(file, instruction, single_step=True)
    assert trap is not None
    assert (trap.before, trap.status["DR6"]) == (True, 0xFFFF_0FF1)

    # and when it is resumed with RF, the watchpoint is, with the step.
    trap = UNIT.check(file, instruction, resume=True, single_step=True)
    assert trap is not None
    assert (trap.before, trap.status["DR6"]) == (False, 0xFFFF_4FF2)


def test_data_that_is_fetched_and_code_that_is_written_are_told_apart() -> None:
    code, data = registers([(0x5000, SPOT)]), registers([(0x5000, watch(RW.READ_WRITE, Len.EIGHT))])
    fetch, access = [MemoryAccess(EXECUTE, 0x5000, 1)], [MemoryAccess(BOTH, 0x5000, 1)]

    assert [UNIT.check(code, fetch) is not None, UNIT.check(code, access) is not None] == [True, False]
    assert [UNIT.check(data, fetch) is not None, UNIT.check(data, access) is not None] == [False, True]


def test_a_read_modify_write_is_both() -> None:
    file = registers([(0x5000, watch(RW.WRITE)), (0x5000, watch(RW.READ_WRITE))])
    assert hit(UNIT.check(file, [MemoryAccess(READ, 0x5000, 1)])) == {1}
    assert hit(UNIT.check(file, [MemoryAccess(BOTH, 0x5000, 1)])) == {0, 1}


@pytest.mark.parametrize(("local", "global_"), [(False, False), (True, False), (False, True), (True, True)])
def test_either_bit_arms(local: bool, global_: bool) -> None:
    file = registers([(0x5000, SlotControl(local, global_, RW.WRITE))])
    assert (UNIT.check(file, [MemoryAccess(WRITE, 0x5000, 1)]) is not None) == (local or global_)


def test_an_unarmed_slot_never_traps_and_its_bit_is_at_liberty_when_another_does() -> None:
    file = registers([(0x5000, watch(RW.WRITE, armed=False)), (0x5000, watch(RW.WRITE)), (0x6000, SPOT)])
    access = [MemoryAccess(WRITE, 0x5000, 1)]

    trap = UNIT.check(file, access)

    assert hit(trap) == {1}
    assert UNIT.at_liberty(file, access, before=False) == 1 << 0
    only_unarmed = registers([(0x5000, watch(RW.WRITE, armed=False)), (0x6000, SPOT)])
    assert UNIT.check(only_unarmed, access) is None


@pytest.mark.parametrize("length", Len)
def test_low_address_bits_that_the_length_covers_are_not_compared(length: Len) -> None:
    # The address register points somewhere into the block, and watches all of it and nothing else.
    for inside in range(length.length_bytes):
        file = registers([(0x5000 + inside, watch(RW.WRITE, length))])
        met = {n for n in range(-8, 16) if UNIT.check(file, [MemoryAccess(WRITE, 0x5000 + n, 1)])}
        assert met == set(range(length.length_bytes))


def test_one_exception_tells_of_every_slot_that_an_instruction_met() -> None:
    # A string move reads here and writes there; both straddle the blocks.
    file = registers([(a, watch(RW.READ_WRITE, Len.FOUR)) for a in (0x5000, 0x5004, 0x6000, 0x6004)])
    trap = UNIT.check(file, [MemoryAccess(READ, 0x5002, 4), MemoryAccess(WRITE, 0x6001, 4)])
    assert hit(trap) == {0, 1, 2, 3}
    assert hit(UNIT.check(file, [MemoryAccess(READ, 0x5003, 1), MemoryAccess(WRITE, 0x6004, 1)])) == {0, 3}


def test_who_made_an_access_does_not_matter_to_the_registers() -> None:
    file = registers([(0x5000, watch(RW.WRITE))])
    traps = [UNIT.check(file, [MemoryAccess(WRITE, 0x5000, 1, kernel)]) for kernel in (False, True)]
    assert traps[0] == traps[1] is not None


@pytest.mark.parametrize("extended", [True, False])
def test_ports_meet_slots_only_with_debugging_extensions(extended: bool) -> None:
    file = registers([(0x60, watch(RW.IO, Len.FOUR)), (0x60, watch(RW.READ_WRITE))], cr4=CR4_DE if extended else 0)
    met = {port for port in range(0x58, 0x70) if UNIT.check(file, [], ports=[PortAccess(port, 2)])}
    assert met == (set(range(0x5F, 0x64)) if extended else set())
    memory = UNIT.check(file, [MemoryAccess(WRITE, 0x60, 1)])
    assert hit(memory) == {1}, "memory at the same number is something else"
    assert UNIT.undefined(file) == (frozenset() if extended else {0})


def test_what_the_manuals_leave_undefined_is_named() -> None:
    file = registers(
        [
            (0x5000, SlotControl(True, access=RW.EXECUTE, length=Len.TWO)),
            (0x5000, SlotControl(False, access=RW.EXECUTE, length=Len.TWO)),
            (0x5000, watch(RW.WRITE, Len.EIGHT)),
            (0x5000, SPOT),
        ]
    )
    assert UNIT.undefined(file) == {0}
    assert X86DebugUnit(Cpu(word_bytes=4)).undefined(file) == {0, 2}


def test_status_is_added_to_what_nobody_has_cleared() -> None:
    file = registers([(0x5000, watch(RW.WRITE)), (0x6000, watch(RW.WRITE))], unit=FULL)
    file = FULL.write(file, "DR6", dr6.encode(dr6.Dr6(hit=(True,) * 4, single_step=True, transaction=True)))

    trap = FULL.check(file, [MemoryAccess(WRITE, 0x6000, 1)])

    assert trap is not None
    assert dr6.decode(trap.status["DR6"]) == dr6.Dr6(
        hit=(False, True, False, False), single_step=True, transaction=True
    )


# --- plans -----------------------------------------------------------------------------------------------------------


def piece_of(access: Access, length: int, at: int) -> Piece:
    address = at if access == EXECUTE else at - at % length
    return Piece(Span(address, 8 if access == EXECUTE else length), access, Pool.ANY)


pieces = st.builds(piece_of, st.sampled_from([EXECUTE, WRITE, BOTH]), st.sampled_from([1, 2, 4, 8]), addresses)
masked = st.builds(piece_of, st.sampled_from([WRITE, BOTH]), st.sampled_from([2**n for n in range(33)]), addresses)
wishes = st.dictionaries(st.integers(0, 3), st.one_of(pieces, masked), max_size=4)


def holds(file: RegisterFile, n: int) -> tuple[RW, int, int] | None:
    """What a slot is armed for, as access, address and bits left out; None if it is not armed."""
    control = dr7.decode(file["DR7"]).slots[n]
    left_out = (control.length.length_bytes - 1) | masks_of(file)[n]
    return (control.access, file[ADDRESSES[n]], left_out) if control.armed else None


def asked(piece: Piece | None) -> tuple[RW, int, int] | None:
    if piece is None:
        return None
    access = {EXECUTE: RW.EXECUTE, WRITE: RW.WRITE, BOTH: RW.READ_WRITE}[piece.access]
    return access, piece.span.address, 0 if access == RW.EXECUTE else piece.span.length_bytes - 1


@given(slots, st.lists(st.sampled_from([0, 7, 31]), min_size=4, max_size=4), wishes)
def test_a_plan_arms_what_is_wanted_and_nothing_in_between(
    held: list[tuple[int, SlotControl]], masks: list[int], wish: dict[int, Piece]
) -> None:
    file = before = registers(held, unit=MASKED, masks=masks)
    wanted = {(Pool.ANY, n): Armed(piece) for n, piece in wish.items()}

    for write in MASKED.plan(file, wanted):
        after = MASKED.write(file, write.register, write.value)
        for n in range(4):
            # At every moment a slot is its old self, its new self, or off; and it keeps what it was to keep.
            assert holds(after, n) in (None, holds(before, n), asked(wish.get(n)))
            if holds(before, n) == asked(wish.get(n)):
                assert holds(after, n) == holds(before, n)
        assert after != file, "each write changes something"
        file = after

    assert [holds(file, n) for n in range(4)] == [asked(wish.get(n)) for n in range(4)]
    assert list(MASKED.plan(file, wanted)) == []
    kept = ~dr7.encode(Dr7(exact_global=True)) & 0xFF00  # all but what arms
    assert file["DR7"] & kept == before["DR7"] & kept


def test_a_plan_writes_control_address_control() -> None:
    first = {(Pool.ANY, 1): Armed(Piece(Span(0x5000, 8), WRITE, Pool.ANY))}
    second = {(Pool.ANY, 1): Armed(Piece(Span(0x6000, 64), BOTH, Pool.ANY))}
    file = MASKED.reset()

    names = []
    for wanted in (first, second, {}):
        writes = MASKED.plan(file, wanted)
        names.append([write.register for write in writes])
        for write in writes:
            file = MASKED.write(file, write.register, write.value)

    assert names == [["DR1", "DR7"], ["DR7", "DR1", "DR1_ADDR_MASK", "DR7"], ["DR7"]]


@pytest.mark.parametrize(
    ("unit", "piece"),
    [
        (UNIT, Piece(Span(0x5000, 8), READ, Pool.ANY)),
        (UNIT, Piece(Span(0x5001, 2), WRITE, Pool.ANY)),
        (UNIT, Piece(Span(0x5000, 3), WRITE, Pool.ANY)),
        (UNIT, Piece(Span(0x5000, 16), WRITE, Pool.ANY)),
        (MASKED, Piece(Span(0, 2**33), WRITE, Pool.ANY)),
        (X86DebugUnit(Cpu(word_bytes=4)), Piece(Span(0x5000, 8), WRITE, Pool.ANY)),
        (X86DebugUnit(Cpu(word_bytes=4)), Piece(Span(2**32, 4), WRITE, Pool.ANY)),
    ],
)
def test_a_piece_that_no_slot_holds_is_refused(unit: X86DebugUnit, piece: Piece) -> None:
    with pytest.raises(ValueError, match="no debug register holds"):
        unit.plan(unit.reset(), {(Pool.ANY, 0): Armed(piece)})
