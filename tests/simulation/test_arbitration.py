"""
The simulation of arbitration: a few histories of it, what a failure looks like, and that the promises can be broken.

``make simulate`` plays many more. The mutants at the end are what a promise is for: each is a mistake that somebody
could make in the core, and each must be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from hwbpd.core import giving_way, placing
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.books import Books, ClaimRecord
from hwbpd.core.effects import Change, Effect, Refuse, Route, Tell
from hwbpd.core.lifecycle import ENDED, HALFWAY, State
from hwbpd.core.model import Pool
from hwbpd.core.queue import Queue
from tests.simulation import __main__ as command
from tests.simulation import acts, history
from tests.simulation.acts import Act, Place, World
from tests.simulation.history import Broken
from tests.simulation.play import Play

HISTORIES = 60
ONE_SLOT = World(slots={Pool.ANY: 1}, cpus=1, tasks=1, reserve_slots=0, rearm_after_ns=0)
MUTANT_HISTORIES = 120  # until one of them has to break a promise


@cache
def played(nth: int) -> history.Result:
    return history.play(f"suite.{nth}")


@pytest.mark.parametrize("nth", range(HISTORIES))
def test_every_promise_is_kept_through_a_random_history(nth: int) -> None:
    broken = played(nth).broken

    assert broken is None, "\n".join(history.report(history.shrink(broken, patience_s=10)))


def test_everything_that_can_happen_happens() -> None:
    # given what claims went through, and their owners were told, in some of these histories
    states: set[State] = set()
    told: set[Change] = set()

    def watch(here: Play) -> None:
        states.update(record.state for record in here.shell.arbiter.books.claims.values())
        told.update(here.shell.told)

    for nth in range(HISTORIES // 2):
        history.play(f"suite.{nth}", watch)

    # then each state in which one may find a claim was seen, and each sort of notice was sent
    assert states == set(State) - HALFWAY - ENDED - {State.REQUESTED}
    assert told == set(Change)


def test_the_same_seed_plays_the_same_history() -> None:
    assert history.play("twice") == history.play("twice")


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_history_is_shrunk_to_the_acts_that_matter() -> None:
    # given twenty acts of which two, in this order, fail together
    deeds: list[Act] = [acts.Waits(nth) for nth in range(20)]

    def fails(some: Any) -> bool:
        return deeds[3] in some and deeds[17] in some

    # when they are shrunk, then these two are left
    assert history.shortest(deeds, fails, lambda: False) == [deeds[3], deeds[17]]


def broken_by(mutant: Callable[[], None]) -> Broken:
    """Play histories until one breaks a promise."""
    mutant()
    for nth in range(MUTANT_HISTORIES):
        broken = history.play(f"mutant.{nth}").broken
        if broken is not None:
            return broken
    raise AssertionError("nobody noticed")


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patched:
        yield patched


def test_a_failure_is_told_with_its_seed_its_acts_and_the_stories_of_its_claims(
    patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # given a core that forgets to answer those whom it makes wait
    def silent(self: Arbiter, now_ns: int, record: ClaimRecord, refusal: Exception) -> list[Effect]:
        return []

    patch.setattr(giving_way.GivingWay, "_wait", silent)

    # when the simulation comes upon that
    broken = broken_by(lambda: None)
    status = command.tell([history.play(broken.seed)])

    # then it says how to see it again, in few acts, and fails
    told = capsys.readouterr().out
    assert f"seed {broken.seed}" in told
    assert "asked for mem:" in told
    assert told.count("Claims(") <= 3
    assert told.splitlines()[-1].endswith("violations=1")
    assert status == 1


# --- mistakes that must be seen --------------------------------------------------------------------------------------


def nobody_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "blocker", lambda *_, **__: None)


def the_reserve_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placing, "check_reserve", lambda *_: None)


def equals_displace(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placing, "_may_displace", lambda claim, other: other.rank <= claim.rank)


def users_displace_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placing, "_may_displace", lambda claim, other: other.rank < claim.rank)


def nobody_is_served(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(giving_way.GivingWay, "_serve", lambda *_, **__: [])


def the_yielding_are_not_made_to(patch: pytest.MonkeyPatch) -> None:
    original = giving_way.GivingWay._suspend

    def only_when_asked(self: Arbiter, now_ns: int, record: ClaimRecord) -> list[Effect]:
        return [] if now_ns >= record.yield_by_ns else original(self, now_ns, record)

    patch.setattr(giving_way.GivingWay, "_suspend", only_when_asked)


def waits_never_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(giving_way.GivingWay, "_wait_is_over", lambda *_: [])


def the_resumed_get_no_hits(patch: pytest.MonkeyPatch) -> None:
    original = giving_way.GivingWay._granted

    def without_routes(self: Arbiter, *of: Any, **named: Any) -> list[Effect]:
        told = original(self, *of, **named)
        is_back = any(isinstance(effect, Tell) for effect in told)
        return [effect for effect in told if not (is_back and isinstance(effect, Route))]

    patch.setattr(giving_way.GivingWay, "_granted", without_routes)


def riders_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Books, "is_shared", lambda self, resource_id: False)


def refusals_are_told_twice(patch: pytest.MonkeyPatch) -> None:
    original = Arbiter.step

    def twice(self: Arbiter, event: Any) -> list[Effect]:
        return [again for effect in original(self, event) for again in [effect] * (1 + isinstance(effect, Refuse))]

    patch.setattr(Arbiter, "step", twice)


MUTANTS = [
    nobody_blocks,
    the_reserve_is_forgotten,
    equals_displace,
    users_displace_others,
    nobody_is_served,
    the_yielding_are_not_made_to,
    waits_never_end,
    the_resumed_get_no_hits,
    riders_are_forgotten,
    refusals_are_told_twice,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mistake_in_the_core_breaks_a_promise(
    mutant: Callable[[pytest.MonkeyPatch], None], patch: pytest.MonkeyPatch
) -> None:
    # given a core with that mistake, when histories are played, then one of them breaks a promise
    assert broken_by(lambda: mutant(patch)).what


def test_a_waiter_is_served_when_the_holder_lets_go() -> None:
    # given one slot, held, and somebody who waits for it
    deeds = [
        acts.Claims(number=1, owner=1, place=Place(task=0), pool=Pool.ANY),
        acts.Claims(number=2, owner=3, place=Place(task=0), pool=Pool.ANY, address=1, wait_ns=10**9),
        acts.Releases(owner=1, number=1),
    ]

    # when the holder lets go, then nothing promised is broken, and the waiter has it
    here = Play(ONE_SLOT)
    for deed in deeds:
        here.do(deed)
    assert {claim_id: believed.stands for claim_id, believed in here.shell.beliefs.items()} == {2: "granted"}
