"""Share, wait and displace, by the whole daemon on the simulated machine: as its users would try them out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

import hwbp
from hwbpd_sim.workload import COUNTER
from tests.hardware.daemon import WAIT_S, Daemon

SLOTS = 4
TID = 1000
EVENT = f"mem:{COUNTER:#x}/8:w:u"
ELSEWHERE = "mem:0x1000/8:w:u"


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    daemon = Daemon("[policy]\nreserve_slots = 0\n[sim]\naccesses_per_s = 500\n")
    daemon.command += ["--machine", "sim", "--cpus", "2"]
    with daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect("profiler") as client:
        yield client


@pytest.fixture
def debugger(daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect("debugger") as client:
        yield client


def fill(client: hwbp.Client, slots: int, kind: str = "perf") -> list[hwbp.Watch]:
    return [client.claim(ELSEWHERE, tid=TID, delivery="hold", kind=kind) for _ in range(slots)]


def heard(client: hwbp.Client, is_so: Callable[[], object]) -> None:
    """Take in what is told until it is so, and the hits among it."""
    while True:
        for _ in client.hits(timeout=0):
            pass
        if is_so():
            return
        assert client.wait(WAIT_S), "nothing is told"


def taken(watch: hwbp.Watch, count: int) -> list[int]:
    """When the next so many hits were."""
    return [hit.time_ns for hit in itertools.islice(watch.hits(timeout=WAIT_S), count)]


def test_two_owners_share_a_slot_and_both_see_every_hit(client: hwbp.Client, debugger: hwbp.Client) -> None:
    # given one who watches a thread
    first = client.claim(EVENT, tid=TID)
    taken(first, 5)

    # when another one watches the very same, then it takes no slot
    second = debugger.claim(EVENT, tid=TID)
    (row,) = client.slots().resources
    assert [claim.claim for claim in row.claims] == [first.claim_id, second.claim_id]

    # and both see every hit since
    seen_by_second = taken(second, 50)
    seen_by_first = taken(first, 50)
    while seen_by_first[-1] < seen_by_second[-1]:
        seen_by_first += taken(first, 1)
    assert [when for when in seen_by_first if seen_by_second[0] <= when <= seen_by_second[-1]] == seen_by_second

    # and who leaves leaves the other
    counts = first.release()
    assert counts.hits == counts.delivered
    assert len(taken(second, 5)) == 5
    assert [[claim.claim for claim in row.claims] for row in client.slots().resources] == [[second.claim_id]]


def test_who_waits_has_the_slot_when_a_holder_leaves_and_not_before(
    client: hwbp.Client, debugger: hwbp.Client
) -> None:
    # given a thread with every slot taken
    holders = fill(client, SLOTS)
    with pytest.raises(hwbp.NoFreeSlot):
        debugger.claim(EVENT, tid=TID)

    # when somebody waits for one, then his place is seen, and what is in the way
    waiter = debugger.queue(EVENT, tid=TID, wait=WAIT_S)
    (row,) = client.slots().waiting
    assert (row.claim, row.position, row.state) == (waiter.claim_id, 1, "waiting")
    assert set(row.blockers) == {watch.claim_id for watch in holders}
    assert waiter.is_waiting

    # and when one is free, it is his
    holders.pop().release()
    watch = waiter.granted()
    assert watch is not None
    assert len(taken(watch, 5)) == 5
    assert not client.slots().waiting


def test_a_debugger_displaces_a_profiler_who_goes_on_when_it_has_left(
    daemon: Daemon, client: hwbp.Client, debugger: hwbp.Client
) -> None:
    # given a profiler with the last slot of a thread
    fill(client, SLOTS - 1, kind="ptrace")
    profiler = client.claim(EVENT, tid=TID)
    before = taken(profiler, 5)

    # when a debugger wants one, then the profiler gives way
    watch = debugger.claim(EVENT.replace("/8:w", "/8:rw"), tid=TID, kind="ptrace")
    heard(client, lambda: profiler.state == "suspended")
    first, *_ = taken(watch, 20)
    assert not list(profiler.hits(timeout=0))
    assert any("give way" in line for line in client.why(profiler.claim_id).lines)

    # and when the debugger has left, it goes on; what was in between it has not seen
    last = taken(watch, 20)[-1]
    watch.release()
    heard(client, lambda: profiler.state == "armed")
    after = taken(profiler, 5)
    assert max(before) < first < last < min(after)
    counts = profiler.release()
    assert counts.hits == counts.delivered + counts.lost + counts.dropped
    daemon.logged("resumed", claim_id=profiler.claim_id)
