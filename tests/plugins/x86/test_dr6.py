"""DR6: words and values lead to each other, in both forms, and reserved bits behave as the manuals say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd_x86 import dr6
from hwbpd_x86.dr6 import Dr6

WORDS = st.integers(0, 2**32 - 1)
FLAG = st.booleans()
VALUES = st.builds(Dr6, st.tuples(FLAG, FLAG, FLAG, FLAG), FLAG, FLAG, FLAG, FLAG, FLAG)

ALWAYS_ONE = {*range(4, 11), *range(17, 32)}
ALWAYS_ZERO = {12}

KNOWN = [
    (0xFFFF_0FF0, Dr6()),
    (0xFFFF_0FF1, Dr6(hit=(True, False, False, False))),
    (0xFFFF_0FF8, Dr6(hit=(False, False, False, True))),
    (0xFFFF_07F0, Dr6(bus_lock=True)),
    (0xFFFF_2FF0, Dr6(register_access=True)),
    (0xFFFF_4FF0, Dr6(single_step=True)),
    (0xFFFF_8FF0, Dr6(task_switch=True)),
    (0xFFFE_0FF0, Dr6(transaction=True)),
    (0xFFFE_47F5, Dr6(hit=(True, False, True, False), bus_lock=True, single_step=True, transaction=True)),
]


@pytest.mark.parametrize(("word", "value"), KNOWN)
def test_known_words_are_read_and_written_as_the_manuals_lay_them_out(word: int, value: Dr6) -> None:
    assert dr6.decode(word) == value
    assert dr6.encode(value) == word


@given(VALUES)
def test_a_value_survives_the_way_through_a_word(value: Dr6) -> None:
    assert dr6.decode(dr6.encode(value)) == value


@given(WORDS)
def test_a_word_comes_back_as_the_register_would_store_it(word: int) -> None:
    assert dr6.encode(dr6.decode(word)) == dr6.stored(word, rtm=True, bus_lock=True)


@given(WORDS)
def test_the_two_forms_lead_to_each_other(word: int) -> None:
    assert dr6.to_hardware(dr6.to_positive(word)) == word
    assert dr6.to_positive(dr6.to_hardware(word)) == word


@given(VALUES)
def test_in_the_positive_form_every_reason_is_a_one_and_nothing_else_is(value: Dr6) -> None:
    # Given the reasons of a value by the bit each has,
    bits = dict(zip((0, 1, 2, 3, 11, 13, 14, 15, 16), (*value.hit, *_flags(value)), strict=True))

    # when the word is turned into the positive form, then exactly their bits are set.
    assert dr6.to_positive(dr6.encode(value)) == sum(1 << bit for bit, happened in bits.items() if happened)


def _flags(value: Dr6) -> tuple[bool, ...]:
    return value.bus_lock, value.register_access, value.single_step, value.task_switch, value.transaction


@given(VALUES, VALUES)
def test_words_in_the_positive_form_merge_by_or(one: Dr6, other: Dr6) -> None:
    merged = dr6.decode(dr6.to_hardware(dr6.to_positive(dr6.encode(one)) | dr6.to_positive(dr6.encode(other))))
    assert merged.hit == tuple(a or b for a, b in zip(one.hit, other.hit, strict=True))
    assert _flags(merged) == tuple(a or b for a, b in zip(_flags(one), _flags(other), strict=True))


@pytest.mark.parametrize("rtm", [True, False])
@pytest.mark.parametrize("bus_lock", [True, False])
def test_each_bit_alone_is_kept_or_reads_as_its_reserved_value(rtm: bool, bus_lock: bool) -> None:
    one = ALWAYS_ONE | (set() if rtm else {16}) | (set() if bus_lock else {11})
    for bit in range(32):
        expected = one | ({bit} - ALWAYS_ZERO)
        assert dr6.stored(1 << bit, rtm=rtm, bus_lock=bus_lock) == sum(1 << n for n in expected), f"bit {bit}"


@given(WORDS, st.booleans(), st.booleans())
def test_storing_what_was_read_changes_nothing(word: int, rtm: bool, bus_lock: bool) -> None:
    read = dr6.stored(word, rtm=rtm, bus_lock=bus_lock)
    assert dr6.stored(read, rtm=rtm, bus_lock=bus_lock) == read


def test_only_a_one_in_the_upper_half_faults() -> None:
    assert [bit for bit in range(64) if dr6.faults(1 << bit)] == list(range(32, 64))


def test_the_fields_and_the_reserved_bits_fill_the_register_without_overlap() -> None:
    bits = [bit for field in dr6.FIELDS for bit in range(field.first_bit, field.first_bit + field.width)]
    assert bits == sorted(bits)
    assert sorted([*bits, *ALWAYS_ONE, *ALWAYS_ZERO]) == list(range(32))
