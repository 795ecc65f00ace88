"""
May this peer have that breakpoint of a simulated machine?

The running kernel cannot be asked: the thread numbers are not its threads'. So this decides as a kernel with default
settings would (``kernel.perf_event_paranoid`` at 2), if the simulated processes were the daemon's own:

1. Whoever has CAP_PERFMON may have everything but kernel addresses, which take CAP_SYS_ADMIN; that one does for all.
2. A process with the daemon's ids may have the simulated threads, and hits in user mode.
3. Nobody else may have anything.

A peer as mighty as the daemon is not asked about (``rights.py``). A seccomp filter does not matter: no call is made.

perf_event_open(2); capabilities(7).
"""

from __future__ import annotations

import os

from hwbpd.core.errors import NotPermitted
from hwbpd.credentials import Credentials
from hwbpd.warden import Question

CAP_SYS_ADMIN, CAP_PERFMON = 21, 38


class SimulatedPermission:
    """Keeps ``hwbpd.warden.Permission`` without a process of its own."""

    def __init__(self) -> None:
        self._uids, self._gids = os.getresuid(), os.getresgid()

    def check(self, credentials: Credentials, question: Question) -> None:
        """See ``Permission``. Threads and CPUs are not looked at: the machine refuses those that are not there."""
        if question.kernel_address and not _has(credentials, CAP_SYS_ADMIN):
            raise NotPermitted("a breakpoint on a simulated kernel address takes CAP_SYS_ADMIN")
        if _has(credentials, CAP_SYS_ADMIN) or _has(credentials, CAP_PERFMON):
            return
        if question.kernel:
            raise NotPermitted("seeing hits in the simulated kernel takes CAP_PERFMON; ask for hits in user mode only")
        if not question.tid:
            raise NotPermitted("a CPU-wide breakpoint of the simulated machine takes CAP_PERFMON; ask for a thread")
        if (credentials.uids, credentials.gids) != (self._uids, self._gids):
            raise NotPermitted(
                f"the simulated threads belong to uid {self._uids[1]}, gid {self._gids[1]}, and you are uid "
                f"{credentials.uid}, gid {credentials.gid}; CAP_PERFMON would do"
            )


def _has(credentials: Credentials, capability: int) -> bool:
    return credentials.in_our_user_namespace and bool(credentials.effective >> capability & 1)
