"""
What can happen in a simulated world, as values: what owners ask, what tasks do, and what goes wrong.

An act names claims by the number of the request that made them and threads by their number, so a history still makes
sense when acts are left out of it: an act whose object is not there does nothing.
"""

from __future__ import annotations

from msgspec import Struct

from hwbpd.core.model import Delivery, Kind, Pool


class World(Struct, frozen=True):
    """A machine and how its daemon is set."""

    slots: dict[Pool, int]
    cpus: int
    tasks: int
    reserve_slots: int
    rearm_after_ns: int


class Place(Struct, frozen=True, repr_omit_defaults=True):
    """A target: a thread or a process by number, or CPUs."""

    task: int | None = None
    process: int | None = None
    cpus: tuple[int, ...] | None = None


class Act(Struct, frozen=True, repr_omit_defaults=True):
    """One thing that happens."""


class Claims(Act, frozen=True):
    """An owner asks for ``pieces`` slots."""

    number: int
    owner: int
    place: Place
    pool: Pool
    pieces: int = 1
    address: int = 0
    kind: Kind = Kind.PERF
    priority: int = 0
    delivery: Delivery = Delivery.HITS
    wait_ns: int = 0
    guard_per_s: int = 0
    is_tracer: bool = False
    placeholder: bool = True


class Releases(Act, frozen=True):
    owner: int
    number: int


class Yields(Act, frozen=True):
    number: int


class Rearms(Act, frozen=True):
    number: int


class Takes(Act, frozen=True):
    """A tracer announces that it takes its slot."""

    number: int


class Pokes(Act, frozen=True):
    """It does, or tries to."""

    number: int


class SaysHow(Act, frozen=True):
    """It tells how that went."""

    number: int


class Dies(Act, frozen=True):
    """An owner's process; another with the same user takes its place."""

    owner: int


class Exits(Act, frozen=True):
    """A thread; the daemon hears of it at once, or ``late``."""

    task: int
    late: bool = False


class Execs(Act, frozen=True):
    task: int
    late: bool = False


class Starts(Act, frozen=True):
    task: int


class News(Act, frozen=True):
    """The daemon hears what it was to hear late."""


class CpuChanges(Act, frozen=True):
    cpu: int


class Steals(Act, frozen=True):
    """Somebody outside takes a slot."""

    thief: int
    place: Place
    pool: Pool


class Returns(Act, frozen=True):
    thief: int


class Refuses(Act, frozen=True):
    """The kernel refuses what it is asked for next."""

    errno: int


class Looks(Act, frozen=True):
    """One of those who look who is in the way has found out."""

    nth: int


class Hits(Act, frozen=True):
    number: int
    hits: int


class FuseBlows(Act, frozen=True):
    """The next top-up comes too late."""


class RearmFails(Act, frozen=True):
    """The next slot that is given up to be armed anew is gone."""


class Waits(Act, frozen=True):
    """Time passes."""

    ns: int
