"""The x86 backend: four debug registers, DR0 to DR3, each good for a breakpoint or a watchpoint."""

from __future__ import annotations

from collections.abc import Sequence

from hwbpd.hookspecs import BackendFactory, hookimpl
from hwbpd_x86.fit import X86Backend
from hwbpd_x86.profiles import PROFILES

ARCHITECTURES = frozenset({"x86_64", "i386", "i486", "i586", "i686"})


@hookimpl
def hwbpd_backends() -> Sequence[BackendFactory]:
    """Return the one backend of this plugin."""
    return [BackendFactory(name=X86Backend.name, architectures=ARCHITECTURES, make=X86Backend, profiles=PROFILES)]
