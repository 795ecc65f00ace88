"""Which ring is looked into when: the rules of ``hwbpd/drains.py``, on a real epoll and a clock of our own."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from hwbpd.drains import BURST_HITS, COUNT_NS, PACE_NS, SWEEP_NS, SWEEP_PAUSE_NS, SWEEP_RINGS, Drains

NOW = 5 * SWEEP_NS
RING, OTHER = 1, 2


class Rig:
    """Drains over an epoll, and event descriptors that stand for rings: readable while something is in them."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.drains = Drains(self.epoll)
        self.fds: list[int] = []
        self.drains.due(NOW)  # the sweep with which every daemon begins is done

    def ring(self) -> int:
        self.fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self.fds[-1]

    def begin(self, resource_id: int, descriptors: int = 1) -> list[int]:
        """Poll new rings, and have them looked into for what came before."""
        fds = [self.ring() for _ in range(descriptors)]
        self.drains.begin(resource_id, fds)
        self.drains.drained(resource_id, 0, more=False, now_ns=NOW)
        assert self.drains.due(NOW) == ()
        return fds

    def hit(self, fd: int) -> None:
        os.eventfd_write(fd, 1)

    def empty(self, fd: int) -> None:
        os.eventfd_read(fd)

    def wake(self) -> list[int]:
        """Tell the drains what epoll reports without waiting."""
        ready = [fd for fd, _ in self.epoll.poll(0)]
        for fd in ready:
            self.drains.woke(fd)
        return ready

    def close(self) -> None:
        self.epoll.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_a_ring_that_wakes_us_is_due_at_once(rig: Rig) -> None:  # rule 1
    ring, _ = rig.begin(RING)[0], rig.begin(OTHER)[0]
    assert rig.wake() == []

    rig.hit(ring)

    assert rig.wake() == [ring]
    assert rig.drains.due(NOW) == [RING]
    assert rig.drains.wait_s(NOW) == 0


def test_a_ring_of_several_descriptors_is_due_whichever_wakes_us(rig: Rig) -> None:  # rule 1
    for fd in rig.begin(RING, descriptors=3):
        rig.hit(fd)
        assert rig.wake() == [fd]
        assert rig.drains.due(NOW) == [RING]

        rig.empty(fd)
        rig.drains.drained(RING, 1, more=False, now_ns=NOW)
        rig.drains.drained(RING, 0, more=False, now_ns=NOW)
        assert rig.drains.due(NOW) == ()


def test_a_few_hits_are_no_burst(rig: Rig) -> None:  # rule 2
    # given a ring that has woken us
    (ring,) = rig.begin(RING)
    rig.hit(ring)
    rig.wake()

    # when it brought no more than a burst begins with
    rig.empty(ring)
    rig.drains.drained(RING, BURST_HITS, more=False, now_ns=NOW)

    # then the next hit wakes us again
    rig.hit(ring)
    assert rig.wake() == [ring]
    assert rig.drains.due(NOW) == [RING]


def test_a_ring_in_a_burst_is_left_alone_for_a_while(rig: Rig) -> None:  # rule 2
    # given a ring that brought a burst
    (ring,) = rig.begin(RING)
    rig.hit(ring)
    rig.wake()
    rig.drains.drained(RING, BURST_HITS + 1, more=False, now_ns=NOW)

    # when more hits come at once, then it is silent, and due only after the pace
    rig.hit(ring)
    assert rig.wake() == []
    assert rig.drains.due(NOW + PACE_NS - 1) == []
    assert rig.drains.wait_s(NOW) == PACE_NS / 1e9
    assert rig.drains.due(NOW + PACE_NS) == [RING]

    # and when the burst goes on, so does the pace
    later = NOW + PACE_NS
    rig.drains.drained(RING, BURST_HITS + 1, more=False, now_ns=later)
    assert rig.wake() == []
    assert rig.drains.due(later + PACE_NS - 1) == []
    assert rig.drains.due(later + PACE_NS) == [RING]


def test_after_a_burst_a_ring_wakes_us_as_before(rig: Rig) -> None:  # rules 2 and 3
    # given a ring at the end of a burst
    (ring,) = rig.begin(RING)
    rig.hit(ring)
    rig.wake()
    rig.empty(ring)
    rig.drains.drained(RING, BURST_HITS + 1, more=False, now_ns=NOW)
    later = NOW + PACE_NS

    # when the drain after the pace brings little
    rig.drains.drained(RING, 1, more=False, now_ns=later)

    # then the ring is looked into once more, for what came before its descriptor was armed again
    assert rig.drains.due(later) == [RING]
    rig.drains.drained(RING, 0, more=False, now_ns=later)
    assert rig.drains.due(later) == ()

    # and the next hit is due at once
    rig.hit(ring)
    assert rig.wake() == [ring]
    assert rig.drains.due(later) == [RING]


