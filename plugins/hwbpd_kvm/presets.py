"""
The strategies of the field, each as its source has it, mistakes included.

Those that are known to be wrong stay: they are what the search of ``isolation.py`` is measured by, and each has a
neighbour in which only the mistake is mended. ``docs/kvm.md`` tells what each was proposed for and what came of it.
"""

from __future__ import annotations

from hwbpd_kvm.registers import CORTEX_A15, CORTEX_A57, X86, Layout
from hwbpd_kvm.state import ArmedBy
from hwbpd_kvm.strategy import EVERYBODY_TOLD, Horizon, HostFrom, HostKnown, Scope, Small, Strategy, Trigger

# The layout that each architecture's presets are shown on, where nobody says which.
USUAL: dict[str, Layout] = {"armv7": CORTEX_A15, "arm64": CORTEX_A57, "x86": X86}


def _triggers(*triggers: Trigger) -> frozenset[Trigger]:
    return frozenset(triggers)


def _changed(of: Strategy, name: str, source: str, **fields: object) -> Strategy:
    """Return a strategy that differs from another in a few choices."""
    same = {field: getattr(of, field) for field in of.__struct_fields__}
    return Strategy(**(same | {"name": name, "source": source} | fields))


ALWAYS_V7 = Strategy(
    "always",
    "everything at every entry and exit: what the others are measured against",
    "armv7",
    triggers=_triggers(Trigger.ALWAYS),
    untraps=_triggers(Trigger.ALWAYS),
)
ALWAYS_ARM64 = _changed(ALWAYS_V7, "always-arm64", "the same on arm64", architecture="arm64", counts_read=True)
ALWAYS_X86 = _changed(
    ALWAYS_V7, "always-x86", "bhyve: the debug registers are saved and loaded at each entry", architecture="x86"
)

ALWAYS_LEAST = _changed(
    ALWAYS_V7,
    "always-least",
    "the same, as many slots as every CPU has: Will Deacon's shadow value taken for the count of what to move",
    moves_least=True,
)

# --- ARMv7 ------------------------------------------------------------------------------------------------------------

DIRTY_BIT = Strategy(
    "arm-dirty-bit",
    'Zhichao Huang, "KVM: arm: implement dirty bit mechanism for debug registers"',
    "armv7",
    # A trapped read is answered from memory and changes nothing; MDBGEN in the guest's copy of DBGDSCRext makes dirty.
    triggers=_triggers(Trigger.WRITTEN, Trigger.MASTER),
    untraps=_triggers(Trigger.WRITTEN, Trigger.MASTER),
)
DIRTY_BIT_20 = _changed(
    DIRTY_BIT,
    "arm-dirty-bit-20",
    "the same with just the 20 registers that its author counts on a Cortex-A15: without DBGDSCRext",
    small=Small.NEVER,
)
FOUR_CASES = Strategy(
    "four-cases",
    'Christoffer Dall, on "implement dirty bit mechanism", with hw_breakpoint_enabled and the reserved breakpoint',
    "armv7",
    # (1) neither has any: trap. (2) the host, (3) the guest, (4) both: switch at each entry and exit.
    triggers=_triggers(Trigger.HOST, Trigger.SLOTS, Trigger.ACCESSED),
    untraps=_triggers(Trigger.HOST, Trigger.SLOTS, Trigger.ACCESSED),
    host_known=HostKnown.RESERVED,
)
FOUR_CASES_LOOPS = _changed(
    FOUR_CASES,
    "four-cases-loops",
    "Zhichao Huang's hw_breakpoint_enabled, which stops at core_num_brps",
    host_known=HostKnown.LOOPS,
)
FOUR_CASES_HARDWARE = _changed(
    FOUR_CASES,
    "four-cases-hardware",
    "Zhichao Huang's case 3: every control register is read at every entry",
    host_known=HostKnown.HARDWARE,
)
BITMAP = Strategy(
    "disable-bitmap",
    "Christoffer Dall: clear the enable bits of the host's slots, keep a bitmap; all of it once the guest has some",
    "armv7",
    triggers=_triggers(Trigger.SLOTS),
    untraps=_triggers(Trigger.SLOTS),
    scope=Scope.ENABLES,
    host_known=HostKnown.RESERVED,
)
BITMAP_LOOPS = _changed(
    BITMAP, "disable-bitmap-loops", "the same with a loop that stops at core_num_brps", host_known=HostKnown.LOOPS
)
BITMAP_HARDWARE = _changed(
    BITMAP, "disable-bitmap-hardware", "the same, looking at the control registers", host_known=HostKnown.HARDWARE
)
PARTIAL = Strategy(
    "partial",
    "Zhichao Huang's case 2: only the slots that the host or the guest has armed, and the guest goes on trapping",
    "armv7",
    triggers=_triggers(Trigger.SLOTS),
    untraps=_triggers(),
    scope=Scope.ARMED,
    host_known=HostKnown.RESERVED,
)
PARTIAL_UNTRAPPED = _changed(
    PARTIAL, "partial-untrapped", "the same without traps, once anything is switched", untraps=_triggers(Trigger.SLOTS)
)
OWNER = Strategy(
    "host-trapping-owner",
    "Will Deacon: trap the host's accesses too, keep the owner, and trap everybody else",
    "armv7",
    triggers=_triggers(Trigger.ACCESSED, Trigger.SLOTS),
    untraps=_triggers(Trigger.ACCESSED, Trigger.SLOTS),
    horizon=Horizon.HOST_TOUCHES,
    leaves=Horizon.HOST_TOUCHES,
    small=Small.QUIET,
    host_known=HostKnown.TRAPPED,
    host_from=HostFrom.RECORD,
)
OWNER_LATE = _changed(
    OWNER, "host-trapping-owner-late", "the same, coming after the breakpoint layer unawares", adopts=False
)
OWNER_GONE = _changed(
    OWNER, "host-trapping-owner-gone", "the same, torn down without giving the registers back", gives_back=False
)

