"""
A ZMTP peer written by hand, to say what libzmq would not: forged properties, old versions, several frames.

ZMTP 3.0 (https://rfc.zeromq.org/spec/23/) with the NULL mechanism, and ZMTP 2.0 (https://rfc.zeromq.org/spec/15/).
It needs nothing but the standard library, so that a process with other rights can run it, too.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
MORE, COMMAND = 1, 4
DEALER_V2 = 5
TIMEOUT_S = 10.0


class RawPeer:
    """A connection to an ipc path; use it in a ``with`` statement."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(path)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def shake_hands(self, **properties: bytes) -> None:
        """Open as a DEALER of ZMTP 3.0, and wait until the other side agrees; ``properties`` as in ``offer_hand``."""
        self.offer_hand(**properties)
        self.take_hand()

    def take_hand(self) -> None:
        """Wait for the other side's part: its greeting and READY."""
        self._receive(64)
        self.receive_frame()

    def offer_hand(self, **properties: bytes) -> None:
        """Say our part of it; ``properties`` go into READY with - for _ (``Peer_Address``), __ stays."""
        self.socket.sendall(SIGNATURE + bytes([3, 0]) + b"NULL".ljust(20, b"\0") + bytes([0]) + bytes(31))
        body = b"\x05READY"
        for name, value in {"Socket_Type": b"DEALER", "Identity": b"", **properties}.items():
            written = (name if name.startswith("__") else name.replace("_", "-")).encode()
            body += bytes([len(written)]) + written + struct.pack(">I", len(value)) + value
        self.socket.sendall(bytes([COMMAND, len(body)]) + body)

    def shake_hands_v2(self) -> None:
        """Open as a DEALER of ZMTP 2.0."""
        self.socket.sendall(SIGNATURE + bytes([1, DEALER_V2]) + bytes([0, 0]))
        self._receive(12)
        self.receive_frame()  # the routing id of the other side

    def send(self, *frames: bytes) -> None:
        """Send one message of short frames."""
        for number, frame in enumerate(frames, start=1):
            self.socket.sendall(bytes([MORE if number < len(frames) else 0, len(frame)]) + frame)

    def receive_frame(self) -> bytes:
        """Return one frame; raises ``EOFError`` when the other side has hung up."""
        flags, size = self._receive(2)
        if flags & 2:
            (size,) = struct.unpack(">Q", bytes([size]) + self._receive(7))
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                chunk = self.socket.recv(size - len(data))
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                raise EOFError("the other side has hung up")
            data += chunk
        return data
