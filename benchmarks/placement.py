"""
Which CPU runs what.

Left to the scheduler, one and the same echo takes 60 us in one run and 120 us in the next, for as long as its
processes happen to stay where they are, and the daemon meets another fate than its floor. So the client stays on one
CPU and every server, the daemon as well as the floors, on another; where there is one CPU only, all share it. Where
more than two processes take part, as with hits, the scheduler keeps its say.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

ANY_CPUS = frozenset(os.sched_getaffinity(0))
CLIENT_CPUS = frozenset({min(ANY_CPUS)})
SERVER_CPUS = frozenset({max(ANY_CPUS)})


@contextlib.contextmanager
def on(cpus: frozenset[int]) -> Iterator[None]:
    """What this thread starts meanwhile, threads and processes, stays on these CPUs, and so does it itself."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
