"""
What this host lacks for real breakpoints, found by trying.

Nothing is deduced from versions or settings: paranoia levels, capabilities, seccomp filters, hypervisors and kernels
each refuse in their own way, and some accept and then never report. So one breakpoint is opened, armed and hit, and
only what goes wrong is looked into.
"""

from __future__ import annotations

import errno
import os

from hwbpd_linux import perf_event
from hwbpd_linux.cpus import online_cpus

_WRITE = 2  # HW_BREAKPOINT_W
_WORD_BYTES = 8

NO_PERF = "this kernel has no perf_event_open for this program: it needs CONFIG_PERF_EVENTS, on 64-bit x86 or Arm"
NO_BREAKPOINTS = (
    "this kernel offers no hardware breakpoints: it needs CONFIG_HAVE_HW_BREAKPOINT, and a CPU or hypervisor that "
    "provides debug registers"
)
NOT_PERMITTED = (
    "this process may not open breakpoints on a whole CPU: run it as root, or give it CAP_PERFMON, and CAP_SYS_ADMIN "
    "for kernel addresses"
)
NOT_PERMITTED_ROOT = (
    "perf_event_open is refused although this process is root: in a container, allow the call in its seccomp profile "
    "and add CAP_PERFMON, or run on the host"
)
TOO_OLD = "this kernel cannot count lost hits: hwbpd needs Linux 6.0 or later"
NEVER_FIRES = (
    "the kernel accepts breakpoints here, and they never report: the hypervisor does not pass debug exceptions on; "
    "use a host, or a virtual machine, that does"
)
NO_ATOMIC = "on Arm, reading rings needs the memory fence of libatomic: install it (libatomic1 on Debian and Ubuntu)"


def what_is_missing() -> str | None:
    """Return a sentence that says what this host lacks and how to get it, or ``None`` when breakpoints work."""
    if perf_event.FENCE_IS_NEEDED and perf_event.fence is None:
        return NO_ATOMIC
    address, word = perf_event.own_word()
    cpu = online_cpus()[0]
    try:
        fd = perf_event.open_breakpoint(address, _WORD_BYTES, _WRITE, tid=-1, cpu=cpu)
    except OSError as refusal:
        return _explain(refusal.errno, address, cpu)
    os.close(fd)
    try:
        fd = perf_event.open_breakpoint(address, _WORD_BYTES, _WRITE, tid=0, cpu=-1)
    except OSError as refusal:
        return _explain(refusal.errno, address, cpu)
    try:
        perf_event.enable(fd)
        word[0] = 1
        perf_event.disable(fd)
        return None if perf_event.read_counts(fd).hits == 1 else NEVER_FIRES
    finally:
        os.close(fd)


def _explain(number: int | None, address: int, cpu: int) -> str | None:
    match number:
        case errno.ENOSPC:
            return None  # every slot is taken, so there are slots
        case errno.ENOSYS:
            return NO_PERF
        case errno.EACCES | errno.EPERM:
            return NOT_PERMITTED if os.geteuid() != 0 else NOT_PERMITTED_ROOT
        case errno.EINVAL if _works_without_lost(address, cpu):
            return TOO_OLD
        case errno.ENOENT | errno.ENODEV | errno.EOPNOTSUPP | errno.EINVAL:
            return NO_BREAKPOINTS
        case _:
            return f"perf_event_open refuses a breakpoint: {os.strerror(number or 0)}"


def _works_without_lost(address: int, cpu: int) -> bool:
    try:
        fd = perf_event.open_breakpoint(address, _WORD_BYTES, _WRITE, tid=-1, cpu=cpu, read_lost=False)
    except OSError as refusal:
        return refusal.errno == errno.ENOSPC
    os.close(fd)
    return True
