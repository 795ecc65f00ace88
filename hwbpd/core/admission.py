"""
Does one more slot fit here? Exactly the kernel's rule, and nothing else.

For one pool of S(c) slots on CPU c, with C(c) the CPU-wide slots held there and T(t, c) the slots of task t that count
there, armed or not, n more slots fit

1. CPU-wide on c             iff  C(c) + the greatest T(t, c) of any task t, running there or not, + n <= S(c)
2. for task t, anywhere      iff  C(c) + T(t, c) + n <= S(c) on every CPU c there may be
3. for task t, while on c    iff  C(c) + T(t, c) + n <= S(c)
4. for a process             iff  2 holds for each of its threads

S is one number on most machines. Where CPUs differ, Linux knows only the least of them, and so keeps to it everywhere;
by 2 that is what a claim for wherever a task runs comes to here, too, and 1 and 3 have the number of the CPU they are
for.

A vCPU is another machine, with one CPU and no tasks: for it 1 is all there is, and nothing of the host's counts.

Linux, kernel/events/hw_breakpoint.c; the running kernel is asked by ``tests/judges/oracle.py``. Tasks never compete
with each other. Addresses are not compared. The kernel refuses the second of two requests that it would also refuse
together, so several slots for one target, and one slot on several CPUs, are asked for at once.

A policy decides who gets a slot that fits here; it lives elsewhere and never makes more fit. One of them is a number in
the same formula and so has its place here: a reserve of R slots is the rule with S(c) - R for S(c).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from hwbpd.core.books import Books
from hwbpd.core.counts import CpuKind, PoolBooks
from hwbpd.core.errors import KERNEL_REFUSED, CpuOffline, HeldBack, Holder, NoFreeSlot
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Claim, Plan, Pool, Target, Task, format_cpus

HOLDERS_NAMED = 16  # a refusal names at most so many, and counts the rest


def fits(books: Books, target: Target, plan: Plan) -> None:
    """
    Return if every piece of ``plan`` gets a slot on ``target``; change nothing.

    :raises NoFreeSlot: naming who holds the slots on the first place where there is no room.
    :raises CpuOffline: for a CPU that does not exist or, CPU-wide, is offline: there is nothing to arm there.
    """
    check_cpus(books, target)
    for pool, pieces in Counter(piece.pool for piece in plan.pieces).items():
        _check_room(books, pool, target, pieces, reserve=0)


def check_reserve(books: Books, target: Target, plan: Plan, reserve: int) -> None:
    """
    Return if ``plan`` on ``target`` leaves ``reserve`` slots free on each place it counts on; change nothing.

    :param reserve: slots per CPU and pool. At least one slot of a pool serves claims all the same: of S slots, no more
        than S - 1 are kept free.
    :raises HeldBack: naming who holds the other slots on the first place where too few would be left.
    """
    for pool, pieces in Counter(piece.pool for piece in plan.pieces).items():
        if kept_free(books.counts(pool, target), reserve):
            _check_room(books, pool, target, pieces, reserve)


def kept_free(counts: PoolBooks, reserve: int, cpu: int | None = None) -> int:
    """How many slots of a pool such a reserve keeps free on a CPU; without one, on those that have most."""
    return min(reserve, max((counts.slots if cpu is None else counts.slots_on(cpu)) - 1, 0))


def never_fits(books: Books, target: Target, plan: Plan, reserve: int) -> bool:
    """Whether there would be too few slots for it, beside the reserve, even if nobody held any."""
    for pool, pieces in Counter(piece.pool for piece in plan.pieces).items():
        counts = books.counts(pool, target)
        # All CPUs are for a claim CPU-wide on them those online now, and for one on a task those there may be.
        everywhere = [kind.any_cpu for kind in counts.kinds if kind.online or not target.is_cpu_wide]
        for cpu in everywhere if target.cpus is None else target.cpus:
            if pieces > counts.slots_on(cpu) - kept_free(counts, reserve, cpu):
                return True
    return False


def _check_room(books: Books, pool: Pool, target: Target, pieces: int, reserve: int) -> None:
    """Raise for the first place on which more would be held than the reserve leaves."""
    counts = books.counts(pool, target)
    full = next(full_places(counts, target, pieces, reserve), None)
    if full is None:
        return
    cpu, task = full
    kept = kept_free(counts, reserve, cpu)
    cpu_wide = counts.held_cpu_wide(cpu)
    above = counts.slots_on(cpu) - kept - pieces - cpu_wide
    holders, unnamed = _named(books, _in_the_way(books, pool, target, cpu, task, above=above), cpu)
    held = cpu_wide + _held_by_tasks(counts, cpu, task)
    if not kept:
        raise _refusal(counts, pool, target, cpu, held, pieces, holders, unnamed)
    sentence = (
        f"held back: {kept} of {counts.slots_on(cpu)}{_of_pool(pool)} slots on {_where(target, cpu)} are kept free for "
        f"users outside hwbpd (policy.reserve_slots), {held} held{_wanted(pieces)}{_by_whom(holders, unnamed)}"
    )
    raise HeldBack(sentence, tuple(holders))


def check_cpus(books: Books, target: Target) -> None:
    """Raise ``CpuOffline`` for a CPU on which nothing can be armed."""
    for cpu in target.cpus or ():
        if cpu not in books.possible:
            raise CpuOffline(f"no cpu {cpu}: this machine has {_range(books.possible)}")
        if target.is_cpu_wide and cpu not in books.online:
            raise CpuOffline(f"cpu {cpu} is offline; bring it online, or claim on one of {_range(books.online)}")


def full_places(
    counts: PoolBooks, target: Target, pieces: int, reserve: int = 0
) -> Iterator[tuple[int, Task | None]]:
    """
    The CPUs on which ``pieces`` more slots for ``target`` and a reserve are too many, and for which of its threads.

    One CPU stands for all of its kind that have nothing of their own, and one thread for all of a process that have
    not. A pair may come twice. What it costs to see that there is none does not grow with what there is elsewhere.
    """
    if target.task is None and target.process is None:
        for cpu in _cpus_to_look_at(counts) if target.cpus is None else target.cpus:  # 1
            room = counts.slots_on(cpu) - kept_free(counts, reserve, cpu) - pieces
            if counts.held_cpu_wide(cpu) + counts.held_by_busiest(cpu) > room:
                yield cpu, None
        return
    for task in _threads(counts, target):  # 4
        if target.cpus is None:  # 2
            for kind in counts.kinds:
                room = kind.slots - kept_free(counts, reserve, kind.any_cpu) - pieces
                left = room - counts.held_anywhere(task)
                if counts.held_cpu_wide(counts.most_cpu_wide(kind)) > left:
                    for cpu in _cpus_with_more(counts, kind, left):
                        yield cpu, task
            cpus: Iterable[int] = counts.bound.get(task, ())
        else:  # 3
            cpus = target.cpus
        for cpu in cpus:
            room = counts.slots_on(cpu) - kept_free(counts, reserve, cpu) - pieces
            if counts.held_cpu_wide(cpu) + counts.held_by_task(task, cpu) > room:
                yield cpu, task


def _threads(counts: PoolBooks, target: Target) -> Iterator[Task]:
    """The threads a target comes down to, one of them standing for all that have no slots of their own."""
    if target.process is None:
        assert target.task is not None
        yield target.task
        return
    yield Task(tid=0, start_ticks=0, process=target.process)
    yield from counts.threads.get(target.process, ())


def _cpus_to_look_at(counts: PoolBooks) -> Iterator[int]:
    """The online CPUs that have something of their own, and of each kind one that stands for all others."""
    own = counts.have_of_their_own()
    yield from own
    for kind in counts.kinds:
        yield from islice((cpu for cpu in kind.online if cpu not in own), 1)


def _cpus_with_more(counts: PoolBooks, kind: CpuKind, cpu_wide: int) -> Iterator[int]:
    """The CPUs of a kind with more CPU-wide slots than that, a fullest first; one for all with none of their own."""
    most = counts.most_cpu_wide(kind)
    yield most
    partly = (cpu for cpu in counts.not_on if counts.kind_of(cpu) is kind)
    for cpu in {*kind.cpu_wide.above(cpu_wide - counts.everywhere), *partly} - {most}:
        if counts.held_cpu_wide(cpu) > cpu_wide:
            yield cpu
    if counts.everywhere > cpu_wide:
        others = (cpu for cpu in kind.online if not kind.cpu_wide[cpu] and cpu not in counts.not_on and cpu != most)
        yield from islice(others, 1)


# --- who is in the way -----------------------------------------------------------------------------------------------


def refused_by_the_kernel(
    books: Books, target: Target, plan: Plan, cpu: int | None, found: tuple[Holder, ...] = ()
) -> NoFreeSlot:
    """
    Return the refusal for a claim that fits in the books and that the kernel has no room for.

    :param cpu: where the kernel refused, if it said; the claim's own slots are out of the books again.
    :param found: who was found outside. They explain, and are never input to admission: the kernel stays the judge.
    """
    pool = plan.pieces[0].pool
    counts = books.counts(pool, target)
    place, task = _fullest_place(counts, target, cpu)
    in_the_way = _in_the_way(books, pool, target, place, task, above=counts.held_by_busiest(place) - 1)
    holders, unnamed = _named(books, in_the_way, place)
    if found:
        holders += found
    else:
        held = counts.held_cpu_wide(place) + _held_by_tasks(counts, place, task)
        outside = max(1, counts.slots_on(place) - held - len(plan.pieces) + 1)
        holders.append(Holder(0, "outside hwbpd", 0, "", outside, f"on cpu {place}", evidence=KERNEL_REFUSED))
    return _refusal(counts, pool, target, place, counts.slots_on(place), len(plan.pieces), holders, unnamed)


def _fullest_place(counts: PoolBooks, target: Target, cpu: int | None) -> tuple[int, Task | None]:
    """Where the books have most in the way of ``target``."""
    tasks: list[Task | None] = [None] if target.is_cpu_wide else list(_threads(counts, target))
    places = []
    for task in tasks:
        if cpu is not None:
            cpus: Iterable[int] = (cpu,)
        elif target.cpus is not None:
            cpus = target.cpus
        else:
            fullest = (counts.most_cpu_wide(kind) for kind in counts.kinds)
            cpus = {*fullest, *(counts.on_cpu if task is None else counts.bound.get(task, ()))}
        places += [(place, task) for place in cpus]
    return min(places, key=lambda at: _room(counts, *at))


def _room(counts: PoolBooks, cpu: int, task: Task | None) -> int:
    return counts.slots_on(cpu) - counts.held_cpu_wide(cpu) - _held_by_tasks(counts, cpu, task)


def _held_by_tasks(counts: PoolBooks, cpu: int, task: Task | None) -> int:
    """What tasks hold that counts on that CPU: this task's slots, or for CPU-wide the busiest task's."""
    return counts.held_by_busiest(cpu) if task is None else counts.held_by_task(task, cpu)


def _in_the_way(
    books: Books, pool: Pool, target: Target, cpu: int, task: Task | None, above: int
) -> Iterator[int]:
    """The resources that count against ``target`` there; of tasks in the way of CPU-wide ones, those above a count."""
    if target.vcpu is not None:
        yield from books.of_whole(target.vcpu, pool)
        return
    counts = books.pools[pool]
    yield from books.cpu_wide_on(cpu, pool)
    if task is not None:
        yield from books.of_task(task, cpu, pool)
    elif target.is_cpu_wide:
        for process in counts.process.above(above):
            yield from books.of_whole(process, pool)
        for busy in counts.busy_tasks(cpu, above):
            yield from books.of_task(busy, cpu, pool)


def _named(books: Books, resource_ids: Iterable[int], cpu: int) -> tuple[list[Holder], int]:
    """Who rides on these: a holder for each process, kind and place; and how many places were too many to name."""
    claims: dict[tuple[int, str, str], list[Claim]] = {}
    unnamed: set[str] = set()
    for resource_id in dict.fromkeys(resource_ids):
        place = _place(books.resources[resource_id].target, cpu)
        for claim in books.riders[resource_id]:
            record = books.claims.get(claim.claim_id)
            # What a tracer left behind is nobody's to give back: whoever reads this must not go and ask that process.
            is_residue = record is not None and record.state is State.RESIDUE
            who = (claim.owner.pid, "residue" if is_residue else str(claim.kind), place)
            if who in claims or len(claims) < HOLDERS_NAMED:
                claims.setdefault(who, []).append(claim)
            else:
                unnamed.add(place)
    return [
        Holder(
            pid=pid,
            comm=held[0].owner.comm,
            uid=held[0].owner.uid,
            kind=kind,
            slots=len(held),
            place=place,
            claim_ids=tuple(dict.fromkeys(claim.claim_id for claim in held)),
        )
        for (pid, kind, place), held in claims.items()
    ], len(unnamed)


def _refusal(
    counts: PoolBooks,
    pool: Pool,
    target: Target,
    cpu: int,
    held: int,
    pieces: int,
    holders: list[Holder],
    unnamed: int,
) -> NoFreeSlot:
    counted = f"{held} of {counts.slots_on(cpu)} held{_wanted(pieces)}{_by_whom(holders, unnamed)}"
    return NoFreeSlot(f"no{_of_pool(pool)} slot on {_where(target, cpu)}: {counted}", tuple(holders))


def _of_pool(pool: Pool) -> str:
    return "" if pool is Pool.ANY else f" {pool}"


def _where(target: Target, cpu: int) -> str:
    if target.vcpu is not None:
        return str(target)
    return f"cpu {cpu}" if target.is_cpu_wide else f"{target} (cpu {cpu})"


def _wanted(pieces: int) -> str:
    return "" if pieces == 1 else f", {pieces} wanted"


def _by_whom(holders: list[Holder], unnamed: int) -> str:
    names = [str(holder) for holder in holders] + ([f"and {unnamed} more tasks"] if unnamed else [])
    return f" ({', '.join(names)})" if names else ""


def _place(target: Target, cpu: int) -> str:
    if target.is_cpu_wide:
        return f"cpu-wide on cpu {cpu}"
    return f"on tid {target.task.tid}" if target.task is not None else f"on {target}"


def _range(cpus: Iterable[int]) -> str:
    return f"cpus {format_cpus(tuple(sorted(cpus)))}"
