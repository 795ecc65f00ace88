"""
Every request, reply and notice of the protocol, on one screen.

docs/protocol.md explains them; each class below carries the same name as its ``op``. Unknown fields are refused, every
string and list is bounded, and every number has its range, so what the rest of the daemon sees has been checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from hwbpd.core.errors import Holder
from hwbpd.core.model import ArmedBy, Delivery, Kind

PROTOCOL_VERSION = 1

U64_MAX = 2**64 - 1
TID_MAX = 2**22  # PID_MAX_LIMIT of 64-bit Linux
CPU_MAX = 8191  # the largest NR_CPUS a Linux configuration allows, less one
PRIORITY_MAX = 100
LENGTH_MAX = 2**32  # bytes; the largest range any architecture's mask can watch (AMD's)

Id = Annotated[int, Meta(ge=0, le=2**62)]
U64 = Annotated[int, Meta(ge=0)]  # the upper end is the encoding's own
Name = Annotated[str, Meta(max_length=64)]
Letters = Literal["r", "w", "rw", "x"]
Tid = Annotated[int, Meta(ge=0, le=TID_MAX)]
Cpu = Annotated[int, Meta(ge=0, le=CPU_MAX)]


class Message(Struct, frozen=True, tag_field="op", forbid_unknown_fields=True, omit_defaults=True):
    """One msgpack map; the field ``op`` names it."""


# --- requests --------------------------------------------------------------------------------------------------------


class Request(Message, frozen=True):
    """Every request carries an ``id`` of the client's choice, which its reply repeats."""

    id: Id


class Hello(Request, frozen=True, tag="hello"):
    version: Annotated[int, Meta(ge=0, le=65535)]
    client: Name = ""


class SessionRequest(Request, frozen=True, kw_only=True):
    """Everything after hello: for which daemon it is meant, and until when (CLOCK_MONOTONIC, 0 for no limit)."""

    epoch: U64
    deadline_ns: U64 = 0


class Wish(SessionRequest, frozen=True):
    """What is asked for, by a claim or by the question whether one would fit."""

    address: U64
    length: Annotated[int, Meta(ge=1, le=LENGTH_MAX)]
    access: Letters
    tid: Tid = 0  # 0: no thread
    pid: Tid = 0  # 0: no process
    vcpu: Id = 0  # 0: no vCPU
    only_pid: Tid = 0  # of a CPU-wide claim: deliver the hits of that process only
    cpus: Annotated[list[Cpu], Meta(max_length=CPU_MAX + 1)] | None = None  # None: all, or wherever the task runs
    user: bool = True
    kernel: bool = True
    delivery: Delivery = Delivery.HITS
    user_chain: bool = False
    kernel_chain: bool = False
    ring_bytes: Annotated[int, Meta(ge=0, le=2**30)] = 0  # 0: as the daemon is set
    across_exec: bool = False
    guard: Annotated[int, Meta(ge=0, le=10**9)] | None = None  # hits a second; 0: no bound; None: as the daemon is set
    kind: Kind = Kind.PERF
    label: Name = ""
    priority: Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] = 0  # among claims of its kind
    armed_by: ArmedBy = ArmedBy.DAEMON
    placeholder: bool = True  # of a tracer's claim: hold the slot until it says that it takes it
    over_report: bool = False  # hits of bytes beside the span are welcome, where that saves slots


class ClaimRequest(Wish, frozen=True, tag="claim"):
    """``wait_until_ns``: until when to wait for room (CLOCK_MONOTONIC); 0 for not at all."""

    wait_until_ns: U64 = 0


class Fit(Wish, frozen=True, tag="fit"):
    """Would it fit now? Nothing is counted and nothing armed."""


class PlanRequest(SessionRequest, frozen=True, tag="plan"):
    """Which slots would that take, whoever has them now?"""

    address: U64
    length: Annotated[int, Meta(ge=1, le=LENGTH_MAX)]
    access: Letters
    user: bool = True
    kernel: bool = True
    over_report: bool = False


