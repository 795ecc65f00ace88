"""
Where the daemon's time goes when it is asked one thing again and again: ``python -m benchmarks.profile OP``.

First the whole, of a daemon as users run it: the round trip, and the processor time that one operation takes in each of
the daemon's threads (the first decides; ZeroMQ has others). Then the parts, of a daemon under cProfile: its functions
by their own time per operation. cProfile makes every call dearer, so the shares count there, not the times; and it sees
the first thread only. What it cannot tell, benchmarks/README.md ("Where the time goes") says how to find out.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import pstats
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hwbpd.__main__
from benchmarks.floor import EchoClient
from benchmarks.harness import median_ns
from benchmarks.stand import BareSession, Daemon, Stand, real_stand

ROOT = Path(__file__).resolve().parent.parent
SERVE = "--serve"
FUNCTIONS_SHOWN = 40
WARM_UP = 200
Operation = Callable[[], object]


def operations(frames: BareSession, connection: EchoClient) -> dict[str, Operation]:
    """What can be profiled, as bare frames."""
    watched = ctypes.c_uint64()
    event: dict[str, Any] = {"address": ctypes.addressof(watched), "length": 8, "access": "w", "kernel": False}
    event["tid"] = threading.get_native_id()
    held = frames.ask("claim", **event, delivery="hold")["claim"]

    def claim(delivery: str) -> Operation:
        def claim_and_release() -> None:
            assert ctypes.addressof(watched) == event["address"]
            frames.ask("release", claim=frames.ask("claim", **event, delivery=delivery)["claim"])

        return claim_and_release

    return {
        "slots": lambda: frames.ask("slots"),
        "counts": lambda: frames.ask("counts", claim=held),
        "fit": lambda: frames.ask("fit", **event),
        "enabled": lambda: frames.ask("enabled", cpu=0, tid=event["tid"]),
        "claim": claim("hits"),
        "claim-count": claim("count"),
        "claim-hold": claim("hold"),
        "stream": lambda: connection.stream(frames.encode("counts", claim=held), 64, 64),
    }


NAMES = ("slots", "counts", "fit", "enabled", "claim", "claim-count", "claim-hold", "stream")


def main() -> int:
    if sys.argv[1:2] == [SERVE]:
        return serve(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description="Where the daemon's time goes.")
    parser.add_argument(
        "operation",
        choices=NAMES,
        help="claim: with its release, hits delivered; claim-count, claim-hold: counted, held; stream: 64 of counts",
    )
    parser.add_argument("--times", type=int, default=3000, help="how often (default: 3000)")
    arguments = parser.parse_args()
    with real_stand() as stand:
        tell_whole(stand.daemon, operation_on(stand, arguments.operation), arguments.times)
    with tempfile.TemporaryDirectory(prefix="hwbpd-profile-") as folder:
        dump = Path(folder) / "profile"
        with real_stand(("benchmarks.profile", SERVE, str(dump))) as stand:
            operation = operation_on(stand, arguments.operation)
            for _ in range(arguments.times):
                operation()
        tell_parts(dump, arguments.times)
    return 0


def operation_on(stand: Stand, name: str) -> Operation:
    connection = stand.frames()
    return operations(BareSession(connection), connection)[name]


def serve(dump: str, options: list[str]) -> int:
    """Be the daemon, under the profiler."""
    sys.argv[1:] = options
    profiler = cProfile.Profile()
    try:
        return profiler.runcall(hwbpd.__main__.main)
    finally:
        profiler.dump_stats(dump)


def tell_whole(of: Daemon, operation: Operation, times: int) -> None:
    median_ns(operation, WARM_UP)
    before, start_ns = processor_ns(of), time.perf_counter_ns()
    half_ns = median_ns(operation, times)
    elapsed_ns = time.perf_counter_ns() - start_ns
    print(f"{times} times: median {half_ns / 1e3:.1f} us, mean {elapsed_ns / times / 1e3:.1f} us")
    for thread, after_ns in processor_ns(of).items():
        name = Path(f"/proc/{of.pid}/task/{thread}/comm").read_text().strip()
        used_us = (after_ns - before.get(thread, 0)) / times / 1e3
        print(f"{used_us:9.1f} us of processor time each in thread {name}{' (decides)' if thread == of.pid else ''}")


def processor_ns(of: Daemon) -> dict[int, int]:
    """Thread -> processor time so far: the first number of its schedstat."""
    tasks = Path(f"/proc/{of.pid}/task").iterdir()
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) for task in tasks}


def tell_parts(dump: Path, times: int) -> None:
    stats = pstats.Stats(str(dump)).stats  # type: ignore[attr-defined]
    rows = [
        (own_s / times * 1e6, total_s / times * 1e6, calls / times, place(function))
        for function, (_, calls, own_s, total_s, _) in stats.items()
        if calls >= times // 2  # what is done now and then, or at the start, is not of the operation
    ]
    print(f"\n{'own us':>9} {'with callees':>13} {'calls':>7}   function, under cProfile")
    for own_us, total_us, calls, where in sorted(rows, reverse=True)[:FUNCTIONS_SHOWN]:
        print(f"{own_us:9.2f} {total_us:13.2f} {calls:7.2f}   {where}")


def place(function: tuple[str, int, str]) -> str:
    file, line, name = function
    if file == "~":
        return name
    path = Path(file)
    is_ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
    shown = path.relative_to(ROOT) if is_ours else Path(*path.parts[-2:])
    return f"{shown}:{line} {name}"


if __name__ == "__main__":
    sys.exit(main())
