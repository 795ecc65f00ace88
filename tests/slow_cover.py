"""
A planner too simple to be wrong: every span that a slot can hold is listed, and bytes are covered one after the other.

What is listed comes from what a slot of an architecture watches, byte by byte, and not from ``hwbpd.cover``, which must
agree with it. Blocks may overlap here, in case that would save any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

WINDOW = 256  # bytes of address space, from 0; a multiple of the longest block that matters within it
NEVER = (10**6, 0)

Block = tuple[int, int]  # [first, end)


def x86_blocks(word_bytes: int, has_masks: bool) -> list[Block]:
    """LEN, and masks of AMD: the low bits that are left out of the comparison make an aligned block."""
    ignored = range(9) if has_masks else range(word_bytes.bit_length())
    return _runs({frozenset(b for b in range(WINDOW) if b >> n == at >> n) for n in ignored for at in range(WINDOW)})


def arm64_blocks() -> list[Block]:
    """BAS: a bit for each byte of a doubleword. Linux writes neighbouring bits only."""
    return _selected(8, lambda selected: True)


def armv7_blocks() -> list[Block]:
    """
    BAS as a 32-bit kernel writes it: 1, 2 or 4 neighbours of a word, where DBGWVR holds a word's address; or all of a
    doubleword.
    """
    return sorted(_selected(4, lambda selected: len(selected) != 3) + _selected(8, lambda selected: len(selected) == 8))


def _selected(unit: int, is_taken: Callable[[Sequence[int]], bool]) -> list[Block]:
    """What byte address selects pick from each aligned unit."""
    picked = set()
    for bas in range(1, 1 << unit):
        selected = [bit for bit in range(unit) if bas >> bit & 1]
        if is_taken(selected):
            picked |= {frozenset(base + bit for bit in selected) for base in range(0, WINDOW, unit)}
    return _runs(picked)


def _runs(watched: Iterable[frozenset[int]]) -> list[Block]:
    """The sets of bytes that are neighbours, as spans."""
    return sorted((min(one), max(one) + 1) for one in watched if max(one) - min(one) + 1 == len(one))


class SlowPlanner:
    """:param blocks: all the spans within the window that one slot can hold."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._ending = [[block for block in blocks if block[1] == end] for end in range(WINDOW + 1)]
        self._holding = [[block for block in blocks if block[0] <= byte < block[1]] for byte in range(WINDOW)]
        self.exact = cache(self._exact)
        self._wide = cache(self._wide_from)

    def _exact(self, first: int, longest: int) -> list[int]:
        """The least number of blocks that hold [first, first + n) and nothing else, for each n up to ``longest``."""
        least = [0] + [NEVER[0]] * longest
        for end in range(first + 1, first + longest + 1):
            for start, _ in self._ending[end]:
                if start >= first:
                    # What comes before may end anywhere in the block, or where it begins.
                    before = min(least[max(start - first, 0) : end - first])
                    least[end - first] = min(least[end - first], before + 1)
        return least

    def wide(self, first: int, end: int) -> tuple[int, int]:
        """
        The least number of blocks that hold [first, end) and maybe more, and of such covers the fewest bytes.

        A block has at most 8 bytes, or as many as the least power of two that is not below the length.
        """
        longest = 8
        while longest < end - first:
            longest *= 2
        return self._wide(first, end, longest)

    def _wide_from(self, first: int, end: int, longest: int) -> tuple[int, int]:
        if first >= end:
            return 0, 0
        best = NEVER
        for start, stop in self._holding[first]:
            if stop - start <= longest:
                slots, held = self._wide(stop, end, longest)
                best = min(best, (slots + 1, held + stop - start))
        return best
