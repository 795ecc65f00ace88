"""A claim on a process sees every thread of it once: those there were, those made meanwhile, and those made later."""

from __future__ import annotations

import errno
import os
import resource
import select
from collections import Counter

import msgspec
import pytest

from examples.target import Target
from hwbpd.core.errors import TargetGone
from hwbpd.core.model import Mode, Process, Totals
from hwbpd.core.model import Target as Where
from hwbpd.hookspecs import ArmError, TargetEnd
from hwbpd_linux.cpus import online_cpus
from hwbpd_linux.machine import LinuxMachine, make
from tests.hardware.common import COUNT, HITS, HOLD, WATCHPOINT_POOL, decode, drain_all, piece
from tests.host import free_slots

pytestmark = pytest.mark.hardware

MODES = [pytest.param(mode, id=mode.delivery.value) for mode in (HITS, COUNT, HOLD)]


def the_process(machine: LinuxMachine, target: Target) -> Where:
    return Where(process=machine.process(target.pid))


def wait_for_the_end(machine: LinuxMachine, resource_id: int) -> TargetEnd:
    """Wait as the daemon does: asleep on the descriptors, then asking."""
    with select.epoll() as epoll:
        for fd in machine.descriptors(resource_id):
            epoll.register(fd, select.EPOLLIN)
        while True:
            end = machine.end_of_target(resource_id)
            if end is not None:
                return end
            assert epoll.poll(20), "the end was not announced"
            drain_all(machine, resource_id)


def test_every_thread_is_seen_and_each_hit_once(machine: LinuxMachine) -> None:
    with Target("--threads", "5") as target:
        machine.arm(1, piece(target.variable, "w"), the_process(machine, target), HITS)

        assert target.command("write 40")["did"] == 200

        hits = decode(drain_all(machine, 1))
        assert Counter(hit.tid for hit in hits) == dict.fromkeys(target.tids, 40)
        assert {hit.pid for hit in hits} == {target.pid}
        assert machine.disarm(1)[1] == Totals(hits=200, lost=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_process_takes_one_slot_and_gives_all_back(machine: LinuxMachine, mode: Mode) -> None:
    with Target("--threads", "4") as target:
        where = the_process(machine, target)
        free_before, open_before = free_slots(), set(os.listdir("/proc/self/fd"))

        machine.arm(1, piece(target.variable, "w"), where, mode)

        assert {place: free_before[place] - free for place, free in free_slots().items()} == {
            place: int(place[1] != "inst") for place in free_before
        }
        target.command("spawn 3")
        machine.disarm(1)
        assert (free_slots(), set(os.listdir("/proc/self/fd"))) == (free_before, open_before)


def test_threads_made_later_are_seen_from_their_first_hit(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_process(machine, target), HITS)

    target.command("grow 6")
    target.command("write 15")

    assert sorted(Counter(hit.tid for hit in decode(drain_all(machine, 1))).values()) == [15] * 6


@pytest.mark.parametrize("round_", range(12))
def test_threads_made_while_legs_are_taken_are_seen_once_each(machine: LinuxMachine, round_: int) -> None:
    """Rounds differ in how far the growth has come, as it goes on by itself."""
    with Target("--threads", "2") as target:
        where = the_process(machine, target)
        target.send("grow 150")
        while len(machine.threads(machine.process(target.pid))) < 2 + round_ * 8:
            pass

        machine.arm(1, piece(target.variable, "w"), where, HITS)

        assert target.answer()["did"] == 152
        target.command("write 3")
        hits_of = Counter(hit.tid for hit in decode(drain_all(machine, 1)))
        assert [count for count in hits_of.values() if count != 3] == []
        assert len(hits_of) == 152
        assert machine.disarm(1)[1].hits == 456


def test_ten_thousand_threads_come_and_go_and_every_hit_counts(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_process(machine, target), HITS)
    machine.arm(2, piece(target.variable, "rw"), the_process(machine, target), COUNT)
    open_before = set(os.listdir("/proc/self/fd"))
    drained = lost = 0

    target.send("spawn 10000")
    with select.epoll() as epoll:
        for fd in machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)
        while not target.has_answered():
            epoll.poll(0.1)
            batch = drain_all(machine, 1)
            drained, lost = drained + batch.hits, lost + batch.lost

    assert target.answer()["did"] == 10_000
    assert set(os.listdir("/proc/self/fd")) == open_before
    assert machine.end_of_target(1) is None
    batch, totals = machine.disarm(1)
    assert (drained + batch.hits, lost + batch.lost) == (10_000, 0)
    assert totals == Totals(hits=10_000, lost=0)
    assert machine.disarm(2)[1].hits == 10_000


