"""Which mutants are drawn; what becomes of them takes a tool that this environment need not have."""

from __future__ import annotations

from collections import Counter

from tests.mutants import Mutant, annotated, difference, drawn


def mutants(module: str, places: int, each: int = 11) -> list[Mutant]:
    """Several changes at each of some places."""
    changes = [f"change{number}" for number in range(each)]
    return [Mutant(module, (line, 4), (line, 5), change, line) for line in range(places) for change in changes]


def test_each_module_gives_the_same_share_as_far_as_it_has_so_many() -> None:
    chosen = drawn([*mutants("small", 3), *mutants("large", 100), *mutants("larger", 200)], 41, seed=1)

    assert Counter(one.module for one in chosen) == {"small": 3, "large": 19, "larger": 19}


def test_at_one_place_there_is_one_change() -> None:
    chosen = drawn(mutants("one", 30), 30, seed=1)

    assert sorted(one.start[0] for one in chosen) == list(range(30))
    assert len({one.operator for one in chosen}) > 5


def test_the_same_seed_draws_the_same() -> None:
    every = [*mutants("one", 50), *mutants("other", 50)]

    assert drawn(every, 20, seed=1) == drawn(every, 20, seed=1) != drawn(every, 20, seed=2)


def test_where_there_are_fewer_all_are_drawn() -> None:
    assert len(drawn(mutants("one", 5), 100, seed=1)) == 5


def test_annotations_are_not_run_and_everything_else_is() -> None:
    source = "def add(one: int | None, other=1 | 2) -> int | str:\n    total: int | float = one | other\n"

    texts = {source.splitlines()[start[0] - 1][start[1] : end[1]] for start, end in annotated(source)}

    assert texts == {"int | None", "int | str", "int | float"}


def test_a_change_is_shown_as_the_lines_that_differ() -> None:
    assert difference("a\n  b + c\nd\n", "a\n  b - c\nd\n") == "    - b + c\n    + b - c"
