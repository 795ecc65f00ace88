"""
What holds after every step, as assertions with names.

They recount everything from the resources and the claims alone, so they cost what the books hold: tests and the
simulation run them after each step, the daemon does not.
"""

from __future__ import annotations

from collections import Counter

from hwbpd.core.books import Books
from hwbpd.core.lifecycle import ENDED, HALFWAY, HOLDING, QUEUED, State
from hwbpd.core.model import ArmedBy, Process, Task
from hwbpd.core.queue import Queue


def check(books: Books) -> None:
    """Assert every invariant."""
    nothing_is_over_committed(books)
    counts_are_those_of_the_resources(books)
    each_vcpu_has_what_is_held_on_it(books)
    every_resource_has_a_rider_and_every_rider_its_resources(books)
    sessions_own_their_claims(books)


def nothing_is_waiting(books: Books) -> None:
    """Between two messages nobody sees a claim half armed or half released."""
    halfway = HALFWAY | {State.REQUESTED}
    stuck = [claim_id for claim_id, record in books.claims.items() if record.state in halfway]
    assert not stuck, f"claims {stuck} are between states"


def who_waits_is_queued(books: Books, queue: Queue) -> None:
    """The queue has those who wait, in their order, and nobody else; they hold nothing."""
    waiting = {claim_id for claim_id, record in books.claims.items() if record.state in QUEUED}
    order = [record.claim for record in queue]
    assert {claim.claim_id for claim in order} == waiting
    assert order == sorted(order, key=lambda claim: (tuple(-number for number in claim.rank), claim.claim_id))
    for claim_id in waiting:
        assert not books.claims[claim_id].resource_ids, f"claim {claim_id} waits and holds something"


def nothing_is_over_committed(books: Books) -> None:
    """On no CPU do CPU-wide slots and those of any one task exceed what there is."""
    for pool, counts in books.pools.items():
        for cpu in books.possible:
            assert 0 <= counts.held_cpu_wide(cpu) <= counts.slots_on(cpu), f"{pool}: cpu {cpu}"
            held = counts.held_cpu_wide(cpu) + counts.held_by_busiest(cpu)
            assert held <= counts.slots_on(cpu), f"{pool}: {held} of {counts.slots_on(cpu)} on cpu {cpu}"
    for vcpu, pools in books.vcpus.items():
        for pool, counts in pools.items():
            assert 0 <= counts.held_cpu_wide(0) <= counts.slots_on(0), f"{pool}: {vcpu}"


def counts_are_those_of_the_resources(books: Books) -> None:
    """Every count is the number of resources it stands for."""
    for pool, counts in books.pools.items():
        of_pool = [resource for resource in books.resources.values() if resource.piece.pool is pool]
        resources = [resource for resource in of_pool if resource.target.vcpu is None]
        targets = [resource.target for resource in resources]
        everywhere = [one.resource_id for one in resources if one.target.is_cpu_wide and one.target.cpus is None]
        not_on = Counter(cpu for resource_id in everywhere for cpu in books.absent.get(resource_id, ()))
        on_one = Counter(
            cpu
            for one in resources
            if one.target.is_cpu_wide
            for cpu in one.target.cpus or ()
            if cpu not in books.absent.get(one.resource_id, ())
        )
        of_process: Counter[Process | None] = Counter(
            target.process for target in targets if target.process is not None
        )
        own = Counter(target.task for target in targets if target.task is not None and target.cpus is None)
        bound: dict[Task, Counter[int]] = {}
        for target in targets:
            if target.task is not None and target.cpus is not None:
                bound.setdefault(target.task, Counter()).update(target.cpus)
        tasks = {*own, *bound}
        anywhere = {task: own[task] + of_process[task.process] for task in tasks}
        on_cpu: dict[int, dict[Task, int]] = {}
        for task, cpus in bound.items():
            for cpu, count in cpus.items():
                on_cpu.setdefault(cpu, {})[task] = count + anywhere[task]
        expected = {
            "everywhere": len(everywhere),
            "not_on": dict(not_on),
            "cpu_wide": dict(on_one),
            "process": dict(of_process),
            "own": dict(own),
            "bound": {task: dict(cpus) for task, cpus in bound.items()},
            "anywhere": {task: count for task, count in anywhere.items() if count},
            "on_cpu": on_cpu,
        }
        dump = counts.dump()
        threads = {task for of_one in dump.pop("threads").values() for task in of_one}
        assert dump == expected, f"{pool}: {dump} instead of {expected}"
        assert threads == {task for task in tasks if task.process is not None}, f"{pool}: {threads}"
        for kind in counts.kinds:
            online = {cpu for cpu in books.online if counts.kind_of(cpu) is kind}
            assert kind.online == online, f"{pool}: cpus with {kind.slots} slots"
        for cpu in books.possible:
            by_hand = max((counts.held_by_task(task, cpu) for task in tasks), default=0)
            by_hand = max([by_hand, *of_process.values()])
            assert counts.held_by_busiest(cpu) == by_hand, f"{pool}: the busiest task on cpu {cpu}"


def each_vcpu_has_what_is_held_on_it(books: Books) -> None:
    """A vCPU's counts are its resources, and no vCPU is held on that is not there."""
    held = Counter((one.target.vcpu, one.piece.pool) for one in books.resources.values() if one.target.vcpu is not None)
    for vcpu, pools in books.vcpus.items():
        for pool, counts in pools.items():
            assert counts.held_cpu_wide(0) == held.pop((vcpu, pool), 0), f"{pool}: {vcpu}"
    assert not held, f"slots of vcpus that are not there: {held}"


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
    owned = {claim_id: record for claim_id, record in books.claims.items() if record.state is not State.RESIDUE}
    for claim_id in listed.keys() - owned.keys():
        # What a tracer released is listed no more; while it is given back, that shows in its state only.
        raise AssertionError(f"claim {claim_id} is listed and not owned")
    for claim_id, record in owned.items():
        if claim_id in listed:
            assert listed[claim_id] == record.claim.owner.session_id
        else:
            assert record.claim.armed_by is ArmedBy.TRACER, f"claim {claim_id} is nobody's"
            assert record.state in {State.RELEASING, State.TAKING}, f"claim {claim_id} is nobody's and {record.state}"