def test_another_descriptor_does_not_cut_a_burst_short(rig: Rig) -> None:  # rule 2
    # given a ring of two descriptors, one of which brought a burst
    first, second = rig.begin(RING, descriptors=2)
    rig.hit(first)
    rig.wake()
    rig.drains.drained(RING, BURST_HITS + 1, more=False, now_ns=NOW)

    # when the other reports
    rig.hit(second)
    assert rig.wake() == [second]

    # then the pace is kept, and after it both are armed again
    assert rig.drains.due(NOW + PACE_NS - 1) == []
    assert rig.drains.due(NOW + PACE_NS) == [RING]
    rig.empty(first)
    rig.empty(second)
    rig.drains.drained(RING, 0, more=False, now_ns=NOW + PACE_NS)
    rig.hit(first)
    rig.hit(second)
    assert sorted(rig.wake()) == sorted([first, second])


def test_a_ring_is_quiet_between_its_wake_up_and_its_drain(rig: Rig) -> None:  # rule 3
    (ring,) = rig.begin(RING)
    rig.hit(ring)

    assert rig.wake() == [ring]
    assert rig.wake() == [], "what is known already does not wake us again"

    rig.drains.drained(RING, 1, more=False, now_ns=NOW)
    assert rig.wake() == [ring], "armed again, it tells of what is still there"


def test_a_ring_is_looked_into_once_after_it_is_polled(rig: Rig) -> None:  # rule 3
    rig.drains.begin(RING, [rig.ring()])

    assert rig.drains.due(NOW) == [RING]
    assert rig.drains.wait_s(NOW) == 0

    rig.drains.drained(RING, 0, more=False, now_ns=NOW)
    assert rig.drains.due(NOW) == ()


def test_a_ring_that_still_brings_hits_is_looked_into_until_it_brings_none(rig: Rig) -> None:  # rule 3
    rig.drains.begin(RING, [rig.ring()])

    rig.drains.drained(RING, 1, more=False, now_ns=NOW)
    assert rig.drains.due(NOW) == [RING]

    rig.drains.drained(RING, 0, more=False, now_ns=NOW)
    assert rig.drains.due(NOW) == ()


def test_a_ring_that_is_not_empty_yet_is_due_again(rig: Rig) -> None:
    (ring,) = rig.begin(RING)
    rig.hit(ring)
    rig.wake()

    rig.drains.drained(RING, 10 * BURST_HITS, more=True, now_ns=NOW)

    assert rig.drains.due(NOW) == [RING]
    assert rig.drains.wait_s(NOW) == 0
    assert rig.wake() == [], "its descriptor stays quiet until it is empty"


def test_every_ring_is_looked_into_once_a_second(rig: Rig) -> None:  # rule 4
    # given rings that tell of nothing, one of them in a burst, and one without a descriptor
    rig.begin(RING)
    (bursting,) = rig.begin(OTHER)
    rig.drains.begin(3, [])
    rig.hit(bursting)
    rig.wake()
    just_before = NOW + SWEEP_NS - 1
    rig.drains.drained(OTHER, BURST_HITS + 1, more=False, now_ns=just_before)

    # when a second has passed
    assert rig.drains.due(just_before) == []
    assert rig.drains.wait_s(just_before) == 1e-9
    due = rig.drains.due(NOW + SWEEP_NS)

    # then all are due but the one that is left alone for a while longer
    assert due == [RING, 3]
    for resource_id in due:
        rig.drains.drained(resource_id, 0, more=False, now_ns=NOW + SWEEP_NS)
    assert rig.drains.due(NOW + SWEEP_NS) == []
    assert rig.drains.due(just_before + PACE_NS) == [OTHER]

    # and again a second later
    rig.drains.drained(OTHER, 0, more=False, now_ns=just_before + PACE_NS)
    rig.drains.drained(OTHER, 0, more=False, now_ns=just_before + PACE_NS)
    assert rig.drains.due(NOW + 2 * SWEEP_NS - 1) == ()
    assert rig.drains.due(NOW + 2 * SWEEP_NS) == [RING, OTHER, 3]


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("hits", [0, 1, 100 * BURST_HITS])
def test_what_only_counts_with_a_fuse_is_looked_at_again_and_again(rig: Rig, hits: int, descriptors: int) -> None:
    # given a resource that tells of no hit, with a descriptor for the end of its thread or without one (rule 5)
    rig.drains.begin(RING, [rig.ring() for _ in range(descriptors)], counted=True)
    assert rig.drains.due(NOW) == [RING]
    now_ns = NOW

    # when it is looked at, whatever that brings
    for _ in range(3):
        rig.drains.drained(RING, hits, more=False, now_ns=now_ns)

        # then it is due again a while later, and we sleep until then
        assert rig.drains.due(now_ns + COUNT_NS - 1) == []
        assert rig.drains.wait_s(now_ns) == COUNT_NS / 1e9
        now_ns += COUNT_NS
        assert rig.drains.due(now_ns) == [RING]

    # and not after its end, nor when its number begins anew for what does not count
    rig.drains.end(RING)
    assert rig.drains.due(now_ns) == ()
    rig.begin(RING)
    assert rig.drains.due(now_ns + COUNT_NS - 1) == ()


