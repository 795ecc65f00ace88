"""
What the daemon answers, as values. The fields carry the names of docs/protocol.md.

Fields that this library does not know are left out: a later daemon may send more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeVar

from hwbp.errors import BadMessage, Holder, HwbpError

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one slot holds."""

    address: int
    length: int
    access: str
    pool: str


@dataclass(frozen=True, slots=True)
class Counts:
    """
    What became of the hits of a claim.

    At its end, if it delivers hits, ``hits = delivered + lost + dropped + filtered``.
    """

    hits: int  # as the kernel counted them
    delivered: int  # sent to this session
    lost: int  # for which the ring had no room
    dropped: int  # for which the way to this client had none
    filtered: int = 0  # of other processes than the one a claim was limited to


@dataclass(frozen=True, slots=True)
class Fit:
    """
    Whether a claim would fit now: the pieces its slots would hold, and the refusal it would get if not.

    ``first``: where it fits once others have given way, who they are, for people; else empty.
    """

    fits: bool
    pieces: tuple[Piece, ...]
    refusal: HwbpError | None = None
    first: str = ""
    over_reported: int = 0  # bytes beside the span whose accesses are reported, too


@dataclass(frozen=True, slots=True)
class Plan:
    """Which slots an event takes, whoever has them now; ``slots`` and ``pools`` are by the pool's name."""

    pieces: tuple[Piece, ...]
    slots: Mapping[str, int]  # how many it takes
    pools: Mapping[str, int]  # how many every CPU has
    over_reported: int = 0  # bytes beside the span whose accesses are reported, too


@dataclass(frozen=True, slots=True)
class PoolsRow:
    """CPUs that have the same number of slots."""

    cpus: tuple[int, ...]
    pools: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Enabled:
    """What the daemon has on a CPU, for a thread, or for both: ``held`` slots, of which ``armed`` may trap."""

    enabled: bool  # whether any is armed
    armed: int
    held: int


@dataclass(frozen=True, slots=True)
class Change:
    """
    What happened to a claim that goes on.

    ``what``:

    - "guarded": too many hits; it keeps its slot and reports nothing until it is armed again;
    - "revoke": somebody of a higher rank needs the room, and takes it at ``deadline_ns``, or when the owner gives way;
      "spared": not any more;
    - "suspended": it has given way, and waits in its old place; with ``cpu``, that CPU is back and has no room for it;
    - "resumed": it has its slots and reports again; with ``cpu``, on that CPU, which is back;
    - "offline": the CPU went offline, and the slot there with it;
    - "contended": somebody was refused, or waits, because of it;
    - "loaded": of a claim on a vCPU: its VMM has it in force from the next entry on;
    - "foreign": who outside hwbpd took the slot that its tracer was about to take, as far as could be found out.

    ``holders``: whom it is about: who wants the room, or who took it.
    """

    what: str
    sentence: str
    cpu: int | None = None
    holders: tuple[Holder, ...] = ()
    deadline_ns: int = 0  # of a "revoke", CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True)
class Ended:
    """
    Why a claim is over.

    ``reason``: "released", "exit" (the thread or process exited), "exec" (it runs another program), "forced" (an
    operator released it), "stolen" (somebody took its slot while it was armed again), "timeout" (it has waited in
    vain), "refused" (it has waited, and then could not be armed), "take failed" (its tracer could not take the slot),
    "reused" (another tracer has the slot that it left behind), "closing" (the daemon ended the session), "stale" or
    "connection" (the daemon no longer knows this session), "protocol" (its messages cannot be trusted), "closed" (this
    client was closed), or what a later daemon says.
    """

    reason: str
    sentence: str
    errno: str = ""  # of a claim that waited: what it was refused with in the end
    holders: tuple[Holder, ...] = ()  # and who was in the way then


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """A claim, as everybody may see it."""

    claim: int
    pid: int
    comm: str
    uid: int
    kind: str
    label: str
    state: str
    age_ns: int
    hits: int
    lost: int
    dropped: int


@dataclass(frozen=True, slots=True)
class ResourceRow:
    """One held slot and its claims. It belongs to a thread, to a process, to a vCPU, or with none of them to CPUs."""

    resource: int
    address: int | None  # None for those who may not see it
    length: int
    access: str
    pool: str
    user: bool
    kernel: bool
    delivery: str
    tid: int  # 0 for none
    cpus: tuple[int, ...] | None  # None for all
    claims: tuple[ClaimRow, ...]
    pid: int = 0  # a process, which has this slot on each of its threads; 0 for none
    vcpu: int = 0  # a vCPU, whose slots are no CPU's; 0 for none

    @property
    def is_cpu_wide(self) -> bool:
        """Whether it counts for everything that runs on its CPUs."""
        return not (self.tid or self.pid or self.vcpu)


@dataclass(frozen=True, slots=True)
class CpuRow:
    """Slots used on a CPU, per pool: by CPU-wide claims, and by the most demanding task that may run there."""

    cpu: int
    online: bool
    cpu_wide: Mapping[str, int]
    busiest_task: Mapping[str, int]
    slots: Mapping[str, int] = field(default_factory=dict)  # that it has, where that is not what every CPU has


