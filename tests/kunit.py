"""
The nine cases of the kernel's own KUnit suite "hw_breakpoint", as one table.

Linux, kernel/events/hw_breakpoint_test.c. The table is run on the admission rule (tests/core/test_kunit.py), on the
running kernel (tests/judges/test_kernel_kunit.py) and through a daemon: whoever runs it turns each ``Ask`` into a
request of one slot and each ``Delete`` into its release.

``cur`` and ``oth`` are two tasks, C0 and C1 the first and the second online CPU. Every case begins and ends with all
slots free, and needs two CPUs; two of them need three slots, and are empty where there are fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hwbpd.core.model import Target, Task


class Where(NamedTuple):
    """A task by its part in the case, or None for CPU-wide; the CPU by its place among those online, None for all."""

    task: str | None
    cpu: int | None

    def target(self, tasks: Mapping[str, Task], online: Sequence[int]) -> Target:
        """Return the same for real tasks (one for each of ``ROLES``) and CPUs (ascending)."""
        return Target(
            task=None if self.task is None else tasks[self.task],
            cpus=None if self.cpu is None else (online[self.cpu],),
        )


class Ask(NamedTuple):
    """Ask for one slot. It must be admitted, or refused with ENOSPC."""

    where: Where
    admitted: bool


class Delete(NamedTuple):
    """Release the slot that the case was granted as the ``nth``, from 0; deleted ones keep their number."""

    nth: int


Step = Ask | Delete
ROLES = ("cur", "oth")

CUR, CUR_C0 = Where("cur", None), Where("cur", 0)
OTH, OTH_C0 = Where("oth", None), Where("oth", 0)
C0, C1 = Where(None, 0), Where(None, 1)


def _fill(where: Where, count: int) -> list[Step]:
    return [Ask(where, admitted=True)] * count


def _one(where: Where) -> list[Step]:
    return _fill(where, 1)


def _no(*places: Where) -> list[Step]:
    return [Ask(where, admitted=False) for where in places]


def _delete(nth: int) -> list[Step]:
    return [Delete(nth)]


def _one_cpu(slots: int, cpus: int) -> list[Step]:
    return _fill(C0, slots) + _no(CUR, C0)


def _many_cpus(slots: int, cpus: int) -> list[Step]:
    return [step for cpu in range(cpus) for step in _fill(Where(None, cpu), slots) + _no(Where(None, cpu))]


def _one_task_on_all_cpus(slots: int, cpus: int) -> list[Step]:
    return _fill(CUR, slots) + _no(CUR, CUR_C0, C0) + _delete(0) + _one(C0)


def _two_tasks_on_all_cpus(slots: int, cpus: int) -> list[Step]:
    full = _fill(CUR, slots) + _fill(OTH, slots) + _no(CUR, OTH, CUR_C0, OTH_C0, C0)
    return full + _delete(0) + _no(C0)  # the other task is as demanding as before


def _one_task_on_one_cpu(slots: int, cpus: int) -> list[Step]:
    return _fill(CUR_C0, slots) + _no(CUR, CUR_C0, C0) + _delete(0) + _one(C0)


def _one_task_mixed(slots: int, cpus: int) -> list[Step]:
    if slots < 3:
        return []
    full = _one(CUR_C0) + _fill(CUR, slots - 1) + _no(CUR, CUR_C0, C0)
    # The first deletion leaves the task without a CPU-bound slot, the second makes room for two CPU-wide ones.
    return full + _delete(0) + _delete(1) + _one(C0) + _one(C0) + _no(C0)


def _two_tasks_on_one_cpu(slots: int, cpus: int) -> list[Step]:
    return _fill(CUR_C0, slots) + _fill(OTH_C0, slots) + _no(CUR, OTH, CUR_C0, OTH_C0, C0) + _fill(C1, slots)


def _two_tasks_on_one_all_cpus(slots: int, cpus: int) -> list[Step]:
    return _fill(CUR_C0, slots) + _fill(OTH, slots) + _no(CUR, OTH, CUR_C0, OTH_C0, C0, C1)


def _task_on_all_and_one_cpu(slots: int, cpus: int) -> list[Step]:
    if slots < 3:
        return []
    on_c0, on_c1 = slots - 2, slots  # the numbers of what is deleted below
    full = _fill(CUR, slots - 2) + _one(CUR_C0) + _one(CUR) + _no(CUR, CUR_C0, C0)
    other_cpu = _one(C1) + _no(C1)
    # Without its slot on C0 the task still cannot have one on all CPUs: C1 holds a CPU-wide one now.
    freed = _delete(on_c0) + _no(CUR) + _delete(on_c1)
    return full + other_cpu + freed + _one(CUR) + _no(CUR, CUR_C0, C0, C1)


CASES: dict[str, Callable[[int, int], list[Step]]] = {
    "test_one_cpu": _one_cpu,
    "test_many_cpus": _many_cpus,
    "test_one_task_on_all_cpus": _one_task_on_all_cpus,
    "test_two_tasks_on_all_cpus": _two_tasks_on_all_cpus,
    "test_one_task_on_one_cpu": _one_task_on_one_cpu,
    "test_one_task_mixed": _one_task_mixed,
    "test_two_tasks_on_one_cpu": _two_tasks_on_one_cpu,
    "test_two_tasks_on_one_all_cpus": _two_tasks_on_one_all_cpus,
    "test_task_on_all_and_one_cpu": _task_on_all_and_one_cpu,
}


def steps(case: str, slots: int, cpus: int) -> list[Step]:
    """
    Return a case for a machine with ``slots`` per CPU in the pool asked, and ``cpus`` online CPUs.

    After the last step the caller releases whatever is still held; all slots must then be free.
    """
    assert cpus >= 2, "the suite needs two online CPUs"
    return CASES[case](slots, cpus)
