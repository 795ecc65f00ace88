"""The simulated machine tells of what happens in its world by descriptors, and lets time pass by itself."""

from __future__ import annotations

import errno
import os
import resource
import select
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Span, Target
from hwbpd.hookspecs import ArmError, Foreign
from hwbpd.plugins import Plugins
from hwbpd_sim.machine import SimMachine, make
from hwbpd_sim.outsiders import Outsider
from hwbpd_sim.records import Step
from hwbpd_sim.workload import COUNTER

WAIT_S = 30.0
PIECE = Piece(Span(COUNTER, 8), Access.WRITE, Pool.ANY)
RING = Mode(ring_bytes=4096)
COUNT = Mode(delivery=Delivery.COUNT)
STEP = Step(Access.WRITE, COUNTER, 8, 0x400, 0x404)
QUIET = {"cpus": 2, "seed": 1, "processes": 1, "threads": 2, "accesses_per_s": 0, "outsider_slots": 0, "profile": ""}


def made(**changes: int | str) -> SimMachine:
    plugins = Plugins()
    options: Mapping[str, Any] = {**QUIET, **changes, "backend": plugins.backend, "profiles": plugins.profiles}
    return make(options)


@pytest.fixture
def machine() -> Iterator[SimMachine]:
    before = set(os.listdir("/proc/self/fd"))
    machine = made()
    yield machine
    machine.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_time_passes_by_itself_and_the_hits_are_announced() -> None:
    # given a machine whose threads do something
    machine = made(accesses_per_s=1000)
    machine.arm(1, PIECE, Target(machine.task(1000)), RING)

    # when one waits for it, again and again, then there are hits
    for _ in range(3):
        (readable,), _, _ = select.select(machine.descriptors(1), [], [], WAIT_S)
        assert readable == machine.descriptors(1)[0]
        assert machine.drain(1, 2**20).hits > 0
    machine.close()


def test_records_carry_this_hosts_monotonic_time() -> None:
    began_ns = time.monotonic_ns()
    machine = made(accesses_per_s=1000)
    machine.arm(1, PIECE, Target(), RING)
    assert select.select(machine.descriptors(1), [], [], WAIT_S)[0]

    batch = machine.drain(1, 48)
    machine.close()

    assert began_ns <= int.from_bytes(batch.records[24:32], "little") <= time.monotonic_ns()


def test_a_machine_whose_threads_do_nothing_has_no_thread_of_its_own(machine: SimMachine) -> None:
    assert "simulated workload" not in [thread.name for thread in threading.enumerate()]


def test_cpus_that_go_and_come_are_announced(machine: SimMachine) -> None:
    descriptor = machine.topology_descriptor()
    assert descriptor is not None
    assert not is_readable(descriptor)

    for act, online in (("take_cpu_offline", (0,)), ("bring_cpu_online", (0, 1))):
        with machine.world() as world:
            getattr(world, act)(1)
        assert is_readable(descriptor)
        machine.topology_changed()
        assert not is_readable(descriptor)
        assert machine.topology().online == online


def test_a_descriptor_stays_readable_while_something_is_left(machine: SimMachine) -> None:
    machine.arm(1, PIECE, Target(machine.task(1000)), RING)
    with machine.world() as world:
        for _ in range(3):
            world.step(1000, STEP)

    (descriptor,) = machine.descriptors(1)
    assert machine.drain(1, 48).more
    assert is_readable(descriptor)
    assert machine.drain(1, 4096).hits == 2
    assert not is_readable(descriptor)


def test_who_only_counts_is_not_woken_by_hits(machine: SimMachine) -> None:
    machine.arm(1, PIECE, Target(machine.task(1000)), COUNT)

    with machine.world() as world:
        world.step(1000, STEP)
    assert not is_readable(machine.descriptors(1)[0])

    with machine.world() as world:
        world.exit_thread(1000)
    assert is_readable(machine.descriptors(1)[0])


def test_a_look_for_outsiders_that_is_late_keeps_nobody_else_waiting(machine: SimMachine) -> None:
    # given an outsider, and looks that do not end
    with machine.world() as world:
        world.take_outside(Outsider(900, "debugger"), Pool.ANY, tid=1000)
    machine.looks_may_end.clear()
    found: list[Foreign] = []
    target = Target(machine.task(1000))
    look = threading.Thread(target=lambda: found.extend(machine.foreign(Pool.ANY, target, None)))
    look.start()

    # then slots are armed and given back meanwhile
    machine.arm(1, PIECE, target, RING)
    machine.disarm(1)
    assert look.is_alive()
    assert found == []

    # until it ends
    machine.looks_may_end.set()
    look.join(WAIT_S)
    assert [one.comm for one in found] == ["debugger"]


def test_without_descriptors_nothing_is_held(machine: SimMachine) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) - 1  # the listing's own
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        with pytest.raises(ArmError) as refused:
            machine.arm(1, PIECE, Target(), RING)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert refused.value.errno == errno.EMFILE
    assert len(os.listdir("/proc/self/fd")) - 1 == used
    for resource_id in range(4):
        machine.arm(resource_id, PIECE, Target(), COUNT)


def test_the_notes_say_first_that_it_is_simulated(machine: SimMachine) -> None:
    first, second, third, *_ = machine.notes()

    assert first.startswith("SIMULATED")
    assert second == "its CPUs: 2 x86-64 (cpu 0-1)"
    assert "1000 web" in third
