"""
Replay: from a journal alone, another process comes to the state that the daemon was in, and says when it does not.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hwbpd import journal as journals
from hwbpd.core import invariants
from hwbpd.core.events import Armed
from hwbpd.core.lifecycle import QUEUED
from hwbpd.core.model import Kind, Target
from hwbpd.core.policy import Policy
from hwbpd.journal import MAGIC, Begin, Happened, Journal, Last, Mark, Record, digest
from hwbpd.replay import main, replay
from tests.hardware.daemon import WAIT_S, Daemon
from tests.simulation import draw
from tests.simulation.play import Play
from tests.test_journal import BEGIN, MIB, Kept, asked, framed, records

ROOT = Path(__file__).resolve().parent.parent
ACTS = 150


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def command(path: Path, *options: str, hash_seed: int = 0) -> subprocess.CompletedProcess[str]:
    """Run it as a user does, in a process in which sets have an order of its own."""
    return subprocess.run(
        [sys.executable, "-m", "hwbpd.replay", str(path), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def rewritten(path: Path, found: list[Record]) -> None:
    """Write a journal with these records, whatever they are."""
    encode = msgspec.msgpack.encode
    encoded = [
        encode(record)
        if isinstance(record, (Begin, Mark, Last))
        else encode(Happened(type(record).__name__, msgspec.Raw(encode(record))))
        for record in found
    ]
    path.write_bytes(MAGIC + framed(*encoded))


# --- the same state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happened_its_journal_leads_to_the_same_state(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a core that kept a journal through a random history, with a mark after every event
    monkeypatch.setattr(journals, "MARK_EVERY", 1)
    monkeypatch.setattr(journals, "MARK_CLAIMS", 0)
    rng = random.Random(f"journal {seed}")
    play = Play(draw.world(rng))
    dice = draw.Dice(rng, play)
    arbiter, kernel = play.shell.arbiter, play.kernel
    begin = Begin(
        dict(kernel.slots), kernel.possible, tuple(sorted(kernel.online)), play.shell.policy, play.world.rearm_after_ns
    )
    with Journal(path, begin, arbiter, MIB) as journal:
        monkeypatch.setattr(arbiter, "step", journal.recorded(arbiter.step))
        for _ in range(ACTS):
            play.do(dice.act(), thoroughly=False)

    # when it is replayed, with every invariant looked at after each event
    with path.open("rb") as file:
        done = replay(file, checks=True)

    # then nothing differs after any of them, and least of all at the end
    assert done.differences == []
    assert done.events == play.shell.stepped
    assert done.digests == done.events + 1
    assert digest(done.arbiter) == digest(arbiter)
    assert done.arbiter.books.dump() == arbiter.books.dump()


@pytest.fixture
def a_crowd(path: Path) -> Iterator[Kept]:
    """The journal of a core in which one thread is full, one claim waits, and a CPU is claimed; not ended yet."""
    kept = Kept(path)
    for number in (1, 2, 3):
        kept.feed(asked(number), Armed(number, number))
    kept.feed(asked(4, Target(cpus=(1,))))
    assert 4 not in kept.arbiter.books.claims, "the reserve"
    waiting = msgspec.structs.replace(asked(5), kind=Kind.BACKGROUND, wait_until_ns=10**9)
    kept.feed(waiting)
    yield kept
    with kept.journal:
        pass


STATE = """\
journal of hwbpd {version}; it ends: the daemon stopped
claims:
  claim 1 of gdb[812]: mem:0xfffffffffffff001/8:rw for tid 812 as perf, armed
  claim 2 of gdb[812]: mem:0xfffffffffffff002/8:rw for tid 812 as perf, armed
  claim 3 of gdb[812]: mem:0xfffffffffffff003/8:rw for tid 812 as perf, armed
places:
  cpu 0: 1 of 4 slots free (0 cpu-wide, 3 on the busiest task)
  cpu 1: 1 of 4 slots free (0 cpu-wide, 3 on the busiest task)
  tid 812: 3 slots (claims 1, 2, 3)
queue:
  1. claim 5 of gdb[812]: mem:0xfffffffffffff005/8:rw for tid 812 as background, waiting
