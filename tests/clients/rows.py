"""Slots as a test needs them, in few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hwbp
from hwbp.values import cpus_of, resources_of, waiting_of
from tests.clients.fake_daemon import CLAIM_ROW, RESOURCE_ROW, WAITING_ROW


def cpu(number: int, wide: int = 0, task: int = 0, online: bool = True) -> dict[str, Any]:
    used = {"cpu_wide": {"any": wide}, "busiest_task": {"any": task}}
    return {"cpu": number, "online": online} | used


def slots_of(
    cpus: list[dict[str, Any]],
    *resources: dict[str, Any],
    pools: dict[str, int] | None = None,
    waiting: Sequence[dict[str, Any]] = (),
) -> hwbp.Slots:
    return hwbp.Slots(pools or {"any": 4}, cpus_of(cpus), resources_of(resources), waiting_of(waiting))


def queued_row(number: int, **changes: Any) -> dict[str, Any]:
    """A claim that waits."""
    return WAITING_ROW | {"claim": number} | changes


def held(number: int, **changes: Any) -> dict[str, Any]:
    """A resource with one claim of the same number; ``changes`` may be to either."""
    claim = CLAIM_ROW | {"claim": number} | {name: each for name, each in changes.items() if name in CLAIM_ROW}
    resource = {name: each for name, each in changes.items() if name in RESOURCE_ROW}
    return RESOURCE_ROW | {"resource": number, "claims": [claim]} | resource


def lines(text: str) -> str:
    """A golden text as it stands in the test, without the line breaks around it."""
    return text.strip("\n")
