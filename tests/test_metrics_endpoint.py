"""
The endpoint as scrapers meet it, good ones and bad ones: what they get is exact, and what they cost is bounded.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import socket
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import parser as text_parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from hwbpd import daemon, metrics_endpoint
from hwbpd.metered import MeteredServer, Window
from hwbpd.metrics_endpoint import CONNECTIONS_MAX, REQUEST_BYTES_MAX, Endpoint
from hwbpd.settings import Metrics, Settings
from tests.fakes import Rig

WAIT_S = 30
ANY_PORT = "127.0.0.1:0"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
CLAIM: dict[str, Any] = {"address": 0x404040, "length": 8, "access": "w", "delivery": "count"}

Samples = dict[tuple[str, tuple[str, ...]], float]  # by name, and the values of the labels in their alphabetic order


def window_of(rig: Rig) -> Window:
    assert isinstance(rig.server, MeteredServer)
    return rig.server.window


@contextmanager
def served(rig: Rig) -> Iterator[None]:
    """Meanwhile the daemon's loop turns, in a thread of its own; afterwards the daemon has stopped."""
    reader, writer = os.pipe()
    loop = threading.Thread(target=rig.server.run, args=(reader,))
    loop.start()
    try:
        yield
    finally:
        os.close(writer)
        loop.join()
        os.close(reader)
        rig.machine.close()
        rig.network.close()


@contextmanager
def endpoint_of(rig: Rig, where: str = ANY_PORT) -> Iterator[Endpoint]:
    endpoint = Endpoint(where, 0o600, window_of(rig))
    try:
        yield endpoint
    finally:
        endpoint.close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """Of a daemon that serves."""
    rig = Rig(make_server=MeteredServer)
    with served(rig), endpoint_of(rig) as one:
        yield one


