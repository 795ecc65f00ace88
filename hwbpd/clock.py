"""Monotonic nanoseconds, behind a Protocol so that a test can bring its own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the daemon asks for the time."""

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC, as hit records and request deadlines have it."""
        ...


class MonotonicClock:
    """The host's clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()
