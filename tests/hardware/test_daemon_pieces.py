"""Spans that take several slots, through the daemon and on real registers: each part reports, and all stand or fall."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest

import hwbp
from tests.hardware.daemon import MARKS, WAIT_S, Daemon, kernel_room, outside
from tests.hardware.tracer import Tracer
from tests.judges.users import wait_until

pytestmark = MARKS

SLOTS = 4
LENGTH = 16

# Stores eight bytes at an offset into a page of its own, each by one instruction, as often as it is told to.
WRITER = """
import ctypes, mmap, os, sys
page = mmap.mmap(-1, mmap.PAGESIZE)
base = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(os.getpid(), base, flush=True)
for line in sys.stdin:
    offset, times = map(int, line.split())
    word = ctypes.c_uint64.from_address(base + offset)
    for _ in range(times):
        word.value = 1
    print("done", flush=True)
"""


class Writer:
    """That program, from outside."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", WRITER]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.tid, self.base = map(int, self._line().split())
        self.event = f"mem:{self.base:#x}/{LENGTH}:w:u"

    def write(self, offset: int, times: int = 1) -> None:
        self.send(offset, times)
        assert self._line() == "done\n"

    def send(self, offset: int, times: int = 1) -> None:
        """Order it, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{offset} {times}\n")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def client(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect() as client:
        yield client


@pytest.fixture
def writer() -> Iterator[Writer]:
    writer = Writer()
    yield writer
    writer.end()


def offsets(watch: hwbp.Watch, base: int, hits: int) -> Counter[int]:
    """Wait for so many hits; return how many there were at each offset."""
    return Counter(hit.address - base for hit in islice(watch.hits(WAIT_S), hits))


def test_hwbpctl_watches_sixteen_bytes_and_tells_of_each_part(
    daemon: Daemon, client: hwbp.Client, writer: Writer
) -> None:
    # Given a watch on sixteen bytes, which is two slots,
    command = [sys.executable, "-m", "hwbpctl", "--json", "--socket", str(daemon.socket), "watch"]
    command += ["-e", writer.event, "-t", str(writer.tid), "-c", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        wait_until(lambda: len(client.slots().resources) == 2, "both slots are held")
        assert kernel_room(tid=writer.tid) == SLOTS - 2

        # when both halves are written, then each says so.
        writer.write(0, 3)
        writer.write(8, 2)
        output, _ = watching.communicate(timeout=WAIT_S)

    hits = [json.loads(line) for line in output.splitlines()]
    hits = [hit for hit in hits if hit["type"] == "hit"]
    assert [int(hit["address"], 16) - writer.base for hit in hits] == [0, 0, 0, 8, 8]
    assert len({hit["claim"] for hit in hits}) == 1, "it is one claim"
    assert kernel_room(tid=writer.tid) == SLOTS


@pytest.mark.parametrize("whose", ["thread", "process", "cpus"])
def test_whatever_is_watched_each_part_reports_once(client: hwbp.Client, writer: Writer, whose: str) -> None:
    # Given a claim of several pieces on a thread, a process, or whole CPUs,
    tid, pid, only_pid = (writer.tid if whose == each else 0 for each in ("thread", "process", "cpus"))
    watch = client.claim(writer.event, tid=tid, pid=pid, only_pid=only_pid)
    assert [(piece.address - writer.base, piece.length) for piece in watch.pieces] == [(0, 8), (8, 8)]

    # when its parts are written, and what lies beside them, and then one store touches both,
    writer.write(0, 3)
    writer.write(8, 2)
    writer.write(16, 7)
    writer.write(4, 1)

    # then each part tells of its own, and the store that touches both is a hit of each.
    assert offsets(watch, writer.base, 7) == {0: 4, 8: 3}
    counts = watch.release()
    assert (counts.hits, counts.delivered, counts.lost) == (7, 7, 0)


def test_where_one_slot_is_missing_none_is_taken(client: hwbp.Client, writer: Writer) -> None:
    # Given somebody outside who leaves one slot, and a claim that takes two,
    with outside(SLOTS - 1, tid=writer.tid):
        with pytest.raises(hwbp.NoFreeSlot):
            client.claim(writer.event, tid=writer.tid)

        # then the one is still free.
        assert kernel_room(tid=writer.tid) == 1
    assert client.slots().resources == ()


def test_two_who_want_the_same_span_share_all_its_slots(
    daemon: Daemon, client: hwbp.Client, writer: Writer
) -> None:
    with daemon.connect() as other:
        # Given two claims for the same sixteen bytes, then each of two slots has both,
        first, second = client.claim(writer.event, tid=writer.tid), other.claim(writer.event, tid=writer.tid)
        assert [len(row.claims) for row in client.slots().resources] == [2, 2]
        assert kernel_room(tid=writer.tid) == SLOTS - 2

        # and both get every hit, also those of one that goes on alone.
        writer.write(8, 2)
        assert offsets(first, writer.base, 2) == {8: 2}
        assert offsets(second, writer.base, 2) == {8: 2}
        first.release()
        writer.write(0, 1)
        assert offsets(second, writer.base, 1) == {0: 1}


def test_who_accepts_hits_beside_the_span_needs_fewer_slots(client: hwbp.Client, writer: Writer) -> None:
    # Given seven bytes, which take three slots,
    odd = f"mem:{writer.base + 1:#x}/7:w:u"
    assert len(client.plan(odd).pieces) == 3
    plan = client.plan(odd, over_report=True)
    assert (plan.slots, plan.over_reported) == ({"any": 1}, 1)

    # when hits beside them are welcome, then one is taken, and tells of its eight.
    watch = client.claim(odd, tid=writer.tid, over_report=True)
    assert kernel_room(tid=writer.tid) == SLOTS - 1
    writer.write(0, 2)
    assert offsets(watch, writer.base, 2) == {0: 2}


def test_what_is_longer_than_all_slots_is_told_how_many_it_takes(client: hwbp.Client, writer: Writer) -> None:
    with pytest.raises(hwbp.BadClaim, match=r"takes 7 slots, and a CPU has 4"):
        client.claim(f"mem:{writer.base + 1:#x}/39:w:u", tid=writer.tid)


def test_a_tracer_takes_all_its_slots_or_none(client: hwbp.Client, writer: Writer) -> None:
    with Tracer(writer.tid) as tracer:
        # Given a tracer's claim on sixteen bytes, then two places are kept,
        slot = client.tracer_claim(writer.tid, writer.event)
        assert kernel_room(tid=writer.tid) == SLOTS - 2

        # and it takes both at once.
        def poke() -> None:
            for number, piece in enumerate(slot.watch.pieces):
                tracer.poke(number, piece.address)

        slot.take(poke)
        assert [claim.state for row in client.slots().resources for claim in row.claims] == ["taken"] * 2
        for number in range(2):
            tracer.do(f"enable {number}")
        tracer.do("go")
        writer.send(8)
        tracer.do("stop")
        assert kernel_room(tid=writer.tid) == SLOTS - 2

        # What it leaves behind another tracer's claim of as many pieces has for the asking.
        slot.watch.release()
        again = client.tracer_claim(writer.tid, writer.event, placeholder=False)
        again.take(poke)
        assert kernel_room(tid=writer.tid) == SLOTS - 2
        again.watch.release()


def test_a_debugger_that_compares_what_it_stops_at_gets_wide_slots(client: hwbp.Client, writer: Writer) -> None:
    # Given seven bytes, then a tracer's watchpoint on writes is one slot: it sees itself what has changed.
    with Tracer(writer.tid):
        slot = client.tracer_claim(writer.tid, f"mem:{writer.base + 1:#x}/7:w:u")
        assert [(piece.address - writer.base, piece.length) for piece in slot.watch.pieces] == [(0, 8)]
        slot.watch.release()

        # Of reads there is nothing to compare.
        slot = client.tracer_claim(writer.tid, f"mem:{writer.base + 1:#x}/7:rw:u")
        assert [piece.length for piece in slot.watch.pieces] == [1, 2, 4]
        slot.watch.release()


def test_a_tracer_that_gets_one_slot_of_two_leaves_that_one_behind(client: hwbp.Client, writer: Writer) -> None:
    with Tracer(writer.tid) as tracer:
        # Given a tracer's claim on sixteen bytes,
        slot = client.tracer_claim(writer.tid, writer.event)

        # when somebody outside is quicker, and it gets but one of its slots,
        def poke() -> None:
            tracer.poke(0, writer.base)
            with outside(SLOTS - 1, tid=writer.tid):
                tracer.poke(1, writer.base + 8)

        with pytest.raises(OSError, match="poke"):
            slot.take(poke)

        # then the thread keeps that one, and the books count no less than the kernel.
        held = [claim.state for row in client.slots().resources for claim in row.claims]
        assert set(held) == {"residue"}
        assert len(held) >= SLOTS - kernel_room(tid=writer.tid) == 1
