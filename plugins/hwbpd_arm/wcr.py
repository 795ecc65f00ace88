"""
DBGWCR, the watchpoint control register: whether its slot is armed, for which accesses, by whom, and to which bytes.

     31..29|28..24|23..21|20|19..16|15 14|13 |12..5|4 3|2 1|0
    [      |MASK  |      |WT|LBN   |SSC  |HMC|BAS  |LSC|PAC|E]

One layout serves ARMv7 (DBGWCR) and Armv8 (DBGWCR_EL1). The rules that hold for every word:

1. Bits 21 to 23 and 29 to 31 are reserved: they are written as zero and read as zero. So is HMC before v7.1; and an
   ARMv7 CPU may have only the lower four bits of BAS.
2. BAS selects bytes of the doubleword that the address register points to, one bit for each, the lowest first. They
   should be neighbours. Where the address is that of a doubleword's upper word (bit 2 is set; deprecated), only the
   lower four bits of BAS count, and they select bytes of that word.
3. MASK, when it is not 0, says how many low bits of the address are not compared: 3 to 31, for an aligned block of
   8 bytes to 2 GiB. 1 and 2 are reserved. BAS must then select all bytes, and the masked bits of the address be zero.
4. LSC: 1 for loads, 2 for stores, 3 for both; 0 for nothing. Loads and stores can be told apart, unlike on x86.
5. PAC says for which privilege, as PMC of a breakpoint does; 0 is reserved.

What software must not program has more than one outcome (CONSTRAINED UNPREDICTABLE; UNPREDICTABLE on ARMv7), and
``unpredictable`` names it. Our models then do this: of selected bytes that are not neighbours, each counts and no
other; a reserved MASK disables the slot; where a MASK is used, BAS and the masked bits of the address are ignored.

Decoded and named, and **not simulated**: WT with LBN (linked to a context-matching BRP), and SSC. A slot that uses one
of them never traps in our models. Linux uses none of these, nor MASK.

Arm Architecture Reference Manual, ARMv7-A and ARMv7-R edition, "DBGWCR, Watchpoint Control Registers"; Arm Architecture
Reference Manual for A-profile, "DBGWCR<n>_EL1, Debug Watchpoint Control Registers" and "Watchpoint data address
comparisons".
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd.core.model import Span
from hwbpd.fields import Field, by_name, mask_of
from hwbpd_arm.bcr import Privilege
from hwbpd_arm.identification import DebugVersion


class LoadStore(enum.IntFlag):
    """LSC: which accesses count (rule 4)."""

    LOAD = 1
    STORE = 2


ALL_BYTES = 0xFF  # BAS
LOWER_WORD = 0x0F
MASK_MIN, MASK_MAX = 3, 31


class Wcr(Struct, frozen=True):
    """DBGWCR as a value; reserved bits are not part of it. The default: not armed, all fields zero."""

    enabled: bool = False  # E
    privilege: Privilege = Privilege(0)  # PAC
    load_store: LoadStore = LoadStore(0)  # LSC
    byte_select: int = 0  # BAS
    higher_modes: bool = False  # HMC
    security: int = 0  # SSC; not simulated
    linked_to: int = 0  # LBN; not simulated
    linked: bool = False  # WT; not simulated
    mask: int = 0  # MASK

    @property
    def is_simulated(self) -> bool:
        """Whether our models know what such a slot does."""
        return self.security == 0 and not self.linked


FIELDS: tuple[Field, ...] = (
    Field("E", 0, 1, "the slot is armed"),
    Field("PAC", 1, 2, "for whose accesses: 1 the kernel's, 2 user mode's, 3 both"),
    Field("LSC", 3, 2, "for which accesses: 1 loads, 2 stores, 3 both"),
    Field("BAS", 5, 8, "the bytes of the doubleword that are watched"),
    Field("HMC", 13, 1, "for hypervisor modes, too; since v7.1"),
    Field("SSC", 14, 2, "in which security states; not simulated"),
    Field("LBN", 16, 4, "the BRP that a linked watchpoint is linked to; not simulated"),
    Field("WT", 20, 1, "linked; not simulated"),
    Field("MASK", 24, 5, "how many low bits of the address are not compared; 0 for none"),
)

_FIELD = by_name(FIELDS)


def encode(value: Wcr) -> int:
    """Return the word for ``value``, reserved bits zero."""
    return (
        _FIELD["E"].place(value.enabled)
        | _FIELD["PAC"].place(value.privilege)
        | _FIELD["LSC"].place(value.load_store)
        | _FIELD["BAS"].place(value.byte_select)
        | _FIELD["HMC"].place(value.higher_modes)
        | _FIELD["SSC"].place(value.security)
        | _FIELD["LBN"].place(value.linked_to)
        | _FIELD["WT"].place(value.linked)
        | _FIELD["MASK"].place(value.mask)
    )


def decode(word: int) -> Wcr:
    """Return what ``word`` says, whether it was read or is about to be written; reserved bits are dropped."""
    return Wcr(
        enabled=bool(_FIELD["E"].read(word)),
        privilege=Privilege(_FIELD["PAC"].read(word)),
        load_store=LoadStore(_FIELD["LSC"].read(word)),
        byte_select=_FIELD["BAS"].read(word),
        higher_modes=bool(_FIELD["HMC"].read(word)),
        security=_FIELD["SSC"].read(word),
        linked_to=_FIELD["LBN"].read(word),
        linked=bool(_FIELD["WT"].read(word)),
        mask=_FIELD["MASK"].read(word),
    )


def stored(written: int, version: int, *, lanes: int = 8) -> int:
    """
    Return what the register holds, and reads as, after ``written`` was moved to it: rule 1.

    :param lanes: how many bytes BAS can select, 8 or, on some ARMv7 CPUs, 4.
    """
    kept = written & mask_of(FIELDS)
    if version < DebugVersion.V7_1:
        kept &= ~_FIELD["HMC"].mask
    if lanes == 4:
        kept &= ~_FIELD["BAS"].place(ALL_BYTES & ~LOWER_WORD)
    return kept


def watches(control: Wcr, address: int, byte: int) -> bool:
    """
    Whether a slot's comparison takes in a byte: rules 2 and 3, whatever the access and whoever makes it.

    :param address: what the address register holds.
    :param byte: an address of the same form.
    """
    if control.mask:
        return control.mask >= MASK_MIN and byte >> control.mask == address >> control.mask
    lanes = 4 if address & 4 else 8
    return byte // lanes == address // lanes and bool(control.byte_select >> byte % lanes & 1)


def watched(control: Wcr, address: int) -> Span | None:
    """Return the span from the lowest to the highest byte that a slot takes in; None where it takes in none."""
    if control.mask:
        block = 1 << control.mask
        return Span(address - address % block, block) if control.mask >= MASK_MIN else None
    lanes = 4 if address & 4 else 8
    taken = control.byte_select & ((1 << lanes) - 1)
    if not taken:
        return None
    first = address - address % lanes
    return Span(first + _lowest(taken), taken.bit_length() - _lowest(taken))


def unpredictable(control: Wcr, address: int, *, lanes: int = 8) -> str | None:
    """Return the rule that a control word and its address register break, if one; what then happens is open."""
    if control.mask:
        if control.mask < MASK_MIN:
            return "MASK 1 and 2 are reserved"
        if control.byte_select != (1 << lanes) - 1:
            return "BAS must select all bytes where MASK is used"
        if address % (1 << control.mask):
            return "the masked bits of the address must be zero"
    else:
        taken = control.byte_select
        if address & 4 and taken > LOWER_WORD:
            return "BAS must select bytes of a word where the address is that of an upper word"
        if taken and taken >> _lowest(taken) & (taken >> _lowest(taken)) + 1:
            return "BAS must select bytes that are neighbours"
    if not control.privilege:
        return "PAC 0 is reserved"
    return None


def _lowest(bits: int) -> int:
    """The number of the lowest bit set."""
    return (bits & -bits).bit_length() - 1
