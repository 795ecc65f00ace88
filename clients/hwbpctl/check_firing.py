"""
Does a breakpoint that the daemon arms really report, on every CPU?

Some hypervisors take breakpoints and never pass the debug exception on; then everything looks well and nothing is ever
seen. So three are claimed for our own thread, one after the other, and each is hit once on every CPU that is online:

1. data, user: a store into a word of ours;
2. exec, user: a call of a function;
3. data, kernel: read(2) into that word, where the kernel does the store.

A CPU that brings no hit is named. One slot is held at a time, for some milliseconds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hwbp
from hwbpctl.findings import Finding, Progress, broken, note, ok

HIT_WAIT_S = 1.0  # a hit takes a millisecond; this is for a machine that is very busy

_WORD_BYTES = 8
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class _Trial:
    name: str
    event: hwbp.Event
    hit: Callable[[], object]


def trials(client: hwbp.Client, progress: Progress) -> Iterator[Finding]:
    """Make the three trials; needs the machine to be this host."""
    if client.machine != "linux":
        yield note("firing", f"not tried: the daemon's machine is {client.machine}, and this thread is not on it")
        return
    for trial in _all_trials():
        yield _try(client, trial, progress)


def _all_trials() -> Iterator[_Trial]:
    """The trials. The function is getppid: every C library has it, it does nothing, and nobody else calls it here."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    word = ctypes.c_uint64.from_buffer(memory)
    address = ctypes.addressof(word)
    function = ctypes.CDLL(None).getppid
    entry = ctypes.cast(function, ctypes.c_void_p).value
    assert entry is not None

    def store() -> None:
        word.value += 1

    def read_into() -> None:
        reader, writer = os.pipe()
        try:
            os.write(writer, bytes(_WORD_BYTES))
            os.readv(reader, [word])
        finally:
            os.close(reader)
            os.close(writer)

    yield _Trial("data, user", hwbp.Event(address, _WORD_BYTES, "w", user=True, kernel=False), store)
    yield _Trial("exec, user", hwbp.Event(entry, None, "x", user=True, kernel=False), function)
    yield _Trial("data, kernel", hwbp.Event(address, _WORD_BYTES, "w", user=False, kernel=True), read_into)


def _try(client: hwbp.Client, trial: _Trial, progress: Progress) -> Finding:
    try:
        with client.claim(trial.event, tid=threading.get_native_id(), label="doctor") as watch:
            online = client.capabilities().cpus_online
            tried = _hit_on_each(trial, online, progress)
            seen = _seen(watch, len(tried))
            was_held = not watch.ended
    except hwbp.NoFreeSlot as refusal:
        return note(trial.name, f"not tried: {refusal}", "hwbpctl ls --foreign shows who has the slots")
    except hwbp.NotPermitted as refusal:
        return note(trial.name, f"not tried: {refusal}", "sudo hwbpctl doctor")
    except hwbp.HwbpError as refusal:
        remedy = "journalctl -u hwbpd shows the daemon's side of it"
        return broken(trial.name, f"{refusal.errno_name}: {refusal}", remedy)
    finally:
        progress("")
    return _judge(trial.name, online, tried, seen, was_held)


def _hit_on_each(trial: _Trial, cpus: Sequence[int], progress: Progress) -> list[int]:
    """Run on each CPU in turn and hit there; return those on which this thread may run."""
    may_run_on = os.sched_getaffinity(0)
    tried = []
    try:
        for cpu in cpus:
            progress(f"{trial.name}: cpu {cpu}")
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError:
                continue  # outside our cpuset
            trial.hit()
            tried.append(cpu)
    finally:
        os.sched_setaffinity(0, may_run_on)
    return tried


def _seen(watch: hwbp.Watch, most: int) -> set[int]:
    """Return the CPUs that brought a hit; waits only while some are missing."""
    seen: set[int] = set()
    for hit in watch.hits(timeout=HIT_WAIT_S):
        seen.add(hit.cpu)
        if len(seen) == most:
            break
    return seen


def _judge(name: str, online: Sequence[int], tried: Sequence[int], seen: set[int], was_held: bool) -> Finding:
    silent = [cpu for cpu in tried if cpu not in seen]
    if silent:
        more = ", though the slot was armed" if was_held else ""
        return broken(name, f"no hit came on cpu {hwbp.format_cpus(silent)}{more}", _remedy())
    fires = f"fires on cpu {hwbp.format_cpus(tried)}"
    untried = [cpu for cpu in online if cpu not in tried]
    if untried:
        return note(name, f"{fires}; not tried on cpu {hwbp.format_cpus(untried)}, where this process may not run")
    return ok(name, fires)


def _remedy() -> str:
    if "hypervisor" in _CPUINFO.read_text().split():
        return "this is a virtual machine whose hypervisor does not pass debug exceptions on: use one that does"
    return "look into the kernel log (dmesg), and whether something else writes to the debug registers"
