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
from collections.abc import Iterable, Iterator
from typing import Self

from hwbp.connection import Connection, socket_path
from hwbp.errors import (
    BadClaim,
    BadMessage,
    CpuOffline,
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
)
from hwbp.records import Hit
from hwbp.syntax import BadSyntax, Event, format_cpus, parse_cpus, parse_event
from hwbp.values import (
    Capabilities,
    ClaimRow,
    Counts,
    CpuRow,
    Ended,
    Piece,
    ResourceRow,
    Slots,
    Why,
    cpus_of,
    resources_of,
    value_of,
)
from hwbp.watch import Watch, deadline_after

__all__ = [
    "KINDS",
    "BadClaim",
    "BadMessage",
    "BadSyntax",
    "Capabilities",
    "ClaimRow",
    "Client",
    "Counts",
    "CpuOffline",
    "CpuRow",
    "Ended",
    "Event",
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
    "Piece",
    "RequestExpired",
    "RequestTimedOut",
    "ResourceRow",
    "Slots",
    "Stale",
    "TargetGone",
    "VersionMismatch",
    "Watch",
    "Why",
    "connect",
    "format_cpus",
    "parse_cpus",
    "parse_event",
    "socket_path",
]


KINDS = ("ptrace", "perf", "kgdb", "kvm", "background")  # what a claim may say it is for

def connect(socket: str | os.PathLike[str] | None = None, name: str = "", timeout: float = 5.0) -> Client:
    """
    Open a session with the daemon.

    :param socket: where it listens; None looks where docs/protocol.md says ("Connection").
    :param name: what operators see of this client, at most 64 characters.
    :param timeout: seconds to wait for any reply.
    :raises NotReachable: when no daemon answers there.
    """
    return Client(Connection(socket_path(socket), name, timeout))


