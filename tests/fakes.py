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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from hwbpd import page_layout
from hwbpd.attribution import Answer, Attribution, Place, holder_of, nobody_counts
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.errors import NotPermitted, TargetGone
from hwbpd.core.model import Access, Claim, Delivery, Mode, Piece, Plan, Pool, Process, Span, Target, Task, Totals
from hwbpd.hookspecs import ArmError, Backend, Batch, CpuFacts, Foreign, TargetEnd, Topology
from hwbpd.network import Incoming, Unreadable
from hwbpd.outbox import Outbox
from hwbpd.peers import Connection, Peer
from hwbpd.rights import Rights
from hwbpd.server import Server
from hwbpd.sessions import Sessions
from hwbpd.settings import Settings
from hwbpd.status_page import StatusPage
from tests.slow_model import ANY_CPU, Event, SlowBooks

ROOT = 0
EPOCH = 7
RECORD = struct.Struct("=IHHQIIQQII")  # docs/protocol.md, "Hit records"
IN_KERNEL, IN_USER = 1, 2  # what a record says of where the CPU was
KERNEL_IP, USER_IP = 0xFFFF_FFFF_8100_0000, 0x401000


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

    def debug_unit(self) -> None:
        """Nobody has modelled them."""

    def handling(self) -> None:
        """Nobody has modelled them."""

    def describe(self) -> Mapping[str, Any]:
        return {"lengths": {}, "default_lengths": {}, "reports": {}, "notes": []}


class _Armed:
    """One armed resource: what it counted, and the ring in which hits wait."""

    def __init__(self, piece: Piece, target: Target, mode: Mode) -> None:
        self.piece = piece
        self.target = target
        self.mode = mode
        self.hits = 0
        self.lost = 0
        self.unreported_loss = 0
        self.ring: deque[bytes] = deque()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.end: TargetEnd | None = None
        self.silent = mode.delivery is Delivery.HOLD
        self.fuse = mode.fuse_hits  # what is left of it; only looked at with mode.fuse_hits


