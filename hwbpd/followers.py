"""
Every decision, told once: to the log, and to the sessions that follow.

A follower sees what concerns its own uid; root sees everything. It must cost nobody else anything: without followers a
decision is a line of log and no more, and one who does not read misses decisions, which are counted (``outbox.py``),
rather than holding up the others or losing its session. How many sessions of a user may follow is bounded, since each
makes every decision about that user a message more.
"""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from hwbpd.clock import Clock
from hwbpd.core.errors import LimitReached
from hwbpd.core.model import Owner
from hwbpd.messages import Decision
from hwbpd.outbox import Outbox
from hwbpd.sessions import Session

log = structlog.get_logger("hwbpd")


class Decisions:
    """:param followers_per_uid: how many sessions of one user may follow; root is not bound."""

    def __init__(self, outbox: Outbox, clock: Clock, followers_per_uid: int) -> None:
        self._outbox = outbox
        self._clock = clock
        self._followers_per_uid = followers_per_uid
        self._of_all: dict[int, Session] = {}  # followers of everything, by session
        self._of_uid: dict[int, dict[int, Session]] = {}  # followers of what concerns their own uid

    def follow(self, session: Session) -> None:
        """
        From now on tell this session; following twice is following once.

        :raises LimitReached: when enough sessions of its uid follow.
        """
        if session.privileged:
            self._of_all[session.session_id] = session
            return
        uid = session.owner.uid
        ours = self._of_uid.get(uid, {})
        if session.session_id not in ours and len(ours) >= self._followers_per_uid:
            allowed = "more are not allowed (limits.followers_per_uid)"
            raise LimitReached(f"uid {uid} follows with {len(ours)} sessions; {allowed}")
        self._of_uid.setdefault(uid, {})[session.session_id] = session

    def forget(self, session: Session) -> None:
        """The session ends; it hears no more."""
        if self._of_all.pop(session.session_id, None) is not None:
            return
        uid = session.owner.uid
        ours = self._of_uid.get(uid)
        if ours is not None and ours.pop(session.session_id, None) is not None and not ours:
            del self._of_uid[uid]

    def tell(
        self,
        what: str,
        owner: Owner,
        sentence: str = "",
        *,
        claim_id: int = 0,
        about: str = "",
        kind: str = "",
        label: str = "",
        errno: str = "",
        how: str = "",
        cpu: int | None = None,
        **only_logged: object,
    ) -> None:
        """
        Tell a decision.

        :param what: "granted", "refused", "ended", "session", "session over", or what became of a claim that goes on.
        :param owner: whom it concerns.
        :param sentence: why.
        :param about: the claim in perf's syntax with its target.
        :param label: the claim's, or of a session the name that its client gave itself.
        :param how: how a claim came to its end.
        """
        said = {"claim_id": claim_id, "claim": about, "label": label, "errno": errno, "how": how, "reason": sentence}
        known = {name: value for name, value in said.items() if value}
        log.info(what, owner=str(owner), uid=owner.uid, session=owner.session_id, **known, **only_logged)
        if not (self._of_all or owner.uid in self._of_uid):
            return
        decision = Decision(
            what=what,
            at_ns=self._clock.now_ns(),
            claim=claim_id,
            session=owner.session_id,
            pid=owner.pid,
            comm=owner.comm,
            uid=owner.uid,
            about=about,
            kind=kind,
            label=label,
            errno=errno,
            reason=how,
            sentence=sentence,
            cpu=cpu,
        )
        for follower in self._followers_of(owner.uid):
            self._outbox.send_decision(follower, decision)

    def _followers_of(self, uid: int) -> Iterator[Session]:
        yield from self._of_all.values()
        yield from self._of_uid.get(uid, {}).values()
