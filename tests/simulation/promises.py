"""
What is promised to those who use the daemon, as assertions with names, over a ``Shell`` and its simulated kernel.

They stand beside ``hwbpd/core/invariants.py``, which knows the books alone: these compare the books with the kernel,
with what owners were told, and with rules that are written out here once more, slowly. ``check`` is cheap and runs
after every event and what comes of it; ``check_all`` costs what the world holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from hwbpd.core import invariants
from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.effects import Arm, Attend, Effect
from hwbpd.core.lifecycle import ARMED_BY_US, QUEUED, State
from hwbpd.core.model import ArmedBy, Claim, Delivery, Kind, Plan, Pool, Process, Resource, Target, Task
from tests.simulation.kernel import Counts
from tests.simulation.shell import Shell
from tests.slow_model import ANY_CPU, Event, cpu_wide, of_busiest

# How a claim stands for its owner, and how it may stand in the books then.
STANDS = {
    State.WAITING: {"queued"},
    State.DISPLACING: {"asked", "queued"},
    State.ATTRIBUTING: {"asked", "queued"},
    State.ARMED: {"granted"},
    State.GUARDED: {"granted"},
    State.YIELDING: {"granted"},
    State.TAKING: {"granted"},
    State.TAKEN: {"granted"},
    State.SUSPENDED: {"suspended"},
}
UNANSWERED = {State.ATTRIBUTING, State.DISPLACING}  # whose owner may still wait for the first word


def check(shell: Shell) -> None:
    """After each event."""
    invariants.nothing_is_waiting(shell.arbiter.books)
    nothing_is_over_committed(shell)
    what_the_books_hold_the_kernel_holds(shell)
    owners_know_how_their_claims_stand(shell)
    requests_are_answered(shell)
    hits_go_to_those_entitled(shell)
    only_lower_ones_give_way(shell)


def check_all(shell: Shell) -> None:
    """What costs more."""
    invariants.check(shell.arbiter.books)
    the_kernel_counts_as_the_slow_model(shell)
    the_books_count_what_the_kernel_has(shell)
    nobody_waits_for_what_is_free(shell)


# --- books and kernel ------------------------------------------------------------------------------------------------


def nothing_is_over_committed(shell: Shell) -> None:
    """In the books, and in the kernel."""
    for pool, counts in shell.arbiter.books.pools.items():
        for cpu in shell.kernel.possible:
            in_books = counts.held_cpu_wide(cpu) + counts.held_by_busiest(cpu)
            assert in_books <= counts.slots, f"{in_books} of {counts.slots} slots of {pool} in the books, cpu {cpu}"
            held = shell.kernel.cpu_wide(cpu, pool) + shell.kernel.busiest(cpu, pool)
            assert held <= counts.slots, f"{held} of {counts.slots} slots of {pool} in the kernel, cpu {cpu}"


def what_the_books_hold_the_kernel_holds(shell: Shell) -> None:
    """Every slot in the books is armed, or a tracer's; and nothing else of ours is armed."""
    books = shell.arbiter.books
    ours = {resource_id for resource_id in shell.kernel.held if resource_id > 0}
    assert not ours & shell.attended, "a slot is the daemon's or a tracer's"
    assert books.resources.keys() == ours | shell.attended, "the books hold what was taken, and no more"
    for resource_id in shell.attended:
        (rider,) = books.riders[resource_id]
        assert rider.armed_by is ArmedBy.TRACER
    assert books.online == set(shell.kernel.online)


def the_kernel_counts_as_the_slow_model(shell: Shell) -> None:
    """The simulated kernel's own counts have not drifted."""
    events = shell.kernel.events()
    for pool in shell.kernel.slots:
        for cpu in shell.kernel.possible:
            assert shell.kernel.cpu_wide(cpu, pool) == cpu_wide(events, cpu, pool), "the simulated kernel counts wrong"
            assert shell.kernel.busiest(cpu, pool) == of_busiest(events, cpu, pool), "the simulated kernel counts wrong"


