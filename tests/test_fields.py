"""Fields of registers: pictures of control words come from the tables that encode them."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.fields import Field, draw
from hwbpd_x86 import dr6, dr7


@pytest.mark.parametrize("register", [dr6, dr7], ids=["DR6", "DR7"])
def test_the_picture_at_the_top_of_a_file_is_the_one_its_table_draws(register: object) -> None:
    picture = draw(register.FIELDS, 32, reserved=register.RESET)  # type: ignore[attr-defined]
    assert "".join(f"    {line}\n" for line in picture.splitlines()) in (register.__doc__ or "")


def test_a_name_wider_than_its_bits_moves_the_bits_after_it() -> None:
    fields = (Field("E", 0, 1, ""), Field("SSCE", 2, 1, ""), Field("BAS", 4, 4, ""))
    assert draw(fields, 8) == "\n".join(
        (
            "  7  6  5  4  3    2  1  0",
            "[BAS        | 0|SSCE| 0|E ]",
        )
    )


def test_a_wide_register_is_drawn_in_rows_with_the_highest_bits_first() -> None:
    first, second, third, fourth = draw((Field("VA", 2, 47, ""),), 64, reserved=1).splitlines()

    assert first.split() == [str(bit) for bit in range(63, 31, -1)]
    assert third.split() == [str(bit) for bit in range(31, -1, -1)]
    assert re.fullmatch(r"\[( 0 ){14} 0\|VA *\]", second)
    assert re.fullmatch(r"\[VA *\| 0  1\]", fourth)


@st.composite
def tables(draw_from: st.DrawFn) -> tuple[Field, ...]:
    edges = sorted(draw_from(st.sets(st.integers(0, 32), min_size=2, max_size=12)))
    runs = [(low, high) for low, high in pairwise(edges) if draw_from(st.booleans())]
    names = st.text("ABCDEFGH/", min_size=1, max_size=6)
    return tuple(Field(draw_from(names), low, high - low, "") for low, high in runs)


@given(tables(), st.integers(0, 2**32 - 1))
def test_every_bit_is_below_its_number(fields: tuple[Field, ...], reserved: int) -> None:
    numbers, cells = draw(fields, 32, reserved=reserved).splitlines()

    assert len(cells) == len(numbers) + 1
    # A number ends right above the last column of its bit; a field begins where its first bit does.
    ends = {int(match[0]): match.end() for match in re.finditer(r"\d+", numbers)}
    assert list(ends) == list(range(31, -1, -1))
    begins = {31: 1, **{bit: ends[bit + 1] + 1 for bit in range(31)}}
    owned = set()
    for field in fields:
        high = field.first_bit + field.width - 1
        owned |= set(range(field.first_bit, high + 1))
        assert cells[begins[high] :].startswith(field.name)
        assert cells[begins[high] - 1] in "[|"
        assert cells[ends[field.first_bit]] in "|]"
    for bit in set(range(32)) - owned:
        assert cells[begins[bit] : ends[bit]].strip() == str(reserved >> bit & 1)
