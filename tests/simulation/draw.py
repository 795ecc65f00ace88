"""
Worlds and acts at random, from one seed: small, full, and with something going wrong at every corner.

Most acts are about what there is just now (a claim to release, one that was asked to yield, a tracer in its window), so
they are drawn while the history is played; what was drawn is a value, and can be played again without any dice.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

from hwbpd.core.lifecycle import QUEUED, State
from hwbpd.core.model import Delivery, Kind, Pool
from tests.simulation import acts
from tests.simulation.acts import Act, Place, World
from tests.simulation.play import GRACE_NS, UIDS, Play
from tests.simulation.shell import SECOND_NS

CPUS_MOST = 4
TASKS_MOST = 6
CLAIMS_MOST = 32
THIEVES = 4
MACHINES = ({Pool.ANY: 4}, {Pool.ANY: 2}, {Pool.ANY: 1}, {Pool.INST: 2, Pool.DATA: 2})


def world(rng: random.Random) -> World:
    """A machine, and how its daemon is set."""
    return World(
        slots=rng.choice(MACHINES),
        cpus=rng.randint(1, CPUS_MOST),
        tasks=rng.randint(1, TASKS_MOST),
        reserve_slots=rng.choice([0, 0, 1]),
        rearm_after_ns=rng.choice([0, SECOND_NS // 2]),
    )


class Dice:
    """Draws the next act for a world as it stands."""

    def __init__(self, rng: random.Random, play: Play) -> None:
        self._rng = rng
        self._play = play
        self._asked = 0
        self._pools = list(play.world.slots)
        # A quiet world has few faults, so that long queues form; in a wild one nothing lasts.
        wild = rng.choice([1, 1, 4])
        table: list[tuple[int, Callable[[], Act]]] = [
            (24, self._claims),
            (8, self._releases),
            (6, self._yields),
            (6, self._takes),
            (6, self._pokes),
            (5, self._says_how),
            (3, self._waits),
            (3, self._looks),
            (2, self._hits),
            (1, self._rearms),
            (2, self._starts),
            (1 * wild, self._dies),
            (1 * wild, self._exits),
            (1 * wild, self._execs),
            (1 * wild, self._cpu_changes),
            (1 * wild, self._steals),
            (2 * wild, self._returns),
            (1 * wild, self._refuses),
            (1, self._news),
            (1, acts.FuseBlows),
            (1, acts.RearmFails),
        ]
        self._weights = [weight for weight, _ in table]
        self._draws = [draw for _, draw in table]

    def act(self) -> Act:
        return self._rng.choices(self._draws, self._weights)[0]()

    def _claims(self) -> Act:
        rng, world = self._rng, self._play.world
        if len(self._play.shell.arbiter.books.claims) >= CLAIMS_MOST:
            return self._releases()
        owner = rng.randrange(len(UIDS))
        is_root = UIDS[owner] == 0
        kinds = [Kind.PERF, Kind.PERF, Kind.PERF, Kind.PTRACE, Kind.BACKGROUND]
        is_tracer = rng.random() < 0.25
        # A tracer claims one slot at a time: had it taken but some of several, nobody would know which.
        place = Place(task=rng.randrange(world.tasks)) if is_tracer else self._place()
        self._asked += 1
        return acts.Claims(
            number=self._asked,
            owner=owner,
            place=place,
            pool=rng.choice(self._pools),
            pieces=1 if is_tracer else rng.choice([1, 1, 1, 2]),
            address=rng.randrange(3),
            kind=Kind.PTRACE if is_tracer else rng.choice([*kinds, Kind.KGDB, Kind.KVM] if is_root else kinds),
            priority=rng.choice([0, 0, 0, 5, -5] if is_root else [0, 0, -1, -5]),
            delivery=Delivery.HOLD if is_tracer else rng.choice([Delivery.HITS, Delivery.HITS, Delivery.COUNT]),
            wait_ns=rng.choice([0, 0, SECOND_NS // 50, 10 * SECOND_NS]),
            guard_per_s=0 if is_tracer else rng.choice([0, 0, 20]),
            is_tracer=is_tracer,
            placeholder=rng.random() < 0.7,
        )

    def _place(self) -> Place:
        rng, world = self._rng, self._play.world
        some = tuple(sorted(rng.sample(range(world.cpus), k=rng.randint(1, min(2, world.cpus)))))
        match rng.choice(["all", "cpus", "cpus", "task", "task", "task", "bound", "process"]):
            case "all":
                return Place()
            case "cpus":
                return Place(cpus=some)
            case "task":
                return Place(task=rng.randrange(world.tasks))
            case "bound":
                return Place(task=rng.randrange(world.tasks), cpus=some)
            case _:
                return Place(process=rng.randrange(world.tasks) // 2)

    def _number(self, *states: State) -> int:
        """A claim in one of these states, or any that ever was."""
        claims = self._play.shell.arbiter.books.claims
        found = [
            number
            for number, claim_id in self._play.claim_ids.items()
            if claim_id in claims and claims[claim_id].state in states
        ]
        if found and self._rng.random() < 0.95:
            return self._rng.choice(found)
        return self._rng.randint(1, max(1, self._asked))

    def _releases(self) -> Act:
        number = self._number(State.ARMED, State.TAKEN, State.TAKING, State.GUARDED, State.YIELDING, *QUEUED)
        believed = self._play.shell.beliefs.get(self._play.claim_ids.get(number, 0))
        owner = self._rng.randrange(len(UIDS))
        if believed is not None and self._rng.random() < 0.9:
            session = believed.claim.owner.session_id
            owner = next(one for one, of in self._play.sessions.items() if of == session)
        return acts.Releases(owner, number)

    def _yields(self) -> Act:
        return acts.Yields(self._number(State.YIELDING))

    def _takes(self) -> Act:
        claims = self._play.shell.arbiter.books.claims
        tracers = [
            number
            for number, claim_id in self._play.claim_ids.items()
            if claim_id in claims and claims[claim_id].claim.armed_by == "tracer"
        ]
        return acts.Takes(self._rng.choice(tracers) if tracers else self._number(State.ARMED))

    def _pokes(self) -> Act:
        return acts.Pokes(self._number(State.TAKING))

    def _says_how(self) -> Act:
        return acts.SaysHow(self._number(State.TAKING))

    def _rearms(self) -> Act:
        return acts.Rearms(self._number(State.GUARDED))

    def _hits(self) -> Act:
        return acts.Hits(self._number(State.ARMED), self._rng.choice([1, 3, 100]))

    def _waits(self) -> Act:
        return acts.Waits(self._rng.choice([GRACE_NS // 4, GRACE_NS, SECOND_NS, 3 * SECOND_NS]))

    def _looks(self) -> Act:
        return acts.Looks(self._rng.randrange(4))

    def _starts(self) -> Act:
        return acts.Starts(self._rng.randrange(self._play.world.tasks))

    def _dies(self) -> Act:
        return acts.Dies(self._rng.randrange(len(UIDS)))

    def _exits(self) -> Act:
        return acts.Exits(self._rng.randrange(self._play.world.tasks), late=self._rng.random() < 0.3)

    def _execs(self) -> Act:
        return acts.Execs(self._rng.randrange(self._play.world.tasks), late=self._rng.random() < 0.3)

    def _news(self) -> Act:
        return acts.News()

    def _cpu_changes(self) -> Act:
        return acts.CpuChanges(self._rng.randrange(self._play.world.cpus))

    def _steals(self) -> Act:
        return acts.Steals(self._rng.randint(1, THIEVES), self._place(), self._rng.choice(self._pools))

    def _returns(self) -> Act:
        return acts.Returns(self._rng.randint(1, THIEVES))

    def _refuses(self) -> Act:
        return acts.Refuses(self._rng.choice([errno.ENOSPC, errno.ENOSPC, errno.ESRCH, errno.EMFILE]))
