"""
Answers to questions, from the books as they are. They change nothing, so they need no event.
"""

from __future__ import annotations

from itertools import islice

import msgspec

from hwbpd import shortage
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.books import ClaimRecord
from hwbpd.core.errors import NoSuchClaim, NotPermitted
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Owner, Resource
from hwbpd.hits import Hits
from hwbpd.hookspecs import Backend, Machine
from hwbpd.messages import (
    Capabilities,
    CapabilitiesReply,
    ClaimRow,
    Counts,
    CountsReply,
    CpuRow,
    PoolsRow,
    ResourceRow,
    Slots,
    SlotsReply,
    WaitingRow,
    Why,
    WhyReply,
)
from hwbpd.settings import Settings


class Views:
    """What the daemon can be asked."""

    def __init__(self, arbiter: Arbiter, hits: Hits, machine: Machine, backend: Backend, settings: Settings) -> None:
        self._arbiter = arbiter
        self._books = arbiter.books
        self._hits = hits
        self._machine = machine
        self._backend = backend
        self._settings = settings

    def slots(self, request: Slots, asking: Owner, privileged: bool, now_ns: int) -> SlotsReply:
        """One page of who holds what. Whoever is not privileged sees the addresses of its own claims only."""
        # Resources are numbered upwards and entered in that order, so the first page costs only what it shows.
        rows: list[ResourceRow] = []
        more = False
        for resource_id, resource in self._books.resources.items():
            if resource_id <= request.after:
                continue
            if len(rows) == request.most:
                more = True
                break
            rows.append(self._resource_row(resource, now_ns, privileged or self._is_own(resource, asking)))
        return SlotsReply(
            request.id,
            pools={pool: counts.least for pool, counts in self._books.pools.items()},
            cpus=[] if request.after else [self._cpu_row(cpu) for cpu in sorted(self._books.possible)],
            resources=rows,
            more=more,
            waiting=[] if request.after else self._waiting_rows(request.most, asking, privileged, now_ns),
        )

    def capabilities(self, request: Capabilities) -> CapabilitiesReply:
        """What this machine's registers can hold, and this daemon's bounds."""
        limits, rings = self._settings.limits, self._settings.rings
        return CapabilitiesReply(
            request.id,
            machine=self._machine.name,
            backend=self._backend.name,
            architecture=self._machine.facts.architecture,
            pools={str(pool): slots for pool, slots in self._backend.slots().items()},
            cpus_possible=sorted(self._books.possible),
            cpus_online=sorted(self._books.online),
            registers=self._registers(),
            limits={
                **msgspec.structs.asdict(limits),
                "reserve_slots": self._settings.policy.reserve_slots,
                "wait_max_s": int(self._settings.policy.wait_max_s),
                "ring_bytes_default": rings.bytes_default,
                "ring_bytes_max": rings.bytes_max,
                "guard_hits_per_s": self._settings.guard.hits_per_s,
            },
            pools_on=self._pools_on(),
        )

    def _pools_on(self) -> list[PoolsRow]:
        """Which CPUs have how many slots, those with most first; nothing where all have as many."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for cpu in sorted(self._books.possible):
            alike.setdefault(tuple(counts.slots_on(cpu) for counts in self._books.pools.values()), []).append(cpu)
        if len(alike) == 1:
            return []
        return [
            PoolsRow(cpus, dict(zip(map(str, self._books.pools), slots, strict=True)))
            for slots, cpus in sorted(alike.items(), reverse=True)
        ]

    def _registers(self) -> dict[str, object]:
        """What the backend says, and what is to be known of the machine before it."""
        described = self._backend.describe()
        return {**described, "notes": [*self._machine.notes(), *described["notes"]]}

    def counts(self, request: Counts, asking: Owner, privileged: bool) -> CountsReply:
        """The counts of a claim so far; raises ``NoSuchClaim``, and ``NotPermitted`` for somebody else's."""
        record = self._books.claims.get(request.claim)
        if record is None or record.state is State.ATTRIBUTING:
            raise NoSuchClaim(f"claim {request.claim} is over or never was; `hwbpctl ls` lists those there are")
        _check_own(record, asking, privileged)
        account = self._hits.account(request.claim)
        now = self._hits.so_far(request.claim, record.resource_ids)
        return CountsReply(
            request.id, request.claim, now.hits, account.delivered, now.lost, account.dropped, account.filtered
        )

    def why(self, request: Why, asking: Owner, privileged: bool, now_ns: int) -> WhyReply:
        """
        The story of a claim, over or not, or why there is no room.

        :raises NoSuchClaim: when the claim is not known, or no longer; :raises NotPermitted: for somebody else's.
        """
        if request.errno:
            return WhyReply(request.id, 0, "", list(shortage.lines(self._arbiter, now_ns)))
        record = self._arbiter.record(request.claim)
        if record is None:
            raise NoSuchClaim(f"there is no claim {request.claim}, or it was over too long ago")
        _check_own(record, asking, privileged)
        return WhyReply(request.id, request.claim, record.state, list(record.story.lines()))

    def _cpu_row(self, cpu: int) -> CpuRow:
        pools = self._books.pools.items()
        return CpuRow(
            cpu=cpu,
            online=cpu in self._books.online,
            cpu_wide={pool: counts.held_cpu_wide(cpu) for pool, counts in pools},
            busiest_task={pool: counts.held_by_busiest(cpu) for pool, counts in pools},
            slots={pool: counts.slots_on(cpu) for pool, counts in pools if counts.slots_on(cpu) != counts.least},
        )

    def _is_own(self, resource: Resource, asking: Owner) -> bool:
        return any(claim.owner.uid == asking.uid for claim in self._books.riders[resource.resource_id])

    def _resource_row(self, resource: Resource, now_ns: int, shows_address: bool) -> ResourceRow:
        piece, target = resource.piece, resource.target
        return ResourceRow(
            resource=resource.resource_id,
            address=piece.span.address if shows_address else None,
            length=piece.span.length_bytes,
            access=piece.access.letters,
            pool=piece.pool,
            user=resource.mode.user,
            kernel=resource.mode.kernel,
            delivery=resource.mode.delivery,
            tid=target.task.tid if target.task else 0,
            pid=target.process.pid if target.process else 0,
            vcpu=target.vcpu.vcpu_id if target.vcpu else 0,
            cpus=None if target.cpus is None else list(target.cpus),
            claims=[
                self._claim_row(self._books.claims[claim.claim_id], resource.resource_id, now_ns)
                for claim in self._books.riders[resource.resource_id]
            ],
        )

    def _waiting_rows(self, most: int, asking: Owner, privileged: bool, now_ns: int) -> list[WaitingRow]:
        """The first ``most`` of those who wait, in the order of the queue."""
        return [
            self._waiting_row(record, now_ns, privileged or record.claim.owner.uid == asking.uid)
            for record in islice(self._arbiter.queue, most)
        ]

    def _waiting_row(self, record: ClaimRecord, now_ns: int, shows_address: bool) -> WaitingRow:
        claim = record.claim
        return WaitingRow(
            claim=claim.claim_id,
            pid=claim.owner.pid,
            comm=claim.owner.comm,
            uid=claim.owner.uid,
            kind=claim.kind,
            label=claim.label,
            priority=claim.priority,
            state=record.state,
            position=self._arbiter.queue.position(claim.claim_id),
            age_ns=now_ns - claim.requested_ns,
            deadline_ns=self._deadline_ns(record),
            address=claim.span.address if shows_address else None,
            length=claim.span.length_bytes,
            access=claim.access.letters,
            target=str(claim.target),
            blockers=list(shortage.in_the_way(self._arbiter, record)),
        )

    def _deadline_ns(self, record: ClaimRecord) -> int:
        """When its wait ends, or those that it displaces have given way; 0 for one that is suspended."""
        if record.state is State.DISPLACING:
            return max((self._books.claims[victim].yield_by_ns for victim in record.victims), default=0)
        return record.claim.wait_until_ns if record.state is State.WAITING else 0

    def _claim_row(self, record: ClaimRecord, resource_id: int, now_ns: int) -> ClaimRow:
        claim = record.claim
        had = self._hits.so_far_on(resource_id, claim.claim_id)
        return ClaimRow(
            claim=claim.claim_id,
            pid=claim.owner.pid,
            comm=claim.owner.comm,
            uid=claim.owner.uid,
            kind=claim.kind,
            label=claim.label,
            state=record.state,
            age_ns=now_ns - claim.requested_ns,
            hits=had.hits,
            lost=had.lost,
            dropped=self._hits.account(claim.claim_id).dropped,
        )


def _check_own(record: ClaimRecord, asking: Owner, privileged: bool) -> None:
    claim = record.claim
    if not privileged and claim.owner.uid != asking.uid:
        raise NotPermitted(f"claim {claim.claim_id} is uid {claim.owner.uid}'s; only they and root may look into it")
