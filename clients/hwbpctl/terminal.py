"""
The terminal as a screen of our own, given back as it was: at the end, on an exception, when a signal ends us, and while
we are suspended.

Keys come one by one and unechoed, but the keys that make signals still do: Ctrl-C and Ctrl-Z are what they are
elsewhere. Signals that end us only say so, and whoever waits on ``fileno`` wakes up: nothing is cut short between a
request and its reply.
"""

from __future__ import annotations

import os
import select
import signal
import termios
from types import FrameType
from typing import Self

from hwbpctl.keys import ESCAPE_S, Keys

_BEGIN = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # the other screen, no cursor, no wrapping at the edge
_END = b"\x1b[?7h\x1b[?25h\x1b[?1049l"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIZE = (80, 24)  # where nobody knows


class Terminal:
    """
    A context manager, for the main thread.

    ``ended``: it is time to stop. ``changes`` counts what makes it necessary to draw everything anew: signals may come
    at any time, so whoever draws remembers the count from before.
    """

    def __init__(self, keyboard: int = 0, screen: int = 1) -> None:
        self.ended = False
        self.changes = 0
        self._keyboard = keyboard
        self._screen = screen
        self._keys = Keys()

    def __enter__(self) -> Self:
        self._saved = termios.tcgetattr(self._keyboard)
        self._readable, self._writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._readable, select.EPOLLIN)
        self._epoll.register(self._keyboard, select.EPOLLIN)
        handlers = {
            **dict.fromkeys(_ENDING, self._end),
            signal.SIGTSTP: self._suspend,
            signal.SIGCONT: self._resume,
            signal.SIGWINCH: self._resume,
        }
        self._handlers = {each: signal.signal(each, handler) for each, handler in handlers.items()}
        self._wakeup_fd = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._give_back()
        finally:
            signal.set_wakeup_fd(self._wakeup_fd)
            for each, handler in self._handlers.items():
                signal.signal(each, handler)
            self._epoll.close()
            os.close(self._readable)
            os.close(self._writable)

    def fileno(self) -> int:
        """The descriptor that becomes readable when a key was pressed or a signal came."""
        return self._epoll.fileno()

    def size(self) -> tuple[int, int]:
        """Return columns and lines."""
        try:
            columns, lines = os.get_terminal_size(self._screen)
        except OSError:
            return _SIZE
        return (columns, lines) if columns and lines else _SIZE

    def wait(self, timeout_s: float) -> None:
        """Wait for a key or a signal."""
        self._epoll.poll(timeout_s)

    def pressed(self) -> list[str]:
        """Return the keys that were pressed; waits only to tell the escape key from the beginning of another."""
        keys: list[str] = []
        timeout_s = 0.0
        while ready := [fd for fd, _ in self._epoll.poll(timeout_s)]:
            if self._readable in ready:
                os.read(self._readable, 4096)
            if self._keyboard in ready:
                try:
                    pressed = os.read(self._keyboard, 4096)
                except OSError:  # EIO: the terminal is gone
                    pressed = b""
                if not pressed:
                    self.ended = True
                    return keys
                keys += self._keys.feed(pressed)
            timeout_s = ESCAPE_S if self._keys.is_waiting else 0.0
        return keys + self._keys.flush()

    def draw(self, lines: list[str]) -> None:
        """Show these lines, which fit the size, in place of what is there."""
        # Each line is cleared before it is written: after a full one the cursor is still in its last column.
        body = "\r\n".join(f"\x1b[2K{line}" for line in lines)
        self._write(f"\x1b[?2026h\x1b[H{body}\x1b[0m\x1b[J\x1b[?2026l".encode())

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._screen, data) :]
        except OSError:
            self.ended = True

    def _take(self) -> None:
        mode = termios.tcgetattr(self._keyboard)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._keyboard, termios.TCSANOW, mode)
        self._write(_BEGIN)
        self.changes += 1

    def _give_back(self) -> None:
        self._write(_END)
        try:
            termios.tcsetattr(self._keyboard, termios.TCSANOW, self._saved)
        except termios.error:
            self.ended = True  # it is gone

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self.ended = True

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # here we stop, and go on once the shell says so
        signal.signal(signal.SIGTSTP, self._suspend)
        self._retake()  # also where the kernel did not stop us, as nobody could make us go on

    def _resume(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGCONT:
            self._retake()  # whoever had the terminal meanwhile may have left it otherwise
        self.changes += 1

    def _retake(self) -> None:
        try:
            self._take()
        except termios.error:
            self.ended = True
