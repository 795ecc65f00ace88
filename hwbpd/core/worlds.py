"""
The worlds of vCPUs: they come, their VMMs may fail to load something, and they go.

A vCPU is a target like any other, with slots of its own (``Books.vcpus``); whatever is decided about claims on it is
decided where it is for the host's. Only what follows is different:

1. Nobody outside the daemon has slots there, so there is no reserve, and the machine never refuses.
2. Its VMM loads what it is told when it next enters the guest, and may then say that KVM would not have it. That ends
   the claims concerned, and no others.
3. With the vCPU every claim on it ends, those that wait included.
"""

from __future__ import annotations

import errno

from hwbpd.core.desk import Ending
from hwbpd.core.effects import Effect, End
from hwbpd.core.events import NotLoaded, VcpuCame, VcpuWent
from hwbpd.core.giving_way import GivingWay
from hwbpd.core.lifecycle import ARMED_BY_US
from hwbpd.core.model import Pool, Target


class Worlds(GivingWay):
    """See the file."""

    def _vcpu_came(self, event: VcpuCame) -> list[Effect]:
        self.books.open_world(event.vcpu, event.slots)
        return []

    def _vcpu_went(self, event: VcpuWent) -> list[Effect]:
        target = Target(vcpu=event.vcpu)
        ending = Ending(End.EXIT, f"{target} is over: {event.reason}")
        effects: list[Effect] = []
        self._room_at = []  # what comes free here is nobody's any more
        for record in self.queue.candidates(target):
            effects += self._leave_queue(event.now_ns, record, ending)
        held = [claim for pool in self.books.vcpus[event.vcpu] for claim in self._riders_on(event, pool)]
        for claim_id in dict.fromkeys(held):
            effects += self._release(event.now_ns, self.books.claims[claim_id], ending)
        self._room_at = None
        self.books.close_world(event.vcpu)
        return effects

    def _riders_on(self, event: VcpuWent, pool: Pool) -> list[int]:
        ids = self.books.of_whole(event.vcpu, pool)
        return [claim.claim_id for resource_id in ids for claim in self.books.riders[resource_id]]

    def _not_loaded(self, event: NotLoaded) -> list[Effect]:
        name = errno.errorcode.get(event.errno, f"errno {event.errno}")
        effects: list[Effect] = []
        for claim in self.books.riders.get(event.resource_id, ()):
            record = self.books.claims[claim.claim_id]
            if record.state in ARMED_BY_US:
                ending = Ending(End.REFUSED, f"the VMM of {claim.target} could not load it: {name}")
                effects += self._release(event.now_ns, record, ending)
        return effects
