"""Tells a thread from a later one with the same number: by the clock tick at which it started."""

from __future__ import annotations

from hwbpd.core.errors import TargetGone
from hwbpd.core.model import Task

_STATE, _START = 3, 22  # fields of /proc/TID/stat, counted from one as proc(5) does
_DEAD = "ZXx"


def find(tid: int) -> Task:
    """Return the live thread with that number; raises ``TargetGone`` when there is none, or it is exiting."""
    try:
        with open(f"/proc/{tid}/stat", "rb", buffering=0) as file:
            stat = file.read().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGone(f"there is no thread {tid}") from None
    state, start_ticks = parse(stat)
    if state in _DEAD:
        raise TargetGone(f"thread {tid} has exited")
    return Task(tid, start_ticks)


def parse(stat: str) -> tuple[str, int]:
    """
    Return state and start time, in clock ticks since boot.

    The name, field 2, is in parentheses and may hold any of them itself: the last one closes it.
    """
    fields = stat[stat.rindex(")") + 1 :].split()
    return fields[_STATE - 3], int(fields[_START - 3])
