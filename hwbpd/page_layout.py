"""
The words of the status page: where each is, and what its bits mean. docs/status-page.md says the same to readers.

Every word is 64 bits in the machine's byte order, says what it says by itself, and is loaded and stored whole. So there
is nothing a reader could see half of, on any architecture, and no lock or sequence to wait for. We decided against a
sequence lock: it makes every reader repeat while claims come and go, for records that do not need it.

Counts, not bits: a slot in the books is a place and not a DRn, so a bit could not say which register is meant.

The client library and the C header have these numbers on their own; tests hold the three together.
"""

from __future__ import annotations

import sys
from typing import Final

# Magic and layout are where they are in every layout to come, and so is VALID_UNTIL_S: whoever replaces the file can
# tell the readers of this one that it is over.
MAGIC: Final = int.from_bytes(b"hwbpage\0", sys.byteorder)
LAYOUT: Final = 1

# The header, by index of word. What never changes fills one cache line, what does the next.
MAGIC_AT: Final = 0
LAYOUT_AT: Final = 1
BYTES_AT: Final = 2  # of the whole file
CPUS_FROM_AT: Final = 3  # index of the word of CPU 0
CPUS_AT: Final = 4  # how many there are
THREADS_FROM_AT: Final = 5
THREADS_AT: Final = 6

EPOCH_AT: Final = 8  # which run of the daemon writes; as in `welcome`
VALID_UNTIL_S_AT: Final = 9  # the heartbeat: it tells the truth while CLOCK_MONOTONIC has fewer seconds; 0: stopped
EVERYWHERE_AT: Final = 10  # a word like a CPU's, for what is CPU-wide on all CPUs
CHANGES_AT: Final = 11  # of any count, ever; it tells whether something happened between two looks
REGISTRATIONS_AT: Final = 12  # of threads, ever; it goes on where an earlier daemon left it
KGDB_AT: Final = 13  # claims of kgdb that have registers, which it takes without asking

CPUS_FROM: Final = 512
CPUS: Final = 8192  # as many as a Linux configuration allows
THREADS_FROM: Final = CPUS_FROM + CPUS
THREADS: Final = 8192
WORD_BYTES: Final = 8
BYTES: Final = (THREADS_FROM + THREADS) * WORD_BYTES

# A CPU's word, and the lower half of a thread's: armed | held << 16. What exceeds a field shows as its greatest value.
COUNT_MAX: Final = 0xFFFF
ARMED_MASK: Final = COUNT_MAX
HELD_SHIFT: Final = 16

# The upper half of a thread's word: the number of its registration, 0 for a word that nobody has.
REGISTRATION_SHIFT: Final = 32
REGISTRATION_MAX: Final = 2**32 - 1

BEAT_NS: Final = 500_000_000  # between two heartbeats
VALID_S: Final = 3  # each is good for so long, counted from the last full second: more than two seconds are left


def counts(held: int, armed: int) -> int:
    """Return the word of a CPU with these counts."""
    return min(held, COUNT_MAX) << HELD_SHIFT | min(armed, COUNT_MAX)
