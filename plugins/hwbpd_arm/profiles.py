"""
CPUs by name, for simulated machines made of them, each with the source of its numbers.

``breakpoints`` counts all BRPs; how many of them Linux hands out is linux.py's. The Technical Reference Manuals (TRM)
of Arm give the numbers under "Debug ID Register" or "AArch64 Debug Feature Register 0, EL1". Where a number is only
commonly reported, and nobody here has looked it up, the source says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from hwbpd.hookspecs import CpuFacts
from hwbpd_arm.identification import REGISTERS_MAX, DebugVersion


class Profile(Struct, frozen=True):
    """A CPU, and where its numbers are from."""

    facts: CpuFacts
    source: str


def _arm64(breakpoints: int, watchpoints: int, version: DebugVersion | None, source: str) -> Profile:
    return Profile(CpuFacts("aarch64", frozenset(), breakpoints, watchpoints, version), source)


def _armv7(breakpoints: int, watchpoints: int, version: DebugVersion, source: str) -> Profile:
    return Profile(CpuFacts("armv7l", frozenset(), breakpoints, watchpoints, version), source)


_A_PROFILE = "Arm Architecture Reference Manual for A-profile"
_V7 = "Arm Architecture Reference Manual, ARMv7-A and ARMv7-R edition"

ARM64_TABLE: Mapping[str, Profile] = {
    "cortex-a53": _arm64(6, 4, DebugVersion.V8, 'Cortex-A53 MPCore TRM, "AArch64 Debug Feature Register 0, EL1"'),
    "cortex-a57": _arm64(
        6, 4, DebugVersion.V8, 'Cortex-A57 MPCore TRM, "AArch64 Debug Feature Register 0, EL1"; QEMU\'s model of it'
    ),
    "cortex-a72": _arm64(6, 4, DebugVersion.V8, "QEMU's model of it, and commonly reported"),
    "cortex-a76": _arm64(6, 4, DebugVersion.V8_2, 'Cortex-A76 Core TRM, "ID_AA64DFR0_EL1"'),
    "neoverse-n1": _arm64(6, 4, DebugVersion.V8_2, '"Breakpoints and watchpoints" of its TRM; QEMU\'s model of it'),
    "apple-silicon": _arm64(
        6, 4, None, "commonly reported: sysctl hw.optional.breakpoint and hw.optional.watchpoint of macOS"
    ),
    "arm64-max": _arm64(REGISTERS_MAX, REGISTERS_MAX, DebugVersion.V8_9, f"{_A_PROFILE}, the most without banks"),
    "arm64-min": _arm64(2, 2, DebugVersion.V8, f"{_A_PROFILE}, the least"),
}

ARMV7_TABLE: Mapping[str, Profile] = {
    "cortex-a5": _armv7(
        3, 2, DebugVersion.V7, "commonly reported; DBGDIDR of the Cortex-A5 TRM has not been looked up by us"
    ),
    "cortex-a7": _armv7(6, 4, DebugVersion.V7_1, 'Cortex-A7 MPCore TRM, "Breakpoints and watchpoints"'),
    "cortex-a9": _armv7(
        6, 4, DebugVersion.V7, 'Cortex-A9 TRM, "Breakpoint Value Registers" and "Watchpoint Value Registers"'
    ),
    "cortex-a15": _armv7(
        6, 4, DebugVersion.V7_1, 'Cortex-A15 MPCore TRM, "Breakpoint Value Registers"; Linux reports 5 (+1) and 4'
    ),
    "armv7-max": _armv7(REGISTERS_MAX, REGISTERS_MAX, DebugVersion.V7_1, f"{_V7}, the most"),
}

ARM64: Mapping[str, CpuFacts] = {name: profile.facts for name, profile in ARM64_TABLE.items()}
ARMV7: Mapping[str, CpuFacts] = {name: profile.facts for name, profile in ARMV7_TABLE.items()}
