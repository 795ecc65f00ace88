"""In the simulated world exactly that traps what a slot covers, and every hit is told, lost or stopped to the hit."""

from __future__ import annotations

import errno
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.errors import TargetGone
from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Span, Target, Totals
from hwbpd.hookspecs import ArmError, Foreign, TargetEnd
from hwbpd_sim.outsiders import TRACER, UNATTRIBUTED, Outsider
from hwbpd_sim.records import RECORD, Step
from hwbpd_sim.world import World
from tests.plugins.sim.machines import x86

READ, WRITE, EXECUTE = Access.READ, Access.WRITE, Access.EXECUTE
PAGE = 4096
RING = Mode(ring_bytes=16 * PAGE)
COUNT = Mode(delivery=Delivery.COUNT)
HOLD = Mode(delivery=Delivery.HOLD)
AT = 0x1000
PIECE = Piece(Span(AT, 8), WRITE, Pool.ANY)
STEP = Step(WRITE, AT, 8, 0x400, 0x404)
PID, OTHER = 10, 20


def made(cpus: int = 2) -> World:
    """x86, and two processes, one with two threads: 10 on CPU 0, 11 on CPU 1, 20 on CPU 0."""
    world = World(x86(cpus))
    world.start_process(PID, "ten", 0)
    world.start_thread(PID, PID + 1, 1 % cpus)
    world.start_process(OTHER, "twenty", 0)
    return world


@pytest.fixture
def world() -> World:
    return made()


def on(world: World, tid: int, *cpus: int) -> Target:
    return Target(world.task(tid), cpus or None)


def steps(world: World, tid: int, times: int, step: Step = STEP) -> None:
    for _ in range(times):
        world.step(tid, step)


def hits(world: World, resource_id: int) -> int:
    return world.armed(resource_id).hits


def refusal(world: World, resource_id: int, target: Target) -> tuple[int, int | None, int | None]:
    with pytest.raises(ArmError) as refused:
        world.arm(resource_id, PIECE, target, HOLD)
    return refused.value.errno, refused.value.cpu, refused.value.tid


# --- what traps ------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    whose: str
    cpus: tuple[int, ...] | None
    piece: Piece
    mode: Mode


class Happening(NamedTuple):
    tid: int
    moves_to: int
    step: Step


TIDS = (PID, PID + 1, OTHER)
addresses = st.integers(AT - 4, AT + 12)
spans = st.tuples(addresses, st.sampled_from([1, 2, 4, 8])).map(lambda at: Span(at[0] - at[0] % at[1], at[1]))
slots = st.builds(
    Slot,
    st.sampled_from(["cpu-wide", "task 10", "task 11", "process 10", "process 20"]),
    st.sampled_from([None, (0,), (1,), (0, 1)]),
    st.one_of(
        st.builds(Piece, spans, st.sampled_from([WRITE, READ | WRITE]), st.just(Pool.ANY)),
        st.builds(Piece, st.builds(Span, addresses, st.just(8)), st.just(EXECUTE), st.just(Pool.ANY)),
    ),
    st.builds(Mode, st.booleans(), st.booleans(), st.sampled_from(list(Delivery)), ring_bytes=st.just(64 * PAGE)),
)
happenings = st.builds(
    Happening,
    st.sampled_from(TIDS),
    st.integers(0, 1),
    st.builds(
        Step,
        st.sampled_from([READ, WRITE, READ | WRITE, EXECUTE]),
        addresses,
        st.sampled_from([1, 2, 4, 8]),
        st.just(0x400),
        st.just(0x404),
        st.booleans(),
    ),
)


def target_of(world: World, slot: Slot) -> Target:
    kind, _, number = slot.whose.partition(" ")
    if kind == "process":
        return Target(process=world.process(int(number)))
    return Target(world.task(int(number)) if kind == "task" else None, slot.cpus)


