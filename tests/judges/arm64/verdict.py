"""What every judge of this folder counts, and how it says so."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

MOST_TOLD = 5  # differences that are told in full


class Verdict:
    """The cases that one judge decided."""

    def __init__(self, judge: str) -> None:
        self.judge = judge
        self.cases = 0
        self.differences = 0
        self.kinds: Counter[str] = Counter()  # what the cases were, so that nobody takes a dull run for a pass

    def decide(self, kind: str, expected: object, seen: object, story: Callable[[], str]) -> bool:
        """Count a case; tell it if what was expected was not seen. Return whether they agree."""
        self.cases += 1
        self.kinds[kind] += 1
        if expected == seen:
            return True
        self.differences += 1
        if self.differences <= MOST_TOLD:
            print(f"difference {self.differences} of {self.judge}, case {self.cases} ({kind}):")
            print(f"{story()}\n  expected {expected}\n  seen     {seen}", flush=True)
        return False

    def told(self) -> str:
        """One line: ``judge=accesses cases=500 differences=0``, and what the cases were."""
        kinds = " ".join(f"{kind}:{count}" for kind, count in sorted(self.kinds.items()))
        return f"judge={self.judge} cases={self.cases} differences={self.differences} {kinds}".rstrip()


def generator(seed: int, judge: str) -> random.Random:
    """Randomness of its own for each judge, so that one can be repeated without the others."""
    return random.Random(f"{seed} {judge}")
