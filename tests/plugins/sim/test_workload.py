"""The built-in workload does the same from the same seed, and as much of each thing as it says."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.errors import TargetGone
from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Span, Target
from hwbpd_sim.records import RECORD
from hwbpd_sim.workload import ACTS, COUNTER, NS_PER_S, Act, Workload, notes
from hwbpd_sim.world import World
from tests.plugins.sim.machines import backend_of, kinds, x86

RING = Mode(ring_bytes=2**20)


def run(seed: int, ends_ns: list[int], cpus: int = 4, steps_per_s: int = 100) -> bytes:
    """Return every hit on the counter, with the workload driven in as many pieces as there are ends."""
    world = World(x86(cpus))
    load = Workload(world, seed=seed, processes=2, threads=3, steps_per_s=steps_per_s)
    world.arm(1, Piece(Span(COUNTER, 8), Access.WRITE, Pool.ANY), Target(), RING)
    for end_ns in sorted(ends_ns):
        load.run_until(end_ns)
    return world.disarm(1)[0].records


@given(st.integers(0, 2**62), st.lists(st.integers(0, 2 * NS_PER_S), max_size=8))
def test_the_same_seed_leads_to_the_same_hits_however_time_is_cut(seed: int, ends_ns: list[int]) -> None:
    assert run(seed, [*ends_ns, 2 * NS_PER_S], steps_per_s=20) == run(seed, [2 * NS_PER_S], steps_per_s=20)


def test_another_seed_leads_to_others() -> None:
    assert run(1, [NS_PER_S]) != run(2, [NS_PER_S])


def test_threads_take_turns_and_move_between_cpus() -> None:
    records = list(RECORD.iter_unpack(run(1, [20 * NS_PER_S])))

    by_tid = Counter(record[5] for record in records)
    assert by_tid.keys() == {1000, 1001, 1002, 2000, 2001, 2002}
    assert {record[8] for record in records if record[5] == 1000} == {0, 1, 2, 3}
    assert sorted(record[6] for record in records) == [
        record[6] for record in sorted(records, key=lambda record: record[6])
    ]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: f"{act.name} {act.what}")
@pytest.mark.parametrize("profile", ["x86-64", "i686", "cortex-a72", "cortex-a15", "cortex-a9"])
def test_what_the_notes_say_can_be_watched_at_the_rate_they_say(profile: str, act: Act) -> None:
    # given the claim and the rate that a note names, unless it says that there is none
    (kind,) = kinds(profile)
    backend = backend_of(kind)
    note = list(notes(backend, processes=1, threads=1, steps_per_s=1000))[1 + ACTS.index(act)]
    if act.in_kernel and profile.startswith("cortex"):
        assert note == f"{act.address:#x}  inbox: written by the kernel, which no slot of these CPUs can see"
        return
    found = re.match(r"mem:(0x[0-9a-f]+)/(\d+):([rwx]+):?([uk]*)  .* (\d+) times a second", note)
    assert found, note
    address, length, letters, modes, rate = found.groups()
    access = Access.from_letters(letters)
    mode = Mode(user="k" not in modes, kernel="u" not in modes, delivery=Delivery.COUNT)
    plan = backend.fit(Span(int(address, 16), int(length)), access, mode)
    assert len(plan.pieces) == int(*re.findall(r"in (\d) slots$", note) or "1")

    # when a thread runs for ten seconds
    world = World([kind])
    load = Workload(world, seed=7, processes=1, threads=1, steps_per_s=1000)
    for resource_id, piece in enumerate(plan.pieces):
        world.arm(resource_id, piece, Target(world.task(1000)), mode)
    load.run_until(10 * NS_PER_S)

    # then it is hit as often, by the draw: a word of the buffer by its part, flags that are read by writes as well
    per_s = int(rate) / act.elements
    for other in ACTS:
        if other is not act and other.address == act.address and other.access & access:
            per_s += other.share * 100
    for resource_id in range(len(plan.pieces)):
        assert world.armed(resource_id).hits == pytest.approx(10 * per_s, abs=4 * (10 * per_s) ** 0.5)


def test_a_thread_that_has_exited_makes_no_steps_and_changes_nothing_for_the_others() -> None:
    def hits_of(others: int, exits: bool) -> int:
        world = World(x86(2))
        load = Workload(world, seed=3, processes=1, threads=2, steps_per_s=100)
        piece = Piece(Span(COUNTER, 8), Access.WRITE, Pool.ANY)
        world.arm(1, piece, Target(world.task(others)), Mode(delivery=Delivery.COUNT))
        if exits:
            world.exit_thread(1001)
        load.run_until(10 * NS_PER_S)
        return world.disarm(1)[1].hits

    assert hits_of(1000, exits=True) == hits_of(1000, exits=False) > 0
    assert hits_of(1001, exits=True) == 0


def test_what_is_skipped_is_not_made_up_for() -> None:
    world = World(x86(1))
    load = Workload(world, seed=1, processes=1, threads=1, steps_per_s=10)

    load.skip_until(100 * NS_PER_S)

    assert load.next_ns == 100 * NS_PER_S
    load.skip_until(50 * NS_PER_S)
    assert load.next_ns == 100 * NS_PER_S, "time does not go back"


def test_without_processes_there_is_nothing_to_do() -> None:
    world = World(x86(1))
    load = Workload(world, seed=1, processes=0, threads=1, steps_per_s=10)

    assert load.next_ns is None
    load.run_until(NS_PER_S)
    with pytest.raises(TargetGone, match="no thread 1000"):
        world.task(1000)


def test_a_debugger_outside_has_slots_of_the_first_thread() -> None:
    world = World(x86(1))
    load = Workload(world, seed=1, processes=1, threads=1, steps_per_s=0)

    load.hold_outside(3)

    (found,) = world.foreign(Pool.ANY, Target(world.task(1000)), None)
    assert (found.comm, found.slots, found.place, found.evidence) == ("sim-gdb", 3, "on tid 1000", "tracer")
