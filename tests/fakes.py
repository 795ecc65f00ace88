"""
Stand-ins for what is outside the daemon: registers in memory, a clock you wind, a network you can cut.

``Rig`` puts a whole daemon (core and shell) on them, in one thread and without a socket.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from hwbpd.core.arbiter import Arbiter
from hwbpd.core.errors import NotPermitted, TargetGone
from hwbpd.core.model import Access, Delivery, Mode, Piece, Plan, Pool, Span, Target, Task, Totals
from hwbpd.hookspecs import ArmError, Backend, Batch, CpuFacts, Topology
from hwbpd.network import Incoming, Unreadable
from hwbpd.outbox import Outbox
from hwbpd.peers import Connection, Peer
from hwbpd.server import Server
from hwbpd.sessions import Sessions
from hwbpd.settings import Settings
from tests.slow_model import ANY_CPU, Event, SlowBooks

ROOT = 0
EPOCH = 7
RECORD = struct.Struct("=IHHQIIQQII")  # docs/protocol.md, "Hit records"


class FakeClock:
    """Stands still until it is wound."""

    def __init__(self) -> None:
        self.time_ns = 1_000_000_000

    def now_ns(self) -> int:
        return self.time_ns

    def wind(self, seconds: float) -> None:
        self.time_ns += int(seconds * 1e9)


class FakeBackend:
    """
    Slots that can hold anything.

    :param piece_bytes: what one slot holds, so that longer spans need several; 0 for no such bound.
    """

    name = "fake"

    def __init__(self, slots: Mapping[Pool, int], piece_bytes: int = 0) -> None:
        self._slots = dict(slots)
        self._piece_bytes = piece_bytes

    def slots(self) -> Mapping[Pool, int]:
        return self._slots

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        pool = next(iter(self._slots))
        end = span.address + span.length_bytes
        step = self._piece_bytes or span.length_bytes
        firsts = range(span.address, end, step)
        return Plan(tuple(Piece(Span(first, min(step, end - first)), access, pool) for first in firsts))

    def describe(self) -> Mapping[str, Any]:
        return {"lengths": {}, "default_lengths": {}, "reports": {}, "notes": []}


class _Armed:
    """One armed resource: what it counted, and the ring in which hits wait."""

    def __init__(self, target: Target, mode: Mode, span: Span) -> None:
        self.target = target
        self.mode = mode
        self.span = span
        self.hits = 0
        self.lost = 0
        self.unreported_loss = 0
        self.ring: deque[bytes] = deque()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class FakeMachine:
    """
    Registers in memory, admitted by the slow model as the kernel would.

    :param refuses: how likely the kernel refuses what fits, as it does when somebody outside holds slots.
    """

    name = "fake"
    facts = CpuFacts("fake")

    def __init__(self, slots: Mapping[Pool, int], cpus: int, rng: random.Random, refuses: float = 0.0) -> None:
        self._cpus = tuple(range(cpus))
        self.kernel = SlowBooks(slots, self._cpus, self._cpus)
        self._rng = rng
        self._refuses = refuses
        self.tasks: dict[int, Task] = {}
        self.armed: dict[int, _Armed] = {}
        self._started = 0

    # --- what the world does -----------------------------------------------------------------------------------------

    def start_task(self, tid: int) -> None:
        self._started += 1
        self.tasks[tid] = Task(tid, self._started)

    def exit_task(self, tid: int) -> None:
        gone = self.tasks.pop(tid)
        for armed in self.armed.values():
            if armed.target.task == gone:
                os.eventfd_write(armed.descriptor, 1)

    def hit(self, resource_id: int, hits: int) -> None:
        """Let the breakpoint fire; a ring has room for ``ring_bytes`` of records."""
        armed = self.armed[resource_id]
        if armed.mode.delivery is Delivery.HOLD:
            return
        armed.hits += hits
        if armed.mode.delivery is not Delivery.HITS:
            return
        room = armed.mode.ring_bytes // RECORD.size - len(armed.ring)
        lost = max(0, hits - room)
        armed.lost += lost
        armed.unreported_loss += lost
        record = RECORD.pack(9, 2, RECORD.size, 0x401000, 1, 1, armed.hits, armed.span.address, 0, 0)
        armed.ring.extend([record] * (hits - lost))
        os.eventfd_write(armed.descriptor, 1)

    # --- the contract ------------------------------------------------------------------------------------------------

    def topology(self) -> Topology:
        return Topology(self._cpus, self._cpus)

    def task(self, tid: int) -> Task:
        if tid not in self.tasks:
            raise TargetGone(f"tid {tid} does not exist")
        return self.tasks[tid]

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        if target.task is not None and self.tasks.get(target.task.tid) != target.task:
            raise ArmError(errno.ESRCH, tid=target.task.tid)
        events: list[Event] = []
        for event in self.kernel.expand(target, piece.pool):
            if self._rng.random() < self._refuses or not self.kernel.admits(event, [*self.kernel.events(), *events]):
                raise ArmError(errno.ENOSPC, cpu=None if event.cpu == ANY_CPU else event.cpu)
            events.append(event)
        self.kernel.held[resource_id] = events
        self.armed[resource_id] = _Armed(target, mode, piece.span)

    def disarm(self, resource_id: int) -> tuple[Batch, Totals]:
        batch = self.drain(resource_id, 2**30)
        armed = self.armed.pop(resource_id)
        os.close(armed.descriptor)
        self.kernel.give_back(resource_id)
        return batch, Totals(armed.hits, armed.lost)

    def totals(self, resource_id: int) -> Totals:
        armed = self.armed[resource_id]
        return Totals(armed.hits, armed.lost)

    def descriptors(self, resource_id: int) -> Sequence[int]:
        return (self.armed[resource_id].descriptor,)

    def drain(self, resource_id: int, budget_bytes: int) -> Batch:
        armed = self.armed[resource_id]
        count = min(len(armed.ring), max(1, budget_bytes // RECORD.size))
        records = b"".join(armed.ring.popleft() for _ in range(count))
        lost, armed.unreported_loss = armed.unreported_loss, 0
        if not armed.ring and not self.target_is_gone(resource_id):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(armed.descriptor)
        return Batch(records, count, lost, more=bool(armed.ring))

    def target_is_gone(self, resource_id: int) -> bool:
        task = self.armed[resource_id].target.task
        return task is not None and self.tasks.get(task.tid) != task

    def close(self) -> None:
        for resource_id in tuple(self.armed):
            self.disarm(resource_id)


class FakeClient:
    """The other end of a fake connection: what it was sent, and how much it still takes."""

    def __init__(self, network: FakeNetwork, pid: int, uid: int, room: int) -> None:
        self.network = network
        self.pid = pid
        self.uid = uid
        self.room = room  # messages its side takes before it has read some
        self.inbox: deque[dict[str, Any]] = deque()
        self.process = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable once it has died, like a pidfd
        self.fd, self.routing_id = network.connect(self)
        self._last_id = 0

    def ask(self, op: str, **fields: Any) -> int:
        """Send a request; return its id."""
        self._last_id += 1
        message = {"op": op, "id": self._last_id, **fields}
        if op != "hello":
            message.setdefault("epoch", EPOCH)
        self.send_bytes(msgspec.msgpack.encode(message))
        return self._last_id

    def send_bytes(self, data: bytes) -> None:
        self.network.arrive(Incoming(self.routing_id, Connection(self.fd, f"{self.pid}"), data))

    def read(self) -> list[dict[str, Any]]:
        """Return what has come, and make room."""
        messages = list(self.inbox)
        self.inbox.clear()
        return messages

    def die(self) -> None:
        os.eventfd_write(self.process, 1)

    def cut(self) -> None:
        self.network.lose(self)


class FakeTransport:
    """Where an outbox sends to: it takes ``room`` messages for each connection and remembers them."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.sent: dict[bytes, list[dict[str, Any]]] = {}

    def send(self, routing_id: bytes, data: bytes) -> bool:
        sent = self.sent.setdefault(routing_id, [])
        if len(sent) >= self.room:
            return False
        sent.append(msgspec.msgpack.decode(data))
        return True


