"""
Daemon and clients, whole, on fakes, from one seed.

Several users claim threads, processes and CPUs; threads run other programs and exit, CPUs come and go, breakpoints are
flooded, the kernel refuses what should fit, and looks at who is in the way take their time. After every turn: the
invariants of the books, the books equal to what the fake kernel holds on each CPU, nothing between states, replies to
every request that was served (those for which somebody still looks excepted), hits only to those entitled, and every
count exact. A failure prints the seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from hwbpd.core import invariants
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Pool
from hwbpd.hookspecs import Foreign
from hwbpd.server import Server
from hwbpd.settings import Guard, Limits, Rings, Settings
from tests.fakes import IN_KERNEL, IN_USER, KERNEL_IP, RECORD, ROOT, FakeClient, Rig
from tests.slow_model import cpu_wide, of_busiest

TURNS = 400
CLIENTS_MOST = 6
TASKS_MOST = 6
UIDS = (ROOT, 1000, 1000, 1001)
PIDS_HIT = (800, 802, 804)  # whose instructions hit CPU-wide breakpoints
NOWHERE = 99_999
GUARD_PER_S = 100

LIMITS = Limits(
    claims_per_session=8,
    claims_per_uid=10,
    legs_per_uid=24,
    sessions_per_uid=3,
    messages_queued_per_session=20,
    hits_bytes_queued_per_session=9600,
)
RINGS = Rings(bytes_default=4096, bytes_max=8192, bytes_per_message=4096)


class Expectation:
    """What one client must have seen by now, from the messages it was sent."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.claims: dict[int, dict[str, Any]] = {}  # granted and not over: what was asked, and delivered so far
        self.asked: dict[int, dict[str, Any]] = {}  # requests not answered
        self.seen: Counter[str] = Counter()
        self.notices = 0

    def see(self, message: dict[str, Any]) -> None:
        request: dict[str, Any] = {}
        if "n" in message:
            self.notices += 1
            assert message["n"] == self.notices, "notices are numbered without a gap"
        else:
            request = self.asked.pop(message["id"], {})
        self.seen[" ".join([message["op"], message.get("reason", message.get("errno", ""))]).strip()] += 1
        match message:
            case {"op": "granted", "claim": claim}:
                self.claims[claim] = {**request, "delivered": 0, "guarded": False}
                assert message["kind"] == ("perf" if request["kind"] == "kgdb" and self.uid else request["kind"])
            case {"op": "hits", "claim": claim, "count": count, "records": records}:
                assert claim in self.claims, "hits come only for claims one has"
                self._check_records(self.claims[claim], count, records)
                self.claims[claim]["delivered"] += count
            case {"op": "lost" | "released", "claim": claim} if "cpu" not in message:
                self._over(claim, message)
            case {"op": "guarded" | "resumed" | "suspended" | "lost", "claim": claim}:
                self._goes_on(self.claims[claim], message)
            case {"op": "closing"}:
                self.claims.clear()
            case {"op": "foreign"}:
                assert self.uid == ROOT
            case {"op": "slots", "resources": rows}:
                for row in rows:
                    owners = {of["uid"] for of in row["claims"]}
                    assert (row["address"] is not None) == (self.uid in (ROOT, *owners)), "others' are not shown"

    def _goes_on(self, mine: dict[str, Any], message: dict[str, Any]) -> None:
        if "cpu" in message:
            assert message["op"] != "lost" or message["reason"] == "offline"
            assert not ({"tid", "pid"} & mine.keys()), "what follows a thread has no slot of a CPU to lose"
            return
        assert mine["guarded"] == (message["op"] == "resumed"), "only what was silent reports again"
        mine["guarded"] = not mine["guarded"]

    def _check_records(self, asked: dict[str, Any], count: int, records: bytes) -> None:
        assert len(records) == RECORD.size * count
        for _, where, _, ip, pid, *_ in RECORD.iter_unpack(records):
            if asked.get("only_pid"):
                assert pid == asked["only_pid"], "hits of other processes are not delivered"
            if where == IN_KERNEL:
                assert ip == (KERNEL_IP if self.uid == ROOT else 0), "where the kernel runs is root's to know"

    def _over(self, claim: int, message: dict[str, Any]) -> None:
        if claim not in self.claims:
            return  # somebody else's claim, released by us as operator
        mine = self.claims.pop(claim)
        assert message["delivered"] == mine["delivered"], "what was sent is what was delivered"
        account: Counter[str] = Counter(message)
        self.seen["filtered"] += account["filtered"] > 0
        if mine["delivery"] == "hits":
            ways = account["delivered"] + account["lost"] + account["dropped"] + account["filtered"]
            assert message["hits"] == ways, "every hit went one way"
        if not mine.get("only_pid"):
            assert not account["filtered"]