# --- arm64 ------------------------------------------------------------------------------------------------------------

LAZY = Strategy(
    "arm64-lazy",
    'Marc Zyngier, "arm64: KVM: implement lazy world switch for debug registers"',
    "arm64",
    triggers=_triggers(Trigger.WRITTEN, Trigger.MASTER),
    untraps=_triggers(Trigger.WRITTEN, Trigger.MASTER),
    small=Small.EVERY_EDGE,
    counts_read=True,
    saves_unchanged=True,
)
OWNER_STATES = Strategy(
    "arm64-owner",
    'Oliver Upton, "KVM: arm64: Debug cleanups": FREE, GUEST_OWNED, HOST_OWNED',
    "arm64",
    triggers=_triggers(Trigger.ACCESSED, Trigger.MASTER),
    untraps=_triggers(Trigger.ACCESSED, Trigger.MASTER),
    horizon=Horizon.PUT,
    small=Small.EVERY_EDGE,
    saves_unchanged=True,
    os_lock=True,
)

# --- x86 --------------------------------------------------------------------------------------------------------------

SAVED_2009 = Strategy(
    "x86-2009-saved",
    'Jan Kiszka, "HW breakpoints vs. KVM context switches": what KVM did, the host read from the hardware',
    "x86",
    triggers=_triggers(Trigger.SLOTS),
    untraps=_triggers(),
    small=Small.EVERY_EDGE,
)
CACHED_2009 = Strategy(
    "x86-2009-thread-cache",
    "Avi Kivity's idea there: restore from current->thread, which knows a thread's own breakpoints only",
    "x86",
    triggers=_triggers(Trigger.SLOTS),
    untraps=_triggers(),
    host_known=HostKnown.ACTIVE,
    host_from=HostFrom.RECORD,
    host_told=frozenset({ArmedBy.THREAD}),
    status_with_slots=False,
)
CACHED_2009_LAYER = _changed(
    CACHED_2009,
    "x86-2009-layer-cache",
    "Jan Kiszka's request there: restore from the breakpoint layer, which kgdb goes past",
    host_told=frozenset({ArmedBy.THREAD, ArmedBy.KERNEL}),
)
CACHED_2009_TOLD = _changed(
    CACHED_2009, "x86-2009-all-told", "his further request: kgdb tells the layer", host_told=EVERYBODY_TOLD
)
WONT_EXIT = Strategy(
    "x86-wont-exit",
    'KVM x86 today: BP_ENABLED and WONT_EXIT, as "KVM: x86: Allow the guest to run with dirty debug registers" became',
    "x86",
    triggers=_triggers(Trigger.ACCESSED, Trigger.SLOTS),
    untraps=_triggers(Trigger.ACCESSED),
    host_known=HostKnown.ACTIVE,
    host_from=HostFrom.RECORD,
    reruns=True,
    status_with_slots=False,
)
WONT_EXIT_2014 = _changed(
    WONT_EXIT,
    "x86-wont-exit-2014",
    "Paolo Bonzini's patch as posted: BP_ENABLED not computed again, DR6 loaded with the slots and left behind",
    status_with_slots=True,
    status_cleaned=False,
    enabled_recomputed=False,
)
WONT_EXIT_LATE = _changed(
    WONT_EXIT, "x86-sync-late", "today's with the guest's registers read after the host's are back", saves_first=False
)
NEVER_AGAIN = _changed(
    WONT_EXIT,
    "x86-never-again",
    "Radim Krcmar's question: why intercept again at all, without guest debug?",
    horizon=Horizon.FOR_GOOD,
)
NEVER_AGAIN_NAIVE = _changed(
    NEVER_AGAIN,
    "x86-never-again-naive",
    "the same without his pair of operations: nobody intercepts when the VMM begins to debug",
    debug_retraps=False,
)
XEN = Strategy(
    "xen-vmx",
    "Xen, vmx.c: flag_dr_dirty until the vCPU is switched out",
    "x86",
    triggers=_triggers(Trigger.ACCESSED, Trigger.SLOTS),
    untraps=_triggers(Trigger.ACCESSED, Trigger.SLOTS),
    horizon=Horizon.VCPU_SWITCH,
    leaves=Horizon.VCPU_SWITCH,
    host_from=HostFrom.RECORD,
    reruns=True,
)
XEN_NO_SYNC = _changed(
    XEN,
    "xen-no-remote-sync",
    "the same, forgetting that a vCPU's registers may be on another CPU",
    leaves_remotely=False,
)

PRESETS: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        ALWAYS_V7, ALWAYS_ARM64, ALWAYS_X86, ALWAYS_LEAST,
        DIRTY_BIT, DIRTY_BIT_20, FOUR_CASES, FOUR_CASES_LOOPS, FOUR_CASES_HARDWARE,
        BITMAP, BITMAP_LOOPS, BITMAP_HARDWARE,
        PARTIAL, PARTIAL_UNTRAPPED, OWNER, OWNER_LATE, OWNER_GONE,
        LAZY, OWNER_STATES,
        SAVED_2009, CACHED_2009, CACHED_2009_LAYER, CACHED_2009_TOLD,
        WONT_EXIT, WONT_EXIT_2014, WONT_EXIT_LATE, NEVER_AGAIN, NEVER_AGAIN_NAIVE, XEN, XEN_NO_SYNC,
    )
}  # fmt: skip