class Rearm(SessionRequest, frozen=True, tag="rearm"):
    claim: Id


class Foreign(SessionRequest, frozen=True, tag="foreign"):
    """Who outside this daemon has slots?"""


class Release(SessionRequest, frozen=True, tag="release"):
    claim: Id


class Yield(SessionRequest, frozen=True, tag="yield"):
    """Give way now, as ``revoke`` asked."""

    claim: Id


class Taking(SessionRequest, frozen=True, tag="taking"):
    """The tracer is about to take its slot; once this is answered it is free in the kernel."""

    claim: Id


class Taken(SessionRequest, frozen=True, tag="taken"):
    """The tracer has it."""

    claim: Id


class TakeFailed(SessionRequest, frozen=True, tag="take_failed"):
    """It could not: the kernel said ``errno``."""

    claim: Id
    errno: Annotated[int, Meta(ge=1, le=4095)]


class Counts(SessionRequest, frozen=True, tag="counts"):
    claim: Id


class Slots(SessionRequest, frozen=True, tag="slots"):
    after: Id = 0  # resources with greater ids only
    most: Annotated[int, Meta(ge=1, le=1000)] = 200


class Capabilities(SessionRequest, frozen=True, tag="capabilities"):
    pass


class Why(SessionRequest, frozen=True, tag="why"):
    """The story of a claim; or of ``errno`` "ENOSPC": who holds everything, and what would have to change."""

    claim: Id = 0
    errno: Literal["", "ENOSPC"] = ""


class Thread(SessionRequest, frozen=True, tag="thread"):
    """Give a thread of the peer's process a word of the status page, for as long as the session lasts."""

    tid: Annotated[int, Meta(ge=1, le=TID_MAX)]


class Enabled(SessionRequest, frozen=True, tag="enabled"):
    """May a breakpoint of ours be installed on that CPU, for that thread, or on the CPU while the thread runs there?"""

    cpu: Cpu | None = None
    tid: Tid = 0


class VmRequest(SessionRequest, frozen=True, tag="vm"):
    """A VMM says that it has a virtual machine; it lasts as long as the session."""

    label: Name = ""


class VcpuRequest(SessionRequest, frozen=True, tag="vcpu"):
    """It has a vCPU, which that thread of the peer's process runs."""

    vm: Id
    number: Annotated[int, Meta(ge=0, le=65535)]
    tid: Annotated[int, Meta(ge=1, le=TID_MAX)]
    strategy: Name = ""  # how its registers are switched, for people
    profile: Name = ""  # which CPU it is, by name; empty: one like this machine's


class VcpuLoaded(SessionRequest, frozen=True, tag="vcpu_loaded"):
    """The VMM has loaded what ``registers`` said, or, with ``errno``, could not."""

    vcpu: Id
    version: Id
    errno: Annotated[int, Meta(ge=0, le=4095)] = 0


class VcpuHit(SessionRequest, frozen=True, tag="vcpu_hit"):
    """These resources were hit, by the instruction that the guest's instruction pointer tells."""

    vcpu: Id
    resources: Annotated[list[Id], Meta(max_length=32)]
    ip: U64
    kernel: bool = True  # the guest's


class VcpuReport(SessionRequest, frozen=True, tag="vcpu_report"):
    """What the VMM has counted since the vCPU was registered."""

    vcpu: Id
    entries: U64
    switches: U64 = 0
    traps: U64 = 0
    owner: Literal["", "host", "guest", "vmm"] = ""  # whose registers are in force while the guest runs


class Vms(SessionRequest, frozen=True, tag="vms"):
    """Which virtual machines are there?"""


class HostContents(SessionRequest, frozen=True, tag="host_contents"):
    """What do the host's registers hold on a CPU, by the books, while that thread runs there?"""

    cpu: Cpu
    tid: Tid = 0


class Follow(SessionRequest, frozen=True, tag="follow"):
    """From now on tell this session what is decided: about everybody for root, else about its own uid."""


class Goodbye(SessionRequest, frozen=True, tag="goodbye"):
    pass