class Simulation:
    """One random history."""

    def __init__(self, seed: int, make_server: type[Server] = Server) -> None:
        self.rng = random.Random(seed)
        slots = self.rng.choice([{Pool.ANY: 4}, {Pool.ANY: 2}, {Pool.ANY: 1}])
        guard = Guard(hits_per_s=GUARD_PER_S, rearm_after_s=self.rng.choice([0.0, 5.0]))
        self.rig = Rig(
            slots=slots,
            cpus=self.rng.randint(1, 4),
            seed=seed,
            refuses=0.05,
            settings=Settings(limits=LIMITS, rings=RINGS, guard=guard),
            make_server=make_server,
        )
        self.rig.rights.allowed_cpu_wide = self.rng.random() < 0.7
        self.seen: dict[FakeClient, Expectation] = {}
        self.everybody: list[Expectation] = []  # those who left, too
        self.actions: list[tuple[int, Callable[[], None]]] = [
            (14, self.claim),
            (5, self.release),
            (3, self.release_of_somebody),
            (8, self.hits),
            (3, self.flood),
            (5, self.rearm),
            (3, self.ask),
            (1, self.foreign),
            (2, self.nonsense),
            (2, self.connect),
            (1, self.leave),
            (3, self.start_task),
            (1, self.exit_task),
            (1, self.exec_task),
            (1, self.become_privileged),
            (2, self.change_cpus),
            (2, self.look),
        ]
        for _ in range(3):
            self.connect()
            self.start_task()

    def run(self) -> Counter[str]:
        """Let it all happen; return what the clients were sent, by name."""
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
        return sum((seen.seen for seen in self.everybody), Counter[str]())

    def check(self) -> None:
        books = self.rig.arbiter.books
        invariants.check(books)
        invariants.nothing_is_waiting(books)
        self.check_slots()
        for client, seen in self.seen.items():
            slow = self.rng.random() < 0.3
            if not slow:
                self.read(client, seen)
                if self.rig.sessions.on_route(client.routing_id) and not client.inbox:
                    self.rig.turn()  # what waited for room
                    self.read(client, seen)
                    self.check_answered(client, seen)
        self.check_claims()

    def check_slots(self) -> None:
        """The books hold what the kernel holds, on each CPU."""
        books, kernel = self.rig.arbiter.books, self.rig.machine.kernel
        assert books.resources.keys() == kernel.held.keys()
        assert books.online == set(kernel.online)
        events = kernel.events()
        for pool, counts in books.pools.items():
            for cpu in kernel.possible:
                assert counts.held_cpu_wide(cpu) == cpu_wide(events, cpu, pool), f"cpu {cpu}"
                assert counts.held_by_busiest(cpu) == of_busiest(events, cpu, pool), f"cpu {cpu}"

    def check_answered(self, client: FakeClient, seen: Expectation) -> None:
        """Every request has its reply, but those for which somebody looks who is in the way."""
        session = self.rig.sessions.on_route(client.routing_id)
        if session is None or self.rig.outbox.is_waiting_for(session):
            return
        of_session = self.rig.arbiter.books.sessions.get(session.session_id, ())
        records = [self.rig.arbiter.books.claims[claim_id] for claim_id in of_session]
        looked_into = sum(record.state is State.ATTRIBUTING for record in records)
        waiting = [asked["op"] for asked in seen.asked.values()]
        if not self.rig.attribution.is_looking:
            assert not waiting, "every request has its reply"
        assert sorted({*waiting} - {"foreign", "claim"}) == []
        assert waiting.count("claim") == looked_into

    def check_claims(self) -> None:
        """What clients believe they have is what the books say they have."""
        for client, seen in self.seen.items():
            session = self.rig.sessions.on_route(client.routing_id)
            if session is None or client.inbox or self.rig.outbox.is_waiting_for(session):
                continue
            books = self.rig.arbiter.books
            mine = {claim_id: books.claims[claim_id].state for claim_id in books.sessions.get(session.session_id, ())}
            assert seen.claims.keys() == {claim for claim, state in mine.items() if state is not State.ATTRIBUTING}
            for claim, believed in seen.claims.items():
                assert believed["guarded"] == (mine[claim] is State.GUARDED)

    def read(self, client: FakeClient, seen: Expectation) -> None:
        for message in client.read():
            seen.see(message)

    def somebody(self) -> FakeClient | None:
        return self.rng.choice(list(self.seen)) if self.seen else None

    def request(self, client: FakeClient, op: str, **fields: Any) -> None:
        self.seen[client].asked[client.ask(op, **fields)] = {"op": op, **fields}

    # --- what can happen ---------------------------------------------------------------------------------------------

    def connect(self) -> None:
        if len(self.seen) < CLIENTS_MOST:
            client = self.rig.client(hello=False, uid=self.rng.choice(UIDS), room=self.rng.choice([30, 1000]))
            self.seen[client] = Expectation(client.uid)
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
        tids = [*self.rig.machine.tasks, NOWHERE]
        cpus = self.rig.machine.topology().possible
        if client is None:
            return
        fields: dict[str, Any] = {"delivery": self.rng.choice(["hits", "hits", "count", "hold"])}
        match self.rng.choices(["thread", "process", "cpus"], [5, 3, 3])[0]:
            case "thread":
                fields["tid"] = self.rng.choice(tids)
            case "process":
                fields["pid"] = self.rng.choice([tid - tid % 2 for tid in tids])
            case "cpus" if fields["delivery"] == "hits" and self.rng.random() < 0.4:
                fields["only_pid"] = self.rng.choice(PIDS_HIT)
        if "pid" not in fields and self.rng.random() < 0.5:
            fields["cpus"] = self.rng.choices([*cpus, 77], [10] * len(cpus) + [1], k=self.rng.randint(1, 2))
        fields["across_exec"] = self.rng.random() < 0.3
        fields["kind"] = self.rng.choice(["perf", "ptrace", "kgdb"])
        if self.rng.random() < 0.2:
            fields["guard"] = self.rng.choice([0, 10, GUARD_PER_S, 10 * GUARD_PER_S])
        op = "claim" if self.rng.random() < 0.9 else "fit"
        self.request(client, op, address=0x404040, length=8, access="w", **fields)

    def release(self) -> None:
        client = self.somebody()
        if client is not None and self.seen[client].claims:
            self.request(client, "release", claim=self.rng.choice(list(self.seen[client].claims)))

    def release_of_somebody(self) -> None:
        client = self.somebody()
        if client is not None:
            claim = self.rng.choice([*self.rig.arbiter.books.claims, self.rng.randint(0, 50)])
            self.request(client, self.rng.choice(["release", "rearm", "why"]), claim=claim)

    def hits(self) -> None:
        if self.rig.machine.armed:
            resource_id = self.rng.choice(list(self.rig.machine.armed))
            where = self.rng.choice([IN_KERNEL, IN_USER])
            for _ in range(self.rng.randint(1, 3)):
                self.rig.machine.hit(resource_id, self.rng.choice([1, 3, 20, 40]), self.rng.choice(PIDS_HIT), where)

    def flood(self) -> None:
        if self.rig.machine.armed:
            self.rig.machine.hit(self.rng.choice(list(self.rig.machine.armed)), self.rng.choice([200, 2000]))

    def rearm(self) -> None:
        client = self.somebody()
        if client is not None:
            guarded = [claim for claim, mine in self.seen[client].claims.items() if mine["guarded"]]
            if guarded:
                self.request(client, "rearm", claim=self.rng.choice(guarded))

    def ask(self) -> None:
        client = self.somebody()
        if client is not None:
            op = self.rng.choice(["slots", "capabilities"])
            self.request(client, op)

    def foreign(self) -> None:
        client = self.somebody()
        if client is not None:
            self.request(client, "foreign")

    def nonsense(self) -> None:
        client = self.somebody()
        if client is not None:
            client.send_bytes(self.rng.randbytes(self.rng.randint(0, 40)))

    def start_task(self) -> None:
        tid = self.rng.randint(800, 810)
        if len(self.rig.machine.tasks) < TASKS_MOST and tid not in self.rig.machine.tasks:
            self.rig.machine.start_task(tid)

    def exit_task(self) -> None:
        if self.rig.machine.tasks:
            self.rig.machine.exit_task(self.rng.choice(list(self.rig.machine.tasks)))

    def exec_task(self) -> None:
        if self.rig.machine.tasks:
            self.rig.machine.exec_task(self.rng.choice(list(self.rig.machine.tasks)))

    def become_privileged(self) -> None:
        """Somebody runs a program that others may not watch, or just is about to; or another one again."""
        rights = self.rig.rights
        tids = set(self.rng.sample(range(800, 811), k=self.rng.randint(0, 2)))
        rights.forbidden, rights.about_to_exec = self.rng.choice([(tids, set()), (set(), tids)])

    def change_cpus(self) -> None:
        topology = self.rig.machine.topology()
        cpu = self.rng.choice(topology.possible)
        if cpu not in topology.online:
            self.rig.machine.bring_cpu_online(cpu)
        elif len(topology.online) > 1:
            self.rig.machine.take_cpu_offline(cpu)

    def look(self) -> None:
        """A look begins to take its time, or is over; and somebody outside comes or goes."""
        self.rig.attribution.is_looking = not self.rig.attribution.is_looking
        self.rig.machine.outside = [Foreign(7, "gdb", 0, 2, "somewhere", "tracer")] * self.rng.randint(0, 1)


