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

import structlog

from hwbpd import fitting, messages, peers, wire
from hwbpd.clock import Clock
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.errors import HwbpError, LimitReached, NotPermitted, RequestExpired, Stale, VersionMismatch
from hwbpd.core.events import AnyEvent, HitsCounted, ReleaseRequested, SessionEnded, Stopping, TargetExited
from hwbpd.drains import Drains
from hwbpd.hits import Hits
from hwbpd.hookspecs import Backend, Machine
from hwbpd.network import Incoming, Network, Unreadable
from hwbpd.outbox import Outbox
from hwbpd.peers import Connection
from hwbpd.performer import Performer
from hwbpd.sessions import Session, Sessions
from hwbpd.settings import Settings
from hwbpd.views import Views

log = structlog.get_logger("hwbpd")

MESSAGES_PER_TURN = 128
FLUSH_S = 0.01  # how soon to look again whether a slow reader has made room


class Server:
    """
    Everything between the sockets and the core.

    :param epoch: names this run of the daemon.
    """

    def __init__(
        self,
        *,
        network: Network,
        arbiter: Arbiter,
        machine: Machine,
        backend: Backend,
        sessions: Sessions,
        outbox: Outbox,
        settings: Settings,
        clock: Clock,
        epoch: int,
    ) -> None:
        self._network = network
        self._arbiter = arbiter
        self._machine = machine
        self._backend = backend
        self._sessions = sessions
        self._outbox = outbox
        self._settings = settings
        self._clock = clock
        self._epoch = epoch
        self._epoll = select.epoll()
        self._drains = Drains(self._epoll)
        self._hits = Hits(machine, sessions, outbox, settings.rings.bytes_per_message)
        self._performer = Performer(machine, sessions, outbox, self._hits, self._drains, clock)
        self._views = Views(arbiter, self._hits, machine, backend, settings)
        for fd in network.descriptors():
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
            wait_s = self._drains.wait_s(self._clock.now_ns())
            if self._outbox.is_waiting:
                wait_s = min(wait_s, FLUSH_S)
        ready = [fd for fd, _ in self._epoll.poll(wait_s)]
        if self._stop_fd in ready:
            return False
        for fd in ready:
            session = self._sessions.of_process(fd)
            if session is not None:
                self._end_session(session, "its process ended")
        self._end_lost_sessions()
        self._serve_requests()
        for fd in ready:
            self._drains.woke(fd)
        now_ns = self._clock.now_ns()
        for resource_id in self._drains.due(now_ns):
            if resource_id in self._drains:  # one before it may have ended the claim that had both
                self._drain(resource_id, now_ns)
        self._outbox.flush()
        self._disconnect_overrun()
        return True

    def feed(self, event: AnyEvent) -> None:
        """Step an event, carry out its effects, and step what comes of them, until nothing more does."""
        pending = [event]
        while pending:
            for effect in self._arbiter.step(pending.pop(0)):
                outcome = self._performer.perform(effect)
                if outcome is not None:
                    pending.append(outcome)

    def stop(self) -> None:
        """End every claim and tell every session."""
        self.feed(Stopping(self._clock.now_ns(), "the daemon is stopping"))
        for session in self._sessions:
            self._close_session(session, "the daemon is stopping; every claim is released")
        self._outbox.flush()
        self._epoll.close()

    # --- hits --------------------------------------------------------------------------------------------------------

    def _drain(self, resource_id: int, now_ns: int) -> None:
        batch = self._hits.drain(resource_id)
        if batch.hits or batch.lost:
            self.feed(HitsCounted(now_ns, resource_id, batch.hits, batch.lost))
        elif self._machine.target_is_gone(resource_id):
            self.feed(TargetExited(now_ns, resource_id))
        self._drains.drained(resource_id, batch.hits, batch.more, now_ns)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _end_lost_sessions(self) -> None:
        """
        End the sessions of lost connections.

        Also done right before a session begins: libzmq tells of the end of one connection before it delivers anything
        of a later one that got the same descriptor, so what is read after that is never about an earlier one.
        """
        for fd in self._network.lost_connections():
            session = self._sessions.on_connection(fd)
            if session is not None:
                self._end_session(session, "its connection was lost")

    def _begin_session(self, routing_id: bytes, connection: Connection, hello: messages.Hello) -> Session:
        self._end_lost_sessions()
        if hello.version != messages.PROTOCOL_VERSION:
            speaks = messages.PROTOCOL_VERSION
            raise VersionMismatch(f"you speak version {hello.version} of the protocol, this daemon version {speaks}")
        if len(self._sessions) >= self._settings.limits.sessions:
            raise LimitReached(f"{len(self._sessions)} sessions are open; more are not allowed (limits.sessions)")
        peer = self._network.identify(connection)
        try:
            peers.may_use_the_daemon(peer)
        except NotPermitted as refusal:
            peers.close(peer)
            log.info("refused", owner=f"{peer.comm}[{peer.pid}]", uid=peer.uid, errno="EPERM", reason=str(refusal))
            raise
        earlier = self._sessions.on_connection(connection.fd)
        if earlier is not None:
            self._end_session(earlier, "its connection was replaced")
        session = self._sessions.open(routing_id, connection, peer)
        self._epoll.register(peer.pidfd, select.EPOLLIN)
        log.info("session", owner=str(session.owner), uid=peer.uid, session=session.session_id, client=hello.client)
        return session

    def _end_session(self, session: Session, reason: str, still_reads: bool = False) -> None:
        self.feed(SessionEnded(self._clock.now_ns(), session.session_id, reason))
        if not still_reads:
            self._outbox.forget(session)
        self._epoll.unregister(session.peer.pidfd)
        self._sessions.close(session)
        log.info("session over", owner=str(session.owner), session=session.session_id, reason=reason)

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
                self._send(message.routing_id, _error(0, message.why))
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
        return self._dispatch(session, request, now_ns)

    def _hello(
        self, session: Session | None, routing_id: bytes, connection: Connection, request: messages.Hello
    ) -> messages.Welcome:
        if session is not None:
            self._end_session(session, "it said hello again")
        session = self._begin_session(routing_id, connection, request)
        return messages.Welcome(
            request.id,
            messages.PROTOCOL_VERSION,
            self._epoch,
            session.session_id,
            self._machine.name,
            self._backend.name,
        )

    def _dispatch(self, session: Session, request: messages.AnyRequest, now_ns: int) -> messages.Reply | None:
        match request:
            case messages.ClaimRequest():
                self._claim(session, request, now_ns)
            case messages.Release():
                # Only root has a session for now, and root may release what others hold.
                self.feed(ReleaseRequested(now_ns, session.owner, request.id, request.claim, operator=True))
            case messages.Slots():
                return self._views.slots(request, now_ns)
            case messages.Counts():
                return self._views.counts(request)
            case messages.Capabilities():
                return self._views.capabilities(request)
            case messages.Why():
                return self._views.why(request)
            case messages.Goodbye():
                return messages.Bye(request.id)
        return None

    def _claim(self, session: Session, request: messages.ClaimRequest, now_ns: int) -> None:
        limit = self._settings.limits.claims_per_session
        try:
            if len(self._arbiter.books.sessions.get(session.session_id, ())) >= limit:
                raise LimitReached(f"this session has {limit} claims; more are not allowed (limits.claims_per_session)")
            event = fitting.claim_requested(
                request,
                session.owner,
                now_ns,
                machine=self._machine,
                backend=self._backend,
                rings=self._settings.rings,
            )
        except HwbpError as refusal:
            log.info("refused", owner=str(session.owner), errno=refusal.errno_name, reason=str(refusal))
            raise
        self.feed(event)


def _error(request_id: int, refusal: HwbpError) -> messages.Error:
    return messages.Error(request_id, refusal.errno_name, str(refusal), list(refusal.holders))
