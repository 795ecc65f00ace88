"""
When to look into which ring: keeps an epoll in step with the armed resources.

1. A ring that wakes us is drained at once, so a single hit is on its way within microseconds.
2. A ring that brought more than ``BURST_HITS`` is in a burst and is left alone for ``PACE_NS``: a flood then costs a
   thousand messages a second, not one for every few hits. Its descriptor stays quiet meanwhile (EPOLLONESHOT).
3. After a descriptor is armed again its ring is looked into once more: perf's POLLIN is used up by whoever polls
   first, and what came before is not announced.
4. A full ring wakes nobody, so every ring is looked into once a second, whatever was heard of it. This is a safety net
   and must not cost more the more claims there are: with more than 800 it goes round more slowly, eight rings at a
   time, so that nobody waits for it either.
5. A resource that only counts has no ring to wake us. One with a fuse is looked at every ``COUNT_NS``, so that it is
   topped up before it blows.
"""

from __future__ import annotations

import select
from collections.abc import Sequence

BURST_HITS = 4
PACE_NS = 1_000_000
SWEEP_NS = 1_000_000_000
SWEEP_RINGS = 8
SWEEP_PAUSE_NS = 10_000_000
COUNT_NS = 250_000_000


class Drains:
    """
    Whose ring is due when.

    :param epoll: the one the server sleeps on.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._descriptors: dict[int, Sequence[int]] = {}
        self._resource: dict[int, int] = {}
        self._quiet: dict[int, list[int]] = {}  # resource -> its descriptors that have fired and are not armed again
        self._due_ns: dict[int, int] = {}
        self._not_before_ns: dict[int, int] = {}  # rule 2
        self._counted: set[int] = set()  # rule 5
        self._round: list[int] = []  # resources still to be looked into, by rule 4
        self._next_sweep_ns = 0

    def begin(self, resource_id: int, descriptors: Sequence[int], counted: bool = False) -> None:
        """Poll these from now on; with ``counted``, look at it again and again without being woken."""
        if resource_id in self._descriptors:
            return
        self._descriptors[resource_id] = descriptors
        for fd in descriptors:
            self._resource[fd] = resource_id
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
        if counted:
            self._counted.add(resource_id)
        if descriptors or counted:
            self._due_ns[resource_id] = 0  # rule 3

    def end(self, resource_id: int) -> None:
        """No more; they are about to be closed."""
        for fd in self._descriptors.pop(resource_id, ()):
            del self._resource[fd]
            self._epoll.unregister(fd)
        self._counted.discard(resource_id)
        for table in (self._quiet, self._due_ns, self._not_before_ns):
            table.pop(resource_id, None)

    def woke(self, fd: int) -> None:
        """A descriptor was reported; those of others are ignored."""
        resource_id = self._resource.get(fd)
        if resource_id is not None:
            self._quiet.setdefault(resource_id, []).append(fd)
            self._due_ns[resource_id] = self._not_before_ns.get(resource_id, 0)

    def __contains__(self, resource_id: int) -> bool:
        return resource_id in self._descriptors

    def due(self, now_ns: int) -> Sequence[int]:
        """The resources to drain now."""
        if now_ns >= self._next_sweep_ns:
            self._sweep(now_ns)
        if not self._due_ns:
            return ()
        return [resource_id for resource_id, due_ns in self._due_ns.items() if due_ns <= now_ns]

    def _sweep(self, now_ns: int) -> None:
        """Rule 4."""
        if not self._round:
            self._round = list(self._descriptors)
        for resource_id in self._round[-SWEEP_RINGS:]:
            if resource_id in self._descriptors:
                self._due_ns.setdefault(resource_id, 0)
        del self._round[-SWEEP_RINGS:]
        slices = max(1, -(-len(self._descriptors) // SWEEP_RINGS))
        self._next_sweep_ns = now_ns + max(SWEEP_PAUSE_NS, SWEEP_NS // slices)

    def drained(self, resource_id: int, hits: int, more: bool, now_ns: int) -> None:
        """What a drain brought; decides when the next one is due."""
        if resource_id not in self._descriptors:
            return
        if more:
            self._due_ns[resource_id] = now_ns
            return
        pace_ns = now_ns + PACE_NS if hits > BURST_HITS else 0  # rule 2
        if pace_ns:
            self._not_before_ns[resource_id] = pace_ns
        else:
            self._not_before_ns.pop(resource_id, None)
        fired = self._quiet.get(resource_id)
        if resource_id in self._counted and not fired:
            self._due_ns[resource_id] = now_ns + COUNT_NS  # rule 5
            return
        if not fired and not hits:
            del self._due_ns[resource_id]
            return
        self._due_ns[resource_id] = pace_ns  # rule 3, or the rest of a burst
        if fired and not pace_ns:
            del self._quiet[resource_id]
            for fd in fired:
                self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def wait_s(self, now_ns: int) -> float:
        """How long to sleep until something is due without a wake-up."""
        nearest_ns = min(self._due_ns.values(), default=self._next_sweep_ns)
        return max(0, min(nearest_ns, self._next_sweep_ns) - now_ns) / 1e9
