"""
The contracts between the daemon and its plugins.

Two hooks discover factories; each is called once, at start. What a factory returns keeps one of the Protocols below,
and the daemon talks to it directly: no hook is called while claims are served.

A plugin module implements the hooks with ``hookimpl`` and is named in the entry-point group ``hwbpd``. It may import
this module, ``hwbpd.core.model`` and ``hwbpd.core.errors``; nothing else of the daemon, and no other plugin.
``tests/plugins/test_contract.py`` is what every backend and every machine must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pluggy
from msgspec import Struct

from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Span, Target, Task, Totals

hookspec = pluggy.HookspecMarker("hwbpd")
hookimpl = pluggy.HookimplMarker("hwbpd")


class CpuFacts(Struct, frozen=True):
    """What a machine tells a backend about the CPUs it has to serve."""

    architecture: str  # as uname -m says: "x86_64", "aarch64"
    features: frozenset[str] = frozenset()  # as /proc/cpuinfo names them: "bpext", "la57"


@runtime_checkable
class Backend(Protocol):
    """What one architecture's debug registers can hold and mean. Pure: it touches no register."""

    name: str

    def slots(self) -> Mapping[Pool, int]:
        """How many slots each pool has on one CPU."""
        ...

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        """
        Return the pieces that cover ``span``.

        :raises BadClaim: when no slot can express it; the sentence names the register and the rule that is broken,
            and the nearest request that would work.
        :raises NotSupported: when other CPUs of this architecture could, and these cannot.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """
        What the registers can hold, for ``hwbpctl caps``: plain values, with at least these keys.

        ``lengths``: access letters -> lengths in bytes that one slot can hold, ascending.
        ``default_lengths``: access letters -> the length of an event that names none.
        ``reports``: access letters -> "before" or "after" the access.
        ``notes``: sentences for people.
        """
        ...


class Topology(Struct, frozen=True):
    """The CPUs of a machine."""

    possible: tuple[int, ...]
    online: tuple[int, ...]


class Batch(Struct, frozen=True):
    """
    What one drain of a resource brought.

    ``records`` holds whole records, back to back, oldest first per leg, in the layout of docs/protocol.md ("Hit
    records"); ``hits`` says how many. ``lost`` counts hits that the resource's rings had no room for since the last
    drain. ``more`` is true when the budget ended before the rings were empty.
    """

    records: bytes
    hits: int
    lost: int
    more: bool


class ArmError(Exception):
    """
    The machine could not arm a resource, and has undone the legs it had armed.

    ``errno`` is the kernel's; ``cpu`` and ``tid`` say which leg it refused.
    """

    def __init__(self, errno: int, *, cpu: int | None = None, tid: int | None = None) -> None:
        super().__init__(errno, cpu, tid)
        self.errno = errno
        self.cpu = cpu
        self.tid = tid


@runtime_checkable
class Machine(Protocol):
    """
    Where registers are. It owns every descriptor and ring, by resource id.

    ``arm`` takes the slot before it returns and ``disarm`` has given it back when it returns: the books follow.
    """

    name: str
    facts: CpuFacts

    def topology(self) -> Topology:
        """The CPUs there are now."""
        ...

    def task(self, tid: int) -> Task:
        """Return the live thread with that number; raises ``TargetGone`` when there is none."""
        ...

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        """
        Take one slot on every leg of ``target`` and, unless the mode is to hold, let it report.

        All or nothing: when a leg is refused, those before it are given back first.

        :raises ArmError: with the errno of the leg that was refused.
        """
        ...

    def disarm(self, resource_id: int) -> tuple[Batch, Totals]:
        """
        Stop reporting, return what was not yet drained and the final totals, and give the slot back.

        ``Batch.more`` is false, and the hits drained over the life of the resource plus ``Totals.lost`` equal
        ``Totals.hits`` when the mode delivers hits.
        """
        ...

    def totals(self, resource_id: int) -> Totals:
        """What the resource has seen so far."""
        ...

    def descriptors(self, resource_id: int) -> Sequence[int]:
        """
        The descriptors that become readable, or hang up, when ``drain`` has something or the target is gone.

        They are pollable from ``arm`` to ``disarm``. What a ring held before it was registered for polling is not
        announced: drain once after registering.
        """
        ...

    def drain(self, resource_id: int, budget_bytes: int) -> Batch:
        """Take at most about ``budget_bytes`` of records out of the resource's rings."""
        ...

    def target_is_gone(self, resource_id: int) -> bool:
        """Whether the thread the resource is for has exited (false for CPU-wide resources)."""
        ...

    def close(self) -> None:
        """Give back everything."""
        ...


class BackendFactory(Struct, frozen=True):
    """A backend that can be had: for which architectures, and how to make it."""

    name: str
    architectures: frozenset[str]
    make: Callable[[CpuFacts], Backend]


class MachineFactory(Struct, frozen=True):
    """
    A machine that can be had.

    ``make`` gets the daemon's machine settings as plain values and raises ``NotSupported``, with the remedy, where
    this host cannot be that machine. ``real`` machines have registers; ``--machine auto`` takes only those.
    """

    name: str
    real: bool
    make: Callable[[Mapping[str, Any]], Machine]


class HookSpecs:
    """The two discovery hooks."""

    @hookspec
    def hwbpd_backends(self) -> Sequence[BackendFactory]:  # type: ignore[empty-body]
        """Return the backends this plugin brings."""

    @hookspec
    def hwbpd_machines(self) -> Sequence[MachineFactory]:  # type: ignore[empty-body]
        """Return the machines this plugin brings."""
