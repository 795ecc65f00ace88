"""
A daemon of one's own, as its users have it: a process that listens on a socket and logs what it decides.

What a test waits for is a line of its log, never a length of time. At the end it must stop when asked to, with status
0, and must have logged neither an error nor anything that is not a line of JSON, such as a traceback: a test that
passes on a daemon in trouble has not passed.

Beside it stands a second opinion on the slots: the kernel's, by a probe that shares no line with the daemon, and the
daemon's own books in the same form.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pytest

import hwbp
from hwbpd_linux.cpus import online_cpus
from tests.hardware.common import WATCHPOINT_POOL
from tests.judges.opener import PERF_EVENT_OPEN, KernelOpener

# For what takes milliseconds, on a machine that is busy with something else; an emulated one needs more.
WAIT_S = 20.0 * float(os.environ.get("HWBPD_TEST_PATIENCE", "1"))
LINES_SHOWN = 30  # of the log, when something goes wrong

# Where watchpoints are. Both kinds of CPU have four: x86 in all, and Arm's of QEMU beside those for breakpoints.
POOL = WATCHPOINT_POOL.value
WATCHPOINTS = 4

Line = dict[str, Any]

# Settings under which clients take the one or the other; as the daemon comes, SEQPACKET where the kernel is up to it.
TRANSPORTS = {"seqpacket": "", "zmq": "fast_socket = false"}

MARKS = [
    pytest.mark.hardware,
    pytest.mark.skipif(os.uname().machine not in PERF_EVENT_OPEN, reason="the probe of slots knows 64-bit x86 and Arm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="taking slots of whole CPUs takes root: run the tests as root"),
]


class Daemon:
    """
    ``python -m hwbpd`` on a socket in a new directory, which everybody may enter.

    :param settings: what its settings file says, TOML. There always is a file, so the one of this host is not read.
        Without a table ``policy`` there is no reserve: most tests want every slot.
    """

    def __init__(self, settings: str = "") -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="hwbpd-"))
        self._folder.chmod(0o755)
        self.socket = self._folder / "hwbpd.sock"
        self.command = [sys.executable, "-m", "hwbpd", "--socket", str(self.socket), "--log-format", "json"]
        self.command += ["--config", str(self._folder / "hwbpd.toml")]
        if "[policy]" not in settings:
            settings += "\n[policy]\nreserve_slots = 0\n"
        (self._folder / "hwbpd.toml").write_text(settings)
        self.log: list[Line] = []
        self.unreadable: list[str] = []  # what it said that is not a line of its log
        self._news = threading.Condition()
        self._said_all = True
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        """Start it, with an empty log, and return when it serves."""
        assert self._process is None, "it runs already"
        self.log, self.unreadable, self._said_all = [], [], False
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
        self._reader.start()
        self.logged("ready")
        self.connect("is it ready?").close()

    def connect(self, name: str = "a test") -> hwbp.Client:
        """Open a session with it."""
        return hwbp.connect(self.socket, name, timeout=WAIT_S)

    def logged(self, event: str, **fields: Any) -> Line:
        """
        Wait for a line of the log that is about ``event`` and has these fields; return the first, old or new.

        :raises AssertionError: when it does not come, or the daemon ends without it.
        """
        wanted = {"event": event, **fields}

        def found() -> Line | None:
            return next((line for line in self.log if wanted.items() <= line.items()), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._said_all, WAIT_S)
            line = found()
        assert line is not None, f"the daemon did not log {wanted}:\n{self.said()}"
        return line

    def stop(self) -> int:
        """
        Ask it to stop, as an init system does; return its exit status.

        :raises AssertionError: when it has to be killed.
        """
        assert self._process is not None, "it does not run"
        self._process.terminate()
        try:
            status = self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the daemon did not stop within {WAIT_S:.0f} s:\n{self.said()}") from None
        self._gone()
        return status

    def kill(self) -> None:
        """End it without warning, and return when it is gone."""
        assert self._process is not None, "it does not run"
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(WAIT_S)
        self._gone()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile it does nothing, as on a machine that is busy or suspended."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def said(self) -> str:
        """The end of what it said, for people."""
        lines = [json.dumps(line) for line in self.log[-LINES_SHOWN:]]
        return "\n".join([*lines, *self.unreadable[-LINES_SHOWN:]])

    def _read(self, output: IO[str]) -> None:
        for text in output:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            with self._news:
                if isinstance(line, dict):
                    self.log.append(line)
                else:
                    self.unreadable.append(text.rstrip())
                self._news.notify_all()
        with self._news:
            self._said_all = True
            self._news.notify_all()

    def _gone(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._reader.join()
        self._process.stdout.close()
        self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            status = 0 if self._process is None else self.stop()
            complaints = [line for line in self.log if line.get("level") in ("error", "critical")]
            in_order = (status, complaints, self.unreadable) == (0, [], [])
            if error is None:
                assert in_order, f"the daemon ended with status {status} and said:\n{self.said()}"
            else:
                print(f"--- the daemon said ---\n{self.said()}")
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._folder)


def lines_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    """
    Return what a process says until it says the line ``wanted``, which comes last.

    :raises AssertionError: when it ends without, or takes too long, which ends it.
    """
    assert process.stdout is not None
    lines: list[str] = []
    too_late = threading.Timer(WAIT_S, process.kill)
    too_late.start()
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if lines[-1] == wanted:
                return lines
    finally:
        too_late.cancel()
    raise AssertionError(f"{process.args!r} did not say {wanted!r}, but:\n" + "\n".join(lines))


def kernel_room(tid: int = -1, cpu: int = -1) -> int:
    """
    Return how many watchpoints the kernel has left, by opening events until it refuses one.

    :param tid: of this thread, or -1 for CPU-wide ones; :param cpu: on this CPU, or -1 for wherever the thread runs.
    """
    opener = KernelOpener()
    held: list[int] = []
    try:
        while True:
            held.append(opener.open(tid, cpu))
    except OSError as refusal:
        if refusal.errno != errno.ENOSPC:
            raise
        return len(held)
    finally:
        for event in held:
            opener.close(event)


@contextmanager
def outside(slots: int, tid: int = -1, cpu: int = -1) -> Iterator[None]:
    """Somebody holds so many slots without asking the daemon."""
    opener = KernelOpener()
    with ExitStack() as held:
        for _ in range(slots):
            held.callback(opener.close, opener.open(tid, cpu))
        yield


def kernel_free() -> dict[int, int]:
    """How many CPU-wide slots the kernel has left, by CPU."""
    return {cpu: kernel_room(cpu=cpu) for cpu in online_cpus()}


def books_free(client: hwbp.Client) -> dict[int, int]:
    """How many CPU-wide slots are left by the daemon's books, by CPU."""
    slots = client.slots()
    return {
        row.cpu: slots.pools[POOL] - row.cpu_wide[POOL] - row.busiest_task[POOL] for row in slots.cpus if row.online
    }


def all_free() -> dict[int, int]:
    """What ``kernel_free`` says when nobody holds anything."""
    return dict.fromkeys(online_cpus(), WATCHPOINTS)


def own_name() -> str:
    """This process as a holder is named."""
    return f"{Path('/proc/self/comm').read_text().strip()}[{os.getpid()}]"