AnyRequest = (
    Hello
    | ClaimRequest
    | Fit
    | PlanRequest
    | Release
    | Rearm
    | Yield
    | Taking
    | Taken
    | TakeFailed
    | Counts
    | Slots
    | Foreign
    | Capabilities
    | Why
    | Thread
    | Enabled
    | VmRequest
    | VcpuRequest
    | VcpuLoaded
    | VcpuHit
    | VcpuReport
    | Vms
    | HostContents
    | Follow
    | Goodbye
)


# --- replies ---------------------------------------------------------------------------------------------------------


class Reply(Message, frozen=True):
    id: int


class Welcome(Reply, frozen=True, tag="welcome"):
    version: int
    epoch: int
    session: int
    machine: str
    backend: str


class PieceRow(Struct, frozen=True):
    address: int
    length: int
    access: str
    pool: str


class Granted(Reply, frozen=True, tag="granted"):
    claim: int
    pieces: list[PieceRow]
    ring_bytes: int
    kind: str  # as which it is served: what was asked for, or "perf"
    guard: int


class QueuedReply(Reply, frozen=True, tag="queued"):
    """It waits, as the ``position``-th of those who wait for the same; why is said as in ``error``."""

    claim: int
    position: int
    errno: str
    sentence: str
    holders: list[Holder] = []


class Yielded(Reply, frozen=True, tag="yielded"):
    claim: int


class Take(Reply, frozen=True, tag="take"):
    """The slot is free in the kernel and kept in the books: take it now."""

    claim: int


class TakenReply(Reply, frozen=True, tag="taken"):
    claim: int


class TakeFailedReply(Reply, frozen=True, tag="take_failed"):
    """The claim is over."""

    claim: int


class FitReply(Reply, frozen=True, tag="fit"):
    """``fits``, or the refusal a claim would get by what is in the books; outside users show only at the claim."""

    fits: bool
    pieces: list[PieceRow]
    errno: str = ""
    sentence: str = ""
    holders: list[Holder] = []
    over_reported: int = 0


class PlanReply(Reply, frozen=True, tag="plan"):
    """``slots``: how many of each pool it takes; ``pools``: how many every CPU has."""

    pieces: list[PieceRow]
    slots: dict[str, int]
    pools: dict[str, int]
    over_reported: int = 0  # bytes beside the span whose accesses are reported, too


class RearmedReply(Reply, frozen=True, tag="rearmed"):
    claim: int


class ForeignReply(Reply, frozen=True, tag="foreign"):
    holders: list[Holder]


class Released(Reply, frozen=True, tag="released"):
    """The final counts: ``hits = delivered + lost + dropped + filtered`` for a claim that delivers hits."""

    claim: int
    hits: int
    delivered: int
    lost: int
    dropped: int
    filtered: int = 0


class CountsReply(Reply, frozen=True, tag="counts"):
    claim: int
    hits: int
    delivered: int
    lost: int
    dropped: int
    filtered: int = 0


class CpuRow(Struct, frozen=True, omit_defaults=True):
    """Slots used on a CPU: by CPU-wide claims, and by the most demanding task that may run there, per pool."""

    cpu: int
    online: bool
    cpu_wide: dict[str, int]
    busiest_task: dict[str, int]
    slots: dict[str, int] = {}  # that it has, where that is not what every CPU has


class ClaimRow(Struct, frozen=True, omit_defaults=True):
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


class ResourceRow(Struct, frozen=True, omit_defaults=True):
    resource: int
    address: int | None  # nil for those who may not see it
    length: int
    access: str
    pool: str
    user: bool
    kernel: bool
    delivery: str
    tid: int
    cpus: list[int] | None
    claims: list[ClaimRow]
    pid: int = 0
    vcpu: int = 0


