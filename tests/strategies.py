"""
Random owners, claims, targets and histories, for whoever tests a rule of the core.

What is drawn is small on purpose: few CPUs, few tasks and few slots meet each other often, and a failure shrinks to a
story one can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hypothesis import strategies as st

from hwbpd.core.model import (
    Access,
    Claim,
    Delivery,
    Kind,
    Mode,
    Owner,
    Piece,
    Plan,
    Pool,
    Process,
    Resource,
    Span,
    Target,
    Task,
)

CPUS_MOST = 6
TASKS_MOST = 8
OPERATIONS_MOST = 40
TIDS_FROM = 800


class World(NamedTuple):
    """A machine and the tasks on it."""

    slots: dict[Pool, int]  # per CPU
    possible: tuple[int, ...]
    online: tuple[int, ...]  # some of the possible ones, at least one
    tasks: tuple[Task, ...]
    slots_on: Mapping[int, dict[Pool, int]] = {}  # of CPUs that have other numbers of slots

    def has(self, cpu: int, pool: Pool) -> int:
        """How many slots a CPU has."""
        return self.slots_on.get(cpu, self.slots)[pool]


class Take(NamedTuple):
    """Ask for slots, and take them if they fit."""

    owner: Owner
    target: Target
    plan: Plan


class GiveBack(NamedTuple):
    """Release one of the claims that hold something: the ``nth``, modulo how many there are."""

    nth: int


class History(NamedTuple):
    """What happens in a world, in order."""

    world: World
    operations: list[Take | GiveBack]


def task(number: int) -> Task:
    """Return the ``number``-th task; each is another thread, two of them to a process."""
    first = number - number % 2
    return Task(TIDS_FROM + number, 1000 + number, Process(TIDS_FROM + first, 1000 + first))


def owner(number: int) -> Owner:
    """Return the ``number``-th owner, a process with a session of its own."""
    return Owner(session_id=number + 1, pid=100 + number, uid=1000 + number % 3, gid=1000, comm=f"owner{number}")


def piece(pool: Pool, number: int = 0) -> Piece:
    """Return a piece that takes one slot of ``pool``; no two numbers have the same address."""
    access = Access.EXECUTE if pool is Pool.INST else Access.WRITE
    return Piece(Span(0x1000 + 8 * number, 8), access, pool)


def resource(resource_id: int, target: Target, pool: Pool) -> Resource:
    """Return a resource of one slot."""
    return Resource(resource_id, piece(pool, resource_id), target, Mode(delivery=Delivery.COUNT))


def claim(claim_id: int, owned_by: Owner, target: Target, kind: Kind = Kind.PERF) -> Claim:
    """Return a claim whose span says nothing: the books do not look at it."""
    mode = Mode(delivery=Delivery.COUNT)
    return Claim(claim_id, owned_by, kind, Span(0x1000, 8), Access.WRITE, mode, target, label="", requested_ns=claim_id)


owners = st.builds(owner, st.integers(0, 3))


def differing(slots: Mapping[Pool, int], possible: tuple[int, ...]) -> st.SearchStrategy[dict[int, dict[Pool, int]]]:
    """The ``slots_on`` of a world: for half of them nothing."""
    numbers = st.fixed_dictionaries({pool: st.integers(1, 5) for pool in slots})
    return st.one_of(st.just({}), st.dictionaries(st.sampled_from(possible), numbers, min_size=1))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """
    Machines with one pool or two, of 1 to 5 slots, and 1 to 6 possible CPUs, not all of them online.

    Every other one has CPUs with other numbers of slots than the rest.
    """
    counts = st.integers(1, 5)
    slots = draw(
        st.one_of(
            st.fixed_dictionaries({Pool.ANY: counts}),
            st.fixed_dictionaries({Pool.INST: counts, Pool.DATA: counts}),
        )
    )
    possible = tuple(range(draw(st.integers(1, CPUS_MOST))))
    online = draw(st.sets(st.sampled_from(possible), min_size=1))
    number_of_tasks = draw(st.one_of(st.integers(1, 2), st.integers(1, TASKS_MOST)))
    tasks = tuple(task(number) for number in range(number_of_tasks))
    return World(slots, possible, tuple(sorted(online)), tasks, draw(differing(slots, possible)))


def targets(world: World, stray: bool = False) -> st.SearchStrategy[Target]:
    """All five forms. With ``stray``, a few name CPUs that are offline or that the machine does not have."""
    nearby = (*world.possible, len(world.possible)) if stray else world.online
    some = st.sets(st.sampled_from(world.online), min_size=1)
    any_cpus = st.one_of(some, some, st.sets(st.sampled_from(nearby), min_size=1)) if stray else some
    cpus = st.one_of(st.none(), any_cpus.map(lambda chosen: tuple(sorted(chosen))))
    processes = st.sampled_from(sorted({task.process for task in world.tasks if task.process}, key=lambda one: one.pid))
    of_tasks = st.builds(Target, st.one_of(st.none(), st.sampled_from(world.tasks)), cpus)
    return st.one_of(of_tasks, of_tasks, st.builds(Target, process=processes))


def plans(world: World, most: int = 3) -> st.SearchStrategy[Plan]:
    """Plans of one to ``most`` pieces, out of any of the world's pools."""
    pools = st.lists(st.sampled_from(sorted(world.slots)), min_size=1, max_size=most)
    return pools.map(lambda chosen: Plan(tuple(piece(pool, number) for number, pool in enumerate(chosen))))


@st.composite
def histories(draw: st.DrawFn, stray: bool = True) -> History:
    """Worlds, and what happens in them: two takes for one release, so that they fill up."""
    world = draw(worlds())
    takes = st.builds(Take, owners, targets(world, stray), plans(world))
    releases = st.builds(GiveBack, st.integers(0, 63))
    # Lists whose length is left to hypothesis have five entries on average, which fill nothing.
    length = draw(st.integers(0, OPERATIONS_MOST))
    return History(world, draw(st.lists(st.one_of(takes, takes, releases), min_size=length, max_size=length)))