def the_books_count_what_the_kernel_has(shell: Shell) -> None:
    """Leg by leg for what the daemon armed; of tracers' slots the books may keep more for a while, and never fewer."""
    books, kernel = shell.arbiter.books, shell.kernel
    kept: Counter[tuple[Task, Pool]] = Counter()
    for resource_id, resource in books.resources.items():
        if resource_id in shell.attended:
            assert resource.target.task is not None
            kept[resource.target.task, resource.piece.pool] += 1
        else:
            assert sorted(map(_key, legs(books, resource))) == sorted(map(_key, kernel.held[resource_id])), resource
    for (task, pool), made in kernel.made.items():
        assert made <= kept[task, pool], f"tracers have {made} slots on tid {task.tid}, the books {kept[task, pool]}"


def _key(event: Event) -> tuple[str, int]:
    return str(event.task), event.cpu


# --- what owners are told --------------------------------------------------------------------------------------------


def owners_know_how_their_claims_stand(shell: Shell) -> None:
    """No claim is lost: each is held, queued or over, and its owner has heard which, and nothing that is untrue."""
    claims = shell.arbiter.books.claims
    for claim_id, believed in shell.beliefs.items():
        assert claim_id in claims, f"claim {claim_id} is {believed.stands} for its owner and not in the books"
        state = claims[claim_id].state
        assert believed.stands in STANDS.get(state, ()), f"claim {claim_id} is {state}, for its owner {believed.stands}"
        assert believed.asked_to_yield == (state is State.YIELDING), f"claim {claim_id} is {state}"
        is_silent = state is State.GUARDED or (state is State.YIELDING and believed.is_guarded)
        assert believed.is_guarded == is_silent, f"claim {claim_id} is {state}"
    for claim_id, record in claims.items():
        if claim_id in shell.beliefs or record.state is State.RESIDUE:
            continue
        assert record.state in UNANSWERED, f"claim {claim_id} is {record.state}, and nobody knows"


def requests_are_answered(shell: Shell) -> None:
    """Each once, and at once but for claims whose first word has to wait."""
    if not shell.asked:
        return
    silent: Counter[int] = Counter()
    for claim_id, record in shell.arbiter.books.claims.items():
        if record.state in UNANSWERED and claim_id not in shell.beliefs:
            silent[record.claim.owner.session_id] += 1
    owed = Counter(session_id for session_id, _ in shell.asked.values())
    assert owed == silent, f"requests without an answer: {shell.asked}"
    assert {what for _, what in shell.asked.values()} == {"claim"}, f"requests without an answer: {shell.asked}"


def nothing_is_overdue(shell: Shell) -> None:
    """After a tick: every wait has been answered by its deadline, and nobody is still to give way."""
    now_ns = shell.now_ns
    for claim_id, record in shell.arbiter.books.claims.items():
        until_ns = record.claim.wait_until_ns
        assert record.state is not State.WAITING or until_ns > now_ns, f"claim {claim_id} has waited too long"
        assert record.state is not State.YIELDING or record.yield_by_ns > now_ns, f"claim {claim_id} had to give way"
    assert (shell.arbiter.next_deadline_ns() or now_ns + 1) > now_ns, "a deadline has passed, and is still to come"


# --- hits ------------------------------------------------------------------------------------------------------------


def hits_go_to_those_entitled(shell: Shell) -> None:
    """To each claim that rides on the slot and was granted it, with the right span; to nobody else."""
    books = shell.arbiter.books
    for resource_id in shell.routes:
        assert resource_id in books.resources, "hits come from what is held"
    for resource_id, riders in books.riders.items():
        routed = shell.routes.get(resource_id, set())
        if resource_id in shell.attended:  # nothing comes of it but news of the thread
            assert routed <= {rider.claim_id for rider in riders}
            continue
        entitled = {rider.claim_id for rider in riders if books.claims[rider.claim_id].state in ARMED_BY_US}
        assert routed == entitled, f"hits of resource {resource_id} go to {routed}, {entitled} are entitled"
        if len(riders) > 1:
            _may_share(books.resources[resource_id], riders)


def _may_share(resource: Resource, riders: tuple[Claim, ...]) -> None:
    """Those who share a slot want the very same of it."""
    for rider in riders:
        mode = rider.mode
        assert rider.armed_by is ArmedBy.DAEMON
        assert mode.delivery is not Delivery.HOLD
        assert rider.target == resource.target
        assert (mode.user, mode.kernel, mode.across_exec) == (
            resource.mode.user,
            resource.mode.kernel,
            resource.mode.across_exec,
        )
        offset = resource.piece.span.address - rider.span.address
        assert 0 <= offset < rider.span.length_bytes, f"claim {rider.claim_id} did not ask for that"


