"""
The contracts between the daemon and its plugins.

Two hooks discover factories; each is called once, at start. What a factory returns keeps one of the Protocols below,
and the daemon talks to it directly: no hook is called while claims are served.

A plugin module implements the hooks with ``hookimpl`` and is named in the entry-point group ``hwbpd``. It may import
this module, ``hwbpd.core.model`` and ``hwbpd.core.errors``, and for register models ``hwbpd.debug_unit``,
``hwbpd.fields``, ``hwbpd.cover`` and ``hwbpd.refusals``; nothing else of the daemon, and no other plugin.
``tests/plugins/test_contract.py`` is what every backend and every machine must pass.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pluggy
from msgspec import Struct

from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Process, Span, Target, Task, Totals
from hwbpd.debug_unit import DebugUnit, Handling

hookspec = pluggy.HookspecMarker("hwbpd")
hookimpl = pluggy.HookimplMarker("hwbpd")


class CpuFacts(Struct, frozen=True):
    """
    What a machine tells a backend about the CPUs it has to serve.

    Where the counts of registers differ from one CPU to another of the same kind (Arm), ``breakpoints``,
    ``watchpoints`` and ``debug_version`` say what these have; None where nobody could ask, and the backend takes the
    least there is.
    """

    architecture: str  # as uname -m says: "x86_64", "aarch64", "armv7l"
    features: frozenset[str] = frozenset()  # as /proc/cpuinfo names them: "bpext", "la57"
    breakpoints: int | None = None  # BRPs there are, a reserved one included
    watchpoints: int | None = None  # WRPs there are
    debug_version: int | None = None  # as DBGDIDR.Version and ID_AA64DFR0_EL1.DebugVer number the architectures


@runtime_checkable
class Backend(Protocol):
    """What one architecture's debug registers can hold and mean. Pure: it touches no register."""

    name: str

    def slots(self) -> Mapping[Pool, int]:
        """How many slots each pool has on one CPU."""
        ...

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        """
        Return the fewest pieces that cover ``span``, in ascending order, and hold nothing beside it.

        With ``mode.over_report`` they may hold bytes beside it, where that saves slots.

        :raises BadClaim: when no slot can express it; the sentence names the register and the rule that is broken,
            and the nearest request that would work.
        :raises NotSupported: when other CPUs of this architecture could, and these cannot.
        """
        ...

    def debug_unit(self) -> DebugUnit | None:
        """The registers of one CPU and what they do, for a simulated machine; None where nobody has modelled them."""
        ...

    def handling(self) -> Handling | None:
        """
        What Linux does with them; None where there is no model of the registers.

        For a simulated machine; and every claim is asked ``refusal`` before it is counted, on real ones, too.
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

    ``errno`` is the kernel's; ``cpu`` and ``tid`` say which leg it refused. With EMFILE, ``needed`` descriptors were
    computed before anything was opened, and ``allowed`` may be opened.
    """

    def __init__(
        self, errno: int, *, cpu: int | None = None, tid: int | None = None, needed: int = 0, allowed: int = 0
    ) -> None:
        super().__init__(errno, cpu, tid)
        self.errno = errno
        self.cpu = cpu
        self.tid = tid
        self.needed = needed
        self.allowed = allowed


class TargetEnd(enum.StrEnum):
    """Why nothing will come from a resource any more."""

    EXIT = "exit"  # the thread, or the whole process
    EXEC = "exec"  # its addresses mean something else now


class Foreign(Struct, frozen=True):
    """
    Somebody outside this daemon who has slots, or a number of slots that nobody can be named for (``pid`` 0).

    ``evidence`` grades how it is known; ``place`` is as in ``Holder``.
    """

    pid: int
    comm: str
    uid: int
    slots: int
    place: str
    evidence: str


