"""
``python -m hwbpd.replay FILE``: steps the events of a journal through a new core, and says what stands at the end.

It is for afterwards, and touches no machine. Where the journal has a digest of the state, the replay must have the
same: a difference means that the core is not deterministic, or that another version of it wrote the journal. An event
that brought the daemon down brings the replay down, too, in the same place.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from hwbpd.core import invariants
from hwbpd.core.arbiter import Arbiter, describe
from hwbpd.core.books import ClaimRecord
from hwbpd.core.events import AnyEvent
from hwbpd.core.lifecycle import QUEUED
from hwbpd.journal import BadJournal, Begin, Last, Mark, digest, read


class Failed(Exception):
    """An event cannot be stepped, or leaves a state that must not be; the message says which and why."""


class Replay:
    """
    A core and what was compared so far.

    :param checks: look at every invariant after each event; this costs what the books hold.
    """

    def __init__(self, begin: Begin, checks: bool = False) -> None:
        self.begin = begin
        self.arbiter: Arbiter = begin.arbiter()
        self.events = self.digests = 0
        self.differences: list[str] = []
        self.last = ""  # why the journal ends; empty where it breaks off
        self._checks = checks

    def take(self, record: AnyEvent | Mark | Last) -> None:
        """
        Step an event, or compare a digest.

        :raises Failed: at an event; the core is of no use afterwards.
        """
        if isinstance(record, Mark):
            self._compare(record)
        elif isinstance(record, Last):
            self.last = record.why
        else:
            self._step(record)

    def _step(self, event: AnyEvent) -> None:
        self.events += 1
        try:
            self.arbiter.step(event)
            if self._checks:
                invariants.check(self.arbiter.books)
        except Exception as why:
            what = f"event {self.events}, {type(event).__name__} at {event.now_ns / 1e9:.6f} s"
            raise Failed(f"{what}: {type(why).__name__}: {why}") from why

    def _compare(self, mark: Mark) -> None:
        self.digests += 1
        if mark.events != self.events:
            self.differences.append(f"the journal counts {mark.events} events where there are {self.events}")
        found = digest(self.arbiter)
        if mark.digest != found:
            self.differences.append(f"after event {self.events} the state is {found}; it was {mark.digest}")


def replay(file: IO[bytes], until: int | None = None, checks: bool = False) -> Replay:
    """
    Replay a journal, or its first ``until`` events.

    :raises BadJournal: for a file that is none; :raises Failed: see ``Replay.take``.
    """
    records = read(file)
    begin = next(records, None)
    if not isinstance(begin, Begin):
        raise BadJournal("the journal breaks off before its first record")
    done = Replay(begin, checks)
    for record in records:
        assert not isinstance(record, Begin)
        # A digest belongs to the events before it, so after the last of those wanted one more may be compared.
        if done.events == until and not isinstance(record, Mark):
            break
        done.take(record)
    return done


# --- what stands at the end ------------------------------------------------------------------------------------------


def claims(arbiter: Arbiter) -> Iterator[dict[str, Any]]:
    """Every claim that holds something, oldest first."""
    for record in arbiter.books.claims.values():
        if record.state not in QUEUED:
            yield _row(record)


def queue(arbiter: Arbiter) -> Iterator[dict[str, Any]]:
    """Every claim that waits for room, in the order of the queue."""
    for position, record in enumerate(arbiter.queue, start=1):
        yield {"position": position, **_row(record)}


def places(arbiter: Arbiter) -> Iterator[dict[str, Any]]:
    """Every place with slots that are held: the CPUs, then threads and processes."""
    books = arbiter.books
    for pool, counts in books.pools.items():
        for cpu in sorted(books.online):
            cpu_wide, busiest = counts.held_cpu_wide(cpu), counts.held_by_busiest(cpu)
            yield {
                "place": f"cpu {cpu}",
                "pool": str(pool),
                "slots": counts.slots_on(cpu),
                "cpu_wide": cpu_wide,
                "busiest_task": busiest,
            }
    held: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(dict)
    for resource_id, resource in books.resources.items():
        if not resource.target.is_cpu_wide:
            riders = [claim.claim_id for claim in books.riders[resource_id]]
            held[str(resource.target), str(resource.piece.pool)][resource_id] = riders
    for (place, of_pool), of_target in held.items():
        yield {
            "place": place,
            "pool": of_pool,
            "held": len(of_target),
            "claims": sorted({claim_id for riders in of_target.values() for claim_id in riders}),
        }


def _row(record: ClaimRecord) -> dict[str, Any]:
    return {
        "claim": record.claim.claim_id,
        "owner": str(record.claim.owner),
        "what": describe(record.claim),
        "state": str(record.state),
    }


def sentences(done: Replay) -> Iterator[str]:
    """The state as a person reads it."""
    yield "claims:"
    for row in claims(done.arbiter):
        yield f"  claim {row['claim']} of {row['owner']}: {row['what']}, {row['state']}"
    yield "places:"
    for row in places(done.arbiter):
        pool = "" if row["pool"] == "any" else f" {row['pool']}"
        if "slots" in row:
            free = row["slots"] - row["cpu_wide"] - row["busiest_task"]
            parts = f"{row['cpu_wide']} cpu-wide, {row['busiest_task']} on the busiest task"
            yield f"  {row['place']}: {free} of {row['slots']}{pool} slots free ({parts})"
        else:
            of_claims = ", ".join(map(str, row["claims"]))
            yield f"  {row['place']}: {row['held']}{pool} slots (claims {of_claims})"
    yield "queue:"
    for row in queue(done.arbiter):
        yield f"  {row['position']}. claim {row['claim']} of {row['owner']}: {row['what']}, {row['state']}"


def _json(done: Replay) -> str:
    found = {
        "version": done.begin.version,
        "events": done.events,
        "digests": done.digests,
        "differences": done.differences,
        "last": done.last,
        "claims": list(claims(done.arbiter)),
        "places": list(places(done.arbiter)),
        "queue": list(queue(done.arbiter)),
    }
    return msgspec.json.encode(found).decode()


# --- the command -----------------------------------------------------------------------------------------------------


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hwbpd.replay", description="Replay a journal of hwbpd.")
    parser.add_argument("file", type=Path, metavar="FILE", help="what `hwbpd --journal FILE` wrote")
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    parser.add_argument("--until", type=_count, metavar="N", help="only the first N events")
    parser.add_argument("--check", action="store_true", help="look at every invariant after each event")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise ValueError(text)
    return count


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 for the same state, 1 for another or a failure, 2 for a file that is no journal."""
    asked = _arguments().parse_args(arguments)
    try:
        with asked.file.open("rb") as file:
            done = replay(file, asked.until, asked.check)
    except (OSError, BadJournal) as why:
        print(f"{asked.file}: {why}", file=sys.stderr)
        return 2
    except Failed as failed:
        traceback.print_exception(failed.__cause__)
        print(f"{asked.file}: {failed}", file=sys.stderr)
        return 1
    if asked.json:
        print(_json(done))
        return 1 if done.differences else 0
    end = "at the event asked for" if done.events == asked.until else done.last or "in the middle, as after a crash"
    print(f"journal of hwbpd {done.begin.version}; it ends: {end}")
    print("\n".join(sentences(done)))
    for difference in done.differences:
        print(difference)
    print(f"events={done.events} digests={done.digests} differences={len(done.differences)}")
    return 1 if done.differences else 0


if __name__ == "__main__":
    sys.exit(main())
