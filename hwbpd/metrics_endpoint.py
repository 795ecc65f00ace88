"""
Answers ``GET /metrics`` over HTTP, in one thread of its own.

Whoever reaches the endpoint is not trusted to be a scraper in its right mind, and must cost the loop next to nothing:

1. The loop is asked for a reading at most once in ``FRESH_S``, and each reading is written out at most once in each
   format. Whoever comes sooner gets the same page.
2. At most ``CONNECTIONS_MAX`` connections are open, each for at most ``CONNECTION_S``. One more ends the oldest: a
   scraper is done in milliseconds, so the oldest is one that dawdles.
3. At most ``ACCEPTS_PER_S`` are accepted in a second; the others wait in the kernel's queue.
4. A request has at most ``REQUEST_BYTES_MAX``, and each connection is for one.

When the loop does not answer within ``PATIENCE_S`` the last reading is given out again, so that its heartbeat is seen
to be old. Turned down: the standard library's HTTP server, which has a thread for each connection or one connection at
a time, and bounds neither.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from pathlib import Path

import structlog
from prometheus_client.exposition import CONTENT_TYPE_LATEST as TEXT_TYPE
from prometheus_client.exposition import generate_latest as as_text
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as as_openmetrics

from hwbpd.metered import Window
from hwbpd.metrics import Reading
from hwbpd.metrics_families import Families

log = structlog.get_logger("hwbpd")

PATH = "/metrics"
FRESH_S = 1.0
PATIENCE_S = 1.0
CONNECTIONS_MAX = 16
CONNECTION_S = 5.0
ACCEPTS_PER_S = 50
REQUEST_BYTES_MAX = 8192
UNIX = "unix:"


class _Connection:
    """One request, as far as it has come, and what is left of the reply."""

    __slots__ = ("reply", "request", "since_s", "socket")

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.since_s = time.monotonic()
        self.request = b""
        self.reply = memoryview(b"")


class Endpoint:
    """
    The thread, and what it listens on.

    :param where: "HOST:PORT" or "unix:PATH"; :param mode: of the socket file.
    :raises OSError: when it cannot listen there.
    """

    def __init__(self, where: str, mode: int, window: Window) -> None:
        self._window = window
        self._path = Path(where.removeprefix(UNIX)) if where.startswith(UNIX) else None
        self._listener = _on_tcp(where) if self._path is None else _on_path(self._path, mode)
        self._listener.setblocking(False)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}  # oldest first
        self._second = 0  # in which ``_accepted`` connections were accepted
        self._accepted = 0
        self._is_listening = True
        self._asked_s = -FRESH_S
        self._reading: Reading | None = None
        self._pages: dict[str, bytes] = {}  # by content type, of this reading
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, as the settings would say it."""
        if self._path is not None:
            return f"{UNIX}{self._path}"
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Hang up on everybody and end the thread."""
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        for connected in (*self._connections, self._listener):
            connected.close()
        self._selector.close()
        os.close(self._wake_fd)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    # --- connections -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            ready = [key.fileobj for key, _ in self._selector.select(self._wait_s())]
            if self._wake_fd in ready:
                return
            now_s = time.monotonic()
            self._listen(int(now_s) != self._second or self._accepted < ACCEPTS_PER_S)
            for one in ready:
                if one is self._listener:
                    self._accept(int(now_s))
                elif isinstance(one, socket.socket) and one in self._connections:
                    self._go_on(self._connections[one])
            for connection in tuple(self._connections.values()):
                if connection.since_s + CONNECTION_S <= now_s:
                    self._hang_up(connection)

    def _wait_s(self) -> float | None:
        """How long nothing needs to be done unless somebody says something."""
        now_s = time.monotonic()
        oldest = next(iter(self._connections.values()), None)
        until_s = [] if oldest is None else [oldest.since_s + CONNECTION_S]
        if not self._is_listening:
            until_s.append(self._second + 1.0)
        return max(0.0, min(until_s) - now_s) if until_s else None

    def _listen(self, listens: bool) -> None:
        if listens and not self._is_listening:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif not listens and self._is_listening:
            self._selector.unregister(self._listener)
        self._is_listening = listens

    def _accept(self, second: int) -> None:
        if second != self._second:
            self._second, self._accepted = second, 0
        try:
            connected, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # it hung up meanwhile, or there are no descriptors left: then not again in this second
            self._accepted = ACCEPTS_PER_S
            self._listen(False)
            return
        self._accepted += 1
        self._listen(self._accepted < ACCEPTS_PER_S)
        if len(self._connections) == CONNECTIONS_MAX:
            self._hang_up(next(iter(self._connections.values())))
        connected.setblocking(False)
        self._connections[connected] = _Connection(connected)
        self._selector.register(connected, selectors.EVENT_READ)

    def _go_on(self, connection: _Connection) -> None:
        try:
            if connection.reply or self._has_request(connection):
                connection.reply = connection.reply[connection.socket.send(connection.reply) :]
                if not connection.reply:
                    connection.socket.shutdown(socket.SHUT_WR)
                    self._hang_up(connection)
        except BlockingIOError:
            return
        except OSError:
            self._hang_up(connection)

    def _has_request(self, connection: _Connection) -> bool:
        """Read on; true when the request is whole, or cannot be one, and there is a reply to it."""
        received = connection.socket.recv(REQUEST_BYTES_MAX)
        connection.request += received
        if b"\r\n\r\n" in connection.request:
            head = connection.request.partition(b"\r\n\r\n")[0]
            connection.reply = memoryview(self._reply(head.decode("latin-1")))
        elif len(connection.request) > REQUEST_BYTES_MAX:
            connection.reply = memoryview(_message("431 Request Header Fields Too Large"))
        elif not received:
            self._hang_up(connection)
        if not connection.reply:
            return False
        self._selector.modify(connection.socket, selectors.EVENT_WRITE)
        return True

    def _hang_up(self, connection: _Connection) -> None:
        del self._connections[connection.socket]
        self._selector.unregister(connection.socket)
        connection.socket.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _reply(self, head: str) -> bytes:
        line, *fields = head.split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _message("400 Bad Request")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _message("405 Method Not Allowed", fields={"Allow": "GET, HEAD"})
        if target.partition("?")[0] != PATH:
            return _message("404 Not Found", f"it is {PATH}\n".encode())
        accepted = ",".join(value for name, _, value in (field.partition(":") for field in fields) if _is_accept(name))
        content_type = OPENMETRICS_TYPE if "application/openmetrics-text" in accepted else TEXT_TYPE
        try:
            page = self._page(content_type)
        except Exception:  # our own mistake, of which the next scraper shall hear, too
            log.exception("metrics cannot be written out")
            return _message("500 Internal Server Error")
        if page is None:
            return _message("503 Service Unavailable", b"the daemon has not answered yet\n")
        return _message("200 OK", page, {"Content-Type": content_type}, has_body=method == "GET")

    def _page(self, content_type: str) -> bytes | None:
        now_s = time.monotonic()
        if now_s - self._asked_s >= FRESH_S:
            reading = self._window.ask(PATIENCE_S)
            self._asked_s = time.monotonic()
            if reading is not self._reading:
                self._reading, self._pages = reading, {}
        if self._reading is None:
            return None
        if content_type not in self._pages:
            write_out = as_openmetrics if content_type == OPENMETRICS_TYPE else as_text
            self._pages[content_type] = write_out(Families(self._reading))
        return self._pages[content_type]


def _is_accept(name: str) -> bool:
    return name.strip().lower() == "accept"


def _message(status: str, body: bytes = b"", fields: dict[str, str] | None = None, has_body: bool = True) -> bytes:
    lines = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in {**lines, **(fields or {})}.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + (body if has_body else b"")


def _on_tcp(where: str) -> socket.socket:
    host, _, port = where.rpartition(":")
    try:
        wanted = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except UnicodeError as why:
        raise OSError(errno.EINVAL, f"no name of a host: {why}") from None
    listener = socket.socket(*wanted[:3])
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(wanted[4])
        listener.listen(CONNECTIONS_MAX)
    except OSError:
        listener.close()
        raise
    return listener


def _on_path(path: Path, mode: int) -> socket.socket:
    if _is_left_behind(path):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
        listener.listen(CONNECTIONS_MAX)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(old_mask)
    return listener


def _is_left_behind(path: Path) -> bool:
    """Whether that is the socket file of a daemon that crashed: nobody listens there."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        visitor.setblocking(False)
        return visitor.connect_ex(str(path)) == errno.ECONNREFUSED