def test_the_end_of_a_thread_is_seen_at_once_where_hits_are_only_counted(rig: Rig) -> None:
    # given a resource that only counts, with a descriptor that tells of the end of its thread
    end = rig.ring()
    rig.drains.begin(RING, [end], counted=True)
    rig.drains.drained(RING, 0, more=False, now_ns=NOW)

    # when that comes, then it is looked at, and told of until it is done with
    rig.hit(end)
    assert rig.wake() == [end]
    assert rig.drains.due(NOW) == [RING]
    rig.drains.drained(RING, 0, more=False, now_ns=NOW)
    assert rig.wake() == [end]


def test_a_thousand_rings_are_looked_into_one_after_another_and_never_many_in_one_turn(rig: Rig) -> None:
    # given rings of which nothing is heard
    quiet = range(100, 1100)
    for resource_id in quiet:
        rig.drains.begin(resource_id, [])
    now_ns, seen = NOW, set()

    # when we sleep and look for as long as a round takes
    for _ in range(2 * len(quiet) // SWEEP_RINGS):
        now_ns += round(rig.drains.wait_s(now_ns) * 1e9)
        due = rig.drains.due(now_ns)
        for resource_id in due:
            rig.drains.drained(resource_id, 0, more=False, now_ns=now_ns)
        # then each turn has a few
        assert len(due) <= SWEEP_RINGS
        seen |= set(due)

    # then each ring had its turn, and we slept in between
    assert seen >= set(quiet)
    assert now_ns - NOW >= 2 * len(quiet) // SWEEP_RINGS * SWEEP_PAUSE_NS - SWEEP_NS


def test_without_rings_we_sleep_until_the_next_sweep(rig: Rig) -> None:
    assert rig.drains.wait_s(NOW) == 1
    assert rig.drains.wait_s(NOW + SWEEP_NS // 4) == 0.75
    assert rig.drains.wait_s(NOW + 7 * SWEEP_NS) == 0


def test_what_has_ended_is_polled_no_more(rig: Rig) -> None:
    # given a ring that has something, in the middle of a burst
    (ring,) = rig.begin(RING)
    rig.hit(ring)
    rig.wake()
    rig.drains.drained(RING, BURST_HITS + 1, more=False, now_ns=NOW)

    # when it ends
    rig.drains.end(RING)

    # then neither its descriptor, nor the pace, nor the sweep, nor a late answer speaks of it
    rig.drains.woke(ring)
    rig.drains.drained(RING, 3, more=True, now_ns=NOW)
    assert rig.drains.due(NOW + 3 * SWEEP_NS) == ()
    with pytest.raises(FileNotFoundError):
        rig.epoll.modify(ring, select.EPOLLIN)

    # and its number can begin anew, without the pace of the one before
    (again,) = rig.begin(RING)
    rig.hit(again)
    assert rig.wake() == [again]
    assert rig.drains.due(NOW) == [RING]


def test_to_begin_and_to_end_twice_is_to_do_it_once(rig: Rig) -> None:
    (ring,) = rig.begin(RING)

    rig.drains.begin(RING, [ring])
    assert rig.drains.due(NOW) == ()

    rig.drains.end(RING)
    rig.drains.end(RING)


def test_the_descriptors_of_others_are_not_rings(rig: Rig) -> None:
    rig.begin(RING)

    rig.drains.woke(12345)

    assert rig.drains.due(NOW) == ()
