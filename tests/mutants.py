"""
Would the tests notice? Small changes to the rules of the core, one at a time: ``python -m tests.mutants``.

cosmic-ray (from PyPI) lists the changes that it can make to a file, and makes one: another operator, a number one
larger, a condition turned round, a loop that does not run. What is decided here:

- Which are tried. Each file gives the same share, as far as it has so many; within a file places are drawn, and at
  each place one change, or the eleven binary operators would crowd out everything else. Annotations are not run,
  and so not changed. The same seed draws the same.
- Where. In a copy of the tree; this one is never touched.
- When a mutant is dead: a test of ``tests/core`` fails, or runs five times as long as all of them together did before.
  The file's own tests go first.

Each survivor is printed with its change, for somebody to say why it is no fault, or to write the test that is missing.
The last line is ``mutants=N killed=K survived=S``; the exit status is 0 whoever survived, and 2 without a verdict.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("admission", "books", "counts", "giving_way", "lifecycle", "placing", "preemption", "queue")
COPIED = ("hwbpd", "plugins", "clients", "tests", "docs", "pyproject.toml")
SLOWER = 5.0  # than all tests took without a mutant: then it hangs
LEAST_S = 60.0  # but so long it may take in any case, as others use the machine too


class Mutant(NamedTuple):
    """One change that cosmic-ray can make, and where."""

    module: str
    start: tuple[int, int]  # line, from 1, and column
    end: tuple[int, int]
    operator: str
    occurrence: int


class NoVerdict(Exception):
    """The tests could not be asked."""


def listed(cosmic_ray: str, tree: Path) -> list[Mutant]:
    """Every mutant of the modules that is run at all, in a fixed order."""
    config, session = tree / "mutants.toml", tree / "mutants.sqlite"
    paths = [f"hwbpd/core/{module}.py" for module in MODULES]
    config.write_text(
        f'[cosmic-ray]\nmodule-path = {json.dumps(paths)}\nexcluded-modules = []\ntimeout = 1.0\n'
        'test-command = "true"\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    subprocess.run([cosmic_ray, "init", config.name, session.name], cwd=tree, check=True, capture_output=True)
    dumped = subprocess.run([cosmic_ray, "dump", session.name], cwd=tree, check=True, capture_output=True, text=True)
    mutants = []
    for line in dumped.stdout.splitlines():
        (change,) = json.loads(line)[0]["mutations"]
        start, end = change["start_pos"], change["end_pos"]
        module = Path(change["module_path"]).stem
        mutants.append(
            Mutant(module, (start[0], start[1]), (end[0], end[1]), change["operator_name"], change["occurrence"])
        )
    spans = {module: annotated((tree / path).read_text()) for module, path in zip(MODULES, paths, strict=True)}
    return sorted(one for one in mutants if not any(first <= one.start <= last for first, last in spans[one.module]))


def annotated(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file begin and end."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.AnnAssign() | ast.arg():
                found.append(node.annotation)
            case ast.FunctionDef():
                found.append(node.returns)
    return [((one.lineno, one.col_offset), (one.end_lineno or 0, one.end_col_offset or 0)) for one in found if one]


def drawn(mutants: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """``count`` of them: evenly from the modules, and no two at one place of the code."""
    chance = random.Random(seed)
    at: dict[str, dict[tuple[tuple[int, int], tuple[int, int]], list[Mutant]]] = {}
    for mutant in mutants:
        at.setdefault(mutant.module, {}).setdefault((mutant.start, mutant.end), []).append(mutant)
    piles = [[chance.choice(here) for here in places.values()] for _, places in sorted(at.items())]
    for pile in piles:
        chance.shuffle(pile)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(piles):
        chosen += [pile.pop() for pile in piles if pile]
    return sorted(chosen[:count])


class Judge:
    """A copy of the tree, and its tests."""

    def __init__(self, cosmic_ray: str, tree: Path) -> None:
        self.cosmic_ray = cosmic_ray
        self.tree = tree
        self.limit_s = 600.0
        self.diff = ""  # what the last mutant changed

    def check_that_tests_pass(self) -> None:
        """Run them without a mutant, which also says how long they may take."""
        began = time.monotonic()
        if not self.tests_pass(["tests/core"]):
            raise NoVerdict("the tests fail as it is")
        self.limit_s = max(LEAST_S, SLOWER * (time.monotonic() - began))

    def survives(self, mutant: Mutant) -> bool:
        """Whether every test passes with that change."""
        path = self.tree / f"hwbpd/core/{mutant.module}.py"
        before = path.read_text()
        make = [self.cosmic_ray, "apply", str(path.relative_to(self.tree)), mutant.operator, str(mutant.occurrence)]
        subprocess.run(make, cwd=self.tree, check=True, capture_output=True)
        if path.read_text() == before:
            raise NoVerdict(f"cosmic-ray did not make the change {mutant}")
        try:
            own = f"tests/core/test_{mutant.module}.py"
            rest = ["tests/core", f"--ignore={own}"]
            return (not (self.tree / own).exists() or self.tests_pass([own])) and self.tests_pass(rest)
        finally:
            self.diff = difference(before, path.read_text())
            path.write_text(before)

    def tests_pass(self, which: Sequence[str]) -> bool:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *which]
        # No .pyc: two changes within a second look like one file. One seed: a mutant does not live or die by luck.
        environ = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HWBPD_HYPOTHESIS": "unshrunk"}
        with subprocess.Popen(
            [*command, "--hypothesis-seed=0"],
            cwd=self.tree,
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as tests:
            try:
                return tests.wait(self.limit_s) == 0
            except subprocess.TimeoutExpired:
                os.killpg(tests.pid, signal.SIGKILL)
                return False


def difference(before: str, after: str) -> str:
    """The lines that differ: as they were, and as they are."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    return "\n".join(f"    - {old.strip()}\n    + {new.strip()}" for old, new in pairs if old != new)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Would the tests notice a fault?")
    parser.add_argument("--mutants", type=int, default=100, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="draws the same for the same seed (a new one)")
    parser.add_argument("--cosmic-ray", default="cosmic-ray", metavar="PATH", help="where it is (%(default)s)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed={seed} mutants={options.mutants}", flush=True)
    found = shutil.which(options.cosmic_ray)
    if found is None:
        print(f"no verdict: there is no {options.cosmic_ray}; pip install cosmic-ray, in an environment of its own")
        return 2
    cosmic_ray = str(Path(found).absolute())  # it is started elsewhere
    with tempfile.TemporaryDirectory() as copy:
        tree = Path(copy)
        for name in COPIED:
            copying = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copying(ROOT / name, tree / name)
        judge = Judge(cosmic_ray, tree)
        try:
            judge.check_that_tests_pass()
            chosen = drawn(listed(cosmic_ray, tree), options.mutants, seed)
            survivors = 0
            for mutant in chosen:
                survived = judge.survives(mutant)
                survivors += survived
                where = f"{mutant.module}.py:{mutant.start[0]}"
                print(f"{'SURVIVED' if survived else 'killed'} {where} {mutant.operator}\n{judge.diff}", flush=True)
        except NoVerdict as reason:
            print(f"no verdict: {reason}")
            return 2
    print(f"mutants={len(chosen)} killed={len(chosen) - survivors} survived={survivors}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