@runtime_checkable
class Machine(Protocol):
    """
    Where registers are. It owns every descriptor and ring, by resource id.

    ``arm`` takes the slot before it returns and ``disarm`` has given it back when it returns: the books follow.
    """

    name: str
    facts: CpuFacts  # what all its CPUs have: of what differs, the least

    def cpu_facts(self, cpu: int) -> CpuFacts:
        """What one possible CPU has, which may be more than ``facts``."""
        ...

    def notes(self) -> Sequence[str]:
        """What people should know about this machine, for ``hwbpctl caps``; often nothing."""
        ...

    def topology(self) -> Topology:
        """The CPUs there are now."""
        ...

    def topology_descriptor(self) -> int | None:
        """Becomes readable when a CPU comes or goes; ``topology_changed`` reads it empty. None if none ever does."""
        ...

    def topology_changed(self) -> None:
        """Read ``topology_descriptor`` empty."""
        ...

    def task(self, tid: int) -> Task:
        """Return the live thread with that number; raises ``TargetGone`` when there is none."""
        ...

    def process(self, pid: int) -> Process:
        """Return the live process with that number; raises ``TargetGone`` when there is none."""
        ...

    def threads(self, process: Process) -> Sequence[int]:
        """The thread ids of a process now."""
        ...

    def arm(self, resource_id: int, piece: Piece, target: Target, mode: Mode) -> None:
        """
        Take one slot on every leg of ``target`` and, unless the mode is to hold, let it report.

        All or nothing: when a leg is refused, those before it are given back first. CPU-wide on all CPUs means those
        online now. A process means its threads now, and those born later without being told.

        Unless ``mode.across_exec``, nothing is reported after an exec of the target. With ``mode.fuse_hits``, reporting
        ends by itself after so many hits and ``top_up``s, whether or not this process gets to run; a machine that
        cannot do that for a process leaves it to ``silence``.

        :raises ArmError: with the errno of the leg that was refused.
        """
        ...

    def attend(self, resource_id: int, target: Target, mode: Mode) -> None:
        """
        Take no slot on a thread, and tell of its end: ``descriptors``, ``end_of_target`` and ``disarm`` work as for a
        resource that was armed and saw nothing. The slots there are its tracer's.

        :raises ArmError: with ESRCH for a thread that is gone.
        """
        ...

    def slots_outside(self, pool: Pool, target: Target) -> int | None:
        """
        How many slots a thread has of its own that this machine did not take; None where that cannot be told.

        It looks by probing, in this very thread, and takes slots for an instant: for rare questions.
        """
        ...

    def top_up(self, resource_id: int, hits: int) -> bool:
        """Let a fused resource report so many more hits; return false if that is too late: a fuse has blown."""
        ...

    def is_fused(self, resource_id: int) -> bool:
        """Whether the resource stops by itself; if not, only ``silence`` stops it."""
        ...

    def silence(self, resource_id: int) -> None:
        """Stop reporting; the slot stays taken."""
        ...

    def rearm(self, resource_id: int, fuse_hits: int) -> None:
        """
        Let a silenced or blown resource report again, with a new fuse; its totals go on from where they were.

        :raises ArmError: when the slot had to be given up for it and could not be had again. The resource then holds
            nothing; ``disarm`` still returns its last hits and totals.
        """
        ...

    def drop_cpu(self, resource_id: int, cpu: int) -> None:
        """Give back the leg on a CPU that went offline, if there is one; its hits and totals are kept for later."""
        ...

    def add_cpu(self, resource_id: int, cpu: int) -> None:
        """
        Take a leg on a CPU that came online, for a resource that belongs there; nothing if it has one.

        :raises ArmError: when the slot could not be had; the other legs go on.
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

        They are pollable from ``arm`` to ``disarm``, or to the next ``rearm``, ``drop_cpu`` or ``add_cpu``, after which
        there are others. What a ring held before it was registered for polling is not
        announced: drain once after registering.
        """
        ...

    def drain(self, resource_id: int, budget_bytes: int) -> Batch:
        """Take at most about ``budget_bytes`` of records out of the resource's rings."""
        ...

    def end_of_target(self, resource_id: int) -> TargetEnd | None:
        """Whether, and why, nothing will come any more (None for CPU-wide resources). Asking takes nothing away."""
        ...

    def foreign(self, pool: Pool, target: Target, cpu: int | None) -> Sequence[Foreign]:
        """
        Look for slots in the way of ``target`` that are not this machine's own.

        Called in a worker thread, at most once a second; it may take a second, and tolerates everything vanishing
        while it looks. ``cpu`` says where the kernel refused, if it did. Nobody is named without evidence.
        """
        ...

    def close(self) -> None:
        """Give back everything."""
        ...


class BackendFactory(Struct, frozen=True):
    """
    A backend that can be had: for which architectures, and how to make it.

    ``profiles`` are CPUs that people know by name ("cortex-a15"), for a simulated machine made of them.
    """

    name: str
    architectures: frozenset[str]
    make: Callable[[CpuFacts], Backend]
    profiles: Mapping[str, CpuFacts] = {}


class MachineFactory(Struct, frozen=True):
    """
    A machine that can be had.

    ``make`` gets the daemon's machine settings as plain values and raises ``NotSupported``, with the remedy, where
    this host cannot be that machine. ``real`` machines have registers; ``--machine auto`` takes only those.

    For machines that are made of CPUs with a name, the options have ``backend``, which returns the backend for
    ``CpuFacts`` or raises ``NotSupported``, and ``profiles``, the ``CpuFacts`` of every name that any plugin knows.
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
