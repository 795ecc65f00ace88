"""
The SEQPACKET socket under attack: a visitor who speaks it as the others speak ZMTP, and what only there can be done.
"""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack

from tests.fuzz.judge import Broken
from tests.fuzz.mouth import MESSAGE_BYTES_MAX, Mouth
from tests.fuzz.visits import STORM, Visitor, Visits
from tests.raw_zmtp import TIMEOUT_S

SUFFIX = ".seq"
PACKET_BYTES_MAX = 2**20


class PacketVisitor(Visitor):
    """Whoever is hung up on hears so as ``EOFError``, like any visitor."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path + SUFFIX)
        self.socket.settimeout(TIMEOUT_S)

    def shake_hands(self, **properties: bytes) -> None:
        """There is no handshake."""

    def say_all(self, messages: list[bytes]) -> None:
        for message in messages:
            self.pour(message)

    def say(self, data: bytes) -> None:
        self.pour(data)

    def pour(self, data: bytes) -> None:
        try:
            self.socket.send(data)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise EOFError("the other side has hung up") from None

    def hear(self) -> Any:
        return msgpack.unpackb(self._packet(), strict_map_key=False)

    def await_end(self) -> None:
        with suppress(EOFError):
            while True:
                self._packet()

    def _packet(self) -> bytes:
        try:
            packet = self.socket.recv(PACKET_BYTES_MAX)
        except ConnectionResetError:
            packet = b""
        if not packet:
            raise EOFError("the other side has hung up")
        return packet


def kinds_of_visitor(path: str) -> list[type[Visitor]]:
    """Of those the daemon at ``path`` lets in: SEQPACKET takes a kernel that is up to it."""
    return [Visitor, PacketVisitor] if Path(path + SUFFIX).exists() else [Visitor]


class AllVisits(Visits):
    """Those of both ways in; where it makes no difference which, it is drawn."""

    def __init__(self, rng: random.Random, path: str, mouth: Mouth, uid: int) -> None:
        super().__init__(rng, path, mouth, uid)
        self._kinds = kinds_of_visitor(path)
        if PacketVisitor not in self._kinds:
            return
        self._ways += [
            self.no_message,
            self.presents,
            self.half_closed,
            self.silence,
            self.packet_storm,
            self.goes_with_everything_unread,
        ]

    def _visitor(self) -> Visitor:
        return self._rng.choice(self._kinds)(self._path)

    def no_message(self) -> None:
        """An empty packet or one that is too long is the end of it, with a session or without."""
        with PacketVisitor(self._path) as visitor:
            if self._rng.random() < 0.5:
                self._opens_a_session(visitor)
            self.messages += 1
            visitor.pour(self._rng.choice([b"", bytes(MESSAGE_BYTES_MAX + 1), self._rng.randbytes(150_000)]))
            visitor.await_end()

    def presents(self) -> None:
        """Descriptors sent along never reach the daemon."""
        with PacketVisitor(self._path) as visitor:
            self._opens_a_session(visitor)
            try:
                socket.send_fds(visitor.socket, [self._mouth.speak().data or b"."], [visitor.socket.fileno()] * 20)
            except PermissionError:
                return
            except (BrokenPipeError, ConnectionResetError):
                raise EOFError("the other side has hung up") from None
            raise Broken("descriptors could be sent along")

    def half_closed(self) -> None:
        """Whoever will say nothing more is taken for gone."""
        with PacketVisitor(self._path) as visitor:
            self._opens_a_session(visitor)
            visitor.socket.shutdown(socket.SHUT_WR)
            visitor.await_end()

    def silence(self) -> None:
        self._leave_open(PacketVisitor(self._path))

    def packet_storm(self) -> None:
        for _ in range(STORM):
            with PacketVisitor(self._path) as visitor, suppress(EOFError):
                if self._rng.random() < 0.5:
                    visitor.pour(self._rng.randbytes(self._rng.randint(1, 100)))
                    self.messages += 1

    def goes_with_everything_unread(self) -> None:
        with PacketVisitor(self._path) as visitor:
            visitor.pour(self._mouth.hello().data)
            for _ in range(50):
                visitor.pour(self._mouth.right().data)
            self.messages += 51
