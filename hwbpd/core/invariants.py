"""
What holds after every step, as assertions with names.

They recount everything from the resources and the claims alone, so they cost what the books hold: tests and the
simulation run them after each step, the daemon does not.
"""

from __future__ import annotations

from collections import Counter

from hwbpd.core.books import Books
from hwbpd.core.lifecycle import ENDED, HOLDING, State
from hwbpd.core.model import Task


def check(books: Books) -> None:
    """Assert every invariant."""
    nothing_is_over_committed(books)
    counts_are_those_of_the_resources(books)
    every_resource_has_a_rider_and_every_rider_its_resources(books)
    sessions_own_their_claims(books)


def nothing_is_waiting(books: Books) -> None:
    """Between two messages nobody sees a claim half armed or half released."""
    halfway = {State.REQUESTED, State.ARMING, State.RELEASING}
    stuck = [claim_id for claim_id, record in books.claims.items() if record.state in halfway]
    assert not stuck, f"claims {stuck} are between states"


def nothing_is_over_committed(books: Books) -> None:
    """On no CPU do CPU-wide slots and those of any one task exceed what there is."""
    for pool, counts in books.pools.items():
        tasks = {*counts.anywhere.keys(), *counts.bound}
        for cpu in books.possible:
            assert 0 <= counts.held_cpu_wide(cpu) <= counts.slots, f"{pool}: cpu {cpu}"
            for task in tasks:
                held = counts.held_cpu_wide(cpu) + counts.held_by_task(task, cpu)
                assert held <= counts.slots, f"{pool}: {held} of {counts.slots} for {task} on cpu {cpu}"


def counts_are_those_of_the_resources(books: Books) -> None:
    """Every count is the number of resources it stands for."""
    for pool, counts in books.pools.items():
        everywhere = 0
        cpu_wide: Counter[int] = Counter()
        anywhere: Counter[Task] = Counter()
        bound: dict[Task, Counter[int]] = {}
        for resource in books.resources.values():
            task, cpus = resource.target.task, resource.target.cpus
            if resource.piece.pool is not pool:
                continue
            if task is None and cpus is None:
                everywhere += 1
            elif task is None:
                cpu_wide.update(cpus or ())
            elif cpus is None:
                anywhere[task] += 1
            else:
                bound.setdefault(task, Counter()).update(cpus)
        on_cpu: dict[int, dict[Task, int]] = {}
        for task, cpus_of_task in bound.items():
            for cpu, count in cpus_of_task.items():
                on_cpu.setdefault(cpu, {})[task] = count + anywhere[task]
        expected = {
            "everywhere": everywhere,
            "cpu_wide": dict(cpu_wide),
            "anywhere": {task: count for task, count in anywhere.items() if count},
            "bound": {task: dict(cpus_of_task) for task, cpus_of_task in bound.items()},
            "on_cpu": on_cpu,
        }
        assert counts.dump() == expected, f"{pool}: {counts.dump()} instead of {expected}"
        for cpu in books.possible:
            by_hand = max((counts.held_by_task(task, cpu) for task in {*anywhere, *bound}), default=0)
            assert counts.held_by_busiest(cpu) == by_hand, f"{pool}: the busiest task on cpu {cpu}"


def every_resource_has_a_rider_and_every_rider_its_resources(books: Books) -> None:
    """No slot is held for nobody, and no claim without the slots it was granted."""
    ridden: dict[int, list[int]] = {}
    for resource_id, riders in books.riders.items():
        assert resource_id in books.resources
        assert riders, f"resource {resource_id} is held for nobody"
        for claim in riders:
            ridden.setdefault(claim.claim_id, []).append(resource_id)
    assert books.riders.keys() == books.resources.keys()
    for claim_id, record in books.claims.items():
        assert record.state not in ENDED, f"claim {claim_id} is over and still in the books"
        if record.state in HOLDING:
            assert sorted(record.resource_ids) == sorted(ridden.pop(claim_id, [])), f"claim {claim_id}"
    assert not ridden, f"slots held for claims that are not in the books: {ridden}"


def sessions_own_their_claims(books: Books) -> None:
    """A claim is listed under its owner's session, and nothing else is."""
    listed = {claim_id: session for session, claims in books.sessions.items() for claim_id in claims}
    assert listed == {claim_id: record.claim.owner.session_id for claim_id, record in books.claims.items()}