class FakeNetwork:
    """Connections in memory. Messages arrive in the order in which they were sent."""

    def __init__(self) -> None:
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._arrived: deque[Incoming | Unreadable] = deque()
        self._lost: deque[int] = deque()
        self._clients: dict[bytes, FakeClient] = {}
        self._made = 0

    def connect(self, client: FakeClient) -> tuple[int, bytes]:
        self._made += 1
        routing_id = b"\0" + self._made.to_bytes(4, "big")
        self._clients[routing_id] = client
        return 1_000_000 + self._made, routing_id

    def arrive(self, incoming: Incoming | Unreadable) -> None:
        self._arrived.append(incoming)

    def lose(self, client: FakeClient, *, told: bool = True) -> None:
        """End a connection; without ``told`` the daemon hears nothing of it."""
        if self._clients.pop(client.routing_id, None) and told:
            self._lost.append(client.fd)

    def descriptors(self) -> Sequence[int]:
        return (self._news,)

    def has_news(self) -> bool:
        return bool(self._arrived or self._lost)

    def receive(self) -> Incoming | None:
        if not self._arrived:
            return None
        arrived = self._arrived.popleft()
        if isinstance(arrived, Unreadable):
            raise arrived
        return arrived

    def lost_connections(self) -> Iterator[int]:
        while self._lost:
            yield self._lost.popleft()

    def identify(self, connection: Connection) -> Peer:
        for client in self._clients.values():
            if client.fd == connection.fd:
                return Peer(client.pid, client.uid, client.uid, f"client{client.pid}", os.dup(client.process))
        raise NotPermitted("your connection is gone")

    def send(self, routing_id: bytes, data: bytes) -> bool:
        client = self._clients.get(routing_id)
        if client is None:
            return True
        if len(client.inbox) >= client.room:
            return False
        client.inbox.append(msgspec.msgpack.decode(data))
        return True

    def close(self) -> None:
        os.close(self._news)