class WaitingRow(Struct, frozen=True, omit_defaults=True):
    """A claim that holds nothing and has a place in the queue: ``waiting``, ``displacing`` or ``suspended``."""

    claim: int
    pid: int
    comm: str
    uid: int
    kind: str
    label: str
    priority: int
    state: str
    position: int
    age_ns: int
    deadline_ns: int  # 0: none
    address: int | None  # nil for those who may not see it
    length: int
    access: str
    target: str  # as sentences name it: "tid 812", "cpu-wide on all cpus"
    blockers: list[int] = []  # claims in its way


class SlotsReply(Reply, frozen=True, tag="slots"):
    pools: dict[str, int]
    cpus: list[CpuRow]
    resources: list[ResourceRow]
    more: bool
    waiting: list[WaitingRow] = []  # with the first page


class PoolsRow(Struct, frozen=True):
    """CPUs that have the same number of slots."""

    cpus: list[int]
    pools: dict[str, int]


class CapabilitiesReply(Reply, frozen=True, tag="capabilities"):
    """``pools``: what every CPU has; ``pools_on``: what each has, where they differ."""

    machine: str
    backend: str
    architecture: str
    pools: dict[str, int]
    cpus_possible: list[int]
    cpus_online: list[int]
    registers: Mapping[str, object]
    limits: dict[str, int]
    pools_on: list[PoolsRow] = []


class WhyReply(Reply, frozen=True, tag="why"):
    claim: int
    state: str
    lines: list[str]


class ThreadReply(Reply, frozen=True, tag="thread"):
    """The thread's word: its index among those of threads, and the number in it while it is this thread's."""

    index: int
    registration: int


class EnabledReply(Reply, frozen=True, tag="enabled"):
    enabled: bool
    armed: int
    held: int


class VmReply(Reply, frozen=True, tag="vm"):
    """``kgdb``: how many claims of kgdb have registers of the host now, as in the notice."""

    vm: int
    kgdb: int = 0


class VcpuReply(Reply, frozen=True, tag="vcpu"):
    vcpu: int
    pools: dict[str, int]


class VcpuLoadedReply(Reply, frozen=True, tag="vcpu_loaded"):
    vcpu: int


class VcpuHitReply(Reply, frozen=True, tag="vcpu_hit"):
    """``counted``: how many of the resources still are what was hit."""

    vcpu: int
    counted: int


class VcpuReportReply(Reply, frozen=True, tag="vcpu_report"):
    vcpu: int


class VcpuRow(Struct, frozen=True, omit_defaults=True):
    """``loaded``: whether the VMM has said that it has loaded all there is; the last four are its own counts."""

    vcpu: int
    number: int
    tid: int
    strategy: str
    pools: dict[str, int]
    held: dict[str, int]
    loaded: bool
    owner: str = ""
    entries: int = 0
    switches: int = 0
    traps: int = 0


class VmRow(Struct, frozen=True):
    vm: int
    label: str
    pid: int
    comm: str
    uid: int
    vcpus: list[VcpuRow]


class VmsReply(Reply, frozen=True, tag="vms"):
    vms: list[VmRow]


class SlotRow(Struct, frozen=True):
    """What one slot holds; ``number`` counts from 0 in each pool."""

    resource: int
    pool: str
    number: int
    address: int
    length: int
    access: str


class HostContentsReply(Reply, frozen=True, tag="host_contents"):
    """``registers``: those that differ from what they hold after a reset; empty where nobody has modelled them."""

    slots: list[SlotRow]
    registers: dict[str, int]


class FollowingReply(Reply, frozen=True, tag="following"):
    pass


class Bye(Reply, frozen=True, tag="bye"):
    pass


class Error(Reply, frozen=True, tag="error"):
    """A refusal. ``id`` is 0 when the request could not be read far enough to know it."""

    errno: str
    sentence: str
    holders: list[Holder] = []
    claim: int = 0


# --- notices ---------------------------------------------------------------------------------------------------------


class Notice(Message, frozen=True, kw_only=True):
    """What the daemon tells a session unasked. ``n`` counts them, from 1, without a gap; the outbox fills it in."""

    n: int = 0


class Hits(Notice, frozen=True, tag="hits"):
    claim: int
    count: int
    records: bytes
    lost: int = 0  # so far, in the ring
    dropped: int = 0  # so far, for want of room on the way to this client


