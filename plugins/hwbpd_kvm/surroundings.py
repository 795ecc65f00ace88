"""
What may happen around a guest while a strategy is searched, and what is expected to break there.

Small worlds: two CPUs with two slots, or, on Arm where CPUs of one system differ, the second with one. ``CASES`` is the
table of the field's arguments: each strategy where it is meant to work, and where somebody said that it does not.
"""

from __future__ import annotations

from msgspec import Struct, structs

from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.promises import Promise
from hwbpd_kvm.registers import Layout, arm64, arm_v7, x86
from hwbpd_kvm.state import ArmedBy


class Surroundings(Struct, frozen=True):
    """
    What may happen around the guest.

    ``host``: whether the host arms anything. ``untold``: where ARMv7's Linux puts the reserved breakpoint into no slot.
    ``alike``: both CPUs have both slots. ``most_shown``: where they differ, the guest and the VMM are shown the first
    CPU's count, and not the least. ``asked_before``: hw_breakpoint_enabled is asked some time before the entry, and
    anything may come between; but if ``settled`` no arming by the host, and if ``pinned`` no move to another CPU.
    ``lifecycle``: the hypervisor comes and goes. ``others``: other vCPUs use the CPUs.
    """

    host: bool = True
    untold: bool = False
    alike: bool = False
    most_shown: bool = False
    asked_before: bool = False
    settled: bool = False
    pinned: bool = False
    lifecycle: bool = False
    others: bool = False

    def __str__(self) -> str:
        told = {
            "no host breakpoints": not self.host,
            "reserved breakpoint in no slot": self.untold,
            "CPUs alike": self.alike,
            "most shown": self.most_shown,
            "asked before the entry": self.asked_before,
            "nothing armed between": self.settled,
            "no move between": self.pinned,
            "hypervisor comes and goes": self.lifecycle,
            "other vCPUs": self.others,
        }
        return ", ".join(words for words, is_so in told.items() if is_so) or "as usual"


class Case(Struct, frozen=True):
    """A strategy, its surroundings, and the promises that it is known to break there."""

    preset: str
    around: Surroundings
    breaks: frozenset[Promise] = frozenset()


def layouts(architecture: str, *, alike: bool) -> tuple[Layout, Layout]:
    """Return the layouts of the two CPUs of a small world."""
    match architecture:
        case "armv7":
            first, second = arm_v7(2, 0), arm_v7(1, 0)
        case "arm64":
            first, second = _bare(arm64(1, 1)), _bare(arm64(1, 0))
        case _:
            first = second = _bare(x86(2))
    return (first, first) if alike else (first, second)


def _bare(layout: Layout) -> Layout:
    """Leave out the registers that only move along, as what holds for an address register holds for them."""
    return structs.replace(layout, extra=(), reset=())


def host_slots(architecture: str, around: Surroundings) -> tuple[tuple[int, int, ArmedBy], ...]:
    """Return what the host may arm: CPU, slot, and how."""
    if not around.host:
        return ()
    match architecture:
        case "armv7":
            step = ArmedBy.STEP_UNTOLD if around.untold else ArmedBy.STEP
            return ((0, 0, ArmedBy.KERNEL), (0, 1, step), (1, 0, ArmedBy.KERNEL))
        case "arm64":
            return ((0, 0, ArmedBy.THREAD), (0, 1, ArmedBy.KERNEL), (1, 0, ArmedBy.KERNEL))
        case _:
            return ((0, 0, ArmedBy.THREAD), (0, 1, ArmedBy.KGDB), (1, 0, ArmedBy.KERNEL))


USUAL = Surroundings()
ALIKE = Surroundings(alike=True)
UNTOLD = Surroundings(untold=True)
MOST_SHOWN = Surroundings(most_shown=True)
LIFECYCLE = Surroundings(lifecycle=True)
OTHERS = Surroundings(others=True)
NO_HOST = Surroundings(host=False, others=True)
ASKED = Surroundings(asked_before=True)
ASKED_SETTLED = Surroundings(asked_before=True, settled=True)
ASKED_PINNED = Surroundings(asked_before=True, pinned=True)
ASKED_BOTH = Surroundings(asked_before=True, settled=True, pinned=True)

