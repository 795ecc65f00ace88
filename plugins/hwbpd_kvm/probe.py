"""
What this host's KVM can do with debug registers, found out by doing it on a guest of our own.

A KVM that offers KVM_CAP_SET_GUEST_DEBUG may still never report a data breakpoint: one that emulates the guest's
instructions knows none, and one below another hypervisor has what that lets through. What the interface says is no
measure, so each ability is tried once, in the guest's ring 0 and ring 3, on a fresh vCPU. An ability *works* if what
came is what the architecture manual says of a CPU; what came otherwise is kept in words, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from msgspec import Struct

from hwbpd_kvm import guest, x86_view
from hwbpd_kvm.guest import CODE, DATA, END, NOP, Guest, Raised, Stop, mov_from_dr, mov_to_dr
from hwbpd_kvm.vcpu import DebugExit, DebugRegisters, GuestDebug, Kvm, OtherExit
from hwbpd_kvm.x86_view import DR6_RESET, DR7_RESET, Execution

_HARDWARE = GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS
_STEP = GuestDebug.ENABLE | GuestDebug.SINGLE_STEP
_INT3 = b"\xcc"
_OTHER = 0x5555_0000  # an address that nobody uses


class Finding(Struct, frozen=True):
    """One ability in one ring of the guest, and what came of trying it."""

    ability: str
    ring: int
    works: bool
    found: str


class Report(Struct, frozen=True):
    """All that was found."""

    ring_0: str  # what executes it
    ring_3: str
    findings: tuple[Finding, ...]


class _Case(NamedTuple):
    """One thing to try: what is set up, what is run, and what a CPU does."""

    ability: str
    code: bytes
    expected: Callable[[Stop, Guest], bool]
    flags: int = 0
    words: tuple[int, ...] = ()
    own: DebugRegisters | None = None
    rflags: int = guest.FIXED
    cr4: int = guest.PAE
    rax: int = 0
    rings: tuple[int, ...] = (0, 3)


def probe(kvm: Kvm) -> Report:
    """Try everything; a few milliseconds for each ability."""
    findings = [_try(kvm, case, ring) for case in _cases() for ring in case.rings]
    return Report(_execution(kvm, 0), _execution(kvm, 3), tuple(findings))


def execution_of_ring_0(kvm: Kvm) -> Execution:
    """
    What executes the guest's ring 0.

    A store is watched by the VMM, which a CPU reports and KVM's emulator does not.
    """
    with Guest(kvm) as machine:
        _watch_a_store(machine, ring=0)
        return Execution.CPU if isinstance(machine.run(), DebugExit) else Execution.EMULATOR


def _execution(kvm: Kvm, ring: int) -> str:
    """
    In words. Where no data breakpoint is reported, an execution breakpoint may be: that is the emulator.

    Where neither is, the CPU executes, and KVM does not load the registers for it.
    """
    with Guest(kvm) as machine:
        _watch_a_store(machine, ring)
        if isinstance(machine.run(), DebugExit):
            return Execution.CPU.value
    with Guest(kvm) as machine:
        machine.place(NOP + END)
        machine.vcpu.set_guest_debug(_HARDWARE, (CODE, 0, 0, 0, 0, 0, 0, _dr7(0, 0, 0)))
        machine.start_at(ring=ring)
        if isinstance(machine.run(), DebugExit):
            return Execution.EMULATOR.value
    return "the CPU, without debug registers"


def _watch_a_store(machine: Guest, ring: int) -> None:
    machine.place(guest.store(DATA, 4) + END)
    machine.vcpu.set_guest_debug(_HARDWARE, (DATA, 0, 0, 0, 0, 0, 0, _dr7(0, 1, 4)))
    machine.start_at(ring=ring)


def _try(kvm: Kvm, case: _Case, ring: int) -> Finding:
    with Guest(kvm) as machine:
        machine.place(case.code)
        machine.set_cr4(case.cr4)
        if case.own is not None:
            machine.vcpu.set_debug_registers(case.own)
        if case.flags:
            machine.vcpu.set_guest_debug(case.flags, case.words)
        machine.start_at(ring=ring, rflags=case.rflags, rax=case.rax)
        stop = machine.run()
        return Finding(case.ability, ring, case.expected(stop, machine), told(stop))


def _cases() -> Iterator[_Case]:
    for n in range(4):
        addresses = [CODE + 1 if other == n else _OTHER for other in range(4)]
        words = (*addresses, 0, 0, 0, _dr7(n, 0, 0))
        yield _Case(f"VMM: execution breakpoint in DR{n}", NOP * 3 + END, _vmm(CODE + 1, 1 << n), _HARDWARE, words)
    for access, name, code in (
        (1, "a watched store", guest.store(DATA + 4, 4)),
        (3, "a watched load", guest.load(DATA + 4, 4)),
    ):
        words = (_OTHER, DATA + 4, 0, 0, 0, 0, 0, _dr7(1, access, 4))
        yield _Case(f"VMM: {name}", code + END, _vmm(CODE + len(code), 2), _HARDWARE, words)
    yield _Case("VMM: single step", NOP * 2 + END, _vmm(CODE + 1, x86_view.BS), _STEP)
    detect = (0, 0, 0, 0, 0, 0, 0, DR7_RESET | x86_view.GD)
    read = mov_from_dr(0, guest.RAX)
    yield _Case("VMM: DR7.GD", read + END, _vmm(CODE, x86_view.BD), _HARDWARE, detect, rings=(0,))
    software = GuestDebug.ENABLE | GuestDebug.SOFTWARE_BREAKPOINTS
    yield _Case("VMM: INT3", NOP + _INT3 + END, lambda stop, _: _is_int3(stop), software)
    mine = DebugRegisters((_OTHER, _OTHER, CODE + 1, _OTHER), DR6_RESET, _dr7(2, 0, 0))
    yield _Case("guest: execution breakpoint", NOP * 3 + END, _guests(CODE + 1, 4), own=mine)
    mine = DebugRegisters((DATA, _OTHER, _OTHER, _OTHER), DR6_RESET, _dr7(0, 1, 4))
    store = guest.store(DATA, 4)
    yield _Case("guest: a watched store", store + END, _guests(CODE + len(store), 1), own=mine)
    yield _Case("guest: single step", NOP * 2 + END, _guests(CODE + 1, x86_view.BS), rflags=guest.TF)
    mine = DebugRegisters((0, 0, 0, 0), DR6_RESET, DR7_RESET | x86_view.GD)
    yield _Case("guest: DR7.GD", read + END, _guests(CODE, x86_view.BD), own=mine, rings=(0,))
    wide = mov_to_dr(7, guest.RAX)
    yield _Case("guest: #GP for an upper half of DR7", wide + END, _fault(guest.GP), rax=1 << 40, rings=(0,))
    aliased = mov_from_dr(5, guest.RAX)
    yield _Case("guest: #UD for DR5 with CR4.DE", aliased + END, _fault(guest.UD), cr4=guest.PAE | guest.DE, rings=(0,))
    yield _Case("guest: #GP for MOV DR in ring 3", read + END, _fault(guest.GP), rings=(3,))
    words = (CODE + 9, 0, 0, 0, 0, 0, 0, _dr7(0, 0, 0))
    apart = mov_to_dr(1, guest.RAX) + mov_from_dr(0, guest.RCX) + END
    yield _Case("guest's and VMM's sets kept apart", apart, _kept_apart, _HARDWARE, words, rax=_OTHER, rings=(0,))


def _dr7(slot: int, access: int, length_bytes: int) -> int:
    """DR7 with one slot armed; length 0 for an execution breakpoint."""
    length = {0: 0, 1: 0, 2: 1, 8: 2, 4: 3}[length_bytes]
    return DR7_RESET | 2 << 2 * slot | access << (16 + 4 * slot) | length << (18 + 4 * slot)


def _vmm(pc: int, reason: int) -> Callable[[Stop, Guest], bool]:
    def expected(stop: Stop, _machine: Guest) -> bool:
        return isinstance(stop, DebugExit) and stop[:3] == (x86_view.DB, pc, DR6_RESET | reason)

    return expected


def _guests(rip: int, reason: int) -> Callable[[Stop, Guest], bool]:
    def expected(stop: Stop, machine: Guest) -> bool:
        met = isinstance(stop, Raised) and (stop.vector, stop.frame.rip) == (guest.DB, rip)
        return met and machine.vcpu.debug_registers().dr6 == DR6_RESET | reason

    return expected


def _fault(vector: int) -> Callable[[Stop, Guest], bool]:
    return lambda stop, _machine: isinstance(stop, Raised) and (stop.vector, stop.frame.rip) == (vector, CODE)


def _is_int3(stop: Stop) -> bool:
    return isinstance(stop, DebugExit) and (stop.exception, stop.pc) == (x86_view.BP, CODE + 1)


def _kept_apart(stop: Stop, machine: Guest) -> bool:
    """It ran to its end, has what it wrote and nothing else, and read its own DR0."""
    written = DebugRegisters((0, _OTHER, 0, 0), DR6_RESET, DR7_RESET)
    vcpu = machine.vcpu
    return isinstance(stop, guest.Ended) and vcpu.debug_registers() == written and vcpu.registers().rcx == 0


def told(stop: Stop) -> str:
    """What stopped the guest, in words."""
    match stop:
        case guest.Ended():
            return "it ran to its end"
        case Raised(vector, frame):
            return f"exception {vector} in the guest at {frame.rip:#x}"
        case DebugExit(exception, pc, dr6, dr7):
            return f"KVM_EXIT_DEBUG: exception {exception} at {pc:#x}, DR6 {dr6:#x}, DR7 {dr7:#x}"
        case OtherExit(17, 1):  # KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION
            return "KVM gave up: its emulator does not know the instruction"
        case OtherExit(reason, detail):
            return f"KVM gave up: exit reason {reason}, detail {detail}"
    return str(stop)
