"""
What there is to switch, and what can happen to it.

One vCPU, and the CPUs it may run on. Three parties have register sets: the guest (what it believes), the VMM (what it
has set to debug the guest), and, per CPU, the host. The host's exist four times, and most mistakes of the field come
from taking one for another:

- ``host``: what the host wants in force. Nobody can read it; it is what the others are judged by.
- ``record``: what somebody keeps of it in memory (a breakpoint layer's slots, a thread's debugreg, a hypervisor that
  traps the host). It misses whatever that somebody was not told of.
- ``saved``: what a switch has read from the hardware, while the hardware holds another set.
- ``hardware``: the registers themselves.

``Vcpu.loaded`` is the select pointer: whose set the hardware holds instead of the host's.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from hwbpd_kvm.actions import Place

Values = tuple[int, ...]  # of every register, in the order of ``Layout.registers``


class Where(enum.Enum):
    """How near a vCPU is to running."""

    __hash__ = object.__hash__  # worlds are looked up millions of times; Enum's own is a function of Python

    OUT = "put"  # its thread does not run, or does something else
    LOADED = "loaded"  # on a CPU, in the host
    IN = "in the guest"


class ArmedBy(enum.Enum):
    """How the host comes to a breakpoint, which decides who is told of it."""

    THREAD = "thread"  # a ptrace or perf breakpoint of the vCPU's own thread; it is in its thread structure
    KERNEL = "kernel"  # CPU-wide, in the per-CPU slots only
    KGDB = "kgdb"  # in 2009 straight to the registers; today through the breakpoint layer
    STEP = "step"  # ARMv7's mismatch breakpoint to step over a watchpoint, recorded past the end of the loops
    STEP_UNTOLD = "step, untold"  # the same as later kernels do it: straight to the register


class Cpu(Struct, frozen=True):
    """One CPU's registers; see above. ``saved`` is None while nothing is put aside."""

    hardware: Values
    host: Values
    record: Values
    saved: Values | None = None


class Vcpu(Struct, frozen=True):
    """One vCPU between two events."""

    guest: Values
    vmm: Values
    debugging: bool = False  # KVM_SET_GUEST_DEBUG with USE_HW_BP
    os_locked: bool = False  # the guest has set OSLAR_EL1.OSLK (arm64)
    where: Where = Where.OUT
    cpu: int = -1  # while it is loaded
    traps: bool = True  # as last programmed
    touched: bool = False  # DEBUG_DIRTY, WONT_EXIT, GUEST_OWNED: an access of the guest has pulled the trigger
    enabled: bool = False  # BP_ENABLED, where that is a flag kept beside the registers
    loaded: Place | None = None  # GUEST or VMM: whose set the hardware holds
    resident: int = -1  # the CPU whose hardware still holds the guest's set although it has exited
    aside: int = 0  # bitmap of the slots put aside, where not all are
    answer: bool | None = None  # what the query said, where it was asked before the entry


class World(Struct, frozen=True):
    """Everything. ``up``: the hypervisor has been initialised and not been torn down."""

    vcpu: Vcpu
    cpus: tuple[Cpu, ...]
    up: bool = True


class Load(Struct, frozen=True):
    """The vCPU's thread is put on a CPU (vcpu_load). A migration is ``Put`` and ``Load`` elsewhere."""

    cpu: int


class Put(Struct, frozen=True):
    """The vCPU's thread is taken from its CPU, or returns to the VMM (vcpu_put)."""


class Query(Struct, frozen=True):
    """Ask hw_breakpoint_enabled now; the next ``Enter`` believes the answer instead of asking itself."""


class Enter(Struct, frozen=True):
    """Run the guest."""


class Exit(Struct, frozen=True):
    """The guest stops running, for whatever reason but an access to its debug registers."""


class GuestRead(Struct, frozen=True):
    """The guest reads one of its registers."""

    register: str


class GuestWrite(Struct, frozen=True):
    """The guest writes one of its registers."""

    register: str
    value: int


class OsLock(Struct, frozen=True):
    """The guest writes OSLAR_EL1, which always traps."""

    locked: bool


class DebugOn(Struct, frozen=True):
    """KVM_SET_GUEST_DEBUG with USE_HW_BP; ``values`` by register, those left out as after a reset."""

    values: tuple[tuple[str, int], ...]


class DebugOff(Struct, frozen=True):
    """KVM_SET_GUEST_DEBUG without ENABLE."""


class HostArm(Struct, frozen=True):
    """The host arms one of its slots on a CPU; ``control`` is what the slot adds to its control register."""

    cpu: int
    slot: int
    address: int
    control: int
    by: ArmedBy = ArmedBy.KERNEL


class HostDisarm(Struct, frozen=True):
    """The host disarms a slot."""

    cpu: int
    slot: int
    by: ArmedBy = ArmedBy.KERNEL


class OtherVcpu(Struct, frozen=True):
    """Another vCPU is switched in on a CPU; it leaves ``leftover`` in the addresses that nobody has armed."""

    cpu: int
    leftover: int = 0


class Up(Struct, frozen=True):
    """The hypervisor is initialised."""


class Down(Struct, frozen=True):
    """The hypervisor is torn down."""


Event = (
    Load | Put | Query | Enter | Exit | GuestRead | GuestWrite | OsLock | DebugOn | DebugOff | HostArm | HostDisarm
    | OtherVcpu | Up | Down
)  # fmt: skip
