"""
Runs the benchmarks and prints one table, or one JSON value: ``python -m benchmarks --help``.

What this host cannot do is said on standard error, and the rest is run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys

from benchmarks.harness import as_json, table

PARTS = ("core", "arbitration", "roundtrip", "throughput", "claims", "hits", "crowd", "page", "worlds")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What hwbpd costs, beside its floors.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=25, help="interleaved rounds, at least 2 (default: 25)")
    parser.add_argument("--json", action="store_true", help="one JSON value instead of text; times in nanoseconds")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if arguments.rounds < 2:
        parser.error("--rounds: a median with quartiles takes 2 at least")

    kernel, python = f"Linux {platform.release()}", f"Python {platform.python_version()}"
    host = f"{platform.machine()}, {kernel}, {os.cpu_count()} CPUs, {python}"
    results: dict[str, object] = {"host": host, "rounds": arguments.rounds}
    if not arguments.json:
        print(f"{host}; {arguments.rounds} rounds")
    status = 0
    for part in arguments.parts or PARTS:
        try:
            tables = importlib.import_module(f"benchmarks.{part}").run(arguments.rounds)
        except Exception as error:
            print(f"{part}: not measured: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
            continue
        for title, rows in tables:
            results[title] = as_json(rows)
            if not arguments.json:
                print(f"\n{table(title, rows)}", flush=True)
    if arguments.json:
        print(json.dumps(results, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())
