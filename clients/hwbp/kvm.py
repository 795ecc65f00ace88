"""
For VMMs: asking at each guest entry, and what a switch strategy orders there; and what this host's KVM can do and at
which price.

    client = hwbp.connect()
    os.sched_setaffinity(0, {cpu})
    vcpu = VcpuThread(client.thread(), cpu)            # in the thread that runs the vCPU
    while running:
        with vcpu.guest() as entry:
            if entry.answer:                           # yes, or unknown
                put_the_debug_registers_away()
            fcntl.ioctl(fd, KVM_RUN, 0)
        if not entry.stood:
            ...                                        # a slot was armed or disarmed meanwhile, somewhere

A breakpoint may be armed between the question and the entry, and nobody but the kernel can shut that gap. So the page's
count of changes is looked at before the question and after the exit: where it is the same, the answer stood for the
whole run. The count is the host's, of all CPUs: one that differs says that it may not have stood.

With a strategy, the entry also has the ordered actions of the switch engine, with the answer of the page as what
hw_breakpoint_enabled said. They are for VMMs that keep debug registers themselves; the kernel's KVM switches its own.

This is the one file of the library that shares code with the daemon's side: the engine is a plugin, ``hwbpd_kvm``, and
runs in the VMM's process.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Final

from hwbp.client import Client
from hwbp.errors import HwbpError
from hwbp.status_page import CHANGES_AT, Answer, Thread
from hwbp.vmm import Vcpu
from hwbpd_kvm.actions import Action, Kind, Place
from hwbpd_kvm.calibrate import Calibration, HostBreakpoints, Measured, Progress, calibrate
from hwbpd_kvm.compare import (
    MODELS,
    DrExits,
    Model,
    Row,
    SeedFigure,
    Standing,
    all_standings,
    compare,
    forty_percent,
    model_of,
    replay,
    seed_figures,
)
from hwbpd_kvm.costs import PRICED
from hwbpd_kvm.costs import load as load_prices
from hwbpd_kvm.isolation import main as check_isolation
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.probe import Finding, Report, probe
from hwbpd_kvm.switch import Switch
from hwbpd_kvm.traces import LAYOUTS, from_tracepoints, parse
from hwbpd_kvm.vcpu import Kvm, what_is_missing
from hwbpd_kvm.workloads import WORKLOADS

REPORT_NS: Final = 1_000_000_000
_MOVES: Final = frozenset({Kind.READ, Kind.WRITE})
_OWNERS: Final[dict[Place | None, str]] = {Place.GUEST: "guest", Place.VMM: "vmm"}

__all__ = [
    "LAYOUTS",
    "MODELS",
    "PRESETS",
    "PRICED",
    "WORKLOADS",
    "Action",
    "Calibration",
    "DrExits",
    "Entry",
    "Finding",
    "HostBreakpoints",
    "Kvm",
    "Measured",
    "Model",
    "Progress",
    "Report",
    "Row",
    "SeedFigure",
    "Standing",
    "Switch",
    "Tally",
    "VcpuThread",
    "all_standings",
    "calibrate",
    "check_isolation",
    "compare",
    "forty_percent",
    "from_tracepoints",
    "host_breakpoints",
    "load_prices",
    "model_of",
    "parse",
    "probe",
    "replay",
    "seed_figures",
    "what_is_missing",
]


class Entry:
    """
    One stay in the guest: what was answered before it, and, once it is over, whether that stood.

    A vCPU has one, used for every stay: what is wanted of it is read before the next begins.
    """

    __slots__ = ("_before", "_cpu", "_switch", "_tally", "_thread", "actions", "after", "answer", "stood")

    def __init__(self, thread: Thread, cpu: int | None, switch: Switch | None, tally: Tally | None) -> None:
        self._thread = thread
        self._cpu = cpu
        self._switch = switch
        self._tally = tally
        self._before = 0
        self.answer = Answer.UNKNOWN
        self.actions: tuple[Action, ...] = ()  # ordered before the entry
        self.after: tuple[Action, ...] = ()  # and after the exit
        self.stood = False

    def __enter__(self) -> Entry:
        thread = self._thread
        self._before = thread.page.words[CHANGES_AT]
        self.answer = thread.enabled(self._cpu)
        if self._switch is not None:
            self.actions = self._switch.enter(bool(self.answer))
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        if self._switch is not None:
            if self._tally is not None:
                self._tally.inside = self._switch.world.vcpu.loaded
            self.after = self._switch.leave()
        self.stood = self.answer is not Answer.UNKNOWN and self._thread.page.words[CHANGES_AT] == self._before
        if self._tally is not None:
            self._tally.stayed(self)


class Tally:
    """
    What a vCPU has done so far, told to the daemon every ``REPORT_NS``.

    ``traps`` are for the VMM to count where it keeps no strategy: only it knows which exits were accesses.
    """

    __slots__ = ("_due_ns", "_switch", "_vcpu", "entries", "inside", "switches", "traps")

    def __init__(self, vcpu: Vcpu, switch: Switch | None) -> None:
        self._vcpu = vcpu
        self._switch = switch
        self._due_ns = 0
        self.inside: Place | None = None  # whose set the registers held when the guest was left, by the strategy
        self.entries = self.switches = self.traps = 0

    def stayed(self, entry: Entry) -> None:
        """The vCPU has been in the guest."""
        self.entries += 1
        self.switches += any(action.kind in _MOVES for action in entry.actions)
        if self._switch is not None:
            self.traps = self._switch.traps
        now_ns = time.monotonic_ns()
        if now_ns >= self._due_ns:
            self._due_ns = now_ns + REPORT_NS
            self._vcpu.report(self.entries, self.switches, self.traps, self.owner)

    @property
    def owner(self) -> str:
        """Whose registers were in force in the guest: the VMM's, where it has loaded any; else as the strategy says."""
        if self._vcpu.loaded.slots:
            return "vmm"
        if self._switch is None:
            return ""
        return _OWNERS.get(self.inside, "host")


