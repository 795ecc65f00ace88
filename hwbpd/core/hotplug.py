"""
CPUs that come and go.

When a CPU goes offline, claims on it live on without their slots there; when it is back they get them again, oldest
first, as far as there is room by then.
"""

from __future__ import annotations

import errno

from hwbpd.core.admission import fits
from hwbpd.core.desk import Desk
from hwbpd.core.effects import AddLeg, Change, DropLeg, Effect, Tell
from hwbpd.core.errors import HwbpError
from hwbpd.core.events import CpuCameOnline, CpuWentOffline, LegRefused, LegTaken
from hwbpd.core.model import Plan, Target


class Hotplug(Desk):
    """See the file."""

    def _cpu_went_offline(self, event: CpuWentOffline) -> list[Effect]:
        effects: list[Effect] = []
        for resource_id in self.books.resources_on(event.cpu):
            if event.cpu in self.books.absent.get(resource_id, ()):
                continue
            self.books.leave(resource_id, event.cpu)
            effects.append(DropLeg(resource_id, event.cpu))
            sentence = f"cpu {event.cpu} went offline; the slot there is free, and is taken again when it is back"
            effects += self._tell_riders(event.now_ns, resource_id, Change.OFFLINE, sentence, event.cpu)
        self.books.go_offline(event.cpu)
        return effects

    def _cpu_came_online(self, event: CpuCameOnline) -> list[Effect]:
        self.books.come_online(event.cpu)
        effects: list[Effect] = []
        for resource_id in self.books.resources_on(event.cpu):
            piece = self.books.resources[resource_id].piece
            try:
                fits(self.books, Target(cpus=(event.cpu,)), Plan((piece,)))
            except HwbpError as refusal:
                sentence = f"cpu {event.cpu} is back, without it: {refusal}"
                effects += self._tell_riders(event.now_ns, resource_id, Change.SUSPENDED, sentence, event.cpu)
                continue
            self.books.come_to(resource_id, event.cpu)
            effects.append(AddLeg(resource_id, event.cpu))
        return effects

    def _leg_taken(self, event: LegTaken) -> list[Effect]:
        sentence = f"cpu {event.cpu} is back, and so is the slot there"
        return self._tell_riders(event.now_ns, event.resource_id, Change.RESUMED, sentence, event.cpu)

    def _leg_refused(self, event: LegRefused) -> list[Effect]:
        self.books.leave(event.resource_id, event.cpu)
        name = errno.errorcode.get(event.errno, str(event.errno))
        sentence = f"cpu {event.cpu} is back, without it: the kernel refused with {name}"
        return self._tell_riders(event.now_ns, event.resource_id, Change.SUSPENDED, sentence, event.cpu)

    def _tell_riders(self, now_ns: int, resource_id: int, change: Change, sentence: str, cpu: int) -> list[Effect]:
        effects: list[Effect] = []
        for claim in self.books.riders.get(resource_id, ()):
            self.books.claims[claim.claim_id].story.tell(now_ns, sentence)
            effects.append(Tell(claim, change, sentence, cpu))
        return effects
