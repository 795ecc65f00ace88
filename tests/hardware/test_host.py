"""Tests on real registers keep out of each other's way, and say who is in theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hwbpd_linux import perf_event
from hwbpd_linux.cpus import online_cpus
from tests import host as gate
from tests.hardware.common import WATCHPOINT_POOL
from tests.host import HostBusy, exclusive, free_slots

pytestmark = pytest.mark.hardware


def test_only_one_test_has_the_host_at_a_time(alone: None) -> None:
    with pytest.raises(HostBusy, match=r"another test has held .*hwbpd-hardware\.lock"), exclusive(timeout_s=0.1):
        pytest.fail("two tests had the host at once")


def test_whoever_has_slots_already_is_named(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "LOCK_PATH", tmp_path / "another.lock")
    monkeypatch.setattr(gate, "_SETTLE_S", 0.1)
    cpu = online_cpus()[-1]
    most = free_slots()[cpu, WATCHPOINT_POOL.value]
    fd = perf_event.open_breakpoint(0x1000, 4, 2, tid=-1, cpu=cpu)
    try:
        with pytest.raises(HostBusy) as busy, exclusive():
            pytest.fail("a slot was taken, and nobody minded")
    finally:
        os.close(fd)

    assert f"{most - 1} of {most} slots free on cpu {cpu}" in str(busy.value)
    assert f"[{os.getpid()}] has 1 perf descriptors" in str(busy.value)
