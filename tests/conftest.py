"""
What all tests share: how hard hypothesis tries, and what this host lacks for real breakpoints.

``HWBPD_HYPOTHESIS=long`` makes every property try fifty times as many examples; it is for nights, not for commits.
A test marked ``hardware`` needs real debug registers. Where they are missing it is skipped with the reason and the
remedy, which the first lines of a run say as well, so that nobody takes a green run for more than it was.

A run uses every core, up to four (``-n0`` for one process, as a debugger wants it). Tests that hold the host lock are
all run by one worker, first of all; the others go to whoever is free, file by file.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, settings
from xdist.scheduler import LoadFileScheduling

# No deadline: a machine of two cores under load would fail it, and timing is the benchmarks' business.
# The blob lets anyone repeat a failing example that was found elsewhere.
settings.register_profile("short", max_examples=100, deadline=None, print_blob=True)
settings.register_profile(
    "long",
    max_examples=5000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# For those who only want to know whether a test fails, and not on which smallest example.
settings.register_profile("unshrunk", max_examples=100, deadline=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HWBPD_HYPOTHESIS", "short"))


@cache
def hardware_missing() -> str | None:
    """Why real breakpoints cannot be used here, asked once; imported late, as asking opens one."""
    from tests.host import breakpoints_missing

    return breakpoints_missing()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hardware: needs real debug registers; holds the host lock while it uses them")


def pytest_report_header() -> str:
    missing = hardware_missing()
    return f"hardware breakpoints: {'usable' if missing is None else missing}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("hardware")]
    if marked and (missing := hardware_missing()) is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=missing))


# Where the host lock is held. Left to chance, two workers would wait for each other's files.
ON_THE_HOST = ("tests/hardware/", "tests/judges/", "tests/fuzz/", "tests/conformance/", "tests/plugins/")


class OneForTheHost(LoadFileScheduling):  # type: ignore[misc]
    """Gives all files that hold the host lock to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return "the host" if nodeid.startswith(ON_THE_HOST) else nodeid.split("::", 1)[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneForTheHost:
    return OneForTheHost(config, log)
