"""Looking for others: in a worker, at most once a second, and nobody waits for a look that is not for them."""

from __future__ import annotations

import os
import queue
import random
import select
import threading
from collections.abc import Iterator, Sequence

import pytest
from structlog.testing import capture_logs

from hwbpd import attribution
from hwbpd.attribution import PATIENT_MAX, Attribution, Place, holder_of
from hwbpd.core.errors import Holder
from hwbpd.core.model import Pool, Target
from hwbpd.hookspecs import Foreign
from tests import strategies
from tests.fakes import FakeClock, FakeMachine

WAIT_S = 30
HERE = Place(Pool.ANY, Target(strategies.task(0)), None)
THERE = Place(Pool.ANY, Target(), 1)
GDB = Foreign(812, "gdb", 1000, 4, "on tid 800", "tracer")
PERF = Foreign(97, "perf", 0, 1, "cpu-wide on cpu 1", "perf fd")


class Lookout(FakeMachine):
    """A machine where a look begins when it is asked, and ends when the test says with what."""

    def __init__(self) -> None:
        super().__init__({Pool.ANY: 4}, 2, random.Random(0))
        self.began: queue.SimpleQueue[Place] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[Sequence[Foreign] | Exception] = queue.SimpleQueue()

    def foreign(self, pool: Pool, target: Target, cpu: int | None) -> Sequence[Foreign]:
        self.began.put(Place(pool, target, cpu))
        found = self.ends.get(timeout=WAIT_S)
        if isinstance(found, Exception):
            raise found
        return found


