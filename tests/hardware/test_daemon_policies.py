"""Who gets a slot when not everybody can, on real registers: share, wait, give way and come back, reserve, kgdb."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import hwbp
from examples.target import Target
from hwbpd_linux.cpus import online_cpus
from tests.hardware.daemon import (
    MARKS,
    POOL,
    WAIT_S,
    Daemon,
    all_free,
    books_free,
    kernel_free,
    kernel_room,
    lines_until,
    outside,
)
from tests.judges.users import Sleeper

pytestmark = MARKS

SLOTS = 4
ELSEWHERE = 0x1000  # of user space; nothing is there


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def low(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect("low") as client:
        yield client


@pytest.fixture
def high(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect("high") as client:
        yield client


def event(target: Target, place: int = 0) -> str:
    return f"mem:{target.variable + 8 * place:#x}/8:w:u"


def fill(client: hwbp.Client, tid: int, slots: int, kind: str = "ptrace") -> list[hwbp.Watch]:
    """Hold so many slots of a thread, where nobody of lower rank can take them."""
    return [client.claim(f"mem:{ELSEWHERE:#x}/8:w:u", tid=tid, delivery="hold", kind=kind) for _ in range(slots)]


def heard(client: hwbp.Client, of: Callable[[], object]) -> None:
    """Take in what is told until it is so; hits are to be read before, as they end each wait at once."""
    until = time.monotonic() + WAIT_S
    while not of():
        assert time.monotonic() < until, "it is never told"
        assert client.wait(WAIT_S), "nothing is told"


def changes_until(client: hwbp.Client, watch: hwbp.Watch, what: str) -> list[str]:
    """What is told of a claim, until that is."""
    told: list[str] = []

    def has_come() -> bool:
        told.extend(change.what for change in watch.changes())
        return what in told

    heard(client, has_come)
    return told


def drained(watch: hwbp.Watch, count: int) -> int:
    """Read so many hits, or fewer when no more come; return how many."""
    read = 0
    while read < count:
        for _ in watch.hits(timeout=WAIT_S):
            read += 1
            if read == count:
                break
        else:
            break
    return read


# --- share -----------------------------------------------------------------------------------------------------------


def test_two_owners_share_one_slot_and_each_sees_every_hit(
    low: hwbp.Client, high: hwbp.Client, target: Target
) -> None:
    # given a watchpoint that two owners asked for, one of them later than the first hits
    first = low.claim(event(target), tid=target.tid)
    target.command("write 7")
    second = high.claim(event(target), tid=target.tid, kind="ptrace")
    assert kernel_room(tid=target.tid) == SLOTS - 1, "it is one slot"
    (row,) = low.slots().resources
    assert [claim.claim for claim in row.claims] == [first.claim_id, second.claim_id]

    # when it is hit, then each has all hits since it came
    target.command("write 1000")
    assert drained(first, 1007) == 1007
    assert drained(second, 1000) == 1000

    # and when one leaves, the other goes on, in the same slot
    assert first.release() == hwbp.Counts(hits=1007, delivered=1007, lost=0, dropped=0)
    assert kernel_room(tid=target.tid) == SLOTS - 1
    target.command("write 5")
    assert drained(second, 5) == 5

    # until the last has left
    assert second.release() == hwbp.Counts(hits=1005, delivered=1005, lost=0, dropped=0)
    assert kernel_room(tid=target.tid) == SLOTS
    assert kernel_free() == books_free(low) == all_free()


def test_a_rider_who_dies_does_not_disturb_the_other(
    daemon: Daemon, low: hwbp.Client, high: hwbp.Client, target: Target
) -> None:
    watch = low.claim(event(target), tid=target.tid)
    gone = high.claim(event(target), tid=target.tid)
    target.command("write 3")

    high.close()

    daemon.logged("ended", claim_id=gone.claim_id)
    target.command("write 3")
    assert drained(watch, 6) == 6
    assert watch.release().hits == 6


def test_counters_share_and_each_counts_from_its_own_beginning(
    low: hwbp.Client, high: hwbp.Client, target: Target
) -> None:
    first = low.claim(event(target), tid=target.tid, delivery="count")
    target.command("write 10")
    second = high.claim(event(target), tid=target.tid, delivery="count")
    target.command("write 100")
    assert kernel_room(tid=target.tid) == SLOTS - 1

    assert (first.counts().hits, second.counts().hits) == (110, 100)
    assert first.release().hits == 110
    target.command("write 1")
    assert second.release().hits == 101


# --- priority: give way, and come back -------------------------------------------------------------------------------


@pytest.mark.parametrize("yields", [True, False], ids=["by itself", "at the deadline"])
@pytest.mark.parametrize("delivery", ["hits", "count"])
def test_of_two_who_want_the_last_slot_the_higher_takes_it_and_the_lower_counts_again_afterwards(
    alone: None, target: Target, delivery: str, yields: bool
) -> None:
    grace_s = WAIT_S if yields else 0.05
    with (
        Daemon(f"[policy]\nreserve_slots = 0\nrevoke_grace_s = {grace_s}\n") as daemon,
        daemon.connect("profiler") as low,
        daemon.connect("debugger") as high,
        ThreadPoolExecutor(1) as elsewhere,
    ):
        # given the last slot of a thread, in the hands of a profiler
        others = fill(low, target.tid, SLOTS - 1)
        profiler = low.claim(event(target), tid=target.tid, delivery=delivery)
        target.command("write 100")
        if delivery == "hits":
            assert drained(profiler, 100) == 100

        # when a debugger wants it, then the profiler is told by whom, and gives way, or has to
        debugging = elsewhere.submit(high.claim, event(target, 1), tid=target.tid, kind="ptrace")
        heard(low, lambda: profiler.revoke or profiler.state == "suspended")
        if yields:
            assert profiler.revoke
            assert profiler.revoke.deadline_ns
            assert [holder.kind for holder in profiler.revoke.holders] == ["ptrace"]
            profiler.yield_()
        debugger = debugging.result(WAIT_S)
        assert changes_until(low, profiler, "suspended") == ["revoke", "suspended"]
        assert kernel_room(tid=target.tid) == 0
        (row,) = low.slots().waiting
        assert (row.claim, row.state) == (profiler.claim_id, "suspended")
        assert set(row.blockers) == {watch.claim_id for watch in (*others, debugger)}

        # and sees nothing until the debugger leaves
        target.command("write 50")
        high.close()
        assert changes_until(low, profiler, "resumed") == ["resumed"]
        target.command("write 30")

        # then it has counted all but the gap, to the hit
        if delivery == "hits":
            assert drained(profiler, 30) == 30
        assert profiler.counts().hits == 130
        assert profiler.release() == hwbp.Counts(130, 130 if delivery == "hits" else 0, 0, 0)


def test_equals_do_not_displace_each_other(low: hwbp.Client, high: hwbp.Client, target: Target) -> None:
    fill(low, target.tid, SLOTS, kind="perf")

    with pytest.raises(hwbp.NoFreeSlot):
        high.claim(event(target), tid=target.tid)

    watch = high.claim(event(target), tid=target.tid, priority=1)
    target.command("write 2")
    assert drained(watch, 2) == 2


def test_kgdb_takes_at_once_on_every_cpu_and_asks_nobody(daemon: Daemon, low: hwbp.Client, target: Target) -> None:
    # given every slot of a thread, and of every CPU that leaves one
    held = fill(low, target.tid, SLOTS - 1, kind="perf")
    wide = low.claim(event(target), delivery="count", kind="perf")
    assert kernel_free() == dict.fromkeys(online_cpus(), 0)

    # when kgdb wants one on every CPU, then it has it with the answer, and nobody had time to say no
    with daemon.connect("kgdb") as kgdb:
        watch = kgdb.claim(f"mem:{ELSEWHERE:#x}/8:w", delivery="hold", kind="kgdb")
        assert watch.kind == "kgdb"
        heard(low, lambda: any(one.state == "suspended" for one in (*held, wide)))
        suspended = [one for one in (*held, wide) if one.state == "suspended"]
        assert suspended == [wide], "of as many, the youngest"
        assert kernel_free() == dict.fromkeys(online_cpus(), 0)
        assert {row.cpu: row.cpu_wide[POOL] for row in low.slots().cpus if row.online} == dict.fromkeys(
            online_cpus(), 1
        )

    # and when it leaves, everybody has what it had
    changes_until(low, wide, "resumed")
    target.command("write 4")
    assert wide.release().hits == 4


# --- wait ------------------------------------------------------------------------------------------------------------


def test_a_waiter_has_its_slot_when_the_holder_lets_go(low: hwbp.Client, high: hwbp.Client, target: Target) -> None:
    # given a thread without a free slot, and one who waits for it
    holders = fill(low, target.tid, SLOTS)
    waiter = high.queue(event(target), tid=target.tid, wait=WAIT_S)
    assert (waiter.is_waiting, waiter.position) == (True, 1)
    assert isinstance(waiter.refusal, hwbp.NoFreeSlot)
    assert kernel_room(tid=target.tid) == 0

    # when one lets go
    holders[0].release()

    # then the waiter has its slot, and it works
    watch = waiter.granted()
    assert watch is not None
    assert kernel_room(tid=target.tid) == 0
    target.command("write 9")
    assert drained(watch, 9) == 9


def test_those_who_wait_are_served_in_order(low: hwbp.Client, high: hwbp.Client, target: Target) -> None:
    # given four slots, and three who wait, the last of them of a higher rank
    holders = fill(low, target.tid, SLOTS, kind="kvm")
    waiters = [
        high.queue(event(target, place), tid=target.tid, wait=WAIT_S, kind=kind)
        for place, kind in enumerate(("perf", "perf", "ptrace"))
    ]
    assert [waiter.position for waiter in waiters] == [1, 2, 1]

    # when one slot after the other comes free, then the higher goes first, and of equals the first who asked
    for number in (2, 0, 1):
        assert [waiter.is_waiting for waiter in waiters][number]
        holders.pop().release()
        assert waiters[number].granted(WAIT_S)
        later = {2: (0, 1), 0: (1,), 1: ()}[number]
        assert all(waiters[one].is_waiting for one in later)


def test_who_waits_in_vain_is_told_and_holds_nothing(low: hwbp.Client, high: hwbp.Client, target: Target) -> None:
    fill(low, target.tid, SLOTS)

    with pytest.raises(hwbp.WaitTimedOut):
        high.claim(event(target), tid=target.tid, wait=0.05)

    assert not high.slots().waiting


def test_what_the_kernel_has_no_room_for_is_tried_again_while_it_waits(alone: None, target: Target) -> None:
    # given a thread whose slots somebody outside has
    with Daemon("[policy]\nreserve_slots = 0\nretry_s = 0.05\n") as daemon, daemon.connect() as client:
        with outside(SLOTS, tid=target.tid):
            waiter = client.queue(event(target), tid=target.tid, wait=WAIT_S)
            assert waiter.is_waiting
            daemon.logged("queued", claim_id=waiter.claim_id)

        # when he leaves, of which nobody tells the daemon, then the waiter has its slot all the same
        watch = waiter.granted()
        assert watch is not None
        target.command("write 3")
        assert drained(watch, 3) == 3


# --- reserve ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [0, 1])
def test_a_debugger_beside_the_daemon_finds_the_slot_that_is_reserved(alone: None, reserve: int) -> None:
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("gdb is not here: install the package gdb")
    with Daemon(f"[policy]\nreserve_slots = {reserve}\n") as daemon, daemon.connect() as client, Target() as target:
        # given clients that have taken all they could get
        for place in range(SLOTS - reserve):
            client.claim(event(target, place), delivery="count")
        if reserve:
            with pytest.raises(hwbp.HeldBack) as refused:
                client.claim(event(target, SLOTS), tid=target.tid, delivery="count")
            assert "policy.reserve_slots" in str(refused.value)
        assert kernel_free() == dict.fromkeys(online_cpus(), reserve)

        # when gdb, which asks nobody, sets a hardware watchpoint
        commands = [f"watch *(long*){target.variable:#x}", "shell echo go", "continue"]
        options = [option for each in commands for option in ("-ex", each)]
        command = [gdb, "-nx", "-batch", "-iex", "set auto-solib-add off", "-p", str(target.pid), *options]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as debugger:
            try:
                lines_until(debugger, "go")
                target.send("write 2")  # first 0, which it was, then 1: gdb stops for a new value only
                said, _ = debugger.communicate(timeout=WAIT_S)
            finally:
                debugger.kill()

        # then it works with a reserve, and without it does not
        assert ("New value = 1" in said) == bool(reserve), said
        assert ("debug register: No space left on device" in said) == (not reserve), said


def test_the_reserve_is_kept_on_every_cpu_on_which_a_claim_counts(alone: None) -> None:
    with Daemon("[policy]\nreserve_slots = 1\n") as daemon, daemon.connect() as client:
        # given a CPU with as many slots taken as may be
        here, *others = online_cpus()
        for _ in range(SLOTS - 1):
            client.claim(f"mem:{ELSEWHERE:#x}/8:w:u", cpus=[here], delivery="hold")

        # then whatever counts there is held back, and what does not is not
        sleeper = Sleeper()
        try:
            with pytest.raises(hwbp.HeldBack):
                client.claim(f"mem:{ELSEWHERE:#x}/8:w:u", tid=sleeper.tid, delivery="hold")
            with pytest.raises(hwbp.HeldBack):
                client.claim(f"mem:{ELSEWHERE:#x}/8:w:u", delivery="hold")
            for cpu in others:
                client.claim(f"mem:{ELSEWHERE:#x}/8:w:u", tid=sleeper.tid, cpus=[cpu], delivery="hold")
        finally:
            sleeper.close()

        # and kgdb may have the reserve
        client.claim(f"mem:{ELSEWHERE:#x}/8:w", cpus=[here], delivery="hold", kind="kgdb")
        assert kernel_room(cpu=here) == 0
