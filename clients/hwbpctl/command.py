"""
A command that waits behind a gate until its slots are held, so that nothing of it goes unwatched.

The child is forked first and executes the command only when told, as perf does it: its thread id is known before it
runs, and stays the same over exec, and so do the breakpoints on it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

_NOT_FOUND = 127  # as shells report a command that does not exist,
_NOT_EXECUTABLE = 126  # and one that cannot be executed


class Command:
    """A child that has not been let go yet. Make it before anything that does not survive fork."""

    def __init__(self, argv: Sequence[str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        gate, self._gate = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _child(gate, self._gate, argv)
        os.close(gate)
        self.pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None

    def start(self) -> None:
        """Let it run."""
        os.write(self._gate, b"\n")

    def finish(self) -> int:
        """
        Wait for its end and return its exit status, 128 + n for signal n.

        A command that was not started ends here without having run.
        """
        if self._status is None:
            os.close(self._gate)
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self._status = code if code >= 0 else 128 - code
            os.close(self.pidfd)
        return self._status

    def terminate(self) -> None:
        """Ask it to end."""
        if self._status is None:
            os.kill(self.pid, signal.SIGTERM)


def _child(gate: int, parents_end: int, argv: Sequence[str]) -> None:
    status = _NOT_EXECUTABLE
    try:
        os.close(parents_end)
        if os.read(gate, 1):
            os.execvp(argv[0], list(argv))
        status = 0  # the gate was closed: the command is not wanted
    except FileNotFoundError:
        status = _NOT_FOUND
        os.write(2, f"hwbpctl: {argv[0]}: no such command\n".encode())
    except OSError as error:
        os.write(2, f"hwbpctl: {argv[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(status)
