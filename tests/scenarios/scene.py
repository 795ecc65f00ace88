"""
A small stage for the scenarios: one daemon on fakes, a thread or two, and clients who say what they want.

The scenarios tell each policy as its users meet it, through messages only; the rules themselves are tested where they
live, under ``tests/core``.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hwbpd.core.model import Pool
from tests.fakes import FakeClient, Rig

TID, OTHER_TID = 800, 801
ADDRESS = 0x404040
USER = 1000


class Scene:
    """
    A daemon on fakes with one pool of slots.

    :param reserve_slots: kept free for users outside hwbpd.
    """

    def __init__(self, slots: int = 1, cpus: int = 1, reserve_slots: int = 0) -> None:
        self.rig = Rig(slots={Pool.ANY: slots}, cpus=cpus, reserve_slots=reserve_slots)
        self.rig.rights.allowed_cpu_wide = True
        for tid in (TID, OTHER_TID):
            self.rig.machine.start_task(tid)

    def claim(self, client: FakeClient, nth: int = 0, **wish: Any) -> dict[str, Any]:
        """Claim the ``nth`` of some addresses, on a thread unless the wish says otherwise; return the reply."""
        if "cpus" not in wish:
            wish.setdefault("tid", TID)
        fields: dict[str, Any] = {"address": ADDRESS + 64 * nth, "length": 8, "access": "w", "delivery": "count"}
        return self.rig.ask(client, "claim", **fields | wish)

    def wait_claim(self, client: FakeClient, seconds: float, nth: int = 0, **wish: Any) -> dict[str, Any]:
        """The same, with so long a time to wait for room."""
        return self.claim(client, nth, wait_until_ns=self.rig.clock.now_ns() + int(seconds * 1e9), **wish)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the daemon do what is due."""
        self.rig.clock.wind(seconds)
        self.rig.turn()

    def states(self, client: FakeClient) -> dict[int, str]:
        """How each claim stands, as ``hwbpctl ls`` shows it."""
        reply = self.rig.ask(client, "slots")
        rows = [*reply.get("waiting", []), *(of for row in reply["resources"] for of in row["claims"])]
        return {row["claim"]: row["state"] for row in rows}

    def slots_held(self) -> int:
        """How many slots the kernel has given out on CPU 0, to whomever."""
        return len(self.rig.machine.kernel.events())


def told(client: FakeClient) -> deque[dict[str, Any]]:
    """The notices that have come since the client last looked."""
    return deque(message for message in client.read() if "n" in message)


def ops(client: FakeClient) -> list[str]:
    """What sort of notices these were."""
    return [notice["op"] for notice in told(client)]
