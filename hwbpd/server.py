"""
The loop: one epoll; one message in, one step, its effects out.

One thread decides. Each turn of the loop serves, in this order,

1. ended processes and lost connections, so that what they held is free before anybody is refused for it;
2. messages, at most ``MESSAGES_PER_TURN``, so that hits keep flowing under a storm of requests;
3. rings that have hits, one message's worth each, so that requests are served under a flood of hits.

The outcomes of a step's effects are stepped before anything else is read: nobody sees a half-armed claim, and nobody is
told "granted" before the kernel has said so.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping

import structlog

from hwbpd import messages, peers, wire
from hwbpd.attribution import Attribution
from hwbpd.clock import Clock
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Effect
from hwbpd.core.errors import BadClaim, HwbpError, LimitReached, NotPermitted, RequestExpired, Stale, VersionMismatch
from hwbpd.core.events import (
    AnyEvent,
    CpuCameOnline,
    CpuWentOffline,
    HitsCounted,
    SessionEnded,
    Stopping,
    TargetEnded,
    Tick,
)
from hwbpd.drains import Drains
from hwbpd.enabled import Enabled
from hwbpd.followers import Decisions
from hwbpd.hits import Hits
from hwbpd.hookspecs import Backend, Machine, TargetEnd
from hwbpd.journal import Journal
from hwbpd.machines import Machines
from hwbpd.memory import MemoryWatch
from hwbpd.network import Incoming, Network, Unreadable
from hwbpd.outbox import Outbox
from hwbpd.peers import Connection
from hwbpd.performer import Performer
from hwbpd.requests import ROOT, Requests
from hwbpd.rights import Rights
from hwbpd.sessions import Session, Sessions
from hwbpd.settings import Settings
from hwbpd.status_page import StatusPage
from hwbpd.views import Views
from hwbpd.vmms import Vmms

log = structlog.get_logger("hwbpd")

MESSAGES_PER_TURN = 128
FLUSH_S = 0.01  # how soon to look again whether a slow reader has made room


class Server:
    """
    Everything between the sockets and the core.

    :param epoch: names this run of the daemon.
    :param backend: of what all CPUs have; :param backend_on: of those CPUs that have other slots.
    :param profiles: what CPUs of a name have, for vCPUs; raises ``BadClaim``. None where no CPU has a name.
    :param journal: of the arbiter's events; whoever made it closes it.
    """

    def __init__(
        self,
        *,
        network: Network,
        arbiter: Arbiter,
        machine: Machine,
        backend: Backend,
        backend_on: Mapping[int, Backend] | None = None,
        sessions: Sessions,
        rights: Rights,
        attribution: Attribution,
        outbox: Outbox,
        page: StatusPage,
        settings: Settings,
        clock: Clock,
        epoch: int,
        journal: Journal | None = None,
        profiles: Callable[[str], Backend] | None = None,
    ) -> None:
        self._network = network
        self._arbiter = arbiter
        # Whoever looks at every step is wrapped around it: a journal here, the meter in metered.py.
        self._step: Callable[[AnyEvent], list[Effect]] = arbiter.step
        self._journal = journal
        if journal is not None:
            self._step = journal.recorded(self._step)
        self._backend = backend
        self._sessions = sessions
        self._outbox = outbox
        self._page = page
        self._decisions = Decisions(outbox, clock, settings.limits.followers_per_uid)
        self._settings = settings
        self._clock = clock
        self._epoch = epoch
        self._epoll = select.epoll()
        self._drains = Drains(self._epoll)
        self._pending: list[AnyEvent] = []  # came of effects, not stepped yet
        self._vmms = Vmms(
            arbiter=arbiter,
            host=machine,
            backends=lambda name: profiles(name) if name and profiles else _own(backend, name),
            sessions=sessions,
            outbox=outbox,
            rights=rights,
            page=page,
            limits=settings.limits,
            clock=clock,
            watch=self._drains,
            feed=self.feed,
            drain=lambda resource_id: self._drain(resource_id, clock.now_ns()),
        )
        machine = self._machine = Machines(machine, self._vmms.files)
        self._hits = Hits(machine, sessions, outbox, settings.rings.bytes_per_message)
        self._attribution = attribution
        self._rights = rights
        self._performer = Performer(
            machine=machine,
            sessions=sessions,
            rights=rights,
            outbox=outbox,
            decisions=self._decisions,
            hits=self._hits,
            attribution=self._attribution,
            page=page,
            watch=self._drains,
            clock=clock,
            kgdb=self._vmms,
            later=self._pending.append,
        )
        self._requests = Requests(
            arbiter=arbiter,
            machine=machine,
            backend=backend,
            backend_on=backend_on or {},
            sessions=sessions,
            outbox=outbox,
            decisions=self._decisions,
            rights=rights,
            attribution=self._attribution,
            enabled=Enabled(page, machine, arbiter.books.possible, rights, sessions, settings.limits.threads_per_uid),
            views=Views(arbiter, self._hits, machine, backend, settings),
            vmms=self._vmms,
            settings=settings,
            feed=self.feed,
        )
        self._memory = MemoryWatch(settings.limits.memory_bytes)
        self._topology_fd = machine.topology_descriptor()
        for fd in (*network.descriptors(), self._attribution.fileno(), self._memory.fileno(), self._topology_fd):
            if fd is not None:
                self._epoll.register(fd, select.EPOLLIN)
        self._stop_fd = -1

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self, stop_fd: int) -> None:
        """Serve until ``stop_fd`` becomes readable; then end every claim, tell every session, and return."""
        self._stop_fd = stop_fd
        self._epoll.register(stop_fd, select.EPOLLIN)
        while self.turn():
            pass
        self.stop()

    def turn(self, block: bool = True) -> bool:
        """One turn of the loop; false when it is time to stop."""
        wait_s = 0.0
        if block and not self._network.has_news():
            wait_s = self._wait_s()
        ready = [fd for fd, _ in self._epoll.poll(wait_s)]
        if self._stop_fd in ready:
            return False
        self._page.beat(self._clock.now_ns())  # before anybody can have been answered, and asks the page
        for fd in ready:
            self._network.woke(fd)
            session = self._sessions.of_process(fd)
            if session is not None:
                self._end_session(session, "its process ended")
        if self._memory.fileno() in ready and self._memory.was_exceeded():
            log.warning("too much memory", limit_bytes=self._settings.limits.memory_bytes, done="hung up on users")
            self._network.hang_up_on_users()
        if self._topology_fd in ready:
            self._look_at_cpus()
        self._end_lost_sessions()
        self._serve_requests()
        self._attribution.answers()
        for fd in ready:
            self._drains.woke(fd)
        now_ns = self._clock.now_ns()
        for resource_id in self._drains.due(now_ns):
            if resource_id in self._drains:  # one before it may have ended the claim that had both
                self._drain(resource_id, now_ns)
        deadline_ns = self._arbiter.next_deadline_ns()
        if deadline_ns is not None and deadline_ns <= now_ns:
            self.feed(Tick(now_ns))
        self._step_pending()
        if self._outbox.is_waiting:
            self._outbox.flush()
        if self._journal is not None:
            self._journal.flush(now_ns)
        self._disconnect_overrun()
        return True

    def feed(self, event: AnyEvent) -> None:
        """Step an event, carry out its effects, and step what comes of them, until nothing more does."""
        self._pending.append(event)
        self._step_pending()

    def _step_pending(self) -> None:
        while self._pending:
            for effect in self._step(self._pending.pop(0)):
                outcome = self._performer.perform(effect)
                if outcome is not None:
                    self._pending.append(outcome)
        self._vmms.tell()

    def _wait_s(self) -> float:
        """How long nothing needs to be done unless a descriptor says so."""
        now_ns = self._clock.now_ns()
        wait_s = min(self._drains.wait_s(now_ns), max(0, self._page.next_beat_ns - now_ns) / 1e9)
        deadline_ns = self._arbiter.next_deadline_ns()
        if deadline_ns is not None:
            wait_s = min(wait_s, max(0, deadline_ns - now_ns) / 1e9)
        return min(wait_s, FLUSH_S) if self._outbox.is_waiting else wait_s

    def stop(self) -> None:
        """End every claim and tell every session."""
        self._page.stop()
        self.feed(Stopping(self._clock.now_ns(), "the daemon is stopping"))
        for session in self._sessions:
            self._close_session(session, "the daemon is stopping; every claim is released")
        self._outbox.flush()
        self._attribution.close()
        self._memory.close()
        self._epoll.close()

    # --- hits --------------------------------------------------------------------------------------------------------

    def _drain(self, resource_id: int, now_ns: int) -> None:
        if self._vmms.watches(resource_id):
            self._drains.drained(resource_id, 0, False, now_ns)
            self._vmms.thread_looked_at(resource_id)
            return
        batch = self._hits.drain(resource_id)
        if batch.hits or batch.lost:
            self.feed(HitsCounted(now_ns, resource_id, batch.hits, batch.lost))
        else:
            end = self._machine.end_of_target(resource_id)
            if end is not None:
                self.feed(TargetEnded(now_ns, resource_id, execed=end is TargetEnd.EXEC))
        self._drains.drained(resource_id, batch.hits, batch.more, now_ns)

    # --- CPUs --------------------------------------------------------------------------------------------------------

    def _look_at_cpus(self) -> None:
        self._machine.topology_changed()
        before, now = set(self._arbiter.books.online), set(self._machine.topology().online)
        for cpu in sorted(before - now):
            self.feed(CpuWentOffline(self._clock.now_ns(), cpu))
        for cpu in sorted(now - before):
            self.feed(CpuCameOnline(self._clock.now_ns(), cpu))

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _end_lost_sessions(self, to_be_sure: bool = False) -> None:
        """
        End the sessions of lost connections.

        Also done right before a session begins: libzmq tells of the end of one connection before it delivers anything
        of a later one that got the same descriptor, so what is read after that is never about an earlier one.
        """
        for fd in self._network.lost_connections(to_be_sure):
            session = self._sessions.on_connection(fd)
            if session is not None:
                self._end_session(session, "its connection was lost")

    def _begin_session(self, routing_id: bytes, connection: Connection, hello: messages.Hello) -> Session:
        self._end_lost_sessions(to_be_sure=True)
        if hello.version != messages.PROTOCOL_VERSION:
            speaks = messages.PROTOCOL_VERSION
            raise VersionMismatch(f"you speak version {hello.version} of the protocol, this daemon version {speaks}")
        if len(self._sessions) >= self._settings.limits.sessions:
            raise LimitReached(f"{len(self._sessions)} sessions are open; more are not allowed (limits.sessions)")
        peer = self._network.identify(connection)
        try:
            self._check_sessions_of(peer.uid)
            privileged = self._rights.is_privileged(peer)
        except HwbpError:
            peers.close(peer)
            raise
        earlier = self._sessions.on_connection(connection.fd)
        if earlier is not None:
            self._end_session(earlier, "its connection was replaced")
        session = self._sessions.open(routing_id, connection, peer)
        session.privileged = privileged
        self._epoll.register(peer.pidfd, select.EPOLLIN)
        self._decisions.tell("session", session.owner, label=hello.client)
        return session

    def _check_sessions_of(self, uid: int) -> None:
        open_now, most = len(self._sessions.of_uid(uid)), self._settings.limits.sessions_per_uid
        if uid != ROOT and open_now >= most:
            raise LimitReached(f"uid {uid} has {open_now} sessions; more are not allowed (limits.sessions_per_uid)")

    def _end_session(self, session: Session, reason: str, still_reads: bool = False) -> None:
        self._decisions.forget(session)
        self._page.unregister_all(session.session_id)
        self._vmms.session_ended(session, reason)
        self.feed(SessionEnded(self._clock.now_ns(), session.session_id, reason))
        if not still_reads:
            self._outbox.forget(session)
        self._epoll.unregister(session.peer.pidfd)
        self._sessions.close(session)
        self._decisions.tell("session over", session.owner, reason)

    def _close_session(self, session: Session, sentence: str) -> None:
        """End a session from our side, and say so."""
        self._outbox.send(session, messages.Closing(sentence=sentence))
        self._end_session(session, sentence, still_reads=True)

    def _disconnect_overrun(self) -> None:
        while self._outbox.overrun:
            session = self._outbox.overrun.pop()
            if self._sessions.of(session.session_id) is session:
                queued = self._settings.limits.messages_queued_per_session
                left = f"{queued} replies and notices were left unread (limits.messages_queued_per_session)"
                self._end_session(session, left)
                self._outbox.leave_word(session, messages.Closing(sentence=f"your session is over: {left}"))

    # --- requests ----------------------------------------------------------------------------------------------------

    def _serve_requests(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                incoming = self._network.receive()
            except Unreadable as message:
                self._turn_away(message)
                continue
            if incoming is None:
                return
            self._serve(incoming)

    def _serve(self, incoming: Incoming) -> None:
        try:
            reply = self._answer(incoming)
        except HwbpError as refusal:
            reply = _error(wire.request_id(incoming.data), refusal)
        if reply is not None:
            self._send(incoming.routing_id, reply)

    def _turn_away(self, message: Unreadable) -> None:
        self._send(message.routing_id, _error(0, message.why))

    def _send(self, routing_id: bytes, reply: messages.Reply) -> None:
        session = self._sessions.on_route(routing_id)
        if session is not None and isinstance(reply, messages.Bye):
            # First, because bye says that its slots are free; what waits for it goes out before.
            self._end_session(session, "it said goodbye", still_reads=True)
            session = None
        if session is None:
            self._outbox.reply_to_stranger(routing_id, reply)
        else:
            self._outbox.send(session, reply)

    def _answer(self, incoming: Incoming) -> messages.Reply | None:
        """Return the reply to a message, or None where the core's effects bring it; raises what refuses it."""
        connection = incoming.connection
        session = self._sessions.on_route(incoming.routing_id)
        if connection is None:
            raise NotPermitted("your connection carries no credentials; speak ZMTP 3 over ipc://")
        if session is not None and session.connection != connection:
            self._end_session(session, "its connection has changed hands")
            session = None
        request = wire.decode_request(incoming.data)
        if isinstance(request, messages.Hello):
            return self._hello(session, incoming.routing_id, connection, request)
        if request.epoch != self._epoch or session is None:
            raise Stale("this request is for an earlier daemon or session, whose claims are over; say hello first")
        now_ns = self._clock.now_ns()
        if 0 < request.deadline_ns < now_ns:
            raise RequestExpired("the deadline of this request had passed when it was read; nothing was done")
        return self._requests.answer(session, request, now_ns)

    def _hello(
        self, session: Session | None, routing_id: bytes, connection: Connection, request: messages.Hello
    ) -> messages.Welcome:
        if session is not None:
            self._end_session(session, "it said hello again", still_reads=True)
        session = self._begin_session(routing_id, connection, request)
        return messages.Welcome(
            request.id,
            messages.PROTOCOL_VERSION,
            self._epoch,
            session.session_id,
            self._machine.name,
            self._backend.name,
        )


def _own(backend: Backend, name: str) -> Backend:
    if name:
        raise BadClaim(f"there is no cpu {name!r}: this daemon knows none by name; leave profile out")
    return backend


def _error(request_id: int, refusal: HwbpError) -> messages.Error:
    return messages.Error(request_id, refusal.errno_name, str(refusal), list(refusal.holders))
