"""
Virtual machines: who has which vCPUs, what their VMMs are told, and what they say.

To the daemon a VMM is a machine that is not in a hurry. It is told what its vCPU's debug registers are to hold
(``registers``), loads that when it next enters the guest, and says so (``vcpu_loaded``); hits come from it, too
(``vcpu_hit``). Decisions:

1. A vCPU is its VMM's word: nothing about it can be checked but that the thread is one of that process. So nothing of
   the host's depends on it, and whoever claims there must be one whom the kernel would let watch that thread.
2. It ends with its session, with its VM, and with its thread, whichever is first.
3. Who has a VM is told when kgdb takes the host's registers and when it lets go (``kgdb``): it asks nobody.
4. What a VMM counts (``vcpu_report``) is shown and believed, and used for nothing. A report costs a request, so there
   may be one for each vCPU in ``REPORT_EVERY_NS``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from hwbpd import contents, messages
from hwbpd.clock import Clock
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.errors import BadClaim, LimitReached, NotPermitted, TargetGone
from hwbpd.core.events import AnyEvent, NotLoaded, VcpuCame, VcpuWent
from hwbpd.core.model import Claim, Kind, Mode, Piece, Pool, Target, Task, Vcpu
from hwbpd.hookspecs import ArmError, Backend, Machine
from hwbpd.outbox import Outbox
from hwbpd.performer import Watch
from hwbpd.rights import Rights
from hwbpd.sessions import Session, Sessions
from hwbpd.settings import Limits
from hwbpd.slot_file import Place, SlotFile
from hwbpd.status_page import StatusPage

ROOT: Final = 0
REPORT_EVERY_NS: Final = 100_000_000
_WATCHES_FROM: Final = 1 << 48  # as a resource id: the end of a vCPU's thread; no resource ever gets there

OfVmms = (
    messages.VmRequest
    | messages.VcpuRequest
    | messages.VcpuLoaded
    | messages.VcpuHit
    | messages.VcpuReport
    | messages.Vms
    | messages.HostContents
)


class _Vm:
    """One virtual machine."""

    __slots__ = ("label", "session", "vcpus", "vm_id")

    def __init__(self, vm_id: int, session: Session, label: str) -> None:
        self.vm_id = vm_id
        self.session = session
        self.label = label
        self.vcpus: dict[int, _Vcpu] = {}


class _Vcpu:
    """One of its vCPUs."""

    __slots__ = ("file", "number", "report", "reported_ns", "session", "strategy", "vcpu", "vm")

    def __init__(self, vcpu: Vcpu, vm: _Vm, session: Session, asked: messages.VcpuRequest, file: SlotFile) -> None:
        self.vcpu = vcpu
        self.vm = vm
        self.session = session
        self.number = asked.number
        self.strategy = asked.strategy
        self.file = file
        self.report: messages.VcpuReport | None = None
        self.reported_ns = 0

    @property
    def place(self) -> Place:
        thread = self.vcpu.thread
        return Place(self.session.owner.pid, thread.tid, self.number)


class Vmms:
    """
    All virtual machines.

    :param host: whose threads run the vCPUs; :param backends: what a vCPU's registers are, by the name of a profile,
        "" for the host's own; it raises ``BadClaim`` for a name that nobody knows.
    :param watch: whoever tells ``thread_ended``; :param feed: steps an event and all that comes of it.
    :param drain: sends what a resource has on its way.
    """

    def __init__(
        self,
        *,
        arbiter: Arbiter,
        host: Machine,
        backends: Callable[[str], Backend],
        sessions: Sessions,
        outbox: Outbox,
        rights: Rights,
        page: StatusPage,
        limits: Limits,
        clock: Clock,
        watch: Watch,
        feed: Callable[[AnyEvent], None],
        drain: Callable[[int], None],
    ) -> None:
        self.files: dict[Vcpu, SlotFile] = {}
        self._books = arbiter.books
        self._host = host
        self._backends = backends
        self._sessions = sessions
        self._outbox = outbox
        self._rights = rights
        self._page = page
        self._limits = limits
        self._clock = clock
        self._watch = watch
        self._feed = feed
        self._drain = drain
        self._vms: dict[int, _Vm] = {}
        self._vcpus: dict[int, _Vcpu] = {}
        self._kgdb: dict[int, None] = {}  # claims of kgdb that hold registers of the host
        self._last_vm = self._last_vcpu = 0
        self._news: dict[int, None] = {}  # vCPUs whose VMMs may have to be told something

    # --- requests ----------------------------------------------------------------------------------------------------

    def answer(self, session: Session, request: OfVmms) -> messages.Reply:
        """Return the reply; raises what refuses the request."""
        match request:
            case messages.VmRequest():
                return self._new_vm(session, request)
            case messages.VcpuRequest():
                return self._new_vcpu(session, request)
            case messages.VcpuLoaded():
                return self._loaded(session, request)
            case messages.VcpuHit():
                return self._hit(session, request)
            case messages.VcpuReport():
                return self._report(session, request)
            case messages.Vms():
                return messages.VmsReply(request.id, [self._row(vm) for vm in self._vms.values()])
            case messages.HostContents():
                return self._host_contents(session, request)

    def target(self, vcpu_id: int) -> Target:
        """Return what a claim on a vCPU is for; raises ``TargetGone``."""
        return Target(vcpu=self._vcpu(vcpu_id).vcpu)

    def backend(self, vcpu_id: int) -> Backend:
        """Return what a vCPU's registers can hold; raises ``TargetGone``."""
        return self._vcpu(vcpu_id).file.backend

    def _vcpu(self, vcpu_id: int) -> _Vcpu:
        found = self._vcpus.get(vcpu_id)
        if found is None:
            raise TargetGone(f"there is no vcpu {vcpu_id}; `hwbpctl kvm ls` lists those there are")
        return found

    def _own(self, session: Session, vcpu_id: int) -> _Vcpu:
        found = self._vcpu(vcpu_id)
        if found.session is not session:
            raise NotPermitted(f"vcpu {vcpu_id} belongs to {found.session.owner}, session {found.session.session_id}")
        return found

    def _new_vm(self, session: Session, request: messages.VmRequest) -> messages.VmReply:
        most = self._limits.vms_per_session
        if sum(vm.session is session for vm in self._vms.values()) >= most:
            raise LimitReached(f"this session has {most} vms, all it may have (limits.vms_per_session)")
        self._last_vm += 1
        self._vms[self._last_vm] = _Vm(self._last_vm, session, request.label)
        return messages.VmReply(request.id, self._last_vm, len(self._kgdb))

    def _new_vcpu(self, session: Session, request: messages.VcpuRequest) -> messages.VcpuReply:
        vm = self._vms.get(request.vm)
        if vm is None:
            raise TargetGone(f"there is no vm {request.vm}; `hwbpctl kvm ls` lists those there are")
        if vm.session.owner.pid != session.owner.pid:
            raise NotPermitted(f"vm {vm.vm_id} belongs to {vm.session.owner}, and a vcpu to its vm's process")
        if any(one.number == request.number for one in vm.vcpus.values()):
            raise BadClaim(f"vm {vm.vm_id} has a vcpu {request.number} already")
        task = self._host.task(request.tid)
        self._rights.may_ask_about(session.peer, task)
        self._check_limits(session)
        backend = self._backends(request.profile)
        vcpu_id = self._last_vcpu = self._last_vcpu + 1
        file = SlotFile(backend, partial(self._news.setdefault, vcpu_id))
        self._attend(vcpu_id, task)
        record = _Vcpu(Vcpu(vcpu_id, task), vm, session, request, file)
        self._vcpus[vcpu_id] = vm.vcpus[vcpu_id] = record
        self.files[record.vcpu] = file
        slots = dict(file.backend.slots())
        self._feed(VcpuCame(self._clock.now_ns(), record.vcpu, slots))
        return messages.VcpuReply(request.id, vcpu_id, {str(pool): count for pool, count in slots.items()})

    def _check_limits(self, session: Session) -> None:
        most, uid = self._limits.vcpus_per_session, session.owner.uid
        if sum(one.session is session for one in self._vcpus.values()) >= most:
            raise LimitReached(f"this session has {most} vcpus, all it may have (limits.vcpus_per_session)")
        most = self._limits.vcpus_per_uid
        if uid != ROOT and sum(one.session.owner.uid == uid for one in self._vcpus.values()) >= most:
            raise LimitReached(f"uid {uid} has {most} vcpus, all it may have (limits.vcpus_per_uid)")

    def _attend(self, vcpu_id: int, task: Task) -> None:
        watch_id = _WATCHES_FROM + vcpu_id
        try:
            self._host.attend(watch_id, Target(task=task), Mode())
        except ArmError:
            raise TargetGone(f"tid {task.tid} does not exist any more") from None
        self._watch.begin(watch_id, self._host.descriptors(watch_id))

    def _loaded(self, session: Session, request: messages.VcpuLoaded) -> messages.VcpuLoadedReply:
        found = self._own(session, request.vcpu)
        for resource_id in found.file.answered(request.version, failed=request.errno != 0):
            if request.errno:
                self._feed(NotLoaded(self._clock.now_ns(), resource_id, request.errno))
                continue
            for claim in self._books.riders.get(resource_id, ()):
                owner = self._sessions.of(claim.owner.session_id)
                if owner is not None:
                    sentence = f"its VMM has loaded it on vcpu {request.vcpu}"
                    self._outbox.send(owner, messages.LoadedNotice(claim.claim_id, sentence))
        self.tell()
        return messages.VcpuLoadedReply(request.id, request.vcpu)

    def _hit(self, session: Session, request: messages.VcpuHit) -> messages.VcpuHitReply:
        found = self._own(session, request.vcpu)
        now_ns = self._clock.now_ns()
        counted = 0
        for resource_id in dict.fromkeys(request.resources):
            if found.file.hit(resource_id, found.place, request.ip, request.kernel, now_ns):
                counted += 1
                self._drain(resource_id)
        return messages.VcpuHitReply(request.id, request.vcpu, counted)

    def _report(self, session: Session, request: messages.VcpuReport) -> messages.VcpuReportReply:
        found = self._own(session, request.vcpu)
        now_ns = self._clock.now_ns()
        if found.report is not None and now_ns - found.reported_ns < REPORT_EVERY_NS:
            per_s = 10**9 // REPORT_EVERY_NS
            raise LimitReached(f"vcpu {request.vcpu} has been reported on just now; {per_s} times a second is enough")
        found.report, found.reported_ns = request, now_ns
        return messages.VcpuReportReply(request.id, request.vcpu)

    def _row(self, vm: _Vm) -> messages.VmRow:
        owner = vm.session.owner
        vcpus = [self._vcpu_row(one) for one in vm.vcpus.values()]
        return messages.VmRow(vm.vm_id, vm.label, owner.pid, owner.comm, owner.uid, vcpus)

    def _vcpu_row(self, one: _Vcpu) -> messages.VcpuRow:
        pools = self._books.vcpus[one.vcpu]
        row = messages.VcpuRow(
            vcpu=one.vcpu.vcpu_id,
            number=one.number,
            tid=one.vcpu.thread.tid,
            strategy=one.strategy,
            pools={str(pool): counts.slots for pool, counts in pools.items()},
            held={str(pool): counts.held_cpu_wide(0) for pool, counts in pools.items()},
            loaded=one.file.is_loaded,
        )
        if one.report is None:
            return row
        said = one.report
        return messages.VcpuRow(
            row.vcpu, row.number, row.tid, row.strategy, row.pools, row.held, row.loaded,
            said.owner, said.entries, said.switches, said.traps,
        )  # fmt: skip

    def _host_contents(self, session: Session, request: messages.HostContents) -> messages.HostContentsReply:
        if not session.privileged:
            raise NotPermitted("only root may read what the host's registers hold: it has addresses of everybody")
        task = self._host.task(request.tid) if request.tid else None
        placed = contents.of_host(self._books, request.cpu, task)
        wanted = {slot: resource.piece for slot, resource in placed}
        rows = [_slot_row(resource.resource_id, slot, resource.piece) for slot, resource in placed]
        return messages.HostContentsReply(request.id, rows, contents.registers(self._backends(""), wanted))

    # --- what happens ------------------------------------------------------------------------------------------------

    def tell(self) -> None:
        """Tell every VMM what its vCPUs are to hold now, where that is something new and it can be told."""
        while self._news:
            one = self._vcpus.get(self._news.popitem()[0])
            news = None if one is None else one.file.news()
            if one is not None and news is not None:
                armed, values = news
                slots = [_slot_row(resource_id, entry.slot, entry.piece) for resource_id, entry in armed.items()]
                notice = messages.Registers(one.vcpu.vcpu_id, one.file.version, slots, values)
                self._outbox.send(one.session, notice)

    def kgdb_has(self, claim: Claim) -> None:
        """kgdb is about to have registers of the host; nothing for other claims, and those it is known of."""
        if claim.kind is Kind.KGDB and claim.target.vcpu is None and claim.claim_id not in self._kgdb:
            self._kgdb[claim.claim_id] = None
            self._tell_of_kgdb(f"{claim.owner} takes registers of the host on {claim.target}, as kgdb")

    def kgdb_has_not(self, claim_id: int) -> None:
        """A claim has given back what it had; nothing if it was none of kgdb's."""
        if claim_id in self._kgdb:
            del self._kgdb[claim_id]
            self._tell_of_kgdb(f"claim {claim_id} has let go of the host's registers")

    def _tell_of_kgdb(self, sentence: str) -> None:
        self._page.show_kgdb(len(self._kgdb))
        notice = messages.KgdbNotice(len(self._kgdb), sentence)
        for session in dict.fromkeys(vm.session for vm in self._vms.values()):
            self._outbox.send(session, notice)

    def watches(self, resource_id: int) -> bool:
        """Whether that is no resource but the end of a vCPU's thread."""
        return resource_id >= _WATCHES_FROM

    def thread_looked_at(self, watch_id: int) -> None:
        """Something was heard of a vCPU's thread."""
        found = self._vcpus.get(watch_id - _WATCHES_FROM)
        if found is not None and self._host.end_of_target(watch_id) is not None:
            self._close(found, f"tid {found.vcpu.thread.tid} has ended")

    def session_ended(self, session: Session, reason: str) -> None:
        """What it had of virtual machines is over."""
        for one in [one for one in self._vcpus.values() if session in (one.session, one.vm.session)]:
            self._close(one, reason)
        for vm in [vm for vm in self._vms.values() if vm.session is session]:
            del self._vms[vm.vm_id]

    def _close(self, one: _Vcpu, reason: str) -> None:
        vcpu_id = one.vcpu.vcpu_id
        del self._vcpus[vcpu_id], one.vm.vcpus[vcpu_id]
        self._watch.end(_WATCHES_FROM + vcpu_id)
        self._host.disarm(_WATCHES_FROM + vcpu_id)
        self._feed(VcpuWent(self._clock.now_ns(), one.vcpu, reason))
        del self.files[one.vcpu]


def _slot_row(resource_id: int, slot: tuple[Pool, int], piece: Piece) -> messages.SlotRow:
    pool, number = slot
    return messages.SlotRow(
        resource_id, str(pool), number, piece.span.address, piece.span.length_bytes, piece.access.letters
    )
