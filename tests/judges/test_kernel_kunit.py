"""The table of the kernel's nine test cases, on the running kernel: so it is the kernel's and not our idea of it."""

from __future__ import annotations

import errno
import os

import pytest

from hwbpd.core.model import Task
from tests import kunit
from tests.host import exclusive, slots_taken
from tests.judges import oracle
from tests.judges.opener import PERF_EVENT_OPEN, KernelOpener
from tests.judges.sleepers import sleepers

ONLINE = oracle.cpu_list(oracle.CPUS / "online") if oracle.CPUS.exists() else ()


def opened_or_full(opener: KernelOpener, tid: int, cpu: int) -> int | None:
    """Open one event; None when there is no room."""
    try:
        return opener.open(tid, cpu)
    except OSError as refusal:
        if refusal.errno != errno.ENOSPC:
            raise
        return None


@pytest.mark.hardware
@pytest.mark.skipif(os.uname().machine not in PERF_EVENT_OPEN, reason="this opener knows 64-bit x86 and Arm only")
@pytest.mark.skipif(len(ONLINE) < 2, reason="the suite needs two online CPUs: give this machine a second one")
def test_the_running_kernel_decides_every_step_of_every_case() -> None:
    opener = KernelOpener()
    with exclusive(), sleepers(processes=1) as tids:
        slots = list(oracle.slots_here().values())[-1]  # of watchpoints, where they have a pool of their own
        tasks = {role: Task(tid, 0) for role, tid in zip(kunit.ROLES, tids, strict=True)}
        for case in kunit.CASES:
            opened: list[int] = []
            left: set[int] = set()
            try:
                for number, step in enumerate(kunit.steps(case, slots, len(ONLINE))):
                    if isinstance(step, kunit.Delete):
                        opener.close(opened[step.nth])
                        left.remove(opened[step.nth])
                        continue
                    target = step.where.target(tasks, ONLINE)
                    cpu = -1 if target.cpus is None else target.cpus[0]
                    event = opened_or_full(opener, -1 if target.task is None else target.task.tid, cpu)
                    if event is not None:
                        opened.append(event)
                        left.add(event)
                    assert (event is not None) is step.admitted, f"{case}, step {number}: {step}"
            finally:
                for event in left:
                    opener.close(event)
            assert slots_taken() == [], case
