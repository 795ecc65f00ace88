"""
Under any flood every hit is accounted for: delivered + lost + dropped = what the target did = what the kernel counted.

The sum must hold always. How much of a flood arrives depends on who else wants the CPUs, so that is judged only when
nobody else did, which the kernel's own accounting of CPU time tells afterwards.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import hwbp
from examples.target import Target
from hwbp.records import RECORD_BYTES
from tests.hardware.daemon import MARKS, WAIT_S, Daemon, all_free, books_free, kernel_free

pytestmark = MARKS

FLOOD, SHORT_FLOOD = 1_000_000, 200_000
FLOOD_MOST_S = 20  # a host on which a million hits take longer gets the short one
DELIVERED_LEAST = 0.90
OTHERS_CPUS_MOST = 0.10  # CPUs kept busy by others, on average, while a host still counts as idle

# Little room on the way to a session: a message of hits is one page, few of them are in the transport, one waits.
UNGUARDED = """
[guard]
hits_per_s = 0
"""
NARROW = f"""{UNGUARDED}
[limits]
messages_queued_per_session = 4
hits_bytes_queued_per_session = 4096
[rings]
bytes_per_message = 4096
"""


class Flood(NamedTuple):
    """What became of one flood."""

    did: int  # by the target's own count
    read: int  # hits that the client got to see
    counts: hwbp.Counts
    others_cpus: float  # busy with neither the target, the daemon nor us


class CpuTime:
    """How busy the CPUs were with others than the given processes and this one, since it was made."""

    def __init__(self, *pids: int) -> None:
        self._pids = (*pids, os.getpid())
        self._began = self._ticks()

    def others_cpus(self) -> float:
        """The CPUs that others kept busy, on average. Time that a hypervisor took away is others', too."""
        busy, ours, whole = (now - before for now, before in zip(self._ticks(), self._began, strict=True))
        return max(0, busy - ours) / max(1, whole) * (os.cpu_count() or 1)

    def _ticks(self) -> tuple[int, int, int]:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        busy = user + nice + system + irq + softirq + steal
        return busy, sum(map(self._of, self._pids)), busy + idle + iowait

    def _of(self, pid: int) -> int:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            utime, stime = stat.read().rpartition(")")[2].split()[11:13]
        return int(utime) + int(stime)


def read_flood(daemon: Daemon, client: hwbp.Client, target: Target, times: int) -> Flood:
    """Have the target write as fast as it goes, while the client reads."""
    watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid)
    cpu_time = CpuTime(target.pid, daemon.pid)
    target.send(f"write {times}")
    read = 0
    while not target.has_answered():
        read += sum(1 for _ in watch.hits(timeout=0.1))
    did = target.answer()["did"]
    others_cpus = cpu_time.others_cpus()
    counts = watch.release()
    read += sum(1 for _ in watch.hits(timeout=0))
    assert watch.discarded == 0
    return Flood(did, read, counts, others_cpus)


def assert_nothing_is_unaccounted_for(flood: Flood) -> None:
    did, read, counts, _ = flood
    assert counts.hits == did
    assert counts.delivered + counts.lost + counts.dropped == counts.hits
    assert read == counts.delivered


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon(UNGUARDED) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def fast_flood(daemon: Daemon) -> Flood:
    """A flood through a daemon as it comes, once for all tests that look at it."""
    with Target() as target, daemon.connect() as client:
        with client.claim(address=target.variable, length=8, access="w", tid=target.tid):
            hit_s = target.command("write 5000")["ns"] / 5000 / 1e9
        return read_flood(daemon, client, target, FLOOD if FLOOD * hit_s < FLOOD_MOST_S else SHORT_FLOOD)


def test_at_full_speed_no_hit_is_unaccounted_for(fast_flood: Flood) -> None:
    assert fast_flood.did in (FLOOD, SHORT_FLOOD)
    assert_nothing_is_unaccounted_for(fast_flood)


def test_on_an_idle_host_nearly_all_of_a_flood_arrives(fast_flood: Flood) -> None:
    share = fast_flood.counts.delivered / fast_flood.counts.hits
    if share < DELIVERED_LEAST and fast_flood.others_cpus > OTHERS_CPUS_MOST:
        pytest.skip(f"others kept {fast_flood.others_cpus:.2f} CPUs busy, and only {share:.1%} of the hits arrived")
    assert share >= DELIVERED_LEAST, fast_flood


