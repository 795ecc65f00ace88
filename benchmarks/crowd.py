"""
What a crowd of idle clients costs those who work, and what it costs in memory and in processor time.

Three daemons run beside each other, each on a simulated machine of its own: nobody idle on one, a tenth of the crowd on
another, all of it on the third. Every idle client is a session with claims on the threads of a simulated process of its
own; they are made by a few processes that hold many bare connections each. One client works on each daemon, and is what
is timed: nothing of what it meets may grow with those who only are there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import zmq

from benchmarks.floor import EchoClient
from benchmarks.harness import Row, Sampled, Subject, compare, compare_percentiles, rows_of, table
from benchmarks.placement import CLIENT_CPUS, on
from benchmarks.stand import BareSession, Daemon, daemon, read

CLIENTS = 1_000
CLAIMS = 10
HOLDERS = 4  # processes that hold them
CPUS = 8
SLOTS_PER_THREAD = 4
OPERATIONS_PER_ROUND = 200
IDLE_ROUNDS = 5
IDLE_S = 1.0
LOOK_S = 1.2  # longer than the second after which a daemon looks into every ring
PENDING_MAX = 64  # claims under way, so that no queue fills


class Crowd:
    """
    One daemon with its idle clients and one that works.

    :param clients: how many are idle, with ``claims`` claims each.
    """

    def __init__(self, stack: contextlib.ExitStack, folder: Path, clients: int, claims: int) -> None:
        threads = -(-claims // SLOTS_PER_THREAD)
        self.clients = clients
        self.daemon = stack.enter_context(daemon(folder, settings(clients + 1, threads), ("--machine", "sim")))
        self.bytes_alone = resident_bytes(self.daemon)
        holders = stack.enter_context(hold(self.daemon.socket, clients, claims))
        self.bytes_with_sessions = resident_bytes(self.daemon)
        for holder in holders:
            holder.claim()
        for holder in holders:
            holder.await_claims()
        self.bytes_with_claims = resident_bytes(self.daemon)
        context = stack.enter_context(zmq.Context())
        connection = EchoClient(context, self.daemon.socket)
        stack.callback(connection.close)
        self._session = BareSession(connection)
        self._what = wish(clients + 1, 0)
        self._claim = self._session.ask("claim", **self._what)["claim"]

    def ask(self) -> None:
        """One round trip."""
        self._session.ask("counts", claim=self._claim)

    def claim_and_release(self) -> None:
        """Two."""
        self._session.ask("release", claim=self._session.ask("claim", **self._what)["claim"])

    def __str__(self) -> str:
        return f"{self.clients:,} idle clients".replace(",", " ")


def settings(clients: int, threads: int) -> str:
    """The daemon's: room for so many of one user, and a simulated process for each, that does nothing by itself."""
    of_a_user = ["sessions_per_uid", "claims_per_uid", "legs_per_uid"]
    of_a_user += ["connections_per_uid", "connections_per_uid_per_s"]
    return "\n".join(
        (
            f"[limits]\nsessions = {clients + 100}",
            *(f"{limit} = 100000" for limit in of_a_user),
            f"[sim]\ncpus = {CPUS}\nprocesses = {clients}\nthreads = {threads}\naccesses_per_s = 0\n",
        )
    )


def wish(client: int, claim: int) -> dict[str, object]:
    """What the n-th claim of a client is: on a thread of the simulated process with its number."""
    tid = 1000 * client + claim // SLOTS_PER_THREAD
    return {"address": 0x1000 + 8 * claim, "length": 8, "access": "w", "tid": tid, "kernel": False}


# --- the idle --------------------------------------------------------------------------------------------------------


