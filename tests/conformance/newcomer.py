"""
A client written from docs/protocol.md alone, with pyzmq and msgpack, by somebody who has never seen the daemon.

It is as small as it can be and keep the rules of the document. ``Newcomer`` keeps a session, over any way that carries
messages (``Way``); ``ZeroMQ`` is the usual one.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import Any, Protocol

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

WAIT_S = 20.0  # for what takes milliseconds

Map = dict[str, Any]


class Lost(Exception):
    """The connection is lost."""


class Way(Protocol):
    """What carries messages."""

    pid: int  # of the process that connected

    def send(self, data: bytes) -> None:
        """Send one message."""
        ...

    def receive(self) -> Map:
        """Wait for the next message; raises ``Lost``, after all that came before, or ``TimeoutError``."""
        ...

    def close(self) -> None: ...


class Newcomer:
    """A session, or several one after the other."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.pid = way.pid
        self.epoch = 0
        self._last_id = 0
        self._notices_seen = 0
        self._replies: deque[Map] = deque()
        self._notices: deque[Map] = deque()

    def hello(self, version: int = 1) -> Map:
        """Return the reply to hello, a welcome or a refusal."""
        self._last_id += 1
        self.way.send(msgpack.packb({"op": "hello", "id": self._last_id, "version": version, "client": "newcomer"}))
        reply = self._reply_to(self._last_id)
        if reply["op"] == "welcome":
            self.epoch = reply["epoch"]
        return reply

    def send(self, op: str, **fields: Any) -> int:
        """Send a request and return its id, without waiting."""
        self._last_id += 1
        self.way.send(msgpack.packb({"op": op, "id": self._last_id, "epoch": self.epoch, **fields}))
        return self._last_id

    def request(self, op: str, **fields: Any) -> Map:
        """Return the reply to a request, which we give up after a while, as the daemon is told."""
        deadline_ns = time.monotonic_ns() + int(WAIT_S * 1e9)
        return self._reply_to(self.send(op, **{"deadline_ns": deadline_ns, **fields}))

    def reply(self) -> Map:
        """Return the next reply, whichever it answers."""
        while not self._replies:
            self._take_in()
        return self._replies.popleft()

    def notice(self) -> Map:
        """Return the next notice."""
        while not self._notices:
            self._take_in()
        return self._notices.popleft()

    def notices(self) -> list[Map]:
        """The notices that have come and were not taken yet."""
        seen = list(self._notices)
        self._notices.clear()
        return seen

    def close(self) -> None:
        self.way.close()

    def _reply_to(self, request_id: int) -> Map:
        while (reply := self.reply())["id"] != request_id:
            if reply["id"] == 0:  # of something unreadable; the only request under way is this one
                return reply
        return reply

    def _take_in(self) -> None:
        message = self.way.receive()
        if "id" in message:
            if message["op"] == "welcome":
                self._notices_seen = 0
            self._replies.append(message)
        else:
            self._notices_seen += 1
            assert message["n"] == self._notices_seen, f"a notice is missing before {message}"
            self._notices.append(message)


class ZeroMQ:
    """A DEALER that does not connect again by itself, and hears when its connection is lost."""

    def __init__(self, path: str) -> None:
        self.pid = os.getpid()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.reconnect_ivl = -1
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._is_lost = False
        self._socket.connect(f"ipc://{path}")

    def send(self, data: bytes) -> None:
        self._socket.send(data)

    def send_frames(self, *frames: bytes) -> None:
        """Send one message of several frames."""
        self._socket.send_multipart(frames)

    def receive(self) -> Map:
        while True:
            try:
                message: Map = msgpack.unpackb(self._socket.recv(zmq.NOBLOCK))
                return message
            except zmq.Again:
                pass
            if self._is_lost:
                raise Lost
            ready = dict(self._poller.poll(int(WAIT_S * 1000)))
            if not ready:
                raise TimeoutError("nothing came")
            if self._monitor in ready:
                recv_monitor_message(self._monitor)
                self._is_lost = True

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()
