"""
Why is there no room? The answer when no claim is named: where it is full, who holds what there, who waits, and what
would have to change.

The sentences about a place are those that a refused claim would get. They are made from the books as they are, so
whoever is outside them is not here. All of it is bounded, and what is left out is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from hwbpd.core.admission import check_reserve, fits, kept_free
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.counts import PoolBooks
from hwbpd.core.errors import HeldBack, HwbpError, NoFreeSlot
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Access, Piece, Plan, Pool, Span, Target, format_cpus
from hwbpd.core.placing import reserve_for

NAMED = 16  # of each sort
_NEEDS_TO_END = frozenset({State.TAKING, State.TAKEN, State.RESIDUE})


def lines(arbiter: Arbiter, now_ns: int) -> Iterator[str]:
    """Yield the sentences."""
    books, reserve = arbiter.books, arbiter.policy.reserve_slots
    found = [*_full_cpus(books, reserve), *_full_tasks(books, reserve)]
    if not found:
        yield "by the books there is room for one more slot everywhere: for whole cpus, threads and processes"
        yield "where the kernel still has none, somebody outside hwbpd has it; `hwbpctl ls --foreign` looks who"
    for sentence, _ in found[:NAMED]:
        yield sentence
    if len(found) > NAMED:
        yield "and so on in more places"
    yield from _who_waits(arbiter, now_ns)
    if found:
        yield from _what_would_help(books, [refusal for _, refusal in found[:NAMED]])


def in_the_way(arbiter: Arbiter, record: ClaimRecord) -> tuple[int, ...]:
    """The claims that one in the queue waits for: those asked to give way to it, or that hold what it needs."""
    if record.victims:
        return tuple(sorted(record.victims))[:NAMED]
    claim, plan, books = record.claim, record.plan, arbiter.books
    reserve = reserve_for(claim, arbiter.policy)
    ahead = arbiter.queue.blocker(books, claim.target, plan, claim.rank, claim.claim_id, reserve)
    found = [] if ahead is None else [ahead.claim.claim_id]
    refusal = _refusal(books, claim.target, plan, reserve)
    if refusal is not None:
        found += [claim_id for holder in refusal.holders for claim_id in holder.claim_ids]
    return tuple(dict.fromkeys(found))[:NAMED]


def _refusal(books: Books, target: Target, plan: Plan, reserve: int) -> HwbpError | None:
    try:
        fits(books, target, plan)
        check_reserve(books, target, plan, reserve)
    except HwbpError as refusal:
        return refusal
    return None


def _full_cpus(books: Books, reserve: int) -> list[tuple[str, HwbpError]]:
    """Where a whole CPU has no room for one slot more; CPUs on which the same claims are in the way are told as one."""
    alike: dict[object, tuple[HwbpError, list[int]]] = {}
    for pool, counts in books.pools.items():
        for cpu in sorted(books.online):
            refusal = _refusal(books, Target(cpus=(cpu,)), _one_slot(pool), reserve)
            if refusal is not None:
                holders = tuple((holder.slots, holder.claim_ids) for holder in refusal.holders)
                key = pool, counts.slots_on(cpu), type(refusal), holders
                alike.setdefault(key, (refusal, []))[1].append(cpu)
    return [
        (str(refusal) + (f"; the same on cpu {format_cpus(tuple(cpus[1:]))}" if cpus[1:] else ""), refusal)
        for refusal, cpus in alike.values()
    ]


def _full_tasks(books: Books, reserve: int) -> Iterator[tuple[str, HwbpError]]:
    """Which threads and processes have no room for one slot more because of slots of their own."""
    for pool, counts in books.pools.items():
        fullest = [counts.most_cpu_wide(kind) for kind in counts.kinds]
        enough = min(_usable(counts, reserve, cpu) - counts.held_cpu_wide(cpu) for cpu in fullest)
        if enough <= 0:
            continue  # then none has, and whoever is cpu-wide has been named
        targets = [Target(process=process) for process in islice(counts.process.above(enough - 1), NAMED)]
        tasks = dict.fromkeys(islice(counts.anywhere.above(enough - 1), NAMED))
        for cpu, bound in counts.on_cpu.items():
            left = _usable(counts, reserve, cpu) - counts.held_cpu_wide(cpu)
            tasks |= dict.fromkeys(islice(bound.above(left - 1), NAMED))
        for target in (*targets, *map(Target, tasks)):
            refusal = _refusal(books, target, _one_slot(pool), reserve)
            if refusal is not None:
                yield str(refusal), refusal


def _usable(counts: PoolBooks, reserve: int, cpu: int) -> int:
    return counts.slots_on(cpu) - kept_free(counts, reserve, cpu)


def _who_waits(arbiter: Arbiter, now_ns: int) -> Iterator[str]:
    waiting = list(arbiter.queue)
    for record in waiting[:NAMED]:
        claim = record.claim
        until = ""
        if record.state is State.WAITING:
            until = f", for {max(0, claim.wait_until_ns - now_ns) / 1e9:.1f} s more at most"
        behind = _claims(in_the_way(arbiter, record))
        yield (
            f"claim {claim.claim_id} of {claim.owner} as {claim.kind} is {record.state} for {claim.target} since "
            f"{(now_ns - claim.requested_ns) / 1e9:.1f} s{until}" + (f", behind {behind}" if behind else "")
        )
    if len(waiting) > NAMED:
        yield f"and {len(waiting) - NAMED} more wait"


def _what_would_help(books: Books, refusals: Iterable[HwbpError]) -> Iterator[str]:
    refusals = list(refusals)
    named = dict.fromkeys(one for refusal in refusals for holder in refusal.holders for one in holder.claim_ids)
    records = [books.claims[claim_id] for claim_id in named if claim_id in books.claims]
    free = [record for record in records if record.state not in _NEEDS_TO_END]
    kept = [record for record in records if record.state in _NEEDS_TO_END]
    yield "what would have to change:"
    if free:
        highest = max(free, key=lambda record: record.claim.rank).claim
        yield (
            f"- {_claims([record.claim.claim_id for record in free])} end, or give way to a claim of higher rank "
            f"(the highest of them is {highest.kind}, priority {highest.priority})"
        )
    for record in kept:
        claim = record.claim
        yield f"- {claim.target} exits or runs another program: it keeps claim {claim.claim_id}'s slot until then"
    if any(isinstance(refusal, HeldBack) for refusal in refusals):
        yield "- the reserve for users outside hwbpd gets smaller (policy.reserve_slots)"
    if any(isinstance(refusal, NoFreeSlot) and not refusal.holders for refusal in refusals):
        yield "- those outside hwbpd let go"


def _claims(claim_ids: Iterable[int]) -> str:
    ids = list(claim_ids)
    return "" if not ids else f"claim{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"


def _one_slot(pool: Pool) -> Plan:
    return Plan((Piece(Span(0, 1), Access.WRITE, pool),))