def test_a_forked_child_is_not_of_the_process(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_process(machine, target), HITS)

    target.command("fork 50")
    target.command("write 3")

    assert [hit.pid for hit in decode(drain_all(machine, 1))] == [target.pid] * 3
    assert machine.disarm(1)[1].hits == 3


def test_a_held_process_does_not_trap_in_any_thread(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_process(machine, target), HOLD)

    target.command("spawn 5")
    target.command("write 100")

    assert machine.disarm(1)[1] == Totals(hits=0, lost=0)


def test_what_a_ring_had_no_room_for_is_counted(machine: LinuxMachine, target: Target) -> None:
    small = msgspec.structs.replace(HITS, ring_bytes=os.sysconf("SC_PAGESIZE"))
    machine.arm(1, piece(target.variable, "w"), the_process(machine, target), small)

    target.command("write 3000")
    target.command("spawn 200")

    first = drain_all(machine, 1)
    batch, totals = machine.disarm(1)
    assert totals.hits == 3200
    assert first.hits + batch.hits + totals.lost == 3200
    assert first.lost + batch.lost == totals.lost > 2000


@pytest.mark.parametrize("mode", MODES)
def test_the_exit_of_a_process_is_announced(machine: LinuxMachine, mode: Mode) -> None:
    with Target("--threads", "2") as target:
        machine.arm(1, piece(target.variable, "w"), the_process(machine, target), mode)
        target.command("write 4")
        assert machine.end_of_target(1) is None

        target.kill()

        assert wait_for_the_end(machine, 1) is TargetEnd.EXIT
        assert machine.disarm(1)[1].hits == (0 if mode is HOLD else 8)


@pytest.mark.parametrize("mode", MODES)
def test_a_process_goes_on_when_its_first_thread_has_exited(machine: LinuxMachine, mode: Mode) -> None:
    with Target("--threads", "2") as target:
        machine.arm(1, piece(target.variable, "w"), the_process(machine, target), mode)

        target.command("abandon")
        target.command("write 10")
        target.command("grow 1")
        target.command("write 1")

        assert machine.end_of_target(1) is None
        assert machine.process(target.pid) == Process(target.pid, machine.process(target.pid).start_ticks)
        assert machine.totals(1).hits == (0 if mode is HOLD else 23)
        target.kill()
        assert wait_for_the_end(machine, 1) is TargetEnd.EXIT


def test_a_process_whose_first_thread_has_exited_can_be_watched(machine: LinuxMachine) -> None:
    with Target("--threads", "2") as target:
        target.command("abandon")

        machine.arm(1, piece(target.variable, "w"), the_process(machine, target), HITS)
        target.command("write 6")

        assert drain_all(machine, 1).hits == 12
        target.command("exec")
        assert wait_for_the_end(machine, 1) is TargetEnd.EXEC


@pytest.mark.parametrize("mode", MODES)
def test_an_exec_ends_a_process_and_is_told_from_an_exit(machine: LinuxMachine, mode: Mode) -> None:
    with Target("--threads", "2") as target:
        machine.arm(1, piece(target.variable, "w"), the_process(machine, target), mode)
        target.command("write 5")

        target.command("exec")

        assert wait_for_the_end(machine, 1) is TargetEnd.EXEC
        assert machine.disarm(1)[1].hits == (0 if mode is HOLD else 10)


