"""
What the daemon talks about: owners, claims, targets, and the slots they come down to.

Every value here is frozen. The one mutable object of the core is the books (``core/books.py``).
"""

from __future__ import annotations

import enum

from msgspec import Struct


class Access(enum.Flag):
    """Which accesses a slot reports; the bit values are those of ``HW_BREAKPOINT_R/W/X`` in Linux."""

    READ = 1
    WRITE = 2
    EXECUTE = 4

    @property
    def letters(self) -> str:
        """The access as perf writes it: ``r``, ``w``, ``rw``, ``x``."""
        return _WRITTEN[self]

    @classmethod
    def from_letters(cls, letters: str) -> Access:
        """Return the access that perf writes as ``letters``; raises ``KeyError`` for any other letter."""
        access = cls(0)
        for letter in letters:
            access |= _LETTERS[letter]
        return access


_LETTERS = {"r": Access.READ, "w": Access.WRITE, "x": Access.EXECUTE}
_WRITTEN = {
    access: "".join(letter for letter, bit in _LETTERS.items() if bit in access)
    for access in (Access(bits) for bits in range(8))
}


class Kind(enum.StrEnum):
    """What sort of client a claim is for. It is a request: what a peer may be is decided at the door."""

    KGDB = "kgdb"
    KVM = "kvm"
    PTRACE = "ptrace"
    PERF = "perf"
    BACKGROUND = "background"


CLASS = {Kind.BACKGROUND: 0, Kind.PERF: 1, Kind.PTRACE: 2, Kind.KVM: 3, Kind.KGDB: 4}

Rank = tuple[int, int]  # class of the kind, and the number inside it: what is greater goes first


class ArmedBy(enum.StrEnum):
    """Who writes the debug registers for a claim."""

    DAEMON = "daemon"
    TRACER = "tracer"  # its owner, by ptrace; the daemon keeps the books, and the place until the tracer takes it


class Delivery(enum.StrEnum):
    """What the owner gets for its slot."""

    HITS = "hits"  # one record per hit, through a ring
    COUNT = "count"  # the number of hits only; no ring
    HOLD = "hold"  # nothing: the slot is taken but not armed, so nothing traps


class Span(Struct, frozen=True):
    """The bytes ``[address, address + length_bytes)``."""

    address: int
    length_bytes: int


class Mode(Struct, frozen=True):
    """What of the hits is seen, and how they are handed over."""

    user: bool = True
    kernel: bool = True
    delivery: Delivery = Delivery.HITS
    user_chain: bool = False  # a call chain of the user stack with each hit
    kernel_chain: bool = False
    ring_bytes: int = 0  # per leg; a power of two times the page size; 0 without a ring
    across_exec: bool = False  # go on when the target execs; its addresses may then mean something else
    only_pid: int = 0  # of CPU-wide hits, those of this process
    hide_kernel: bool = False  # where the kernel runs is kept from an owner without privileges
    fuse_hits: int = 0  # stop by itself after so many hits that nobody has answered for; 0: never
    over_report: bool = False  # hits of bytes beside the span are welcome, where that saves slots


class Pool(enum.StrEnum):
    """Which registers a slot comes from. x86 has one pool for both uses, Arm has two."""

    ANY = "any"
    INST = "inst"
    DATA = "data"


class Piece(Struct, frozen=True):
    """What one slot holds: a span and an access that the hardware can express, and the pool it takes from."""

    span: Span
    access: Access
    pool: Pool


class Plan(Struct, frozen=True):
    """The pieces that together cover what a claim asked for. All of them are armed, or none."""

    pieces: tuple[Piece, ...]


class Process(Struct, frozen=True):
    """A process: all its threads, those born later too. ``start_ticks`` is its first thread's."""

    pid: int
    start_ticks: int


class Task(Struct, frozen=True):
    """
    A thread. ``start_ticks`` (field 22 of /proc/TID/stat) tells it from a later thread with the same number.

    ``process`` is the one it belongs to; None where a machine has no processes.
    """

    tid: int
    start_ticks: int
    process: Process | None = None


class Vcpu(Struct, frozen=True):
    """
    A world of its own: one vCPU of somebody's virtual machine, with slots that are no CPU's of this machine.

    ``thread`` runs it. Its slots are armed by its VMM, whenever it loads what the daemon says.
    """

    vcpu_id: int
    thread: Task


class Target(Struct, frozen=True):
    """
    Whose registers a claim is for: a thread, a process, a vCPU, or with none of them a CPU, whatever runs there.

    =======  =====  =========================================================
    whose    cpus   meaning
    =======  =====  =========================================================
    nobody   --     CPU-wide, on every CPU
    nobody   given  CPU-wide, on these CPUs
    task     --     the task, wherever it runs
    task     given  the task, while it runs on one of these CPUs
    process  --     each thread of the process, wherever it runs
    vcpu     --     the vCPU, wherever its thread runs; no slot of this machine counts
    =======  =====  =========================================================
    """

    task: Task | None = None
    cpus: tuple[int, ...] | None = None  # ascending, without repetition
    process: Process | None = None
    vcpu: Vcpu | None = None

    @property
    def is_cpu_wide(self) -> bool:
        return self.task is None and self.process is None and self.vcpu is None

    @property
    def whose(self) -> Task | Process | Vcpu | None:
        """The one whose slots count there; None for whole CPUs."""
        return self.task or self.process or self.vcpu

    def __str__(self) -> str:
        if self.vcpu is not None:
            return f"vcpu {self.vcpu.vcpu_id}"
        cpus = "" if self.cpus is None else f"cpu {format_cpus(self.cpus)}"
        if self.process is not None:
            return f"pid {self.process.pid}"
        if self.task is None:
            return f"cpu-wide on {cpus or 'all cpus'}"
        return f"tid {self.task.tid}" + (f" on {cpus}" if cpus else "")


class Owner(Struct, frozen=True):
    """On whose behalf: the process at the other end of a session, as the kernel identifies it."""

    session_id: int
    pid: int
    uid: int
    gid: int
    comm: str

    def __str__(self) -> str:
        return f"{self.comm}[{self.pid}]"


class Claim(Struct, frozen=True):
    """What an owner asked for: one id from request to end."""

    claim_id: int
    owner: Owner
    kind: Kind
    span: Span
    access: Access
    mode: Mode
    target: Target
    label: str
    requested_ns: int
    privileged: bool = False  # its owner was as mighty as the daemon when it asked
    priority: int = 0  # among claims of its kind
    wait_until_ns: int = 0  # 0: it does not wait for room
    armed_by: ArmedBy = ArmedBy.DAEMON
    placeholder: bool = True  # of a tracer's claim: hold the slot until it says that it takes it

    @property
    def rank(self) -> Rank:
        """Strictly higher ones may displace it."""
        return CLASS[self.kind], self.priority


class Resource(Struct, frozen=True):
    """One held slot on a target. Claims ride on it; the machine arms it, on one leg per CPU or thread."""

    resource_id: int
    piece: Piece
    target: Target
    mode: Mode


class Totals(Struct, frozen=True):
    """What a resource has seen since it was armed, over all its legs."""

    hits: int = 0  # as the kernel counted them
    lost: int = 0  # of these, for want of room in a ring


def format_cpus(cpus: tuple[int, ...]) -> str:
    """Return CPUs as perf and taskset write them: ``0-2,5``."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
