"""A granted claim, as its owner sees it: its hits, its counts, its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Self

from hwbp.connection import Connection
from hwbp.errors import BadClaim, NoSuchClaim, Stale
from hwbp.inbox import Inbox
from hwbp.records import Hit, hits_of
from hwbp.syntax import Event
from hwbp.values import Change, Counts, Ended, pieces_of, value_of


class Watch:
    """
    A claim that was granted. As a context manager it releases the claim at the end.

    What does not change: ``claim_id``; ``event`` (what was asked, with the length that was used); ``pieces`` (what the
    slots hold); ``ring_bytes`` (per leg); ``kind`` (as what it is served, which may be less than was asked for); and
    ``guard`` (hits a second that silence it; 0 for no bound).
    """

    def __init__(self, connection: Connection, event: Event, granted: Mapping[str, Any], inbox: Inbox) -> None:
        """
        :param granted: the daemon's reply, or its notice to a claim that waited.
        :param inbox: the claim's.
        """
        self.claim_id: int = granted["claim"]
        self.event = event
        self.pieces = pieces_of(granted)
        self.ring_bytes: int = granted["ring_bytes"]
        self.kind: str = granted.get("kind", "")
        self.guard: int = granted.get("guard", 0)
        self._connection = connection
        self._inbox = inbox

    def __repr__(self) -> str:
        return f"<Watch {self.claim_id}: {self.event}, {self.state}>"

    @property
    def state(self) -> str:
        """
        As last heard: "armed"; "guarded" (there were too many hits; it keeps its slot and reports nothing until
        ``rearm``, or by itself where the daemon is set so); "yielding" (see ``revoke``); "suspended" (it has given way,
        and is resumed by itself when there is room); or "ended".
        """
        if self.ended:
            return "ended"
        if self._inbox.suspended:
            return "suspended"
        if self._inbox.revoke:
            return "yielding"
        return "guarded" if self._inbox.guarded else "armed"

    @property
    def revoke(self) -> Change | None:
        """
        What asks the claim to give way: for whom (``holders``), why, and at which ``deadline_ns`` its slots are taken
        without having been given; None while nothing does.

        It is heard of as any change is, during ``hits``, ``Client.wait`` or any request; whoever wants to give way
        before the deadline waits there, looks here, and calls ``yield_``. There is no callback: one would be called
        amid another request, where nothing can be asked.
        """
        return self._inbox.revoke

    @property
    def ended(self) -> Ended | None:
        """Why the claim is over; None while it is held, as far as has been heard. Hits may still be unread."""
        return self._inbox.ended

    @property
    def unread(self) -> bool:
        """Whether hits are here that nobody has read."""
        return self._inbox.unread

    @property
    def lost(self) -> int:
        """Hits for which the ring had no room, as last heard."""
        return self._inbox.lost

    @property
    def dropped(self) -> int:
        """Hits for which the way to this client had no room, as last heard."""
        return self._inbox.dropped

    @property
    def discarded(self) -> int:
        """Hits that were delivered and then thrown away here, as too many were unread (``inbox.KEPT_BYTES_MAX``)."""
        return self._inbox.discarded

    def hits(self, timeout: float | None = None) -> Iterator[Hit]:
        """
        Yield hits as they come; between CPUs and threads they are not in order of time.

        Ends when ``timeout`` seconds pass without a hit, and when the claim is over and all was read; ``state`` tells
        which. None waits for ever, 0 takes only what has arrived. One reader at a time.

        Changes (see ``changes``) do not end it. A guarded claim brings nothing until it is armed again, so whoever
        may meet a flood gives a timeout, and then looks at ``state``.
        """
        while True:
            deadline_ns = deadline_after(timeout)
            while not self._inbox.unread:
                if self.ended or not self._connection.wait(deadline_ns):
                    break
            if not self._inbox.unread:
                return
            yield from self.read_message()

    def read_message(self) -> Iterator[Hit]:
        """Take the oldest unread message and yield its hits. Raises IndexError when nothing is unread."""
        return hits_of(*self._inbox.take())

    def changes(self) -> tuple[Change, ...]:
        """
        Return what happened to the claim since this was last called, oldest first; it does not wait.

        Such things are told between hits, so they are here after ``hits``, ``Client.wait`` or any request. The newest
        are kept (``inbox.CHANGES_MAX``).
        """
        return self._inbox.take_changes()

    def rearm(self) -> None:
        """
        Let the claim report again after it was guarded.

        :raises BadClaim: when it is not guarded.
        :raises NoResources: when somebody else got its slot meanwhile; the claim is then over.
        """
        self._connection.request("rearm", claim=self.claim_id)
        self._inbox.guarded = False

    def yield_(self) -> None:
        """
        Give way now, as ``revoke`` asks, rather than at its deadline.

        Hits that came before stay readable, and the counts go on when the claim is resumed. Where it has been suspended
        or spared meanwhile there is nothing left to do, which is no error.

        :raises BadClaim: when it was not asked to.
        """
        was_asked = self.revoke is not None or self._inbox.suspended
        try:
            self._connection.request("yield", claim=self.claim_id)
        except BadClaim:
            if was_asked and self._inbox.revoke is None:  # its deadline passed just before, or its reason
                return
            raise

    def counts(self) -> Counts:
        """
        Return what became of the hits so far; after the end, the final counts.

        :raises Stale: when the session ended before the final counts were told.
        """
        if self._inbox.final:
            return self._inbox.final
        try:
            reply = self._connection.request("counts", claim=self.claim_id)
        except NoSuchClaim:
            if self._inbox.final:  # the end was told just before
                return self._inbox.final
            raise
        return value_of(Counts, reply)

    def release(self) -> Counts:
        """
        Give the slot back and return the final counts. Hits that came before stay readable.

        Releasing what is over returns its final counts again.

        :raises Stale: when the session ended before the final counts were told.
        """
        if self._inbox.final:
            return self._inbox.final
        try:
            reply = self._connection.request("release", claim=self.claim_id)
        except NoSuchClaim:
            if self._inbox.final:  # the target exited just before
                return self._inbox.final
            raise
        counts = value_of(Counts, reply)
        self._connection.end_claim(self.claim_id, Ended("released", "the claim was released"), counts)
        return counts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Stale, NoSuchClaim):  # then it is over already
            self.release()


def deadline_after(timeout: float | None) -> int | None:
    """Return the CLOCK_MONOTONIC time in ns that is ``timeout`` seconds away; None for never."""
    return None if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
