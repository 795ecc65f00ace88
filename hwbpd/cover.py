"""
Covers a span with the fewest blocks that slots can hold. For plugins that bring a backend.

What one slot can hold is described as ``Blocks``: within an aligned word of 8 bytes anything may be listed (LEN of DR7,
byte address selects of Arm); beyond it a block is a power of two, at an address divisible by it (address masks). No
block that is not in one word lies across a round address it is smaller than, so the address space is a binary tree:

    a part of the span, within an aligned block of 2^n bytes, is covered by that block as a whole, if it may be,
    or by what covers its two halves, whichever takes fewer slots

Down each edge of the span one branch is looked at, and halves that are asked for as a whole are alike; so the cost is
that of the address's width squared, whatever the length. In a word all ways are tried.

1. The fewest slots; among equally many, the fewest bytes. Blocks do not overlap: an access to a byte is one hit.
2. Blocks hold the span's bytes and no others, unless the caller says how far they may reach. Then they may hold others,
   where that saves slots, and are no longer than a word or, where that is more, than the power of two next to the
   span's length: what alignment costs. A span of two bytes across a round address would otherwise take in megabytes.

We turned down a greedy walk from the left: it is optimal without rule 2 and wrong with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice

from msgspec import Struct

from hwbpd.core.model import Span

WORD_BYTES = 8

_InWord = frozenset[tuple[int, int]]
_Best = tuple[int, int]  # slots, and bytes that their blocks hold

_NEVER: _Best = (1 << 80, 0)  # no blocks cover it; more than any sum of those that do
_LOOKED_AT = 256  # blocks of a cover, from its first; the longest of them begin before that


class Cost(Struct, frozen=True, order=True):
    """What a cover takes: so many slots, whose blocks hold so many bytes."""

    slots: int
    length_bytes: int


class Blocks(Struct, frozen=True):
    """
    The spans that one slot can hold.

    :param in_word: (offset, length) of those within an aligned word of 8 bytes.
    :param lengths: of longer ones: powers of two from 16 bytes on.
    """

    in_word: _InWord
    lengths: tuple[int, ...] = ()

    def cost(self, span: Span, reach: Span | None = None) -> Cost | None:
        """
        Return what the best cover takes; None where no blocks cover the span.

        :param span: at least one byte.
        :param reach: how far blocks may hold bytes beside the span; None: not at all.
        """
        best = _Tree(self, span, reach).best()
        return None if best >= _NEVER else Cost(*best)

    def cover(self, span: Span, reach: Span | None = None) -> Iterator[Span]:
        """Yield the blocks of the best cover, in ascending order; the arguments are those of ``cost``."""
        return _Tree(self, span, reach).blocks()

    def most_of(self, span: Span, slots: int) -> Span | None:
        """
        Return the longest part of a span that so many slots hold exactly, the first where several are as long.

        :return: None where no blocks cover the span.
        """
        if self.cost(span) is None:
            return None
        if span.length_bytes <= 2 * WORD_BYTES:  # few enough to try them all
            parts = (
                Span(span.address + skipped, length)
                for length in range(span.length_bytes, 0, -1)
                for skipped in range(span.length_bytes - length + 1)
            )
            return next((part for part in parts if (cost := self.cost(part)) and cost.slots <= slots), None)
        # There are whole words in it. Neighbouring blocks of its cover do, as they are longest in the middle.
        window: deque[Span] = deque(maxlen=slots)
        best = Span(span.address, 0)
        for block in islice(self.cover(span), _LOOKED_AT):
            window.append(block)
            length = block.address + block.length_bytes - window[0].address
            if length > best.length_bytes:
                best = Span(window[0].address, length)
        return best


def aligned(lengths: Iterable[int]) -> Blocks:
    """Return the blocks of these lengths, powers of two, at addresses divisible by them."""
    lengths = sorted(lengths)
    in_word = frozenset(
        (offset, length) for length in lengths if length <= WORD_BYTES for offset in range(0, WORD_BYTES, length)
    )
    return Blocks(in_word, tuple(length for length in lengths if length > WORD_BYTES))


class _Tree:
    """One span to be covered, and the aligned blocks that it lies in."""

    def __init__(self, blocks: Blocks, span: Span, reach: Span | None) -> None:
        assert span.length_bytes >= 1
        self._in_word = blocks.in_word
        self._lengths = frozenset(blocks.lengths)
        self._first, self._end = span.address, span.address + span.length_bytes
        self._low, self._high = self._first, self._end
        if reach is not None:
            self._low = min(self._low, reach.address)
            self._high = max(self._high, reach.address + reach.length_bytes)
        self._longest = max(WORD_BYTES, 1 << (span.length_bytes - 1).bit_length())
        self._root = max(WORD_BYTES, 1 << (self._first ^ (self._end - 1)).bit_length())

    def best(self) -> _Best:
        return self._best(self._first, self._end, self._root)

    def blocks(self) -> Iterator[Span]:
        return self._blocks(self._first, self._end, self._root)

    def _best(self, first: int, end: int, size: int) -> _Best:
        """Of the part [first, end), which lies in one aligned block of ``size`` bytes."""
        if size == WORD_BYTES:
            return self._within_word(first, end)[0]
        if self._may_hold(first, size):
            whole = (1, size)
            # A whole block is one slot; only another single block, with fewer bytes, can be better.
            return min(whole, self._halves(first, end, size)) if end - first < size else whole
        return self._halves(first, end, size)

    def _halves(self, first: int, end: int, size: int) -> _Best:
        middle = first - first % size + size // 2
        if end - first == size:
            slots, length = self._best(first, middle, size // 2)
            return 2 * slots, 2 * length
        if end <= middle or first >= middle:
            return self._best(first, end, size // 2)
        left, right = self._best(first, middle, size // 2), self._best(middle, end, size // 2)
        return left[0] + right[0], left[1] + right[1]

    def _blocks(self, first: int, end: int, size: int) -> Iterator[Span]:
        if size == WORD_BYTES:
            word = first - first % WORD_BYTES
            for offset, length in self._within_word(first, end)[1]:
                yield Span(word + offset, length)
        elif self._may_hold(first, size) and self._best(first, end, size) == (1, size):
            yield Span(first - first % size, size)
        else:
            middle = first - first % size + size // 2
            if first < middle:
                yield from self._blocks(first, min(end, middle), size // 2)
            if end > middle:
                yield from self._blocks(max(first, middle), end, size // 2)

    def _may_hold(self, first: int, size: int) -> bool:
        start = first - first % size
        return size in self._lengths and size <= self._longest and self._low <= start and start + size <= self._high

    def _within_word(self, first: int, end: int) -> tuple[_Best, tuple[tuple[int, int], ...]]:
        word = first - first % WORD_BYTES
        low, high = max(self._low - word, 0), min(self._high - word, WORD_BYTES)
        return _cover_word(self._in_word, first - word, end - word, low, high)


@lru_cache(maxsize=4096)
def _cover_word(
    blocks: _InWord, first: int, end: int, low: int, high: int
) -> tuple[_Best, tuple[tuple[int, int], ...]]:
    """
    Return the best way to cover bytes [first, end) of a word with blocks within [low, high), and what it takes.

    Only the first block begins before what is left to cover: what lies before is beside the span, or held already.
    """
    if first >= end:
        return (0, 0), ()
    best: tuple[_Best, tuple[tuple[int, int], ...]] = (_NEVER, ())
    # Of equals the one with its longer blocks towards the middle of the span: ``most_of`` can leave out the others.
    for offset, length in sorted(blocks, key=lambda block: (block[1] if end == WORD_BYTES else -block[1], block[0])):
        if low <= offset <= first < offset + length <= high:
            # From here on nothing may reach back: the next block begins where this one ends.
            (slots, held), others = _cover_word(blocks, offset + length, end, offset + length, high)
            if (1 + slots, length + held) < best[0]:
                best = (1 + slots, length + held), ((offset, length), *others)
    return best
