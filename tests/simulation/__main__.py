"""
``python -m tests.simulation --events 1000000 --seed 7``: histories of arbitration, with everything going wrong.

Worlds of up to 4 CPUs, 6 tasks and 32 claims; the core with a simulated kernel and clients, by event and without a
socket. After every event the cheap promises are checked, and after one act in eight, and all along the end of each
history, the expensive ones (``promises.py``). The last line counts; the exit status is 0 if no promise was broken.
Otherwise the seed is shown, the shortest history that breaks the same promise, and the stories of the claims in it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count

from tests.simulation import history
from tests.simulation.history import Result

BATCH = 20  # histories that a process plays before it is asked how it went


def main() -> int:
    """Run as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Histories of arbitration.")
    parser.add_argument("--events", type=int, default=1_000_000, help="how many at least (default: %(default)s)")
    parser.add_argument("--seed", default=None, help="of everything that is random (default: a new one)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each CPU")
    parser.add_argument("--history", default=None, help="only this one, named by its seed as a failure prints it")
    asked = parser.parse_args()
    if asked.history is not None:
        return tell([history.play(asked.history)])
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    print(f"seed {seed}: {asked.events} events in {asked.processes} processes", flush=True)
    return tell(_results(str(seed), asked.events, asked.processes))


def _results(seed: str, events: int, processes: int) -> Iterator[Result]:
    """Play one history after the other until there were so many events; which ones follows from the seed alone."""
    played = 0
    with ProcessPoolExecutor(processes) as pool:
        waiting: list[Future[list[Result]]] = []
        for batch in count():
            while len(waiting) < 2 * processes:
                first = BATCH * (batch + len(waiting))
                waiting.append(pool.submit(_play, [f"{seed}.{nth}" for nth in range(first, first + BATCH)]))
            for result in waiting.pop(0).result():
                yield result
                played += result.events
                if played >= events or result.broken is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return


def _play(seeds: list[str]) -> list[Result]:
    return [history.play(seed) for seed in seeds]


def tell(results: Iterable[Result]) -> int:
    """Say how they went, failures in full; return the exit status."""
    events = violations = 0
    begun = time.monotonic()
    for result in results:
        events += result.events
        if result.broken is not None:
            violations += 1
            for line in history.report(history.shrink(result.broken)):
                print(line)
            print(f"again: python -m tests.simulation --history {result.broken.seed}")
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    print(f"events={events} violations={violations}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
