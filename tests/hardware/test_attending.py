"""A tracer's slots on real registers: when they are taken, when they come free, and that the machine counts them."""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from examples.target import Target as Program
from hwbpd.core.model import Target
from hwbpd.hookspecs import TargetEnd
from hwbpd_linux.cpus import online_cpus
from hwbpd_linux.machine import LinuxMachine
from tests.hardware.common import HITS, HOLD, WATCHPOINT_POOL, piece
from tests.hardware.daemon import MARKS, WAIT_S, kernel_room
from tests.hardware.tracer import Tracer
from tests.judges.opener import KernelOpener
from tests.judges.users import Sleeper

pytestmark = MARKS

SLOTS = 4
ROUNDS = 25


@contextmanager
def polled(machine: LinuxMachine, resource_id: int) -> Iterator[Callable[[], TargetEnd]]:
    """What waits for the end of a resource's target, as the daemon does: asks whenever a descriptor says so."""
    with select.epoll() as epoll:
        for fd in machine.descriptors(resource_id):
            epoll.register(fd, select.EPOLLIN)

        def wait() -> TargetEnd:
            until = time.monotonic() + WAIT_S
            while (end := machine.end_of_target(resource_id)) is None:
                assert time.monotonic() < until, "the end is never told"
                assert epoll.poll(WAIT_S), "nothing tells of the end"
            return end

        yield wait


def test_an_address_register_that_is_written_takes_a_slot_until_the_thread_exits(target: Program) -> None:
    assert kernel_room(tid=target.tid) == SLOTS

    with Tracer(target.tid) as tracer:
        tracer.poke(0)
        tracer.poke(0)
        assert kernel_room(tid=target.tid) == SLOTS - 1, "the same register, the same slot"
        tracer.poke(1)
        tracer.do("detach")

    assert kernel_room(tid=target.tid) == SLOTS - 2
    assert {cpu: kernel_room(cpu=cpu) for cpu in online_cpus()} == dict.fromkeys(online_cpus(), SLOTS - 2)


def test_a_tracer_without_room_is_refused_and_its_thread_is_unharmed(machine: LinuxMachine, target: Program) -> None:
    for resource_id in range(SLOTS):
        machine.arm(resource_id, piece(target.variable, "w"), Target(machine.task(target.tid)), HOLD)

    with Tracer(target.tid) as tracer:
        with pytest.raises(OSError, match="poke") as refused:
            tracer.poke(0)
        tracer.do("detach")

    assert refused.value.errno == errno.ENOSPC
    assert target.command("write 3")["did"] == 3


def test_a_watchpoint_that_a_tracer_set_stops_the_thread(target: Program) -> None:
    with Tracer(target.tid) as tracer:
        tracer.poke(0, target.variable)
        tracer.do("enable 0")
        tracer.do("go")
        target.send("write 1")
        tracer.do("stop")
        assert not target.has_answered()
        tracer.do("detach")

    assert target.answer()["did"] == 1


def test_whenever_the_end_of_a_thread_is_told_its_tracers_slots_are_free(machine: LinuxMachine) -> None:
    """An exit is heard of a moment before the kernel has given them back: so again and again."""
    opener = KernelOpener()
    for _ in range(ROUNDS):
        # given a thread with all its slots taken by a tracer that has left
        sleeper = Sleeper()
        machine.attend(1, Target(machine.task(sleeper.tid)), HITS)
        with Tracer(sleeper.tid) as tracer:
            for number in range(SLOTS):
                tracer.poke(number)
        with pytest.raises(OSError, match="ENOSPC"):
            opener.open(-1, online_cpus()[0])

        # when it is killed, and nobody waits for it, then in the very moment its end is told there is room
        with polled(machine, 1) as end:
            sleeper.process.kill()
            assert end() is TargetEnd.EXIT
            opener.close(opener.open(-1, online_cpus()[0]))
        sleeper.close()
        machine.disarm(1)


def test_an_exec_frees_a_tracers_slots_and_is_told_of_a_thread_that_is_attended_to(
    machine: LinuxMachine, target: Program
) -> None:
    machine.attend(1, Target(machine.task(target.tid)), HITS)
    with Tracer(target.tid) as tracer:
        tracer.poke(0)
    assert kernel_room(tid=target.tid) == SLOTS - 1

    with polled(machine, 1) as end:
        target.command("exec")
        assert end() is TargetEnd.EXEC
    assert kernel_room(tid=target.tid) == SLOTS


def test_what_others_have_bound_to_a_cpu_is_not_taken_for_a_tracers(machine: LinuxMachine, target: Program) -> None:
    opener, here = KernelOpener(), Target(machine.task(target.tid))
    bound = opener.open(target.tid, online_cpus()[0])
    try:
        if len(online_cpus()) > 1:
            assert machine.slots_outside(WATCHPOINT_POOL, here) == 0

        # but what a perf user has on the thread everywhere cannot be told from it
        following = opener.open(target.tid, -1)
        assert machine.slots_outside(WATCHPOINT_POOL, here) == 1
        opener.close(following)
    finally:
        opener.close(bound)
