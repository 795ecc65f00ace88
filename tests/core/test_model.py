"""The words of the core, as people read them."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.model import Access, Owner, Target, Task, format_cpus

TASK = Task(812, start_ticks=5)


def cpus_of(text: str) -> list[int]:
    """Read a CPU list as taskset does."""
    cpus: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


@given(st.sets(st.integers(0, 60), min_size=1))
def test_cpus_are_written_so_that_taskset_reads_them_back(cpus: set[int]) -> None:
    text = format_cpus(tuple(sorted(cpus)))

    assert cpus_of(text) == sorted(cpus)
    ends = [[int(end) for end in run.split("-")] for run in text.split(",")]
    assert all(after[0] > before[-1] + 1 for before, after in pairwise(ends)), "runs are not joined"


def test_an_access_and_its_letters_say_the_same() -> None:
    single = list(Access)
    every = [choice for size in range(1, 4) for choice in combinations(single, size)]
    for choice in every:
        access = Access(0)
        for part in choice:
            access |= part
        assert Access.from_letters(access.letters) == access
    assert [Access.from_letters(letters) for letters in ("r", "w", "rw", "x")] == [
        Access.READ,
        Access.WRITE,
        Access.READ | Access.WRITE,
        Access.EXECUTE,
    ]
    assert [access.value for access in single] == [1, 2, 4], "the bits of HW_BREAKPOINT_R, W and X"


@pytest.mark.parametrize("letters", ["q", "wr?", "W"])
def test_other_letters_are_no_access(letters: str) -> None:
    with pytest.raises(KeyError):
        Access.from_letters(letters)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (Target(), "cpu-wide on all cpus"),
        (Target(cpus=(0, 1, 2, 5)), "cpu-wide on cpu 0-2,5"),
        (Target(TASK), "tid 812"),
        (Target(TASK, (3,)), "tid 812 on cpu 3"),
    ],
)
def test_a_target_says_where_it_is(target: Target, text: str) -> None:
    assert str(target) == text


def test_an_owner_is_its_process() -> None:
    assert str(Owner(1, 812, 0, 0, "gdb")) == "gdb[812]"