class Holder:
    """A process that holds many of them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def await_sessions(self) -> None:
        self._await("sessions")

    def claim(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("claim\n")

    def await_claims(self) -> None:
        self._await("claims")

    def _await(self, word: str) -> None:
        assert self._process.stdout is not None
        if (said := self._process.stdout.readline().strip()) != word:
            raise RuntimeError(f"idle clients could not be made: {said!r}")


@contextlib.contextmanager
def hold(socket: Path, clients: int, claims: int) -> Iterator[list[Holder]]:
    """Have so many connected, without claims yet."""
    with contextlib.ExitStack() as stack:
        holders = []
        for number in range(HOLDERS):
            first, last = (clients * step // HOLDERS for step in (number, number + 1))
            command = [sys.executable, "-m", "benchmarks.crowd", "--hold", str(socket), str(first), str(last)]
            process = stack.enter_context(
                subprocess.Popen(
                    [*command, "--claims", str(claims)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                )
            )
            stack.callback(process.kill)
            holders.append(Holder(process))
        for holder in holders:
            holder.await_sessions()
        yield holders


def be_idle(socket: Path, first: int, last: int, claims: int) -> None:
    """Be such a process: hold the clients with these numbers until the end of standard input."""
    with zmq.Context() as context:
        context.max_sockets = last - first + 1
        sessions = []
        for number in range(first, last):
            connection = EchoClient(context, socket)
            sessions.append((number + 1, connection, BareSession(connection)))
        print("sessions", flush=True)
        sys.stdin.readline()
        for number, connection, session in sessions:
            for claim in range(claims):
                connection.socket.send(session.encode("claim", **wish(number, claim)))
                if claim >= PENDING_MAX:
                    read(connection.socket.recv())
            for _ in range(min(claims, PENDING_MAX)):
                read(connection.socket.recv())
        print("claims", flush=True)
        sys.stdin.read()
        for _, connection, _ in sessions:
            connection.close()


# --- what is measured ------------------------------------------------------------------------------------------------


def run(rounds: int, clients: int = CLIENTS, claims: int = CLAIMS) -> list[tuple[str, list[Row]]]:
    """Return titled tables: how long the one who works waits, and what the crowd costs the daemon."""
    with tempfile.TemporaryDirectory(prefix="hwbpd-crowd-") as name, contextlib.ExitStack() as stack:
        stack.enter_context(on(CLIENT_CPUS))
        crowds = []
        for number in (0, clients // 10, clients):
            folder = Path(name) / str(number)
            folder.mkdir()
            crowds.append(Crowd(stack, folder, number, claims))
        of_each = f"{claims} claims each"
        tables = []
        operations: Sequence[tuple[str, Callable[[Crowd], None]]] = (
            ("counts", Crowd.ask),
            ("claim and release", Crowd.claim_and_release),
        )
        for what, operation in operations:
            halves, hundredths = compare_percentiles(
                [sampled(crowd, operation, crowds[0]) for crowd in crowds], rounds, (50, 99)
            )
            tables += [(f"{what}: p50 by idle clients, {of_each}", halves)]
            tables += [(f"{what}: p99 by idle clients, {of_each}", hundredths)]
        longest = compare([longest_of(crowd, crowds[0]) for crowd in crowds], min(rounds, IDLE_ROUNDS))
        return [
            *tables,
            (f"counts: the longest in {LOOK_S:g} s by idle clients, {of_each}", longest),
            ("processor time of a daemon that is asked nothing", idle_rows(crowds)),
            (f"resident memory of the daemon, {of_each}", memory_rows(crowds, claims)),
        ]


def sampled(crowd: Crowd, operation: Callable[[Crowd], None], lowest: Crowd) -> Sampled:
    def sample_ns() -> list[float]:
        clock = time.perf_counter_ns
        samples = []
        for _ in range(OPERATIONS_PER_ROUND):
            start = clock()
            operation(crowd)
            samples.append(float(clock() - start))
        return samples

    return Sampled(str(crowd), sample_ns, "" if crowd is lowest else str(lowest))


def longest_of(crowd: Crowd, lowest: Crowd) -> Subject:
    """What the daemon does for all claims at once, once in a while, shows here and not in a percentile."""

    def measure_ns() -> float:
        clock = time.perf_counter_ns
        until, longest = clock() + int(LOOK_S * 1e9), 0
        while (start := clock()) < until:
            crowd.ask()
            longest = max(longest, clock() - start)
        return longest

    return Subject(str(crowd), measure_ns, "" if crowd is lowest else str(lowest))


def idle_rows(crowds: Sequence[Crowd]) -> list[Row]:
    """All of them sleep at the same time, so they meet the same host."""
    used: list[list[float]] = [[] for _ in crowds]
    for _ in range(IDLE_ROUNDS):
        before = [processor_ns(crowd.daemon) for crowd in crowds]
        start_ns = time.monotonic_ns()
        time.sleep(IDLE_S)
        seconds = (time.monotonic_ns() - start_ns) / 1e9
        for samples, crowd, ns in zip(used, crowds, before, strict=True):
            samples.append((processor_ns(crowd.daemon) - ns) / 1e3 / seconds)
    return rows_of({str(crowd): "" for crowd in crowds}, used, "us_per_s")


def memory_rows(crowds: Sequence[Crowd], claims: int) -> list[Row]:
    rows: dict[str, float] = {str(crowd): crowd.bytes_with_claims for crowd in crowds}
    largest = crowds[-1]
    rows["each session"] = (largest.bytes_with_sessions - largest.bytes_alone) / largest.clients
    held = largest.clients * claims
    rows["each claim"] = (largest.bytes_with_claims - largest.bytes_with_sessions) / held
    return rows_of(dict.fromkeys(rows, ""), [[value, value] for value in rows.values()], "bytes")


def resident_bytes(of: Daemon) -> float:
    pages = int(Path(f"/proc/{of.pid}/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def processor_ns(of: Daemon) -> int:
    """Processor time of all its threads so far, to the nanosecond: the first number of schedstat (proc_schedstat)."""
    tasks = Path(f"/proc/{of.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowd", description="What idle clients cost.")
    parser.add_argument("--clients", type=int, default=CLIENTS, help=f"of the largest crowd (default: {CLIENTS})")
    parser.add_argument("--claims", type=int, default=CLAIMS, help=f"of each of them (default: {CLAIMS})")
    parser.add_argument("--rounds", type=int, default=25, help="interleaved rounds, at least 2 (default: 25)")
    parser.add_argument("--hold", nargs=3, metavar=("SOCKET", "FIRST", "LAST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        socket, first, last = arguments.hold
        be_idle(Path(socket), int(first), int(last), arguments.claims)
        return 0
    for title, rows in run(arguments.rounds, arguments.clients, arguments.claims):
        print(f"\n{table(title, rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
