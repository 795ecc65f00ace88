"""A session from hello to its end: who answers, what comes between, and what is noticed when nobody does."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest

import hwbp
from tests.clients.fake_daemon import EPOCH, FakeDaemon, always, error, final, hits, message, record

EVENT = "mem:0x404040/8:w"


# --- reaching the daemon ---------------------------------------------------------------------------------------------


def test_hello_says_the_version_and_the_name_and_later_requests_the_epoch(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    client.capabilities()
    assert daemon.asked("hello") == [{"op": "hello", "id": 1, "version": 1, "client": "test"}]
    (request,) = daemon.asked("capabilities")
    assert (request["epoch"], request["deadline_ns"] > 0) == (EPOCH, True)
    assert (client.machine, client.backend) == ("fake", "x86")


def test_the_socket_is_looked_for_where_the_protocol_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given nothing said at all, then it is the system's socket.
    monkeypatch.delenv("HWBPD_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert hwbp.socket_path() == Path("/run/hwbpd/hwbpd.sock")

    # When one exists for this user, then it is that one; the environment goes before it, and what was said before all.
    (tmp_path / "hwbpd").mkdir()
    (tmp_path / "hwbpd" / "hwbpd.sock").touch()
    assert hwbp.socket_path() == tmp_path / "hwbpd" / "hwbpd.sock"
    monkeypatch.setenv("HWBPD_SOCKET", "/from/environment")
    assert hwbp.socket_path() == Path("/from/environment")
    assert hwbp.socket_path("/said") == Path("/said")


def test_without_a_socket_the_refusal_says_which_path_and_how_to_start_the_daemon(tmp_path: Path) -> None:
    with pytest.raises(hwbp.NotReachable, match=r"no such socket.*hwbpd \(as root\)") as caught:
        hwbp.connect(tmp_path / "absent.sock")
    assert str(tmp_path / "absent.sock") in str(caught.value)
    assert caught.value.errno_name == "ECONNREFUSED"


def test_a_socket_file_that_a_dead_daemon_left_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(hwbp.NotReachable, match="nobody listens"):
        hwbp.connect(path)


def test_a_path_that_is_no_socket_or_too_long_for_one_is_not_reachable(tmp_path: Path) -> None:
    for path in (tmp_path / "file", tmp_path / ("x" * 200)):
        if path.name == "file":
            path.touch()
        with pytest.raises(hwbp.NotReachable):
            hwbp.connect(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else: run the tests as root")
def test_a_socket_one_may_not_use_says_so(daemon: FakeDaemon) -> None:
    for path in daemon.paths:
        path.chmod(0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(hwbp.NotReachable, match="access is denied"):
            hwbp.connect(daemon.path)
    finally:
        os.seteuid(0)


def test_a_listener_that_does_not_answer_is_not_reachable(daemon: FakeDaemon) -> None:
    daemon.answers["hello"] = always()
    with pytest.raises(hwbp.NotReachable, match=r"did not answer within 0\.05 s"):
        hwbp.connect(daemon.path, timeout=0.05)


def test_a_listener_that_hangs_up_is_not_reachable(tmp_path: Path) -> None:
    # Given a listener that speaks no ZeroMQ,
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()

        def answer() -> None:
            for _ in range(2):  # the look whether somebody listens, and the connection
                with other.accept()[0] as caller, suppress(OSError):
                    caller.send(b"what?" * 100)

        answering = threading.Thread(target=answer)
        answering.start()

        # when a client says hello, then it learns that this is no daemon before its patience is over.
        # ZeroMQ takes such words for an old dialect of its own, if they come before the end of the connection does.
        with pytest.raises(hwbp.NotReachable, match=r"closed the connection|what hwbpd would not"):
            hwbp.connect(path, timeout=30)
        answering.join()


@pytest.mark.parametrize(("name", "refusal"), [("EPERM", hwbp.NotPermitted), ("EPROTO", hwbp.VersionMismatch)])
def test_a_hello_may_be_refused(daemon: FakeDaemon, name: str, refusal: type[hwbp.HwbpError]) -> None:
    daemon.answers["hello"] = always(error(name, "not you"))
    with pytest.raises(refusal, match="not you"):
        hwbp.connect(daemon.path)


# --- requests and replies --------------------------------------------------------------------------------------------


def test_notices_before_a_reply_are_kept_for_their_claims(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given two claims, and a daemon that sends hits of both before it answers,
    one, two = client.claim(EVENT, tid=1), client.claim(EVENT, tid=2)
    daemon.answers["capabilities"] = lambda _: [
        hits(1, record(0x10)),
        hits(2, record(0x20)),
        message("news", claim=1),  # a notice of a later daemon
        hits(1, record(0x11), record(0x12)),
        {"op": "capabilities", "machine": "m", "backend": "b", "architecture": "a", "pools": {}, "later": 1}
        | {"cpus_possible": [0], "cpus_online": [0]},
    ]

    # when a reply is waited for,
    assert client.capabilities().machine == "m"

    # then the hits are there without another look at the socket.
    assert [hit.ip for hit in one.hits(timeout=0)] == [0x10, 0x11, 0x12]
    assert [hit.ip for hit in two.hits(timeout=0)] == [0x20]


def test_a_request_that_is_not_answered_times_out_and_the_session_goes_on(daemon: FakeDaemon) -> None:
    with hwbp.connect(daemon.path, timeout=0.5) as client:
        # Given a request whose reply does not come in time,
        daemon.answers["why"] = always()
        with pytest.raises(hwbp.RequestTimedOut, match=r"'why' within 0\.5 s"):
            client.why(3)

        # when it comes after all, then the next request gets its own reply.
        (late,) = daemon.asked("why")
        daemon.push(message("why", id=late["id"], claim=3, state="late", lines=[]))
        daemon.answers["why"] = lambda _: [message("why", claim=4, state="in time", lines=["asked"])]
        assert client.why(4) == hwbp.Why(4, "in time", ("asked",))


def test_a_claim_that_is_granted_too_late_is_given_back(daemon: FakeDaemon) -> None:
    with hwbp.connect(daemon.path, timeout=0.5) as client:
        # Given a claim that nobody waits for any longer,
        daemon.answers["claim"] = always()
        with pytest.raises(hwbp.RequestTimedOut):
            client.claim(EVENT, tid=1)
        (late,) = daemon.asked("claim")

        # when it is granted, then it is released as soon as that is read.
        daemon.push(message("granted", id=late["id"], claim=77, pieces=[], ring_bytes=0))
        assert client.wait(timeout=30)
        client.capabilities()
        assert [request["claim"] for request in daemon.asked("release")] == [77]


def test_an_error_without_an_id_is_for_the_request_under_way(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["why"] = always(error("EBADMSG", "not a message", id=0))
    with pytest.raises(hwbp.BadMessage, match="not a message"):
        client.why(1)


def test_a_number_beyond_64_bits_is_refused_before_it_is_sent(daemon: FakeDaemon, client: hwbp.Client) -> None:
    with pytest.raises(hwbp.BadClaim, match="64 bits"):
        client.claim(address=2**64, length=8)
    assert daemon.asked("claim") == []


def test_all_pages_of_slots_are_read(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given three resources on two pages,
    row = {"address": 1, "length": 1, "access": "w", "pool": "any", "user": True, "kernel": True} | {
        "delivery": "hits", "tid": 5, "cpus": [0, 2], "claims": [],
    }  # fmt: skip
    cpu = {"cpu": 0, "online": True, "cpu_wide": {"any": 1}, "busiest_task": {"any": 2}}
    pages = {
        0: message("slots", pools={"any": 4}, cpus=[cpu], resources=[row | {"resource": 3}], more=True),
        3: message("slots", pools={}, cpus=[], resources=[row | {"resource": 8}], more=True),
        8: message("slots", pools={}, cpus=[], resources=[row | {"resource": 9}], more=False),
    }
    daemon.answers["slots"] = lambda request: [pages[request.get("after", 0)]]

    # when slots are asked for, then they are one answer.
    slots = client.slots()
    assert [row.resource for row in slots.resources] == [3, 8, 9]
    assert slots.resources[0].cpus == (0, 2)
    assert slots.cpus == (hwbp.CpuRow(0, True, {"any": 1}, {"any": 2}),)
    assert slots.pools == {"any": 4}


def test_an_answer_with_a_field_missing_is_no_message_of_this_protocol(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["why"] = always(message("why", claim=1, lines=[]))
    with pytest.raises(hwbp.BadMessage, match="state"):
        client.why(1)


# --- how a session ends ----------------------------------------------------------------------------------------------


def test_closing_says_goodbye_and_waits_for_the_answer(daemon: FakeDaemon) -> None:
    with hwbp.connect(daemon.path) as client:
        watch = client.claim(EVENT, tid=1)
    assert daemon.requests[-1]["op"] == "goodbye"
    assert watch.ended == client.ended == hwbp.Ended("closed", "this client was closed")
    with pytest.raises(hwbp.Stale, match="closed"):
        client.slots()
    client.close()


def test_a_daemon_that_is_restarted_does_not_know_the_old_session(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a claim with an unread hit,
    watch = client.claim(EVENT, tid=1)
    daemon.push(hits(1, record(0x10)))
    assert client.wait(timeout=30)

    # when the daemon goes and another one listens at the same path,
    daemon.__exit__()
    daemon.epoch += 1
    daemon.__enter__()

    # then hits end with the last one, every request is stale, and nothing was asked of the new daemon.
    assert [hit.ip for hit in watch.hits(timeout=None)] == [0x10]
    assert watch.ended
    assert watch.ended.reason == "connection"
    for request in (client.slots, watch.counts, watch.release, lambda: client.claim(EVENT, tid=1)):
        with pytest.raises(hwbp.Stale, match="lost"):
            request()
    assert daemon.asked("hello")[1:] == []

    # And a new session works.
    with hwbp.connect(daemon.path) as again:
        again.slots()
    assert daemon.requests[-2]["epoch"] == EPOCH + 1


def test_a_request_under_way_when_the_daemon_goes_is_stale(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["why"] = lambda _: [message("closing", sentence="the daemon ends")]
    with pytest.raises(hwbp.Stale, match="the daemon ends"):
        client.why(1)


def test_estale_ends_the_session_and_its_claims(daemon: FakeDaemon, client: hwbp.Client) -> None:
    watch = client.claim(EVENT, tid=1)
    daemon.answers["counts"] = always(error("ESTALE", "meant for another daemon"))
    with pytest.raises(hwbp.Stale):
        watch.counts()
    assert watch.ended == hwbp.Ended("stale", "meant for another daemon")


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xc1"],
        [msgpack.packb([1, 2])],
        [msgpack.packb({"op": "hits"})],
        [msgpack.packb({"op": "hits", "n": 1, "claim": 1})],
        [msgpack.packb({"op": "hits", "n": 2, "claim": 1, "count": 0, "records": b""})],  # the first is missing
        [msgpack.packb({"n": 1}), b"more"],
        [msgpack.packb(1)],
    ],
)
def test_what_is_no_message_ends_the_session(daemon: FakeDaemon, client: hwbp.Client, frames: list[bytes]) -> None:
    # Given a claim, when the daemon sends what cannot be understood, or leaves out a notice,
    watch = client.claim(EVENT, tid=1)
    daemon.push_bytes(*frames)

    # then hits end, as counts would no longer add up, and requests say so.
    assert list(watch.hits()) == []
    assert watch.ended
    assert watch.ended.reason == "protocol"
    with pytest.raises(hwbp.BadMessage):
        client.slots()


def test_an_empty_message_ends_the_session(daemon: FakeDaemon, client: hwbp.Client) -> None:
    watch = client.claim(EVENT, tid=1)
    daemon.push_bytes(b"")

    # On ZeroMQ it is no message; on SEQPACKET nothing can be told from the end of the connection.
    assert list(watch.hits()) == []
    assert watch.ended
    assert watch.ended.reason == ("connection" if daemon.offers_seqpacket else "protocol")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # the fake daemon's thread
def test_a_connection_is_not_for_use_after_fork(client: hwbp.Client) -> None:
    # Given a child that has inherited a connection, when it uses it,
    child = os.fork()
    if child == 0:
        refused = False
        try:
            client.slots()
        except RuntimeError:
            refused = True
        client.close()  # does nothing there
        os._exit(0 if refused else 1)

    # then it is refused, and the parent's session lives on.
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    client.slots()


def test_releasing_twice_gives_the_same_counts(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["release"] = always(final(hits=5, delivered=3, lost=1, dropped=1))
    watch = client.claim(EVENT, tid=1)
    assert watch.release() == watch.release() == watch.counts() == hwbp.Counts(5, 3, 1, 1)
    assert len(daemon.asked("release")) == 1
