"""
A backend for the PDQ-1, a CPU that does not exist: three watchpoints, one breakpoint, and rules of its own.

It is an example of a plugin that is not part of hwbpd. control.py has the layout of the one control register, fit.py
says which slots hold a claim, and debug_unit.py what the registers do.
"""

from __future__ import annotations

from collections.abc import Sequence

from hwbpd.hookspecs import BackendFactory, CpuFacts, hookimpl
from hwbpd_pdq.fit import PdqBackend

ARCHITECTURE = "pdq"

# CPUs that people know by name, for simulated machines made of them.
PROFILES = {
    "pdq1": CpuFacts(ARCHITECTURE, breakpoints=1, watchpoints=3),
    "pdq1-lite": CpuFacts(ARCHITECTURE, breakpoints=1, watchpoints=1),
}


@hookimpl
def hwbpd_backends() -> Sequence[BackendFactory]:
    """Return the one backend of this plugin."""
    return [BackendFactory(PdqBackend.name, frozenset({ARCHITECTURE}), PdqBackend, PROFILES)]
