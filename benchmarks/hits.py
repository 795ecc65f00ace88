"""
How soon a hit is with its client, and how many a second get there.

Soon: the victim notes the time and writes the watched word, a millisecond apart; the client notes the time when it has
the hit in hand. Many: the victim writes in a loop of machine code, without a guard, and each of the clients has a slot
of its own, so that one write is as many hits as there are clients; what was lost or dropped is told, and every hit is
accounted for, or the measurement fails.

The floor has no daemon: readers that have the event and its ring to themselves, in processes of their own as well. One
that wants hits soon sleeps on its ring; one that wants many looks into it every millisecond, as each wake-up takes time
from the victim.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import Row, Sampled, Subject, compare, compare_percentiles
from benchmarks.reader import Reader, Report, reader
from benchmarks.stand import Stand, real_stand
from benchmarks.victim import Victim
from examples.target import Target

RING_BYTES = 256 * 1024  # what a claim gets when it asks for no size
WRITES_PER_ROUND = 200
PAUSE_US = 1_000
FLOOD_WRITES = 20_000
FLOOD_ROUNDS_MAX = 5
CLIENTS = (1, 4)


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """
    Return titled tables: how soon, by half and by hundredth; and how many, for one client and for four.

    :raises Missing: where real breakpoints do not work; ``HostBusy`` while others use them.
    """
    with real_stand(apart=False) as stand, contextlib.ExitStack() as stack:
        tables = list(zip(("hit to client: p50", "hit to client: p99"), how_soon(stand, stack, rounds), strict=True))
        for clients in CLIENTS:
            who = "one client" if clients == 1 else f"{clients} clients"
            tables.append((f"hits a second to {who}", how_many(stand, stack, min(rounds, FLOOD_ROUNDS_MAX), clients)))
        return tables


# --- how soon --------------------------------------------------------------------------------------------------------


def how_soon(stand: Stand, stack: contextlib.ExitStack, rounds: int) -> list[list[Row]]:
    victim = stack.enter_context(Victim(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
    lowest = "bare ring, epoll"
    ways = (("ring", lowest, ""), ("frames", "bare frames", lowest), ("hwbp", "hwbp", lowest))
    subjects = [
        Sampled(name, latencies(victim, stack.enter_context(reader(way, stand.daemon.socket, RING_BYTES))), floor)
        for way, name, floor in ways
    ]
    return compare_percentiles(subjects, rounds, (50, 99))


def latencies(victim: Victim, client: Reader) -> Callable[[], Sequence[float]]:
    """Return the measurement of one round: nanoseconds from just before a write to the hit in hand."""

    def sample_ns() -> Sequence[float]:
        client.begin(victim.tid, victim.address)
        written_ns = victim.write(WRITES_PER_ROUND, PAUSE_US)
        client.finish()
        (report,) = settled([client], WRITES_PER_ROUND)
        return [there - then for then, there in zip(written_ns, report.times_ns, strict=True)]

    return sample_ns


# --- how many --------------------------------------------------------------------------------------------------------


class Account:
    """What became of the hits of all rounds."""

    def __init__(self) -> None:
        self.hits = self.lost = self.dropped = 0

    def add(self, report: Report) -> None:
        self.hits += report.hits
        self.lost += report.lost
        self.dropped += report.dropped

    def __str__(self) -> str:
        return f"of {self.hits} hits {self.lost} lost in the ring, {self.dropped} dropped"


def how_many(stand: Stand, stack: contextlib.ExitStack, rounds: int, clients: int) -> list[Row]:
    target = stack.enter_context(Target())
    lowest = "bare ring, every millisecond" if clients == 1 else f"{clients} bare rings, every millisecond"
    accounts: dict[str, Account] = {}
    subjects = []
    for way, name, floor in (("paced", lowest, ""), ("frames", "bare frames", lowest), ("hwbp", "hwbp", lowest)):
        readers = [stack.enter_context(reader(way, stand.daemon.socket, RING_BYTES)) for _ in range(clients)]
        accounts[name] = Account()
        subjects.append(Subject(name, flood(target, readers, accounts[name]), floor))
    return [row._replace(note=str(accounts[row.name])) for row in compare(subjects, rounds, per_second=True)]


def flood(target: Target, readers: Sequence[Reader], account: Account) -> Callable[[], float]:
    """Return the measurement of one round: nanoseconds per hit that some client got."""

    def measure_ns() -> float:
        for client in readers:
            client.begin(target.tid, target.variable)
        start_ns = time.monotonic_ns()
        did = target.command(f"write {FLOOD_WRITES}")["did"]
        for client in readers:
            client.finish()
        reports = settled(readers, did)
        for report in reports:
            account.add(report)
        last_ns = max(report.last_ns for report in reports)
        return (last_ns - start_ns) / sum(report.received for report in reports)

    return measure_ns


def settled(readers: Sequence[Reader], writes: int) -> list[Report]:
    """Return the reports; raises ``RuntimeError`` unless they account for every hit."""
    reports = [client.report() for client in readers]
    for report in reports:
        whole = (report.hits, report.received) == (writes, report.delivered)
        if not whole or report.hits != report.delivered + report.lost + report.dropped:
            raise RuntimeError(f"hits are missing: {writes} writes, and {report._replace(times_ns=[])}")
    return reports
