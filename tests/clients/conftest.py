"""A fake daemon, and a client of it, for the tests of the client library and of hwbpctl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import hwbp
from tests.clients.fake_daemon import FakeDaemon


@pytest.fixture(params=[False, True], ids=["zmq", "seqpacket"])
def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FakeDaemon]:
    """Once on each transport: a client takes SEQPACKET where it is offered."""
    with FakeDaemon(tmp_path / "hwbpd.sock", offers_seqpacket=request.param) as fake:
        yield fake


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[hwbp.Client]:
    with hwbp.connect(daemon.path, name="test") as connected:
        yield connected