def is_covered(slot: Slot, tid: int, cpu: int, step: Step) -> bool:
    """What registers of x86 come to for an instruction of one access, said with sets of bytes and numbers."""
    kind, _, number = slot.whose.partition(" ")
    tids = {"cpu-wide": TIDS, "task": (int(number or 0),), "process": tuple(t for t in TIDS if str(t)[0] == number[:1])}
    span = slot.piece.span
    touched = set(range(step.address, step.address + step.length_bytes))
    if step.access is EXECUTE:
        is_touched = slot.piece.access is EXECUTE and step.address == span.address
    else:
        is_touched = bool(touched & set(range(span.address, span.address + span.length_bytes)))
        is_touched = is_touched and any(letter in slot.piece.access.letters for letter in step.access.letters)
    seen = slot.mode.kernel if step.in_kernel else slot.mode.user
    right_cpu = kind == "process" or slot.cpus is None or cpu in slot.cpus
    return tid in tids[kind] and right_cpu and is_touched and seen and slot.mode.delivery is not Delivery.HOLD


@given(st.lists(slots, max_size=4), st.lists(happenings, max_size=30))
def test_every_hit_is_a_touch_that_is_covered_and_every_such_touch_is_a_hit(
    wanted: list[Slot], happens: list[Happening]
) -> None:
    # given a few slots, as many as there is room for
    world = made()
    for resource_id, slot in enumerate(wanted):
        world.arm(resource_id, slot.piece, target_of(world, slot), slot.mode)

    # when threads move and touch memory
    expected: dict[int, list[tuple[int, int, int]]] = {resource_id: [] for resource_id in range(len(wanted))}
    for at_ns, (tid, cpu, step) in enumerate(happens):
        world.now_ns = at_ns
        world.move(tid, cpu)
        world.step(tid, step)
        for resource_id, slot in enumerate(wanted):
            if is_covered(slot, tid, cpu, step):
                expected[resource_id].append((at_ns, tid, cpu))

    # then each slot has counted and recorded just what it covers
    for resource_id, slot in enumerate(wanted):
        batch, totals = world.disarm(resource_id)
        assert totals == Totals(len(expected[resource_id]))
        found = [(record[6], record[5], record[8]) for record in RECORD.iter_unpack(batch.records)]
        assert sorted(found) == (expected[resource_id] if slot.mode.delivery is Delivery.HITS else [])


@pytest.mark.parametrize(
    ("access", "address", "length_bytes", "is_touched"),
    [
        (WRITE, AT - 1, 1, False),
        (WRITE, AT - 1, 2, True),
        (WRITE, AT - 8, 64, True),
        (WRITE, AT + 7, 1, True),
        (WRITE, AT + 7, 8, True),
        (WRITE, AT + 8, 8, False),
        (READ, AT, 8, False),
        (READ | WRITE, AT, 8, True),
        (EXECUTE, AT, 1, False),
    ],
)
def test_a_slot_covers_its_bytes_and_not_those_beside_them(
    world: World, access: Access, address: int, length_bytes: int, is_touched: bool
) -> None:
    world.arm(1, PIECE, on(world, PID), COUNT)

    world.step(PID, Step(access, address, length_bytes, 0x400, 0x404))

    assert hits(world, 1) == is_touched


def test_a_record_is_byte_for_byte_what_linux_writes(world: World) -> None:
    world.now_ns = 123
    world.arm(1, PIECE, on(world, PID + 1), RING)
    world.arm(2, Piece(Span(AT, 8), EXECUTE, Pool.ANY), on(world, PID + 1), RING)

    world.step(PID + 1, STEP)
    world.step(PID + 1, STEP._replace(in_kernel=True))
    world.step(PID + 1, Step(EXECUTE, AT, 1, AT, AT + 4))

    data, execution = world.disarm(1)[0], world.disarm(2)[0]
    assert list(RECORD.iter_unpack(data.records)) == [
        (9, 2, 48, 0x404, PID, PID + 1, 123, AT, 1, 0),
        (9, 1, 48, 0x404, PID, PID + 1, 123, AT, 1, 0),
    ]
    assert execution.records == RECORD.pack(9, 2, 48, AT, PID, PID + 1, 123, AT, 1, 0), "before the instruction"


