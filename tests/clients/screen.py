"""
A program on a terminal: a pseudo terminal that is its controlling one, so that Ctrl-C, Ctrl-Z and a new size reach it
as they do elsewhere. What a test waits for is a frame, never a length of time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
WAIT_S = 20.0  # for what takes milliseconds, on a machine that is busy with something else
TOP = [sys.executable, "-m", "hwbpctl"]

Frame = list[str]
_FRAME = re.compile(r"\x1b\[\?2026h\x1b\[H(.*?)\x1b\[\?2026l", re.DOTALL)
_STYLE = re.compile(r"\x1b\[[0-9;]*[mK]|\x1b\[J|\r")


def environment(**more: str) -> Mapping[str, str]:
    path = os.pathsep.join([str(ROOT / "clients"), str(ROOT)])
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return inherited | {"PYTHONPATH": path, "TERM": "xterm-256color"} | more


class Screen:
    """A program and what it has written to its terminal."""

    def __init__(self, argv: Sequence[str], columns: int, lines: int) -> None:
        self._master, self._slave = os.openpty()
        self.resize(columns, lines)
        self.mode = termios.tcgetattr(self._slave)
        self.written = ""
        self.process = subprocess.Popen(
            argv,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=environment(),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, is_there: Callable[[str], bool]) -> str:
        """Read until what was written is as it should be; return it."""
        deadline = time.monotonic() + WAIT_S
        while not is_there(self.written):
            left_s = deadline - time.monotonic()
            assert left_s > 0, "\n".join(["it did not come, but", *self.frame(), repr(self.written[-500:])])
            if select.select([self._master], [], [], left_s)[0]:
                self.written += os.read(self._master, 65536).decode(errors="replace")
        return self.written

    def shows(self, *texts: str) -> Frame:
        """Wait for a frame with all of these; return its lines."""
        self.until(lambda _: all(text in "\n".join(self.frame()) for text in texts))
        return self.frame()

    def frame(self) -> Frame:
        """The last frame that was drawn, without styles; nothing where none was."""
        frames = _FRAME.findall(self.written)
        return [_STYLE.sub("", line) for line in frames[-1].split("\n")] if frames else []

    def end(self) -> int:
        """Wait for its end; return its status."""
        status = self.process.wait(WAIT_S)
        while select.select([self._master], [], [], 0)[0]:
            self.written += os.read(self._master, 65536).decode(errors="replace")
        return status

    @property
    def is_as_before(self) -> bool:
        """Whether the terminal is in the mode in which the program got it, with its own screen and its cursor."""
        last = {mark: self.written.rfind(f"\x1b[?{mark}") for mark in ("1049h", "1049l", "25h", "25l", "7h", "7l")}
        given_back = last["1049l"] > last["1049h"] and last["25h"] > last["25l"] and last["7h"] > last["7l"]
        return given_back and termios.tcgetattr(self._slave) == self.mode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@contextlib.contextmanager
def top_on(
    socket: Path, *words: str, columns: int = 80, lines: int = 24, before: Sequence[str] = ()
) -> Iterator[Screen]:
    """``hwbpctl top`` on a terminal."""
    screen = Screen([*before, *TOP, "--socket", str(socket), "top", *words], columns, lines)
    try:
        yield screen
    finally:
        screen.close()
