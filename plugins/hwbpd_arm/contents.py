"""
What the registers of a slot must hold for a piece of a plan: the same words on ARMv7 and arm64, but for details.

1. An instruction of four bytes selects its whole word; one of two (T32) the half of it where it stands.
2. A watchpoint up to a doubleword selects its bytes with BAS. On ARMv7 the address register then holds the word's
   address where one word is enough, and the doubleword's otherwise, as Linux has it; on arm64 always the doubleword's.
3. A greater one is a power of two at an address divisible by it, and uses MASK.

What no slot can hold is a ``ValueError`` here: claims have been fitted before (fit.py).
"""

from __future__ import annotations

from hwbpd.core.model import Access, Span
from hwbpd.debug_unit import Armed
from hwbpd_arm.bcr import FIRST_HALF, SECOND_HALF, WHOLE_WORD, Bcr, Privilege
from hwbpd_arm.wcr import ALL_BYTES, MASK_MAX, LoadStore, Wcr


def levels(armed: Armed) -> Privilege:
    """Return for whose accesses a slot counts."""
    return (Privilege.USER if armed.user else Privilege(0)) | (Privilege.KERNEL if armed.kernel else Privilege(0))


def instruction_control(span: Span, access: Access, privilege: Privilege, *, higher_modes: bool = False) -> Bcr:
    """
    Return the control word of a breakpoint; the address register takes the word's address (rule 1).

    :raises ValueError: for another access, length or alignment.
    """
    offset = span.address % 4
    select = {(0, 4): WHOLE_WORD, (0, 2): FIRST_HALF, (2, 2): SECOND_HALF}.get((offset, span.length_bytes))
    if access != Access.EXECUTE or select is None:
        raise ValueError(f"no BRP can hold {span} for {access}")
    return Bcr(enabled=True, privilege=privilege, byte_select=select, higher_modes=higher_modes)


def watchpoint_contents(
    span: Span,
    access: Access,
    privilege: Privilege,
    *,
    lanes: int,
    prefers_words: bool = False,
    higher_modes: bool = False,
) -> tuple[int, Wcr]:
    """
    Return what the address register holds, and the control word: rules 2 and 3.

    :param lanes: how many bytes BAS can select, 4 or 8.
    :param prefers_words: whether the address is a word's where one word is enough.
    :raises ValueError: where no slot can hold it.
    """
    kinds = {Access.READ: LoadStore.LOAD, Access.WRITE: LoadStore.STORE}
    kinds[Access.READ | Access.WRITE] = LoadStore.LOAD | LoadStore.STORE
    if access not in kinds:
        raise ValueError(f"no WRP can hold {span} for {access}")
    base, length = span.address, span.length_bytes
    within = 4 if prefers_words and base % 4 + length <= 4 else lanes
    offset = base % within
    if 1 <= length <= within - offset:
        select, mask = ((1 << length) - 1) << offset, 0
        base -= offset
    elif length & (length - 1) == 0 and 8 <= length <= 1 << MASK_MAX and base % length == 0:
        select, mask = ALL_BYTES if lanes == 8 else 0xF, length.bit_length() - 1
    else:
        raise ValueError(f"no WRP can hold {span}")
    control = Wcr(
        enabled=True,
        privilege=privilege,
        load_store=kinds[access],
        byte_select=select,
        higher_modes=higher_modes,
        mask=mask,
    )
    return base, control
