"""
``hw_breakpoint_enabled`` by request: may a breakpoint of ours be installed here; and which threads have a word of the
status page, where the same is answered without a request.

Both come from the same counts (``status_page.py``). A thread is asked about, and registered, by its own process; root
may ask about any. Outside users of the kernel's slots are not counted.
"""

from __future__ import annotations

from collections.abc import Collection

from hwbpd.core.errors import BadClaim, CpuOffline, LimitReached, TargetGone
from hwbpd.core.model import Task
from hwbpd.hookspecs import Machine
from hwbpd.messages import Enabled as Asked
from hwbpd.messages import EnabledReply, Thread, ThreadReply
from hwbpd.rights import Rights
from hwbpd.sessions import Session, Sessions
from hwbpd.status_page import StatusPage

ROOT = 0


class Enabled:
    """
    What a session may ask of the page.

    :param cpus: those that the machine may ever have.
    :param threads_per_uid: how many threads a user other than root may have registered, in all its sessions.
    """

    def __init__(
        self,
        page: StatusPage,
        machine: Machine,
        cpus: Collection[int],
        rights: Rights,
        sessions: Sessions,
        threads_per_uid: int,
    ) -> None:
        self._page = page
        self._machine = machine
        self._cpus = cpus
        self._rights = rights
        self._sessions = sessions
        self._threads_per_uid = threads_per_uid

    def answer(self, session: Session, request: Thread | Asked) -> ThreadReply | EnabledReply:
        """Return the reply; raises what refuses the request."""
        return self._register(session, request) if isinstance(request, Thread) else self._count(session, request)

    def _register(self, session: Session, request: Thread) -> ThreadReply:
        task = self._machine.task(request.tid)
        self._rights.may_ask_about(session.peer, task)
        if task not in self._page.registered(session.session_id):
            self._make_room(session)
        registration = self._page.register(session.session_id, task)
        return ThreadReply(request.id, registration.nth, registration.number)

    def _make_room(self, session: Session) -> None:
        """Refuse one thread more to a user who has registered all it may; those that have exited do not count."""
        uid, most = session.owner.uid, self._threads_per_uid
        of_uid = [
            (other.session_id, task)
            for other in self._sessions.of_uid(uid)
            for task in self._page.registered(other.session_id)
        ]
        if len(of_uid) < most:
            return
        gone = [(session_id, task) for session_id, task in of_uid if not self._lives(task)]
        for session_id, task in gone:
            self._page.unregister(session_id, task)
        if len(of_uid) - len(gone) >= most and uid != ROOT:
            raise LimitReached(f"uid {uid} has registered {most} threads, all it may (limits.threads_per_uid)")

    def _lives(self, task: Task) -> bool:
        try:
            return self._machine.task(task.tid) == task
        except TargetGone:
            return False

    def _count(self, session: Session, request: Asked) -> EnabledReply:
        if request.cpu is None and not request.tid:
            raise BadClaim("name a cpu, a tid, or both: where may there be a breakpoint?")
        if request.cpu is not None and request.cpu not in self._cpus:
            raise CpuOffline(f"this machine has no cpu {request.cpu}")
        task = None
        if request.tid:
            task = self._machine.task(request.tid)
            self._rights.may_ask_about(session.peer, task, of_any=session.privileged)
        count = self._page.count(request.cpu, task)
        return EnabledReply(request.id, count.armed > 0, count.armed, count.held)
