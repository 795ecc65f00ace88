"""
Which CPUs a simulated machine has: names joined by "+", each with the number of such CPUs: "cortex-a15x2+cortex-a7x3".

1. A name without a number is one CPU. A name may itself end in "x" and digits, and is then taken for the name.
2. CPU numbers are given in the order in which the names stand.
3. One machine runs one kernel, so all its CPUs are of one architecture.

What all of them have in common is the least of what each has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hwbpd.core.errors import NotSupported
from hwbpd.hookspecs import CpuFacts

CPUS_MAX = 8192  # as many as Linux has at most


class Named(NamedTuple):
    """A CPU, and what people call it."""

    name: str
    facts: CpuFacts


def parse(profile: str, known: Mapping[str, CpuFacts]) -> list[Named]:
    """
    Return the CPUs of a profile, in order.

    :param known: every name there is.
    :raises NotSupported: for a name that there is not, a bad number, or CPUs that cannot be together.
    """
    cpus: list[Named] = []
    for part in profile.split("+"):
        name, count = _part(part, known)
        if not 1 <= count <= CPUS_MAX - len(cpus):
            raise NotSupported(f"profile {profile!r}: a machine has 1 to {CPUS_MAX} CPUs")
        cpus += [Named(name, known[name])] * count
    first = cpus[0]
    for cpu in cpus:
        if cpu.facts.architecture != first.facts.architecture:
            raise NotSupported(
                f"profile {profile!r}: {first.name} is {first.facts.architecture} and {cpu.name} is "
                f"{cpu.facts.architecture}, and all CPUs of a machine run the same kernel"
            )
    return cpus


def least(facts: Iterable[CpuFacts]) -> CpuFacts:
    """Return what all of some CPUs of one architecture have; what is not known of one is not known of all."""
    first, *others = dict.fromkeys(facts)
    for other in others:
        first = CpuFacts(
            first.architecture,
            first.features & other.features,
            _less(first.breakpoints, other.breakpoints),
            _less(first.watchpoints, other.watchpoints),
            _less(first.debug_version, other.debug_version),
        )
    return first


def told(cpus: Sequence[Named]) -> str:
    """The CPUs for people: ``2 cortex-a15 (cpu 0-1), 3 cortex-a7 (cpu 2-4)``."""
    runs: list[list[int]] = []
    for number, cpu in enumerate(cpus):
        if runs and cpus[runs[-1][0]] == cpu:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(
        f"{last - first + 1} {cpus[first].name} (cpu {first}" + (")" if first == last else f"-{last})")
        for first, last in runs
    )


def _part(part: str, known: Mapping[str, CpuFacts]) -> tuple[str, int]:
    """A name and its number: rule 1."""
    name, _, number = part.rpartition("x")
    if part in known:
        return part, 1
    if name in known and number.isdecimal() and len(number) <= len(str(CPUS_MAX)):
        return name, int(number)
    there_are = ", ".join(sorted(known)) or "none"
    raise NotSupported(f"no CPU {part!r}; there are {there_are}, each with xN behind it for N of them")


def _less(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else min(one, other)
