"""A fake daemon, and a client of it, for the tests of the client library and of hwbpctl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import hwbp
from tests.clients.fake_daemon import FakeDaemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "hwbpd.sock") as fake:
        yield fake


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[hwbp.Client]:
    with hwbp.connect(daemon.path, name="test") as connected:
        yield connected