def test_a_ring_of_one_page_loses_hits_and_counts_them(alone: None, daemon: Daemon, target: Target) -> None:
    room = mmap.PAGESIZE // RECORD_BYTES
    with daemon.connect() as client:
        watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid, ring_bytes=mmap.PAGESIZE)
        with daemon.paused():
            did = target.command("write 5000")["did"]
        target.send("write 50000")  # while it is read, now with room and now without
        read = 0
        while not target.has_answered():
            read += sum(1 for _ in watch.hits(timeout=0.1))
        did += target.answer()["did"]
        counts = watch.release()
        read += sum(1 for _ in watch.hits(timeout=0))

    assert_nothing_is_unaccounted_for(Flood(did, read, counts, 0))
    assert counts.lost >= 5000 - room
    assert watch.lost == counts.lost
    assert counts.delivered > 0


def test_two_floods_at_once_are_kept_apart(alone: None, daemon: Daemon, target: Target) -> None:
    with Target() as other, daemon.connect() as client:
        targets = (target, other)
        watches = [client.claim(address=each.variable, length=8, access="w", tid=each.tid) for each in targets]
        read = {watch.claim_id: 0 for watch in watches}
        target.send("write 40000")
        other.send("write 30000")
        while not (target.has_answered() and other.has_answered()):
            for watch, hit in client.hits(timeout=0.1):
                assert hit.tid == targets[watches.index(watch)].tid
                read[watch.claim_id] += 1
        done = [each.answer()["did"] for each in targets]
        counts = [watch.release() for watch in watches]
        for watch in watches:
            read[watch.claim_id] += sum(1 for _ in watch.hits(timeout=0))

    assert done == [40_000, 30_000]
    for did, watch, count in zip(done, watches, counts, strict=True):
        assert_nothing_is_unaccounted_for(Flood(did, read[watch.claim_id], count, 0))


def test_a_client_that_does_not_read_drops_its_own_hits_and_nobody_elses(alone: None, target: Target) -> None:
    with Daemon(NARROW) as daemon, Target() as other, daemon.connect() as stalled, daemon.connect() as reader:
        watch = stalled.claim(address=target.variable, length=8, access="w", tid=target.tid)
        target.send("write 80000")

        served = 0
        while not target.has_answered():
            with reader.claim(address=other.variable, length=8, access="w", tid=other.tid) as mine:
                assert len(reader.slots().resources) == 2
                assert other.command("write 20")["did"] == 20
                assert next(mine.hits(timeout=WAIT_S)).tid == other.tid
                assert mine.release().delivered == 20
            served += 1
        did = target.answer()["did"]
        dropped = reader.slots().resources[0].claims[0].dropped
        assert served > 0
        assert dropped > 0

        counts = watch.release()  # the stalled one comes back
        read = sum(1 for _ in watch.hits(timeout=0))
        assert_nothing_is_unaccounted_for(Flood(did, read, counts, 0))
        assert counts.dropped >= dropped
        assert watch.dropped == counts.dropped
        assert books_free(reader) == kernel_free() == all_free()


def test_a_client_whose_session_is_ended_for_not_reading_is_told_when_it_reads_again(
    alone: None, target: Target
) -> None:
    with Daemon(NARROW) as daemon, Target("--threads", "10") as threads, daemon.connect() as stalled:
        for tid in threads.tids:
            stalled.claim(address=threads.variable, length=8, access="w", tid=tid, delivery="hold")
        watch = stalled.claim(address=target.variable, length=8, access="w", tid=target.tid)
        target.command("write 80000")  # there is no room any more on the way to this client

        threads.command("leave")  # and here are more notices than may wait

        daemon.logged("session over",
            reason="4 replies and notices were left unread (limits.messages_queued_per_session)",
        )
        assert kernel_free() == all_free()
        for _ in watch.hits(timeout=2):
            pass
        assert watch.ended is not None
        assert watch.ended.reason in ("closing", "connection")
