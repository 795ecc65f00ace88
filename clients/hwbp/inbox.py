"""
What arrived for one claim and was not read yet: raw records and changes, bounded; how the claim is; whether it is over.

Replies and hits come through the same socket, so whoever waits for a reply has to take in the hits before it. They
stay bytes until somebody reads them. Beyond the bound the newest message is discarded and its hits are counted: it is
the reader's choice not to read, and no reader may eat the machine's memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from hwbp.values import Change, Counts, Ended

KEPT_BYTES_MAX = 64 << 20  # per claim; about 1.4 million hits without call chains
CHANGES_MAX = 256  # per claim; of more, the newest are kept: they tell how it is now


class Inbox:
    """The unread hits of one claim, what happened to it, and its end."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self.lost = 0  # as last heard, hits for which the ring had no room
        self.dropped = 0  # as last heard, hits for which the way to this client had none
        self.discarded = 0  # delivered, but unread beyond the bound
        self.granted: Mapping[str, Any] | None = None  # of a claim that waited: the notice that it has its slots
        self.guarded = False  # too many hits: nothing comes until it is armed again
        self.suspended = False  # it has given way: nothing comes until there is room
        self.revoke: Change | None = None  # it is to give way
        self.ended: Ended | None = None
        self.final: Counts | None = None
        self._kept_bytes_max = kept_bytes_max
        self._kept_bytes = 0
        self._messages: deque[tuple[bytes, int]] = deque()
        self._changes: deque[Change] = deque(maxlen=CHANGES_MAX)

    @property
    def unread(self) -> bool:
        """Whether there is something to take."""
        return bool(self._messages)

    def keep(self, records: bytes, count: int, lost: int, dropped: int) -> None:
        """Keep one message of hits; ``lost`` and ``dropped`` are running totals. One message always fits."""
        self.lost = lost
        self.dropped = dropped
        if not count:
            return  # only the totals moved
        if self._messages and self._kept_bytes + len(records) > self._kept_bytes_max:
            self.discarded += count
            return
        self._messages.append((records, count))
        self._kept_bytes += len(records)

    def take(self) -> tuple[bytes, int]:
        """Return the oldest unread message: records, and how many there are. Raises IndexError when there is none."""
        records, count = self._messages.popleft()
        self._kept_bytes -= len(records)
        return records, count

    def change(self, change: Change) -> None:
        """Something happened to the claim, and it goes on."""
        if change.cpu is None:  # what concerns one CPU leaves the claim as it is
            self._turn(change)
        self._changes.append(change)

    def _turn(self, change: Change) -> None:
        match change.what:
            case "guarded":
                self.guarded = True
            case "revoke":
                self.revoke = change
            case "spared":
                self.revoke = None
            case "suspended":
                self.suspended, self.revoke = True, None
            case "resumed":
                self.guarded = self.suspended = False

    def take_changes(self) -> tuple[Change, ...]:
        """Return the changes that were not taken yet, oldest first."""
        changes = tuple(self._changes)
        self._changes.clear()
        return changes

    def end(self, ended: Ended, final: Counts | None = None) -> None:
        """The claim is over. The first reason stays."""
        if self.ended is None:
            self.ended = ended
            self.final = final
            self.revoke = None
        if final is not None:
            self.lost = final.lost
            self.dropped = final.dropped
