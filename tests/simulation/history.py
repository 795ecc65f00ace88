"""
One history from a seed; and, when it breaks a promise, the shortest one that breaks it too.
"""

from __future__ import annotations

import random
import re
import time
import traceback
from collections.abc import Callable, Sequence

from msgspec import Struct

from tests.simulation import draw
from tests.simulation.acts import Act, World
from tests.simulation.play import Play

ACTS = 300  # of one history, before all room comes back
THOROUGH = 8  # one act in so many is followed by the checks that cost much
SHRINK_S = 60.0  # so long a failure may take to be made short


class Broken(Struct, frozen=True):
    """A promise that was broken, and how to see it again."""

    seed: str
    world: World
    acts: tuple[Act, ...]
    what: str  # the sentence
    where: str  # which check or line raised it


class Result(Struct, frozen=True):
    """What came of a history."""

    events: int
    broken: Broken | None = None


def play(seed: str, watch: Callable[[Play], None] = lambda _: None) -> Result:
    """
    Play the history of a seed, with the end in which all room comes back.

    :param watch: is shown how it stands after each act.
    """
    rng = random.Random(seed)
    world = draw.world(rng)
    here = Play(world)
    dice = draw.Dice(rng, here)
    done: list[Act] = []
    try:
        for nth in range(ACTS):
            act = dice.act()
            done.append(act)
            here.do(act, thoroughly=nth % THOROUGH == 0)
            watch(here)
        here.finish()
    except Exception as failure:  # whatever the core raises is a violation, too
        return Result(here.shell.stepped, Broken(seed, world, tuple(done), *_sentence(failure)))
    return Result(here.shell.stepped)


def again(world: World, acts: Sequence[Act]) -> tuple[Play, tuple[str, str] | None]:
    """Play acts in a world, with every check after each; return how it stands, and what broke, if anything did."""
    here = Play(world)
    try:
        for act in acts:
            here.do(act)
        here.finish()
    except Exception as failure:
        return here, _sentence(failure)
    return here, None


def shrink(broken: Broken, patience_s: float = SHRINK_S) -> Broken:
    """
    Leave out acts as long as the same check fails (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing
    Input", 2002: ddmin).
    """
    deadline = time.monotonic() + patience_s

    def fails(acts: Sequence[Act]) -> bool:
        _, what = again(broken.world, acts)
        return what is not None and what[1] == where

    _, found = again(broken.world, broken.acts)
    if found is None:
        return broken  # not to be had again
    where = found[1]
    acts = shortest(list(broken.acts), fails, lambda: time.monotonic() > deadline)
    _, found = again(broken.world, acts)
    assert found is not None
    return Broken(broken.seed, broken.world, tuple(acts), *found)


def shortest(acts: list[Act], fails: Callable[[Sequence[Act]], bool], has_to_stop: Callable[[], bool]) -> list[Act]:
    """Return a part of ``acts`` that fails, and with any one left out no longer does, unless it ``has_to_stop``."""
    size = max(1, len(acts) // 2)
    while not has_to_stop():
        before = len(acts)
        at = 0
        while at < len(acts) and not has_to_stop():
            without = acts[:at] + acts[at + size :]
            if fails(without):
                acts = without
            else:
                at += size
        if size == 1 and len(acts) == before:
            return acts
        size = max(1, size // 2)
    return acts


def report(broken: Broken) -> list[str]:
    """What happened, as lines: the seed, the acts, and the stories of the claims involved."""
    here, _ = again(broken.world, broken.acts)
    involved = [int(number) for number in re.findall(r"claims? \[?(\d+)", broken.what)]
    return [
        f"seed {broken.seed}: {broken.what}",
        f"    raised by {broken.where}",
        f"in {broken.world}, after",
        *(f"    {act}" for act in broken.acts),
        "and the end, in which all room comes back",
        *here.stories(involved or sorted(here.shell.arbiter.books.claims)),
    ]


def _sentence(failure: Exception) -> tuple[str, str]:
    frames = traceback.extract_tb(failure.__traceback__)
    last = frames[-1]
    return f"{type(failure).__name__}: {failure}", f"{last.name}, {last.filename.rpartition('/')[2]}:{last.lineno}"
