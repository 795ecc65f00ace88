"""
What switching costs on this host, measured on a guest of our own.

A price is a difference of two ways to run the same guest, so that what both have in common (this interpreter, the
system call, the loop in the guest) is not in it. The ways are measured in turns, one short round of each, because the
speed of a shared host drifts over seconds by more than most prices. A round's figure is the median of its runs, which
no other thread's turn on the CPU moves; a price is the median over the rounds of the difference within one round, and
its spread the quartiles.

What is measured, and what it says:

- ``KVM_RUN``, an exit for a port and back, with nothing armed; with guest debugging on; with the VMM's breakpoint armed
  (an entry writes DR7 and DR0-3); with 1 to 4 breakpoints of the host on the thread (an exit writes DR0-3, DR6 and DR7,
  however many there are). The two latter divided by five and by six are what one write costs.
- in the guest, over a NOP each: CPUID, which leaves a guest that the CPU executes; a MOV to and from a debug register
  with guest debugging on, when each is trapped; and without, when only the first is.
- Where KVM's emulator executes the guest, none of these leaves anything, and an exit is what KVM_RUN takes beyond one
  that does not enter.

The host's breakpoints are taken by whoever calls, who may ask the daemon for them: this file knows no perf.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from msgspec import Struct

from hwbpd_kvm import guest
from hwbpd_kvm.guest import CODE, CPUID, END, END_AGAIN, NOP, Guest, mov_from_dr, mov_to_dr
from hwbpd_kvm.probe import execution_of_ring_0
from hwbpd_kvm.vcpu import GuestDebug, Kvm
from hwbpd_kvm.x86_view import DR7_RESET, Execution

ROUNDS = 30
RUNS = 100  # KVM_RUNs of a round
INSTRUCTIONS = 64  # of a kind in one run of the guest
INSIDE_RUNS = 9  # such runs of a round

# Takes so many breakpoints on the calling thread until the end of a with statement, or raises OSError.
HostBreakpoints = Callable[[int], AbstractContextManager[object]]
Progress = Callable[[int, int], None]  # rounds done, of how many

_WRITES_OF_AN_ENTRY = 5
_WRITES_OF_AN_EXIT = 6
_UNUSED = 0x5555_0000  # no guest and no host executes anything there


class Measured(Struct, frozen=True):
    """One way to run the guest: nanoseconds for each time, over the rounds."""

    name: str
    median: float
    low: float  # the quartiles
    high: float


class Calibration(Struct, frozen=True):
    """What was measured, and the prices that follow, in nanoseconds."""

    name: str
    source: str
    execution: str  # what executes the guest's ring 0
    measured: tuple[Measured, ...]
    prices: dict[str, Measured]
    notes: tuple[str, ...]

    def price_list(self) -> dict[str, Any]:
        """As ``costs.load`` reads it from JSON."""
        return {
            "name": self.name,
            "architecture": "x86",
            "unit": "ns",
            "source": self.source,
            "prices": {key: round(price.median, 1) for key, price in self.prices.items()},
            "spread": {key: [round(price.low, 1), round(price.high, 1)] for key, price in self.prices.items()},
            "measured": {way.name: [round(n, 1) for n in (way.low, way.median, way.high)] for way in self.measured},
            "notes": list(self.notes),
        }


def calibrate(
    kvm: Kvm,
    host: HostBreakpoints | None = None,
    *,
    rounds: int = ROUNDS,
    runs: int = RUNS,
    progress: Progress = lambda done, of: None,
) -> Calibration:
    """
    Measure; a second or two with the defaults.

    :param host: takes breakpoints on this thread; None leaves out what needs them, with a note.
    :raises OSError: what KVM refuses.
    """
    notes: list[str] = []
    execution = execution_of_ring_0(kvm)
    with _ways(kvm, host, runs, notes) as ways:
        samples: dict[str, list[float]] = {name: [] for name, _ in ways}
        for n in range(rounds):
            for name, once in ways:
                samples[name].append(once())
            progress(n + 1, rounds)
    prices = _prices(samples, execution, notes)
    source = f"measured on {platform.node()}, Linux {platform.release()}, {_cpu_model()}"
    measured = tuple(_summary(name, values) for name, values in samples.items())
    return Calibration(platform.node() or "host", source, execution.value, measured, prices, tuple(notes))


ROUND_TRIP = "KVM_RUN"
DEBUG_ON = "KVM_RUN, guest debug on"
VMM_ARMED = "KVM_RUN, the VMM's breakpoint armed"
NO_ENTRY = "KVM_RUN that does not enter"
IN_GUEST_NOP = "NOP in the guest"
IN_GUEST_CPUID = "CPUID in the guest"
WRITE_TRAPPED = "MOV to DR0 in the guest, guest debug on"
WRITE_FREE = "MOV to DR0 in the guest"
READ_TRAPPED = "MOV from DR0 in the guest, guest debug on"
READ_FREE = "MOV from DR0 in the guest"


def with_host(count: int) -> str:
    """The name of a round trip with so many breakpoints of the host."""
    return f"KVM_RUN, host breakpoints: {count}"


Way = tuple[str, Callable[[], float]]


@contextmanager
def _ways(kvm: Kvm, host: HostBreakpoints | None, runs: int, notes: list[str]) -> Iterator[Sequence[Way]]:
    """Every way to run a guest, each as a function that returns nanoseconds for one time."""
    armed = (_UNUSED, 0, 0, 0, 0, 0, 0, DR7_RESET | 2)
    with Guest(kvm) as plain, Guest(kvm) as debugged, Guest(kvm) as watched, Guest(kvm) as looping, Guest(kvm) as free:
        debugged.vcpu.set_guest_debug(GuestDebug.ENABLE | GuestDebug.SOFTWARE_BREAKPOINTS)
        watched.vcpu.set_guest_debug(GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS, armed)
        looping.vcpu.set_guest_debug(GuestDebug.ENABLE | GuestDebug.SOFTWARE_BREAKPOINTS)
        for machine in (plain, debugged, watched):
            machine.place(END_AGAIN)
            machine.start_at()
        ways: list[Way] = [
            (NO_ENTRY, lambda: _no_entry(plain, runs)),
            (ROUND_TRIP, lambda: _round_trips(plain, runs)),
            (DEBUG_ON, lambda: _round_trips(debugged, runs)),
            (VMM_ARMED, lambda: _round_trips(watched, runs)),
            (IN_GUEST_NOP, lambda: _in_guest(free, NOP)),
            (IN_GUEST_CPUID, lambda: _in_guest(free, CPUID)),
            (WRITE_TRAPPED, lambda: _in_guest(looping, mov_to_dr(0, guest.RSI))),
            (WRITE_FREE, lambda: _in_guest(free, mov_to_dr(0, guest.RSI))),
            (READ_TRAPPED, lambda: _in_guest(looping, mov_from_dr(0, guest.RSI))),
            (READ_FREE, lambda: _in_guest(free, mov_from_dr(0, guest.RSI))),
        ]
        for count in range(1, 5):
            if host is None:
                notes.append("host breakpoints: not measured, nobody was there to take them")
                break
            try:
                with host(count):
                    pass
            except OSError as why:
                notes.append(f"host breakpoints: {count} were not to be had ({why.strerror})")
                break
            ways.append((with_host(count), _armed_round_trips(plain, runs, host, count)))
        yield ways


def _armed_round_trips(machine: Guest, runs: int, host: HostBreakpoints, count: int) -> Callable[[], float]:
    def once() -> float:
        with host(count):
            return _round_trips(machine, runs)

    return once


def _round_trips(machine: Guest, runs: int) -> float:
    run = machine.vcpu.run
    times = []
    for _ in range(runs):
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times)


def _no_entry(machine: Guest, runs: int) -> float:
    machine.vcpu.leave_at_once(True)
    try:
        return _round_trips(machine, runs)
    finally:
        machine.vcpu.leave_at_once(False)


def _in_guest(machine: Guest, instruction: bytes) -> float:
    """Nanoseconds of one such instruction, with its share of entering and leaving the guest."""
    machine.place(instruction * INSTRUCTIONS + END)
    times = []
    for _ in range(INSIDE_RUNS):
        machine.start_at(CODE, rsi=_UNUSED)
        start = time.perf_counter_ns()
        stop = machine.run()
        times.append(time.perf_counter_ns() - start)
        assert isinstance(stop, guest.Ended), stop
    return statistics.median(times) / INSTRUCTIONS


def _prices(samples: dict[str, list[float]], execution: Execution, notes: list[str]) -> dict[str, Measured]:
    """The prices, by the names of the price lists; what this host cannot tell is left out."""
    leaves = (IN_GUEST_CPUID, IN_GUEST_NOP) if execution is Execution.CPU else (ROUND_TRIP, NO_ENTRY)
    prices = {
        "exit": _difference("exit", samples, *leaves),
        "trap": _difference("trap", samples, WRITE_TRAPPED, IN_GUEST_NOP),
    }
    by_entry = _difference("write_register", samples, VMM_ARMED, DEBUG_ON, _WRITES_OF_AN_ENTRY)
    if with_host(1) in samples:
        by_exit = _difference("write_register", samples, with_host(1), ROUND_TRIP, _WRITES_OF_AN_EXIT)
        prices["write_register"] = by_exit
        notes.append(
            f"a write: {by_exit.median:.0f} ns by an exit with a host breakpoint, {by_entry.median:.0f} ns by an entry"
            " with one of the VMM's"
        )
    else:
        prices["write_register"] = by_entry
    if execution is Execution.CPU:
        prices["read_register"] = _difference("read_register", samples, READ_FREE, IN_GUEST_NOP)
    else:
        notes.append("ring 0 is executed by KVM's emulator: a trapped access is no exit of its own, and costs little")
        notes.append("reading a register: not measured, as no guest here reads one")
    return prices


def _difference(price: str, samples: dict[str, list[float]], more: str, less: str, parts: int = 1) -> Measured:
    pairs = zip(samples[more], samples[less], strict=True)
    return _summary(price, [max(0.0, (first - second) / parts) for first, second in pairs])


def _summary(name: str, values: Sequence[float]) -> Measured:
    if len(values) < 2:
        return Measured(name, values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Measured(name, median, low, high)


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return os.uname().machine