events=8 digests=1 differences=0
"""


@pytest.mark.parametrize("hash_seed", [0, 1, 2])
def test_a_person_reads_who_held_what_and_who_waited(a_crowd: Kept, path: Path, hash_seed: int) -> None:
    with a_crowd.journal:
        pass

    result = command(path, "--check", hash_seed=hash_seed)

    assert result.stdout == STATE.format(version=BEGIN.version)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_program_reads_the_same(a_crowd: Kept, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with a_crowd.journal:
        pass

    assert main([str(path), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["last"]) == (BEGIN.version, "the daemon stopped")
    assert (found["events"], found["digests"], found["differences"]) == (8, 1, [])
    assert [(row["claim"], row["state"]) for row in found["claims"]] == [(1, "armed"), (2, "armed"), (3, "armed")]
    assert [(row["position"], row["claim"], row["owner"]) for row in found["queue"]] == [(1, 5, "gdb[812]")]
    assert found["places"][0] == {"place": "cpu 0", "pool": "any", "slots": 4, "cpu_wide": 0, "busiest_task": 3}
    assert found["places"][-1] == {"place": "tid 812", "pool": "any", "held": 3, "claims": [1, 2, 3]}


@pytest.mark.parametrize(("until", "claims"), [(0, []), (3, [1, 2]), (8, [1, 2, 3])])
def test_one_may_stop_on_the_way(
    a_crowd: Kept, path: Path, until: int, claims: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with a_crowd.journal:
        pass

    with path.open("rb") as file:
        done = replay(file, until)
    assert main([str(path), "--until", str(until)]) == 0

    assert done.events == until
    assert done.digests == (until == len(a_crowd.given)), "the state is compared where the journal has a mark"
    assert [claim for claim, record in done.arbiter.books.claims.items() if record.state not in QUEUED] == claims
    assert capsys.readouterr().out.splitlines()[0].endswith("it ends: at the event asked for")


def test_a_journal_that_breaks_off_leads_as_far_as_it_goes(
    a_crowd: Kept, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # given the journal of a daemon that was killed in the middle of writing
    a_crowd.journal.flush(10**9)
    path.write_bytes(path.read_bytes()[:-5])

    assert main([str(path)]) == 0

    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("it ends: in the middle, as after a crash")
    assert last == "events=7 digests=0 differences=0"


# --- another state ---------------------------------------------------------------------------------------------------


def test_an_event_that_is_missing_shows_as_a_difference(
    a_crowd: Kept, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # given a journal from which the last request is gone
    with a_crowd.journal:
        pass
    found = records(path)
    rewritten(path, [record for record in found if record != a_crowd.given[-1]])

    assert main([str(path)]) == 1

    lines = capsys.readouterr().out.splitlines()
    assert "the journal counts 8 events where there are 7" in lines
    assert lines[-1] == "events=7 digests=1 differences=2"


def test_a_core_that_decides_otherwise_shows_as_a_difference(
    a_crowd: Kept, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # given a journal of a core that kept a reserve, replayed by one that keeps none
    with a_crowd.journal:
        pass
    begin, *rest = records(path)
    assert isinstance(begin, Begin)
    rewritten(path, [msgspec.structs.replace(begin, policy=Policy(reserve_slots=0)), *rest])

    assert main([str(path), "--json"]) == 1

    (difference,) = json.loads(capsys.readouterr().out)["differences"]
    assert difference.startswith("after event 8 the state is ")


def test_the_event_that_brought_the_daemon_down_is_named(
    a_crowd: Kept, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # given a journal that ends with an event the core cannot take: a claim is armed that was never asked for
    with pytest.raises(KeyError), a_crowd.journal:
        a_crowd.feed(Armed(7_000_000_000, 99))

    assert main([str(path)]) == 1

    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == f"{path}: event 9, Armed at 7.000000 s: KeyError: 99"
    assert "Traceback" in said.err
    assert said.out == ""


def test_a_state_that_must_not_be_is_found_where_it_is_looked_for(
    a_crowd: Kept, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # given an invariant that does not hold after the third event
    with a_crowd.journal:
        pass

    def at_most_one_claim(books: object) -> None:
        assert len(books.claims) < 2, "two claims"  # type: ignore[attr-defined]

    monkeypatch.setattr(invariants, "check", at_most_one_claim)

    # then a plain replay passes over it, and a careful one names the event
    assert main([str(path)]) == 0
    assert main([str(path), "--check"]) == 1
    assert "event 3, ClaimRequested" in capsys.readouterr().err


# --- what is no journal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"GIF89a", "no journal of hwbpd"), (MAGIC, "breaks off before its first record"), (None, "No such file")],
)
def test_what_is_no_journal_is_refused_with_status_2(
    path: Path, data: bytes | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if data is not None:
        path.write_bytes(data)

    assert main([str(path)]) == 2

    said = capsys.readouterr()
    assert said.err.startswith(f"{path}: ")
    assert says in said.err
    assert said.out == ""


def test_there_is_no_event_before_the_first(path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(path), "--until", "-1"])
    assert left.value.code == 2


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_the_journal_of_a_daemon_that_was_killed_says_who_held_what(path: Path) -> None:
    # given a daemon on a simulated machine, with a claim
    daemon = Daemon(f'machine = "sim"\njournal = "{path}"\n[sim]\naccesses_per_s = 0\n')
    with daemon:
        with daemon.connect() as client:
            claim = client.claim("mem:0x404040/8:w", cpus=[1])
            # when it is killed, once it has flushed what it wrote, as it does every second
            deadline = time.monotonic() + WAIT_S
            while Armed not in map(type, records(path)):
                assert time.monotonic() < deadline, "the claim never came to the journal"
                client.slots()
            daemon.kill()
        daemon.start()  # which keeps the journal of the first

    # then its journal knows the claim
    result = command(path.with_name("journal.1"), "--json", "--check")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["claims"]
    assert (row["claim"], row["state"]) == (claim.claim_id, "armed")

    # and that of the second ends in order, with nothing held
    assert records(path)[-1] == Last("the daemon stopped")
    assert command(path, "--check").stdout.endswith("differences=0\n")