@pytest.mark.parametrize(
    ("in_kernel", "user", "kernel", "chain"),
    [
        (False, True, False, [2**64 - 512, 0x404, 7, 8]),
        (False, False, True, []),
        (False, True, True, [2**64 - 512, 0x404, 7, 8]),
        (True, True, False, [2**64 - 512, 7, 8]),
        (True, False, True, [2**64 - 128, 0x404, 9]),
        (True, True, True, [2**64 - 128, 0x404, 9, 2**64 - 512, 7, 8]),
    ],
)
def test_a_call_chain_comes_with_the_hit_where_it_is_asked_for(
    world: World, in_kernel: bool, user: bool, kernel: bool, chain: list[int]
) -> None:
    world.arm(1, PIECE, on(world, PID), Mode(user_chain=user, kernel_chain=kernel, ring_bytes=PAGE))

    world.step(PID, STEP._replace(in_kernel=in_kernel, callers=(7, 8), kernel_callers=(9,)))

    records = world.disarm(1)[0].records
    words = [int.from_bytes(records[at : at + 8], "little") for at in range(48, len(records), 8)]
    assert words == [len(chain), *chain]
    assert RECORD.unpack_from(records)[2] == len(records)


# --- rings and fuses -------------------------------------------------------------------------------------------------


@given(st.sampled_from([1, 2, 4]), st.lists(st.integers(0, 400), max_size=5))
def test_a_ring_loses_exactly_what_it_has_no_room_for(pages: int, bursts: list[int]) -> None:
    world = made()
    world.arm(1, PIECE, on(world, PID), Mode(ring_bytes=pages * PAGE))
    room = (pages * PAGE - 1) // RECORD.size
    lost = 0
    for burst in bursts:
        steps(world, PID, burst)
        lost += max(0, burst - room)
        batch = world.armed(1).drain(2**20)
        assert (batch.hits, batch.lost, batch.more) == (min(burst, room), max(0, burst - room), False)
    assert world.disarm(1)[1] == Totals(sum(bursts), lost)


def test_each_cpu_has_a_ring_of_its_own_and_none_is_starved(world: World) -> None:
    world.arm(1, PIECE, Target(), RING)
    steps(world, PID, 50)
    steps(world, PID + 1, 50)

    batch = world.armed(1).drain(20 * RECORD.size)

    assert {record[8] for record in RECORD.iter_unpack(batch.records)} == {0, 1}
    assert (batch.hits, batch.more) == (20, True)
    assert world.disarm(1)[0].hits == 80


@given(st.integers(1, 50), st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 50))
def test_a_fuse_lets_exactly_so_many_hits_through(fuse: int, bursts: list[int], refill: int) -> None:
    world = made()
    world.arm(1, PIECE, on(world, PID), Mode(delivery=Delivery.COUNT, fuse_hits=fuse))
    allowed, seen = fuse, 0
    for burst in bursts:
        steps(world, PID, burst)
        seen = min(allowed, seen + burst)
        assert hits(world, 1) == seen
        in_time = seen < allowed
        assert world.top_up(1, refill) is in_time
        allowed += refill if in_time else 0


def test_each_leg_has_a_fuse_of_its_own_and_one_that_is_blown_is_told(world: World) -> None:
    world.arm(1, PIECE, Target(), Mode(delivery=Delivery.COUNT, fuse_hits=10))

    steps(world, PID, 30)
    steps(world, PID + 1, 5)

    assert hits(world, 1) == 15
    assert not world.top_up(1, 10)


def test_what_threads_are_born_with_has_no_fuse(world: World) -> None:
    world.arm(1, PIECE, Target(process=world.process(PID)), Mode(delivery=Delivery.COUNT, fuse_hits=10))

    steps(world, PID, 30)

    assert not world.armed(1).is_fused
    assert hits(world, 1) == 30


def test_a_slot_that_is_given_up_to_be_armed_again_can_be_stolen(world: World) -> None:
    world.arm(1, PIECE, on(world, PID), Mode(delivery=Delivery.COUNT, fuse_hits=10))
    steps(world, PID, 10)
    world.silence(1)
    world.faults.append(errno.ENOSPC)

    with pytest.raises(ArmError):
        world.rearm(1, 10)

    steps(world, PID, 10)
    for resource_id in range(2, 6):
        world.arm(resource_id, PIECE, on(world, PID), HOLD)
    assert world.disarm(1)[1] == Totals(10)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_a_thread_is_born_with_what_covers_its_process_and_takes_it_along(world: World) -> None:
    # given a process that is covered, and one of its threads that is watched alone
    whole = Target(process=world.process(PID))
    for resource_id in range(3):
        world.arm(resource_id, PIECE, whole, COUNT)
    world.arm(3, PIECE, on(world, PID), COUNT)

    # when a thread is born in it
    world.start_thread(PID, 12)
    steps(world, 12, 5)

    # then the cover is over it too, and takes slots
    assert [hits(world, resource_id) for resource_id in range(4)] == [5, 5, 5, 0]
    world.arm(4, PIECE, on(world, 12), HOLD)
    assert refusal(world, 5, on(world, 12)) == (errno.ENOSPC, None, 12)

    # and when the thread has exited, nothing is left of that but the counts: of its four slots one stays, its own
    world.exit_thread(12)
    assert hits(world, 0) == 5
    assert (world.armed(0).end, world.armed(4).end) == (None, TargetEnd.EXIT)
    world.disarm(3)
    world.arm(6, PIECE, Target(), HOLD)


