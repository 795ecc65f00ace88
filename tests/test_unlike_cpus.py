"""CPUs with different numbers of slots: claims for one CPU have its own, claims that may run anywhere the least."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from hwbpd import daemon
from hwbpd.core.model import Pool
from hwbpd.hookspecs import CpuFacts
from hwbpd.plugins import Plugins
from tests.fakes import FakeBackend, FakeClient, FakeMachine, Rig

TID = 812
SMALL, BIG = {Pool.INST: 4, Pool.DATA: 2}, {Pool.INST: 6, Pool.DATA: 4}
CLAIM = {"length": 8, "access": "w"}


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Two small CPUs, and a big one between them."""
    rig = rig_with()
    yield rig
    rig.stop()


def rig_with(reserve_slots: int = 0, piece_bytes: int = 0) -> Rig:
    big = OnlyData(BIG, piece_bytes)
    rig = Rig(slots=SMALL, cpus=3, backend=OnlyData(SMALL), backend_on={1: big}, reserve_slots=reserve_slots)
    rig.machine.start_task(TID)
    return rig


class OnlyData(FakeBackend):
    """Takes from the pool for data, whatever is asked for."""

    def __init__(self, slots: dict[Pool, int], piece_bytes: int = 0) -> None:
        super().__init__(dict(reversed(slots.items())), piece_bytes)


def claim(rig: Rig, client: FakeClient, number: int, **fields: object) -> str:
    """Return "granted", or the sentence that says why not now."""
    reply = rig.ask(client, "claim", **CLAIM, address=0x1000 + 8 * number, **fields)
    return str(reply.get("sentence", reply["op"]))


def test_capabilities_and_slots_tell_both_numbers(rig: Rig) -> None:
    client = rig.client()

    reply = rig.ask(client, "capabilities")
    assert reply["pools"] == {"inst": 4, "data": 2}
    assert reply["pools_on"] == [
        {"cpus": [1], "pools": {"inst": 6, "data": 4}},
        {"cpus": [0, 2], "pools": {"inst": 4, "data": 2}},
    ]

    reply = rig.ask(client, "slots")
    assert reply["pools"] == {"inst": 4, "data": 2}
    assert [row.get("slots") for row in reply["cpus"]] == [None, {"inst": 6, "data": 4}, None]


def test_a_claim_for_one_cpu_has_what_that_one_has(rig: Rig) -> None:
    client = rig.client()
    for cpu, slots in ((0, 2), (1, 4)):
        assert [claim(rig, client, number, cpus=[cpu]) for number in range(slots)] == ["granted"] * slots
        refusal = claim(rig, client, 9, cpus=[cpu])
        assert refusal.startswith(f"no data slot on cpu {cpu}: {slots} of {slots} held")


def test_a_claim_that_may_run_anywhere_has_the_least_that_any_has(rig: Rig) -> None:
    # Given a thread with two slots wherever it runs,
    client = rig.client()
    assert [claim(rig, client, number, tid=TID) for number in range(2)] == ["granted"] * 2

    # then a third is too many on the small ones, and not while it is on the big one.
    assert "2 of 2 held" in claim(rig, client, 2, tid=TID)
    assert [claim(rig, client, number, tid=TID, cpus=[1]) for number in (3, 4)] == ["granted"] * 2
    assert "4 of 4 held" in claim(rig, client, 5, tid=TID, cpus=[1])


def test_what_no_cpu_it_may_run_on_has_slots_for_does_not_wait() -> None:
    # Given spans of three slots, which a small CPU does not have,
    short = Rig(slots=SMALL, cpus=3, backend=OnlyData(SMALL, 8), backend_on={1: OnlyData(BIG, 8)})
    short.machine.start_task(TID)
    client, later = short.client(), short.clock.now_ns() + 10**9
    wide = {"address": 0x1000, "length": 24, "access": "w", "wait_until_ns": later}

    # when somebody is ready to wait, then it is refused at once, but where the big one alone is asked for.
    assert short.ask(client, "claim", **wide, tid=TID)["op"] == "error"
    assert short.ask(client, "claim", **wide)["op"] == "error"
    assert short.ask(client, "claim", **wide, tid=TID, cpus=[1])["op"] == "granted"
    short.stop()


def test_a_cpu_that_is_not_there_is_refused_also_while_others_wait(rig: Rig) -> None:
    client, later = rig.client(), rig.clock.now_ns() + 10**9
    assert [claim(rig, client, number, tid=TID) for number in range(2)] == ["granted"] * 2
    assert claim(rig, client, 2, tid=TID, wait_until_ns=later).startswith("no data slot on tid 812")

    assert claim(rig, client, 3, tid=TID, cpus=[77]).startswith("no cpu 77")


def test_the_reserve_is_kept_of_what_a_cpu_has() -> None:
    rig = rig_with(reserve_slots=3)
    client = rig.client()
    assert claim(rig, client, 0, cpus=[0]) == "granted"
    assert claim(rig, client, 1, cpus=[0]).startswith("held back: 1 of 2 data slots on cpu 0")
    assert claim(rig, client, 2, cpus=[1]) == "granted"
    assert claim(rig, client, 3, cpus=[1]).startswith("held back: 3 of 4 data slots on cpu 1")
    rig.stop()


def test_a_span_is_cut_for_the_cpus_it_is_for() -> None:
    # Given big CPUs whose slots hold four bytes, and small ones whose slots hold any,
    rig = rig_with(piece_bytes=4)
    client = rig.client()

    # then it is theirs that count where only they are named, and what all have in common everywhere else.
    def pieces(cpus: list[int] | None) -> int:
        return len(rig.ask(client, "fit", **CLAIM, address=0x1000, cpus=cpus)["pieces"])

    assert [pieces([1]), pieces([0]), pieces([0, 1]), pieces(None)] == [2, 1, 1, 1]
    rig.stop()


def test_the_daemon_asks_the_backend_about_each_sort_of_cpu() -> None:
    # Given a board with two sorts of CPUs, of which one has more breakpoints,
    plugins = Plugins()
    profiles = plugins.backends["armv7"].profiles
    big: CpuFacts = profiles["cortex-a15"]
    small: CpuFacts = profiles["cortex-a9"]

    class Board(FakeMachine):
        facts = small

        def cpu_facts(self, cpu: int) -> CpuFacts:
            return big if cpu > 1 else small

    board = Board({Pool.ANY: 4}, 4, random.Random(0))

    # then it has the number of each that differs from what all have.
    backends = daemon._backend_on(board, plugins)
    board.close()
    assert set(backends) == {2, 3}
    assert backends[2] is backends[3]
    assert backends[2].slots() == plugins.backend(big).slots() != plugins.backend(small).slots()
