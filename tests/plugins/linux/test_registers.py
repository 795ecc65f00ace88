"""How many registers there are, from what the kernel tells tracers."""

from __future__ import annotations

import os

import pytest

from hwbpd.core.model import Pool
from hwbpd.hookspecs import CpuFacts
from hwbpd_linux import registers


def test_arm64_tells_both_counts_and_the_version() -> None:
    # given what a Cortex-A57 says in its two register sets
    counts = registers.from_regsets(0x606, 0x604)

    assert (counts.breakpoints, counts.watchpoints, counts.debug_version) == (6, 4, 6)
    assert counts.slots == {Pool.INST: 6, Pool.DATA: 4}


def test_armv7_keeps_one_breakpoint_which_is_there_and_not_handed_out() -> None:
    # given what a Cortex-A15 says in the resource register
    counts = registers.from_resource_info(0x0508_0405)

    assert (counts.breakpoints, counts.watchpoints, counts.debug_version) == (6, 4, 5)
    assert counts.slots == {Pool.INST: 5, Pool.DATA: 4}


def test_armv6_keeps_none() -> None:
    counts = registers.from_resource_info(0x0204_0106)

    assert (counts.breakpoints, counts.watchpoints) == (6, 1)
    assert counts.slots == {Pool.INST: 6, Pool.DATA: 1}


def test_x86_needs_nobody_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registers, "_READERS", {})

    assert registers.look("x86_64", frozenset({"bpext"})) == (CpuFacts("x86_64", frozenset({"bpext"})), {Pool.ANY: 4})


def test_where_ptrace_is_refused_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a kernel that lets nobody trace
    def refuse(pid: int) -> registers.Counts:
        raise PermissionError(f"no tracing of {pid}")

    monkeypatch.setattr(registers, "_READERS", {"aarch64": refuse})

    assert registers.look("aarch64", frozenset()) == (CpuFacts("aarch64"), {})


def test_whoever_is_asked_is_a_stopped_child_that_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read(pid: int) -> registers.Counts:
        with open(f"/proc/{pid}/stat") as stat:
            asked.append((pid, stat.read().rpartition(")")[2].split()[0]))
        return registers.from_regsets(0x606, 0x604)

    monkeypatch.setattr(registers, "_READERS", {"aarch64": read})

    facts, slots = registers.look("aarch64", frozenset())

    ((pid, state),) = asked
    assert state == "t"
    assert (facts.breakpoints, slots[Pool.DATA]) == (6, 4)
    assert not os.path.exists(f"/proc/{pid}")
