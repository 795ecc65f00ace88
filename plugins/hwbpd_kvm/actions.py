"""
What a switch strategy orders: the smallest things that moving debug registers between worlds is made of.

Every step of the engine answers with these, in order. The same list runs on simulated registers
(``Hardware.perform``), is priced (one price for each kind and, for reads and writes, each register), or drives real
ones. An action says *which* register goes from or to *which* set in memory, never a value: so the lists are the same
for every guest, and whoever carries them out needs no more than the sets.

Three things are no action, because no strategy can choose them: what the CPU itself switches with the world
(``Layout.by_hardware``: DR7 on x86), the entry, and the exit. Of the latter two, price what happened: each ``TRAP`` is
one exit and one entry more than the guest asked for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, MutableMapping

from msgspec import Struct


class Kind(enum.Enum):
    """What is done."""

    READ = "read"  # a register of the hardware is read, into a set or only to be looked at
    WRITE = "write"  # a register of the hardware is written, from a set or with a constant
    TRAPS_ON = "traps on"  # the guest's accesses trap from the next entry on (HDCR.TDA, MDCR_EL2.TDA, MOV-DR exiting)
    TRAPS_OFF = "traps off"
    LOOK = "look"  # one word of memory decides: bp_on_reg[n], cpu_dr7, the status page, a control register's copy
    TRAP = "trap"  # an access by the guest left the guest
    HOST_TRAP = "host trap"  # an access by the host was caught by the hypervisor below it


class Place(enum.Enum):
    """Where a value that is read goes, or a value that is written comes from."""

    GUEST = "guest"  # what the guest believes its registers hold
    VMM = "vmm"  # what the VMM has set by KVM_SET_GUEST_DEBUG
    HOST = "host"  # the host's registers as this switch has saved them from the hardware
    RECORD = "record"  # what somebody else keeps of the host's registers: its breakpoint layer's cache
    RESET = "reset"  # written: the value after a reset, in which nothing is armed
    DISARMED = "disarmed"  # written: what the register holds, without its enable bits
    NOWHERE = "nowhere"  # read: only to decide


class Action(Struct, frozen=True):
    """One order; ``register`` and ``place`` are for READ and WRITE, and LOOK names in ``register`` what it looks at."""

    kind: Kind
    register: str = ""
    place: Place = Place.NOWHERE

    def __str__(self) -> str:
        match self.kind:
            case Kind.READ if self.place is Place.NOWHERE:
                return f"read {self.register}"
            case Kind.READ:
                return f"{self.place.value}.{self.register} <- {self.register}"
            case Kind.WRITE:
                source = f"{self.place.value}.{self.register}"
                return f"{self.register} <- {source if self.place not in CONSTANT else self.place.value}"
            case Kind.LOOK:
                return f"look at {self.register}"
            case _:
                return str(self.kind.value)


CONSTANT = frozenset({Place.RESET, Place.DISARMED})

TRAPS_ON = Action(Kind.TRAPS_ON)
TRAPS_OFF = Action(Kind.TRAPS_OFF)
TRAP = Action(Kind.TRAP)
HOST_TRAP = Action(Kind.HOST_TRAP)


def look(what: str) -> Action:
    """Return the look at one word of memory."""
    return Action(Kind.LOOK, what)


class Hardware(Struct):
    """
    Registers and sets as plain dictionaries, for whoever wants to carry out a list of actions by hand.

    The engine does not use it: it is how a test sees that the actions alone, without the engine's knowledge, lead to
    the hardware that the engine says.
    """

    registers: MutableMapping[str, int]
    sets: MutableMapping[Place, MutableMapping[str, int]]
    resets: MutableMapping[str, int]
    enables: MutableMapping[str, int]  # by register, the bits that arm something
    traps: bool = False

    def perform(self, actions: Iterable[Action]) -> None:
        """Carry out ``actions`` in order."""
        for action in actions:
            match action.kind:
                case Kind.READ if action.place is not Place.NOWHERE:
                    self.sets[action.place][action.register] = self.registers[action.register]
                case Kind.WRITE if action.place is Place.RESET:
                    self.registers[action.register] = self.resets[action.register]
                case Kind.WRITE if action.place is Place.DISARMED:
                    self.registers[action.register] &= ~self.enables[action.register]
                case Kind.WRITE:
                    self.registers[action.register] = self.sets[action.place][action.register]
                case Kind.TRAPS_ON | Kind.TRAPS_OFF:
                    self.traps = action.kind is Kind.TRAPS_ON
                case _:
                    pass
