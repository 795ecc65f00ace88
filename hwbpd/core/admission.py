"""
Does one more slot fit here? Exactly the kernel's rule, and nothing else.

For one pool of S slots per CPU, with C(c) the CPU-wide slots held on CPU c and T(t, c) the slots of task t that count
there, armed or not, n more slots fit

1. CPU-wide on c             iff  C(c) + the greatest T(t, c) of any task t, running there or not, + n <= S
2. for task t, anywhere      iff  the greatest C(c) + T(t, c) over all CPUs c, + n <= S
3. for task t, while on c    iff  C(c) + T(t, c) + n <= S

Linux, kernel/events/hw_breakpoint.c; the running kernel is asked by ``tests/judges/oracle.py``. Tasks never compete
with each other. Addresses are not compared. The kernel refuses the second of two requests that it would also refuse
together, so several slots for one target, and one slot on several CPUs, are asked for at once.

A policy decides who gets a slot that fits here; it lives elsewhere and never makes more fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from hwbpd.core.books import Books, PoolBooks
from hwbpd.core.errors import CpuOffline, Holder, NoFreeSlot
from hwbpd.core.model import Claim, Plan, Pool, Target, Task, format_cpus

OUTSIDE = "outside hwbpd"  # a holder that is not in the books
HOLDERS_NAMED = 16  # a refusal names at most so many, and counts the rest


def fits(books: Books, target: Target, plan: Plan) -> None:
    """
    Return if every piece of ``plan`` gets a slot on ``target``; change nothing.

    :raises NoFreeSlot: naming who holds the slots on the first place where there is no room.
    :raises CpuOffline: for a CPU that does not exist or, CPU-wide, is offline: there is nothing to arm there.
    """
    check_cpus(books, target)
    for pool, pieces in Counter(piece.pool for piece in plan.pieces).items():
        counts = books.pools[pool]
        full = next(_full_places(counts, target, pieces), None)
        if full is not None:
            raise _refusal(books, pool, target, full, pieces)


def check_cpus(books: Books, target: Target) -> None:
    """Raise ``CpuOffline`` for a CPU on which nothing can be armed."""
    for cpu in target.cpus or ():
        if cpu not in books.possible:
            raise CpuOffline(f"no cpu {cpu}: this machine has {_range(books.possible)}")
        if target.task is None and cpu not in books.online:
            raise CpuOffline(f"cpu {cpu} is offline; bring it online, or claim on one of {_range(books.online)}")


def _full_places(counts: PoolBooks, target: Target, pieces: int) -> Iterator[int]:
    """The CPUs on which ``pieces`` more slots for ``target`` are too many."""
    room = counts.slots - pieces
    if target.task is None:
        for cpu in _cpus_to_look_at(counts) if target.cpus is None else target.cpus:  # 1
            if counts.held_cpu_wide(cpu) + counts.held_by_busiest(cpu) > room:
                yield cpu
    elif target.cpus is None:  # 2
        most_cpu_wide = counts.everywhere + counts.cpu_wide.greatest()
        if most_cpu_wide + counts.anywhere[target.task] > room:
            yield next(iter(counts.cpu_wide.above(0)), next(iter(counts.online)))
        for cpu in counts.bound.get(target.task, ()):
            if counts.held_cpu_wide(cpu) + counts.held_by_task(target.task, cpu) > room:
                yield cpu
    else:  # 3
        for cpu in target.cpus:
            if counts.held_cpu_wide(cpu) + counts.held_by_task(target.task, cpu) > room:
                yield cpu


def _cpus_to_look_at(counts: PoolBooks) -> Iterator[int]:
    """The online CPUs that have something of their own, and one that stands for all others."""
    own = {cpu for cpu in (*counts.cpu_wide.keys(), *counts.on_cpu) if cpu in counts.online}
    yield from own
    if len(own) < len(counts.online):
        yield next(cpu for cpu in counts.online if cpu not in own)


def refused_by_the_kernel(books: Books, target: Target, plan: Plan, cpu: int | None) -> NoFreeSlot:
    """
    Return the refusal for a claim that fits in the books and that the kernel has no room for.

    :param cpu: where the kernel refused, if it said; the claim's own slots are out of the books again.

    What the books cannot explain is held by somebody outside hwbpd.
    """
    pool = plan.pieces[0].pool
    place = _fullest_cpu(books.pools[pool], target) if cpu is None else cpu
    return _refusal(books, pool, target, place, len(plan.pieces), kernel_says_full=True)


def _fullest_cpu(counts: PoolBooks, target: Target) -> int:
    """The CPU on which the books have most in the way of ``target``."""
    if target.cpus is not None:
        cpus: Iterable[int] = target.cpus
    else:
        bound = counts.bound.get(target.task, ()) if target.task is not None else counts.on_cpu
        cpus = {*bound, next(iter(counts.cpu_wide.above(0)), next(iter(counts.online)))}
    return max(cpus, key=lambda cpu: counts.held_cpu_wide(cpu) + _held_by_tasks(counts, target, cpu))


def _held_by_tasks(counts: PoolBooks, target: Target, cpu: int) -> int:
    """What tasks hold that counts against ``target`` on that CPU: its own slots, or for CPU-wide the busiest task's."""
    return counts.held_by_busiest(cpu) if target.task is None else counts.held_by_task(target.task, cpu)


