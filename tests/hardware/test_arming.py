"""Slots are taken on all legs or none, are free once given back, and end with their thread."""

from __future__ import annotations

import errno
import os
import resource
import select
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from examples.target import Target
from hwbpd.core.errors import NotSupported, TargetGone
from hwbpd.core.model import Mode, Task
from hwbpd.core.model import Target as Where
from hwbpd.hookspecs import ArmError, Machine, TargetEnd
from hwbpd_linux import perf_event, threads
from hwbpd_linux.cpus import online_cpus, possible_cpus
from hwbpd_linux.machine import LinuxMachine, make
from tests.hardware.common import COUNT, HITS, HOLD, piece
from tests.host import free_slots

pytestmark = pytest.mark.hardware

MODES = [pytest.param(mode, id=mode.delivery.value) for mode in (HITS, COUNT, HOLD)]


@contextmanager
def occupied(cpu: int) -> Iterator[None]:
    """Somebody outside the machine has every data slot of a CPU."""
    held: list[int] = []
    try:
        while True:
            held.append(perf_event.open_breakpoint(0x1000, 4, 2, tid=-1, cpu=cpu))
    except OSError as refusal:
        if refusal.errno != errno.ENOSPC:
            raise
    try:
        yield
    finally:
        for fd in held:
            os.close(fd)


def descriptors_open() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_it_is_a_machine_that_knows_its_cpus(machine: LinuxMachine) -> None:
    assert isinstance(machine, Machine)
    assert machine.facts.architecture == os.uname().machine
    assert machine.facts.features
    assert set(machine.topology().online) == set(range(os.cpu_count() or 0)) & set(machine.topology().possible)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["everywhere", "one cpu", "task", "task on every cpu"])
def test_a_slot_is_free_when_disarm_returns(machine: LinuxMachine, target: Target, form: str, mode: Mode) -> None:
    task = machine.task(target.tid)
    where = {
        "everywhere": Where(),
        "one cpu": Where(cpus=online_cpus()[:1]),
        "task": Where(task=task),
        "task on every cpu": Where(task=task, cpus=online_cpus()),
    }[form]
    free_before, open_before = free_slots(), descriptors_open()

    machine.arm(1, piece(target.variable, "w"), where, mode)

    # A thread's slots count on each CPU it may run on, a CPU's only there.
    taken_on = set(online_cpus()[:1] if form == "one cpu" else online_cpus())
    assert {place: free_before[place] - free for place, free in free_slots().items()} == {
        (cpu, pool): int(cpu in taken_on and pool != "inst") for cpu, pool in free_before
    }
    machine.disarm(1)
    assert (free_slots(), descriptors_open()) == (free_before, open_before)


def test_closing_the_machine_gives_everything_back(alone: None, target: Target) -> None:
    free_before, open_before = free_slots(), descriptors_open()
    machine = make({})
    task = machine.task(target.tid)
    machine.arm(1, piece(target.variable, "w"), Where(), HITS)
    machine.arm(2, piece(target.variable, "rw"), Where(task=task), HITS)
    machine.arm(3, piece(target.variable, "w"), Where(), HOLD)
    machine.arm(4, piece(target.variable, "w"), Where(process=task.process), HITS)

    machine.close()

    assert (free_slots(), descriptors_open()) == (free_before, open_before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("of_task", [False, True])
def test_where_one_leg_is_refused_none_is_kept(
    machine: LinuxMachine, target: Target, of_task: bool, mode: Mode
) -> None:
    task = machine.task(target.tid) if of_task else None
    last = online_cpus()[-1]
    with occupied(last):
        free_before, open_before = free_slots(), descriptors_open()

        with pytest.raises(ArmError) as refused:
            machine.arm(1, piece(target.variable, "w"), Where(task=task, cpus=online_cpus()), mode)

        assert (refused.value.errno, refused.value.cpu) == (errno.ENOSPC, last)
        assert refused.value.tid == (target.tid if of_task else None)
        assert (free_slots(), descriptors_open()) == (free_before, open_before)
    machine.arm(1, piece(target.variable, "w"), Where(task=task, cpus=online_cpus()), mode)


def test_a_claim_that_runs_out_of_descriptors_keeps_none(machine: LinuxMachine, target: Target) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free_before, open_before = free_slots(), descriptors_open()
    where = Where(task=machine.task(target.tid))
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))  # room for one, and a task needs two
    try:
        with pytest.raises(ArmError) as refused:
            machine.arm(1, piece(target.variable, "w"), where, HITS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert refused.value.errno == errno.EMFILE
    assert (free_slots(), descriptors_open()) == (free_before, open_before)


def test_a_cpu_that_does_not_exist_is_named(machine: LinuxMachine, target: Target) -> None:
    absent = possible_cpus()[-1] + 1
    free_before = free_slots()

    with pytest.raises(ArmError) as refused:
        machine.arm(1, piece(target.variable, "w"), Where(cpus=(0, absent)), COUNT)

    assert (refused.value.errno, refused.value.cpu, refused.value.tid) == (errno.ENODEV, absent, None)
    assert free_slots() == free_before


def test_a_thread_that_took_over_a_number_is_not_watched(machine: LinuxMachine, target: Target) -> None:
    earlier = Task(target.tid, machine.task(target.tid).start_ticks - 1)
    free_before, open_before = free_slots(), descriptors_open()

    with pytest.raises(ArmError) as refused:
        machine.arm(1, piece(target.variable, "w"), Where(task=earlier), HITS)

    assert (refused.value.errno, refused.value.cpu, refused.value.tid) == (errno.ESRCH, None, target.tid)
    assert (free_slots(), descriptors_open()) == (free_before, open_before)


def test_a_thread_that_is_replaced_while_it_is_armed_is_let_go(
    machine: LinuxMachine, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = machine.task(target.tid)
    free_before, open_before = free_slots(), descriptors_open()
    monkeypatch.setattr(threads, "read", lambda tid: threads.Stat("S", 0, task.start_ticks + 1))

    with pytest.raises(ArmError) as refused:
        machine.arm(1, piece(target.variable, "w"), Where(task=task), HITS)

    assert (refused.value.errno, refused.value.tid) == (errno.ESRCH, target.tid)
    assert (free_slots(), descriptors_open()) == (free_before, open_before)


def test_a_thread_that_has_exited_is_no_task(machine: LinuxMachine, target: Target) -> None:
    task = machine.task(target.tid)
    target.kill()

    with pytest.raises(TargetGone):
        machine.task(target.tid)
    with pytest.raises(ArmError) as refused:
        machine.arm(1, piece(target.variable, "w"), Where(task=task), COUNT)
    assert refused.value.errno == errno.ESRCH


def test_a_hit_makes_a_descriptor_readable(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(task=machine.task(target.tid)), HITS)
    with select.epoll() as epoll:
        for fd in machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)
        assert epoll.poll(0) == []

        target.command("write 1")
        assert [events for _, events in epoll.poll(10)] == [select.EPOLLIN]
        assert machine.end_of_target(1) is None
        assert machine.drain(1, 4096).hits == 1

        assert epoll.poll(0) == []


def test_asking_for_the_end_of_the_target_takes_no_wakeup_away(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(task=machine.task(target.tid)), HITS)
    with select.epoll() as epoll:
        for fd in machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)
        target.command("write 1")

        assert machine.end_of_target(1) is None

        assert [events for _, events in epoll.poll(10)] == [select.EPOLLIN]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_cpus", [False, True])