# The surroundings a strategy is made for, by the beginning of its name, if they are not the usual.
_AT_HOME = {"host-trapping-owner": LIFECYCLE, "xen": NO_HOST}

_HOST_QUIET = frozenset({Promise.HOST_QUIET})
_HOST_RESTORED = frozenset({Promise.HOST_RESTORED})
_SEEN_AND_LOST = frozenset({Promise.OWN_VALUES, Promise.NO_WRITE_LOST})
_LOST_ELSEWHERE = frozenset({Promise.NO_WRITE_LOST, Promise.AS_ARMED})
_NO_XEN_HOST = _SEEN_AND_LOST | _HOST_RESTORED | {Promise.STATUS_CLEAN}

# What breaks at home; a strategy that is not here keeps every promise there.
_BREAKS: dict[str, frozenset[Promise]] = {
    "always-least": _SEEN_AND_LOST | _HOST_QUIET,
    "arm-dirty-bit": _HOST_QUIET,
    "arm-dirty-bit-20": _SEEN_AND_LOST | _HOST_QUIET | {Promise.AS_ARMED},
    "four-cases-loops": _HOST_QUIET,
    "disable-bitmap-loops": _HOST_QUIET,
    "host-trapping-owner-late": _HOST_RESTORED,
    "host-trapping-owner-gone": _HOST_RESTORED | {Promise.NO_WRITE_LOST},
    "x86-2009-thread-cache": _HOST_RESTORED,
    "x86-2009-layer-cache": _HOST_RESTORED,
    "x86-wont-exit-2014": _HOST_QUIET | {Promise.AS_ARMED, Promise.STATUS_CLEAN},
    "x86-sync-late": _SEEN_AND_LOST,
    "x86-never-again-naive": _SEEN_AND_LOST | {Promise.TRAPS_MATCH, Promise.DEBUG_TRAPS},
    "xen-vmx": frozenset({Promise.STATUS_CLEAN}),
    "xen-no-remote-sync": frozenset({Promise.STATUS_CLEAN, Promise.NO_WRITE_LOST}),
}

_ELSEWHERE: tuple[Case, ...] = (
    *(Case(name, ALIKE) for name in ("always", "four-cases", "partial", "arm64-lazy", "arm64-owner")),
    Case("partial-untrapped", ALIKE, frozenset({Promise.NO_WRITE_LOST, Promise.GUEST_QUIET})),
    # The reserved breakpoint that is in no slot: only who reads the hardware, or has trapped the host, knows of it.
    Case("four-cases", UNTOLD, _HOST_QUIET),
    Case("disable-bitmap", UNTOLD, _HOST_QUIET),
    Case("four-cases-hardware", UNTOLD),
    Case("disable-bitmap-hardware", UNTOLD),
    Case("host-trapping-owner", UNTOLD),
    # A guest that is shown what only some CPUs have.
    Case("always", MOST_SHOWN, _LOST_ELSEWHERE),
    Case("arm64-owner", MOST_SHOWN, _LOST_ELSEWHERE),
    # The question some time before the entry.
    Case("four-cases", ASKED, _HOST_QUIET),
    Case("four-cases", ASKED_PINNED, _HOST_QUIET),
    Case("four-cases", ASKED_SETTLED, _HOST_QUIET),
    Case("four-cases", ASKED_BOTH),
    Case("disable-bitmap", ASKED, _HOST_QUIET),
    Case("x86-wont-exit", ASKED),
    # Xen's horizon under a host that has breakpoints of its own.
    Case("xen-vmx", OTHERS, _NO_XEN_HOST),
)


def at_home(preset: str) -> Surroundings:
    """Return the surroundings that a strategy is made for."""
    return next((around for family, around in _AT_HOME.items() if preset.startswith(family)), USUAL)


def breaks_at_home(preset: str) -> tuple[Promise, ...]:
    """Return the promises that a strategy breaks in the surroundings it is made for, in their usual order."""
    broken = _BREAKS.get(preset, frozenset())
    return tuple(promise for promise in Promise if promise in broken)


def cases() -> tuple[Case, ...]:
    """Return every case: each strategy at home, and elsewhere wherever there is something to learn."""
    home = (Case(name, at_home(name), _BREAKS.get(name, frozenset())) for name in PRESETS)
    return (*home, *_ELSEWHERE)