class Rig:
    """A daemon on fakes. ``turn`` lets it serve all that has arrived."""

    def __init__(
        self,
        *,
        slots: Mapping[Pool, int] | None = None,
        cpus: int = 2,
        seed: int = 0,
        refuses: float = 0.0,
        backend: Backend | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.slots = slots or {Pool.ANY: 4}
        self.settings = settings or Settings()
        self.clock = FakeClock()
        self.machine = FakeMachine(self.slots, cpus, random.Random(seed), refuses)
        self.network = FakeNetwork()
        self.sessions = Sessions()
        self.arbiter = Arbiter(self.slots, range(cpus), range(cpus))
        self.clients: list[FakeClient] = []
        self.outbox = Outbox(
            self.network,
            messages_max=self.settings.limits.messages_queued_per_session,
            hits_bytes_max=self.settings.limits.hits_bytes_queued_per_session,
        )
        self.server = Server(
            network=self.network,
            arbiter=self.arbiter,
            machine=self.machine,
            backend=backend or FakeBackend(self.slots),
            sessions=self.sessions,
            outbox=self.outbox,
            settings=self.settings,
            clock=self.clock,
            epoch=EPOCH,
        )

    def client(self, *, pid: int | None = None, uid: int = ROOT, room: int = 10_000, hello: bool = True) -> FakeClient:
        """Connect somebody; with ``hello``, let it open a session and read the welcome."""
        client = FakeClient(self.network, 1000 + len(self.clients) if pid is None else pid, uid, room)
        self.clients.append(client)
        if hello:
            client.ask("hello", version=1, client="test")
            self.turn()
            assert client.read()[0]["op"] == "welcome"
        return client

    def turn(self) -> None:
        """Let the daemon serve what has arrived, and what comes of that."""
        self.server.turn(block=False)
        while self.network.has_news():
            self.server.turn(block=False)

    def ask(self, client: FakeClient, op: str, **fields: Any) -> dict[str, Any]:
        """Send one request and return its reply; notices stay in the inbox."""
        request_id = client.ask(op, **fields)
        self.turn()
        for message in client.inbox:
            if message.get("id") == request_id:
                client.inbox.remove(message)
                return message
        raise AssertionError(f"no reply to {op} {fields}")

    def stop(self) -> None:
        self.server.stop()
        self.network.close()
        for client in self.clients:
            os.close(client.process)
