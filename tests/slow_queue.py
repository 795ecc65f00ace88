"""
A waiting queue too simple to be wrong: a list, and the rule applied to it place by place.

``hwbpd.core.queue`` must agree with it. A place is one task on one CPU, in one pool; on it the slots of whoever counts
there just add up. W, who stands before N, holds N up if on some place where both count, what is held there and the
slots of both are more than there may be. Nothing is grouped, found through an index, or kept between two questions.

It looks at every place of every waiter each time, which is why the daemon cannot use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hwbpd.core.model import CLASS, Kind, Plan, Pool, Process, Rank, Target, Task
from tests.slow_model import Answer, SlowBooks, cpu_wide, of_task


class Waiter(NamedTuple):
    """What the queue has to know of a claim."""

    claim_id: int
    target: Target
    plan: Plan
    rank: Rank


class SlowQueue:
    """
    The questions of ``Queue``, answered by counting.

    :param tasks: those that may be named; for every process, and for none, one without slots is added.
    :param reserve: slots left free on each CPU by all but kgdb; one slot may be used in any case.
    """

    def __init__(self, books: SlowBooks, tasks: Iterable[Task], reserve: int = 0) -> None:
        self.books = books
        self.waiting: list[Waiter] = []
        self._reserve = reserve
        processes = {task.process for task in tasks}
        self._tasks = (*tasks, *(Task(0, 0, process) for process in (*processes, Process(0, 0))))

    def in_order(self) -> list[Waiter]:
        return sorted(self.waiting, key=lambda one: (-one.rank[0], -one.rank[1], one.claim_id))

    def ahead_of(self, asking: Waiter) -> list[Waiter]:
        """Who stands before it, whether or not it is in the queue itself."""
        return [
            one
            for one in self.in_order()
            if one.rank > asking.rank or (one.rank == asking.rank and one.claim_id < asking.claim_id)
        ]

    def places(self) -> Iterator[tuple[int, Task]]:
        return ((cpu, task) for cpu in self.books.possible for task in self._tasks)

    def counts_on(self, target: Target, cpu: int, task: Task, *, if_online: bool = False) -> bool:
        """Whether a slot for ``target`` is one less for that task on that CPU, or would be if all were online."""
        if target.task is not None:
            return task == target.task and (target.cpus is None or cpu in target.cpus)
        if target.process is not None:
            return task.process == target.process
        every = self.books.possible if if_online else self.books.online
        return cpu in (every if target.cpus is None else target.cpus)

    def limit(self, rank: Rank, cpu: int, pool: Pool) -> int:
        """How many slots of a pool may be held on a place of that CPU once a claim of that rank has its own."""
        reserve = 0 if rank[0] == CLASS[Kind.KGDB] else self._reserve
        return max(1, self.books.has(cpu, pool) - reserve)

    def room_beside(self, waiter: Waiter, other: Waiter | None) -> bool:
        """Whether on every place they share, and with None on every place of its own, there is room for both."""
        events = self.books.events()
        for pool in self.books.slots:
            own = sum(piece.pool is pool for piece in waiter.plan.pieces)
            others = 0 if other is None else sum(piece.pool is pool for piece in other.plan.pieces)
            if not own or (other is not None and not others):
                continue
            for cpu, task in self.places():
                if not self.counts_on(waiter.target, cpu, task):
                    continue
                if other is not None and not self.counts_on(other.target, cpu, task):
                    continue
                held = cpu_wide(events, cpu, pool) + of_task(events, task, cpu, pool)
                if held + own + others > self.limit(waiter.rank, cpu, pool):
                    return False
        return True

    def blocker(self, asking: Waiter) -> Waiter | None:
        return next((one for one in self.ahead_of(asking) if not self.room_beside(one, asking)), None)

    def position(self, asking: Waiter) -> int:
        """From 1, among those with a place in common, were all CPUs online."""
        return 1 + sum(self._have_a_place_in_common(one, asking) for one in self.ahead_of(asking))

    def _have_a_place_in_common(self, one: Waiter, other: Waiter) -> bool:
        pools = {piece.pool for piece in one.plan.pieces} & {piece.pool for piece in other.plan.pieces}
        return bool(pools) and any(
            self.counts_on(one.target, *place, if_online=True) and self.counts_on(other.target, *place, if_online=True)
            for place in self.places()
        )

    def may_go(self, asking: Waiter) -> bool:
        """Whether it fits, leaves the reserve free, and nobody holds it up."""
        fits = self.books.ask(asking.target, asking.plan) is Answer.FITS
        return fits and self.room_beside(asking, None) and self.blocker(asking) is None
