"""
How many debug registers the CPUs of this host have, as the kernel tells tracers.

x86 has four everywhere. On Arm the number differs from one CPU to another of the same kind, and neither /proc nor sysfs
says it; ptrace does, of a stopped thread. So a child is started, stopped, asked and ended, once. The kernel tells what
it uses: on arm64 the least that any CPU of the host has, on ARMv7 without the breakpoint register that it keeps for
itself, which is added here again.

Where ptrace is refused (a container, Yama's strictest setting), nothing is known, and the numbers are None. Turned
down: to count by taking slots until the kernel refuses; what others have just then would be missing for good.

Linux, arch/arm64/kernel/ptrace.c, ptrace_hbp_get_resource_info(); arch/arm/kernel/ptrace.c, ptrace_gethbpregs();
arch/arm/kernel/hw_breakpoint.c, get_num_brps() and get_num_wrps().
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct

from hwbpd.core.model import Pool
from hwbpd.hookspecs import CpuFacts

ARMV7: Final = 3  # DBGDIDR.Version: from here on, Linux keeps one breakpoint register for stepping

_GETREGSET, _SEIZE, _INTERRUPT, _GETHBPREGS = 0x4204, 0x4206, 0x4207, 29
_HW_BREAK, _HW_WATCH = 0x402, 0x403  # NT_ARM_HW_BREAK, NT_ARM_HW_WATCH
_REGSET_BYTES: Final = 264  # struct user_hwdebug_state
_WALL: Final = 0x40000000


class Counts(Struct, frozen=True):
    """What the kernel told: how many registers there are, and how many of them it hands out."""

    breakpoints: int  # a reserved one included
    watchpoints: int
    debug_version: int
    slots: Mapping[Pool, int]


def look(architecture: str, features: frozenset[str]) -> tuple[CpuFacts, Mapping[Pool, int]]:
    """
    Return what all CPUs of this host have, and how many slots of each pool the kernel hands out on one of them.

    There are no slots in the answer where that is not known. On Arm it takes as long as starting a program does.
    """
    if architecture == "x86_64":
        return CpuFacts(architecture, features), {Pool.ANY: 4}
    reader = _READERS.get(architecture)
    counts = None if reader is None else _ask(reader)
    if counts is None:
        return CpuFacts(architecture, features), {}
    return CpuFacts(architecture, features, counts.breakpoints, counts.watchpoints, counts.debug_version), counts.slots


def from_regsets(breakpoints: int, watchpoints: int) -> Counts:
    """Return what ``dbg_info`` of the two register sets of arm64 says."""
    slots = {Pool.INST: breakpoints & 0xFF, Pool.DATA: watchpoints & 0xFF}
    return Counts(slots[Pool.INST], slots[Pool.DATA], breakpoints >> 8 & 0xFF, slots)


def from_resource_info(word: int) -> Counts:
    """Return what the pseudo-register 0 of PTRACE_GETHBPREGS says, the reserved breakpoint register added."""
    version = word >> 24
    slots = {Pool.INST: word & 0xFF, Pool.DATA: word >> 8 & 0xFF}
    return Counts(slots[Pool.INST] + (version >= ARMV7), slots[Pool.DATA], version, slots)


def _ask(reader: Callable[[int], Counts]) -> Counts | None:
    # -IS: an interpreter that loads as little as it can; it is stopped long before it reads.
    child = subprocess.Popen([sys.executable, "-IS", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        _ptrace(_SEIZE, child.pid, 0, 0)
        _ptrace(_INTERRUPT, child.pid, 0, 0)
        _, status = os.waitpid(child.pid, _WALL)
        return reader(child.pid) if os.WIFSTOPPED(status) else None
    except OSError:
        return None
    finally:
        child.kill()
        child.communicate()


def _read_regsets(pid: int) -> Counts:
    words = []
    for regset in (_HW_BREAK, _HW_WATCH):
        buffer = ctypes.create_string_buffer(_REGSET_BYTES)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), len(buffer))  # struct iovec
        _ptrace(_GETREGSET, pid, regset, ctypes.addressof(vector))
        words.append(struct.unpack_from("=I", buffer)[0])
    return from_regsets(*words)


def _read_resource_info(pid: int) -> Counts:
    word = ctypes.c_ulong()
    _ptrace(_GETHBPREGS, pid, 0, ctypes.addressof(word))
    return from_resource_info(word.value)


_READERS: Final = {"aarch64": _read_regsets, "armv7l": _read_resource_info}

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
