"""The parts of ``make bench``: all there, and measuring what they say on a host of any size."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.crowd import SLOTS_PER_THREAD, settings, wish
from hwbpd.settings import load


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_run(part: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{part}").run)


def test_the_claims_of_a_crowd_fit_its_simulated_machine() -> None:
    # Given a crowd of clients with ten claims each,
    clients, claims = 50, 10
    wishes = [wish(client, claim) for client in range(1, clients + 1) for claim in range(claims)]

    # when they claim,
    per_thread: dict[object, int] = {}
    for asked in wishes:
        per_thread[asked["tid"]] = per_thread.get(asked["tid"], 0) + 1

    # then no thread is asked for more than it has, and no two claims of a thread are the same.
    assert max(per_thread.values()) <= SLOTS_PER_THREAD
    assert len({(asked["tid"], asked["address"]) for asked in wishes}) == clients * claims


def test_the_settings_of_a_crowd_are_settings(tmp_path: Path) -> None:
    # Given the settings for a thousand clients,
    file = tmp_path / "hwbpd.toml"
    file.write_text(settings(1_001, 3))

    # when a daemon reads them,
    loaded = load(file)

    # then every client has a session and a process of its own.
    assert loaded.limits.sessions > 1_001
    assert (loaded.sim.processes, loaded.sim.threads, loaded.sim.accesses_per_s) == (1_001, 3, 0)
