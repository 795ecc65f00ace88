"""
CPUs that come and go. This really takes one offline, which disturbs everybody on the host: it runs only if asked for,

    python -m pytest -m hotplug tests/hardware/test_hotplug.py

and brings the CPU back whatever happens.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from examples.target import Target
from hwbpd.core.model import Target as Where
from hwbpd.hookspecs import ArmError
from hwbpd_linux.cpus import online_cpus
from hwbpd_linux.machine import LinuxMachine
from tests.hardware.common import COUNT, HITS, HOLD, drain_all, piece
from tests.host import free_slots

SWITCH = Path("/sys/devices/system/cpu")

pytestmark = [pytest.mark.hardware, pytest.mark.hotplug]


@pytest.fixture
def cpu(alone: None) -> Iterator[int]:
    """A CPU that can be taken offline, online at the start and in the end."""
    switchable = [cpu for cpu in online_cpus()[1:] if os.access(SWITCH / f"cpu{cpu}" / "online", os.W_OK)]
    if not switchable:
        pytest.skip("no CPU of this host can be taken offline by this process")
    yield switchable[-1]
    assert switchable[-1] in online_cpus()


@contextmanager
def offline(cpu: int) -> Iterator[None]:
    switch = SWITCH / f"cpu{cpu}" / "online"
    switch.write_text("0")
    try:
        yield
    finally:
        switch.write_text("1")


def run_on(target: Target, cpu: int, order: str) -> None:
    os.sched_setaffinity(target.tid, {cpu})
    target.command(order)
    os.sched_setaffinity(target.tid, set(online_cpus()))


def test_a_cpu_that_goes_or_comes_is_announced(machine: LinuxMachine, cpu: int) -> None:
    fd = machine.topology_descriptor()
    assert fd is not None
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        machine.topology_changed()
        assert epoll.poll(0) == []

        with offline(cpu):
            while cpu in machine.topology().online:
                assert epoll.poll(10)
                machine.topology_changed()
            assert epoll.poll(10)
            machine.topology_changed()
            assert cpu in machine.topology().possible

        assert epoll.poll(10)
        machine.topology_changed()
        assert cpu in machine.topology().online


def test_a_cpu_wide_claim_loses_a_leg_without_its_hits_and_takes_it_again(
    machine: LinuxMachine, target: Target, cpu: int
) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(), HITS)
    free = free_slots()
    run_on(target, cpu, "write 25")

    with offline(cpu):
        machine.drop_cpu(1, cpu)
        machine.drop_cpu(1, cpu)
        target.command("write 5")
        assert machine.totals(1).hits == 30
        with pytest.raises(ArmError) as refused:
            machine.add_cpu(1, cpu)
        assert (refused.value.errno, refused.value.cpu) == (errno.ENODEV, cpu)
    assert drain_all(machine, 1).hits == 30
    machine.add_cpu(1, cpu)
    machine.add_cpu(1, cpu)
    assert free_slots() == free
    run_on(target, cpu, "write 12")

    batch, totals = machine.disarm(1)
    assert (batch.hits, batch.lost, totals.hits, totals.lost) == (12, 0, 42, 0)


def test_a_dropped_leg_is_free_when_its_cpu_is_back(machine: LinuxMachine, target: Target, cpu: int) -> None:
    free_before = free_slots()
    machine.arm(1, piece(target.variable, "w"), Where(cpus=(cpu,)), HOLD)

    with offline(cpu):
        machine.drop_cpu(1, cpu)

    assert free_slots() == free_before
    machine.add_cpu(1, online_cpus()[0])  # where it does not belong
    assert free_slots() == free_before
    machine.add_cpu(1, cpu)
    assert free_slots() != free_before


def test_a_claim_that_was_silent_stays_so_on_a_cpu_that_comes_back(
    machine: LinuxMachine, target: Target, cpu: int
) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(), msgspec.structs.replace(COUNT, fuse_hits=10))
    machine.silence(1)

    with offline(cpu):
        machine.drop_cpu(1, cpu)
    machine.add_cpu(1, cpu)
    run_on(target, cpu, "write 50")

    assert machine.totals(1).hits == 0
    machine.rearm(1, 10)
    run_on(target, cpu, "write 50")
    assert machine.totals(1).hits == 10


def test_a_thread_and_a_process_go_on_when_their_cpu_is_back(machine: LinuxMachine, cpu: int) -> None:
    with Target("--threads", "1") as target:
        task = machine.task(target.tid)
        machine.arm(1, piece(target.variable, "w"), Where(task=task), HITS)
        machine.arm(2, piece(target.variable, "w"), Where(process=task.process), HITS)

        with offline(cpu):
            machine.drop_cpu(2, cpu)
            target.command("write 10")
        machine.add_cpu(2, cpu)
        run_on(target, cpu, "write 7")

        assert drain_all(machine, 1).hits == 17
        assert drain_all(machine, 2).hits == 17
        assert machine.end_of_target(2) is None


def test_a_process_armed_without_a_cpu_is_covered_there_when_it_comes(machine: LinuxMachine, cpu: int) -> None:
    with Target("--threads", "2") as target:
        with offline(cpu):
            machine.arm(1, piece(target.variable, "w"), Where(process=machine.process(target.pid)), HITS)
            target.command("grow 2")

        machine.add_cpu(1, cpu)
        for tid in target.tids:
            os.sched_setaffinity(tid, {cpu})
        target.command("write 10")
        target.command("spawn 2")

        assert drain_all(machine, 1).hits == 42
        assert machine.disarm(1)[1].hits == 42
