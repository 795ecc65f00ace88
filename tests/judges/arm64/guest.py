"""
Runs inside the guest: the random judges, one line of verdict each.

    python3 -m tests.judges.arm64.guest --accesses 2000 --regsets 1000 --seed 7
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.judges.arm64 import accesses, regsets


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.judges.arm64.guest")
    parser.add_argument("--accesses", type=int, default=0, metavar="N")
    parser.add_argument("--regsets", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(arguments)
    verdicts = [*accesses.judge(options.accesses, options.seed), *regsets.judge(options.regsets, options.seed)]
    for verdict in verdicts:
        print(verdict.told(), flush=True)
    return int(any(verdict.differences for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
