"""
One session: what is claimed in it, and what can be asked.

Requests and hits come through one socket, so a client is for one thread; its watches are read in turns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Self, TypedDict, Unpack

from hwbp.connection import Connection
from hwbp.errors import BadClaim, Holder, HwbpError, holders_of, refusal_of
from hwbp.follow import Decisions
from hwbp.pending import Pending, wait_until_ns
from hwbp.ptrace import Slot
from hwbp.records import Hit
from hwbp.status_page import StatusPage, Thread, open_page, page_path
from hwbp.syntax import Event, parse_event
from hwbp.values import (
    Capabilities,
    Contents,
    Counts,
    Enabled,
    Ended,
    Fit,
    Plan,
    Slots,
    VcpuRow,
    VmRow,
    Why,
    contents_of,
    cpus_of,
    pieces_of,
    pools_of,
    resources_of,
    value_of,
    waiting_of,
)
from hwbp.vmm import Vm
from hwbp.watch import Watch, deadline_after


class Asked(TypedDict, total=False):
    """What a claim may say beside its event; ``Client.claim`` says what each means."""

    address: int | None
    length: int | None
    access: str
    user: bool
    kernel: bool
    tid: int
    pid: int
    vcpu: int
    only_pid: int
    cpus: Iterable[int] | None
    across_exec: bool
    guard: int | None
    kind: str
    label: str
    priority: int
    delivery: str
    user_chain: bool
    kernel_chain: bool
    ring_bytes: int
    over_report: bool


class Client:
    """One session with the daemon; made by ``connect``. As a context manager it closes the session at the end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._watches: dict[int, Watch] = {}
        self._default_lengths: dict[str, int] = {}
        self._page: StatusPage | None = None

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

    @property
    def protocol_version(self) -> int:
        """The version of the protocol that the daemon speaks with us."""
        return int(self._connection.welcome["version"])

    # --- claiming ----------------------------------------------------------------------------------------------------

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
        pid: int = 0,
        vcpu: int = 0,
        only_pid: int = 0,
        cpus: Iterable[int] | None = None,
        across_exec: bool = False,
        guard: int | None = None,
        kind: str = "perf",
        label: str = "",
        priority: int = 0,
        wait: float = 0.0,
        delivery: str = "hits",
        user_chain: bool = False,
        kernel_chain: bool = False,
        ring_bytes: int = 0,
        over_report: bool = False,
    ) -> Watch:
        """
        Claim a slot for an event, or for ``address``, ``length``, ``access``, ``user`` and ``kernel``.

        With ``wait`` this returns when there is room, and takes in what is told of other claims meanwhile; an exception
        amid the wait, such as Ctrl-C, cancels it. Whoever wants to show its place, or to do something else, has
        ``queue``.

        Without ``tid`` and ``pid`` the claim is CPU-wide: it sees whatever runs there.

        :param event: as perf writes it, ``mem:0x404040/8:w``, or parsed.
        :param length: bytes; None for what the machine has as its default for that access.
        :param tid: the thread to watch; 0 for none.
        :param pid: the process to watch: all its threads, those born later too; 0 for none.
        :param vcpu: a vCPU of somebody's virtual machine, by its id (``vms``); its VMM loads what is claimed there, and
            tells of the hits. 0 for none.
        :param only_pid: of a CPU-wide claim, deliver only the hits of this process: the way to watch one with very
            many threads.
        :param cpus: CPU-wide on these, or the thread only while it runs there; None for all.
        :param across_exec: go on when the target execs; otherwise the claim ends there.
        :param guard: hits a second, more than which silence the claim (``Watch.state``); 0 for no bound, None for the
            daemon's setting, which only root may exceed.
        :param kind: what it is for: "ptrace", "perf", "kgdb", "kvm" or "background"; ``Watch.kind`` says as what it is
            served.
        :param priority: -100 to 100, among claims of its kind: a higher one goes first, and may displace. More than 0
            is for root.
        :param wait: seconds to wait for room; 0 for not at all. The daemon bounds it.
        :param delivery: "hits", "count" (only counted) or "hold" (the slot is held and not armed).
        :param ring_bytes: per leg, a power of two, at least a page; 0 for the daemon's setting.
        :param over_report: take hits of bytes beside the span, too, where that saves slots; a hit does not say which
            byte it was.
        :raises BadSyntax: when ``event`` is text and no event.
        :raises WaitTimedOut: when no room came in time.
        :raises HwbpError: the refusal, with its holders.
        """
        pending = self.queue(
            event,
            wait=wait,
            address=address,
            length=length,
            access=access,
            user=user,
            kernel=kernel,
            tid=tid,
            pid=pid,
            vcpu=vcpu,
            only_pid=only_pid,
            cpus=cpus,
            across_exec=across_exec,
            guard=guard,
            kind=kind,
            label=label,
            priority=priority,
            delivery=delivery,
            user_chain=user_chain,
            kernel_chain=kernel_chain,
            ring_bytes=ring_bytes,
            over_report=over_report,
        )
        return _granted(pending)

    def queue(self, event: str | Event | None = None, *, wait: float, **asked: Unpack[Asked]) -> Pending:
        """
        Claim as ``claim`` does, with the same arguments, and return at once, also where the claim has to wait.

            with client.queue("mem:0x404040/8:w", tid=4242, wait=30) as pending:
                if pending.is_waiting:
                    print(pending.position, pending.sentence)
                watch = pending.granted()

        :param wait: seconds for which it waits; the request itself is answered within the client's ``timeout``.
        :raises HwbpError: the refusal of a claim that can neither be granted nor wait.
        """
        if unknown := asked.keys() - Asked.__annotations__.keys():
            raise TypeError(f"a claim has no {', '.join(sorted(unknown))}")
        return self._queue(event, wait, asked, {})

    def tracer_claim(
        self, tid: int, event: str | Event, *, placeholder: bool = True, wait: float = 0.0, priority: int = 0,
        label: str = "",
    ) -> Slot:  # fmt: skip
        """
        Claim a slot that this process, as the tracer of a thread, takes itself by ptrace; see ``hwbp.ptrace``.

        :param tid: the thread that is traced.
        :param placeholder: hold the slot for the tracer until ``Slot.take``; without it, take it at once.
        :raises WaitTimedOut: when no room came in time.
        :raises HwbpError: the refusal, with its holders.
        """
        asked = Asked(tid=tid, kind="ptrace", priority=priority, label=label, delivery="hold")
        by_tracer = {"armed_by": "tracer"} | ({} if placeholder else {"placeholder": False})
        return Slot(self._connection, _granted(self._queue(event, wait, asked, by_tracer)), placeholder)

    def _queue(self, event: str | Event | None, wait: float, asked: Asked, others: dict[str, Any]) -> Pending:
        until_ns = wait_until_ns(wait)
        what = self._event(
            event,
            asked.get("address"),
            asked.get("length"),
            asked.get("access", "rw"),
            asked.get("user", True),
            asked.get("kernel", True),
        )
        fields = _said(asked) | others | _event_fields(what)
        if until_ns:
            fields["wait_until_ns"] = until_ns
        return Pending(self._connection, what, self._connection.request("claim", **fields), until_ns, self._adopt)

    def _adopt(self, watch: Watch) -> None:
        self._live()
        self._watches[watch.claim_id] = watch

    def fit(
        self,
        event: str | Event | None = None,
        *,
        address: int | None = None,
        length: int | None = None,
        access: str = "rw",
        user: bool = True,
        kernel: bool = True,
        tid: int = 0,
        pid: int = 0,
        vcpu: int = 0,
        only_pid: int = 0,
        cpus: Iterable[int] | None = None,
        across_exec: bool = False,
        guard: int | None = None,
        kind: str = "perf",
        priority: int = 0,
        delivery: str = "hits",
        over_report: bool = False,
    ) -> Fit:
        """
        Return whether a claim with these arguments (see ``claim``) would fit now, and if not, who is in the way.

        Nothing is taken. Slots that are held outside the daemon show only when a claim is made.

        :raises HwbpError: what no claim could get even on an empty machine: a span that no slot can hold, a target that
            does not exist, or one that is not permitted.
        """
        asked = self._event(event, address, length, access, user, kernel)
        others = Asked(tid=tid, pid=pid, vcpu=vcpu, only_pid=only_pid, cpus=cpus, across_exec=across_exec)
        others |= Asked(guard=guard, kind=kind, priority=priority, delivery=delivery, over_report=over_report)
        reply = self._connection.request("fit", **(_said(others) | _event_fields(asked)))
        if reply["fits"]:
            return Fit(True, pieces_of(reply), None, reply.get("sentence", ""), reply.get("over_reported", 0))
        return Fit(False, pieces_of(reply), refusal_of(reply), over_reported=reply.get("over_reported", 0))

    def plan(
        self,
        event: str | Event | None = None,
        *,
        address: int | None = None,
        length: int | None = None,
        access: str = "rw",
        user: bool = True,
        kernel: bool = True,
        over_report: bool = False,
    ) -> Plan:
        """
        Return which slots an event takes, whoever has them now and whatever it is to watch.

        :raises BadClaim: when it takes more slots than a CPU has, or is nothing that a slot can hold; ``NotSupported``
            when those of other CPUs could.
        """
        asked = _event_fields(self._event(event, address, length, access, user, kernel))
        reply = self._connection.request("plan", **(asked | ({"over_report": True} if over_report else {})))
        return value_of(Plan, reply, pieces=pieces_of(reply))

    def release(self, claim_id: int) -> Counts:
        """
        Release a claim by its id, one's own or, as an operator, somebody else's; return its final counts.

        :raises NoSuchClaim: when there is none; ``NotPermitted`` when it may not be released from here.
        """
        if watch := self._watches.get(claim_id):
            return watch.release()
        return value_of(Counts, self._connection.request("release", claim=claim_id))

    def rearm(self, claim_id: int) -> None:
        """
        Let a guarded claim report again, by its id, one's own or, as an operator, somebody else's.

        :raises BadClaim: when it is not guarded.
        :raises NoSuchClaim: when there is none; ``NotPermitted`` when it may not be armed again from here.
        :raises NoResources: when somebody else got its slot meanwhile; the claim is then over.
        """
        if watch := self._watches.get(claim_id):
            watch.rearm()
        else:
            self._connection.request("rearm", claim=claim_id)

    # --- hits --------------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None, until: int | None = None) -> bool:
        """
        Wait for something to happen to any claim of this client (hits, a change, or its end), or for a decision.

        :param timeout: seconds; None waits for ever.
        :param until: a file descriptor whose readability ends the wait, such as a pidfd or the end of a pipe.
        :return: whether something happened. It may have been no more than a change of the totals.
        """
        decisions = self._connection.decisions
        if any(watch.unread for watch in self._live()) or (decisions is not None and decisions.unread):
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

    # --- asking ------------------------------------------------------------------------------------------------------

    def slots(self) -> Slots:
        """Return who holds what, on all CPUs and for all tasks, and who waits."""
        reply = self._connection.request("slots")
        pools, cpus, waiting = reply["pools"], cpus_of(reply["cpus"]), waiting_of(reply.get("waiting", ()))
        resources = list(resources_of(reply["resources"]))
        while reply["more"]:
            reply = self._connection.request("slots", after=resources[-1].resource)
            resources += resources_of(reply["resources"])
        return Slots(pools, cpus, tuple(resources), waiting)

    def foreign(self) -> tuple[Holder, ...]:
        """
        Return who holds slots outside the daemon, as far as can be found out; for root.

        The daemon looks at most once a second. ``Holder.evidence`` says how each is known; ``pid`` is 0 where nobody
        can be named, and ``slots`` 0 where their number is not known.
        """
        return holders_of(self._connection.request("foreign"))

    def capabilities(self) -> Capabilities:
        """Return what the daemon's machine can do."""
        reply = self._connection.request("capabilities")
        return value_of(Capabilities, reply, pools_on=pools_of(reply.get("pools_on", ())))

    def why(self, claim_id: int = 0, errno: str = "") -> Why:
        """
        Return the story of a claim, granted, waiting or refused; somebody else's as an operator.

        :param errno: "ENOSPC", instead of a claim: who holds everything now, and what would have to change.
        """
        asked: dict[str, Any] = {"errno": errno} if errno else {"claim": claim_id}
        return value_of(Why, self._connection.request("why", **asked))

    # --- may there be a breakpoint? ----------------------------------------------------------------------------------

    def thread(self) -> Thread:
        """
        Register the calling thread; return a handle that answers for it in nanoseconds, without asking the daemon.

        The registration lasts as long as the session. After that the handle says UNKNOWN, and ``register`` of another
        client makes it right again.

        :raises LimitReached: when this user has registered too many; ``NotPermitted`` in another pid namespace.
        :raises NotReachable: when the daemon's status page cannot be read.
        """
        tid = threading.get_native_id()
        return Thread(self.page, tid, *self._word_of(tid))

    def register(self, thread: Thread) -> None:
        """Register the thread of a handle in this session, as ``thread`` does, because its own is over."""
        thread.renew(self.page, *self._word_of(thread.tid))

    def _word_of(self, tid: int) -> tuple[int, int]:
        reply = self._connection.request("thread", tid=tid)
        return int(reply["index"]), int(reply["registration"])

    @property
    def page(self) -> StatusPage:
        """The status page of this client's daemon, which answers for CPUs; raises as ``open_page`` does."""
        if self._page is None:
            self._page = open_page(page_path(self._connection.path))
        return self._page

    def enabled(self, cpu: int | None = None, tid: int = 0) -> Enabled:
        """
        Ask the daemon what it has installed on a CPU, for a thread, or for both together.

        :param tid: a thread of this process; of any as root.
        :raises BadClaim: without either; ``CpuOffline`` and ``TargetGone`` when there is no such thing.
        """
        fields = ({} if cpu is None else {"cpu": cpu}) | ({"tid": tid} if tid else {})
        return value_of(Enabled, self._connection.request("enabled", **fields))

    # --- virtual machines --------------------------------------------------------------------------------------------

    def vm(self, label: str = "") -> Vm:
        """
        Say that this process has a virtual machine, for as long as the session lasts; its ``vcpu`` makes vCPUs.

        :raises LimitReached: when this session has too many.
        """
        reply = self._connection.request("vm", **({"label": label} if label else {}))
        self._connection.kgdb_claims = reply.get("kgdb", 0)
        return Vm(self._connection, int(reply["vm"]))

    def vm_of(self, vm_id: int) -> Vm:
        """Return a virtual machine of another session of this process, to make vCPUs of it in this one."""
        return Vm(self._connection, vm_id)

    def vms(self) -> tuple[VmRow, ...]:
        """Return every virtual machine with its vCPUs, as their VMMs have said."""
        return tuple(
            value_of(VmRow, row, vcpus=tuple(value_of(VcpuRow, vcpu) for vcpu in row["vcpus"]))
            for row in self._connection.request("vms")["vms"]
        )

    def host_contents(self, cpu: int, tid: int = 0) -> Contents:
        """
        Return what the host's registers hold on a CPU, by the daemon's books, while a thread runs there; for root.

        Linux may have it in registers of other numbers, and what is armed outside the daemon is not in it.

        :param tid: 0 for whatever thread has nothing of its own.
        :raises NotPermitted: to others; ``CpuOffline``; ``TargetGone``.
        """
        return contents_of(self._connection.request("host_contents", cpu=cpu, **({"tid": tid} if tid else {})))

    @property
    def kgdb_claims(self) -> int:
        """How many claims of kgdb have registers of the host, as last heard by this client, which has a ``vm``."""
        return self._connection.kgdb_claims

    # --- following ---------------------------------------------------------------------------------------------------

    def follow(self) -> Decisions:
        """
        From now on hear what the daemon decides: about everybody as root, else about one's own uid.

        Decisions are kept as they arrive, during ``wait`` or any request; ``Decisions.take`` returns them. Following
        twice is following once.

        :raises LimitReached: when enough sessions of this user follow; ``BadMessage`` when the daemon cannot do it.
        """
        if self._connection.decisions is None:
            self._connection.decisions = Decisions()
            try:
                self._connection.request("follow")
            except HwbpError:
                self._connection.decisions = None
                raise
        return self._connection.decisions

    # --- the end, and what claim and fit share -----------------------------------------------------------------------

    def close(self) -> None:
        """End the session; when this returns its slots are free. Closing twice does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event(
        self, event: str | Event | None, address: int | None, length: int | None, access: str, user: bool, kernel: bool
    ) -> Event:
        """Return what is asked for, with a length."""
        if (event is None) == (address is None):
            raise TypeError("give an event or an address, and not both")
        if address is not None:
            event = Event(address, length, access, user, kernel)
        elif isinstance(event, str):
            event = parse_event(event)
        assert isinstance(event, Event)
        if event.length is None:
            event = Event(event.address, self._default_length(event.access), event.access, event.user, event.kernel)
        return event

    def _default_length(self, access: str) -> int:
        """Return the length in bytes that this machine gives an event which names none."""
        if not self._default_lengths:
            self._default_lengths = dict(self.capabilities().registers.get("default_lengths", {}))
        if access not in self._default_lengths:
            raise BadClaim(f"the daemon names no default length for access {access!r}; give one, as in mem:ADDRESS/8")
        return self._default_lengths[access]


_UNSAID = {"pid": 0, "vcpu": 0, "only_pid": 0, "cpus": None, "across_exec": False, "guard": None, "priority": 0} | {
    "over_report": False
}


def _event_fields(event: Event) -> dict[str, Any]:
    span = {"address": event.address, "length": event.length, "access": event.access}
    return span | {"user": event.user, "kernel": event.kernel}


def _said(asked: Asked) -> dict[str, Any]:
    """What need not be said is left out: a daemon that does not know it need not refuse it."""
    said = {name: value for name, value in asked.items() if name not in _UNSAID or value != _UNSAID[name]}
    cpus = asked.get("cpus")
    return said if cpus is None else said | {"cpus": list(cpus)}


def _granted(pending: Pending) -> Watch:
    """Wait for as long as it takes; what interrupts that cancels the claim."""
    try:
        watch = pending.granted()
    except BaseException:
        with suppress(HwbpError):  # the reason why nobody waits any longer is what counts
            pending.cancel()
        raise
    assert watch is not None, "without a limit of ours there is one or the other"
    return watch
