"""
Every history of a small world, so many acts deep.

2 CPUs with 2 slots, one thread, and 3 owners: root, and two users. Each may claim CPU 0, all CPUs or the thread, at a
low or a high priority, waiting or not; release; yield; die; and time may pass to whatever is due next. The promises of
the simulation are checked after each act, and from each state all room is brought back, so that everybody has to be
served in the end.

Two histories that lead to the same claims in the same states, in the same order, with the same time left, go on alike:
each such state is looked at once. When owners were last told that others want their room is left out: it decides what
is told, not who gets what. Acts take no time by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msgspec import Struct

from hwbpd.core.lifecycle import QUEUED, State
from hwbpd.core.model import Pool
from tests.simulation import acts
from tests.simulation.acts import Act, Place, World
from tests.simulation.play import Play
from tests.simulation.shell import SECOND_NS

WORLD = World(slots={Pool.ANY: 2}, cpus=2, tasks=1, reserve_slots=0, rearm_after_ns=0)
OWNERS = (0, 1, 3)  # root, and two users
PLACES = (Place(cpus=(0,)), Place(), Place(task=0))
PRIORITIES = (-1, 0)
WAITS_NS = (0, SECOND_NS)

History = tuple[Act, ...]
Canonical = tuple[Any, ...]  # of a world


class Found(Struct, frozen=True):
    """What a search has seen; ``broken`` is the first history that breaks a promise, and the sentence."""

    states: int
    edges: int
    broken: tuple[History, str] | None = None


def played(history: History) -> Play:
    """Play a history; raises ``AssertionError`` where it breaks a promise."""
    here = Play(WORLD, act_ns=0)
    for act in history[:-1]:
        here.do(act, thoroughly=False)  # checked when it was the last
    if history:
        here.do(history[-1])
    return here


def next_acts(here: Play, number: int) -> Iterator[Act]:
    """Everything that may happen next; ``number`` is for the claim, if it is one."""
    for owner in OWNERS:
        for place in PLACES:
            for priority in PRIORITIES:
                for wait_ns in WAITS_NS:
                    yield acts.Claims(
                        number, owner, place, Pool.ANY, address=number, priority=priority, wait_ns=wait_ns
                    )
    owner_of = {session: owner for owner, session in here.sessions.items()}
    numbers = {claim_id: number for number, claim_id in here.claim_ids.items()}
    for claim_id, believed in here.shell.beliefs.items():
        yield acts.Releases(owner_of[believed.claim.owner.session_id], numbers[claim_id])
        if believed.asked_to_yield:
            yield acts.Yields(numbers[claim_id])
    for owner in OWNERS:
        if any(record.claim.owner.session_id == here.sessions.get(owner) for record in _records(here)):
            yield acts.Dies(owner)
    due = sorted(when for record in _records(here) for when in _due(record))
    if due:
        yield acts.Waits(due[0] - here.shell.now_ns)


def _records(here: Play) -> Iterable[Any]:
    return here.shell.arbiter.books.claims.values()


def _due(record: Any) -> list[int]:
    """When a claim has planned something."""
    due = []
    if record.state in QUEUED and record.state is not State.SUSPENDED and record.claim.wait_until_ns:
        due.append(record.claim.wait_until_ns)
    if record.state is State.YIELDING:
        due.append(record.yield_by_ns)
    if record.state in QUEUED and record.retry_at_ns:
        due.append(record.retry_at_ns)
    return due


def state_of(here: Play) -> Canonical:
    """What decides how a history goes on: claims by age, with their age's number instead of their id."""
    age = {record.claim.claim_id: nth for nth, record in enumerate(_records(here), 1)}
    owner_of = {session: owner for owner, session in here.sessions.items()}
    now_ns = here.shell.now_ns
    return tuple(
        (
            owner_of[record.claim.owner.session_id],
            record.claim.target.cpus,
            record.claim.target.task is not None,
            record.claim.priority,
            record.state,
            # A wait that cannot come any more decides nothing.
            record.claim.wait_until_ns - now_ns if record.state in {State.WAITING, State.DISPLACING} else 0,
            record.yield_by_ns - now_ns if record.state is State.YIELDING else 0,
            record.retry_at_ns - now_ns if record.state in QUEUED and record.retry_at_ns else 0,
            tuple(sorted(age.get(one, 0) for one in record.displacers)),
            tuple(sorted(age[victim] for victim in record.victims if victim in age)),
            record.has_displaced and record.state in QUEUED,
            record.claim.claim_id in here.shell.beliefs,
        )
        for record in _records(here)
    )


class Next(Struct, frozen=True):
    """What follows from one history by one act more: the states, each with its history, or what broke."""

    states: list[tuple[Canonical, History]]
    edges: int
    broken: tuple[History, str] | None = None


def expand(history: History) -> Next:
    """Play every act that may come next, each from the start, and see whether all goes well in the end."""
    found: list[tuple[Canonical, History]] = []
    edges = 0
    for act in list(next_acts(played(history), len(history) + 1)):
        longer = (*history, act)
        edges += 1
        try:
            found.append((state_of(played(longer)), longer))
        except Exception as failure:  # whatever the core raises is a failure, too
            return Next(found, edges, (longer, f"{type(failure).__name__}: {failure}"))
    return Next(found, edges)


def ends_well(history: History) -> str | None:
    """Bring all room back; return what broke, if anything did."""
    try:
        played(history).finish()
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    return None


Map = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]


def search(depth: int, ends_depth: int, map_over: Map = map) -> Found:
    """
    Look at every state that so many acts can lead to.

    :param ends_depth: up to how many acts also what follows when all room is brought back.
    :param map_over: like ``map``; other processes may do the work.
    """
    seen = {state_of(played(()))}
    frontier: list[History] = [()]
    edges = 0
    for acts_before in range(depth):
        following: list[History] = []
        for result in map_over(expand, frontier):
            edges += result.edges
            if result.broken is not None:
                return Found(len(seen), edges, result.broken)
            for state, history in result.states:
                if state not in seen:
                    seen.add(state)
                    following.append(history)
        ends = following if acts_before < ends_depth else []
        for history, broken in zip(ends, map_over(ends_well, ends), strict=True):
            if broken is not None:
                return Found(len(seen), edges, (history, f"all room is brought back, and {broken}"))
        frontier = following
    return Found(len(seen), edges)
