"""A profile names the CPUs of a simulated machine, or is refused with a sentence that says what would do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.errors import NotSupported
from hwbpd.hookspecs import CpuFacts
from hwbpd_sim.profiles import CPUS_MAX, Named, least, parse, told

BIG = CpuFacts("aarch64", frozenset({"a", "b"}), breakpoints=6, watchpoints=4, debug_version=8)
LITTLE = CpuFacts("aarch64", frozenset({"b", "c"}), breakpoints=4, watchpoints=5, debug_version=6)
OTHER = CpuFacts("armv7l", breakpoints=6, watchpoints=4)
KNOWN = {"big": BIG, "little": LITTLE, "other": OTHER, "core-x2": LITTLE, "core-": BIG, "x86-64": OTHER}


@pytest.mark.parametrize(
    ("profile", "names"),
    [
        ("big", ["big"]),
        ("bigx2", ["big"] * 2),
        ("bigx2+littlex3", ["big"] * 2 + ["little"] * 3),
        ("little+big+little", ["little", "big", "little"]),
        ("core-x2", ["core-x2"]),
        ("core-x2x2", ["core-x2"] * 2),
        ("core-x3", ["core-"] * 3),
        ("x86-64x2", ["x86-64"] * 2),
    ],
)
def test_names_become_cpus_in_order(profile: str, names: list[str]) -> None:
    assert parse(profile, KNOWN) == [Named(name, KNOWN[name]) for name in names]


@pytest.mark.parametrize("profile", ["", "huge", "hugex2", "bigx", "bigxx", "bigx-1", "bigx2+", "+big", "big x2"])
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(profile: str) -> None:
    with pytest.raises(NotSupported, match="there are big, core-, core-x2, little, other, x86-64"):
        parse(profile, KNOWN)


@pytest.mark.parametrize("profile", ["bigx0", f"bigx{CPUS_MAX + 1}", f"bigx{CPUS_MAX}+little"])
def test_a_machine_has_a_cpu_and_not_too_many(profile: str) -> None:
    with pytest.raises(NotSupported, match=f"1 to {CPUS_MAX} CPUs"):
        parse(profile, KNOWN)


def test_all_cpus_of_a_machine_are_of_one_architecture() -> None:
    with pytest.raises(NotSupported, match="big is aarch64 and other is armv7l"):
        parse("bigx2+other", KNOWN)


def test_what_all_have_is_the_least_of_each() -> None:
    assert least([BIG]) == BIG
    assert least([BIG, LITTLE, BIG]) == CpuFacts("aarch64", frozenset({"b"}), 4, 4, 6)
    assert least([BIG, CpuFacts("aarch64")]) == CpuFacts("aarch64"), "what is unknown of one is unknown of all"


def test_cpus_are_told_in_runs() -> None:
    assert told(parse("bigx2+little+bigx1", KNOWN)) == "2 big (cpu 0-1), 1 little (cpu 2), 1 big (cpu 3)"


names = st.sampled_from(["big", "little", "other", "x86-64"])


@given(st.lists(st.tuples(names, st.integers(1, 9)), min_size=1, max_size=5))
def test_what_is_written_with_numbers_is_read_back(runs: list[tuple[str, int]]) -> None:
    same = {KNOWN[name].architecture for name, _ in runs}
    profile = "+".join(f"{name}x{count}" for name, count in runs)
    if len(same) > 1:
        with pytest.raises(NotSupported):
            parse(profile, KNOWN)
        return
    assert [cpu.name for cpu in parse(profile, KNOWN)] == [name for name, count in runs for _ in range(count)]