# --- rank and order --------------------------------------------------------------------------------------------------


def only_lower_ones_give_way(shell: Shell) -> None:
    """Strictly lower, and only for root or their own user; never what a tracer has touched."""
    claims = shell.arbiter.books.claims
    for victim, displacers in shell.displaced:
        assert displacers, "whoever gives way hears for whom"
        for claim_id in displacers:
            record = shell.arbiter.record(claim_id)
            assert record is not None
            _may_displace(record.claim, victim)
    for waiting in claims.values():
        for claim_id in waiting.victims if waiting.state is State.DISPLACING else ():
            assert claim_id in claims, f"claim {waiting.claim.claim_id} waits for claim {claim_id}, which is over"
            _may_displace(waiting.claim, claims[claim_id].claim)


def _may_displace(claim: Claim, victim: Claim) -> None:
    who = f"claim {victim.claim_id} gives way to claim {claim.claim_id}"
    assert claim.rank > victim.rank, f"{who}, no higher"
    assert claim.privileged or claim.owner.uid == victim.owner.uid, f"{who}, of another user"
    assert victim.armed_by is ArmedBy.DAEMON or victim.placeholder, f"{who}, and its tracer has it"


def slots_are_taken_fairly(shell: Shell, effects: list[Effect]) -> None:
    """
    Whoever takes slots in this step leaves the reserve free, and overtakes nobody who waits for the same room.

    See ``hwbpd/core/queue.py`` for the rule of the queue.
    """
    takers = [effect for effect in effects if isinstance(effect, Arm | Attend)]
    if not takers:
        return
    books = shell.arbiter.books
    held = counts_of(books)
    queued = [record for record in books.claims.values() if record.state in QUEUED]
    for taker in takers:
        _add(held, books, taker, -1)
    for taker in takers:  # in the order in which they were served
        _add(held, books, taker, 1)
        claim, plan = taker.claim, Plan(tuple(resource.piece for resource in taker.resources))
        reserve = _reserve(shell, claim)
        for pool in _pieces(plan) if reserve else ():
            kept = min(reserve, held.slots[pool] - 1)
            for cpu, whose in _places(books, claim.target):
                used = _held(held, pool, cpu, whose)
                assert used + kept <= held.slots[pool], f"claim {claim.claim_id} takes the reserve of cpu {cpu}"
        for waiter in queued:
            ahead = waiter.claim
            if _is_before(ahead, claim) and _lack_room(shell, held, waiter, claim, plan, 0):
                raise AssertionError(f"claim {claim.claim_id} takes the room that claim {ahead.claim_id} waits for")


def _add(held: Counts, books: Books, taker: Arm | Attend, by: int) -> None:
    for resource in taker.resources:
        for event in legs(books, resource):
            held.add(event, by)


def nobody_waits_for_what_is_free(shell: Shell) -> None:
    """
    Whoever waits lacks room, or somebody who stands before it does: the displaced are put back, and waiters are served.

    Those excepted whom the kernel has refused lately, and, for as long as others are asked to give way to somebody, who
    stands behind that one.
    """
    books = shell.arbiter.books
    queued = [record for record in books.claims.values() if record.state in QUEUED]
    if not queued:
        return
    held = counts_of(books)
    displacing = [record.claim for record in queued if record.state is State.DISPLACING]
    for record in queued:
        claim = record.claim
        if record.retry_at_ns > shell.now_ns or record.state is State.DISPLACING:
            continue
        if any(_is_before(one, claim) for one in displacing):
            continue
        if claim.target.is_cpu_wide and not books.online.issuperset(claim.target.cpus or ()):
            continue
        reserve = _reserve(shell, claim)
        has_room = all(
            _held(held, pool, *place) + pieces + min(reserve, held.slots[pool] - 1) <= held.slots[pool]
            for pool, pieces in _pieces(record.plan).items()
            for place in _places(books, claim.target)
        )
        if has_room and not any(
            _is_before(other.claim, claim)
            and _lack_room(shell, held, other, claim, record.plan, 1)
            for other in queued
        ):
            raise AssertionError(f"claim {claim.claim_id} is {record.state}, and there is room for it")


