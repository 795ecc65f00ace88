"""
CPUs by name, for a simulated machine made of them: what of each decides about its debug registers.

All x86 CPUs have four slots; what differs is the width, the masks, the bits that came later, and where user space ends:

- ``bpext``: the address masks of all four slots, 32 bits each. CPUID Fn8000_0001_ECX[26]. AMD alone, since family 15h.
- ``rtm``: transactions, with DR7.RTM and DR6.RTM. CPUID 07H EBX[11]. Intel alone; where microcode has switched it off
  since, CPUID no longer says so, and the bits are reserved again. The profiles are the CPUs as they were sold.
- ``bus_lock_detect``: a #DB for bus locks, with DR6.BLD. CPUID 07H ECX[24].
- ``la57``: five-level paging, which Linux uses where there is any, and then user space is 2^56 bytes.

The names of the features are those of /proc/cpuinfo. Sources: AMD64 APM Vol. 3, "CPUID Fn8000_0001_ECX Feature
Identifiers" and AMD's processor programming references of the families named; Intel SDM Vol. 2A, "CPUID: CPU
Identification", and Intel's "Architecture Instruction Set Extensions Programming Reference", whose first chapter says
which CPUs brought what; Linux, Documentation/arch/x86/buslock.rst and 5level-paging.rst.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from hwbpd.hookspecs import CpuFacts


class Profile(Struct, frozen=True):
    """A CPU and what it stands for."""

    facts: CpuFacts
    stands_for: str


def _profile(stands_for: str, *features: str, architecture: str = "x86_64") -> Profile:
    return Profile(CpuFacts(architecture, frozenset(features)), stands_for)


TABLE: Mapping[str, Profile] = {
    "i686": _profile("any CPU under a 32-bit kernel: four-byte words, no LEN of 8", architecture="i686"),
    "x86-64": _profile("any 64-bit CPU without what came later, as Core 2 and Opteron"),
    "haswell": _profile("Intel from Haswell to Cascade Lake, as sold: with transactions", "rtm"),
    "ice-lake": _profile("Intel Ice Lake servers: five-level paging", "rtm", "la57"),
    "sapphire-rapids": _profile("Intel Sapphire Rapids: traps on bus locks", "rtm", "la57", "bus_lock_detect"),
    "bulldozer": _profile("AMD from family 15h to Zen 3: address masks", "bpext"),
    "zen4": _profile("AMD Zen 4: five-level paging", "bpext", "la57"),
    "zen5": _profile("AMD Zen 5: traps on bus locks", "bpext", "la57", "bus_lock_detect"),
}

PROFILES: Mapping[str, CpuFacts] = {name: profile.facts for name, profile in TABLE.items()}
