"""
The events that concern one claim, oldest first: the answer to "why?".

Bounded: the beginning of a story explains most, and so does its end; what is left out between them is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

FIRST_KEPT = 8
LAST_KEPT = 24


class Story:
    """What happened, and when; sentences are made only for those who ask."""

    __slots__ = ("_first", "_last", "_told")

    def __init__(self) -> None:
        self._first: list[tuple[int, object]] = []
        self._last: deque[tuple[int, object]] = deque(maxlen=LAST_KEPT)
        self._told = 0

    def tell(self, now_ns: int, sentence: object) -> None:
        """Add one sentence, or a frozen value that becomes one by ``str`` when somebody asks."""
        self._told += 1
        if len(self._first) < FIRST_KEPT:
            self._first.append((now_ns, sentence))
        else:
            self._last.append((now_ns, sentence))

    def lines(self) -> Iterator[str]:
        """The sentences with the time since the first of them, in seconds."""
        if not self._first:
            return
        begin_ns = self._first[0][0]
        for now_ns, sentence in self._first:
            yield f"+{(now_ns - begin_ns) / 1e9:.6f} s  {sentence}"
        left_out = self._told - len(self._first) - len(self._last)
        if left_out:
            yield f"... {left_out} more ..."
        for now_ns, sentence in self._last:
            yield f"+{(now_ns - begin_ns) / 1e9:.6f} s  {sentence}"