def test_the_slot_of_a_thread_that_is_gone_counts_until_it_is_given_back(world: World) -> None:
    for resource_id in range(4):
        world.arm(resource_id, PIECE, on(world, OTHER), HOLD)
    world.exit_thread(OTHER)

    assert refusal(world, 9, Target()) == (errno.ENOSPC, 0, None)
    world.disarm(0)
    world.arm(9, PIECE, Target(), HOLD)


def test_the_end_of_a_process_is_told_with_its_last_thread(world: World) -> None:
    world.arm(1, PIECE, Target(process=world.process(PID)), COUNT)
    world.arm(2, PIECE, on(world, PID), COUNT)
    world.news.clear()

    world.exit_thread(PID)
    assert world.news == {2}
    assert (world.armed(1).end, world.armed(2).end) == (None, TargetEnd.EXIT)

    world.exit_thread(PID + 1)
    assert world.armed(1).end is TargetEnd.EXIT
    with pytest.raises(TargetGone, match="20"):
        world.process(PID)


def test_a_number_that_is_used_again_is_another_thread(world: World) -> None:
    earlier = on(world, OTHER)
    world.arm(1, PIECE, earlier, COUNT)
    world.exit_thread(OTHER)
    world.start_process(OTHER, "another")

    steps(world, OTHER, 5)

    assert hits(world, 1) == 0
    assert refusal(world, 2, earlier) == (errno.ESRCH, None, OTHER)


def test_an_exec_ends_what_was_not_to_go_on_and_keeps_its_slot(world: World) -> None:
    world.arm(1, PIECE, on(world, PID), COUNT)
    world.arm(2, PIECE, on(world, PID), Mode(delivery=Delivery.COUNT, across_exec=True))
    world.arm(3, PIECE, on(world, PID + 1), Mode(delivery=Delivery.COUNT, across_exec=True))

    world.exec_process(PID, "another")
    steps(world, PID, 5)

    assert [hits(world, resource_id) for resource_id in (1, 2, 3)] == [0, 5, 0]
    assert [world.armed(one).end for one in (1, 2, 3)] == [TargetEnd.EXEC, None, TargetEnd.EXIT]
    assert world.threads(world.process(PID)) == [PID]
    for resource_id in (4, 5):
        world.arm(resource_id, PIECE, on(world, PID), HOLD)
    assert refusal(world, 6, on(world, PID)) == (errno.ENOSPC, None, PID)


# --- CPUs ------------------------------------------------------------------------------------------------------------


def test_what_is_bound_to_a_cpu_that_goes_is_dead_and_counts_until_it_is_dropped(world: World) -> None:
    # given slots of a CPU, all there are
    for resource_id in range(4):
        world.arm(resource_id, PIECE, Target(cpus=(1,)), COUNT)

    # when the CPU goes, then its tasks run elsewhere and nothing new is armed there
    world.take_cpu_offline(1)
    assert world.cpu_of[world.task(PID + 1)] == 0
    assert refusal(world, 8, Target(cpus=(1,))) == (errno.ENODEV, 1, None)

    # and when it is back, what was bound to it is dead, and has its slots
    world.bring_cpu_online(1)
    world.move(PID + 1, 1)
    steps(world, PID + 1, 5)
    assert hits(world, 0) == 0
    assert refusal(world, 8, Target(cpus=(1,))) == (errno.ENOSPC, 1, None)

    # until it is dropped and taken anew
    world.drop_cpu(0, 1)
    world.add_cpu(0, 1)
    steps(world, PID + 1, 5)
    assert hits(world, 0) == 5


