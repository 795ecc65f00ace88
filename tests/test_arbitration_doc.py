"""
docs/arbitration.md says what is so: its stories are those that the core tells.

A story in the document stands below ``<!-- story: NAME -->``; NAME is a function below, which lets it happen. Its
picture of a claim's life is compared with the table in ``tests/core/test_lifecycle.py``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from hwbpd.core import invariants
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Arm, Attend, Disarm, Effect, Handover, Probe, Suspend
from hwbpd.core.events import (
    AnyEvent,
    Armed,
    ClaimRequested,
    Disarmed,
    Probed,
    ReleaseRequested,
    SessionEnded,
    Suspended,
    TakenReported,
    TakingRequested,
    TargetEnded,
    Tick,
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
)
from hwbpd.core.policy import Policy

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "arbitration.md"

GDB, PERF = Owner(1, 700, 0, 0, "gdb"), Owner(2, 97, 1000, 1000, "perf")
TRACE, FUZZ = Owner(3, 120, 1000, 1000, "trace"), Owner(4, 130, 1001, 1001, "fuzz")
THREAD = Target(Task(812, 5, Process(812, 5)))


class Desk:
    """A core, and a machine that does what it is told at once."""

    def __init__(self, reserve_slots: int = 0) -> None:
        policy = Policy(reserve_slots=reserve_slots)
        self.arbiter = Arbiter({Pool.ANY: 4}, (0, 1), (0, 1), policy=policy)
        self.now_ns = 1_000_000_000
        self.asked = 0
        self.has_slot = False  # whether a tracer that is gone had taken it

    def feed(self, event: AnyEvent) -> None:
        pending = [event]
        while pending:
            for effect in self.arbiter.step(pending.pop(0)):
                outcome = self._outcome(effect)
                if outcome is not None:
                    pending.append(outcome)
            invariants.check(self.arbiter.books)

    def _outcome(self, effect: Effect) -> AnyEvent | None:
        match effect:
            case Arm(claim) | Attend(claim):
                return Armed(self.now_ns, claim.claim_id)
            case Disarm(claim_id):
                return Disarmed(self.now_ns, claim_id, Totals())
            case Suspend(claim_id):
                return Suspended(self.now_ns, claim_id)
            case Probe(claim_id):
                return Probed(self.now_ns, claim_id, self.has_slot)
            case Handover():
                return None
        return None

    def claims(
        self,
        owner: Owner,
        kind: Kind = Kind.PERF,
        target: Target = THREAD,
        address: int = 0x404040,
        wait_s: float = 0,
        armed_by: ArmedBy = ArmedBy.DAEMON,
    ) -> int:
        """Ask for eight bytes to be watched; return the claim's number."""
        span = Span(address, 8)
        tracer = armed_by is ArmedBy.TRACER
        mode = Mode(kernel=False, delivery=Delivery.HOLD if tracer else Delivery.HITS)
        plan = Plan((Piece(span, Access.WRITE, Pool.ANY),))
        wait_until_ns = self.now_ns + int(wait_s * 1e9) if wait_s else 0
        self.asked += 1
        self.feed(
            ClaimRequested(
                self.now_ns,
                owner,
                1,
                kind,
                span,
                Access.WRITE,
                mode,
                target,
                "",
                plan,
                privileged=owner.uid == 0,
                wait_until_ns=wait_until_ns,
                armed_by=armed_by,
            )
        )
        return self.asked  # claims are numbered in the order in which they are asked for

    def fill(self, owner: Owner, kind: Kind = Kind.PERF, slots: int = 4, target: Target = THREAD) -> list[int]:
        """Let somebody take slots of a thread."""
        return [self.claims(owner, kind, target, 0x500000 + 8 * number) for number in range(slots)]

    def releases(self, owner: Owner, claim_id: int) -> None:
        self.feed(ReleaseRequested(self.now_ns, owner, 1, claim_id, operator=False))

    def later(self, seconds: float) -> None:
        """Let time pass, and what is due happen."""
        self.now_ns += int(seconds * 1e9)
        due_ns = self.arbiter.next_deadline_ns()
        if due_ns is not None and due_ns <= self.now_ns:
            self.feed(Tick(self.now_ns))

    def story(self, claim_id: int) -> list[str]:
        record = self.arbiter.record(claim_id)
        assert record is not None
        return list(record.story.lines())


# --- what happens in the document ------------------------------------------------------------------------------------


def share() -> list[str]:
    desk = Desk()
    first = desk.claims(PERF)
    desk.later(1)
    second = desk.claims(TRACE)
    assert len(desk.arbiter.books.resources) == 1
    desk.later(1)
    desk.releases(PERF, first)
    assert len(desk.arbiter.books.resources) == 1, "leaving does not disturb the other"
    return desk.story(second)


