"""
A real vCPU: the VMM's breakpoints, the guest's own, and the host's beside them.

What is expected comes from ``x86_view`` for the way in which this host executes a guest's ring 0; the random comparison
of the two is tests/judges/vcpu.py.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from hwbp import Answer
from hwbp.kvm import VcpuThread, calibrate, host_breakpoints
from hwbpd_kvm import guest, x86_view
from hwbpd_kvm.guest import CODE, DATA, END, NOP, Ended, Guest, Raised
from hwbpd_kvm.probe import execution_of_ring_0, probe
from hwbpd_kvm.vcpu import DebugExit, DebugRegisters, GuestDebug, Halted, Interrupted, IoExit, Kvm, what_is_missing
from hwbpd_kvm.x86_view import Cpu, Execution, Instruction, View
from hwbpd_linux import perf_event
from hwbpd_linux.cpus import online_cpus
from tests.hardware.daemon import Daemon

pytestmark = [
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="this guest is x86-64; run it on such a host"),
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or ""),
]

DAEMON = pytest.mark.skipif(os.geteuid() != 0, reason="a daemon on real registers: run the tests as root")

HARDWARE = GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS
STEP = GuestDebug.ENABLE | GuestDebug.SINGLE_STEP
READ_WRITE = 3  # HW_BREAKPOINT_RW
EXCLUDE_HOST, EXCLUDE_GUEST = 1 << 19, 1 << 20  # of perf_event_attr


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    with Kvm() as kvm:
        yield kvm


@pytest.fixture(scope="module")
def execution(kvm: Kvm) -> Execution:
    return execution_of_ring_0(kvm)


@pytest.fixture
def machine(kvm: Kvm) -> Iterator[Guest]:
    with Guest(kvm) as machine:
        yield machine


# --- the VMM's breakpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", range(4))
def test_an_execution_breakpoint_of_the_vmm_stops_before_the_instruction(
    machine: Guest, execution: Execution, slot: int
) -> None:
    # Given four instructions, and a breakpoint on the one with the number of the slot,
    pc = CODE + slot
    words = (*(pc if n == slot else 0 for n in range(4)), 0, 0, 0, x86_view.DR7_RESET | 2 << 2 * slot)
    machine.place(NOP * 4 + END)
    machine.vcpu.set_guest_debug(HARDWARE, words)
    machine.start_at()

    # when the guest runs,
    stop = machine.run()

    # then the VMM is told as the model says, with this slot's bit,
    view, cpu = x86_view.set_guest_debug(View(), Cpu(pc), HARDWARE, words)
    assert stop == x86_view.execute(view, cpu, Instruction(1), execution).stop
    assert isinstance(stop, DebugExit)
    assert (stop.pc, stop.dr6) == (pc, x86_view.DR6_RESET | 1 << slot)
    # the instruction is still to come, and without the breakpoint the guest goes on from there.
    assert machine.vcpu.registers().rip == pc
    machine.vcpu.set_guest_debug(0)
    assert machine.run() == Ended()


def test_single_step_stops_behind_every_instruction(machine: Guest) -> None:
    # Given three instructions of one to four bytes,
    machine.place(NOP + guest.mov_to_dr(1, guest.R9) + NOP + END)
    machine.vcpu.set_guest_debug(STEP)
    machine.start_at(r9=DATA)

    # when they are stepped through,
    stops = [machine.run() for _ in range(3)]

    # then there is a stop behind each, the DR6 of which says so and nothing else,
    assert [stop[:3] for stop in stops if isinstance(stop, DebugExit)] == [
        (x86_view.DB, CODE + behind, x86_view.DR6_RESET | x86_view.BS) for behind in (1, 5, 6)
    ]
    # and of the guest's registers only the one that it wrote has changed.
    assert machine.vcpu.debug_registers() == DebugRegisters((0, DATA, 0, 0), x86_view.DR6_RESET, x86_view.DR7_RESET)


def test_the_guests_set_and_the_vmms_are_kept_apart(machine: Guest) -> None:
    # Given a VMM that has all four of its slots armed, far from the guest's code,
    words = (0x5550, 0x5551, 0x5552, 0x5553, 0, 0, 0, x86_view.DR7_RESET | 0xAA)
    machine.vcpu.set_guest_debug(HARDWARE, words)

    # when the guest writes DR0 to DR3 and DR7, and reads all of them back,
    code, registers = b"", {}
    writes = {0: 0x1110, 1: 0x1111, 2: 0x1112, 3: 0x1113, 7: 0x0300}
    for number, value in writes.items():
        registers[f"r{8 + number}"] = value
        code += guest.mov_to_dr(number, 8 + number)
    for number in writes:
        code += guest.mov_from_dr(number, 8 + number)
    machine.place(code + END)
    machine.start_at(**registers)
    assert machine.run() == Ended()

    # then it reads what it wrote, and KVM_GET_DEBUGREGS says the same: none of it is the VMM's.
    after = machine.vcpu.registers()
    assert [after.r8, after.r9, after.r10, after.r11] == [0x1110, 0x1111, 0x1112, 0x1113]
    assert after.r15 == 0x0300 | x86_view.DR7_RESET
    assert machine.vcpu.debug_registers().db == (0x1110, 0x1111, 0x1112, 0x1113)


# --- the guest's own -------------------------------------------------------------------------------------------------


def test_the_guests_own_breakpoint_reaches_its_own_handler(machine: Guest) -> None:
    # Given a guest that arms a breakpoint on an instruction of its own, by MOV,
    code = guest.mov_to_dr(3, guest.RSI) + guest.mov_to_dr(7, guest.RDI)
    at = CODE + len(code) + 1
    machine.place(code + NOP * 3 + END)
    machine.start_at(rsi=at, rdi=2 << 6)

    # when it comes there,
    stop = machine.run()

    # then its handler is entered, and reads the reason from DR6.
    assert isinstance(stop, Raised)
    assert (stop.vector, stop.frame.rip) == (guest.DB, at)
    assert machine.vcpu.debug_registers().dr6 == x86_view.DR6_RESET | 1 << 3


def test_general_detect_traps_the_next_access_and_clears_itself(machine: Guest) -> None:
    # Given a guest that sets DR7.GD,
    code = guest.mov_to_dr(7, guest.RSI)
    machine.place(code + guest.mov_to_dr(0, guest.RDI) + END)
    machine.start_at(rsi=x86_view.GD, rdi=DATA)

    # when it then writes DR0,
    stop = machine.run()

    # then that traps before anything is written; and once in the handler, GD is off,
    assert isinstance(stop, Raised)
    assert (stop.vector, stop.frame.rip) == (guest.DB, CODE + len(code))
    registers = machine.vcpu.debug_registers()
    assert (registers.db[0], registers.dr6) == (0, x86_view.DR6_RESET | x86_view.BD)
    assert registers.dr7 & x86_view.GD == 0
    # so that the same instruction now goes through.
    machine.start_at(stop.frame.rip, rdi=DATA)
    assert machine.run() == Ended()
    assert machine.vcpu.debug_registers().db[0] == DATA


# --- the host's beside them ------------------------------------------------------------------------------------------


class HostWord:
    """A word of this process at the very address that the guest's ``DATA`` has in the guest."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        fixed_noreplace = 0x100000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace
        address = libc.mmap(DATA, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert address == DATA, os.strerror(ctypes.get_errno())
        self._munmap = libc.munmap
        self._word = memoryview((ctypes.c_uint64 * 1).from_address(DATA)).cast("B").cast("Q")

    def write(self) -> None:
        self._word[0] = 1  # a single store

    def close(self) -> None:
        self._word.release()
        assert self._munmap(DATA, mmap.PAGESIZE) == 0


@pytest.fixture
def host_word() -> Iterator[HostWord]:
    word = HostWord()
    yield word
    word.close()


@pytest.mark.parametrize(
    ("cpu_wide", "excluded"),
    [(False, 0), (True, 0), (False, EXCLUDE_HOST), (False, EXCLUDE_GUEST)],
    ids=["on the thread", "cpu-wide", "exclude_host", "exclude_guest"],
)
def test_the_hosts_breakpoints_count_the_host_and_not_the_guest(
    alone: None, machine: Guest, host_word: HostWord, cpu_wide: bool, excluded: int
) -> None:
    """Also where perf is asked to leave out the one or the other: it does not switch breakpoints between worlds."""
    # Given every slot of the host on one word, and a guest that stores to the same address, with sets of its own
    # and of the VMM's in force there,
    armed = x86_view.DR7_RESET | 2 | 0xD << 16
    machine.vcpu.set_debug_registers(DebugRegisters((DATA, 0, 0, 0), x86_view.DR6_RESET, armed))
    machine.vcpu.set_guest_debug(HARDWARE, (CODE, 0, 0, 0, 0, 0, 0, x86_view.DR7_RESET | 2))
    machine.place(guest.store(DATA, 8) + END)
    before = os.sched_getaffinity(0)
    cpu = min(online_cpus())
    os.sched_setaffinity(0, {cpu})
    tid, on = (-1, cpu) if cpu_wide else (0, -1)
    flags = perf_event.PINNED | excluded
    events = [perf_event.open_breakpoint(DATA, 8, READ_WRITE, tid=tid, cpu=on, flags=flags) for _ in range(4)]
    try:
        counted = []
        for _ in range(3):
            # when the guest runs into the VMM's breakpoint, and then through its store,
            machine.vcpu.set_guest_debug(HARDWARE, (CODE, 0, 0, 0, 0, 0, 0, x86_view.DR7_RESET | 2))
            machine.start_at()
            assert isinstance(machine.run(), DebugExit)
            machine.vcpu.set_guest_debug(0)
            machine.start_at()
            machine.run()
            counted.append([perf_event.read_counts(event).hits for event in events])
            # and the host writes once after that,
            host_word.write()
    finally:
        counted.append([perf_event.read_counts(event).hits for event in events])
        for event in events:
            os.close(event)
        os.sched_setaffinity(0, before)
    # then every event of the host has counted the host's stores, and none of the guest's.
    assert counted == [[n] * 4 for n in range(4)]


@DAEMON
def test_a_vcpus_thread_is_told_of_a_claim_before_it_enters(alone: None, machine: Guest) -> None:
    # Given a daemon, and a thread that runs a vCPU on one CPU,
    machine.place(guest.END_AGAIN)
    machine.start_at()
    word, _ = perf_event.own_word()
    before = os.sched_getaffinity(0)
    cpu = min(online_cpus())
    os.sched_setaffinity(0, {cpu})
    try:
        with Daemon() as daemon, daemon.connect() as client:
            vcpu = VcpuThread(client.thread(), cpu)

            def enter() -> tuple[Answer, bool]:
                with vcpu.guest() as entry:
                    assert machine.run() == Ended()
                return entry.answer, entry.stood

            # when a breakpoint is claimed for it, and released, then each entry knows;
            assert enter() == (Answer.NONE, True)
            with client.claim(address=word, length=8, access="w", tid=vcpu.thread.tid, delivery="count"):
                assert enter() == (Answer.YES, True)
            assert enter() == (Answer.NONE, True)
            # and one that is claimed during a stay in the guest is told of after it.
            with vcpu.guest() as entry:
                claim = client.claim(address=word, length=8, access="w", tid=vcpu.thread.tid, delivery="count")
            assert (entry.answer, entry.stood) == (Answer.NONE, False)
            claim.release()
    finally:
        os.sched_setaffinity(0, before)


@DAEMON
def test_a_calibration_takes_the_hosts_breakpoints_from_the_daemon(alone: None, kvm: Kvm) -> None:
    # Given a daemon whose slots are all free, when the host is calibrated,
    with Daemon() as daemon, daemon.connect() as client:
        found = calibrate(kvm, host_breakpoints(client), rounds=3, runs=20)
        left = client.slots()

    # then up to four breakpoints were in force during KVM_RUN, nothing is held any more,
    assert {f"KVM_RUN, host breakpoints: {count}" for count in range(1, 5)} <= {way.name for way in found.measured}
    assert left.resources == ()
    # and the price of a write is one of them, which is more than nothing on every machine.
    assert found.prices["write_register"].median > 0


# --- what runs and what does not -------------------------------------------------------------------------------------


def test_what_this_kvm_cannot_do_is_told_and_fits_how_it_executes(kvm: Kvm, execution: Execution) -> None:
    # When the host is probed,
    report = probe(kvm)

    # then nothing is left out: every ability of the VMM's and the guest's, in the rings where it means something.
    ring_0 = {finding.ability: finding.works for finding in report.findings if finding.ring == 0}
    assert len(report.findings) == len({(finding.ability, finding.ring) for finding in report.findings}) == 28
    assert all(finding.found for finding in report.findings)
    assert report.ring_0 == execution.value
    # A CPU does all of it; the emulator knows no data breakpoints, and none of the VMM's GD.
    missing = {ability for ability, works in ring_0.items() if not works}
    if execution is Execution.CPU:
        assert missing == set()
    else:
        never = {"VMM: a watched store", "VMM: a watched load", "guest: a watched store", "VMM: DR7.GD"}
        assert never <= missing <= never | {"VMM: INT3"}


def test_a_run_ends_for_each_reason_by_its_name(machine: Guest) -> None:
    # Given a guest that writes a port, reads one, and halts,
    machine.place(guest.out(0xF1) + b"\xe4\xf2" + b"\xf4")
    machine.start_at(rax=0x17)

    # when it runs on and on, then each exit says why, and a port that is read gets its answer.
    assert machine.vcpu.run() == IoExit(0xF1, True, b"\x17")
    assert machine.vcpu.run() == IoExit(0xF2, False, b"\0")
    machine.vcpu.answer_read(b"\x2a")
    machine.vcpu.leave_at_once(True)
    assert machine.vcpu.run() == Interrupted()
    machine.vcpu.leave_at_once(False)
    assert machine.vcpu.run() == Halted()
    assert machine.vcpu.registers().rax == 0x2A


def test_a_vm_gives_back_every_descriptor(kvm: Kvm) -> None:
    # Given what is open now,
    before = set(os.listdir("/proc/self/fd"))

    # when a guest comes and goes,
    with Guest(kvm) as machine:
        machine.place(END)
        machine.start_at()
        machine.run()

    # then nothing is left of it.
    assert set(os.listdir("/proc/self/fd")) == before
