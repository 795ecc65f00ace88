"""A fused claim stops after exactly so many hits, by the kernel's hand: nobody here has to be awake for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import msgspec
import pytest

from examples.target import Target
from hwbpd.core.model import Delivery, Mode, Totals
from hwbpd.core.model import Target as Where
from hwbpd.hookspecs import ArmError
from hwbpd_linux import perf_event
from hwbpd_linux.cpus import online_cpus
from hwbpd_linux.machine import LinuxMachine
from tests.hardware.common import COUNT, HITS, HOLD, decode, drain_all, piece
from tests.host import free_slots

pytestmark = pytest.mark.hardware

REPORTING = [pytest.param(mode, id=mode.delivery.value) for mode in (HITS, COUNT)]


def fused(mode: Mode, hits: int) -> Mode:
    return msgspec.structs.replace(mode, fuse_hits=hits)


def arm(machine: LinuxMachine, target: Target, mode: Mode, cpus: Sequence[int] | None = None) -> None:
    where = Where(task=machine.task(target.tid), cpus=None if cpus is None else tuple(cpus))
    machine.arm(1, piece(target.variable, "w"), where, mode)


@pytest.mark.parametrize("mode", REPORTING)
@pytest.mark.parametrize("hits", [1, 2, 1000])
def test_a_flood_stops_at_the_very_hit(machine: LinuxMachine, target: Target, mode: Mode, hits: int) -> None:
    arm(machine, target, fused(mode, hits))
    assert machine.is_fused(1)

    assert target.command("write 20000")["did"] == 20_000  # and this process only waits for the answer

    assert machine.totals(1) == Totals(hits=hits, lost=0)
    assert drain_all(machine, 1).hits == (hits if mode is HITS else 0)


@pytest.mark.parametrize("mode", REPORTING)
def test_each_top_up_lets_so_many_more_through(machine: LinuxMachine, target: Target, mode: Mode) -> None:
    arm(machine, target, fused(mode, 250))
    target.command("write 200")

    machine.top_up(1, 100)
    machine.top_up(1, 100)
    target.command("write 5000")

    assert machine.totals(1).hits == 450


def test_a_blown_fuse_still_holds_its_slot_and_can_be_replaced(machine: LinuxMachine, target: Target) -> None:
    free_before = free_slots()
    arm(machine, target, fused(HITS, 30))
    held = free_slots()
    assert held != free_before
    target.command("write 100")
    assert free_slots() == held

    machine.rearm(1, 70)
    target.command("write 500")

    assert machine.is_fused(1)
    assert free_slots() == held
    first = drain_all(machine, 1)
    assert (first.hits, machine.totals(1)) == (100, Totals(hits=100, lost=0))
    assert len(decode(first)) == 100
    machine.rearm(1, 11)
    target.command("write 12")
    batch, totals = machine.disarm(1)
    assert (batch.hits, totals) == (11, Totals(hits=111, lost=0))


def test_losses_add_up_over_several_fuses(machine: LinuxMachine, target: Target) -> None:
    page = os.sysconf("SC_PAGESIZE")
    arm(machine, target, msgspec.structs.replace(HITS, ring_bytes=page, fuse_hits=1000))
    drained = lost = 0

    for _ in range(3):
        target.command("write 2000")
        machine.rearm(1, 1000)
        batch = drain_all(machine, 1)
        drained, lost = drained + batch.hits, lost + batch.lost
    target.command("write 2000")

    batch, totals = machine.disarm(1)
    assert totals.hits == drained + batch.hits + totals.lost == 4000
    assert lost + batch.lost == totals.lost == 4 * (1000 - (page - 1) // 48)


def test_what_a_replaced_fuse_has_left_is_handed_over_within_the_budget(machine: LinuxMachine, target: Target) -> None:
    arm(machine, target, fused(HITS, 4000))
    target.command("write 4000")
    machine.rearm(1, 4000)
    target.command("write 5")

    batches = [machine.drain(1, 48)]
    while batches[-1].more:
        batches.append(machine.drain(1, 48))

    assert sum(batch.hits for batch in batches) == 4005
    assert max(len(batch.records) for batch in batches) <= 65536
    times = [hit.time_ns for batch in batches for hit in decode(batch)]
    assert times == sorted(times)


def test_each_leg_has_a_fuse_of_its_own(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(), fused(COUNT, 40))

    for cpu in online_cpus():
        os.sched_setaffinity(target.tid, {cpu})
        target.command("write 100")

    assert machine.totals(1).hits == 40 * len(online_cpus())


def test_a_silenced_claim_is_silent_and_keeps_its_slot(machine: LinuxMachine, target: Target) -> None:
    arm(machine, target, HITS)
    assert not machine.is_fused(1)
    target.command("write 10")
    held = free_slots()

    machine.silence(1)
    machine.top_up(1, 1000)
    target.command("write 10")
    assert (machine.totals(1).hits, free_slots()) == (10, held)
    machine.rearm(1, 0)
    target.command("write 10")

    assert drain_all(machine, 1).hits == 20


def test_a_top_up_does_not_wake_what_was_silenced(machine: LinuxMachine, target: Target) -> None:
    arm(machine, target, fused(HITS, 100))
    machine.silence(1)

    machine.top_up(1, 100)
    target.command("write 50")

    assert machine.totals(1).hits == 0


def test_a_held_slot_has_no_fuse_and_stays_quiet(machine: LinuxMachine, target: Target) -> None:
    arm(machine, target, fused(HOLD, 10))

    machine.top_up(1, 10)
    machine.silence(1)
    machine.rearm(1, 10)
    target.command("write 50")

    assert not machine.is_fused(1)
    assert machine.disarm(1)[1] == Totals()


@pytest.mark.parametrize("delivery", [Delivery.HITS, Delivery.COUNT])
def test_a_slot_that_was_taken_in_between_is_missed_and_its_hits_are_not(
    machine: LinuxMachine, target: Target, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = HITS if delivery is Delivery.HITS else COUNT
    arm(machine, target, fused(mode, 7), online_cpus())
    for cpu in online_cpus():
        os.sched_setaffinity(target.tid, {cpu})
        target.command("write 20")
    open_before = set(os.listdir("/proc/self/fd"))

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as stolen:
        stolen.setattr(perf_event, "open_breakpoint", refuse)
        with pytest.raises(ArmError) as refused:
            machine.rearm(1, 7)

    assert (refused.value.errno, refused.value.tid) == (errno.ENOSPC, target.tid)
    assert len(open_before - set(os.listdir("/proc/self/fd"))) == len(online_cpus())
    batch, totals = machine.disarm(1)
    assert totals == Totals(hits=7 * len(online_cpus()), lost=0)
    assert batch.hits == (totals.hits if delivery is Delivery.HITS else 0)


def test_a_leg_that_the_kernel_has_given_up_counts_what_was_last_known(
    machine: LinuxMachine, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(machine, target, HITS)
    target.command("write 9")
    assert machine.totals(1).hits == 9

    def read_counts(fd: int) -> perf_event.Counts:
        raise OSError(errno.EIO, "the kernel has given this event up")

    monkeypatch.setattr(perf_event, "read_counts", read_counts)
    assert machine.totals(1).hits == 9
    assert drain_all(machine, 1).hits == 9
    assert machine.disarm(1)[1] == Totals(hits=9, lost=0)
