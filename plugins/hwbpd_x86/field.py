"""
A field of a register: where it is and what it means.

DR6 and DR7 are tables of these, in ascending order of bits. The tables are the layout: encoding, decoding, the masks
of reserved bits and what is shown to people all come from them.
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