def _refusal(
    books: Books, pool: Pool, target: Target, cpu: int, pieces: int, kernel_says_full: bool = False
) -> NoFreeSlot:
    counts = books.pools[pool]
    cpu_wide = counts.held_cpu_wide(cpu)
    held = cpu_wide + _held_by_tasks(counts, target, cpu)
    in_the_way = list(_holders(books, f"cpu-wide on cpu {cpu}", books.cpu_wide_on(cpu, pool)))
    unnamed = 0
    if target.task is not None:
        in_the_way += _holders(books, _place(target.task), books.of_task(target.task, cpu, pool))
    else:
        # Where the kernel alone says full, it is the busiest task that our sum is made of.
        above = counts.held_by_busiest(cpu) - 1 if kernel_says_full else counts.slots - pieces - cpu_wide
        for task in counts.busy_tasks(cpu, above):
            if len(in_the_way) < HOLDERS_NAMED:
                in_the_way += _holders(books, _place(task), books.of_task(task, cpu, pool))
            else:
                unnamed += 1
    names = [str(holder) for holder in in_the_way] + ([f"and {unnamed} more tasks"] if unnamed else [])
    where = f"cpu {cpu}" if target.task is None else f"{target} (cpu {cpu})"
    wanted = "" if pieces == 1 else f", {pieces} wanted"
    of_pool = "" if pool is Pool.ANY else f" {pool}"
    if kernel_says_full:
        outside = max(1, counts.slots - held - pieces + 1)
        in_the_way.append(Holder(0, OUTSIDE, 0, "", outside, f"on {where}", evidence="the kernel refused"))
        names.append(f"at least {outside} held outside hwbpd")
        held = counts.slots
    sentence = f"no{of_pool} slot on {where}: {held} of {counts.slots} held{wanted} ({', '.join(names)})"
    return NoFreeSlot(sentence, tuple(in_the_way))


def _holders(books: Books, place: str, resource_ids: Iterable[int]) -> list[Holder]:
    """Who rides on these resources: one holder for each process and kind."""
    slots: dict[tuple[int, str], int] = {}
    claims: dict[tuple[int, str], list[Claim]] = {}
    for resource_id in resource_ids:
        for claim in books.riders[resource_id]:
            who = (claim.owner.pid, claim.kind)
            slots[who] = slots.get(who, 0) + 1
            claims.setdefault(who, []).append(claim)
    return [
        Holder(
            pid=pid,
            comm=claims[pid, kind][0].owner.comm,
            uid=claims[pid, kind][0].owner.uid,
            kind=kind,
            slots=slots[pid, kind],
            place=place,
            claim_ids=tuple(dict.fromkeys(claim.claim_id for claim in claims[pid, kind])),
        )
        for pid, kind in slots
    ]


def _place(task: Task) -> str:
    return f"on tid {task.tid}"


def _range(cpus: Iterable[int]) -> str:
    return f"cpus {format_cpus(tuple(sorted(cpus)))}"


