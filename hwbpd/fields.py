"""
A field of a register: where it is and what it means.

A control word (DR7, DBGBCR) is a table of these, in ascending order of bits. The tables are the layout: encoding,
decoding, the masks of reserved bits and what is shown to people all come from them. For plugins that bring a backend.
"""

from __future__ import annotations

from msgspec import Struct


class Field(Struct, frozen=True):
    """Bits ``first_bit`` to ``first_bit + width - 1`` of a register."""

    name: str  # as in the manuals: "L0", "R/W0"
    first_bit: int
    width: int
    meaning: str

    @property
    def mask(self) -> int:
        """The field's bits, all ones, in place."""
        return ((1 << self.width) - 1) << self.first_bit

    def read(self, word: int) -> int:
        """Return the field's value in ``word``, as a number from 0."""
        return (word & self.mask) >> self.first_bit

    def place(self, value: int) -> int:
        """Return ``value`` in the field's place; every other bit is zero."""
        assert 0 <= value < 1 << self.width, f"{self.name} has {self.width} bits, and {value} needs others"
        return value << self.first_bit


def by_name(fields: tuple[Field, ...]) -> dict[str, Field]:
    """Return the table as a dictionary."""
    return {field.name: field for field in fields}


def mask_of(fields: tuple[Field, ...]) -> int:
    """Return the bits that belong to any of the fields; the others are reserved."""
    mask = 0
    for field in fields:
        mask |= field.mask
    return mask


def draw(fields: tuple[Field, ...], width_bits: int, *, reserved: int = 0) -> str:
    """
    Return a picture of a register: above, the numbers of its bits; below, its fields. Rows of 32 bits, highest first.

    A field that reaches over the edge of a row is named in both. Where a name needs more room than its bits have, the
    first of them is wider.

    :param reserved: a word with what the bits that belong to no field read as.
    """
    rows = [(low, min(low + _ROW_BITS, width_bits)) for low in range(0, width_bits, _ROW_BITS)]
    return "\n".join(_draw_row(fields, low, end, reserved) for low, end in reversed(rows))


_ROW_BITS = 32
_BIT_COLUMNS = 2  # and one for what divides it from the next


def _draw_row(fields: tuple[Field, ...], low: int, end: int, reserved: int) -> str:
    numbers, cells = "", ""
    owner = {bit: field for field in fields for bit in range(field.first_bit, field.first_bit + field.width)}
    for bit in range(end - 1, low - 1, -1):
        field = owner.get(bit)
        columns = _BIT_COLUMNS
        starts = bit == end - 1 or owner.get(bit + 1) is not field
        if field is not None and starts:
            bits = bit + 1 - max(field.first_bit, low)
            room = (_BIT_COLUMNS + 1) * bits - 1
            columns += max(0, len(field.name) - room)
            cells += "|" + field.name.ljust(room)
        elif field is None:
            cells += ("|" if starts else " ") + f"{reserved >> bit & 1:{columns}}"
        numbers += f" {bit:{columns}}"
    return f"{numbers}\n[{cells[1:]}]"
