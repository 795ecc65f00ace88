"""
The floors of a round trip: a bare ROUTER that answers a DEALER over ipc with as many bytes as the daemon would.

Two shapes. ``blocking`` sits in recv: nothing in Python answers sooner, so this is the floor that ratios are to.
``epoll`` waits on the socket's descriptor and drains, as any daemon must that also waits for rings and processes; it
shows what that alone costs. Both can arm and disarm a bare breakpoint between the two messages, which makes them the
floor of claim and release.

Each runs in a process of its own: ``python -m benchmarks.floor SHAPE PATH REPLY_BYTES [TID ADDRESS RING_BYTES]``.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from benchmarks.bare_breakpoint import BareBreakpoint
from benchmarks.placement import SERVER_CPUS, on

ARM, DISARM = b"+", b"-"  # how a request begins that does more than be echoed
READY = "ready"


def main(arguments: list[str]) -> None:
    """Be the server, until the process is ended."""
    shape, path, reply_bytes, *breakpoint_of = arguments
    reply = b"r" * int(reply_bytes)
    bare = BareBreakpoint(*(int(number) for number in breakpoint_of)) if breakpoint_of else None
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(f"ipc://{path}")
        print(READY, flush=True)
        serve = {"blocking": serve_blocking, "epoll": serve_by_epoll}[shape]
        if bare is None:
            serve(router, lambda request: reply)
        else:
            arming = bare

            def answer(request: bytes) -> bytes:
                if request.startswith(ARM):
                    arming.arm()
                else:
                    arming.disarm()
                return reply

            serve(router, answer)


def serve_blocking(router: zmq.Socket[bytes], answer: Callable[[bytes], bytes]) -> None:
    while True:
        client, request = router.recv_multipart()
        router.send_multipart([client, answer(request)])


def serve_by_epoll(router: zmq.Socket[bytes], answer: Callable[[bytes], bytes]) -> None:
    with select.epoll() as epoll:
        epoll.register(router.FD, select.EPOLLIN)
        while True:
            # The descriptor is edge-triggered: drain to empty, also after having sent, or the next edge never comes.
            while int(router.get(zmq.EVENTS)) & zmq.POLLIN:
                client, request = router.recv_multipart(zmq.NOBLOCK)
                router.send_multipart([client, answer(request)])
            epoll.poll()


class EchoClient:
    """A bare DEALER towards one of the servers above, or towards any other."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 10_000  # ms; a server that failed shall end the benchmark, not hang it
        self.socket.connect(f"ipc://{path}")

    def exchange(self, request: bytes) -> bytes:
        """Send one frame, wait for one."""
        self.socket.send(request)
        return self.socket.recv()

    def stream(self, request: bytes, count: int, window: int) -> bytes:
        """Send one frame ``count`` times, at most ``window`` of them unanswered; return the last answer."""
        reply = b""
        for number in range(count + window):
            if number >= window:
                reply = self.socket.recv()
            if number < count:
                self.socket.send(request)
        return reply

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def echo(
    context: zmq.Context[zmq.Socket[bytes]],
    path: Path,
    shape: str,
    reply_bytes: int,
    breakpoint_of: tuple[int, int, int] | None = None,
) -> Iterator[EchoClient]:
    """
    Run a floor in its own process and be connected to it.

    :param breakpoint_of: thread, address and size of the ring in bytes, for a server that arms.
    """
    numbers = [str(number) for number in (reply_bytes, *(breakpoint_of or ()))]
    command = [sys.executable, "-m", "benchmarks.floor", shape, str(path), *numbers]
    with on(SERVER_CPUS):
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with server:
        try:
            assert server.stdout is not None
            if server.stdout.readline().strip() != READY:
                raise RuntimeError(f"the {shape} floor did not start")
            client = EchoClient(context, path)
            try:
                yield client
            finally:
                client.close()
        finally:
            server.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