def test_a_silenced_process_is_silent_in_every_thread_and_can_be_let_report_again(machine: LinuxMachine) -> None:
    with Target("--threads", "2") as target:
        fused = msgspec.structs.replace(HITS, fuse_hits=5)
        machine.arm(1, piece(target.variable, "w"), the_process(machine, target), fused)
        assert not machine.is_fused(1)
        target.command("write 20")
        target.command("grow 1")

        machine.silence(1)
        target.command("write 20")
        target.command("spawn 2")
        assert machine.totals(1).hits == 40
        machine.rearm(1, 5)
        target.command("write 1")

        assert drain_all(machine, 1).hits == 43
        assert machine.disarm(1)[1] == Totals(hits=43, lost=0)


def test_too_many_descriptors_are_refused_with_their_number_before_any_is_opened(machine: LinuxMachine) -> None:
    with Target("--threads", "60") as target:
        where = the_process(machine, target)
        free_before, open_before = free_slots(), set(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(open_before) + 100, hard))
        try:
            with pytest.raises(ArmError) as refused:
                machine.arm(1, piece(target.variable, "w"), where, COUNT)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        assert refused.value.errno == errno.EMFILE
        assert refused.value.needed >= 61 * len(online_cpus()) > refused.value.allowed
        assert (free_slots(), set(os.listdir("/proc/self/fd"))) == (free_before, open_before)


def test_the_limit_of_descriptors_is_raised_as_far_as_it_goes(alone: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        make({}).close()

        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_without_room_on_one_thread_takes_nothing(machine: LinuxMachine) -> None:
    with Target("--threads", "3") as target:
        busy = machine.task(target.tids[1])
        for resource_id, letters in enumerate(("w", "rw", "w", "rw"), start=10):
            machine.arm(resource_id, piece(target.variable, letters), Where(task=busy), HOLD)
        while any(free for (_, pool), free in free_slots().items() if pool == WATCHPOINT_POOL):  # Arm may have more
            machine.arm(10 + len(machine._held), piece(target.variable, "w"), Where(task=busy), HOLD)
        open_before = set(os.listdir("/proc/self/fd"))

        with pytest.raises(ArmError) as refused:
            machine.arm(1, piece(target.variable, "w"), the_process(machine, target), HITS)

        assert (refused.value.errno, refused.value.tid) == (errno.ENOSPC, busy.tid)
        assert set(os.listdir("/proc/self/fd")) == open_before
        assert machine.task(target.tid).process == machine.process(target.pid)


def test_what_threads_have_inherited_is_nobody_elses(machine: LinuxMachine) -> None:
    with Target("--threads", "2") as target, Target() as other:
        machine.arm(1, piece(target.variable, "w"), the_process(machine, target), COUNT)
        machine.arm(2, piece(other.variable, "w"), the_process(machine, other), HITS)
        target.command("grow 2")
        other.command("grow 1")

        assert list(machine.foreign(WATCHPOINT_POOL, the_process(machine, target), None)) == []
        assert list(machine.foreign(WATCHPOINT_POOL, Where(cpus=online_cpus()), online_cpus()[0])) == []


def test_a_process_that_has_gone_is_refused(machine: LinuxMachine, target: Target) -> None:
    process = machine.process(target.pid)
    later = Process(process.pid, process.start_ticks + 1)
    with pytest.raises(ArmError) as refused:
        machine.arm(1, piece(target.variable, "w"), Where(process=later), HITS)
    assert refused.value.errno == errno.ESRCH
    target.kill()

    with pytest.raises(TargetGone):
        machine.process(target.pid)
    with pytest.raises(ArmError) as refused:
        machine.arm(1, piece(target.variable, "w"), Where(process=process), COUNT)
    assert refused.value.errno == errno.ESRCH
