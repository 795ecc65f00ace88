"""
The floor of a round trip by SEQPACKET: a bare server that sits in recv and answers with as many bytes as the daemon.

It runs in a process of its own: ``python -m benchmarks.packet_floor PATH REPLY_BYTES``.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.placement import SERVER_CPUS, on

READY = "ready"
PACKET_BYTES_MAX = 2**20
GIVE_UP_S = 10.0


def main(arguments: list[str]) -> None:
    """Be the server of one client, until it hangs up."""
    path, reply_bytes = arguments
    reply = b"r" * int(reply_bytes)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        print(READY, flush=True)
        client, _ = listener.accept()
    while client.recv(PACKET_BYTES_MAX):
        client.send(reply)


class PacketClient:
    """Bare packets, as ``benchmarks.floor.EchoClient`` are bare frames."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(path))
        # Not settimeout, which would poll before each call: the floor is one system call each way.
        seconds = int(GIVE_UP_S).to_bytes(8, sys.byteorder) + bytes(8)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)

    def exchange(self, request: bytes) -> bytes:
        """Send one packet, wait for one."""
        self.socket.send(request)
        return self.socket.recv(PACKET_BYTES_MAX)

    def stream(self, request: bytes, count: int, window: int) -> bytes:
        """Send one packet ``count`` times, at most ``window`` of them unanswered; return the last answer."""
        reply = b""
        for number in range(count + window):
            if number >= window:
                reply = self.socket.recv(PACKET_BYTES_MAX)
            if number < count:
                self.socket.send(request)
        return reply

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def packet_echo(path: Path, reply_bytes: int) -> Iterator[PacketClient]:
    """Run the floor and be connected to it."""
    command = [sys.executable, "-m", "benchmarks.packet_floor", str(path), str(reply_bytes)]
    with on(SERVER_CPUS):
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with server:
        try:
            assert server.stdout is not None
            if server.stdout.readline().strip() != READY:
                raise RuntimeError("the SEQPACKET floor did not start")
            with contextlib.closing(PacketClient(path)) as client:
                yield client
        finally:
            server.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
