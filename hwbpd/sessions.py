"""
Who is connected. A session is one connection that has said hello: it starts there and ends at goodbye, at the loss of
the connection or at the death of the process, whichever comes first.

A session hangs on the connection (its routing id, which the ROUTER made up, and its descriptor), never on a name that a
client chose: those can be squatted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from hwbpd import peers
from hwbpd.core.model import Owner
from hwbpd.peers import Connection, Peer


class Session:
    """One connection and the process behind it."""

    __slots__ = ("connection", "decisions_missed", "notices_sent", "owner", "peer", "privileged", "routing_id")

    def __init__(self, session_id: int, routing_id: bytes, connection: Connection, peer: Peer) -> None:
        self.owner = Owner(session_id, peer.pid, peer.uid, peer.gid, peer.comm)
        self.routing_id = routing_id
        self.connection = connection
        self.peer = peer
        self.notices_sent = 0
        self.decisions_missed = 0  # of a follower: for want of room on the way to it
        self.privileged = False  # at hello: may look at what others hold and release it; claims are asked about anew

    @property
    def session_id(self) -> int:
        return self.owner.session_id


class Sessions:
    """All of them, by each thing that can name one."""

    def __init__(self) -> None:
        self._last_id = 0
        self._by_id: dict[int, Session] = {}
        self._by_routing_id: dict[bytes, Session] = {}
        self._by_fd: dict[int, Session] = {}
        self._by_pidfd: dict[int, Session] = {}
        self._by_uid: dict[int, dict[int, Session]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._by_id.values()))

    def open(self, routing_id: bytes, connection: Connection, peer: Peer) -> Session:
        """Begin a session; the caller has ended any earlier one on that routing id or descriptor."""
        self._last_id += 1
        session = Session(self._last_id, routing_id, connection, peer)
        self._by_id[session.session_id] = session
        self._by_routing_id[routing_id] = session
        self._by_fd[connection.fd] = session
        self._by_pidfd[peer.pidfd] = session
        self._by_uid.setdefault(peer.uid, {})[session.session_id] = session
        return session

    def close(self, session: Session) -> None:
        """End it."""
        del self._by_id[session.session_id]
        del self._by_routing_id[session.routing_id]
        del self._by_fd[session.connection.fd]
        del self._by_pidfd[session.peer.pidfd]
        of_uid = self._by_uid[session.peer.uid]
        del of_uid[session.session_id]
        if not of_uid:
            del self._by_uid[session.peer.uid]
        peers.close(session.peer)

    def of(self, session_id: int) -> Session | None:
        return self._by_id.get(session_id)

    def of_uid(self, uid: int) -> Collection[Session]:
        return self._by_uid.get(uid, {}).values()

    def on_route(self, routing_id: bytes) -> Session | None:
        return self._by_routing_id.get(routing_id)

    def on_connection(self, fd: int) -> Session | None:
        return self._by_fd.get(fd)

    def of_process(self, pidfd: int) -> Session | None:
        return self._by_pidfd.get(pidfd)
