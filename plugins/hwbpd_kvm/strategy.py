"""
What a switch strategy is: trigger x horizon x scope, and what it knows of the host.

How to drive one (``engine.py`` carries it out)::

    from hwbpd_kvm.engine import Engine
    from hwbpd_kvm.presets import PRESETS
    from hwbpd_kvm.registers import CORTEX_A15
    from hwbpd_kvm.state import Enter, Exit, GuestWrite, HostArm, Load

    engine = Engine(PRESETS["arm-dirty-bit"], [CORTEX_A15, CORTEX_A15])  # one layout for each CPU
    world = engine.start()
    for event in (Load(0), Enter(), GuestWrite("DBGBVR0", 0x8000), Exit()):
        world, actions = engine.step(world, event)   # pure: neither world is changed

``actions`` is the ordered list of what the event costs (``actions.py``): register reads and writes, traps switched on
and off, looks at memory, and accesses that trapped. A trapped access is one event with everything in its list: the
trap, the exit's actions, and the following entry's. What events are allowed when is said by ``Engine.step``.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd_kvm.state import ArmedBy


class Trigger(enum.Enum):
    """What makes an entry load the guest's registers; more than one may."""

    ALWAYS = "always"
    WRITTEN = "written"  # a trapped write, since the horizon last passed
    ACCESSED = "accessed"  # a trapped read or write
    MASTER = "master"  # the guest's switch for all slots is on, in memory: MDBGEN; MDE or KDE
    SLOTS = "slots"  # one of the guest's control registers, in memory, arms a slot
    HOST = "host"  # the host has breakpoints, as far as ``Strategy.host_known`` can tell


class Horizon(enum.Enum):
    """Until when something lasts."""

    EXIT = "exit"
    PUT = "put"
    VCPU_SWITCH = "vcpu switch"  # until another vCPU is switched in on that CPU
    HOST_TOUCHES = "host touches"  # until the host accesses its registers, or needs them in force
    FOR_GOOD = "for good"


class Scope(enum.Enum):
    """What is switched."""

    ALL = "all"
    ARMED = "armed"  # only the slots that the guest or the host has armed
    ENABLES = "enables"  # of the host's only the enable bits, unless a trigger asks for all


class Small(enum.Enum):
    """When the few registers beside the slots (``Layout.small``) are switched."""

    WITH_SLOTS = "with the slots"
    EVERY_EDGE = "every edge"  # at each entry and exit, whatever else is switched
    NEVER = "never"  # the guest's are kept in memory, and the host's stay where they are
    QUIET = "quiet"  # loaded with the slots; else the master switch is off while the guest runs


class HostKnown(enum.Enum):
    """How it is found out whether the host has breakpoints that must not be in force in the guest."""

    NOT = "not"  # it is not asked
    LOOPS = "loops"  # hw_breakpoint_enabled as first proposed: bp_on_reg up to core_num_brps, wp_on_reg
    RESERVED = "reserved"  # and the reserved breakpoint behind the end
    HARDWARE = "hardware"  # every control register is read
    ACTIVE = "active"  # one word: hw_breakpoint_active's cpu_dr7
    TRAPPED = "trapped"  # every access of the host has trapped into the hypervisor, which keeps the record


class HostFrom(enum.Enum):
    """Where the host's values come from at the exit."""

    SAVED = "saved"  # read from the hardware at the entry
    RECORD = "record"  # somebody's memory; nothing is read at the entry


EVERYBODY_TOLD = frozenset({ArmedBy.THREAD, ArmedBy.KERNEL, ArmedBy.KGDB, ArmedBy.STEP})


class Strategy(Struct, frozen=True):
    """
    One way to switch. Every field is a choice somebody has made; ``presets.py`` says who.

    ``untraps``: which of the triggers also let the guest access its registers without a trap. A loaded set is not
    always an untrapped one: x86 loads for an armed slot and goes on trapping.
    ``reruns``: a trapped access is executed again by the guest, untrapped, instead of emulated from memory.
    ``horizon``: until when an access that pulled a trigger counts. ``leaves``: until when the guest's registers stay in
    the hardware; past EXIT they are *resident* while the host runs.
    ``host_told``: of which breakpoints of the host ``record`` knows.
    """

    name: str
    source: str
    architecture: str  # "armv7", "arm64" or "x86": whose registers it was made for
    triggers: frozenset[Trigger]
    untraps: frozenset[Trigger]
    horizon: Horizon = Horizon.EXIT
    scope: Scope = Scope.ALL
    leaves: Horizon = Horizon.EXIT
    small: Small = Small.WITH_SLOTS
    host_known: HostKnown = HostKnown.NOT
    host_from: HostFrom = HostFrom.SAVED
    host_told: frozenset[ArmedBy] = EVERYBODY_TOLD
    reruns: bool = False
    counts_read: bool = False  # the ID register that has the counts is read for each move of a set
    saves_unchanged: bool = False  # also a set that could not change, as it was trapped, is read back
    status_with_slots: bool = True  # DR6 is loaded with the slots; else only for a guest that is not trapped
    status_cleaned: bool = True  # DR6 is reset once the guest's has been read
    enabled_recomputed: bool = True  # whether a slot is armed is told from the registers; else from a flag
    saves_first: bool = True  # at the exit the guest's set is read before the host's is written
    debug_retraps: bool = True  # the VMM's debugging takes the registers back from the guest at once
    leaves_remotely: bool = True  # a vCPU that moves fetches its registers from the CPU where they stayed
    moves_least: bool = False  # slots are counted as on the CPU that has the fewest, instead of as on this one
    adopts: bool = True  # at initialisation what the host has armed already is put on record
    gives_back: bool = True  # at teardown the host gets its registers back
    os_lock: bool = False  # the guest's OS Lock takes its registers out of force
