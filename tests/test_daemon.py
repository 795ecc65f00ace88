"""
The daemon as a process: one per socket, ready when it says so, and gone without a trace when it is told to stop.

It runs on the registers in memory of ``tests/fakes.py``; on real ones it is met in ``tests/hardware``.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from hwbpd import daemon
from hwbpd.daemon import AlreadyRunning
from hwbpd.settings import Settings
from tests.raw_zmtp import RawPeer

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 30

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root claims what nobody is asked about: run as root")

# A whole daemon, with a machine that is not one.
DAEMON = """
import random, sys
from hwbpd import daemon, logs
from hwbpd.core.model import Pool
from hwbpd.hookspecs import BackendFactory, MachineFactory, hookimpl
from hwbpd.plugins import Plugins
from hwbpd.settings import Settings
from tests.fakes import FakeBackend, FakeMachine

class Fakes:
    @hookimpl
    def hwbpd_machines(self):
        return [MachineFactory("fake", False, lambda _: FakeMachine({Pool.ANY: 4}, 2, random.Random(0)))]

    @hookimpl
    def hwbpd_backends(self):
        return [BackendFactory("fake", frozenset({"fake"}), lambda _: FakeBackend({Pool.ANY: 4}))]

logs.set_up("json", "info")
daemon.run(Settings(socket=sys.argv[1], machine="fake"), Plugins([Fakes()]))
"""

# Prints the first routing id that a ROUTER of this libzmq makes up.
FIRST_ID = """
import zmq
context = zmq.Context()
router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
router.bind("inproc://here")
dealer.connect("inproc://here")
dealer.send(b"hello")
print(router.recv_multipart()[0].hex())
"""


class Running:
    """A daemon in a process of its own, which has said that it is ready."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        command = [sys.executable, "-c", DAEMON, str(path)]
        self.path = path
        self.process = stack.enter_context(
            subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self.process.kill)
        self.ready = self.log_until("ready")

    def log_until(self, event: str) -> dict[str, Any]:
        """Read the log up to a line, and return it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if not line.startswith("{"):
                raise AssertionError(line + self.process.stderr.read())
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == event:
                return entry
        raise AssertionError(f"the daemon ended with {self.process.wait()} before it said {event!r}")


class Client:
    """A client as anybody would write it from docs/protocol.md."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._dealer = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.DEALER))
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.RCVTIMEO, WAIT_S * 1000)
        self._dealer.connect(f"ipc://{path}")

    def send(self, op: str, **fields: Any) -> None:
        self._dealer.send(msgpack.packb({"op": op, "id": 1, **fields}))

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = msgpack.unpackb(self._dealer.recv())
        return message

    def has_answer_of(self, running: Running) -> bool:
        """Wait until the daemon has answered, or has ended without."""
        pidfd = os.pidfd_open(running.process.pid)
        try:
            poller = zmq.Poller()
            poller.register(self._dealer, zmq.POLLIN)
            poller.register(pidfd, zmq.POLLIN)
            return self._dealer in dict(poller.poll(WAIT_S * 1000))
        finally:
            os.close(pidfd)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        self.send(op, **fields)
        return self.receive()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "hwbpd.sock"


# --- one daemon per socket -------------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path) -> Iterator[None]:
    with daemon._only_daemon_on(path):
        yield


def test_the_second_daemon_on_a_socket_is_told_who_the_first_is(path: Path) -> None:
    # given a daemon that holds the lock
    with lock(path):
        # when another wants it, then it hears the pid, and the lock stays where it is
        for _ in range(2):
            with pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()} serves {path} already"), lock(path):
                pass
        with lock(path.with_name("another.sock")):
            pass

    # and once the first is gone, the next has it
    with lock(path):
        pass


