"""The machine, a program to watch, and the host to oneself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from examples.target import Target
from hwbpd_linux.machine import LinuxMachine, make
from tests.host import HostBusy, exclusive, slots_taken


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hotplug: takes a CPU offline and back; runs only when asked for by -m hotplug")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "hotplug" not in config.getoption("markexpr"):
        asked = [item for item in items if item.get_closest_marker("hotplug") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in asked])
        items[:] = asked


@pytest.fixture(scope="module")
def host() -> Iterator[None]:
    """The lock on this host's breakpoints, for all tests of a file: there may be others waiting in line."""
    with ExitStack() as lock:
        try:
            lock.enter_context(exclusive())
        except HostBusy as busy:
            pytest.skip(f"breakpoints of this host are in use: {busy}")
        yield


@pytest.fixture
def alone(host: None) -> Iterator[None]:
    """Every slot is free; what the test takes of slots and descriptors, it has to give back."""
    descriptors = set(os.listdir("/proc/self/fd"))
    yield
    assert slots_taken() == []
    assert set(os.listdir("/proc/self/fd")) == descriptors


@pytest.fixture
def machine(alone: None) -> Iterator[LinuxMachine]:
    machine = make({})
    yield machine
    machine.close()


@pytest.fixture
def target(alone: None) -> Iterator[Target]:
    with Target() as target:
        yield target
