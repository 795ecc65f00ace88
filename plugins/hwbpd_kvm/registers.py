"""
The debug registers of one CPU as a world switch sees them: which there are, and which of their bits arm something.

A switch does not care what an address means; it cares which registers belong together, in which order they are moved,
which the CPU moves by itself, and when a slot is **live**: its control armed, and the switch for all slots on. A layout
is that and no more. The meaning of the words is in the register backends.

Counts are a CPU's own. On a system whose CPUs differ, each has a layout of its own, and names agree. Two questions are
to be kept apart (``least`` and ``most``): a CPU's *real* number is what has to be moved there, because that many slots
of the host's may be armed; the *least* of all is what a guest may be shown, because it may run on any.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from msgspec import Struct


class Slot(Struct, frozen=True):
    """One address register, its control register, and the bits there that arm it."""

    address: str
    control: str
    enable: int


class Layout(Struct, frozen=True, dict=True):
    """
    The registers of one kind of CPU.

    ``slots``: breakpoints, then watchpoints, in the order of their loops.
    ``breakpoints``: how many of the slots are BRPs; on x86 all are both.
    ``reserved``: how many BRPs, the last ones, Linux keeps to step over watchpoints, past its own loops.
    ``small``: the few registers beside the slots that some strategies switch at every edge: MDSCR_EL1; DR6 and DR7.
    ``master``: that of ``small`` which has a switch for all slots, and ``master_enable`` its bits; "" without.
    ``extra``: registers that move along with the slots: MDCCINT_EL1, and DBGVCR32_EL2 for a 32-bit guest.
    ``status``: the register that says what happened; "" where syndrome registers do, which are no debug registers.
    ``by_hardware``: loaded with the guest, saved and reset at the exit, by the CPU itself: DR7, by the VMCS or VMCB.
    ``reset``: values after a reset that are not zero.
    """

    name: str
    slots: tuple[Slot, ...]
    breakpoints: int
    small: tuple[str, ...]
    reserved: int = 0
    master: str = ""
    master_enable: int = 0
    master_always: bool = False  # Linux on ARMv7 sets MDBGEN at boot; on arm64 it counts users of MDE and KDE
    extra: tuple[str, ...] = ()
    status: str = ""
    by_hardware: frozenset[str] = frozenset()
    reset: tuple[tuple[str, int], ...] = ()

    @cached_property
    def slot_registers(self) -> tuple[str, ...]:
        """
        Every register that belongs to a slot and no other, in the order they are moved.

        That of "arm64: KVM: implement lazy world switch for debug registers": BCR, BVR, WCR, WVR, each from the highest
        number down. On x86 DR7 is nobody's alone, so these are DR0 to DR3.
        """
        breakpoints, watchpoints = self.slots[: self.breakpoints], self.slots[self.breakpoints :]
        names = [
            getattr(slot, part)
            for group in (breakpoints, watchpoints)
            for part in ("control", "address")
            for slot in reversed(group)
        ]
        return tuple(name for name in dict.fromkeys(names) if name not in self.small)

    @cached_property
    def registers(self) -> tuple[str, ...]:
        """Every register, in the order they are moved."""
        return (*self.slot_registers, *self.extra, *self.small)

    @cached_property
    def position(self) -> dict[str, int]:
        """Where each register is in ``registers``."""
        return {name: place for place, name in enumerate(self.registers)}

    @cached_property
    def resets(self) -> dict[str, int]:
        """What each register holds after a reset."""
        return dict.fromkeys(self.registers, 0) | dict(self.reset)

    @cached_property
    def enables(self) -> dict[str, int]:
        """By register, the bits that arm a slot or all slots; only registers that have such bits."""
        bits: dict[str, int] = {self.master: self.master_enable} if self.master else {}
        for slot in self.slots:
            bits[slot.control] = bits.get(slot.control, 0) | slot.enable
        return bits

    @cached_property
    def looped(self) -> tuple[int, ...]:
        """The slots that a loop over core_num_brps and core_num_wrps visits: all but the reserved."""
        last = self.breakpoints - self.reserved
        return tuple(number for number in range(len(self.slots)) if not last <= number < self.breakpoints)


def arm_v7(breakpoints: int, watchpoints: int, name: str = "armv7") -> Layout:
    """
    Return the layout of an ARMv7 CPU with so many BRPs and WRPs, the one that Linux reserves included.

    ARM Architecture Reference Manual ARMv7-A, "Debug registers reference"; Linux, arch/arm/kernel/hw_breakpoint.c.
    """
    return Layout(
        name,
        _arm_slots(breakpoints, watchpoints, ""),
        breakpoints,
        small=("DBGDSCRext",),
        reserved=1 if breakpoints > 1 else 0,
        master="DBGDSCRext",
        master_enable=1 << 15,  # MDBGEN
        master_always=True,
    )


def arm64(breakpoints: int, watchpoints: int, name: str = "arm64", *, aarch32_guest: bool = False) -> Layout:
    """
    Return the layout of an arm64 CPU with so many breakpoints and watchpoints.

    :param breakpoints: ID_AA64DFR0_EL1.BRPs + 1.
    :param watchpoints: ID_AA64DFR0_EL1.WRPs + 1.
    :param aarch32_guest: the guest runs in AArch32 state, so it has DBGVCR, too.

    Arm Architecture Reference Manual for A-profile, "Debug registers".
    """
    return Layout(
        name,
        _arm_slots(breakpoints, watchpoints, "_EL1"),
        breakpoints,
        small=("MDSCR_EL1",),
        master="MDSCR_EL1",
        master_enable=1 << 15 | 1 << 13,  # MDE, KDE
        extra=("MDCCINT_EL1", "DBGVCR32_EL2") if aarch32_guest else ("MDCCINT_EL1",),
    )


def x86(slots: int = 4, name: str = "x86") -> Layout:
    """
    Return the layout of DR0 to DR3 with DR6 and DR7.

    Intel SDM Vol. 3B, "Debug Registers"; Vol. 3C, "Loading Guest Control Registers, Debug Registers, and MSRs".
    """
    return Layout(
        name,
        tuple(Slot(f"DR{number}", "DR7", 3 << 2 * number) for number in range(slots)),
        slots,
        small=("DR6", "DR7"),
        status="DR6",
        by_hardware=frozenset({"DR7"}),
        reset=(("DR6", 0xFFFF0FF0), ("DR7", 0x400)),
    )


def _arm_slots(breakpoints: int, watchpoints: int, level: str) -> tuple[Slot, ...]:
    kinds = [("B", number) for number in range(breakpoints)] + [("W", number) for number in range(watchpoints)]
    return tuple(Slot(f"DBG{kind}VR{nth}{level}", f"DBG{kind}CR{nth}{level}", 1) for kind, nth in kinds)


CORTEX_A15 = arm_v7(6, 4, "cortex-a15")
CORTEX_A7 = arm_v7(6, 4, "cortex-a7")
CORTEX_A57 = arm64(6, 4, "cortex-a57")
CORTEX_A53 = arm64(6, 4, "cortex-a53")
ARM64_MOST = arm64(16, 16, "arm64-max")
X86 = x86()


def least(layouts: Sequence[Layout]) -> tuple[int, int]:
    """Return the (breakpoints, watchpoints) that every one of these CPUs has: what a guest that moves may be shown."""
    return (
        min(layout.breakpoints for layout in layouts),
        min(len(layout.slots) - layout.breakpoints for layout in layouts),
    )


def most(layouts: Sequence[Layout]) -> Layout:
    """
    Return the layout that has every register of the others.

    :raises ValueError: where none has; such CPUs do not share a guest.
    """
    widest = max(layouts, key=lambda layout: len(layout.registers))
    for layout in layouts:
        odd = set(layout.registers) - set(widest.registers)
        if odd:
            raise ValueError(f"{layout.name} has {', '.join(sorted(odd))}, which {widest.name} lacks")
    return widest
