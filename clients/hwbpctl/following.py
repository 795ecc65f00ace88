"""
A session that looks on, and is begun anew when it is lost: it has no claims that could be lost with it.

Whatever happens to the daemon is a sentence in ``trouble``, never an exception; only refusals are raised. While nobody
answers, one attempt is made per interval.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import hwbp

Answer = TypeVar("Answer")

ANSWER_S = 2.0  # a daemon that takes longer is in trouble; meanwhile no key is answered
MESSAGES_PER_TURN = 1000  # of a burst of decisions, before something is drawn again


class Following:
    """
    Follows the daemon.

    ``told`` are its decisions with their time of day, and what befell the session, oldest first; whoever shows them
    empties it. ``missed`` counts decisions that never got here, over all sessions.
    """

    def __init__(self, socket: str | None, retry_s: float, told_max: int) -> None:
        """:raises HwbpError: when there is no daemon to begin with."""
        self.trouble = ""
        self.told: deque[tuple[str, hwbp.Decision | str]] = deque(maxlen=told_max)
        self.daemon = ""
        self._socket = socket
        self._retry_s = retry_s
        self._missed_before = 0
        self._decisions: hwbp.Decisions | None = None
        self._client: hwbp.Client | None = None
        self._retry_at = 0.0
        self._begin()

    @property
    def missed(self) -> int:
        return self._missed_before + self._missed_now

    def ask(self, question: Callable[[hwbp.Client], Answer]) -> Answer | None:
        """
        Return the answer to a question, None where the daemon cannot be asked.

        :raises HwbpError: when the daemon refuses.
        """
        if self._client is None and not self._try_again():
            return None
        client = self._client
        assert client is not None
        try:
            answer = question(client)
        except hwbp.HwbpError as error:
            if client.ended is not None:
                self._lost(client.ended.sentence)
                return None
            if isinstance(error, hwbp.RequestTimedOut):
                self.trouble = str(error)
                return None
            raise
        self.trouble = ""
        return answer

    def wait(self, timeout_s: float, until: int | None = None) -> None:
        """Wait for decisions, or for a descriptor to become readable, and take in what has come."""
        if self._client is None:
            select.select([] if until is None else [until], [], [], timeout_s)
            return
        if self._client.wait(timeout_s, until):
            for _ in range(MESSAGES_PER_TURN):
                self._keep()
                if not self._client.wait(0):
                    break
        self._keep()
        if self._client.ended is not None:
            self._lost(self._client.ended.sentence)

    def close(self) -> None:
        """Say goodbye."""
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def _missed_now(self) -> int:
        return 0 if self._decisions is None else self._decisions.missed + self._decisions.discarded

    def _begin(self) -> None:
        client = hwbp.connect(self._socket, name="hwbpctl top", timeout=ANSWER_S)
        try:
            self._decisions = client.follow()
        except hwbp.HwbpError as error:
            if client.ended is not None:
                client.close()
                raise
            self._decisions = None
            self._tell(f"decisions are not told to us: {error}")
        self._client = client
        self.daemon = f"{client.machine}, {client.backend} at {hwbp.socket_path(self._socket)}"
        self.trouble = ""

    def _try_again(self) -> bool:
        now = time.monotonic()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._retry_s
        try:
            self._begin()
        except hwbp.HwbpError as error:
            self.trouble = str(error)
            return False
        self._tell("a daemon is there again: this is a new session")
        return True

    def _lost(self, sentence: str) -> None:
        self._keep()
        assert self._client is not None
        self._client.close()
        self._client = None
        self._missed_before, self._decisions = self.missed, None
        self._retry_at = time.monotonic() + self._retry_s
        self.trouble = sentence
        self._tell(f"the session is over: {sentence}")

    def _keep(self) -> None:
        for decision in self._decisions.take() if self._decisions is not None else ():
            ago_s = (time.monotonic_ns() - decision.at_ns) / 1e9
            self.told.append((_time_of_day(time.time() - ago_s), decision))

    def _tell(self, sentence: str) -> None:
        self.told.append((_time_of_day(time.time()), sentence))


def _time_of_day(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_s))