def test_the_end_of_a_thread_is_announced_and_its_hits_survive_it(
    machine: LinuxMachine, mode: Mode, on_cpus: bool
) -> None:
    with Target("--threads", "2") as target, select.epoll() as epoll:
        where = Where(task=machine.task(target.tid), cpus=online_cpus() if on_cpus else None)
        machine.arm(1, piece(target.variable, "w"), where, mode)
        for fd in machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)
        target.command("write 12")
        while machine.drain(1, 4096).more:
            pass
        assert not any(events & select.EPOLLHUP for _, events in epoll.poll(0))
        assert machine.end_of_target(1) is None
        target.command("write 30")

        target.command("leave")  # the thread ends, its process does not

        while not any(events & select.EPOLLHUP for _, events in epoll.poll(10)):
            pass
        assert machine.end_of_target(1) is TargetEnd.EXIT
        batch, totals = machine.disarm(1)
        assert totals.hits == (0 if mode is HOLD else 42)
        assert batch.hits == (30 if mode is HITS else 0)


@pytest.mark.parametrize("mode", MODES)
def test_an_exec_is_told_from_an_exit(machine: LinuxMachine, target: Target, mode: Mode) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(task=machine.task(target.tid)), mode)
    target.command("write 8")
    with select.epoll() as epoll:
        for fd in machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)

        target.command("exec")

        while not any(events & select.EPOLLHUP for _, events in epoll.poll(10)):
            pass
    assert machine.end_of_target(1) is TargetEnd.EXEC
    batch, totals = machine.disarm(1)
    assert totals.hits == (0 if mode is HOLD else 8)
    assert batch.hits == (8 if mode is HITS else 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_claim_that_is_to_go_on_across_an_exec_does(machine: LinuxMachine, target: Target, mode: Mode) -> None:
    where = Where(task=machine.task(target.tid))
    machine.arm(1, piece(target.variable, "w"), where, msgspec.structs.replace(mode, across_exec=True))
    free = free_slots()

    target.command("exec")

    assert machine.end_of_target(1) is None
    assert free_slots() == free
    target.kill()
    with select.epoll() as epoll:
        for fd in machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)
        while not any(events & select.EPOLLHUP for _, events in epoll.poll(10)):
            pass
    assert machine.end_of_target(1) is TargetEnd.EXIT


def test_a_cpu_wide_claim_has_no_target_to_lose(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(), HITS)
    machine.arm(2, piece(target.variable, "w"), Where(), COUNT)

    target.kill()

    assert machine.end_of_target(1) is None
    assert len(machine.descriptors(1)) == len(online_cpus())
    assert list(machine.descriptors(2)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving rights up needs them: run the tests as root")
def test_without_the_rights_there_is_no_machine_and_the_remedy_is_said(alone: None) -> None:
    with open("/proc/sys/kernel/perf_event_paranoid", encoding="ascii") as paranoid:
        if int(paranoid.read()) < 1:
            pytest.skip("this host lets everybody watch whole CPUs: set kernel.perf_event_paranoid to 1 or more")
    os.seteuid(65534)
    try:
        with pytest.raises(NotSupported, match="run it as root, or give it CAP_PERFMON"):
            make({})
    finally:
        os.seteuid(0)
