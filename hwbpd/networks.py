"""
Both ways in as one ``Network``, and which of them are open.

Their routing ids and connections never meet: those of SEQPACKET are longer than any that ZeroMQ has, and negative. They
take turns, a message each, so neither starves the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from hwbpd.clock import Clock
from hwbpd.network import Incoming, Network, RouterNetwork
from hwbpd.peers import Connection, Peer
from hwbpd.seqpacket import ROUTE_BYTES, NotHere, SeqpacketNetwork
from hwbpd.settings import Settings

log = structlog.get_logger("hwbpd")

SUFFIX = ".seq"  # of the socket's path


@contextlib.contextmanager
def listening(path: Path, settings: Settings, clock: Clock) -> Iterator[Network]:
    """
    Listen at ``path`` for ZeroMQ, and beside it for SEQPACKET if that is wanted and this kernel can do it.

    :param path: one that no other daemon serves: what is there is replaced.
    :raises zmq.ZMQError: when it cannot be bound; ``OSError`` when the one beside it cannot.
    """
    limits, mode = settings.limits, int(settings.socket_mode, 8)
    beside = path.with_name(path.name + SUFFIX)
    with contextlib.ExitStack() as stack:
        router = RouterNetwork(path, limits, mode, clock)
        stack.callback(router.close)
        beside.unlink(missing_ok=True)
        if not settings.fast_socket:
            yield router
            return
        try:
            seqpacket = SeqpacketNetwork(beside, limits, mode, clock, settings.rings.bytes_per_message)
        except NotHere as why:
            log.info("no fast socket", socket=str(beside), reason=str(why))
            yield router
            return
        stack.callback(seqpacket.close)
        yield Networks(router, seqpacket)


class Networks:
    """ZeroMQ and SEQPACKET."""

    def __init__(self, router: Network, seqpacket: Network) -> None:
        self._router = router
        self._seqpacket = seqpacket
        self._routers_turn = False

    def descriptors(self) -> Sequence[int]:
        return (*self._router.descriptors(), *self._seqpacket.descriptors())

    def woke(self, fd: int) -> None:
        self._router.woke(fd)
        self._seqpacket.woke(fd)

    def has_news(self) -> bool:
        return self._router.has_news() or self._seqpacket.has_news()

    def receive(self) -> Incoming | None:
        self._routers_turn = not self._routers_turn
        first, second = (self._router, self._seqpacket) if self._routers_turn else (self._seqpacket, self._router)
        return first.receive() or second.receive()

    def lost_connections(self, to_be_sure: bool = False) -> Iterator[int]:
        yield from self._router.lost_connections(to_be_sure)
        yield from self._seqpacket.lost_connections(to_be_sure)

    def identify(self, connection: Connection) -> Peer:
        return (self._seqpacket if connection.fd < 0 else self._router).identify(connection)

    def hang_up_on_users(self) -> None:
        self._router.hang_up_on_users()
        self._seqpacket.hang_up_on_users()

    def send(self, routing_id: bytes, data: bytes) -> bool:
        return (self._seqpacket if len(routing_id) == ROUTE_BYTES else self._router).send(routing_id, data)
