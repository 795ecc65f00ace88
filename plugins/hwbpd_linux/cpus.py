"""The CPUs of this host, as the kernel lists them in sysfs."""

from __future__ import annotations

from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def online_cpus() -> tuple[int, ...]:
    """The CPUs that run now, ascending."""
    return parse_cpus((_CPUS / "online").read_text())


def possible_cpus() -> tuple[int, ...]:
    """The CPUs there may ever be, ascending. The kernel's admission counts over these."""
    return parse_cpus((_CPUS / "possible").read_text())


def parse_cpus(text: str) -> tuple[int, ...]:
    """Return the CPUs of a list such as ``0-2,5``; an empty list has none. Raises ``ValueError`` for anything else."""
    cpus: list[int] = []
    for run in filter(None, text.strip().split(",")):
        first, _, last = run.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def cpu_features() -> frozenset[str]:
    """What /proc/cpuinfo says the first CPU can do: its line "flags" on x86, "Features" on Arm."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
