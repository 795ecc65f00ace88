"""
``python -m tests.worlds --depth 3``: every history of a small world, so many acts deep.

The last line counts the states and the acts between them; the exit status is 0 if the search came to its end and no
promise was broken.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.worlds import small

CHUNK = 50  # histories handed to a process at once


def main() -> int:
    """Run as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.worlds", description="Every history of a small world.")
    parser.add_argument("--depth", type=int, default=3, help="how many acts (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each CPU")
    asked = parser.parse_args()
    with ProcessPoolExecutor(asked.processes) as pool:

        def map_over(work: Callable[[Any], Any], of: list[Any]) -> Iterable[Any]:
            return pool.map(work, of, chunksize=CHUNK)

        found = small.search(asked.depth, asked.depth, map_over)
    if found.broken is not None:
        history, sentence = found.broken
        print(f"broken: {sentence}, after")
        for act in history:
            print(f"    {act}")
    complete = "search broken off" if found.broken else "search complete"
    print(f"depth={asked.depth} states={found.states} edges={found.edges} {complete}")
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
