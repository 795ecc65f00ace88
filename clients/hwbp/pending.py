"""
A claim that was asked for and may have to wait: its place in the queue, its grant or the end of its wait.

The wait is not the request: the daemon answers at once, with ``granted`` or with ``queued``, and the grant, or that
there will be none, comes later as a notice. So while a claim waits its session goes on: hits of other claims are read,
other things are asked. One shape serves all: ``Client.claim(wait=...)`` is ``Client.queue(wait=...).granted()``. There
is no callback for the place: whoever wants to show it has it here before the waiting begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from hwbp.connection import Connection
from hwbp.errors import (
    BadMessage,
    Holder,
    HwbpError,
    NoSuchClaim,
    RequestTimedOut,
    Stale,
    TargetGone,
    WaitTimedOut,
    refusal_named,
    refusal_of,
)
from hwbp.inbox import Inbox
from hwbp.syntax import Event
from hwbp.values import Ended
from hwbp.watch import Watch, deadline_after

_CLASSES: Mapping[str, type[HwbpError]] = {  # by the reason for which the wait ended
    "timeout": WaitTimedOut,
    "exit": TargetGone,
    "exec": TargetGone,
    "forced": NoSuchClaim,
    "released": NoSuchClaim,
    "protocol": BadMessage,
    "closing": Stale,
    "stale": Stale,
    "connection": Stale,
    "closed": Stale,
}


class Pending:
    """
    A claim between its request and its grant. As a context manager it is cancelled at the end if it still waits.

    What does not change: ``claim_id``; ``event``; and, as it was when it was asked for: ``position`` (its place among
    those who wait for the same, from 1; 0 for a claim that did not have to wait), ``refusal`` (why it was not granted
    at once; None where it was). Where it stands now is in ``Client.slots().waiting``.
    """

    def __init__(
        self,
        connection: Connection,
        event: Event,
        reply: Mapping[str, Any],
        until_ns: int,
        keep: Callable[[Watch], None],
    ) -> None:
        """
        :param reply: ``granted`` or ``queued``.
        :param until_ns: until when it waits, CLOCK_MONOTONIC.
        :param keep: is given the watch when there is one.
        """
        self.claim_id: int = reply["claim"]
        self.event = event
        self.position: int = reply.get("position", 0)
        self.refusal: HwbpError | None = refusal_of(reply) if reply["op"] == "queued" else None
        self._connection = connection
        self._until_ns = until_ns
        self._keep = keep
        self._inbox: Inbox = connection.open_inbox(self.claim_id)
        self._watch: Watch | None = None
        if self.refusal is None:
            self._inbox.granted = reply

    def __repr__(self) -> str:
        how = "ended" if self.ended else "waiting" if self.is_waiting else "granted"
        return f"<Pending {self.claim_id}: {self.event}, {how}>"

    @property
    def sentence(self) -> str:
        """Why it was not granted at once, for people; empty where it was."""
        return "" if self.refusal is None else str(self.refusal)

    @property
    def holders(self) -> tuple[Holder, ...]:
        """Who was in the way when it was asked for."""
        return () if self.refusal is None else self.refusal.holders

    @property
    def is_waiting(self) -> bool:
        """Whether it waits, as far as has been heard."""
        return self._inbox.granted is None and self._inbox.ended is None

    @property
    def ended(self) -> Ended | None:
        """Why it is over; None while it waits or is held, as far as has been heard."""
        return self._inbox.ended

    def granted(self, timeout: float | None = None, until: int | None = None) -> Watch | None:
        """
        Wait for the grant and return the watch, the same one each time.

        :param timeout: seconds; None for as long as the claim waits.
        :param until: a file descriptor whose readability ends the wait, as in ``Client.wait``.
        :return: None when that passed and the claim still waits.
        :raises WaitTimedOut: when it has waited in vain.
        :raises HwbpError: when it ended for another reason: ``TargetGone``, ``NoSuchClaim`` (it was cancelled, or an
            operator released it), ``Stale`` (the session is over), or a refusal by the kernel.
        :raises RequestTimedOut: when the daemon lets the time pass and says nothing.
        """
        # The daemon answers by the deadline that it was given; it gets as long after that as for any answer.
        told_by_ns = self._until_ns + int(self._connection.timeout_s * 1e9)
        asked_ns = deadline_after(timeout)
        while self.is_waiting:
            deadline_ns = told_by_ns if asked_ns is None else min(asked_ns, told_by_ns)
            if self._connection.wait(deadline_ns, until) or not self.is_waiting:
                continue
            now_ns = time.monotonic_ns()
            if now_ns >= told_by_ns:
                raise RequestTimedOut(f"hwbpd did not say what became of claim {self.claim_id}, whose wait is over")
            if until is not None or (asked_ns is not None and now_ns >= asked_ns):
                return None
        if self._watch is None and self._inbox.granted is not None:
            self._watch = Watch(self._connection, self.event, self._inbox.granted, self._inbox)
            self._keep(self._watch)
        if self._watch is None:
            assert self.ended is not None
            raise self._end_of_wait(self.ended)
        return self._watch

    def cancel(self) -> None:
        """Wait no longer. A claim that was granted meanwhile is given back; one that is over is left so."""
        if self.ended is not None:
            return
        if self._watch is not None:
            self._watch.release()
            return
        with suppress(NoSuchClaim):  # its wait ended just before
            self._connection.request("release", claim=self.claim_id)
        self._connection.end_claim(self.claim_id, Ended("released", "it was cancelled while it waited"))

    def _end_of_wait(self, ended: Ended) -> HwbpError:
        if ended.errno and ended.reason not in _CLASSES:
            return refusal_named(ended.errno, ended.sentence, ended.holders, self.claim_id)
        return _CLASSES.get(ended.reason, HwbpError)(ended.sentence, ended.holders, self.claim_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is None:
            with suppress(Stale):  # then it is over already
                self.cancel()


def wait_until_ns(wait: float) -> int:
    """
    Return until when to wait, CLOCK_MONOTONIC, for the protocol.

    :param wait: seconds; 0 for not at all.
    :raises ValueError: for a wait without an end, or one that is negative.
    """
    if not (math.isfinite(wait) and wait >= 0):
        raise ValueError(f"a wait is a finite number of seconds, at least 0, not {wait}")
    return time.monotonic_ns() + int(wait * 1e9) if wait else 0