class Lost(Notice, frozen=True, tag="lost"):
    """
    The claim is over and its slot is free, because of ``reason``: the target's "exit" or "exec", an operator who
    released it ("forced"), somebody else who took its slot while it was armed again ("stolen").

    With ``cpu``, only the slot on that CPU is lost ("offline"), and the claim goes on. A claim that waited and was
    refused then has the ``errno`` and ``holders`` of the refusal.
    """

    claim: int
    reason: str
    sentence: str
    hits: int
    delivered: int
    lost: int
    dropped: int
    filtered: int = 0
    cpu: int | None = None
    errno: str = ""
    holders: list[Holder] = []


class GrantedNotice(Notice, frozen=True, tag="granted"):
    """A claim that waited has its slots; the fields are those of the reply."""

    claim: int
    pieces: list[PieceRow]
    ring_bytes: int
    kind: str
    guard: int


class Revoke(Notice, frozen=True, tag="revoke"):
    """Give way until ``deadline_ns`` (``yield``), or it is taken: somebody of a higher rank needs the room."""

    claim: int
    by: Holder
    sentence: str
    deadline_ns: int


class Spared(Notice, frozen=True, tag="spared"):
    """It need not give way any more."""

    claim: int
    sentence: str


class Contended(Notice, frozen=True, tag="contended"):
    """Somebody was refused, or waits, because of this claim; told once a second at most."""

    claim: int
    by: Holder
    sentence: str


class ForeignNotice(Notice, frozen=True, tag="foreign"):
    """Who outside the daemon took the slot that the tracer was about to take, as far as could be found out."""

    claim: int
    sentence: str
    holders: list[Holder] = []


class Guarded(Notice, frozen=True, tag="guarded"):
    """Too many hits: the claim keeps its slot and reports nothing until it is armed again."""

    claim: int
    sentence: str


class Resumed(Notice, frozen=True, tag="resumed"):
    """It reports again, or has its slots again; with ``cpu``, on that CPU, which is back."""

    claim: int
    sentence: str
    cpu: int | None = None


class Suspended(Notice, frozen=True, tag="suspended"):
    """It has given way, and is resumed when there is room; with ``cpu``, that CPU is back and has no room for it."""

    claim: int
    sentence: str
    cpu: int | None = None


class Decision(Notice, frozen=True, tag="decision"):
    """
    What was decided, for a session that follows.

    ``what``: "granted", "refused", "guarded", "offline", "suspended", "resumed", "ended", "session", "session over".
    ``missed`` counts, so far, the decisions for which the way to this session had no room; the outbox fills it in.
    """

    what: str
    at_ns: int  # CLOCK_MONOTONIC
    session: int  # of the owner, as are pid, comm and uid
    pid: int
    comm: str
    uid: int
    claim: int = 0  # 0 where it is about none, or about one that was refused at the door
    about: str = ""  # the claim in perf's syntax with its target
    kind: str = ""
    label: str = ""  # the claim's, or of a session the name that its client gave itself
    errno: str = ""  # of a refusal
    reason: str = ""  # of an end: "released", "forced", "exit", "exec", "stolen", "session", "stopping"
    sentence: str = ""
    cpu: int | None = None
    missed: int = 0


class Registers(Notice, frozen=True, tag="registers"):
    """What a vCPU is to hold from its next entry on, in place of whatever it held; answered by ``vcpu_loaded``."""

    vcpu: int
    version: int
    slots: list[SlotRow]
    registers: dict[str, int]


class LoadedNotice(Notice, frozen=True, tag="loaded"):
    """A claim on a vCPU is in force there from its next entry on."""

    claim: int
    sentence: str


class KgdbNotice(Notice, frozen=True, tag="kgdb"):
    """For sessions with a virtual machine: how many claims of kgdb have registers of the host from now on."""

    claims: int
    sentence: str


class Closing(Notice, frozen=True, tag="closing"):
    """The daemon ends, or ends this session; every claim of it is over."""

    sentence: str
