"""
What is counted is what happened: after random histories every number equals a recount that owes nothing to the meter.

Numbers of the present are recounted from the books and from the fake kernel, numbers of the past from the log and from
what the clients were sent.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from hwbpd.attribution import Place
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Effect, Refuse
from hwbpd.core.events import AnyEvent, ArmFailed, ForeignFound, RearmFailed
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Delivery, Kind, Pool, Target
from hwbpd.hookspecs import Foreign
from hwbpd.messages import Error
from hwbpd.metered import MeteredServer
from hwbpd.metrics import ARMING, BOOKS, BOUNDS_NS, DOOR, STATES, Histogram, Reading
from hwbpd.outbox import Outbox
from hwbpd.settings import Limits, Settings
from tests import strategies
from tests.fakes import RECORD, FakeNetwork, Rig
from tests.simulation.test_simulation import Simulation
from tests.slow_model import cpu_wide, of_busiest

CLAIM: dict[str, Any] = {"address": 0x404040, "length": 8, "access": "w"}
SEEDS = range(8)


def rig_with_a_meter() -> Rig:
    return Rig(make_server=MeteredServer)


def reading_of(rig: Rig) -> Reading:
    assert isinstance(rig.server, MeteredServer)
    return rig.server.meter.reading()


def some(counts: Mapping[Any, int]) -> dict[Any, int]:
    """Those that are not nought."""
    return {key: count for key, count in counts.items() if count}


class MeteredSimulation(Simulation):
    """A random history in which everything is counted a second time."""

    def __init__(self, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.steps: Counter[type[AnyEvent]] = Counter()
        self.errors: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.arrived = self.turns = 0
        patch.setattr(Arbiter, "step", self.spied_step(Arbiter.step))
        patch.setattr(Outbox, "send", self.spied_send(Outbox.send))
        patch.setattr(Outbox, "reply_to_stranger", self.spied_send(Outbox.reply_to_stranger))
        patch.setattr(FakeNetwork, "arrive", self.spied_arrive(FakeNetwork.arrive))
        patch.setattr(MeteredServer, "turn", self.spied_turn(MeteredServer.turn))
        super().__init__(seed, MeteredServer)

    def spied_step(self, step: Any) -> Any:
        def spied(arbiter: Arbiter, event: AnyEvent) -> list[Effect]:
            self.steps[type(event)] += 1
            effects: list[Effect] = step(arbiter, event)
            tried = isinstance(event, (ArmFailed, ForeignFound, RearmFailed))
            self.refused[ARMING if tried else BOOKS] += sum(isinstance(effect, Refuse) for effect in effects)
            return effects

        return spied

    def spied_send(self, send: Any) -> Any:
        def spied(outbox: Outbox, to: Any, message: Any) -> None:
            if isinstance(message, Error):
                self.errors[message.errno] += 1
            send(outbox, to, message)

        return spied

    def spied_arrive(self, arrive: Any) -> Any:
        def spied(network: FakeNetwork, incoming: Any) -> None:
            self.arrived += 1
            arrive(network, incoming)

        return spied

    def spied_turn(self, turn: Any) -> Any:
        def spied(server: MeteredServer, block: bool = True) -> bool:
            self.turns += 1
            goes_on: bool = turn(server, block)
            return goes_on

        return spied

    def run(self) -> Counter[str]:
        with capture_logs() as self.log:
            happened = super().run()
            self.check_counters(reading_of(self.rig))
        return happened

    def check(self) -> None:
        super().check()
        reading = reading_of(self.rig)
        self.check_gauges(reading)
        self.check_counters(reading)

    def check_gauges(self, reading: Reading) -> None:
        books, kernel = self.rig.arbiter.books, self.rig.machine.kernel
        events = self.events()
        assert reading.slots == kernel.slots
        assert reading.held == {
            (cpu, pool): cpu_wide(events, cpu, pool) + of_busiest(events, cpu, pool)
            for cpu in kernel.online
            for pool in kernel.slots
        }
        assert reading.resources == sum(number >= 0 for number in kernel.held)
        assert reading.sessions == len(tuple(self.rig.sessions))
        assert some(reading.claims) == Counter((one.claim.kind, one.state) for one in books.claims.values())

    def check_counters(self, reading: Reading) -> None:
        books = self.rig.arbiter.books
        logged = Counter(line["event"] for line in self.log)
        ended = [line for line in self.log if line["event"] == "ended"]
        records = {**books.ended, **books.claims}
        kinds = Counter(records[line["claim_id"]].claim.kind for line in self.log if line["event"] == "granted")
        assert some(reading.grants) == kinds
        assert some(reading.ended) == Counter(line["how"] for line in ended)
        assert reading.guard_trips == logged["guarded"]
        assert reading.messages == self.arrived
        assert sum(reading.served.counts) <= reading.messages
        assert some({event: sum(one.counts) for event, one in reading.steps.items()}) == self.steps

        by_errno: Counter[str] = Counter()
        by_whom: Counter[str] = Counter()
        for (by, name), count in reading.refusals.items():
            by_errno[name] += count
            by_whom[by] += count
        assert some(by_errno) == self.errors
        assert some({by: by_whom[by] for by in (BOOKS, ARMING)}) == some(self.refused)
        assert by_whom[DOOR] == self.errors.total() - self.refused.total()

        hits: Counter[Delivery] = Counter()
        ways: Counter[str] = Counter()
        for line in ended:
            delivery = records[line["claim_id"]].claim.mode.delivery
            hits[delivery] += line["hits"]
            ways += Counter({way: line[way] for way in ("delivered", "lost", "dropped")})
        for claim_id, record in books.claims.items():
            account = self.rig.server._hits.account(claim_id)
            hits[record.claim.mode.delivery] += account.hits
            ways += Counter({way: getattr(account, way) for way in ("delivered", "lost", "dropped")})
        assert some(reading.hits) == some(hits)
        counted = {"delivered": reading.delivered, "lost": reading.lost, "dropped": reading.dropped}
        assert some(counted) == some(ways)
        assert reading.hits[Delivery.HITS] == ways.total() + reading.filtered, "every hit went one way"


@pytest.mark.parametrize("seed", SEEDS)
def test_every_number_equals_a_recount_all_through_a_random_history(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a daemon with a meter, whose clients, machine and log are recounted after every turn
    simulation = MeteredSimulation(seed, monkeypatch)

    # when everything happens that follows from a seed, to the end of the daemon
    simulation.run()

    # then no number was ever wrong, and at the end there is nobody any more
    reading = reading_of(simulation.rig)
    assert reading.wakeups == simulation.turns
    assert reading.guard_trips + sum(reading.refusals.values()) > 0
    assert not some(reading.claims)
    assert (reading.sessions, reading.resources) == (0, 0)
    meter = simulation.rig.server.meter  # type: ignore[attr-defined]
    assert [*meter._known, *meter._counted] == [], "what is over is forgotten"


def test_the_histories_have_claims_in_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[State] = set()
    for seed in SEEDS:
        simulation = MeteredSimulation(seed, monkeypatch)
        monkeypatch.setattr(
            simulation, "check_gauges", lambda reading: seen.update(state for _, state in some(reading.claims))
        )
        simulation.run()
        monkeypatch.undo()

    assert seen == set(STATES)


def test_hits_of_a_claim_that_only_counts_are_known_at_its_end() -> None:
    # given a claim that counts, and has no guard that would have it looked at meanwhile
    rig = rig_with_a_meter()
    rig.machine.start_task(812)
    client = rig.client()
    claim = rig.ask(client, "claim", **CLAIM, tid=812, delivery="count", guard=0)["claim"]
    rig.machine.hit(1, 5)
    rig.turn()
    assert reading_of(rig).hits[Delivery.COUNT] == 0

    # when it is released
    rig.ask(client, "release", claim=claim)

    # then they are counted, and are no hits that went anywhere
    assert some(reading_of(rig).hits) == {Delivery.COUNT: 5}
    assert reading_of(rig).delivered == 0
    rig.stop()


def test_hits_that_a_client_does_not_read_are_counted_once() -> None:
    # given a client that reads nothing more, and room for 85 hits on their way to it
    room = 4096 // RECORD.size
    rig = Rig(make_server=MeteredServer, settings=Settings(limits=Limits(hits_bytes_queued_per_session=4096)))
    client = rig.client(room=1)
    client.ask("claim", **CLAIM)
    rig.turn()

    # when as many come again and again
    for _ in range(4):
        rig.machine.hit(1, room)
        rig.clock.wind(1.0)
        rig.turn()

    # then those for which there was no room are counted, each once
    reading = reading_of(rig)
    assert (reading.hits[Delivery.HITS], reading.delivered, reading.dropped) == (4 * room, room, 3 * room)
    rig.stop()


# --- others ----------------------------------------------------------------------------------------------------------


def test_what_a_look_found_is_kept_by_cpu_with_its_time() -> None:
    # given a debugger outside that has two slots on each CPU, and another three on a thread
    rig = rig_with_a_meter()
    client = rig.client()
    rig.machine.outside = [
        Foreign(7, "gdb", 0, 1, "cpu-wide on cpu 0", "perf fd"),
        Foreign(0, "", -1, 1, "cpu-wide on cpu 0", "unattributed"),
        Foreign(8, "gdb", 0, 2, "on tid 812", "tracer"),
        Foreign(8, "gdb", 0, 1, "on tid 813", "tracer"),
        Foreign(9, "perf", 0, 0, "somewhere", "perf fd?"),
    ]
    assert reading_of(rig).foreign == {}

    # when root has a look made
    rig.ask(client, "foreign")

    # then a CPU has those on it and those of the busiest thread, and it is known since when
    foreign = reading_of(rig).foreign
    assert {place: look.slots for place, look in foreign.items()} == {(0, Pool.ANY): 4, (1, Pool.ANY): 2}
    assert all(0 < look.at_s <= reading_of(rig).at_s for look in foreign.values())
    assert reading_of(rig).foreign_of_task == {}

    # when they are gone and another look is made
    rig.machine.outside = []
    rig.ask(client, "foreign")

    # then they are gone
    assert {look.slots for look in reading_of(rig).foreign.values()} == {0}
    rig.stop()


def test_a_look_at_a_thread_says_nothing_of_cpus() -> None:
    rig = rig_with_a_meter()
    assert isinstance(rig.server, MeteredServer)
    found = [Foreign(8, "gdb", 0, 3, "on tid 800", "tracer"), Foreign(7, "perf", 0, 1, "cpu-wide on cpu 0", "perf fd")]

    rig.server.meter.looked(Place(Pool.ANY, Target(strategies.task(0)), 0), found)

    reading = reading_of(rig)
    assert reading.foreign == {}
    assert {pool: look.slots for pool, look in reading.foreign_of_task.items()} == {Pool.ANY: 3}
    rig.stop()


def test_a_look_at_one_cpu_says_nothing_of_another() -> None:
    rig = rig_with_a_meter()
    assert isinstance(rig.server, MeteredServer)

    rig.server.meter.looked(Place(Pool.ANY, Target(), 1), [Foreign(7, "perf", 0, 1, "cpu-wide on cpu 1", "perf fd")])

    assert reading_of(rig).foreign.keys() == {(1, Pool.ANY)}
    rig.stop()


def test_a_reading_makes_no_look_of_its_own() -> None:
    rig = rig_with_a_meter()

    reading_of(rig)
    rig.turn()

    assert rig.attribution.looked_at == []
    rig.stop()


# --- histograms and readings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ns", "bucket"),
    [(0, 0), (999, 0), (1000, 0), (1001, 1), (2000, 1), (10**9, len(BOUNDS_NS) - 1), (10**9 + 1, len(BOUNDS_NS))],
)
def test_a_bound_belongs_to_the_bucket_below_it(ns: int, bucket: int) -> None:
    histogram = Histogram()

    histogram.observe(ns)

    assert [index for index, count in enumerate(histogram.counts) if count] == [bucket]
    assert histogram.sum_ns == ns


def test_bounds_ascend_from_a_microsecond() -> None:
    assert BOUNDS_NS[0] == 1000
    assert list(BOUNDS_NS) == sorted(set(BOUNDS_NS))


def test_a_reading_does_not_change_any_more() -> None:
    # given a reading of a daemon that has done something
    rig = rig_with_a_meter()
    client = rig.client()
    rig.ask(client, "slots")
    reading = reading_of(rig)
    before = repr(reading), reading.served.counts.copy(), {e: h.counts.copy() for e, h in reading.steps.items()}

    # when more happens
    rig.ask(client, "claim", **CLAIM)
    rig.ask(client, "foreign")
    rig.ask(client, "goodbye")

    # then it says what it said
    assert before == (repr(reading), reading.served.counts, {e: h.counts for e, h in reading.steps.items()})
    assert reading_of(rig).grants[Kind.PERF] == 1
    rig.stop()


def test_a_reading_costs_the_same_however_many_claims_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # given daemons with one claim and with 200, on as many threads
    def lines_run(claims: int) -> int:
        rig = rig_with_a_meter()
        client = rig.client()
        for tid in range(800, 800 + claims):
            rig.machine.start_task(tid)
            assert rig.ask(client, "claim", **CLAIM, tid=tid, delivery="count")["op"] == "granted"
        lines = 0

        def trace(*_: Any) -> Any:
            nonlocal lines
            lines += 1
            return trace

        before = sys.gettrace()
        gc.disable()  # whatever else looks on when garbage is collected is not the meter's doing
        sys.settrace(trace)
        try:
            reading_of(rig)
        finally:
            sys.settrace(before)
            gc.enable()
        rig.stop()
        return lines

    # when each is read, then as much is done for it
    assert lines_run(1) == lines_run(200)


def test_without_metrics_nothing_of_prometheus_is_loaded() -> None:
    program = "import sys, hwbpd.__main__; sys.exit('prometheus_client' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
