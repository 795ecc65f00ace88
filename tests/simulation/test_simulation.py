"""
Daemon and clients, whole, on fakes, from one seed.

After every turn: the invariants of the books, the books equal to what the fake kernel holds, nothing between states,
replies to every request that was served, hits only to those entitled, and every count exact. A failure prints the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from hwbpd.core import invariants
from hwbpd.core.model import Pool
from hwbpd.settings import Limits, Rings, Settings
from tests.fakes import FakeClient, Rig

TURNS = 400
CLIENTS_MOST = 6
TASKS_MOST = 6

SETTINGS = Settings(
    limits=Limits(claims_per_session=8, messages_queued_per_session=20, hits_bytes_queued_per_session=9600),
    rings=Rings(bytes_default=4096, bytes_max=8192, bytes_per_message=4096),
)


class Expectation:
    """What one client must have seen by now, from the messages it was sent."""

    def __init__(self) -> None:
        self.claims: dict[int, dict[str, Any]] = {}  # granted and not over: what was delivered
        self.granted = 0
        self.notices = 0
        self.unanswered: set[int] = set()

    def see(self, message: dict[str, Any]) -> None:
        if "n" in message:
            self.notices += 1
            assert message["n"] == self.notices, "notices are numbered without a gap"
        else:
            self.unanswered.discard(message["id"])
        match message:
            case {"op": "granted", "claim": claim}:
                self.claims[claim] = {"delivered": 0}
                self.granted += 1
            case {"op": "hits", "claim": claim, "count": count, "records": records}:
                assert claim in self.claims, "hits come only for claims one has"
                assert len(records) == 48 * count
                self.claims[claim]["delivered"] += count
            case {"op": "lost" | "released", "claim": claim}:
                self._over(claim, message)
            case {"op": "closing"}:
                self.claims.clear()

    def _over(self, claim: int, message: dict[str, Any]) -> None:
        if claim not in self.claims:
            return  # somebody else's claim, released by us as operator
        mine = self.claims.pop(claim)
        assert message["delivered"] == mine["delivered"], "what was sent is what was delivered"
        if message["delivered"] or message["lost"] or message["dropped"]:
            assert message["hits"] == message["delivered"] + message["lost"] + message["dropped"]


class Simulation:
    """One random history."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        slots = self.rng.choice([{Pool.ANY: 4}, {Pool.ANY: 2}, {Pool.ANY: 1}])
        self.rig = Rig(slots=slots, cpus=self.rng.randint(1, 4), seed=seed, refuses=0.05, settings=SETTINGS)
        self.seen: dict[FakeClient, Expectation] = {}
        self.everybody: list[Expectation] = []  # those who left, too
        self.actions: list[tuple[int, Callable[[], None]]] = [
            (12, self.claim),
            (6, self.release),
            (3, self.release_of_somebody),
            (8, self.hits),
            (3, self.ask),
            (2, self.nonsense),
            (2, self.connect),
            (1, self.leave),
            (2, self.start_task),
            (1, self.exit_task),
        ]
        for _ in range(3):
            self.connect()
            self.start_task()

    def run(self) -> int:
        """Let it all happen; return how many claims were granted."""
        for _ in range(TURNS):
            weights = [weight for weight, _ in self.actions]
            for _ in range(self.rng.randint(1, 3)):
                self.rng.choices(self.actions, weights)[0][1]()
            self.rig.clock.wind(self.rng.random())
            self.rig.turn()
            self.check()
        self.rig.stop()
        assert not self.rig.machine.armed, "a daemon that stopped holds nothing"
        assert not self.rig.machine.kernel.held
        return sum(seen.granted for seen in self.everybody)

    def check(self) -> None:
        books = self.rig.arbiter.books
        invariants.check(books)
        invariants.nothing_is_waiting(books)
        assert books.resources.keys() == self.rig.machine.kernel.held.keys(), "the books hold what the kernel holds"
        for client, seen in self.seen.items():
            slow = self.rng.random() < 0.3
            if not slow:
                for message in client.read():
                    seen.see(message)
                if self.rig.sessions.on_route(client.routing_id) and not client.inbox:
                    self.rig.turn()  # what waited for room
                    for message in client.read():
                        seen.see(message)
                    session = self.rig.sessions.on_route(client.routing_id)
                    if session is not None and not self.rig.outbox.is_waiting_for(session):
                        assert not seen.unanswered, "every request has its reply"

    def somebody(self) -> FakeClient | None:
        return self.rng.choice(list(self.seen)) if self.seen else None

    def request(self, client: FakeClient, op: str, **fields: Any) -> None:
        self.seen[client].unanswered.add(client.ask(op, **fields))

    # --- what can happen ---------------------------------------------------------------------------------------------

    def connect(self) -> None:
        if len(self.seen) < CLIENTS_MOST:
            client = self.rig.client(hello=False, room=self.rng.choice([30, 1000]))
            self.seen[client] = Expectation()
            self.everybody.append(self.seen[client])
            self.request(client, "hello", version=1)

    def leave(self) -> None:
        client = self.somebody()
        if client is None:
            return
        del self.seen[client]
        match self.rng.randrange(3):
            case 0:
                client.die()
            case 1:
                client.cut()
            case _:
                client.ask("goodbye")

    def claim(self) -> None:
        client = self.somebody()
        tids = [*self.rig.machine.tasks, 99_999]
        cpus = self.rig.machine.topology().online
        if client is None:
            return
        fields: dict[str, Any] = {}
        if self.rng.random() < 0.7:
            fields["tid"] = self.rng.choice(tids)
        if self.rng.random() < 0.5:
            fields["cpus"] = self.rng.choices([*cpus, 77], [10] * len(cpus) + [1], k=self.rng.randint(1, 2))
        fields["delivery"] = self.rng.choice(["hits", "hits", "count", "hold"])
        self.request(client, "claim", address=0x404040, length=8, access="w", **fields)

    def release(self) -> None:
        client = self.somebody()
        if client is not None and self.seen[client].claims:
            self.request(client, "release", claim=self.rng.choice(list(self.seen[client].claims)))

    def release_of_somebody(self) -> None:
        client = self.somebody()
        if client is not None:
            self.request(client, "release", claim=self.rng.randint(0, 50))

    def hits(self) -> None:
        if self.rig.machine.armed:
            resource_id = self.rng.choice(list(self.rig.machine.armed))
            self.rig.machine.hit(resource_id, self.rng.choice([1, 3, 50, 200]))

    def ask(self) -> None:
        client = self.somebody()
        if client is not None:
            op = self.rng.choice(["slots", "capabilities"])
            self.request(client, op)

    def nonsense(self) -> None:
        client = self.somebody()
        if client is not None:
            client.send_bytes(self.rng.randbytes(self.rng.randint(0, 40)))

    def start_task(self) -> None:
        if len(self.rig.machine.tasks) < TASKS_MOST:
            self.rig.machine.start_task(self.rng.randint(800, 810))

    def exit_task(self) -> None:
        if self.rig.machine.tasks:
            self.rig.machine.exit_task(self.rng.choice(list(self.rig.machine.tasks)))


@pytest.mark.parametrize("seed", range(20))
def test_daemon_and_clients_keep_their_word_through_a_random_history(seed: int) -> None:
    # given a daemon, clients and a machine that all follow from one seed, which pytest shows when this fails
    simulation = Simulation(seed)

    # when they claim, release, hit, die, hang up and talk nonsense
    granted = simulation.run()

    # then nothing that is checked after each turn was ever untrue, and it was not for want of claims
    assert granted > 20
