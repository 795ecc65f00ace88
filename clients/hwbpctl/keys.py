"""
Bytes from a terminal -> names of keys. Pure.

A key that is no character comes as an escape sequence (ECMA-48 CSI, or SS3 in application mode), and may come in
pieces. The escape key alone is the beginning of all of them: it is known for itself only when nothing follows, so
whoever reads says when it has waited long enough (``flush``).
"""

from __future__ import annotations

import codecs

ESCAPE_S = 0.05  # how long the rest of a sequence may take: it is written at once, and 50 ms pass for one over ssh

_NAMES = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down",
    "\x1b[5~": "page up", "\x1b[6~": "page down",
    "\x1b[H": "home", "\x1b[F": "end", "\x1bOH": "home", "\x1bOF": "end",
    "\x1b[1~": "home", "\x1b[4~": "end", "\x1b[7~": "home", "\x1b[8~": "end",
    "\r": "enter", "\n": "enter",
}  # fmt: skip
_SEQUENCE_MAX = 32  # no key has a longer one: what goes on is garbage


class Keys:
    """Takes bytes as they come, gives keys: a name, or the character itself. Sequences of unknown keys are dropped."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._begun = ""  # of a sequence

    @property
    def is_waiting(self) -> bool:
        """Whether a sequence has begun, or the escape key was pressed."""
        return bool(self._begun)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys that are complete."""
        keys = []
        for character in self._decode(data):
            self._begun += character
            if self._begun == "\x1b\x1b":
                keys.append("escape")
                self._begun = "\x1b"
            elif _is_complete(self._begun):
                key = _NAMES.get(self._begun, self._begun)
                if len(key) == 1 or key in _NAMES.values():
                    keys.append(key)
                self._begun = ""
        return keys

    def flush(self) -> list[str]:
        """Nothing followed: return the escape key if that is what has begun."""
        begun, self._begun = self._begun, ""
        return ["escape"] if begun == "\x1b" else []


def _is_complete(begun: str) -> bool:
    if begun[0] != "\x1b":
        return True
    if len(begun) < 3 or len(begun) >= _SEQUENCE_MAX:
        return len(begun) >= _SEQUENCE_MAX or (len(begun) == 2 and begun[1] not in "[O")
    return begun[1] == "O" or "@" <= begun[-1] <= "~"