def test_a_cpu_that_is_offline_cannot_be_added(world: World) -> None:
    world.arm(1, PIECE, Target(), COUNT)
    world.take_cpu_offline(1)
    world.drop_cpu(1, 1)

    with pytest.raises(ArmError) as refused:
        world.add_cpu(1, 1)

    assert (refused.value.errno, refused.value.cpu) == (errno.ENODEV, 1)


# --- faults and outsiders --------------------------------------------------------------------------------------------


def test_a_leg_is_refused_on_demand_and_those_before_it_are_given_back(world: World) -> None:
    world.faults.extend([0, errno.EACCES])

    assert refusal(world, 1, Target()) == (errno.EACCES, 1, None)

    for resource_id in range(4):
        world.arm(resource_id, PIECE, Target(), HOLD)


def test_outsiders_slots_count_and_they_are_named_as_far_as_there_is_evidence(world: World) -> None:
    # given slots that outsiders have on a thread and on a CPU
    debugger, unknown = Outsider(900, "debugger", uid=7), Outsider(901, "hidden", evidence=UNATTRIBUTED)
    for _ in range(2):
        world.take_outside(debugger, Pool.ANY, tid=PID)
    world.take_outside(unknown, Pool.ANY, cpu=1)

    # then they are in the way
    world.arm(1, PIECE, on(world, PID), HOLD)
    assert refusal(world, 2, on(world, PID)) == (errno.ENOSPC, None, PID)
    with pytest.raises(ArmError):
        world.take_outside(debugger, Pool.ANY, tid=PID)

    # and a look finds who is, and nobody else
    named = Foreign(900, "debugger", 7, 2, "on tid 10", "perf fd")
    nobody = Foreign(0, "", 0, 1, "cpu-wide on cpu 1", "unattributed")
    assert world.foreign(Pool.ANY, on(world, PID), None) == [named, nobody]
    assert world.foreign(Pool.ANY, on(world, PID), 0) == [named]
    assert world.foreign(Pool.ANY, on(world, OTHER), None) == [nobody]
    assert world.foreign(Pool.ANY, Target(), 1) == [named, nobody]
    assert world.foreign(Pool.ANY, Target(process=world.process(PID)), 0) == [named]
    assert world.foreign(Pool.DATA, Target(), None) == []

    # until they leave
    world.leave_outside(debugger)
    assert world.foreign(Pool.ANY, on(world, PID), 0) == []
    world.arm(2, PIECE, on(world, PID), HOLD)


def test_what_a_tracer_set_stays_when_it_leaves_and_goes_with_the_program(world: World) -> None:
    # given a thread with slots that a tracer has set, and one that a profiler has there
    tracer, profiler = Outsider(900, "debugger", evidence=TRACER), Outsider(901, "profiler")
    for _ in range(2):
        world.take_outside(tracer, Pool.ANY, tid=PID)
    world.take_outside(profiler, Pool.ANY, tid=PID)
    assert Foreign(900, "debugger", 0, 2, "on tid 10", "tracer") in world.foreign(Pool.ANY, on(world, PID), None)

    # when the tracer leaves, then its slots are nobody's, and taken
    world.leave_outside(tracer)
    assert Foreign(0, "", 0, 2, "on tid 10", "unattributed") in world.foreign(Pool.ANY, on(world, PID), None)
    assert world.slots_outside(Pool.ANY, on(world, PID)) == 3
    world.arm(1, PIECE, on(world, PID), HOLD)
    assert refusal(world, 2, on(world, PID)) == (errno.ENOSPC, None, PID)

    # and when the thread runs another program, they are free, and the profiler's is not
    world.exec_process(PID, "another")
    assert world.slots_outside(Pool.ANY, on(world, PID)) == 1
    world.arm(2, PIECE, on(world, PID), HOLD)
    world.arm(3, PIECE, on(world, PID), HOLD)
    assert refusal(world, 4, on(world, PID)) == (errno.ENOSPC, None, PID)


def test_who_attends_to_a_thread_hears_of_its_end_and_who_has_left_off_does_not(world: World) -> None:
    # given two who attend to a thread, and one who does no longer
    for resource_id in (1, 2, 3):
        world.attend(resource_id, on(world, PID))
    world.disarm(3)

    # when it runs another program
    world.exec_process(PID, "another")

    # then both have heard of it
    assert world.news == {1, 2}
    assert [world.armed(resource_id).end for resource_id in (1, 2)] == [TargetEnd.EXEC] * 2
