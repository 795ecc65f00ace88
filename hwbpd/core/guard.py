"""
How many hits a second a claim may bring before it is silenced.

A flood slows its victim a thousandfold, and the kernel does not throttle breakpoints. The bound is a token bucket with
room for one second's worth: a steady stream of just less than the rate passes for ever, a flood is stopped after one
second's worth of hits however fast they come.

The bucket cannot be the last line: the daemon may not get to run. So what the bucket has left is also the machine's
fuse, which stops by itself; each refill here tops it up there by as much.
"""

from __future__ import annotations

NS_PER_S = 1_000_000_000


class Guard:
    """
    The bucket of one resource.

    :param per_s: hits a second, and the room of the bucket.
    """

    __slots__ = ("_left", "_per_s", "_refilled_ns")

    def __init__(self, per_s: int, now_ns: int) -> None:
        assert per_s > 0
        self._per_s = per_s
        self._left = per_s
        self._refilled_ns = now_ns

    def count(self, hits: int, now_ns: int) -> int | None:
        """
        Take ``hits`` out of the bucket and refill it for the time that has passed.

        :return: by how many it was refilled, or None when more came than was left: the claim is flooded.
        """
        if hits >= self._left:
            return None
        self._left -= hits
        earned = (now_ns - self._refilled_ns) * self._per_s // NS_PER_S
        refill = min(earned, self._per_s - self._left)
        if earned:
            # Time that earned a fraction of a hit is kept for the next refill.
            self._refilled_ns = now_ns - (now_ns - self._refilled_ns) * self._per_s % NS_PER_S // self._per_s
        self._left += refill
        return refill
