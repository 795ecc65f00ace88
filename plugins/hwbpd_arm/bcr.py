"""
DBGBCR, the breakpoint control register: whether its slot is armed, for whom, and how its address register is compared.

     31..29|28..24|23..20|19..16|15 14|13 |12..9|8..5|4 3|2 1|0
    [      |MASK  |BT    |LBN   |SSC  |HMC|     |BAS |   |PMC|E]

One layout serves ARMv7 (DBGBCR) and Armv8 (DBGBCR_EL1). The rules that hold for every word:

1. Bits 3, 4, 9 to 12 and 29 to 31 are reserved: they are written as zero and read as zero. So is MASK in Armv8; before
   v7.1 so are HMC and the highest bit of BT.
2. The address register holds a word address. BAS says which of its four bytes an instruction may start at: 0b1111 for
   an A32 or A64 instruction, 0b0011 and 0b1100 for the T32 instruction at the word or in its middle. Armv8 has no
   instruction that starts at an odd byte, and so BAS[1] and BAS[3] are copies of BAS[0] and BAS[2].
3. PMC says for which privilege: 1 for the kernel's (PL1, EL1), 2 for user mode's (PL0, EL0), 3 for both; HMC adds
   hypervisor modes. PMC 0 means User, System and Supervisor modes together in AArch32, and nothing in AArch64.
4. BT 4 turns the comparison round: a **mismatch** breakpoint traps at every instruction but those it selects. It is
   how a debugger steps on ARMv7, which has no single step. AArch64 has one (MDSCR_EL1.SS), and no mismatch.
5. MASK (ARMv7; deprecated, and not on every CPU): that many low bits of the address are not compared; 0 for none, 1 and
   2 are reserved, and BAS must then be 0b1111.

Decoded and named, and **not simulated**: linked and context-matching types (every BT but 0 and 4, with LBN), and SSC,
which tells security states apart. A slot that uses one of them never traps in our models. Linux uses none.

Arm Architecture Reference Manual, ARMv7-A and ARMv7-R edition, "DBGBCR, Breakpoint Control Registers"; Arm Architecture
Reference Manual for A-profile, "DBGBCR<n>_EL1, Debug Breakpoint Control Registers".
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd.fields import Field, by_name
from hwbpd_arm.identification import DebugVersion


class BreakpointType(enum.IntEnum):
    """BT: what is compared with what. An odd type is linked to the BRP that LBN names, or is the one linked to."""

    ADDRESS = 0b0000
    ADDRESS_LINKED = 0b0001
    CONTEXT = 0b0010  # CONTEXTIDR, where the translation regime has one
    CONTEXT_LINKED = 0b0011
    MISMATCH = 0b0100  # rule 4
    MISMATCH_LINKED = 0b0101
    CONTEXT_EL1 = 0b0110
    CONTEXT_EL1_LINKED = 0b0111
    VMID = 0b1000
    VMID_LINKED = 0b1001
    VMID_CONTEXT = 0b1010
    VMID_CONTEXT_LINKED = 0b1011
    CONTEXT_EL2 = 0b1100
    CONTEXT_EL2_LINKED = 0b1101
    CONTEXT_EL1_EL2 = 0b1110
    CONTEXT_EL1_EL2_LINKED = 0b1111


class Privilege(enum.IntFlag):
    """PMC of a breakpoint and PAC of a watchpoint: whose accesses count (rule 3)."""

    KERNEL = 1
    USER = 2


WHOLE_WORD = 0b1111  # BAS of an A32 or A64 instruction
FIRST_HALF = 0b0011  # and of a T32 instruction at the word,
SECOND_HALF = 0b1100  # or in its middle


class Bcr(Struct, frozen=True):
    """DBGBCR as a value; reserved bits are not part of it. The default: not armed, all fields zero."""

    enabled: bool = False  # E
    privilege: Privilege = Privilege(0)  # PMC
    byte_select: int = 0  # BAS
    higher_modes: bool = False  # HMC
    security: int = 0  # SSC; not simulated
    linked_to: int = 0  # LBN; not simulated
    type: BreakpointType = BreakpointType.ADDRESS  # BT
    mask: int = 0  # MASK

    @property
    def is_simulated(self) -> bool:
        """Whether our models know what such a slot does."""
        return self.security == 0 and self.type in (BreakpointType.ADDRESS, BreakpointType.MISMATCH)


FIELDS: tuple[Field, ...] = (
    Field("E", 0, 1, "the slot is armed"),
    Field("PMC", 1, 2, "for whom: 1 the kernel, 2 user mode, 3 both"),
    Field("BAS", 5, 4, "the bytes of the word that an instruction may start at"),
    Field("HMC", 13, 1, "for hypervisor modes, too; since v7.1"),
    Field("SSC", 14, 2, "in which security states; not simulated"),
    Field("LBN", 16, 4, "the BRP that a linked one is linked to; not simulated"),
    Field("BT", 20, 4, "what is compared: 0 the address, 4 the same the other way round; others not simulated"),
    Field("MASK", 24, 5, "how many low bits of the address are not compared; ARMv7 only"),
)

_FIELD = by_name(FIELDS)


def encode(value: Bcr) -> int:
    """Return the word for ``value``, reserved bits zero."""
    return (
        _FIELD["E"].place(value.enabled)
        | _FIELD["PMC"].place(value.privilege)
        | _FIELD["BAS"].place(value.byte_select)
        | _FIELD["HMC"].place(value.higher_modes)
        | _FIELD["SSC"].place(value.security)
        | _FIELD["LBN"].place(value.linked_to)
        | _FIELD["BT"].place(value.type)
        | _FIELD["MASK"].place(value.mask)
    )


def decode(word: int) -> Bcr:
    """Return what ``word`` says, whether it was read or is about to be written; reserved bits are dropped."""
    return Bcr(
        enabled=bool(_FIELD["E"].read(word)),
        privilege=Privilege(_FIELD["PMC"].read(word)),
        byte_select=_FIELD["BAS"].read(word),
        higher_modes=bool(_FIELD["HMC"].read(word)),
        security=_FIELD["SSC"].read(word),
        linked_to=_FIELD["LBN"].read(word),
        type=BreakpointType(_FIELD["BT"].read(word)),
        mask=_FIELD["MASK"].read(word),
    )


def fields_of(version: int) -> tuple[Field, ...]:
    """Return the fields that a version of the architecture has; the other bits are reserved (rule 1)."""
    left_out = {"MASK"} if version >= DebugVersion.V8 else {"HMC"} if version < DebugVersion.V7_1 else set[str]()
    return tuple(field for field in FIELDS if field.name not in left_out)


def stored(written: int, version: int) -> int:
    """Return what the register holds, and reads as, after ``written`` was moved to it: rules 1 and 2."""
    kept = 0
    for field in fields_of(version):
        kept |= written & field.mask
    if version < DebugVersion.V7_1:
        kept &= ~_FIELD["BT"].place(0b1000)
    if version >= DebugVersion.V8:
        first, second = _FIELD["BAS"].place(0b0001), _FIELD["BAS"].place(0b0100)
        kept &= ~_FIELD["BAS"].mask
        kept |= (written & (first | second)) * 0b11  # each copied to the bit above it
    return kept