def test_the_lock_is_let_go_however_the_daemon_ends(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock(path):
        raise ZeroDivisionError
    with lock(path):
        pass


def test_a_lock_that_does_not_say_whose_it_is_is_respected(path: Path) -> None:
    with lock(path):
        os.truncate(path.with_name("hwbpd.sock.lock"), 0)
        with pytest.raises(AlreadyRunning, match="pid unknown"), lock(path):
            pass


def test_the_lock_names_only_its_last_holder(path: Path) -> None:
    path.parent.mkdir()
    path.with_name("hwbpd.sock.lock").write_text("123456789012345\n")

    with lock(path):
        assert path.with_name("hwbpd.sock.lock").read_text() == f"{os.getpid()}\n"


# --- its life --------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_serves_until_a_signal_and_leaves_nothing_behind(
    stack: ExitStack, path: Path, number: signal.Signals
) -> None:
    # given a daemon that is ready, and a client with a claim
    running = Running(path, stack)
    assert {name: running.ready[name] for name in ("socket", "machine", "backend", "cpus")} == {
        "socket": str(path),
        "machine": "fake",
        "backend": "fake",
        "cpus": 2,
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o666, "anybody may ask; the kernel says who may what"
    client = Client(path, stack)
    welcome = client.ask("hello", version=1)
    granted = client.ask("claim", epoch=welcome["epoch"], address=0x404040, length=8, access="w")
    assert (welcome["op"], granted["op"]) == ("welcome", "granted")

    # when another daemon is started on its socket, then that one ends at once
    with pytest.raises(AlreadyRunning, match=f"pid {running.process.pid}"):
        daemon.run(Settings(socket=str(path), machine="no such machine"))

    # when it is told to stop
    running.process.send_signal(number)

    # then it ends the claim, tells the client, and goes; only the lock file and the page stay
    assert client.receive()["op"] == "closing"
    assert running.log_until("ended")["how"] == "stopping"
    running.log_until("stopped")
    assert running.process.wait(WAIT_S) == 0
    assert sorted(os.listdir(path.parent)) == ["hwbpd.sock.lock", "hwbpd.sock.page"]


@needs_root
def test_after_a_daemon_was_killed_the_next_takes_its_place(stack: ExitStack, path: Path) -> None:
    # given a client of a daemon
    first = Running(path, stack)
    client = Client(path, stack)
    epoch = client.ask("hello", version=1)["epoch"]

    # when the daemon is killed and started again
    first.process.kill()
    first.process.wait(WAIT_S)
    assert path.exists(), "a killed daemon does not clean up"
    Running(path, stack)

    # then a request meant for the first is refused by the second, whose epoch is another
    assert client.ask("slots", epoch=epoch)["errno"] == "ESTALE"
    assert client.ask("hello", version=1)["epoch"] != epoch


@needs_root
def test_a_daemon_survives_whatever_comes_through_the_door(stack: ExitStack, path: Path) -> None:
    # given a daemon, and peers that do what they should not
    running = Running(path, stack)
    for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, os.urandom(500)):
        peer = stack.enter_context(RawPeer(str(path)))
        peer.socket.sendall(nonsense)
    old = stack.enter_context(RawPeer(str(path)))
    with suppress(EOFError):  # it may be hung up on
        old.shake_hands_v2()
        old.send(msgpack.packb({"op": "hello", "id": 1, "version": 1}))
        assert msgpack.unpackb(old.receive_frame())["errno"] == "EPERM", "ZMTP 2.0 has no credentials"
    several = stack.enter_context(RawPeer(str(path)))
    several.shake_hands()
    several.send(b"one", b"two")
    assert msgpack.unpackb(several.receive_frame())["errno"] == "EBADMSG"

    # when a decent one comes, then it is served
    assert Client(path, stack).ask("hello", version=1)["op"] == "welcome"
    assert running.process.poll() is None


@needs_root
def test_a_client_cannot_bring_the_daemon_down_by_choosing_the_next_routing_id(stack: ExitStack, path: Path) -> None:
    # given a daemon whose ROUTER has made up no id yet, and a client that chose the first
    first_id = subprocess.run([sys.executable, "-c", FIRST_ID], capture_output=True, text=True, check=True).stdout
    running = Running(path, stack)
    squatter = stack.enter_context(RawPeer(str(path)))
    with suppress(EOFError):  # it may be hung up on
        squatter.shake_hands(Identity=bytes.fromhex(first_id))
        squatter.send(msgpack.packb({"op": "hello", "id": 1, "version": 1}))
        squatter.receive_frame()

    # when another comes, for whom an id is made up
    other = Client(path, stack)
    other.send("hello", version=1)

    # then it is served
    assert other.has_answer_of(running), f"the daemon ended with status {running.process.wait()}"
    assert other.receive()["op"] == "welcome"


# --- what it cannot run on -------------------------------------------------------------------------------------------


def hwbpd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "hwbpd", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=WAIT_S)


def test_bad_settings_end_it_with_status_2_and_the_field(tmp_path: Path) -> None:
    config = tmp_path / "hwbpd.toml"
    config.write_text("[limits]\nsessions = 0\n")

    result = hwbpd("--config", str(config))

    assert result.returncode == 2
    assert result.stderr.startswith(f"hwbpd: {config}: ")
    assert "$.limits.sessions" in result.stderr


def test_a_machine_that_is_not_there_ends_it_with_status_1_and_what_there_is(path: Path) -> None:
    result = hwbpd("--socket", str(path), "--machine", "pdp11")

    assert result.returncode == 1
    assert result.stderr.startswith("hwbpd: no machine 'pdp11'; installed: ")
    assert not path.exists()


def test_a_socket_that_cannot_be_made_ends_it_with_status_1_and_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    result = hwbpd("--socket", str(tmp_path / "file" / "hwbpd.sock"), "--machine", "linux")

    assert result.returncode == 1
    assert str(tmp_path / "file" / "hwbpd.sock") in result.stderr
    assert "Traceback" not in result.stderr


def test_another_daemon_on_the_socket_ends_it_with_status_1_and_its_pid(path: Path) -> None:
    with lock(path):
        result = hwbpd("--socket", str(path))

    assert result.returncode == 1
    assert result.stderr == f"hwbpd: pid {os.getpid()} serves {path} already; stop it, or give another --socket\n"
