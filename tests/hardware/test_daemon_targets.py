"""
Whole processes, floods, exec and exit, through the daemon on real registers: counted once each, and nothing left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

import hwbp
from examples.target import Target
from tests.hardware.common import EXECUTE_BYTES
from tests.hardware.daemon import MARKS, Daemon, all_free, books_free, kernel_free

pytestmark = MARKS

WAIT_S = 30.0
BORN = 10_000


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect() as client:
        yield client
        assert books_free(client) == kernel_free() == all_free()


def event(target: Target) -> str:
    return f"mem:{target.variable:#x}/8:w"


def taken(watch: hwbp.Watch, client: hwbp.Client, until: Callable[[], bool]) -> int:
    """Read hits until something is true; return how many there were."""
    hits = 0
    give_up = time.monotonic() + WAIT_S
    while not until():
        assert time.monotonic() < give_up, watch
        hits += sum(1 for _ in watch.hits(timeout=0.05))
        if watch.ended is None:
            watch.counts()  # a round trip: what was told before it has come
    return hits + sum(1 for _ in watch.hits(timeout=0.05))


def test_every_thread_of_a_process_is_counted_once(client: hwbp.Client) -> None:
    # given a process with threads, watched as a whole
    with Target("--threads", "4") as target, client.claim(event(target), pid=target.pid, guard=0) as watch:
        # when the old threads and a thousand that are born and end meanwhile write
        wrote = target.command("write 100")["did"] + target.command("spawn 1000")["did"]
        # and a child process does, which is somebody else
        target.command("fork 50")

        # then each write of the process is one hit
        assert taken(watch, client, lambda: watch.counts().delivered >= wrote) <= wrote
        counts = watch.release()
        assert (counts.hits, counts.delivered, counts.lost, counts.dropped) == (wrote, wrote, 0, 0)


def test_ten_thousand_threads_that_come_and_go_are_counted_once_each(client: hwbp.Client) -> None:
    with Target() as target, client.claim(event(target), pid=target.pid, guard=0, delivery="count") as watch:
        assert target.command(f"spawn {BORN}")["did"] == BORN

        assert watch.release().hits == BORN


def test_a_process_takes_one_slot_of_each_of_its_threads(client: hwbp.Client) -> None:
    with Target("--threads", "2") as target, client.claim(event(target), pid=target.pid, delivery="hold"):
        first, second = target.tids[:2]
        held = [client.claim(event(target), tid=first, delivery="hold") for _ in range(3)]

        with pytest.raises(hwbp.NoFreeSlot, match=f"1 on pid {target.pid}"):
            client.claim(event(target), tid=first, delivery="hold")
        held.append(client.claim(event(target), tid=second, delivery="hold"))

        for watch in held:
            watch.release()


@pytest.mark.parametrize("whose", ["tid", "pid"])
@pytest.mark.parametrize(("order", "reason"), [("exec", "exec"), ("quit", "exit")])
def test_the_owner_is_told_when_the_target_execs_or_exits(
    client: hwbp.Client, whose: str, order: str, reason: str
) -> None:
    with Target() as target, client.claim(event(target), **{whose: target.pid}) as watch:  # type: ignore[arg-type]
        target.command("write 3")
        target.send(order)

        assert taken(watch, client, lambda: watch.ended is not None) == 3
        assert watch.ended is not None
        assert watch.ended.reason == reason


def test_a_claim_across_exec_goes_on(client: hwbp.Client) -> None:
    with Target() as target, client.claim(event(target), tid=target.tid, across_exec=True) as watch:
        target.command("exec")

        client.slots()
        assert watch.ended is None


def test_a_flood_is_silenced_and_goes_on_when_asked(client: hwbp.Client) -> None:
    # given a claim that may bring a thousand hits a second
    with Target() as target, client.claim(event(target), tid=target.tid, guard=1000) as watch:
        began = time.monotonic()

        # when the target writes a hundred thousand times as fast as it goes
        target.send("write 100000")
        hits = taken(watch, client, lambda: watch.state == "guarded")
        lasted_s = time.monotonic() - began
        target.answer()

        # then no more than a thousand and what the time allowed came through, and after rearm it reports again
        assert 1000 <= hits <= 1000 * (1 + lasted_s)
        watch.rearm()
        target.command("write 5")
        assert taken(watch, client, lambda: watch.counts().delivered == hits + 5) == 5


def test_the_fuse_works_while_the_daemon_does_not_get_to_run(daemon: Daemon, client: hwbp.Client) -> None:
    with Target() as target, client.claim(event(target), tid=target.tid, guard=500, delivery="count") as watch:
        with daemon.paused():
            target.command("write 100000")

        taken(watch, client, lambda: watch.state == "guarded")
        assert watch.counts().hits == 500


def test_a_cpu_wide_claim_can_be_filtered_by_process(client: hwbp.Client) -> None:
    with (
        Target() as target,
        Target() as other,
        client.claim(f"mem:{target.function:#x}/{EXECUTE_BYTES}:x", cpus=None, only_pid=target.pid) as watch,
    ):
        target.command("call 20")
        other.command("call 30")

        taken(watch, client, lambda: watch.counts().delivered == 20)
        counts = watch.release()
        assert counts.hits == counts.delivered + counts.filtered
