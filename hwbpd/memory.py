"""
Bounds what the transport may keep of messages that never end.

libzmq bounds the size of a frame and the number of messages, but of frames that announce one more it keeps any number,
and tells nobody before the last. So the daemon's own resident memory is looked at twenty times a second, in a thread,
because nothing else wakes the daemon then; beyond the bound every user other than root is hung up on, which frees what
they had sent.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading

LOOK_EVERY_S = 0.05


class MemoryWatch:
    """``fileno`` becomes readable when the daemon has more than ``bytes_max`` resident."""

    def __init__(self, bytes_max: int) -> None:
        self._pages_max = bytes_max // mmap.PAGESIZE
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="memory", daemon=True).start()

    def fileno(self) -> int:
        return self._fd

    def was_exceeded(self) -> bool:
        """Whether the bound was passed since this was last asked."""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self._fd) > 0
        return False

    def close(self) -> None:
        """Let the thread end."""
        self._closing.set()

    def _watch(self) -> None:
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            while not self._closing.wait(LOOK_EVERY_S):
                if int(os.pread(statm.fileno(), 128, 0).split()[1]) > self._pages_max:
                    os.eventfd_write(self._fd, 1)
