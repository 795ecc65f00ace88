"""
Hostile clients of a daemon on fakes: no process, no socket and no registers, but every message and all that it changes.

After each batch the invariants of the books hold, the books are what the fake kernel holds, and an honest client beside
them has its slot, its hits and its answers.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from hwbpd.core import invariants
from hwbpd.core.model import Pool
from hwbpd.settings import Limits, Rings, Settings
from tests.fakes import EPOCH, FakeClient, Rig
from tests.fuzz.judge import Judge
from tests.fuzz.mouth import Knowledge, Mouth
from tests.fuzz.said import Said

TIDS = (810, 811, 812, 813)
WATCHED, ADDRESS = 812, 0x404040
HITS = 5
BATCH = 20
SETTINGS = Settings(
    limits=Limits(
        claims_per_session=30, sessions=8, messages_queued_per_session=100, hits_bytes_queued_per_session=9600
    ),
    rings=Rings(bytes_default=4096, bytes_max=8192, bytes_per_message=4096),
)


class Tally(NamedTuple):
    """What came of it."""

    messages: int
    replies: int
    granted: int
    connections_cut: int


class Hostile:
    """One hostile client, its mouth and its judge."""

    def __init__(self, siege: Siege, uid: int) -> None:
        self._siege = siege
        rng = siege.rng
        self.uid = uid
        self.knowledge = Knowledge(
            epoch=EPOCH,
            spared=siege.honest_claim,
            tids=list(TIDS),
            pids=[tid - tid % 2 for tid in TIDS],
            addresses=[ADDRESS, ADDRESS + 8, 0xFFFF_FFFF_8100_0000],
            cpus=[0, 1],
            now_ns=siege.rig.clock.now_ns,
        )
        self.mouth = Mouth(random.Random(rng.getrandbits(64)), self.knowledge)
        self.replies = 0
        self.connect()

    def connect(self) -> None:
        self.client: FakeClient = self._siege.rig.client(uid=self.uid, hello=False)
        self.judge = Judge()
        self.knowledge.claims = self.judge.claims

    def say(self, said: Said) -> None:
        self._siege.last.append(said.data)
        self.judge.said(said)
        self.client.send_bytes(said.data)

    def speak(self) -> None:
        no_session = not self.judge.has_session and self._siege.rng.random() < 0.3
        self.say(self.mouth.hello() if no_session else self.mouth.speak())

    def listen(self) -> None:
        for message in self.client.read():
            self.judge.hear(message)
            self.replies += "n" not in message


class Siege:
    """
    One history, from a seed.

    :param refuses: how often the fake kernel refuses what the books allow.
    """

    def __init__(self, seed: int, refuses: float = 0.02) -> None:
        self.rng = random.Random(seed)
        self.last: list[bytes] = []  # of the batch under way
        self.rig = Rig(slots={Pool.ANY: 4}, cpus=2, seed=seed, settings=SETTINGS)
        for tid in TIDS:
            self.rig.machine.start_task(tid)
        self.rig.rights.forbidden.add(WATCHED)
        self._honest = self.rig.client()
        wish = {"address": ADDRESS, "length": 8, "access": "w", "tid": WATCHED, "guard": 0}
        self.honest_claim = int(self.rig.ask(self._honest, "claim", **wish)["claim"])
        self._hits = 0
        self.rig.machine._refuses = refuses
        self._hostiles = [Hostile(self, uid) for uid in (0, 60001, 60002)]
        self._cut = 0

    def run(self, messages: int) -> Tally:
        """Let so many messages come; raises ``AssertionError`` when something is not as it must be."""
        said = 0
        while said < messages:
            self.last.clear()
            for _ in range(min(BATCH, messages - said)):
                self.rng.choice(self._hostiles).speak()
                said += 1
            self._serve()
            if self.rng.random() < 0.05:
                self._disturb(self.rng.choice(self._hostiles))
        self._end()
        replies = sum(hostile.replies for hostile in self._hostiles)
        return Tally(said, replies, self.granted, self._cut)

    @property
    def granted(self) -> int:
        """How many claims were ever granted or tried: their ids count upwards."""
        return max([*self.rig.arbiter.books.claims, *self.rig.arbiter.books.ended])

    def _serve(self) -> None:
        self.rig.turn()
        for hostile in self._hostiles:
            hostile.listen()
            assert hostile.judge.is_settled, "every message has its reply"
        self._check()

    def _check(self) -> None:
        books, machine = self.rig.arbiter.books, self.rig.machine
        invariants.check(books)
        assert books.resources.keys() == machine.kernel.held.keys(), "the books hold what the kernel holds"
        self._hits += HITS
        (resource_id,) = books.claims[self.honest_claim].resource_ids
        machine.hit(resource_id, HITS)
        self.rig.clock.wind(1)  # rings in which little happens are drained at intervals
        self.rig.turn()
        counts = self.rig.ask(self._honest, "counts", claim=self.honest_claim)
        got = sum(message["count"] for message in self._honest.read() if message["op"] == "hits")
        assert (got, counts["delivered"], counts["hits"]) == (HITS, self._hits, self._hits), "the honest client's hits"

    def _disturb(self, hostile: Hostile) -> None:
        """A connection is cut, or its process dies, in the middle of what it said."""
        for _ in range(3):
            hostile.speak()
        if self.rng.random() < 0.5:
            hostile.client.cut()
        else:
            hostile.client.die()
            hostile.client.cut()
        self.rig.turn()
        self._cut += 1
        self.rig.clients.remove(hostile.client)
        hostile.connect()

    def _end(self) -> None:
        for hostile in self._hostiles:
            hostile.client.cut()
        self.rig.turn()
        assert list(self.rig.arbiter.books.claims) == [self.honest_claim], "what the hostile ones had is free"
        assert len(self.rig.sessions) == 1
        final: dict[str, Any] = self.rig.ask(self._honest, "release", claim=self.honest_claim)
        assert final["hits"] == final["delivered"] == self._hits
        assert not self.rig.machine.kernel.held
        self.rig.stop()