@dataclass(frozen=True, slots=True)
class WaitingRow:
    """A claim that holds nothing and has a place in the queue."""

    claim: int
    pid: int
    comm: str
    uid: int
    kind: str
    label: str
    priority: int
    state: str  # "waiting", "displacing" or "suspended"
    position: int  # from 1, among those who wait for the same
    age_ns: int
    deadline_ns: int  # until when it waits, CLOCK_MONOTONIC; 0 for no limit
    address: int | None  # None for those who may not see it
    length: int
    access: str
    target: str  # "tid 812", "cpu-wide on all cpus"
    blockers: tuple[int, ...] = ()  # claims in its way


@dataclass(frozen=True, slots=True)
class Slots:
    """Who holds what, and who waits, in the order of the queue. ``pools``: pool name -> slots that every CPU has."""

    pools: Mapping[str, int]
    cpus: tuple[CpuRow, ...]
    resources: tuple[ResourceRow, ...]
    waiting: tuple[WaitingRow, ...] = ()


@dataclass(frozen=True, slots=True)
class SlotRow:
    """What one slot holds; ``number`` counts from 0 in each pool."""

    resource: int
    pool: str
    number: int
    address: int
    length: int
    access: str


@dataclass(frozen=True, slots=True)
class Contents:
    """
    What registers hold, or are to hold.

    ``registers``: register name -> value, for those that differ from what they hold after a reset; empty where the
    daemon has no model of them. ``version``: of what a VMM is told; 0 elsewhere.
    """

    version: int
    slots: tuple[SlotRow, ...]
    registers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class VcpuRow:
    """
    A vCPU. ``loaded``: whether its VMM has said that it has loaded all there is. The VMM's own counts come last:
    ``owner`` is whose registers are in force in the guest, as it said, "" before it said anything.
    """

    vcpu: int
    number: int
    tid: int
    strategy: str
    pools: Mapping[str, int]
    held: Mapping[str, int]
    loaded: bool
    owner: str = ""
    entries: int = 0
    switches: int = 0
    traps: int = 0


@dataclass(frozen=True, slots=True)
class VmRow:
    """A virtual machine, and the process that has it."""

    vm: int
    label: str
    pid: int
    comm: str
    uid: int
    vcpus: tuple[VcpuRow, ...]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """
    What the daemon's machine can do. ``registers`` and ``limits`` are as docs/protocol.md describes them.

    ``pools``: slots that every CPU has, and so a claim that may run anywhere can count on; ``pools_on``: those that
    each has, where they differ.
    """

    machine: str
    backend: str
    architecture: str
    pools: Mapping[str, int]
    cpus_possible: tuple[int, ...]
    cpus_online: tuple[int, ...]
    registers: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    pools_on: tuple[PoolsRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Why:
    """The story of a claim: its state, and sentences, oldest first; ``claim`` is 0 where it is of no single claim."""

    claim: int
    state: str
    lines: tuple[str, ...]


@cache
def _names(shape: Any) -> tuple[str, ...]:
    """The fields of a shape; to look them up each time costs more than to fill them."""
    return tuple(each.name for each in fields(shape))


def value_of(shape: type[Value], message: Mapping[str, Any], **changes: Any) -> Value:
    """
    Return ``message`` as a ``shape``, with ``changes`` in place of its own fields; lists become tuples.

    :raises BadMessage: when a field is missing.
    """
    taken = {}
    for name in _names(shape):  # type: ignore[arg-type]
        if name in message:
            taken[name] = tuple(message[name]) if isinstance(message[name], list) else message[name]
    try:
        return shape(**(taken | changes))
    except TypeError as error:
        raise BadMessage(f"the daemon's answer is not complete: {error}") from error


def contents_of(message: Mapping[str, Any]) -> Contents:
    """Return what a ``registers`` notice or a ``host_contents`` reply says."""
    slots = tuple(value_of(SlotRow, slot) for slot in message["slots"])
    return Contents(message.get("version", 0), slots, dict(message["registers"]))


def pieces_of(reply: Mapping[str, Any]) -> tuple[Piece, ...]:
    """Return the ``pieces`` of a ``granted`` or ``fit`` reply."""
    return tuple(value_of(Piece, message) for message in reply["pieces"])


def cpus_of(messages: Sequence[Mapping[str, Any]]) -> tuple[CpuRow, ...]:
    """Return the ``cpus`` of a ``slots`` reply."""
    return tuple(value_of(CpuRow, message) for message in messages)


def pools_of(messages: Sequence[Mapping[str, Any]]) -> tuple[PoolsRow, ...]:
    """Return the ``pools_on`` of a ``capabilities`` reply."""
    return tuple(value_of(PoolsRow, message) for message in messages)


def waiting_of(messages: Sequence[Mapping[str, Any]]) -> tuple[WaitingRow, ...]:
    """Return the ``waiting`` of a ``slots`` reply."""
    return tuple(value_of(WaitingRow, message) for message in messages)


def resources_of(messages: Sequence[Mapping[str, Any]]) -> tuple[ResourceRow, ...]:
    """Return the ``resources`` of a ``slots`` reply."""
    return tuple(
        value_of(ResourceRow, message, claims=tuple(value_of(ClaimRow, claim) for claim in message.get("claims", ())))
        for message in messages
    )