class FakeMachine:
    """
    Registers in memory, admitted by the slow model as the kernel would. Threads 2n and 2n + 1 are one process.

    :param refuses: how likely the kernel refuses what fits, as it does when somebody outside holds slots; ``steals`` is
        how likely somebody takes a slot while it is armed again.
    """

    name = "fake"
    facts = CpuFacts("fake")

    def __init__(
        self,
        slots: Mapping[Pool, int],
        cpus: int,
        rng: random.Random,
        refuses: float = 0.0,
        slots_on: Mapping[int, Mapping[Pool, int]] | None = None,
    ) -> None:
        possible = tuple(range(cpus))
        self.kernel = SlowBooks(slots, possible, possible, slots_on)
        self._rng = rng
        self._refuses = refuses
        self.steals = refuses
        self.tasks: dict[int, Task] = {}
        self.armed: dict[int, _Armed] = {}
        self.outside: list[Foreign] = []  # whom a look finds
        self._started = 0
        self._processes: dict[int, Process] = {}
        self._topology_fd = -1  # made for whoever asks for it

    def cpu_facts(self, cpu: int) -> CpuFacts:
        return self.facts

    # --- what the world does -----------------------------------------------------------------------------------------

    def start_task(self, tid: int) -> None:
        self._started += 1
        pid = tid - tid % 2
        if not any(task.process == self._processes.get(pid) for task in self.tasks.values()):
            self._processes[pid] = Process(pid, self._started)
        self.tasks[tid] = Task(tid, self._started, self._processes[pid])

    def poke(self, tid: int) -> None:
        """
        Let a tracer set a debug register of the thread, in the first pool: a slot that is the thread's until it exits
        or runs another program. Raises ``OSError`` with ENOSPC when there is none.
        """
        event = Event(self.tasks[tid], ANY_CPU, next(iter(self.kernel.slots)))
        if not self.kernel.admits(event, self.kernel.events()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.kernel.held[min((0, *self.kernel.held)) - 1] = [event]

    def _forget_poked(self, task: Task) -> None:
        for number, of in self.kernel.held.items():
            if number < 0:  # of nobody here
                self.kernel.held[number] = [event for event in of if event.task != task]

    def exit_task(self, tid: int) -> None:
        gone = self.tasks.pop(tid)
        self._forget_poked(gone)
        for armed in self.armed.values():
            if armed.target.task == gone or (
                gone.process is not None and armed.target.process == gone.process and not self._lives(gone.process)
            ):
                self._end(armed, TargetEnd.EXIT)

    def exec_task(self, tid: int) -> None:
        """Let the thread run another program; the other threads of its process have exited before."""
        task = self.tasks[tid]
        for other in [other for other, of in self.tasks.items() if of.process == task.process and other != tid]:
            self.exit_task(other)
        self._forget_poked(task)
        for armed in self.armed.values():
            is_target = armed.target.task == task or armed.target.process == task.process
            if is_target and not armed.mode.across_exec:
                self._end(armed, TargetEnd.EXEC)

    def take_cpu_offline(self, cpu: int) -> None:
        self._tell_cpus(one for one in self.kernel.online if one != cpu)

    def bring_cpu_online(self, cpu: int) -> None:
        self._tell_cpus({*self.kernel.online, cpu})

    def _tell_cpus(self, online: Iterable[int]) -> None:
        self.kernel.online = tuple(sorted(online))
        if self._topology_fd >= 0:
            os.eventfd_write(self._topology_fd, 1)

    def hit(self, resource_id: int, hits: int, pid: int = 1, where: int = IN_USER) -> None:
        """Let the breakpoint fire in a process; a ring has room for ``ring_bytes`` of records."""
        armed = self.armed[resource_id]
        if armed.silent:
            return
        if armed.mode.fuse_hits:
            hits = min(hits, armed.fuse)
            armed.fuse -= hits
            armed.silent = not armed.fuse
        armed.hits += hits
        if armed.mode.delivery is not Delivery.HITS:
            return
        room = armed.mode.ring_bytes // RECORD.size - len(armed.ring)
        lost = max(0, hits - room)
        armed.lost += lost
        armed.unreported_loss += lost
        address = armed.piece.span.address
        ip = KERNEL_IP if where == IN_KERNEL else USER_IP
        record = RECORD.pack(9, where, RECORD.size, ip, pid, pid, armed.hits, address, 0, 0)
        armed.ring.extend([record] * (hits - lost))
        os.eventfd_write(armed.descriptor, 1)

    def _lives(self, process: Process) -> bool:
        return any(task.process == process for task in self.tasks.values())

    @staticmethod
    def _end(armed: _Armed, end: TargetEnd) -> None:
        armed.end = end
        os.eventfd_write(armed.descriptor, 1)

    # --- the contract ------------------------------------------------------------------------------------------------

    def notes(self) -> Sequence[str]:
        return ()

    def topology(self) -> Topology:
        return Topology(self.kernel.possible, self.kernel.online)

    def topology_descriptor(self) -> int | None:
        if self._topology_fd < 0:
            self._topology_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._topology_fd

    def topology_changed(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._topology_fd)

    def task(self, tid: int) -> Task:
        if tid not in self.tasks:
            raise TargetGone(f"tid {tid} does not exist")
        return self.tasks[tid]

    def process(self, pid: int) -> Process:
        for task in self.tasks.values():
            if task.process is not None and task.process.pid == pid:
                return task.process
        raise TargetGone(f"pid {pid} does not exist")

    def threads(self, process: Process) -> Sequence[int]:
        return [task.tid for task in self.tasks.values() if task.process == process]

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        if target.task is not None and self.tasks.get(target.task.tid) != target.task:
            raise ArmError(errno.ESRCH, tid=target.task.tid)
        if target.process is not None and not self._lives(target.process):
            raise ArmError(errno.ESRCH, tid=target.process.pid)
        for cpu in target.cpus or ():
            if target.is_cpu_wide and cpu not in self.kernel.online:
                raise ArmError(errno.ENODEV, cpu=cpu)
        self.kernel.held[resource_id] = self._take(self.kernel.expand(target, piece.pool))
        self.armed[resource_id] = _Armed(piece, target, mode)

    def attend(self, resource_id: int, target: Target, mode: Mode) -> None:
        if target.task is None or self.tasks.get(target.task.tid) != target.task:
            raise ArmError(errno.ESRCH, tid=0 if target.task is None else target.task.tid)
        self.kernel.held[resource_id] = []
        piece = Piece(Span(0, 1), Access.WRITE, next(iter(self.kernel.slots)))
        self.armed[resource_id] = _Armed(piece, target, Mode(delivery=Delivery.HOLD))

    def slots_outside(self, pool: Pool, target: Target) -> int | None:
        if target.task is None or self.tasks.get(target.task.tid) != target.task:
            return None
        event = Event(target.task, ANY_CPU, pool)
        return sum(of.count(event) for number, of in self.kernel.held.items() if number < 0)

    def _take(self, wanted: Sequence[Event]) -> list[Event]:
        events: list[Event] = []
        for event in wanted:
            if self._rng.random() < self._refuses or not self.kernel.admits(event, [*self.kernel.events(), *events]):
                raise ArmError(errno.ENOSPC, cpu=None if event.cpu == ANY_CPU else event.cpu)
            events.append(event)
        return events

    def disarm(self, resource_id: int) -> tuple[Batch, Totals]:
        batch = self.drain(resource_id, 2**30)
        armed = self.armed.pop(resource_id)
        os.close(armed.descriptor)
        self.kernel.give_back(resource_id)
        return batch, Totals(armed.hits, armed.lost)

    def top_up(self, resource_id: int, hits: int) -> bool:
        armed = self.armed[resource_id]
        if not armed.mode.fuse_hits:
            return True
        if armed.fuse:
            armed.fuse += hits
        return armed.fuse > 0

    def is_fused(self, resource_id: int) -> bool:
        return bool(self.armed[resource_id].mode.fuse_hits)

    def silence(self, resource_id: int) -> None:
        self.armed[resource_id].silent = True

    def rearm(self, resource_id: int, fuse_hits: int) -> None:
        armed = self.armed[resource_id]
        if self._rng.random() < self.steals:
            self.kernel.held[resource_id] = []
            raise ArmError(errno.ENOSPC)
        armed.silent, armed.fuse = armed.mode.delivery is Delivery.HOLD, fuse_hits

    def drop_cpu(self, resource_id: int, cpu: int) -> None:
        held = self.kernel.held[resource_id]
        self.kernel.held[resource_id] = [event for event in held if event.task is not None or event.cpu != cpu]

    def add_cpu(self, resource_id: int, cpu: int) -> None:
        armed = self.armed[resource_id]
        event = Event(None, cpu, armed.piece.pool)
        assert armed.target.is_cpu_wide
        assert armed.target.cpus is None or cpu in armed.target.cpus, "it does not belong there"
        if event not in self.kernel.held[resource_id]:
            self.kernel.held[resource_id] += self._take([event])

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
        if not armed.ring and armed.end is None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(armed.descriptor)
        return Batch(records, count, lost, more=bool(armed.ring))

    def end_of_target(self, resource_id: int) -> TargetEnd | None:
        return self.armed[resource_id].end

    def foreign(self, pool: Pool, target: Target, cpu: int | None) -> Sequence[Foreign]:
        return tuple(self.outside)

    def close(self) -> None:
        for resource_id in tuple(self.armed):
            self.disarm(resource_id)
        if self._topology_fd >= 0:
            os.close(self._topology_fd)
            self._topology_fd = -1


class FakeRights(Rights):
    """
    Root may do everything, and others what is not forbidden: the kernel is not asked.

    ``forbidden`` tids are those that only root may watch; those in ``about_to_exec`` get privileges, and so become
    forbidden, while a slot on them is being taken. Of ``gone`` pids nothing can be said any more.
    """

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self.forbidden: set[int] = set()
        self.about_to_exec: set[int] = set()
        self.gone: set[int] = set()
        self.privileged_uids = {ROOT}
        self.allowed_cpu_wide = False  # to everybody, as with kernel.perf_event_paranoid at 0

    def is_privileged(self, peer: Peer) -> bool:
        if peer.pid in self.gone:
            raise NotPermitted("the process that connected is gone or cannot be looked at")
        return peer.uid in self.privileged_uids

    def still_may(self, peer: Peer, claim: Claim) -> None:
        self.forbidden |= self.about_to_exec.intersection(self._tids(claim.target))
        super().still_may(peer, claim)

    def may_ask_about(self, peer: Peer, task: Task, of_any: bool = False) -> None:
        if of_any:
            return
        if task.process is None or task.process.pid != peer.pid:
            raise NotPermitted(f"tid {task.tid} is no thread of yours, pid {peer.pid}")

    def may_claim(self, peer: Peer, target: Target, span: Span, mode: Mode) -> None:
        if peer.uid in self.privileged_uids:
            return
        if target.is_cpu_wide and self.allowed_cpu_wide:
            return
        if target.is_cpu_wide or self.forbidden.intersection(self._tids(target)):
            raise NotPermitted(f"uid {peer.uid} may not watch {target}")


class LaterAttribution(Attribution):
    """
    Looks in the same thread, and answers when the server asks for answers: as late as the worker, and as planned.

    While ``is_looking`` is set, it has nothing to answer yet.
    """

    def __init__(self, machine: FakeMachine) -> None:
        self.is_looking = False
        self.looked_at: list[Place] = []
        self.looked = nobody_counts
        self._fake = machine
        self._asked: deque[tuple[Sequence[Place], Answer]] = deque()
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._news

    def look(self, places: Sequence[Place], answer: Answer, patient: bool = False) -> None:
        self._asked.append((places, answer))

    def answers(self) -> None:
        while self._asked and not self.is_looking:
            places, answer = self._asked.popleft()
            self.looked_at += places
            found: list[Foreign] = []
            for place in places:
                there = self._fake.foreign(place.pool, place.target, place.cpu)
                self.looked(place, there)
                found += there
            answer(tuple(map(holder_of, found)))

    def close(self) -> None:
        if self._news >= 0:
            os.close(self._news)
            self._news = -1


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
        self.pidfds: list[int] = []  # handed out, to be closed by whoever got them
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

    def woke(self, fd: int) -> None:
        pass

    def has_news(self) -> bool:
        return bool(self._arrived or self._lost)

    def receive(self) -> Incoming | None:
        if not self._arrived:
            return None
        arrived = self._arrived.popleft()
        if isinstance(arrived, Unreadable):
            raise arrived
        return arrived

    def lost_connections(self, to_be_sure: bool = False) -> Iterator[int]:
        while self._lost:
            yield self._lost.popleft()

    def hang_up_on_users(self) -> None:
        for client in tuple(self._clients.values()):
            if client.uid != ROOT:
                self.lose(client)

    def identify(self, connection: Connection) -> Peer:
        for client in self._clients.values():
            if client.fd == connection.fd:
                self.pidfds.append(os.dup(client.process))
                return Peer(client.pid, client.uid, client.uid, f"client{client.pid}", self.pidfds[-1])
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
        make_server: type[Server] = Server,
        reserve_slots: int = 0,
        backend_on: Mapping[int, Backend] | None = None,
    ) -> None:
        """:param reserve_slots: as in the settings, where it comes in place of theirs: most tests want every slot."""
        self.slots = slots or {Pool.ANY: 4}
        settings = settings or Settings()
        policy = msgspec.structs.replace(settings.policy, reserve_slots=reserve_slots)
        self.settings = msgspec.structs.replace(settings, policy=policy)
        self.clock = FakeClock()
        slots_on = {cpu: of_cpu.slots() for cpu, of_cpu in (backend_on or {}).items()}
        self.machine = FakeMachine(self.slots, cpus, random.Random(seed), refuses, slots_on)
        self.network = FakeNetwork()
        self.sessions = Sessions()
        rearm_after_ns = int(self.settings.guard.rearm_after_s * 1e9)
        self.arbiter = Arbiter(self.slots, range(cpus), range(cpus), rearm_after_ns, policy.for_core(), slots_on)
        self.rights = FakeRights(self.machine)
        self.attribution = LaterAttribution(self.machine)
        self.clients: list[FakeClient] = []
        self.outbox = Outbox(
            self.network,
            messages_max=self.settings.limits.messages_queued_per_session,
            hits_bytes_max=self.settings.limits.hits_bytes_queued_per_session,
        )
        self.page_words = memoryview(bytearray(page_layout.BYTES)).cast("Q")
        self.page = StatusPage(self.page_words, EPOCH)
        self.server = make_server(
            network=self.network,
            arbiter=self.arbiter,
            machine=self.machine,
            backend=backend or FakeBackend(self.slots),
            backend_on=backend_on,
            sessions=self.sessions,
            rights=self.rights,
            attribution=self.attribution,
            outbox=self.outbox,
            page=self.page,
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
        assert not self.machine.armed, "a daemon that stopped holds nothing"
        assert not any(of for resource_id, of in self.machine.kernel.held.items() if resource_id >= 0)
        self.machine.close()
        self.network.close()
        self.attribution.close()
        for client in self.clients:
            os.close(client.process)