def _reserve(shell: Shell, claim: Claim) -> int:
    return 0 if claim.kind is Kind.KGDB else shell.policy.reserve_slots


def _is_before(one: Claim, other: Claim) -> bool:
    """In the queue: the higher rank, then the older."""
    return one.claim_id != other.claim_id and (one.rank, -one.claim_id) > (other.rank, -other.claim_id)


def _lack_room(shell: Shell, held: Counts, waiter: ClaimRecord, claim: Claim, plan: Plan, times: int) -> bool:
    """Whether on some place where both count there is no room for both; ``plan`` is counted ``times`` more."""
    books = shell.arbiter.books
    one, other = waiter.claim.target, claim.target
    mine, its = _pieces(plan), _pieces(waiter.plan)
    only_online = any(target.is_cpu_wide and target.cpus is None for target in (one, other))
    for pool in mine.keys() & its.keys():
        kept = min(_reserve(shell, claim), _reserve(shell, waiter.claim), held.slots[pool] - 1)
        more = its[pool] + kept + mine[pool] * times
        for cpu, whose in _common_places(books, one, other):
            if (not only_online or cpu in books.online) and _held(held, pool, cpu, whose) + more > held.slots[pool]:
                return True
    return False


# --- places ----------------------------------------------------------------------------------------------------------

_Whose = Task | Process | None  # a process: any thread of it that has nothing of its own; None: the busiest task


def legs(books: Books, resource: Resource) -> list[Event]:
    """The legs that a resource has by the books."""
    target, pool = resource.target, resource.piece.pool
    if not target.is_cpu_wide:
        return [Event(target.task or target.process, cpu, pool) for cpu in target.cpus or (ANY_CPU,)]
    absent = books.absent.get(resource.resource_id, ())
    cpus = books.online if target.cpus is None else target.cpus
    return [Event(None, cpu, pool) for cpu in cpus if cpu not in absent]


def counts_of(books: Books) -> Counts:
    """What the books hold, counted anew from the resources alone."""
    counts = Counts({pool: of.slots for pool, of in books.pools.items()}, sorted(books.possible))
    for resource in books.resources.values():
        for event in legs(books, resource):
            counts.add(event)
    return counts


def _held(counts: Counts, pool: Pool, cpu: int, whose: _Whose) -> int:
    by_tasks = counts.busiest(cpu, pool) if whose is None else counts.of(whose, cpu, pool)
    return counts.cpu_wide(cpu, pool) + by_tasks


def _places(books: Books, target: Target) -> Iterator[tuple[int, _Whose]]:
    """Where a target counts."""
    if target.is_cpu_wide:
        yield from ((cpu, None) for cpu in (books.online if target.cpus is None else target.cpus))
        return
    for cpu in books.possible if target.cpus is None else target.cpus:
        yield from ((cpu, whose) for whose in _threads(books, target))


def _common_places(books: Books, one: Target, other: Target) -> Iterator[tuple[int, _Whose]]:
    """Where both count."""
    cpus = books.possible.intersection(books.possible if one.cpus is None else one.cpus)
    cpus = cpus.intersection(books.possible if other.cpus is None else other.cpus)
    if one.is_cpu_wide and other.is_cpu_wide:
        yield from ((cpu, None) for cpu in cpus)
        return
    if one.is_cpu_wide or other.is_cpu_wide:
        of_both = _threads(books, other if one.is_cpu_wide else one)
    else:
        of_both = _threads(books, one) & _threads(books, other)
        if one.process is not None and other.task is not None and other.task.process == one.process:
            of_both = {other.task}
        if other.process is not None and one.task is not None and one.task.process == other.process:
            of_both = {one.task}
    yield from ((cpu, whose) for cpu in cpus for whose in of_both)


def _threads(books: Books, target: Target) -> set[Task | Process]:
    """The threads a target comes down to; the process itself for those that have nothing of their own."""
    if target.process is None:
        assert target.task is not None
        return {target.task}
    named = {one.target.task for one in books.resources.values() if one.target.task is not None}
    return {target.process, *(task for task in named if task.process == target.process)}


def _pieces(plan: Plan) -> Counter[Pool]:
    return Counter(piece.pool for piece in plan.pieces)
