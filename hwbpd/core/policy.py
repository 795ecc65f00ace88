"""
What may be set of the policies: numbers, and nothing that decides.
"""

from __future__ import annotations

from msgspec import Struct

NS_PER_S = 1_000_000_000


class Policy(Struct, frozen=True):
    """
    How claims are arbitrated beyond what the kernel would.

    ``reserve_slots``: on each CPU, for users outside hwbpd. ``revoke_grace_ns``: how long one that has to give way may
    take over it. ``retry_ns``: how often a claim is tried again that has room in the books and none in the kernel.
    """

    reserve_slots: int = 0
    revoke_grace_ns: int = NS_PER_S // 10
    retry_ns: int = NS_PER_S
