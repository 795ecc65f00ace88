"""Real tasks that do nothing: threads of processes of their own, which end with whoever asked for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

THREADS_EACH = 2  # so that two tasks of one process are among them: the kernel counts threads

# The second thread sleeps for ever; the first until its standard input closes, which ends the process.
_SLEEP = """
import sys, threading
second = threading.Thread(target=threading.Event().wait, daemon=True)
second.start()
print(threading.get_native_id(), second.native_id, flush=True)
sys.stdin.read()
"""


@contextmanager
def sleepers(processes: int = 2) -> Iterator[tuple[int, ...]]:
    """Start that many processes; give the thread ids of all of their threads."""
    with ExitStack() as started:
        tids: list[int] = []
        for _ in range(processes):
            process = started.enter_context(
                subprocess.Popen([sys.executable, "-c", _SLEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            assert process.stdout is not None
            tids += map(int, process.stdout.readline().split())
        assert len(tids) == processes * THREADS_EACH
        yield tuple(tids)
