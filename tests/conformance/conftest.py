"""The daemons that the suite runs on, and the clients that it runs for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest

from examples.target import Target
from tests.conformance.in_c import InC, compiled
from tests.conformance.library import Library
from tests.conformance.newcomer import WAIT_S, Map, Newcomer, ZeroMQ
from tests.hardware.daemon import MARKS, Daemon
from tests.host import HostBusy, exclusive

# What runs on the simulated machine by itself: docs/simulator.md.
SIMULATED = 'machine = "sim"\n[sim]\naccesses_per_s = 1000\n'
SIMULATED_TID, SIMULATED_VARIABLE = 1000, 0x601000


class Client(Protocol):
    """What every client of the protocol can do, whatever it looks like inside."""

    pid: int

    @property
    def epoch(self) -> int: ...

    def hello(self, version: int = 1) -> Map: ...

    def request(self, op: str, **fields: Any) -> Map: ...

    def notice(self) -> Map: ...

    def notices(self) -> list[Map]: ...

    def close(self) -> None: ...


class World(NamedTuple):
    """A daemon, and a thread that writes to a variable: as often as it is told to, or by itself for ever."""

    daemon: Daemon
    tid: int
    variable: int
    write: Callable[[int], None]
    writes_by_itself: bool


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module", params=[pytest.param("registers", marks=MARKS), "simulated"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with ExitStack() as stack:
        if request.param == "simulated":
            daemon = stack.enter_context(Daemon(SIMULATED))
            yield World(daemon, SIMULATED_TID, SIMULATED_VARIABLE, lambda _times: None, True)
            return
        try:
            stack.enter_context(exclusive())
        except HostBusy as busy:
            pytest.skip(f"breakpoints of this host are in use: {busy}")
        daemon = stack.enter_context(Daemon())
        target = stack.enter_context(Target())

        def write(times: int) -> None:
            assert target.command(f"write {times}")["did"] == times

        yield World(daemon, target.tid, target.variable, write, False)


def await_empty_books(daemon: Daemon) -> None:
    """Return when nobody holds anything any more: the end of a connection is noticed a moment later."""
    witness = Newcomer(ZeroMQ(str(daemon.socket)))
    try:
        assert witness.hello()["op"] == "welcome"
        give_up = time.monotonic() + WAIT_S
        while held := witness.request("slots")["resources"]:
            assert time.monotonic() < give_up, held
    finally:
        witness.close()


@pytest.fixture
def connect(world: World, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Client]]:
    """Make a client of a kind: "newcomer", "c", or "library" over one of its carriers."""
    with ExitStack() as stack:

        def connect(kind: str) -> Client:
            path = str(world.daemon.socket)
            client: Client
            match kind.split():
                case ["newcomer"]:
                    client = Newcomer(ZeroMQ(path))
                case ["c"]:
                    client = Newcomer(InC(request.getfixturevalue("program"), path))
                case ["library", carrier]:
                    client = Library(path, carrier)
                case _:
                    raise AssertionError(kind)
            stack.callback(client.close)
            return client

        yield connect
    await_empty_books(world.daemon)