def wait() -> list[str]:
    desk = Desk()
    held = desk.fill(GDB, Kind.PTRACE)
    waiting = desk.claims(PERF, wait_s=60)
    desk.later(2.5)
    desk.releases(GDB, held[0])
    return desk.story(waiting)


def wait_in_vain() -> list[str]:
    desk = Desk()
    desk.fill(GDB, Kind.PTRACE)
    waiting = desk.claims(PERF, wait_s=5)
    desk.later(5)
    return desk.story(waiting)


def behind() -> list[str]:
    desk = Desk()
    desk.fill(PERF, target=Target(Task(900, 6, Process(900, 6))))
    desk.fill(GDB, Kind.PTRACE, 3)
    desk.claims(TRACE, target=Target(), wait_s=60)
    return desk.story(desk.claims(FUZZ))


def displace() -> list[str]:
    desk = Desk()
    held = desk.fill(PERF)
    desk.later(1)
    desk.claims(GDB, Kind.PTRACE)
    assert desk.arbiter.books.claims[held[-1]].state == "yielding", "the youngest"
    desk.later(0.05)
    desk.feed(YieldRequested(desk.now_ns, PERF, 2, held[-1]))
    desk.later(3)
    desk.releases(GDB, 5)
    return desk.story(held[-1])


def displacer() -> list[str]:
    desk = Desk()
    desk.fill(PERF)
    claim_id = desk.claims(GDB, Kind.PTRACE)
    desk.later(0.1)
    return desk.story(claim_id)


def reserve() -> list[str]:
    desk = Desk(reserve_slots=1)
    desk.fill(PERF, slots=3)
    return desk.story(desk.claims(TRACE))


def tracer() -> list[str]:
    desk = Desk()
    claim_id = desk.claims(GDB, Kind.PTRACE, armed_by=ArmedBy.TRACER)
    desk.later(4)
    desk.feed(TakingRequested(desk.now_ns, GDB, 2, claim_id))
    desk.later(0.000_1)
    desk.feed(TakenReported(desk.now_ns, GDB, 3, claim_id))
    desk.later(20)
    desk.releases(GDB, claim_id)
    (resource_id,) = desk.arbiter.books.resources
    desk.later(60)
    desk.feed(TargetEnded(desk.now_ns, resource_id, execed=False))
    return desk.story(claim_id)


def tracer_dies() -> list[str]:
    desk = Desk()
    claim_id = desk.claims(GDB, Kind.PTRACE, armed_by=ArmedBy.TRACER)
    desk.feed(TakingRequested(desk.now_ns, GDB, 2, claim_id))
    desk.feed(SessionEnded(desk.now_ns, GDB.session_id, "its process ended"))
    assert not desk.arbiter.books.resources
    return desk.story(claim_id)


STORIES: tuple[Callable[[], list[str]], ...] = (
    share,
    wait,
    wait_in_vain,
    behind,
    displace,
    displacer,
    reserve,
    tracer,
    tracer_dies,
)


# --- the document ----------------------------------------------------------------------------------------------------


def told(name: str) -> list[str]:
    """The lines of a story in the document; long ones are folded there, and go on with more space before them."""
    (text,) = re.findall(rf"<!-- story: {name} -->\n\n((?:    .*\n)+)", DOCUMENT.read_text(encoding="utf-8"))
    return re.sub(r"\n {6,}", " ", re.sub(r"^    (?! )", "", text, flags=re.MULTILINE)).splitlines()


def written(story: Callable[[], list[str]]) -> str:
    """A story as the document has it."""
    return "".join(
        textwrap.fill(line, 118, initial_indent=" " * 4, subsequent_indent=" " * 18, break_on_hyphens=False) + "\n"
        for line in story()
    )


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_story_in_the_document_is_told_by_the_core_word_for_word(story: Callable[[], list[str]]) -> None:
    assert told(story.__name__) == story(), f"bring it up to date: python -m {__name__}"


def test_every_story_in_the_document_is_told_here() -> None:
    names = re.findall(r"<!-- story: (\w+) -->", DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(names) == sorted(story.__name__ for story in STORIES)


if __name__ == "__main__":
    document = DOCUMENT.read_text(encoding="utf-8")
    for each in STORIES:
        heading = f"<!-- story: {each.__name__} -->\n\n"
        before, after = document.split(heading)
        document = before + heading + written(each) + re.sub(r"\A(?:    .*\n)+", "", after)
    DOCUMENT.write_text(document, encoding="utf-8")
