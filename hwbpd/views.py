"""
Answers to questions, from the books as they are. They change nothing, so they need no event.
"""

from __future__ import annotations

import msgspec

from hwbpd.core.arbiter import Arbiter
from hwbpd.core.books import ClaimRecord
from hwbpd.core.errors import NoSuchClaim, NotPermitted
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Delivery, Owner, Resource
from hwbpd.hits import Hits
from hwbpd.hookspecs import Backend, Machine
from hwbpd.messages import (
    Capabilities,
    CapabilitiesReply,
    ClaimRow,
    Counts,
    CountsReply,
    CpuRow,
    ResourceRow,
    Slots,
    SlotsReply,
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
            pools={pool: counts.slots for pool, counts in self._books.pools.items()},
            cpus=[] if request.after else [self._cpu_row(cpu) for cpu in sorted(self._books.possible)],
            resources=rows,
            more=more,
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
                "ring_bytes_default": rings.bytes_default,
                "ring_bytes_max": rings.bytes_max,
                "guard_hits_per_s": self._settings.guard.hits_per_s,
            },
        )

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
        flow = self._hits.flow(request.claim)
        return CountsReply(
            request.id,
            request.claim,
            self._hits_of(record),
            flow.delivered,
            self._lost_of(record),
            flow.dropped,
            flow.filtered,
        )

    def why(self, request: Why, asking: Owner, privileged: bool) -> WhyReply:
        """The story of a claim, over or not; raises ``NoSuchClaim`` when it is not known, or no longer."""
        record = self._arbiter.record(request.claim)
        if record is None:
            raise NoSuchClaim(f"there is no claim {request.claim}, or it was over too long ago")
        _check_own(record, asking, privileged)
        return WhyReply(request.id, request.claim, record.state, list(record.story.lines()))

    def _hits_of(self, record: ClaimRecord) -> int:
        return sum(self._machine.totals(resource_id).hits for resource_id in record.resource_ids)

    def _lost_of(self, record: ClaimRecord) -> int:
        if record.claim.mode.delivery is not Delivery.HITS:
            return 0
        return sum(self._machine.totals(resource_id).lost for resource_id in record.resource_ids)

    def _cpu_row(self, cpu: int) -> CpuRow:
        pools = self._books.pools.items()
        return CpuRow(
            cpu=cpu,
            online=cpu in self._books.online,
            cpu_wide={pool: counts.held_cpu_wide(cpu) for pool, counts in pools},
            busiest_task={pool: counts.held_by_busiest(cpu) for pool, counts in pools},
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
            cpus=None if target.cpus is None else list(target.cpus),
            claims=[
                self._claim_row(self._books.claims[claim.claim_id], resource.resource_id, now_ns)
                for claim in self._books.riders[resource.resource_id]
            ],
        )

    def _claim_row(self, record: ClaimRecord, resource_id: int, now_ns: int) -> ClaimRow:
        claim = record.claim
        flow = self._hits.flow(claim.claim_id)
        totals = self._machine.totals(resource_id)
        return ClaimRow(
            claim=claim.claim_id,
            pid=claim.owner.pid,
            comm=claim.owner.comm,
            uid=claim.owner.uid,
            kind=claim.kind,
            label=claim.label,
            state=record.state,
            age_ns=now_ns - claim.requested_ns,
            hits=totals.hits,
            lost=totals.lost,
            dropped=flow.dropped,
        )


def _check_own(record: ClaimRecord, asking: Owner, privileged: bool) -> None:
    claim = record.claim
    if not privileged and claim.owner.uid != asking.uid:
        raise NotPermitted(f"claim {claim.claim_id} is uid {claim.owner.uid}'s; only they and root may look into it")
