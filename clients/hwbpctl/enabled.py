"""
``hwbpctl enabled``: where may a breakpoint of the daemon be installed? Asked of the daemon, one request for each place.

Without a thread, the answer for a CPU is about what is CPU-wide there. With one, its own are counted, too; without a
CPU, its own only, wherever it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hwbp import Client
from hwbpctl.render import plural


@dataclass(frozen=True, slots=True)
class Place:
    """One place and what may be installed there; ``cpu`` None is wherever the thread runs, ``tid`` 0 whatever runs."""

    cpu: int | None
    tid: int
    enabled: bool
    armed: int
    held: int


def ask(client: Client, cpus: Sequence[int] | None, tid: int) -> list[Place]:
    """
    Return the answer for each CPU, or for the thread by itself; without either for every CPU that is online.

    :raises HwbpError: the first refusal.
    """
    asked: Sequence[int | None] = (None,) if tid and cpus is None else cpus or client.capabilities().cpus_online
    places = []
    for cpu in asked:
        answer = client.enabled(cpu, tid)
        places.append(Place(cpu, tid, answer.enabled, answer.armed, answer.held))
    return places


def text(places: Sequence[Place]) -> str:
    """Return a line for each place."""
    return "\n".join(_line(place) for place in places)


def _line(place: Place) -> str:
    thread = f"tid {place.tid}" if place.tid else ""
    on = "" if place.cpu is None else f"cpu {place.cpu}"
    where = " on ".join(name for name in (thread, on) if name)
    if not place.held:
        return f"{where}: none of ours"
    return f"{where}: {'yes' if place.enabled else 'none armed'}, {place.armed} of {plural(place.held, 'slot')} armed"
