"""
The journal: what was given to the core is on disk, in order and bounded, whatever happens to the daemon or the disk.

That a replay of it comes to the same state is told in ``test_replay.py``.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from structlog.testing import capture_logs

from hwbpd.core.effects import Effect
from hwbpd.core.errors import Holder
from hwbpd.core.events import (
    AnyEvent,
    Armed,
    ArmFailed,
    ClaimRequested,
    CpuCameOnline,
    CpuWentOffline,
    Disarmed,
    ForeignFound,
    FuseBlown,
    HitsCounted,
    LegRefused,
    LegTaken,
    NotLoaded,
    Probed,
    Rearmed,
    RearmFailed,
    RearmRequested,
    ReleaseRequested,
    SessionEnded,
    Stopping,
    Suspended,
    TakeFailed,
    TakenReported,
    TakingRequested,
    TargetEnded,
    Tick,
    VcpuCame,
    VcpuWent,
    YieldRequested,
)
from hwbpd.core.model import (
    Access,
    ArmedBy,
    Delivery,
    Kind,
    Mode,
    Owner,
    Piece,
    Plan,
    Pool,
    Process,
    Span,
    Target,
    Task,
    Totals,
    Vcpu,
)
from hwbpd.core.policy import Policy
from hwbpd.journal import (
    FLUSH_NS,
    LAST_BYTES,
    MAGIC,
    MARK_CLAIMS,
    MARK_EVERY,
    BadJournal,
    Begin,
    CannotJournal,
    Happened,
    Journal,
    Last,
    Mark,
    Record,
    digest,
    read,
)
from hwbpd.metered import MeteredServer
from tests.fakes import Rig

MIB = 2**20
BEGIN = Begin({Pool.ANY: 4}, (0, 1), (0, 1), Policy(reserve_slots=1), rearm_after_ns=5)
OWNER = Owner(1, 812, 1000, 1000, "gdb")
TASK = Task(812, 3, Process(812, 3))
BOTH = Access.READ | Access.WRITE
SPAN = Span(2**64 - 4096, 8)
MODE = Mode(delivery=Delivery.COUNT, user_chain=True, ring_bytes=8192, only_pid=812, fuse_hits=7)
PLAN = Plan((Piece(SPAN, BOTH, Pool.ANY), Piece(SPAN, Access.EXECUTE, Pool.INST)))


def asked(number: int, target: Target | None = None) -> ClaimRequested:
    """A request for a slot on one thread; no two are for the same bytes."""
    span = Span(SPAN.address + number, 8)
    plan = Plan((Piece(span, BOTH, Pool.ANY),))
    return ClaimRequested(
        number, OWNER, number, Kind.PERF, span, BOTH, Mode(), target or Target(TASK), "label", plan
    )


def records(path: Path) -> list[Record]:
    with path.open("rb") as file:
        return list(read(file))


def events(path: Path) -> list[Record]:
    return [record for record in records(path) if not isinstance(record, (Begin, Mark, Last))]


def last(path: Path) -> str:
    record = records(path)[-1]
    assert isinstance(record, Last)
    return record.why


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


class Kept:
    """A core with a journal; claims are armed as soon as it says so."""

    def __init__(self, path: Path, bytes_max: int = MIB) -> None:
        self.arbiter = BEGIN.arbiter()
        self.journal = Journal(path, BEGIN, self.arbiter, bytes_max)
        self.step = self.journal.recorded(self.arbiter.step)
        self.given: list[AnyEvent] = []

    def feed(self, *given: AnyEvent) -> None:
        for event in given:
            self.given.append(event)
            self.step(event)


@pytest.fixture
def kept(path: Path) -> Iterator[Kept]:
    kept = Kept(path)
    with kept.journal:
        yield kept


# --- what is in it ---------------------------------------------------------------------------------------------------


EVERY_EVENT: tuple[AnyEvent, ...] = (
    msgspec.structs.replace(
        ClaimRequested(1, OWNER, 2, Kind.PTRACE, SPAN, BOTH, MODE, Target(TASK, (0, 2)), "w\u00e4chter", PLAN),
        guard_per_s=3,
        privileged=True,
        priority=-100,
        wait_until_ns=2**63,
        armed_by=ArmedBy.TRACER,
        placeholder=False,
    ),
    ClaimRequested(1, OWNER, 2, Kind.PERF, SPAN, Access.EXECUTE, Mode(), Target(process=Process(8, 9)), "", PLAN),
    Armed(1, 2),
    ArmFailed(1, 2, 28, 3, None, 4, 5, "why"),
    ArmFailed(1, 2, 3, None, 812),
    ReleaseRequested(1, OWNER, 2, 3, operator=True),
    Disarmed(1, 2, Totals(3, 4)),
    Suspended(1, 2),
    YieldRequested(1, OWNER, 2, 3),
    TakingRequested(1, OWNER, 2, 3),
    TakenReported(1, OWNER, 2, 3),
    TakeFailed(1, OWNER, 2, 3, 28),
    Probed(1, 2, has_slot=True),
    ForeignFound(1, 2, (Holder(3, "perf", 4, "", 5, "on tid 6", (7, 8), "perf fd"), Holder(0, "", 0, "", 1, ""))),
    HitsCounted(1, 2, 3, 4),
    TargetEnded(1, 2, execed=True),
    VcpuCame(1, Vcpu(7, Task(812, 9)), {Pool.ANY: 4}),
    VcpuWent(1, Vcpu(7, Task(812, 9)), "tid 812 has ended"),
    NotLoaded(1, 2, 22),
    FuseBlown(1, 2),
    RearmRequested(1, OWNER, 2, 3, operator=False),
    Rearmed(1, 2),
    RearmFailed(1, 2, 28),
    CpuWentOffline(1, 2),
    CpuCameOnline(1, 2),
    LegTaken(1, 2, 3),
    LegRefused(1, 2, 3, 28),
    Tick(2**63),
    SessionEnded(1, 2, "its process ended"),
    Stopping(1, "the daemon is stopping"),
)


def test_every_event_there_is_comes_back_as_it_was(path: Path) -> None:
    # given events of every class there is
    assert {type(event) for event in EVERY_EVENT} == set(get_args(AnyEvent))

    # when they are written, whatever becomes of them
    with Journal(path, BEGIN, BEGIN.arbiter(), MIB) as journal:
        step = journal.recorded(lambda _: [])
        for event in EVERY_EVENT:
            step(event)

    # then they are read again as they were
    assert events(path) == list(EVERY_EVENT)


def test_it_begins_with_what_the_core_was_made_from(kept: Kept, path: Path) -> None:
    kept.journal.flush(FLUSH_NS)

    assert records(path) == [BEGIN]
    assert BEGIN.arbiter().policy == Policy(reserve_slots=1)


def test_an_event_is_there_even_if_it_brings_the_core_down(path: Path) -> None:
    # given a core that fails in the middle of a step
    def fails(_: AnyEvent) -> list[Effect]:
        raise AssertionError("our own mistake")

    # when that brings the daemon down
    journal = Journal(path, BEGIN, BEGIN.arbiter(), MIB)
    with pytest.raises(AssertionError), journal:
        journal.recorded(fails)(Tick(1))

    # then the journal ends with that event, and says so; the state in between is not marked
    assert records(path) == [BEGIN, Tick(1), Last("the daemon failed: AssertionError: our own mistake")]


def test_after_an_orderly_stop_it_says_so_with_the_state_of_then(kept: Kept, path: Path) -> None:
    kept.feed(asked(1), Armed(2, 1))
    with kept.journal:
        pass

    assert records(path) == [BEGIN, asked(1), Armed(2, 1), Mark(2, digest(kept.arbiter)), Last("the daemon stopped")]


def test_what_is_written_can_be_read_after_a_second_without_an_end(kept: Kept, path: Path) -> None:
    # given a daemon that looks at its journal in each turn of its loop
    kept.journal.flush(0)
    kept.feed(asked(1))
    kept.journal.flush(FLUSH_NS - 1)
    assert events(path) == []

    # when a second has passed, then the event is there, for whoever looks or for after a crash
    kept.journal.flush(FLUSH_NS)
    assert events(path) == [asked(1)]


# --- marks -----------------------------------------------------------------------------------------------------------


def marks(path: Path) -> list[int]:
    return [record.events for record in records(path) if isinstance(record, Mark)]


def test_the_state_is_marked_now_and_then(kept: Kept, path: Path) -> None:
    kept.feed(*(Tick(now_ns) for now_ns in range(2 * MARK_EVERY + 1)))
    with kept.journal:
        pass

    assert marks(path) == [MARK_EVERY, 2 * MARK_EVERY, 2 * MARK_EVERY + 1]


def test_it_is_marked_less_often_when_the_books_are_full(kept: Kept, path: Path) -> None:
    # given more claims than there are events between two marks otherwise
    claims = MARK_EVERY // MARK_CLAIMS + 50
    for number in range(1, claims + 1):
        kept.feed(asked(number, Target(Task(number, 1))), Armed(number, number))
    assert len(kept.arbiter.books.claims) == claims

    # when many more events come
    kept.feed(*(HitsCounted(0, 1, 1, 0) for _ in range(4000)))
    with kept.journal:
        pass

    # then a mark costs each of them no more than it would with empty books
    assert marks(path) == [MARK_EVERY, 2500, 4000, 2 * claims + 4000]


def test_the_digest_tells_states_apart_and_knows_no_order() -> None:
    # given two cores in which the same threads have slots, claimed and released in another order
    one, other = BEGIN.arbiter(), BEGIN.arbiter()
    empty = digest(one)
    for arbiter in (one, other):
        arbiter.step(asked(1))
        arbiter.step(Armed(2, 1))

    # then their digests are equal, and change with what is held
    assert digest(one) == digest(other) != empty
    other.step(asked(2))
    assert digest(one) != digest(other)
    one.step(asked(2, target=Target(cpus=(1,))))
    assert digest(one) != digest(other)


def test_the_digest_does_not_depend_on_the_order_of_sets_and_dicts() -> None:
    first, second = BEGIN.arbiter(), BEGIN.arbiter()
    tasks = [Task(tid, 1, process) for tid in range(9) for process in (None, Process(tid, 1))]
    for arbiter, order in ((first, tasks), (second, tasks[::-1])):
        for task in order:
            arbiter.books.pools[Pool.ANY].add(Target(task), 1)
    # (sets of numbers that meet in a hash table come in the order of their making)
    first.books.absent[1], second.books.absent[1] = {0, 8}, {8, 0}
    assert list(first.books.absent[1]) != list(second.books.absent[1])

    assert digest(first) == digest(second)


def test_the_digest_knows_the_queue(kept: Kept) -> None:
    # given a core in which one claim waits
    kept.feed(*(event for number in (1, 2, 3) for event in (asked(number), Armed(number, number))))
    kept.feed(msgspec.structs.replace(asked(4), wait_until_ns=10**9))
    before = digest(kept.arbiter)

    # when it is in the queue no more, though the books have it
    kept.arbiter.queue.remove(4)

    # then that is another state
    assert digest(kept.arbiter) != before


# --- bounds, and what goes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes_max", [*range(2000, 2600, 40), 64 * 1024])
def test_it_ends_at_its_bound_and_says_so(path: Path, bytes_max: int) -> None:
    # given a journal that may have so many bytes
    kept = Kept(path, bytes_max)

    # when more happens than fits
    with capture_logs() as logs, kept.journal:
        for number in range(1, 1000):
            kept.feed(asked(number, Target(Task(number, 1))))

    # then it has what fits, the state of then, and the reason, and the daemon goes on
    assert bytes_max - LAST_BYTES - 600 < path.stat().st_size <= bytes_max
    found = records(path)
    written = events(path)
    assert written == kept.given[: len(written)]
    assert len(kept.arbiter.books.claims) == 999
    assert isinstance(found[-2], Mark)
    assert found[-2].events == len(written)
    assert last(path) == "the journal is full (journal_max_bytes)"
    assert [line["event"] for line in logs] == ["journal is full"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="takes a disk that is always full")
def test_a_full_disk_ends_the_journal_and_not_the_daemon(path: Path) -> None:
    # given a journal on a disk without room
    kept = Kept(path)
    full = os.open("/dev/full", os.O_WRONLY)
    assert kept.journal._file is not None
    os.dup2(full, kept.journal._file.fileno())
    os.close(full)

    # when it is written to
    with capture_logs() as logs, kept.journal:
        kept.feed(asked(1))
        kept.journal.flush(FLUSH_NS)
        kept.feed(Armed(2, 1))

    # then a warning says why it ends, once, and the core has taken every event
    assert [(line["event"], line["reason"]) for line in logs] == [("journal ended", "No space left on device")]
    assert kept.arbiter.books.claims[1].state == "armed"


def test_only_its_owner_may_read_it(kept: Kept, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_journal_of_an_earlier_daemon_is_kept(path: Path) -> None:
    # given the journals of three daemons, one after the other
    for number in (1, 2, 3):
        kept = Kept(path)
        with kept.journal:
            kept.feed(Tick(number))

    # then the last two are there
    assert events(path) == [Tick(3)]
    assert events(path.with_name("journal.1")) == [Tick(2)]


def test_a_file_that_is_no_journal_stays_as_it_is(path: Path) -> None:
    path.write_text("root:x:0:0\n")

    with pytest.raises(CannotJournal, match="is no journal: it stays as it is"):
        Kept(path)

    assert path.read_text() == "root:x:0:0\n"


def test_an_empty_file_is_nobodys(path: Path) -> None:
    path.touch(0o644)

    with Kept(path).journal:
        pass

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link(path: Path) -> None:
    path.with_name("elsewhere").touch()
    path.symlink_to(path.with_name("elsewhere"))


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [a_folder, a_link, a_pipe])
def test_what_is_no_file_is_refused(path: Path, make: object) -> None:
    assert callable(make)
    make(path)
    before = path.lstat()

    with pytest.raises(CannotJournal, match=str(path)):
        Kept(path)

    assert path.lstat().st_ino == before.st_ino


def test_a_folder_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(CannotJournal, match="No such file or directory"):
        Kept(path / "journal")


def test_two_daemons_do_not_write_one_journal(kept: Kept, path: Path) -> None:
    kept.feed(Tick(1))

    with pytest.raises(CannotJournal, match="another daemon"):
        Kept(path)

    kept.journal.flush(FLUSH_NS)
    assert events(path) == [Tick(1)]


# --- in the daemon ---------------------------------------------------------------------------------------------------


class Watched(MeteredServer):
    """A server with a meter and a journal."""

    path: Path
    journal: Journal

    def __init__(self, **parts: Any) -> None:
        self.journal = Journal(self.path, BEGIN, parts["arbiter"], MIB)
        super().__init__(**parts, journal=self.journal)


def test_a_journal_and_a_meter_both_see_every_step(path: Path) -> None:
    # given a daemon with both
    Watched.path = path
    rig = Rig(make_server=Watched)
    assert isinstance(rig.server, Watched)
    with rig.server.journal:
        # when claims come and go
        client = rig.client()
        claim = rig.ask(client, "claim", address=0x404040, length=8, access="w")["claim"]
        rig.ask(client, "release", claim=claim)
        # then the journal can be read a second later,
        rig.clock.wind(1)
        rig.turn()
        names = [type(event).__name__ for event in events(path)]
        assert names == ["ClaimRequested", "Armed", "ReleaseRequested", "Disarmed"]
        # and has the end, too,
        rig.stop()

    # and the meter has counted as many
    assert [type(event) for event in events(path)[-2:]] == [Stopping, SessionEnded]
    steps = rig.server.meter.reading().steps
    assert sum(sum(histogram.counts) for histogram in steps.values()) == len(events(path))


def test_a_daemon_that_cannot_write_its_journal_does_not_start(path: Path) -> None:
    path.write_text("somebody's notes")
    options = ["--machine", "sim", "--socket", str(path.with_name("hwbpd.sock")), "--journal", str(path)]

    result = subprocess.run(
        [sys.executable, "-m", "hwbpd", *options], capture_output=True, text=True, check=False, timeout=30
    )

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"hwbpd: {path} is there, and is no journal: it stays as it is"
    assert path.read_text() == "somebody's notes"


# --- reading what is damaged -----------------------------------------------------------------------------------------


def written(path: Path) -> tuple[bytes, list[Record]]:
    kept = Kept(path)
    with kept.journal:
        kept.feed(asked(1), Armed(2, 1), SessionEnded(3, 1, "it said goodbye"))
    return path.read_bytes(), records(path)


def test_wherever_a_crash_cuts_it_off_what_was_before_is_read(path: Path) -> None:
    whole, found = written(path)
    for length in range(len(MAGIC), len(whole)):
        path.write_bytes(whole[:length])

        rest = records(path)

        assert rest == found[: len(rest)]
        assert len(rest) < len(found)


encoded = msgspec.msgpack.encode
NO_FIELDS = msgspec.Raw(b"\x80")


def framed(*records: bytes) -> bytes:
    return b"".join(len(record).to_bytes(4, "big") + record for record in records)


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        (b"", "no journal"),
        (b"\x7fELF and so on", "no journal"),
        (MAGIC + framed(b"\xc1"), "first record"),
        (MAGIC + framed(encoded(Last("why"))), "first record"),
        (MAGIC + framed(encoded(msgspec.structs.replace(BEGIN, format=2))), "has format 2"),
        (MAGIC + framed(encoded(BEGIN), b"\xc1"), "ends at byte"),
        (MAGIC + framed(encoded(BEGIN), b"\x91" * 5000), "ends at byte"),
        (MAGIC + framed(encoded(BEGIN)) + b"\xff" * 8, "longer than any can be"),
        (MAGIC + framed(encoded(BEGIN), encoded(Happened("Eclipse", NO_FIELDS))), "unknown event, 'Eclipse'"),
        (MAGIC + framed(encoded(BEGIN), encoded(Happened("Armed", NO_FIELDS))), "missing required field"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(path: Path, damaged: bytes, says: str) -> None:
    path.write_bytes(damaged)

    with pytest.raises(BadJournal, match=says):
        records(path)


def test_any_bytes_at_all_are_records_or_no_journal(path: Path) -> None:
    whole, _ = written(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :])
        with suppress(BadJournal):
            records(path)
