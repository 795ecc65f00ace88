"""DR7: words and values lead to each other, and reserved bits behave as the manuals say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd_x86 import dr7
from hwbpd_x86.dr7 import RW, Dr7, Len, SlotControl

WORDS = st.integers(0, 2**32 - 1)
SLOTS = st.builds(SlotControl, st.booleans(), st.booleans(), st.sampled_from(RW), st.sampled_from(Len))
VALUES = st.builds(
    Dr7, st.tuples(SLOTS, SLOTS, SLOTS, SLOTS), st.booleans(), st.booleans(), st.booleans(), st.booleans()
)

ALWAYS_ONE = {10}
ALWAYS_ZERO = {12, 14, 15}


@given(VALUES)
def test_a_value_survives_the_way_through_a_word(value: Dr7) -> None:
    assert dr7.decode(dr7.encode(value)) == value


@given(WORDS)
def test_a_word_comes_back_as_the_register_would_store_it(word: int) -> None:
    assert dr7.encode(dr7.decode(word)) == dr7.stored(word, rtm=True)


@given(WORDS, st.booleans())
def test_storing_what_was_read_changes_nothing(word: int, rtm: bool) -> None:
    read = dr7.stored(word, rtm=rtm)
    assert dr7.stored(read, rtm=rtm) == read


@pytest.mark.parametrize("rtm", [True, False])
def test_each_bit_alone_is_kept_or_reads_as_its_reserved_value(rtm: bool) -> None:
    zero = ALWAYS_ZERO if rtm else ALWAYS_ZERO | {11}
    for bit in range(32):
        expected = {10} | ({bit} - zero)
        assert dr7.stored(1 << bit, rtm=rtm) == sum(1 << one for one in expected), f"bit {bit}"


def test_only_a_one_in_the_upper_half_faults() -> None:
    assert [bit for bit in range(64) if dr7.faults(1 << bit)] == list(range(32, 64))


def test_the_fields_and_the_reserved_bits_fill_the_register_without_overlap() -> None:
    bits = [bit for field in dr7.FIELDS for bit in range(field.first_bit, field.first_bit + field.width)]
    assert bits == sorted(bits)
    assert sorted([*bits, *ALWAYS_ONE, *ALWAYS_ZERO]) == list(range(32))


def test_the_register_is_idle_after_reset() -> None:
    assert dr7.encode(Dr7()) == dr7.RESET == 0x400
    assert not any(slot.armed for slot in dr7.decode(dr7.RESET).slots)


# Linux keeps length and type of a breakpoint in the places they have in DR7, with a high bit to tell them from nothing
# (X86_BREAKPOINT_LEN_* and X86_BREAKPOINT_*); it arms with G and sets GE.
LINUX_LEN = {Len.ONE: 0x40, Len.TWO: 0x44, Len.FOUR: 0x4C, Len.EIGHT: 0x48}
LINUX_TYPE = {RW.EXECUTE: 0x80, RW.WRITE: 0x81, RW.READ_WRITE: 0x83}


@pytest.mark.parametrize("n", range(4))
@pytest.mark.parametrize("length", Len)
@pytest.mark.parametrize("access", LINUX_TYPE)
def test_a_slot_is_encoded_as_linux_does_it(n: int, access: RW, length: Len) -> None:
    # Given one slot armed globally, with GE set as Linux has it,
    slots = [SlotControl()] * 4
    slots[n] = SlotControl(global_=True, access=access, length=length)
    value = Dr7(slots=(slots[0], slots[1], slots[2], slots[3]), exact_global=True)

    # when it is encoded, then the word is the one that Linux builds from its own constants.
    control = (LINUX_LEN[length] | LINUX_TYPE[access]) & 0xF
    assert dr7.encode(value) == control << (16 + 4 * n) | 2 << (2 * n) | 0x200 | 0x400


@pytest.mark.parametrize(
    ("word", "n", "slot"),
    [
        (0x0009_0602, 0, SlotControl(global_=True, access=RW.WRITE, length=Len.EIGHT)),
        (0x00D0_0404, 1, SlotControl(local=True, access=RW.WRITE, length=Len.FOUR)),
        (0x0200_0430, 2, SlotControl(local=True, global_=True, access=RW.IO)),
        (0x7000_0480, 3, SlotControl(global_=True, access=RW.READ_WRITE, length=Len.TWO)),
    ],
)
def test_known_words_are_read_as_the_manuals_lay_them_out(word: int, n: int, slot: SlotControl) -> None:
    value = dr7.decode(word)
    assert value.slots[n] == slot
    assert [other.armed for other in value.slots] == [other == n for other in range(4)]


@pytest.mark.parametrize(
    ("bit", "value"),
    [
        (8, Dr7(exact_local=True)),
        (9, Dr7(exact_global=True)),
        (11, Dr7(transactions=True)),
        (13, Dr7(general_detect=True)),
    ],
)
def test_each_flag_has_its_bit(bit: int, value: Dr7) -> None:
    assert dr7.encode(value) == dr7.RESET | 1 << bit


def test_the_length_codes_are_not_in_the_order_of_lengths() -> None:
    assert [Len(code).length_bytes for code in range(4)] == [1, 2, 8, 4]