class Client:
    """One session with the daemon; made by ``connect``. As a context manager it closes the session at the end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._watches: dict[int, Watch] = {}
        self._default_lengths: dict[str, int] = {}

    @property
    def ended(self) -> Ended | None:
        """Why the session is over; None while it lives, as far as has been heard."""
        return self._connection.over

    @property
    def machine(self) -> str:
        """The name of the machine the daemon serves: where the registers are."""
        return str(self._connection.welcome["machine"])

    @property
    def backend(self) -> str:
        """The name of what the daemon knows of that machine's registers."""
        return str(self._connection.welcome["backend"])

    def claim(
        self,
        event: str | Event | None = None,
        *,
        address: int | None = None,
        length: int | None = None,
        access: str = "rw",
        user: bool = True,
        kernel: bool = True,
        tid: int = 0,
        cpus: Iterable[int] | None = None,
        kind: str = "perf",
        label: str = "",
        delivery: str = "hits",
        user_chain: bool = False,
        kernel_chain: bool = False,
        ring_bytes: int = 0,
    ) -> Watch:
        """
        Claim a slot for an event, or for ``address``, ``length``, ``access``, ``user`` and ``kernel``.

        :param event: as perf writes it, ``mem:0x404040/8:w``, or parsed.
        :param length: bytes; None for what the machine has as its default for that access.
        :param tid: the thread to watch; 0 for none, which makes the claim CPU-wide.
        :param cpus: CPU-wide on these, or the thread only while it runs there; None for all.
        :param kind: what it is for: "ptrace", "perf", "kgdb", "kvm" or "background".
        :param delivery: "hits", "count" (only counted) or "hold" (the slot is held and not armed).
        :param ring_bytes: per leg, a power of two, at least a page; 0 for the daemon's setting.
        :raises BadSyntax: when ``event`` is text and no event.
        :raises HwbpError: the refusal, with its holders.
        """
        if (event is None) == (address is None):
            raise TypeError("claim takes an event or an address, and not both")
        if address is not None:
            event = Event(address, length, access, user, kernel)
        elif isinstance(event, str):
            event = parse_event(event)
        assert isinstance(event, Event)
        if event.length is None:
            event = Event(event.address, self._default_length(event.access), event.access, event.user, event.kernel)
        places = {} if cpus is None else {"cpus": list(cpus)}
        reply = self._connection.request(
            "claim",
            address=event.address,
            length=event.length,
            access=event.access,
            tid=tid,
            user=event.user,
            kernel=event.kernel,
            delivery=delivery,
            user_chain=user_chain,
            kernel_chain=kernel_chain,
            ring_bytes=ring_bytes,
            kind=kind,
            label=label,
            **places,
        )
        pieces = tuple(value_of(Piece, piece) for piece in reply["pieces"])
        watch = Watch(self._connection, reply["claim"], event, pieces, reply["ring_bytes"])
        self._live()
        self._watches[watch.claim_id] = watch
        return watch

    def wait(self, timeout: float | None = None, until: int | None = None) -> bool:
        """
        Wait for something to happen to any claim of this client: hits, or its end.

        :param timeout: seconds; None waits for ever.
        :param until: a file descriptor whose readability ends the wait, such as a pidfd or the end of a pipe.
        :return: whether something happened. It may have been no more than a change of the totals.
        """
        if any(watch.unread for watch in self._live()):
            return True
        return self._connection.wait(deadline_after(timeout), until)

    def hits(self, timeout: float | None = None) -> Iterator[tuple[Watch, Hit]]:
        """
        Yield the hits of all claims of this client that were not released, with their watch.

        Claims take turns, a message each, so none of them starves the others. Ends when ``timeout`` seconds pass
        without a hit, and when all claims are over and read. None waits for ever, 0 takes only what has arrived.
        """
        while True:
            deadline_ns = deadline_after(timeout)
            while not (unread := [watch for watch in self._live() if watch.unread]):
                # A lost session may leave hits that arrived before it; look once more at what came.
                if not self._watches or not (self._connection.wait(deadline_ns) or any(w.unread for w in self._live())):
                    return
            for watch in unread:
                if watch.unread:  # unless somebody read it while we were yielding
                    for hit in watch.read_message():
                        yield watch, hit

    def _live(self) -> list[Watch]:
        """Forget the watches that were released, or that are over and read; return the others."""
        for claim_id, watch in list(self._watches.items()):
            if watch.ended and (watch.ended.reason == "released" or not watch.unread):
                del self._watches[claim_id]
        return list(self._watches.values())

    def slots(self) -> Slots:
        """Return who holds what, on all CPUs and for all tasks."""
        reply = self._connection.request("slots")
        pools, cpus = reply["pools"], cpus_of(reply["cpus"])
        resources = list(resources_of(reply["resources"]))
        while reply["more"]:
            reply = self._connection.request("slots", after=resources[-1].resource)
            resources += resources_of(reply["resources"])
        return Slots(pools, cpus, tuple(resources))

    def capabilities(self) -> Capabilities:
        """Return what the daemon's machine can do."""
        return value_of(Capabilities, self._connection.request("capabilities"))

    def why(self, claim_id: int) -> Why:
        """Return the story of a claim, granted or refused, one's own or not."""
        return value_of(Why, self._connection.request("why", claim=claim_id))

    def release(self, claim_id: int) -> Counts:
        """
        Release a claim by its id, one's own or, as an operator, somebody else's; return its final counts.

        :raises NoSuchClaim: when there is none, or it may not be released from here.
        """
        if watch := self._watches.get(claim_id):
            return watch.release()
        return value_of(Counts, self._connection.request("release", claim=claim_id))

    def close(self) -> None:
        """End the session; when this returns its slots are free. Closing twice does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _default_length(self, access: str) -> int:
        """Return the length in bytes that this machine gives an event which names none."""
        if not self._default_lengths:
            self._default_lengths = dict(self.capabilities().registers.get("default_lengths", {}))
        if access not in self._default_lengths:
            raise BadClaim(f"the daemon names no default length for access {access!r}; give one, as in mem:ADDRESS/8")
        return self._default_lengths[access]
