"""
Arm's rules against a real arm64 kernel: ``python -m tests.judges.arm64 --cases 6000 --seed 7``.

Boots a Debian kernel and Python under QEMU, with this tree in it, and runs in there, by the product's own code:

- ``oracle``: admission with Arm's two pools against the kernel, random operations (tests.judges.oracle);
- ``traced``, ``counted``: which access hits which slot (accesses.py);
- ``regsets``: what a tracer may write and reads (regsets.py);
- ``tests``: the tests on real registers, among them those that take a CPU off and on and those of the daemon: only with
  ``--tests``, as an emulated CPU needs minutes for what takes seconds.

With ``--armhf`` a 32-bit kernel instead, and what of ARMv7's rules QEMU can judge (armhf.py).

Exit status 0 and ``cases=N differences=0`` in the last line; 1 with what differed (the seed is in the first line);
2 and ``no verdict: ...`` when this host lacks something, or the guest did not get done.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from tests.judges.arm64 import armhf, debian, qemu
from tests.judges.arm64.debian import Guest, Missing, Recipe
from tests.judges.arm64.qemu import Board, NoAnswer
from tests.judges.arm64.verdict import generator

# Of the cases. The rest are the oracle's.
ACCESSES, REGSETS = 0.4, 0.3

PYTHON = "PYTHONPATH=/hwbpd:/hwbpd/plugins:/hwbpd/clients:/site HWBPD_TEST_PATIENCE=10 python3"
PYTEST = "-m pytest -q -n 0 --color=no --tb=short -p no:cacheprovider"
TESTS = "tests/hardware tests/judges/test_kernel_kunit.py"
HOTPLUG = "-m hotplug tests/hardware/test_hotplug.py tests/hardware/test_daemon_hotplug.py"

_ORACLE = re.compile(r"operations=(\d+) .* differences=(\d+)")
_JUDGE = re.compile(r"judge=\S+ cases=(\d+) differences=(\d+)")
_TESTS = re.compile(r"(\d+ (?:failed|passed|skipped|error).*) in [\d.]+s")


class Tally(Struct):
    """What the lines of a guest come to."""

    cases: int = 0
    differences: int = 0
    status: str = "0"  # of the guest's script

    def hear(self, line: str) -> None:
        """Add what a line says, if it is a judge's last one."""
        if said := _ORACLE.fullmatch(line) or _JUDGE.match(line):
            self.cases += int(said[1])
            self.differences += int(said[2])
        elif said := _TESTS.match(line):
            counts = {word.rstrip("s"): int(count) for count, word in re.findall(r"(\d+) (\w+)", said[1])}
            wrong = counts.get("failed", 0) + counts.get("error", 0)
            self.cases += counts.get("passed", 0) + wrong
            self.differences += wrong
        elif line.startswith(qemu.STATUS):
            self.status = line.removeprefix(qemu.STATUS)


def script(cases: int, seed: int, *, tests: bool) -> str:
    """What the arm64 guest does; each judge goes on when another has found something."""
    accesses, regsets = round(cases * ACCESSES), round(cases * REGSETS)
    lines = [
        "cd /hwbpd",
        f"{PYTHON} -m tests.judges.arm64.guest --accesses {accesses} --regsets {regsets} --seed {seed} || failed=1",
        f"{PYTHON} -m tests.judges.oracle --operations {cases - accesses - regsets} --seed {seed} 2>&1 || failed=1",
    ]
    if tests:
        lines += [f"{PYTHON} {PYTEST} {what} 2>&1 || failed=1" for what in (TESTS, HOTPLUG)]
    return "\n".join([*lines, "exit ${failed:-0}"])


def judged(lines: Iterator[str]) -> Tally:
    """Print what a guest says, and count it."""
    tally = Tally()
    for line in lines:
        print(line, flush=True)
        tally.hear(line)
    return tally


def arm64(guest: Guest, board: Board, work: Path, options: argparse.Namespace, seed: int) -> Tally:
    limit_s = 120 + options.cases * 0.5 + (5400 if options.tests else 0)
    with qemu.overlay(work, script(options.cases, seed, tests=options.tests)) as overlay:
        return judged(qemu.run(board, guest, overlay, limit_s))


def provided(recipe: Recipe, board: Board, work: Path) -> Guest:
    """Return the guest, having said what it is; raises ``Missing``."""
    if (missing := qemu.missing(board)) is not None:
        raise Missing(missing)
    guest = debian.provide(recipe, work)
    print(f"{guest.versions}, qemu {qemu.version(board)}", flush=True)
    return guest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.judges.arm64", description="Asks a real Arm kernel under QEMU what hwbpd says of Arm."
    )
    parser.add_argument("--cases", type=int, default=6000, metavar="N", help="how many, over all judges (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the run is the same for the same seed (a new one)")
    parser.add_argument("--tests", action="store_true", help="also the tests on real registers; takes half an hour")
    parser.add_argument("--armhf", action="store_true", help="a 32-bit kernel, and ARMv7's rules")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed={seed} cases={options.cases}", flush=True)
    work = qemu.cache()
    try:
        if options.armhf:
            guest = provided(debian.ARMHF, qemu.ARMHF, work)
            tally = judged(armhf.run(guest, work, options.cases, generator(seed, "armhf")))
        else:
            tally = arm64(provided(debian.ARM64, qemu.ARM64, work), qemu.ARM64, work, options, seed)
    except (Missing, NoAnswer) as reason:
        print(f"no verdict: {reason}")
        return 2
    if not tally.cases:
        print("no verdict: the guest has decided nothing")
        return 2
    if tally.status != "0" and not tally.differences:
        print("no verdict: a judge did not get done; what it said is above")
        return 2
    print(f"cases={tally.cases} differences={tally.differences}")
    return int(tally.differences > 0)


if __name__ == "__main__":
    sys.exit(main())
