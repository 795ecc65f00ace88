"""The simulated kernel admits what the kernel's formula says, at random and in the corners."""

from __future__ import annotations

import errno

from hypothesis import given

from hwbpd.core.model import Delivery, Mode, Plan, Pool, Resource, Target, Task
from hwbpd.hookspecs import ArmError
from hwbpd_sim.admission import PoolCounts
from hwbpd_sim.world import World
from tests import strategies
from tests.plugins.sim.machines import bare
from tests.slow_model import Answer, SlowBooks
from tests.strategies import GiveBack, History, histories

HOLD = Mode(delivery=Delivery.HOLD)
ANSWERS = {errno.ENOSPC: Answer.FULL, errno.ENODEV: Answer.OFFLINE}
A, B = Task(1, 1), Task(2, 2)


def simulated(drawn: strategies.World) -> World:
    """The same machine, with threads of the same numbers."""
    world = World([bare(drawn.slots_on.get(cpu, drawn.slots)) for cpu in drawn.possible])
    for task in drawn.tasks:
        assert task.process is not None
        if task.tid == task.process.pid:
            world.start_process(task.tid, "program")
        else:
            world.start_thread(task.process.pid, task.tid)
    for cpu in set(drawn.possible) - set(drawn.online):
        world.take_cpu_offline(cpu)
    return world


def there(world: World, target: Target) -> Target:
    """The same target among the threads of ``world``, which were started at other times."""
    task = None if target.task is None else world.task(target.task.tid)
    process = None if target.process is None else world.process(target.process.pid)
    return Target(task, target.cpus, process)


def arm_all(world: World, first_id: int, target: Target, plan: Plan) -> Answer:
    """Arm every piece, or none."""
    armed: list[int] = []
    for resource_id, piece in enumerate(plan.pieces, first_id):
        try:
            world.arm(resource_id, piece, target, HOLD)
        except ArmError as refused:
            for earlier in armed:
                world.disarm(earlier)
            return ANSWERS[refused.errno]
        armed.append(resource_id)
    return Answer.FITS


@given(histories())
def test_it_admits_exactly_what_the_slow_model_admits(history: History) -> None:
    drawn = history.world
    slow, world = SlowBooks(drawn.slots, drawn.possible, drawn.online, drawn.slots_on), simulated(drawn)
    held: list[range] = []
    next_id = 1
    for operation in history.operations:
        if isinstance(operation, GiveBack):
            if held:
                for resource_id in held.pop(operation.nth % len(held)):
                    slow.give_back(resource_id)
                    world.disarm(resource_id)
            continue
        target, plan = operation.target, operation.plan
        expected = slow.ask(target, plan)
        assert arm_all(world, next_id, there(world, target), plan) is expected
        if expected is Answer.FITS:
            held.append(range(next_id, next_id + len(plan.pieces)))
            for resource_id, piece in zip(held[-1], plan.pieces, strict=True):
                slow.take(Resource(resource_id, piece, target, HOLD))
        next_id += len(plan.pieces)

    # and when all is given back, everything is free again
    for resource_ids in held:
        for resource_id in resource_ids:
            world.disarm(resource_id)
    for pool in drawn.slots:
        for cpu in drawn.online:
            plan = Plan(tuple(strategies.piece(pool) for _ in range(drawn.has(cpu, pool))))
            assert arm_all(world, next_id, Target(cpus=(cpu,)), plan) is Answer.FITS
            next_id += len(plan.pieces)


def test_a_cpu_wide_slot_competes_with_the_greatest_task_wherever_that_runs() -> None:
    counts = PoolCounts([4, 4])
    counts.take(A, None)
    counts.take(A, None)
    counts.take(A, 1)
    counts.take(B, None)

    assert [sum(_fill(counts, cpu)) for cpu in (0, 1)] == [2, 1]


def _fill(counts: PoolCounts, cpu: int) -> list[bool]:
    """Take CPU-wide slots until there is none, then give them back."""
    taken = []
    while counts.admits(None, cpu):
        counts.take(None, cpu)
        taken.append(True)
    for _ in taken:
        counts.give_back(None, cpu)
    return taken


def test_pools_do_not_meet() -> None:
    world = World([bare({Pool.INST: 1, Pool.DATA: 1})])

    world.arm(1, strategies.piece(Pool.INST), Target(), HOLD)

    world.arm(2, strategies.piece(Pool.DATA), Target(), HOLD)
