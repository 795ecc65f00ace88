"""
What of this host decides about breakpoints, apart from the daemon: the kernel's version, and whom it lets have what.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hwbpctl.findings import Finding, broken, note, ok

OLDEST = (6, 0)  # since then the kernel counts the hits that a ring had no room for
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def kernel(release: str | None = None) -> Finding:
    """Whether the kernel is recent enough; ``release`` as uname(1) gives it, None for this one."""
    release = release or os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    oldest = ".".join(map(str, OLDEST))
    if found and (int(found[1]), int(found[2])) >= OLDEST:
        return ok("kernel", f"{release}, and {oldest} or later is needed")
    return broken(
        "kernel",
        f"{release} cannot count hits that were lost",
        f"boot Linux {oldest} or later",
    )


def paranoia(path: Path = PARANOID) -> Finding:
    """What ``kernel.perf_event_paranoid`` means for whom. The daemon claims for others what this lets them have."""
    try:
        level = int(path.read_text())
    except FileNotFoundError:
        return broken(
            "paranoia",
            "this kernel has no perf events",
            "use a kernel with CONFIG_PERF_EVENTS and CONFIG_HAVE_HW_BREAKPOINT",
        )
    setting = f"kernel.perf_event_paranoid is {level}"
    more = "; CAP_PERFMON allows more"
    if level <= 0:
        return note(
            "paranoia",
            f"{setting}: every user may watch whole CPUs, and hits in the kernel",
            "sysctl kernel.perf_event_paranoid=2 leaves them their own threads",
        )
    if level == 1:
        return ok("paranoia", f"{setting}: users may watch their own threads, hits in the kernel included{more}")
    if level == 2:
        return ok("paranoia", f"{setting}: users may watch their own threads in user mode{more}")
    return note(
        "paranoia",
        f"{setting}: as 2 (own threads in user mode), but some distributions' kernels then refuse users everything",
        "if users are refused: sysctl kernel.perf_event_paranoid=2, or give them CAP_PERFMON",
    )