SEEDS = range(20)

# Each of these happens in some history, or it was not tried.
HAPPENED = {"granted", "released", "rearmed", "fit", "foreign", "hits", "filtered", "guarded", "resumed", "suspended"}
HAPPENED |= {f"lost {reason}" for reason in ("exit", "exec", "forced", "stolen", "offline")}
HAPPENED |= {f"error {name}" for name in ("ENOSPC", "EPERM", "EDQUOT", "ESRCH", "ENODEV", "ENOENT", "EINVAL", "EMFILE")}


@cache
def happened_with(seed: int) -> Counter[str]:
    """Let daemon, clients and a machine do what follows from a seed; return what the clients were sent."""
    return Simulation(seed).run()


@pytest.mark.parametrize("seed", SEEDS)
def test_daemon_and_clients_keep_their_word_through_a_random_history(seed: int) -> None:
    # given a daemon, clients and a machine that all follow from one seed, which pytest shows when this fails
    # when they claim, release, hit, flood, die, hang up and talk nonsense
    happened = happened_with(seed)

    # then nothing that is checked after each turn was ever untrue, and it was not for want of claims
    assert happened["granted"] > 20


def test_everything_that_can_happen_does() -> None:
    happened = sum(map(happened_with, SEEDS), Counter[str]())

    assert not HAPPENED - happened.keys(), happened
