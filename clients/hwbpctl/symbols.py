"""
Names for what a hit brings as numbers: the command of a thread, the file or kernel function of an address.

Read from /proc while the process lives; what cannot be read is left out. User addresses become file and offset in the
file, as symbol tables of programs are not read here; kernel addresses become function and offset.
"""

from __future__ import annotations

import bisect
import os
from dataclasses import dataclass
from pathlib import Path

_ENTRIES_MAX = 4096  # processes and threads remembered between two calls of forget


@dataclass(frozen=True, slots=True)
class _Mapping:
    start: int
    end: int
    offset: int  # of ``start`` in the file
    path: str


PROC = Path("/proc")
NOWHERE = Path(os.devnull)  # for a simulated machine: its numbers are not those of this host's threads


class Symbols:
    """Looks names up, and remembers them until ``forget``."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._comms: dict[int, str] = {}
        self._mappings: dict[int, list[_Mapping]] = {}
        self._kernel: tuple[list[int], list[str]] | None = None

    def forget(self) -> None:
        """Forget what changes when processes run: names and mappings."""
        self._comms.clear()
        self._mappings.clear()

    def comm(self, tid: int) -> str:
        """Return the command of a thread, ``?`` when it is gone."""
        if tid not in self._comms:
            if len(self._comms) >= _ENTRIES_MAX:
                self._comms.clear()
            try:
                self._comms[tid] = (self._proc / str(tid) / "comm").read_text(errors="replace").strip()
            except OSError:
                self._comms[tid] = "?"
        return self._comms[tid]

    def where(self, pid: int, ip: int, in_kernel: bool) -> str:
        """Return ``/usr/bin/program+0x1136`` or ``vfs_read+0x42``, or nothing when it is not known."""
        return self._kernel_where(ip) if in_kernel else self._user_where(pid, ip)

    def _user_where(self, pid: int, ip: int) -> str:
        if pid not in self._mappings:
            if len(self._mappings) >= _ENTRIES_MAX:
                self._mappings.clear()
            self._mappings[pid] = self._read_mappings(pid)
        mappings = self._mappings[pid]
        index = bisect.bisect_right(mappings, ip, key=lambda mapping: mapping.start) - 1
        if index < 0 or ip >= mappings[index].end or not mappings[index].path:
            return ""
        mapping = mappings[index]
        return f"{mapping.path}+{ip - mapping.start + mapping.offset:#x}"

    def _read_mappings(self, pid: int) -> list[_Mapping]:
        try:
            lines = (self._proc / str(pid) / "maps").read_text(errors="replace").splitlines()
        except OSError:
            return []
        mappings = []
        for line in lines:  # start-end perms offset dev inode path
            span, _, offset, _, _, *path = line.split(maxsplit=5)
            start, _, end = span.partition("-")
            mappings.append(_Mapping(int(start, 16), int(end, 16), int(offset, 16), path[0] if path else ""))
        return mappings

    def _kernel_where(self, ip: int) -> str:
        if self._kernel is None:
            self._kernel = self._read_kernel()
        addresses, names = self._kernel
        index = bisect.bisect_right(addresses, ip) - 1
        return "" if index < 0 else f"{names[index]}+{ip - addresses[index]:#x}"

    def _read_kernel(self) -> tuple[list[int], list[str]]:
        functions = []
        try:
            with (self._proc / "kallsyms").open(errors="replace") as lines:
                for line in lines:  # address type name [module]
                    address, kind, name, *_ = line.split()
                    if kind in "tTwW" and (start := int(address, 16)):  # zeros: the kernel does not tell us
                        functions.append((start, name))
        except OSError:
            pass
        functions.sort()
        return [start for start, _ in functions], [name for _, name in functions]
