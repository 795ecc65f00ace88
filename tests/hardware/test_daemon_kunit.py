"""The kernel's own nine test cases, asked through a daemon: it grants what the kernel grants, and its books agree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest

import hwbp
from hwbpd.core.model import Task
from hwbpd_linux.cpus import online_cpus
from tests import kunit
from tests.hardware.daemon import MARKS, Daemon, all_free, books_free, kernel_free, kernel_room
from tests.judges.sleepers import sleepers

pytestmark = [
    *MARKS,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the suite needs two online CPUs: give this machine another"),
]

SLOTS = 4  # of every x86 CPU
NOWHERE = 0x1000  # an address that is never touched: the slots are held and not armed


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def tasks(host: None) -> Iterator[Mapping[str, Task]]:
    with sleepers(processes=1) as tids:
        yield {role: Task(tid, 0) for role, tid in zip(kunit.ROLES, tids, strict=True)}


def granted_or_full(client: hwbp.Client, tid: int, cpus: tuple[int, ...] | None) -> hwbp.Watch | None:
    """Claim one slot; None when there is no room."""
    try:
        return client.claim(address=NOWHERE, length=8, access="w", tid=tid, cpus=cpus, delivery="hold")
    except hwbp.NoFreeSlot:
        return None


@pytest.mark.parametrize("case", kunit.CASES)
def test_the_daemon_and_the_kernel_decide_every_step_alike(
    alone: None, daemon: Daemon, tasks: Mapping[str, Task], case: str
) -> None:
    with daemon.connect() as client:
        granted: list[hwbp.Watch] = []
        for number, step in enumerate(kunit.steps(case, SLOTS, len(online_cpus()))):
            at = f"step {number}: {step}"
            if isinstance(step, kunit.Delete):
                granted[step.nth].release()
            else:
                target = step.where.target(tasks, online_cpus())
                tid = target.task.tid if target.task else 0
                room = kernel_room(tid or -1, target.cpus[0] if target.cpus else -1)
                assert (room > 0) is step.admitted, f"the kernel decides otherwise than its suite says, {at}"
                watch = granted_or_full(client, tid, target.cpus)
                assert (watch is not None) is step.admitted, at
                if watch is not None:
                    granted.append(watch)
            assert books_free(client) == kernel_free(), at
        assert kernel_free() != all_free()

        for watch in granted:
            watch.release()

        assert books_free(client) == kernel_free() == all_free()