class VcpuThread:
    """
    The thread that runs a vCPU.

    :param thread: its handle, from ``Client.thread`` called in it. When the session is over every answer is UNKNOWN,
        until ``Client.register`` of another one.
    :param cpu: where it is pinned; None if it is not, which costs a system call for each question.
    :param switch: the strategy that keeps the vCPU's debug registers, if the VMM does that itself.
    :param vcpu: the vCPU, from ``Vm.vcpu``: its stays are counted then (``tally``), and told to the daemon once a
        second at the end of one. It is of a client that this thread uses.
    """

    def __init__(
        self, thread: Thread, cpu: int | None = None, switch: Switch | None = None, vcpu: Vcpu | None = None
    ) -> None:
        self.thread = thread
        self.switch = switch
        self.tally = None if vcpu is None else Tally(vcpu, switch)
        self._entry = Entry(thread, cpu, switch, self.tally)

    def guest(self) -> Entry:
        """Return the next stay in the guest, for a with statement around KVM_RUN."""
        return self._entry


def host_breakpoints(client: Client) -> HostBreakpoints:
    """
    Return how ``calibrate`` gets breakpoints of the host on the calling thread: as claims, which others can see.

    What they watch nobody writes.
    """
    words = (ctypes.c_uint64 * 4)()
    address, tid = ctypes.addressof(words), threading.get_native_id()

    @contextmanager
    def hold(count: int) -> Iterator[None]:
        with ExitStack() as held:
            try:
                for n in range(count):
                    watched = address + 8 * n
                    watch = client.claim(
                        address=watched, length=8, access="w", tid=tid, delivery="count", label="kvm calibrate"
                    )
                    held.enter_context(watch)
            except HwbpError as why:
                raise OSError(why.errno, str(why)) from why
            yield

    return hold
