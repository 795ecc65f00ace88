"""
Instructions of arm64 that access memory, each with what it accesses: the programs whose watchpoints are judged.

Every one takes its address from x0. They stand in a row, each followed by a NOP and a BRK, so that a program runs from
its first word to a stop, and a breakpoint can be on the instruction, behind it, or where nothing runs.

What is fixed here is what the architecture says of an instruction (Arm Architecture Reference Manual for A-profile, the
pages of the instructions); what watchpoints make of it is for the model to say.

Not among them, because QEMU looks at no watchpoint there: the atomics of Armv8.1 (LDADD, SWP, CAS). So what the model
says of an access that reads and writes is nobody's word but the manual's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hwbpd.core.model import Access

READ, WRITE = Access.READ, Access.WRITE

NOP: Final = 0xD503201F
BRK: Final = 0xD4200000


class Instruction(NamedTuple):
    """One instruction; ``length_bytes`` of 0 accesses nothing, although it has an address."""

    name: str
    word: int
    access: Access
    length_bytes: int
    element_bytes: int  # what it is made of; at a multiple of that QEMU looks at its very bytes
    aligned: bool = False  # it faults at an address that is not a multiple of its length
    whole_block: bool = False  # it accesses the aligned block that the address lies in
    at_liberty: bool = False  # whether it is met is left to the implementation


def _plain() -> list[Instruction]:
    rows = []
    for size, bytes_ in enumerate((1, 2, 4, 8)):
        rows.append(Instruction(f"ldr{bytes_}", 0x39400001 | size << 30, READ, bytes_, bytes_))
        rows.append(Instruction(f"str{bytes_}", 0x39000001 | size << 30, WRITE, bytes_, bytes_))
        rows.append(Instruction(f"ldar{bytes_}", 0x08DFFC01 | size << 30, READ, bytes_, bytes_, aligned=True))
        rows.append(Instruction(f"stlr{bytes_}", 0x089FFC01 | size << 30, WRITE, bytes_, bytes_, aligned=True))
    return rows


INSTRUCTIONS: Final[tuple[Instruction, ...]] = (
    *_plain(),
    Instruction("ldrsw", 0xB9800001, READ, 4, 4),
    Instruction("ldtr", 0xF8400801, READ, 8, 8),
    Instruction("sttr", 0xF8000801, WRITE, 8, 8),
    Instruction("ldp w", 0x29400801, READ, 8, 4),
    Instruction("stp w", 0x29000801, WRITE, 8, 4),
    Instruction("ldp x", 0xA9400801, READ, 16, 8),
    Instruction("stp x", 0xA9000801, WRITE, 16, 8),
    Instruction("ldnp x", 0xA8400801, READ, 16, 8),
    Instruction("ldr q", 0x3DC00000, READ, 16, 8),
    Instruction("str q", 0x3D800000, WRITE, 16, 8),
    Instruction("ldp q", 0xAD400400, READ, 32, 8),
    Instruction("stp q", 0xAD000400, WRITE, 32, 8),
    Instruction("ld1 16b", 0x4C407000, READ, 16, 8),
    Instruction("st1 16b", 0x4C007000, WRITE, 16, 8),
    Instruction("ld2 16b", 0x4C408000, READ, 32, 1),
    Instruction("ldxr", 0xC85F7C01, READ, 8, 8, aligned=True),
    Instruction("ldaxp", 0xC87F8801, READ, 16, 16, aligned=True),
    # No monitor is set, so these fail and store nothing; then a watchpoint may be met, or not.
    Instruction("stxr", 0xC8027C01, WRITE, 8, 8, aligned=True, at_liberty=True),
    Instruction("dc zva", 0xD50B7420, WRITE, 64, 64, whole_block=True),
    Instruction("prfm", 0xF9800000, READ, 0, 1),
    Instruction("dc cvau", 0xD50B7B20, READ, 0, 1),
)

WORDS_EACH: Final = 3  # the instruction, NOP, BRK


def program() -> list[int]:
    """The words of all of them in a row."""
    return [word for one in INSTRUCTIONS for word in (one.word, NOP, BRK)]


def place(index: int) -> int:
    """Where the program of an instruction starts, in bytes from the first."""
    return 4 * WORDS_EACH * index