def connect(endpoint: Endpoint) -> socket.socket:
    if endpoint.address.startswith("unix:"):
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(WAIT_S)
        connected.connect(endpoint.address.removeprefix("unix:"))
        return connected
    host, _, port = endpoint.address.rpartition(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def said_to(endpoint: Endpoint, request: bytes) -> tuple[int, dict[str, str], str]:
    """Send bytes; return status, fields and body of what comes until it hangs up."""
    with connect(endpoint) as connected:
        connected.sendall(request)
        reply = b"".join(iter(lambda: connected.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    return int(line.split(" ")[1]), dict(field.split(": ", 1) for field in fields), body.decode()


def scrape(endpoint: Endpoint, accept: str = OPENMETRICS) -> str:
    request = f"GET /metrics HTTP/1.1\r\nHost: here\r\nAccept: {accept}\r\n\r\n"
    status, fields, body = said_to(endpoint, request.encode())
    assert status == 200, body
    assert int(fields["Content-Length"]) == len(body.encode())
    return body


def samples_in(page: str) -> Samples:
    """What a page of OpenMetrics says; the parser refuses what is not."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in openmetrics_parser.text_string_to_metric_families(page)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def total(samples: Samples, name: str) -> float:
    return sum(value for (of, _), value in samples.items() if of == name)


# --- what a scraper gets ---------------------------------------------------------------------------------------------


def test_a_page_of_openmetrics_says_what_the_daemon_counted() -> None:
    # given a daemon with one claim, of which a second one was refused
    rig = Rig(make_server=MeteredServer)
    client = rig.client()
    assert rig.ask(client, "claim", **CLAIM, cpus=[0])["op"] == "granted"
    assert rig.ask(client, "claim", **CLAIM, tid=812)["errno"] == "ESRCH"

    # when it is scraped
    with served(rig), endpoint_of(rig) as endpoint:
        samples = samples_in(scrape(endpoint))

    # then this is what it says
    assert samples["hwbpd_claims", ("perf", "armed")] == 1
    assert samples["hwbpd_grants_total", ("perf",)] == 1
    assert samples["hwbpd_refusals_total", ("door", "ESRCH")] == 1
    assert total(samples, "hwbpd_refusals_total") == 1
    assert samples["hwbpd_slots", ("any",)] == 4
    assert samples["hwbpd_slots_free", ("0", "any")] == 3
    assert samples["hwbpd_slots_held", ("0", "any")] == 1
    assert samples["hwbpd_slots_free", ("1", "any")] == 4
    assert samples["hwbpd_sessions", ()] == 1
    assert samples["hwbpd_messages_total", ()] == 3
    assert samples["hwbpd_message_seconds_count", ()] == 3
    assert samples["hwbpd_message_seconds_bucket", ("+Inf",)] == 3
    assert samples["hwbpd_step_seconds_count", ("Armed",)] == 1
    assert samples["hwbpd_heartbeat_timestamp_seconds", ()] > 1.6e9
    assert samples["process_resident_memory_bytes", ()] > 2**20
    assert samples["hwbpd_daemon_info", ("fake", "fake", importlib.metadata.version("hwbpd"))] == 1


def test_whoever_does_not_speak_openmetrics_gets_the_older_text(endpoint: Endpoint) -> None:
    page = scrape(endpoint, "text/plain")

    names = {family.name for family in text_parser.text_string_to_metric_families(page)}
    assert {"hwbpd_claims", "hwbpd_hits", "hwbpd_step_seconds", "process_cpu_seconds"} <= names
    assert "# EOF" not in page


def test_the_content_type_says_which(endpoint: Endpoint) -> None:
    def content_type(accept: str) -> str:
        return said_to(endpoint, f"GET /metrics HTTP/1.0\r\naccept:{accept}\r\n\r\n".encode())[1]["Content-Type"]

    assert content_type(OPENMETRICS).startswith("application/openmetrics-text")
    assert content_type("text/plain").startswith("text/plain")
    assert content_type("*/*").startswith("text/plain")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", 200),
        (b"GET /metrics?name=x HTTP/1.1\r\n\r\n", 200),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics SPDY/3\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\0\xff\xfe\r\n: :\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept\r\n:\r\n\xc3\x28: x\r\n\r\n", 200),
        (b"A" * (REQUEST_BYTES_MAX + 1), 431),
    ],
)
def test_every_request_has_its_status(endpoint: Endpoint, request_bytes: bytes, status: int) -> None:
    found, fields, body = said_to(endpoint, request_bytes)

    assert found == status
    assert fields["Connection"] == "close"
    assert bool(body) == (status in (200, 404) and not request_bytes.startswith(b"HEAD"))
    assert scrape(endpoint), "and the next one is served"


def test_a_request_may_come_in_pieces(endpoint: Endpoint) -> None:
    with connect(endpoint) as connected:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /metrics HTTP/1.1\r\n\r\n":
            connected.sendall(bytes([byte]))
        assert connected.recv(12) == b"HTTP/1.1 200"


# --- while the daemon works ------------------------------------------------------------------------------------------


def test_every_page_of_a_storm_is_of_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    # given scrapers that scrape all the time and get a new reading each time
    monkeypatch.setattr(metrics_endpoint, "FRESH_S", 0.0)
    monkeypatch.setattr(metrics_endpoint, "ACCEPTS_PER_S", 10**6)
    rig = Rig(make_server=MeteredServer)
    client = rig.client()
    pages: list[str] = []
    over = threading.Event()

    def scrape_on(endpoint: Endpoint) -> None:
        while not over.is_set():
            pages.append(scrape(endpoint))

    # when this thread, as the loop, serves a storm of requests meanwhile
    asked = 0
    with endpoint_of(rig) as endpoint, ExitStack() as stack:
        scrapers = [threading.Thread(target=scrape_on, args=(endpoint,)) for _ in range(3)]
        for scraper in scrapers:
            scraper.start()
            stack.callback(scraper.join)
        stack.callback(over.set)
        while len(pages) < 30:
            claim = rig.ask(client, "claim", **CLAIM)["claim"]
            rig.ask(client, "release", claim=claim)
            rig.ask(client, "release", claim=claim)
            asked += 3
        over.set()
        while any(scraper.is_alive() for scraper in scrapers):
            rig.turn()

    # then each page is of one moment between two messages, and none is lost in the end
    for page in map(samples_in, pages):
        settled = page["hwbpd_grants_total", ("perf",)] - total(page, "hwbpd_claims_ended_total")
        assert total(page, "hwbpd_claims") == page["hwbpd_resources", ()] == settled
        assert page["hwbpd_slots_held", ("0", "any")] == settled
        assert page["hwbpd_message_seconds_count", ()] == page["hwbpd_messages_total", ()]
        assert page["hwbpd_step_seconds_count", ("ClaimRequested",)] == page["hwbpd_grants_total", ("perf",)]
    assert isinstance(rig.server, MeteredServer)
    assert rig.server.meter.messages == asked + 1
    rig.stop()


def test_the_loop_is_asked_once_for_however_many_scrapers(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a daemon that counts how often it is asked for a reading, in a second that never ends
    monkeypatch.setattr(metrics_endpoint, "FRESH_S", 3600.0)
    monkeypatch.setattr(metrics_endpoint, "ACCEPTS_PER_S", 10**6)
    rig = Rig(make_server=MeteredServer)
    asked = spied(monkeypatch, Window, "ask")

    # when it is scraped in both formats
    with served(rig), endpoint_of(rig) as endpoint:
        pages = Counter(scrape(endpoint, accept) for _ in range(20) for accept in (OPENMETRICS, "text/plain"))

    # then it was asked once, and each format was written out once
    assert asked == ["ask"]
    assert sorted(pages.values()) == [20, 20]


def spied(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[str]:
    """Return a list that grows by one with each call of a method."""
    calls: list[str] = []
    method: Callable[..., Any] = getattr(kind, name)

    def noted(*args: Any) -> Any:
        calls.append(name)
        return method(*args)

    monkeypatch.setattr(kind, name, noted)
    return calls


def test_a_loop_that_is_stuck_is_seen_by_its_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    # given an endpoint whose daemon does not turn
    monkeypatch.setattr(metrics_endpoint, "PATIENCE_S", 0.01)
    monkeypatch.setattr(metrics_endpoint, "FRESH_S", 0.0)
    rig = Rig(make_server=MeteredServer)
    with endpoint_of(rig) as endpoint:
        # when it is scraped, then there is nothing to tell
        assert said_to(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n")[0] == 503

        # when it has turned once and is stuck again
        rig.turn()
        first, second = samples_in(scrape(endpoint)), samples_in(scrape(endpoint))

        # then what it said is said again, heartbeat and all
        heartbeat = "hwbpd_heartbeat_timestamp_seconds", ()
        assert first[heartbeat] == second[heartbeat]
    rig.stop()


def test_a_page_that_cannot_be_written_out_ends_nobody(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(metrics_endpoint, "Families", lambda reading: 1 // 0)
        assert said_to(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n")[0] == 500

    assert scrape(endpoint)


# --- bad company -----------------------------------------------------------------------------------------------------


def test_a_crowd_that_says_nothing_makes_room_for_a_scraper(endpoint: Endpoint) -> None:
    # given twice as many connections as may be open, all silent or in the middle of a word
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(endpoint)) for _ in range(2 * CONNECTIONS_MAX)]
        for connected in crowd[::2]:
            connected.sendall(b"GET /met")

        # when somebody scrapes
        assert scrape(endpoint)

        # then it was served, the first of the crowd have been hung up on, and no more are open than may be
        for connected in crowd[:CONNECTIONS_MAX]:
            assert is_hung_up(connected)
        assert len(endpoint._connections) <= CONNECTIONS_MAX
        assert [thread.name for thread in threading.enumerate()].count("metrics") == 1


def is_hung_up(connected: socket.socket) -> bool:
    """Wait until the other end has closed."""
    try:
        return connected.recv(1) == b""
    except ConnectionResetError:
        return True


def test_whoever_dawdles_is_hung_up_on(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_endpoint, "CONNECTION_S", 0.1)

    with connect(endpoint) as connected:
        connected.sendall(b"GET /metrics HTTP/1.1\r\nX: ")

        assert is_hung_up(connected)


def test_whoever_does_not_read_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a page that is larger than what a socket holds, and somebody who asks for it and does not read
    rig = Rig(make_server=MeteredServer, cpus=4000)
    with served(rig), endpoint_of(rig, f"unix:{tmp_path}/metrics.sock") as endpoint, connect(endpoint) as idle:
        idle.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert idle.recv(12) == b"HTTP/1.1 200"
        assert any(len(one.reply) > 0 for one in tuple(endpoint._connections.values())), "it is in the middle"

        # when somebody else scrapes
        page = scrape(endpoint)

        # then the page is whole, and the other is hung up on in the end
        assert samples_in(page)["hwbpd_slots_free", ("3999", "any")] == 4
        monkeypatch.setattr(metrics_endpoint, "CONNECTION_S", 0.0)
        with connect(endpoint) as next_one:
            assert is_hung_up(next_one)
        assert b"".join(iter(lambda: idle.recv(65536), b"")), "what was on its way still comes, and then the end"


def test_only_so_many_are_accepted_in_a_second(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    # given an endpoint that notes in which second it accepts somebody
    monkeypatch.setattr(metrics_endpoint, "ACCEPTS_PER_S", 3)
    seconds: list[int] = []
    accept = Endpoint._accept

    def noted(self: Endpoint, second: int) -> None:
        seconds.append(second)
        accept(self, second)

    monkeypatch.setattr(Endpoint, "_accept", noted)

    # when more come than it takes
    for _ in range(7):
        assert scrape(endpoint)

    # then all are served, in their turn
    assert len(seconds) == 7
    assert max(Counter(seconds).values()) <= 3


def test_without_descriptors_it_waits_and_goes_on(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a process that has no descriptor left when somebody connects, and has some later
    failures = [OSError(errno.EMFILE, "Too many open files")]
    accept = socket.socket.accept

    def accept_later(listener: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_later)

    # when somebody scrapes, then it is served
    assert scrape(endpoint)
    assert not failures


# --- where it listens ------------------------------------------------------------------------------------------------


def test_a_socket_file_has_its_mode_and_goes_with_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    rig = Rig(make_server=MeteredServer)

    with served(rig), endpoint_of(rig, f"unix:{path}") as endpoint:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert endpoint.address == f"unix:{path}"
        assert samples_in(scrape(endpoint))

    assert not path.exists()


def test_a_socket_file_that_was_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    rig = Rig(make_server=MeteredServer)

    with served(rig), endpoint_of(rig, f"unix:{path}") as endpoint:
        assert scrape(endpoint)


@pytest.mark.parametrize("what", ["somebody listens", "a file of somebody"])
def test_nothing_that_is_somebody_elses_is_taken_over(tmp_path: Path, what: str) -> None:
    path = tmp_path / "metrics.sock"
    rig = Rig(make_server=MeteredServer)
    with socket.socket(socket.AF_UNIX) as other:
        if what == "somebody listens":
            other.bind(str(path))
            other.listen()
        else:
            path.write_text("mine")

        with pytest.raises(OSError, match="in use"):
            Endpoint(f"unix:{path}", 0o600, window_of(rig))

    assert path.exists()
    rig.stop()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    rig = Rig(make_server=MeteredServer)
    assert isinstance(rig.server, MeteredServer)
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        settings = Settings(metrics=Metrics(listen=where))

        with pytest.raises(daemon.CannotListen, match=where), daemon._metrics_of(rig.server, settings):
            pass
    rig.stop()


@pytest.mark.parametrize("where", ["no-such-host.invalid:1", f"{'x' * 70}.invalid:1", f"unix:/nowhere/{'x' * 9}"])
def test_what_is_no_place_to_listen_is_named(where: str) -> None:
    rig = Rig(make_server=MeteredServer)
    assert isinstance(rig.server, MeteredServer)
    settings = Settings(metrics=Metrics(listen=where))

    with pytest.raises(daemon.CannotListen, match=where), daemon._metrics_of(rig.server, settings):
        pass
    rig.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_it_listens_on_ipv6_too() -> None:
    rig = Rig(make_server=MeteredServer)
    try:
        with served(rig), endpoint_of(rig, "[::1]:0") as endpoint:
            assert endpoint.address.startswith("[::1]:")
            with socket.create_connection(("::1", int(endpoint.address.rpartition(":")[2])), WAIT_S) as connected:
                connected.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                assert connected.recv(12) == b"HTTP/1.1 200"
    except OSError as why:
        pytest.skip(f"this host has no IPv6 loopback ({why}): sysctl net.ipv6.conf.lo.disable_ipv6=0")


def test_what_is_missing_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a host without prometheus-client
    rig = Rig(make_server=MeteredServer)
    assert isinstance(rig.server, MeteredServer)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "hwbpd.metrics_endpoint")
    monkeypatch.delitem(sys.modules, "hwbpd.metrics_families")

    # when metrics are asked for, then the daemon does not start, and says what to do
    settings = Settings(metrics=Metrics(listen=ANY_PORT))
    with pytest.raises(daemon.CannotListen, match=r"hwbpd\[metrics\]"), daemon._metrics_of(rig.server, settings):
        pass
    rig.stop()