class Timeless(threading.Event):
    """For whoever waits on it time passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout)
        return self.is_set()


class Desk:
    """Where looks are asked for, and the answers that came, by the name of who asked."""

    def __init__(self) -> None:
        self.machine = Lookout()
        self.clock = FakeClock()
        self.attribution = Attribution(self.machine, self.clock)
        self.answered: list[tuple[str, tuple[Holder, ...]]] = []

    def let_time_pass(self) -> list[float | None]:
        """Let the worker wait for no look; return the seconds it would have waited for each."""
        self.attribution._closing = timeless = Timeless()
        return timeless.waited

    def ask(self, who: str, *places: Place, patient: bool = False) -> None:
        self.attribution.look(places, lambda holders: self.answered.append((who, holders)), patient)

    def began(self) -> Place:
        """Where the worker looks now."""
        return self.machine.began.get(timeout=WAIT_S)

    def end(self, *found: Foreign) -> None:
        """Let the look under way find these, and take the answer."""
        self.machine.ends.put(found)
        self.take_answers()

    def take_answers(self) -> None:
        assert select.select([self.attribution.fileno()], [], [], WAIT_S)[0], "no look ended"
        self.attribution.answers()

    def close(self) -> None:
        self.attribution.close()
        self.machine.ends.put(())  # for a look that is still under way
        self.attribution._worker.join(WAIT_S)
        assert not self.attribution._worker.is_alive(), "it ends when it is told to"
        os.close(self.attribution.fileno())


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def test_a_look_is_made_in_a_worker_and_its_finds_are_told_by_whoever_asks_for_answers(desk: Desk) -> None:
    # given somebody who asks
    desk.ask("ann", HERE)

    # when the look is under way, then nobody is told, and there is nothing to take
    assert desk.began() == HERE
    desk.attribution.answers()
    assert desk.answered == []

    # and its end is seen by a descriptor, and told here
    desk.end(GDB, PERF)
    assert desk.answered == [("ann", (holder_of(GDB), holder_of(PERF)))]
    assert not select.select([desk.attribution.fileno()], [], [], 0)[0], "it is told once"
    desk.attribution.answers()
    assert len(desk.answered) == 1


def test_what_is_found_is_told_as_a_holder() -> None:
    assert holder_of(GDB) == Holder(812, "gdb", 1000, "", 4, "on tid 800", (), "tracer")


def test_several_places_are_one_look_and_who_is_found_twice_is_told_once(desk: Desk) -> None:
    desk.ask("ann", HERE, THERE)

    assert desk.began() == HERE
    desk.machine.ends.put((GDB, PERF))
    assert desk.began() == THERE
    desk.end(PERF)

    assert desk.answered == [("ann", (holder_of(GDB), holder_of(PERF)))]


def test_who_asks_about_the_same_place_meanwhile_waits_for_the_same_look(desk: Desk) -> None:
    desk.ask("ann", HERE)
    desk.ask("bob", HERE)
    assert desk.answered == []

    desk.end(GDB)

    assert desk.answered == [("ann", (holder_of(GDB),)), ("bob", (holder_of(GDB),))]
    assert (desk.began(), desk.machine.began.empty()) == (HERE, True), "there was one look"


def test_who_asks_about_another_place_is_answered_at_once_with_nothing(desk: Desk) -> None:
    desk.ask("ann", HERE)
    desk.ask("bob", THERE)
    assert desk.answered == [("bob", ())]
    desk.end(GDB)

    # also when the look is over and the second is not
    desk.ask("bob", THERE)
    assert [(who, len(holders)) for who, holders in desk.answered] == [("bob", 0), ("ann", 1), ("bob", 0)]
    assert (desk.began(), desk.machine.began.empty()) == (HERE, True)


def test_within_a_second_the_last_look_answers_for_its_place(desk: Desk) -> None:
    # given a look that is over
    desk.ask("ann", HERE)
    desk.end(GDB)
    desk.began()

    # when somebody asks within a second of its beginning, then it is not made again
    desk.clock.wind(0.999_999_999)
    desk.ask("bob", HERE)
    assert desk.answered[-1] == ("bob", (holder_of(GDB),))
    assert desk.machine.began.empty()

    # and after a second it is
    desk.clock.wind(0.000_000_001)
    desk.ask("bob", HERE)
    assert desk.began() == HERE
    desk.end()
    assert [(who, len(holders)) for who, holders in desk.answered] == [("ann", 1), ("bob", 1), ("bob", 0)]


def test_a_look_that_takes_longer_than_a_second_is_the_only_one(desk: Desk) -> None:
    desk.ask("ann", HERE)
    assert desk.began() == HERE

    desk.clock.wind(5)
    desk.ask("bob", HERE)
    desk.ask("carol", THERE)

    assert desk.answered == [("carol", ())]
    desk.end(GDB)
    assert [who for who, _ in desk.answered] == ["carol", "ann", "bob"]
    assert desk.machine.began.empty()


def test_a_look_that_fails_finds_nobody_and_the_next_is_made(desk: Desk) -> None:
    # given a machine that raises while it looks
    desk.ask("ann", HERE)
    with capture_logs() as lines:
        desk.machine.ends.put(RuntimeError("what /proc holds"))
        desk.take_answers()

    # then whoever asked hears of nobody, and the log of why
    assert desk.answered == [("ann", ())]
    assert [(line["event"], line["log_level"]) for line in lines] == [("looking for foreign holders failed", "error")]

    # and the worker goes on
    desk.clock.wind(1)
    desk.ask("ann", HERE)
    desk.end(GDB)
    assert desk.answered[-1] == ("ann", (holder_of(GDB),))


# --- who can wait ----------------------------------------------------------------------------------------------------


def test_who_asks_on_purpose_waits_for_a_look_of_its_own(desk: Desk) -> None:
    # given a look that was made a quarter of a second ago
    waited = desk.let_time_pass()
    desk.ask("ann", HERE)
    desk.end(GDB)
    desk.began()
    desk.clock.wind(0.25)

    # when somebody who can wait asks about another place
    desk.ask("bob", THERE, patient=True)

    # then it has its answer from a look that began a second after the other
    assert desk.began() == THERE
    desk.end(PERF)
    assert desk.answered[-1] == ("bob", (holder_of(PERF),))
    assert waited == [0.0, 0.75]


def test_nobody_is_answered_with_what_was_found_elsewhere(desk: Desk) -> None:
    # given a look under way, and two who wait for the next, which is about another place
    desk.let_time_pass()
    desk.ask("ann", HERE)
    assert desk.began() == HERE
    desk.ask("bob", THERE, patient=True)
    desk.ask("carol", THERE, patient=True)

    # when the first ends, then only the first is answered
    desk.end(GDB)
    assert desk.answered == [("ann", (holder_of(GDB),))]

    # and the others when theirs does
    assert desk.began() == THERE
    desk.end(PERF)
    assert desk.answered[1:] == [("bob", (holder_of(PERF),)), ("carol", (holder_of(PERF),))]


def test_so_many_may_wait_and_one_more_is_answered_with_nothing(desk: Desk) -> None:
    # given a look under way
    desk.let_time_pass()
    desk.ask("ann", HERE)
    assert desk.began() == HERE
    places = [Place(Pool.ANY, Target(), cpu) for cpu in range(PATIENT_MAX + 1)]

    # when more ask about different places than may wait
    for place in places:
        desk.ask(f"cpu {place.cpu}", place, patient=True)

    # then the last is answered at once, and the others in their order
    assert desk.answered == [(f"cpu {PATIENT_MAX}", ())]
    desk.end()
    for place in places[:-1]:
        assert desk.began() == place
        desk.end()
    assert [who for who, _ in desk.answered[1:]] == ["ann", *(f"cpu {cpu}" for cpu in range(PATIENT_MAX))]


def test_a_look_that_still_waits_for_its_time_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a look that is not due for days
    monkeypatch.setattr(attribution, "LOOK_EVERY_NS", 10**15)
    desk = Desk()
    desk.ask("ann", HERE)
    desk.end(GDB)
    desk.began()
    desk.ask("bob", THERE, patient=True)

    # when the daemon ends, then the worker does, and bob is told nothing
    desk.close()
    assert [who for who, _ in desk.answered] == ["ann"]
    assert desk.machine.began.empty()
