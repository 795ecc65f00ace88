"""
From one register file to another: which registers are written, in which order.

1. What is given up, or moves to another address, is disarmed first, by a control word of zero.
2. Then what the whole CPU needs is switched on or off: the OS Lock, MDBGEN of ARMv7, MDE and KDE of arm64.
3. Then addresses, and after all of them control words, which arm.

So no access meets a slot that is half its old self and half its new one, and an address never changes under an armed
control word. A slot that stays where it is and only changes its conditions is written once. Linux does the same one
slot at a time: it enables monitor mode before it writes the address register, and the control register last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from hwbpd.debug_unit import RegisterFile, Write

ARMED = 1  # E, in either control word


class Pair(Struct, frozen=True):
    """The names of the registers of one slot."""

    address: str
    control: str


class Contents(Struct, frozen=True):
    """What the registers of one armed slot hold, in the form in which they are stored."""

    address: int
    control: int


def writes(
    file: RegisterFile, pairs: Iterable[Pair], wanted: Mapping[Pair, Contents], common: Mapping[str, int]
) -> Sequence[Write]:
    """
    Return the writes after which the ``wanted`` pairs hold what they are to, and no other pair is armed.

    :param pairs: every pair of the CPU, a reserved one included.
    :param common: registers of the whole CPU and what is to be written there; those that need no write are left out.
    """
    disarmed: list[Write] = []
    addresses: list[Write] = []
    controls: list[Write] = []
    for pair in pairs:
        held = Contents(file[pair.address], file[pair.control])
        want = wanted.get(pair)
        armed = held.control & ARMED
        if want is None:
            if armed:
                disarmed.append(Write(pair.control, 0))
            continue
        if held.address != want.address:
            if armed:
                disarmed.append(Write(pair.control, 0))
            addresses.append(Write(pair.address, want.address))
        if held.control != want.control or (armed and held.address != want.address):
            controls.append(Write(pair.control, want.control))
    return [*disarmed, *(Write(register, value) for register, value in common.items()), *addresses, *controls]
