"""
The daemon's decisions, as a session hears them that follows: what arrived and was not read yet, bounded.

Looking on must cost nobody anything, so what cannot be kept is counted, on either side of the socket: ``missed`` by the
daemon, as the way to us had no room, and ``discarded`` here, the oldest first, as nobody took them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hwbp.values import value_of

DECISIONS_KEPT_MAX = 4096


@dataclass(frozen=True, slots=True)
class Decision:
    """
    Something the daemon decided.

    ``what``: of a claim "granted", "refused", "guarded", "offline", "suspended", "resumed" or "ended"; of a session
    "session" or "session over"; or what a later daemon says.
    """

    what: str
    at_ns: int  # CLOCK_MONOTONIC
    session: int  # of the owner, as are pid, comm and uid
    pid: int
    comm: str
    uid: int
    claim: int = 0  # 0 for none
    about: str = ""  # the claim, for people: "mem:0x404040/8:w for tid 812 as perf"
    kind: str = ""
    label: str = ""  # of the claim; of a session, the name of its client
    errno: str = ""  # of a refusal
    reason: str = ""  # of an end: as in ``Ended``, or "session" (its session ended), "stopping" (the daemon ended)
    sentence: str = ""
    cpu: int | None = None


class Decisions:
    """What a session that follows has heard; made by ``Client.follow``."""

    def __init__(self, kept_max: int = DECISIONS_KEPT_MAX) -> None:
        self.missed = 0  # as last heard, decisions for which the way to us had no room
        self.discarded = 0  # arrived, and thrown away here as too many were unread
        self._unread: deque[Decision] = deque(maxlen=kept_max)

    @property
    def unread(self) -> bool:
        """Whether there is something to take."""
        return bool(self._unread)

    def keep(self, message: Mapping[str, Any]) -> None:
        """Keep one notice; raises ``BadMessage`` when a field is missing."""
        if len(self._unread) == self._unread.maxlen:
            self.discarded += 1
        self._unread.append(value_of(Decision, message))
        self.missed = int(message.get("missed", 0))

    def take(self) -> tuple[Decision, ...]:
        """Return the decisions since this was last called, oldest first; it does not wait (``Client.wait`` does)."""
        taken = tuple(self._unread)
        self._unread.clear()
        return taken
