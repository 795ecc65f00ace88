"""The Arm backends: breakpoint and watchpoint registers of arm64, and of ARMv7 as a 32-bit kernel has them."""

from __future__ import annotations

from collections.abc import Sequence

from hwbpd.hookspecs import BackendFactory, hookimpl
from hwbpd_arm.fit import Arm64Backend, Armv7Backend
from hwbpd_arm.profiles import ARM64, ARMV7

# As uname -m says; a 32-bit kernel on Armv8 says armv8l.
ARM64_ARCHITECTURES = frozenset({"aarch64"})
ARMV7_ARCHITECTURES = frozenset({"armv7l", "armv8l"})


@hookimpl
def hwbpd_backends() -> Sequence[BackendFactory]:
    """Return both backends of this plugin."""
    return [
        BackendFactory(Arm64Backend.name, ARM64_ARCHITECTURES, Arm64Backend, ARM64),
        BackendFactory(Armv7Backend.name, ARMV7_ARCHITECTURES, Armv7Backend, ARMV7),
    ]
