"""
Our own library as the suite needs it: what it raises and keeps in inboxes, as the messages they came of.

It keeps the rules of the protocol for its users, so what breaks them, and more than one request at a time, cannot be
said through it.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from pathlib import Path
from typing import Any

from hwbp.connection import Connection
from hwbp.errors import HwbpError
from tests.conformance.newcomer import WAIT_S, Map


class _Overheard(Connection):
    """A connection that keeps each notice as it came, too."""

    def __init__(self, path: Path, carrier: str) -> None:
        self.notices: deque[Map] = deque()
        super().__init__(path, "the library", WAIT_S, carrier)

    def _accept_notice(self, message: Map) -> None:
        super()._accept_notice(message)
        self.notices.append(message)


class Library:
    """:param carrier: how messages are carried, as ``hwbp.connect`` names it."""

    def __init__(self, path: str, carrier: str) -> None:
        self._path = Path(path)
        self._carrier = carrier
        self._connection: _Overheard | None = None
        self.pid = os.getpid()

    @property
    def epoch(self) -> int:
        assert self._connection is not None
        return int(self._connection.welcome["epoch"])

    def hello(self, version: int = 1) -> Map:
        """Open a session; another version can only be asked for in one that is open."""
        if self._connection is None or self._connection.over:
            self.close()
            self._connection = _Overheard(self._path, self._carrier)
        if version == 1:
            return self._connection.welcome
        return self.request("hello", version=version, client="")

    def request(self, op: str, **fields: Any) -> Map:
        """Return the reply, a refusal too."""
        assert self._connection is not None
        try:
            return self._connection.request(op, **fields)
        except HwbpError as refusal:
            holders = [dataclasses.asdict(holder) for holder in refusal.holders]
            return {
                "op": "error",
                "errno": refusal.errno_name,
                "sentence": str(refusal),
                "holders": holders,
                "claim": refusal.claim_id,
            }

    def notice(self) -> Map:
        """Return the next notice."""
        assert self._connection is not None
        while not self._connection.notices:
            assert self._connection.wait(None), "the session is over and nothing more comes"
        return self._connection.notices.popleft()

    def notices(self) -> list[Map]:
        """The notices that have come and were not taken yet."""
        assert self._connection is not None
        seen = list(self._connection.notices)
        self._connection.notices.clear()
        return seen

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
