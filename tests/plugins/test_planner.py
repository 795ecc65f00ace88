"""
Every span of up to 64 bytes, at every offset, for every access and on every CPU that has a name: the plan takes the
fewest slots there are, holds what was asked for, and a refusal tells how many slots it would take.

The judge is ``tests.slow_cover``, which knows what one slot watches, byte by byte. CPUs that differ in nothing that
decides about a plan are looked at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest

from hwbpd.core.errors import BadClaim, HwbpError, NotSupported
from hwbpd.core.model import Access, Mode, Plan, Pool, Span
from hwbpd.hookspecs import Backend, CpuFacts
from hwbpd.plugins import Plugins
from tests.slow_cover import SlowPlanner, arm64_blocks, armv7_blocks, x86_blocks

BASE = 0x40_0000
LONGEST = 64
DATA = (Access.READ, Access.WRITE, Access.READ | Access.WRITE)
EXACT, WIDE = Mode(), Mode(over_report=True)

PLUGINS = Plugins()


def every_cpu() -> Iterator[tuple[str, CpuFacts]]:
    """The CPUs that have a name, and each architecture with nothing known about the CPU."""
    for factory in PLUGINS.backends.values():
        yield from factory.profiles.items()
        for architecture in sorted(factory.architectures):
            yield architecture, CpuFacts(architecture)


def rules_of(facts: CpuFacts) -> tuple[object, ...]:
    """What decides about a plan for data, here and nowhere else."""
    backend = PLUGINS.backend(facts)
    takes = tuple(letters for letters in backend.describe()["lengths"] if letters != "x")
    slots = backend.slots()
    return registers_of(facts), takes, slots.get(Pool.ANY, slots.get(Pool.DATA))


def distinct() -> list[object]:
    """One CPU for all with the same rules, by name."""
    named: dict[tuple[object, ...], tuple[str, CpuFacts]] = {}
    for name, facts in every_cpu():
        named.setdefault(rules_of(facts), (name, facts))
    return [pytest.param(facts, id=name) for name, facts in named.values()]


def registers_of(facts: CpuFacts) -> tuple[str, bool]:
    """Which sort of registers, and whether they have masks that Linux uses."""
    if facts.architecture == "aarch64":
        return "arm64", False
    if facts.architecture.startswith("armv"):
        return "armv7", False
    return "x86_64" if facts.architecture == "x86_64" else "i686", "bpext" in facts.features


@cache
def slow_planner(what: str, has_masks: bool) -> SlowPlanner:
    if what == "arm64":
        return SlowPlanner(arm64_blocks())
    return SlowPlanner(armv7_blocks() if what == "armv7" else x86_blocks(8 if what == "x86_64" else 4, has_masks))


def answer(backend: Backend, span: Span, access: Access, mode: Mode) -> Plan | HwbpError:
    try:
        return backend.fit(span, access, mode)
    except HwbpError as refusal:
        return refusal


@pytest.mark.parametrize("facts", distinct())
def test_every_span_takes_the_fewest_slots_or_is_told_how_many_it_would_take(facts: CpuFacts) -> None:
    backend, slow = PLUGINS.backend(facts), slow_planner(*registers_of(facts))
    pool = Pool.ANY if Pool.ANY in backend.slots() else Pool.DATA
    most = backend.slots()[pool]
    taken = [access for access in DATA if access.letters in backend.describe()["lengths"]]
    for first in range(LONGEST):
        least = slow.exact(first, LONGEST)
        for length in range(1, LONGEST + 1):
            span = Span(BASE + first, length)
            exact = answer(backend, span, taken[0], EXACT)
            check_exact(exact, span, taken[0], pool, least[length], most)
            check_wide(answer(backend, span, taken[0], WIDE), exact, span, slow.wide(first, first + length), most)
            # The access decides about the register's code for it, not about the blocks, nor whether there are enough.
            for access in taken[1:] if isinstance(exact, Plan) or length % 8 == 0 else ():
                same = answer(backend, span, access, EXACT)
                if isinstance(exact, Plan):
                    assert isinstance(same, Plan)
                    assert [piece.span for piece in same.pieces] == [piece.span for piece in exact.pieces]
                    assert {piece.access for piece in same.pieces} == {access}
                else:
                    assert type(same) is type(exact)


def check_exact(got: Plan | HwbpError, span: Span, access: Access, pool: Pool, least: int, most: int) -> None:
    if least > most:
        assert isinstance(got, BadClaim | NotSupported), f"{span}: {got}"
        assert f"it takes {least} slots, and a CPU has {most}" in str(got)
        return
    assert isinstance(got, Plan), f"{span}: {got}"
    assert len(got.pieces) == least, f"{span}: {got}"
    at = span.address
    for piece in got.pieces:
        assert (piece.span.address, piece.access, piece.pool) == (at, access, pool)
        at += piece.span.length_bytes
    assert at == span.address + span.length_bytes


def check_wide(
    got: Plan | HwbpError, exact: Plan | HwbpError, span: Span, best: tuple[int, int], most: int
) -> None:
    """With leave to report bytes beside the span."""
    slots, _ = best
    if slots > most:
        assert isinstance(got, BadClaim | NotSupported), f"{span}: {got}"
        assert f"it takes {slots} slots, and a CPU has {most}" in str(got)
        return
    assert isinstance(got, Plan), f"{span}: {got}"
    assert (len(got.pieces), sum(piece.span.length_bytes for piece in got.pieces)) == best, f"{span}: {got}"
    inside = [
        (max(piece.span.address, span.address), min(end_of(piece.span), end_of(span))) for piece in got.pieces
    ]
    assert all(first < end for first, end in inside), f"{span}: a slot for nothing that was asked for"
    assert sum(end - first for first, end in inside) == span.length_bytes
    if isinstance(exact, Plan):
        assert slots < len(exact.pieces) or got == exact
    else:
        # The refusal without leave has said that it would do.
        hint = re.search(r"; (\d+) would do with over-report, and report (\d+) bytes", str(exact))
        assert hint is not None, str(exact)
        assert (int(hint[1]), int(hint[2])) == best


@pytest.mark.parametrize("facts", distinct())
def test_no_slot_for_user_addresses_reaches_into_the_kernels(facts: CpuFacts) -> None:
    # Given the last bytes below the kernel's addresses,
    backend = PLUGINS.backend(facts)
    top = first_kernel_address(backend)
    access = next(access for access in reversed(DATA) if access.letters in backend.describe()["lengths"])
    for length in range(1, LONGEST + 1):
        # when the rest of their blocks would be welcome,
        got = answer(backend, Span(top - length, length), access, Mode(kernel=False, over_report=True))

        # then none of it is the kernel's.
        if isinstance(got, Plan):
            assert all(end_of(piece.span) <= top for piece in got.pieces), got


def first_kernel_address(backend: Backend) -> int:
    """Found by asking: the first byte that is refused to somebody who does not want the kernel's hits."""
    access = next(access for access in reversed(DATA) if access.letters in backend.describe()["lengths"])
    low, high = 0, 2**64
    while high - low > 1:
        middle = (low + high) // 2
        if isinstance(answer(backend, Span(middle, 1), access, Mode(kernel=False)), Plan):
            low = middle
        else:
            high = middle
    return high


def end_of(span: Span) -> int:
    return span.address + span.length_bytes
