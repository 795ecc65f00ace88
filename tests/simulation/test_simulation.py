"""
Daemon and clients, whole, on fakes, from one seed.

Several users claim threads, processes and CPUs; they share, wait, outrank each other, give way in time or not at all,
and trace threads; threads run other programs and exit, CPUs come and go, breakpoints are flooded, the kernel refuses
what should fit, and looks at who is in the way take their time. After every turn: the invariants of the books, the
books equal to what the fake kernel holds on each CPU, nothing between states, replies to every request that was served
(those for which somebody looks or gives way excepted), each claim where its owner was told that it is, hits only to
those entitled, and every count exact. A failure prints the seed.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from hwbpd.core import invariants
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Pool, Process, Task
from hwbpd.hookspecs import Foreign
from hwbpd.server import Server
from hwbpd.settings import Guard, Limits, Rings, Settings
from tests.fakes import IN_KERNEL, IN_USER, KERNEL_IP, RECORD, ROOT, FakeClient, Rig
from tests.slow_model import ANY_CPU, Event, cpu_wide, of_busiest

TURNS = 400
CLIENTS_MOST = 6
TASKS_MOST = 6
UIDS = (ROOT, 1000, 1000, 1001)
PIDS_HIT = (800, 802, 804)  # whose instructions hit CPU-wide breakpoints
NOWHERE = 99_999
TRACERS = {State.TAKING, State.TAKEN, State.RESIDUE}
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


# What becomes of a claim that goes on, and out of what.
BEFORE = {
    "guarded": {"armed"},
    "resumed": {"guarded", "suspended"},
    "revoke": {"armed", "guarded", "yielding"},  # the last for another of an even higher rank
    "spared": {"yielding"},
    "suspended": {"yielding"},
}
AFTER = {"guarded": "guarded", "resumed": "armed", "revoke": "yielding", "suspended": "suspended"}


class Expectation:
    """What one client must have seen by now, from the messages it was sent."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.claims: dict[int, dict[str, Any]] = {}  # told of and not over: what was asked, delivered, and what it is
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
            case {"op": "queued" | "granted" | "take" | "taken", "claim": claim}:
                self._has(claim, message, request)
            case {"op": "hits", "claim": claim, "count": count, "records": records}:
                assert claim in self.claims, "hits come only for claims one has"
                assert self.claims[claim]["is"] in {"armed", "guarded", "yielding"}, "and only while one has a slot"
                self._check_records(self.claims[claim], count, records)
                self.claims[claim]["delivered"] += count
            case {"op": "lost" | "released", "claim": claim} if "cpu" not in message:
                self._over(claim, message)
            case {"op": "guarded" | "resumed" | "revoke" | "spared" | "suspended" | "lost", "claim": claim}:
                self._goes_on(self.claims[claim], message)
            case {"op": "take_failed", "claim": claim}:
                del self.claims[claim]
            case {"op": "closing"}:
                self.claims.clear()
            case {"op": "foreign"} if "n" not in message:
                assert self.uid == ROOT
            case {"op": "slots", "resources": rows}:
                for row in rows:
                    owners = {of["uid"] for of in row["claims"]}
                    assert (row["address"] is not None) == (self.uid in (ROOT, *owners)), "others' are not shown"

    def _has(self, claim: int, message: dict[str, Any], request: dict[str, Any]) -> None:
        op = message["op"]
        if op in ("take", "taken"):
            self.claims[claim]["is"] = "taking" if op == "take" else "taken"
            return
        if "n" not in message:
            self.claims[claim] = {**request, "delivered": 0}
        mine = self.claims[claim]
        if op == "queued":
            assert request["wait_until_ns"], "only who asked for it waits"
            mine["is"] = "waiting"
            return
        assert mine.get("is", "waiting") == "waiting", "what is granted is new, or has waited"
        mine["is"] = "armed" if mine.get("placeholder", True) else "taking"
        assert message["kind"] == ("perf" if mine["kind"] == "kgdb" and self.uid else mine["kind"])

    def _goes_on(self, mine: dict[str, Any], message: dict[str, Any]) -> None:
        if "cpu" in message:
            assert message["op"] != "lost" or message["reason"] == "offline"
            assert not ({"tid", "pid"} & mine.keys()), "what follows a thread has no slot of a CPU to lose"
            return
        was, op = mine["is"], message["op"]
        assert was in BEFORE[op], f"{was} before {op}"
        if op == "revoke" and was != "yielding":
            mine["was"] = was
        mine["is"] = mine["was"] if op == "spared" else AFTER[op]

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
            (4, self.give_way),
            (4, self.trace),
            (6, self.take),
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
        assert not [number for number in self.rig.machine.kernel.held if number >= 0]
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
        """The books hold what the kernel holds on each CPU, and what tracers have been given and not taken yet."""
        books, kernel = self.rig.arbiter.books, self.rig.machine.kernel
        assert books.resources.keys() == {number for number in kernel.held if number >= 0}
        assert books.online == set(kernel.online)
        events = self.events()
        for pool, counts in books.pools.items():
            for cpu in kernel.possible:
                assert counts.held_cpu_wide(cpu) == cpu_wide(events, cpu, pool), f"cpu {cpu}"
                assert counts.held_by_busiest(cpu) == of_busiest(events, cpu, pool), f"cpu {cpu}"

    def events(self) -> list[Event]:
        """What the kernel counts, with what tracers may take at any time."""
        kernel, claims = self.rig.machine.kernel, self.rig.arbiter.books.claims.values()
        given: Counter[Task | Process | None] = Counter(
            record.claim.target.task
            for record in claims
            for _ in (record.resource_ids if record.state in TRACERS else record.reused)
        )
        poked: Counter[Task | Process | None] = Counter(
            event.task for number, of in kernel.held.items() if number < 0 for event in of
        )
        assert not poked - given, "what a tracer has is known"
        pool = next(iter(kernel.slots))
        return [*kernel.events(), *(Event(task, ANY_CPU, pool) for task in (given - poked).elements())]

    def check_answered(self, client: FakeClient, seen: Expectation) -> None:
        """Every request has its reply, but those for which somebody looks who is in the way."""
        session = self.rig.sessions.on_route(client.routing_id)
        if session is None or self.rig.outbox.is_waiting_for(session):
            return
        of_session = self.rig.arbiter.books.sessions.get(session.session_id, ())
        records = [self.rig.arbiter.books.claims[claim_id] for claim_id in of_session]
        unanswered = [record for record in records if record.claim.claim_id in self.rig.arbiter._asked]
        assert all(record.state in {State.ATTRIBUTING, State.DISPLACING} for record in unanswered)
        waiting = [asked["op"] for asked in seen.asked.values()]
        assert sorted({*waiting} - ({"foreign", "claim"} if self.rig.attribution.is_looking else {"claim"})) == []
        assert waiting.count("claim") == len(unanswered), "every request has its reply"

    def check_claims(self) -> None:
        """What clients believe they have is what the books say they have."""
        for client, seen in self.seen.items():
            session = self.rig.sessions.on_route(client.routing_id)
            if session is None or client.inbox or self.rig.outbox.is_waiting_for(session):
                continue
            books = self.rig.arbiter.books
            mine = {claim_id: books.claims[claim_id].state for claim_id in books.sessions.get(session.session_id, ())}
            assert seen.claims.keys() == mine.keys() - self.rig.arbiter._asked.keys()
            for claim, believed in seen.claims.items():
                in_truth = "waiting" if mine[claim] is State.ATTRIBUTING else str(mine[claim])
                assert believed["is"] == in_truth, f"claim {claim}: {believed}, in truth {in_truth}"

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
        fields["kind"] = self.rng.choice(["perf", "perf", "perf", "ptrace", "kgdb"])
        fields["priority"] = self.rng.choice([0, 0, 0, -1, 1])
        fields["wait_until_ns"] = 0
        if self.rng.random() < 0.2:
            fields["guard"] = self.rng.choice([0, 10, GUARD_PER_S, 10 * GUARD_PER_S])
        op = "claim" if self.rng.random() < 0.9 else "fit"
        if op == "fit":
            del fields["wait_until_ns"]
        elif self.rng.random() < 0.3:
            fields["wait_until_ns"] = self.rig.clock.now_ns() + self.rng.randint(1, 20) * 10**9
        address = self.rng.choice([0x404040, 0x404048, 0x404050, 0x404058])
        self.request(client, op, address=address, length=8, access="w", **fields)

    def give_way(self) -> None:
        """As asked; others are made to."""
        client = self.somebody()
        if client is not None:
            asked = [claim for claim, mine in self.seen[client].claims.items() if mine["is"] == "yielding"]
            if asked:
                self.request(client, "yield", claim=self.rng.choice(asked))

    def trace(self) -> None:
        client = self.somebody()
        if client is not None:
            fields = {"kind": "ptrace", "armed_by": "tracer", "placeholder": self.rng.random() < 0.5}
            fields |= {"tid": self.rng.choice([*self.rig.machine.tasks, NOWHERE]), "wait_until_ns": 0}
            self.request(client, "claim", address=0x404040, length=8, access="w", delivery="hold", **fields)

    def take(self) -> None:
        """A tracer goes one step further, if there is one: it says so, it pokes, or it fails to."""
        client = self.somebody()
        if client is None:
            return
        unanswered = {asked.get("claim") for asked in self.seen[client].asked.values()}
        for claim, mine in tuple(self.seen[client].claims.items()):
            if mine.get("armed_by") != "tracer" or claim in unanswered:
                continue
            if mine["is"] == "armed":
                self.request(client, "taking", claim=claim)
                return
            if mine["is"] == "taking":
                self.poke(client, claim, mine["tid"])
                return

    def poke(self, client: FakeClient, claim: int, tid: int) -> None:
        record = self.rig.arbiter.books.claims.get(claim)
        machine = self.rig.machine
        # It traces the thread, so it knows of an exec at once; the daemon may not have heard yet.
        ended = record is None or any(machine.armed[one].end is not None for one in record.resource_ids)
        if record is None or ended or self.rng.random() < 0.2:
            self.request(client, "take_failed", claim=claim, errno=errno.ESRCH)
            return
        if not record.reused:
            machine.poke(tid)  # what was kept for it is there
        if self.rng.random() < 0.8:
            self.request(client, "taken", claim=claim)
        else:
            client.die()  # before it could say so
            del self.seen[client]

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
            guarded = [claim for claim, mine in self.seen[client].claims.items() if mine["is"] == "guarded"]
            if guarded:
                self.request(client, "rearm", claim=self.rng.choice(guarded))

    def ask(self) -> None:
        client = self.somebody()
        if client is not None:
            op, fields = self.rng.choice([("slots", {}), ("capabilities", {}), ("why", {"errno": "ENOSPC"})])
            self.request(client, op, **fields)

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
HAPPENED |= {f"queued {name}" for name in ("ENOSPC", "EAGAIN")} | {"contended", "revoke", "spared", "yielded"}
HAPPENED |= {"take", "taken", "take_failed"}
HAPPENED |= {f"lost {reason}" for reason in ("exit", "exec", "forced", "stolen", "offline", "timeout", "take failed")}
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
