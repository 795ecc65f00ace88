"""A client sees through the daemon what the target did: all of it, nothing else, and the end of it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import pytest

import hwbp
from examples.target import Target
from hwbpd_linux.cpus import online_cpus
from tests.hardware.common import EXECUTE_BYTES, X86
from tests.hardware.daemon import (
    MARKS,
    TRANSPORTS,
    WAIT_S,
    Daemon,
    all_free,
    books_free,
    kernel_free,
    kernel_room,
    own_name,
)

pytestmark = MARKS

EVERY_DELIVERY = pytest.mark.parametrize("delivery", ["hits", "count", "hold"])


@pytest.fixture(scope="module", params=TRANSPORTS)
def daemon(host: None, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with Daemon(TRANSPORTS[request.param]) as daemon:
        yield daemon


@pytest.fixture
def client(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect() as client:
        yield client


def take(watch: hwbp.Watch, count: int) -> list[hwbp.Hit]:
    """Return that many hits, or fewer when no more come."""
    return list(itertools.islice(watch.hits(timeout=WAIT_S), count))


def until_over(watch: hwbp.Watch) -> list[hwbp.Hit]:
    """Return the hits that come until the claim is over, or nothing more does."""
    return list(watch.hits(timeout=WAIT_S))


# --- what is seen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_thread", [False, True])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_each_kind_of_target_brings_its_hits_and_no_other(
    client: hwbp.Client, target: Target, of_thread: bool, on_cpu: bool
) -> None:
    here = online_cpus()[-1]
    watch = client.claim(
        f"mem:{target.variable:#x}/8:w",
        tid=target.tid if of_thread else 0,
        cpus=[here] if on_cpu else None,
    )
    taken = {cpu: int(cpu == here or not on_cpu) for cpu in online_cpus()}
    assert kernel_free() == books_free(client) == {cpu: 4 - taken[cpu] for cpu in online_cpus()}

    for cpu in online_cpus():
        os.sched_setaffinity(target.tid, {cpu})
        target.command("write 20")

    hits = take(watch, 20 * sum(taken.values()))
    assert {cpu: sum(hit.cpu == cpu for hit in hits) for cpu in online_cpus()} == {
        cpu: 20 * taken[cpu] for cpu in online_cpus()
    }
    assert {(hit.pid, hit.tid, hit.address) for hit in hits} == {(target.pid, target.tid, target.variable)}
    counts = watch.release()
    assert counts == hwbp.Counts(hits=len(hits), delivered=len(hits), lost=0, dropped=0)
    assert kernel_free() == books_free(client) == all_free()


def test_one_hit_arrives_without_being_asked_for(client: hwbp.Client, target: Target) -> None:
    watch = client.claim(address=target.function, length=EXECUTE_BYTES, access="x", tid=target.tid)
    before_ns = time.monotonic_ns()

    target.command("call 1")

    (hit,) = take(watch, 1)
    assert (hit.ip, hit.address, hit.in_kernel) == (target.function, target.function, False)
    assert before_ns <= hit.time_ns <= time.monotonic_ns()


@pytest.mark.parametrize(("access", "hits"), [("w", 30), ("rw", 100), ("x", 7)])
def test_every_access_of_the_kind_is_seen_and_no_other(
    client: hwbp.Client, target: Target, access: str, hits: int
) -> None:
    address, length = (target.function, EXECUTE_BYTES) if access == "x" else (target.variable, 8)
    watch = client.claim(address=address, length=length, access=access, tid=target.tid)

    for order in ("write 30", "read 70", "call 7"):
        target.command(order)

    assert watch.release().hits == hits
    assert len(list(watch.hits(timeout=0))) == hits


def test_user_and_kernel_call_chains_come_with_the_hits(client: hwbp.Client, target: Target) -> None:
    watch = client.claim(
        address=target.variable, length=8, access="w", tid=target.tid, user_chain=True, kernel_chain=True
    )

    target.command("write 5")
    target.command("copy 5")

    watch.release()
    hits = list(watch.hits(timeout=0))
    in_user = [hit for hit in hits if not hit.in_kernel]
    in_kernel = [hit for hit in hits if hit.in_kernel]
    assert len(in_user) == 5
    assert all(hit.user_chain[0] == hit.ip and hit.ip in target.code and not hit.kernel_chain for hit in in_user)
    # How many stores the kernel needs is its own affair; on Arm it keeps them to itself.
    assert len(in_kernel) >= 5 if X86 else not in_kernel
    assert all(len(hit.kernel_chain) > 2 and hit.user_chain for hit in in_kernel)
    assert all(min(hit.kernel_chain) >= 2**63 > max(hit.user_chain) for hit in in_kernel)


def test_a_claim_that_counts_counts_while_the_target_runs_on(client: hwbp.Client, target: Target) -> None:
    watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid, delivery="count")

    target.command("write 400")
    assert watch.counts().hits == 400
    target.command("write 56")

    assert watch.release() == hwbp.Counts(hits=456, delivered=0, lost=0, dropped=0)
    assert list(watch.hits(timeout=0)) == []


def test_a_held_slot_is_taken_and_sees_nothing(client: hwbp.Client, target: Target) -> None:
    watch = client.claim(address=target.variable, length=8, access="w", delivery="hold")

    target.command("write 400")

    assert kernel_free() == books_free(client) == dict.fromkeys(online_cpus(), 3)
    assert watch.counts().hits == 0
    assert watch.release() == hwbp.Counts(hits=0, delivered=0, lost=0, dropped=0)
    assert kernel_free() == all_free()


def test_two_clients_on_one_variable_both_see_every_hit(daemon: Daemon, client: hwbp.Client, target: Target) -> None:
    event = f"mem:{target.variable:#x}/8:w"
    with daemon.connect() as other:
        watches = [client.claim(event, tid=target.tid), other.claim(event, tid=target.tid)]

        target.command("write 25")

        assert [len(take(watch, 25)) for watch in watches] == [25, 25]
        assert [watch.release().hits for watch in watches] == [25, 25]


# --- how it ends -----------------------------------------------------------------------------------------------------


@EVERY_DELIVERY
def test_when_a_thread_exits_its_watcher_is_told_and_the_slot_is_free(client: hwbp.Client, delivery: str) -> None:
    with Target("--threads", "2") as target:
        watch = client.claim(address=target.variable, length=8, access="w", tid=target.tids[0], delivery=delivery)
        stays = client.claim(address=target.variable, length=8, access="w", tid=target.pid, delivery=delivery)
        target.command("write 50")

        target.command("leave")  # the threads end, their process does not

        hits = until_over(watch)
        assert watch.ended
        assert (watch.ended.reason, stays.ended) == ("exit", None)
        assert f"tid {target.tids[0]}" in watch.ended.sentence
        assert len(hits) == (50 if delivery == "hits" else 0)
        assert watch.counts().hits == (0 if delivery == "hold" else 50)
        assert watch.counts().delivered == len(hits)
        assert [row.tid for row in client.slots().resources] == [target.pid]
        assert kernel_room(tid=target.pid) == 3
        assert client.why(watch.claim_id).state == "released"


@EVERY_DELIVERY
def test_when_a_process_is_killed_its_watcher_is_told(client: hwbp.Client, target: Target, delivery: str) -> None:
    watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid, delivery=delivery)
    target.command("write 10")

    target.kill()

    hits = until_over(watch)
    assert watch.ended
    assert watch.ended.reason == "exit"
    assert kernel_free() == books_free(client) == all_free()
    assert len(hits) == (10 if delivery == "hits" else 0)
    assert watch.release().hits == (0 if delivery == "hold" else 10)


@EVERY_DELIVERY
def test_an_operator_takes_a_slot_away_and_its_owner_is_told(
    daemon: Daemon, client: hwbp.Client, target: Target, delivery: str
) -> None:
    watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid, delivery=delivery)
    target.command("write 60")
    with daemon.connect("an operator") as operator:
        counts = operator.release(watch.claim_id)

        assert kernel_free() == books_free(operator) == all_free()
        with pytest.raises(hwbp.NoSuchClaim, match="is over"):
            operator.release(watch.claim_id)

    hits = until_over(watch)
    assert watch.ended
    assert watch.ended.reason == "forced"
    assert own_name() in watch.ended.sentence
    assert watch.release() == watch.counts() == counts
    assert len(hits) == counts.delivered == (60 if delivery == "hits" else 0)
    assert any("released by" in line for line in client.why(watch.claim_id).lines)
