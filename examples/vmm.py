"""
A VMM of one vCPU whose four slots a debugger's stub and a fuzzer contend for, through the daemon.

    python examples/vmm.py [--socket PATH]        needs /dev/kvm, and hwbpd running; takes no slot of the host

Three parties, each with a session of its own, here in one process to have it on one screen:

- the VMM has a guest that runs through a row of NOPs, registers its vCPU, loads what it is told before each entry, and
  tells of the breakpoints that stop the guest;
- the fuzzer wants to know which of the NOPs are reached (kind "background"), and takes all four slots;
- the stub wants breakpoints (kind "ptrace"), so two of the fuzzer's claims give way until it is gone.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

import hwbp
from hwbp.kvm import Kvm, VcpuThread, what_is_missing
from hwbpd_kvm.guest import CODE, END, NOP, Ended, Guest
from hwbpd_kvm.vcpu import DebugExit, GuestDebug

PLACES: Final = tuple(CODE + n for n in range(6))  # each a NOP
SLOTS: Final = 4
WAIT_S: Final = 10.0
_B0_TO_B3: Final = 0xF
_BREAKPOINTS: Final = GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS


class Vmm:
    """A guest, its vCPU at the daemon, and the loop that runs it; a context manager."""

    def __init__(self, client: hwbp.Client, kvm: Kvm) -> None:
        self.guest = Guest(kvm)
        self.guest.place(NOP * len(PLACES) + END)
        self.vcpu = client.vm("six nops").vcpu(0, strategy="x86-wont-exit")
        self.thread = VcpuThread(client.thread(), vcpu=self.vcpu)

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *_: object) -> None:
        self.guest.close()

    def settle(self, places: Collection[int]) -> None:
        """
        Wait until what it is told is to have breakpoints in these places, and in no others.

        :raises TimeoutError: when that is not so for long.
        """
        while {slot.address for slot in self.vcpu.loaded.slots} != set(places):
            if not self.vcpu.load(self._write, timeout=WAIT_S):
                raise TimeoutError(f"it was told nothing more than {self.vcpu.loaded}")

    def lap(self) -> list[int]:
        """Run the guest once through its code; return where breakpoints stopped it."""
        self.guest.start_at(CODE)
        stopped: list[int] = []
        while True:
            self.vcpu.load(self._write)
            with self.thread.guest():
                why = self.guest.run()
            match why:
                case Ended():
                    return stopped
                case DebugExit(pc=pc, dr6=dr6):
                    stopped.append(pc)
                    self.vcpu.hit([n for n in range(SLOTS) if dr6 & _B0_TO_B3 & 1 << n], pc)
                    self._step_over()
                case _:
                    raise RuntimeError(f"the guest stopped, and nobody knows what for: {why}")

    def _write(self, wanted: hwbp.Contents) -> None:
        words = tuple(wanted.registers.get(f"DR{n}", 0) for n in range(8))
        self.guest.vcpu.set_guest_debug(_BREAKPOINTS if wanted.slots else 0, words)

    def _step_over(self) -> None:
        """Execute the instruction that has the breakpoint without it, and put it back."""
        self.guest.vcpu.set_guest_debug(GuestDebug.ENABLE | GuestDebug.SINGLE_STEP)
        with self.thread.guest():
            self.guest.run()
        self._write(self.vcpu.loaded)


def contend(connect: Callable[[str], hwbp.Client], vmm: Vmm) -> list[tuple[str, int, int]]:
    """
    Let the stub and the fuzzer contend for the vCPU's slots.

    :return: for each lap, what it was and how many hits the fuzzer and the stub had of it.
    """
    laps: list[tuple[str, int, int]] = []
    with connect("fuzzer") as fuzzer:
        coverage = [
            fuzzer.claim(hwbp.Event(place, None, "x"), vcpu=vmm.vcpu.vcpu_id, kind="background", label="coverage")
            for place in PLACES[:SLOTS]
        ]

        def lap(what: str, places: Sequence[int], stub: hwbp.Client | None = None) -> None:
            vmm.settle(places)
            stopped = vmm.lap()
            had = _hits([fuzzer] if stub is None else [fuzzer, stub], len(stopped))
            print(f"{what}: stopped at {', '.join(map(hex, stopped))}; hits of the fuzzer and the stub: {had}")
            laps.append((what, *had))

        lap("the fuzzer alone", PLACES[:SLOTS])
        with connect("stub") as stub:
            for place in PLACES[SLOTS:]:
                watch = stub.claim(
                    hwbp.Event(place, None, "x"), vcpu=vmm.vcpu.vcpu_id, kind="ptrace", label="breakpoint", wait=WAIT_S
                )
                print(f"stub: has {watch.event}")
            lap("the stub has two", (*PLACES[:2], *PLACES[SLOTS:]), stub)
            print(f"fuzzer: {', '.join(watch.state for watch in coverage)}")
        lap("the stub is gone", PLACES[:SLOTS])
    return laps


def _hits(clients: Sequence[hwbp.Client], wanted: int) -> tuple[int, int]:
    """Read until there were so many in all; return how many each of two had."""
    had, deadline = [0, 0], time.monotonic() + WAIT_S
    while sum(had) < wanted and time.monotonic() < deadline:
        for n, client in enumerate(clients):
            had[n] += sum(1 for _ in client.hits(timeout=0.01))
    return had[0], had[1]


def main() -> None:
    """Run all of it against a daemon."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", default=None, help="where the daemon listens")
    socket = parser.parse_args().socket
    missing = what_is_missing()
    if missing is not None or os.uname().machine != "x86_64":
        raise SystemExit(missing or "the guest is x86-64 code")
    with Kvm() as kvm, hwbp.connect(socket, name="vmm") as client, Vmm(client, kvm) as vmm:
        contend(lambda name: hwbp.connect(socket, name=name), vmm)


if __name__ == "__main__":
    main()
