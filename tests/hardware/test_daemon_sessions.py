"""Whoever goes, client or daemon, gently or not: its slots are free, and whoever stays is told."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
import zmq

import hwbp
from examples.target import Target
from tests.hardware.daemon import MARKS, TRANSPORTS, WAIT_S, Daemon, all_free, books_free, kernel_free, lines_until

pytestmark = MARKS

# A client that claims what it is told to, says so, and then neither reads nor leaves.
CLIENT = """
import json, sys, hwbp
client = hwbp.connect(sys.argv[1], "a client")
for claim in json.loads(sys.argv[2]):
    print(client.claim(**claim).claim_id)
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=TRANSPORTS)
def daemon(alone: None, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with Daemon(TRANSPORTS[request.param]) as daemon:
        yield daemon


@contextmanager
def client_process(daemon: Daemon, *claims: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Give another process with these claims, and their ids."""
    command = [sys.executable, "-c", CLIENT, str(daemon.socket), json.dumps(claims)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            *claim_ids, _ = lines_until(process, "done")
            yield process, [int(claim_id) for claim_id in claim_ids]
        finally:
            process.kill()


def wide(address: int, cpus: tuple[int, ...] | None = None, **more: Any) -> dict[str, Any]:
    return {"address": address, "length": 8, "access": "w", "cpus": cpus, **more}


def minus(free: dict[int, int], slots: int) -> dict[int, int]:
    return {cpu: count - slots for cpu, count in free.items()}


def take(watch: hwbp.Watch, count: int) -> list[hwbp.Hit]:
    """Return that many hits, or fewer when no more come."""
    return list(itertools.islice(watch.hits(timeout=WAIT_S), count))


def test_when_close_returns_the_slots_are_free(daemon: Daemon) -> None:
    with Target("--threads", "100") as threads:
        with daemon.connect() as client:
            for tid in threads.tids:  # they are given back first, and take their time
                client.claim(address=0x1000, length=8, access="w", tid=tid, delivery="hold")
            client.claim(**wide(0x1000, delivery="hold"))

        assert kernel_free() == all_free()


def test_a_killed_client_leaves_free_slots_and_the_others_untouched(daemon: Daemon, target: Target) -> None:
    with daemon.connect() as client:
        watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid)
        held = [wide(0x1000, delivery="hold"), wide(target.variable), wide(target.function, delivery="count")]
        with client_process(daemon, *held) as (other, claim_ids):
            assert len(client.slots().resources) == 4
            assert kernel_free() == books_free(client) == minus(all_free(), 4)

            other.send_signal(signal.SIGKILL)

            for claim_id in claim_ids:
                daemon.logged("ended", claim_id=claim_id, how="session")
            assert kernel_free() == books_free(client) == minus(all_free(), 1)
        assert [row.claims[0].claim for row in client.slots().resources] == [watch.claim_id]
        target.command("write 30")
        assert len(take(watch, 30)) == 30
        assert watch.ended is None
        story = client.why(claim_ids[0])
        assert story.state == "released"
        assert any("its process ended" in line or "its connection was lost" in line for line in story.lines)


def test_a_client_that_dies_in_the_middle_of_a_flood_leaves_free_slots(daemon: Daemon, target: Target) -> None:
    claim = {"address": target.variable, "length": 8, "access": "w", "tid": target.tid}
    with client_process(daemon, claim) as (other, [claim_id]), daemon.connect() as client:
        target.send("write 50000")
        while client.slots().resources[0].claims[0].hits < 10_000:
            assert not target.has_answered()

        other.send_signal(signal.SIGKILL)

        ended = daemon.logged("ended", claim_id=claim_id, how="session")
        assert kernel_free() == books_free(client) == all_free()
        assert 10_000 <= ended["hits"] == ended["delivered"] + ended["lost"] + ended["dropped"]
        assert target.answer()["did"] == 50_000


def test_a_stopping_daemon_hands_over_the_last_hits_tells_everybody_and_leaves_nothing(
    daemon: Daemon, target: Target
) -> None:
    with daemon.connect() as reader, daemon.connect() as holder:
        watch = reader.claim(address=target.variable, length=8, access="w", tid=target.tid)
        held = holder.claim(**wide(0x1000, delivery="hold"))
        target.command("write 100")

        assert daemon.stop() == 0

        assert kernel_free() == all_free()
        assert not daemon.socket.exists()
        assert len(list(watch.hits(timeout=WAIT_S))) == 100
        assert watch.ended is not None
        assert watch.ended.reason == "closing"
        assert "the daemon is stopping" in watch.ended.sentence
        assert holder.wait(timeout=WAIT_S)
        assert held.ended is not None
        assert held.ended.reason == "closing"
        with pytest.raises(hwbp.Stale, match="the daemon is stopping"):
            holder.claim(**wide(0x1000, delivery="hold"))
        with pytest.raises(hwbp.NotReachable, match="there is no such socket"):
            daemon.connect()
        assert [line["event"] for line in daemon.log][-1] == "stopped"


def test_what_a_client_has_stopped_waiting_for_is_not_granted_later(daemon: Daemon) -> None:
    with hwbp.connect(daemon.socket, timeout=0.2) as impatient, daemon.connect() as patient:
        with daemon.paused(), pytest.raises(hwbp.RequestTimedOut):
            impatient.claim(**wide(0x1000, delivery="hold"))

        assert patient.slots().resources == ()  # asked after the claim, and so answered after it
        assert kernel_free() == all_free()
        assert daemon.log[-1]["event"] != "granted"


def test_a_second_daemon_on_the_socket_is_refused_and_disturbs_nobody(daemon: Daemon, target: Target) -> None:
    with daemon.connect() as client:
        watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid)

        second = subprocess.run(daemon.command, capture_output=True, text=True, timeout=WAIT_S, check=False)

        assert second.returncode == 1
        assert f"pid {daemon.pid} serves {daemon.socket} already" in second.stderr
        assert "Traceback" not in second.stderr
        target.command("write 20")
        assert len(take(watch, 20)) == 20
        daemon.connect().close()


def test_a_killed_daemon_leaves_free_slots_and_its_clients_hear_of_it(daemon: Daemon, target: Target) -> None:
    with daemon.connect() as client:
        watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid)
        client.claim(**wide(0x1000, delivery="hold"))

        daemon.kill()

        assert kernel_free() == all_free()
        assert list(watch.hits(timeout=None)) == []  # which would wait for ever, were the end not noticed
        assert watch.ended is not None
        assert watch.ended.reason == "connection"
        with pytest.raises(hwbp.Stale, match="was lost"):
            client.slots()
        with pytest.raises(hwbp.NotReachable, match="nobody listens"):
            daemon.connect()


def test_a_daemon_starts_on_the_socket_that_a_killed_one_left(daemon: Daemon, target: Target) -> None:
    with daemon.connect() as of_the_first:
        of_the_first.claim(**wide(target.variable))
        daemon.kill()

        daemon.start()

        with pytest.raises(hwbp.Stale):
            of_the_first.claim(**wide(target.variable))
        with daemon.connect() as client:
            assert client.slots().resources == ()
            watch = client.claim(**wide(target.variable))
            target.command("write 10")
            assert len(take(watch, 10)) == 10


def test_a_request_meant_for_the_daemon_before_is_refused_by_the_next(daemon: Daemon) -> None:
    """Told to a client that reconnects by itself, as ZeroMQ does unless it is told not to."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = int(WAIT_S * 1000)
        dealer.connect(f"ipc://{daemon.socket}")
        dealer.send(msgpack.packb({"op": "hello", "id": 1, "version": 1}))
        epoch = msgpack.unpackb(dealer.recv())["epoch"]
        daemon.kill()
        daemon.start()

        dealer.send(msgpack.packb({"op": "claim", "id": 2, "epoch": epoch, "address": 0, "length": 8, "access": "w"}))

        reply = msgpack.unpackb(dealer.recv())
    assert (reply["op"], reply["id"], reply["errno"]) == ("error", 2, "ESTALE")
    with daemon.connect() as client:
        assert client.slots().resources == ()
