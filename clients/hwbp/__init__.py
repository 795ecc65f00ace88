"""
Hardware breakpoints through hwbpd: claim a slot, read its hits, and see who holds what.

    import hwbp

    with hwbp.connect() as client:
        with client.claim("mem:0x404040/8:w", tid=4242) as watch:
            for hit in watch.hits(timeout=5.0):
                print(hex(hit.ip), hit.tid)

A claim lives as long as its session: it ends with the client, with the process, and with the daemon, and is never taken
out again silently. A client is for one thread, and not for use after ``fork``.
"""

from __future__ import annotations

import os

from hwbp.client import Client
from hwbp.connection import Connection, socket_path
from hwbp.errors import (
    BadClaim,
    BadMessage,
    CpuOffline,
    HeldBack,
    Holder,
    HwbpError,
    LimitReached,
    NoFreeSlot,
    NoResources,
    NoSuchClaim,
    NotPermitted,
    NotReachable,
    NotSupported,
    RequestExpired,
    RequestTimedOut,
    Stale,
    TargetGone,
    VersionMismatch,
    WaitTimedOut,
)
from hwbp.follow import Decision, Decisions
from hwbp.pending import Pending
from hwbp.ptrace import Slot
from hwbp.records import Hit
from hwbp.status_page import Answer, StatusPage, Thread, open_page
from hwbp.syntax import BadSyntax, Event, format_cpus, parse_cpus, parse_event
from hwbp.values import (
    Capabilities,
    Change,
    ClaimRow,
    Contents,
    Counts,
    CpuRow,
    Enabled,
    Ended,
    Fit,
    Piece,
    Plan,
    PoolsRow,
    ResourceRow,
    SlotRow,
    Slots,
    VcpuRow,
    VmRow,
    WaitingRow,
    Why,
)
from hwbp.vmm import Vcpu, Vm
from hwbp.watch import Watch

__all__ = [
    "KINDS",
    "Answer",
    "BadClaim",
    "BadMessage",
    "BadSyntax",
    "Capabilities",
    "Change",
    "ClaimRow",
    "Client",
    "Contents",
    "Counts",
    "CpuOffline",
    "CpuRow",
    "Decision",
    "Decisions",
    "Enabled",
    "Ended",
    "Event",
    "Fit",
    "HeldBack",
    "Hit",
    "Holder",
    "HwbpError",
    "LimitReached",
    "NoFreeSlot",
    "NoResources",
    "NoSuchClaim",
    "NotPermitted",
    "NotReachable",
    "NotSupported",
    "Pending",
    "Piece",
    "Plan",
    "PoolsRow",
    "RequestExpired",
    "RequestTimedOut",
    "ResourceRow",
    "Slot",
    "SlotRow",
    "Slots",
    "Stale",
    "StatusPage",
    "TargetGone",
    "Thread",
    "Vcpu",
    "VcpuRow",
    "VersionMismatch",
    "Vm",
    "VmRow",
    "WaitTimedOut",
    "WaitingRow",
    "Watch",
    "Why",
    "connect",
    "format_cpus",
    "open_page",
    "parse_cpus",
    "parse_event",
    "socket_path",
]


KINDS = ("ptrace", "perf", "kgdb", "kvm", "background")  # what a claim may say it is for


def connect(
    socket: str | os.PathLike[str] | None = None, name: str = "", timeout: float = 5.0, transport: str = "auto"
) -> Client:
    """
    Open a session with the daemon.

    :param socket: where it listens; None looks where docs/protocol.md says ("Connection").
    :param name: what operators see of this client, at most 64 characters.
    :param timeout: seconds to wait for any reply.
    :param transport: "zmq", "seqpacket" (faster, beside it on the same host), or "auto": SEQPACKET if it is offered.
    :raises NotReachable: when no daemon answers there.
    """
    return Client(Connection(socket_path(socket), name, timeout, transport))
