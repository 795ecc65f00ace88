"""
Whatever is scheduled, armed and disarmed, each CPU's registers hold what belongs to the thread it runs, and no more.

What the registers hold is read out of the words themselves, and what belongs there is worked out anew from what was
asked for, so neither is taken from the simulated machine's own account.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwbpd.core.errors import NotSupported
from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Span, Target, Task
from hwbpd.debug_unit import RegisterFile
from hwbpd.hookspecs import ArmError
from hwbpd_arm.v7_unit import Armv7DebugUnit
from hwbpd_arm.v8_unit import Arm64DebugUnit
from hwbpd_sim.cpus import Cpu, Kind, kind_of
from hwbpd_sim.records import RECORD, Step
from hwbpd_sim.world import World
from hwbpd_x86 import dr7
from hwbpd_x86.debug_unit import X86DebugUnit
from hwbpd_x86.registers import masks_of
from tests import thirdparty
from tests.fakes import FakeBackend
from tests.plugins.sim.machines import PLUGINS, backend_of, kinds

TRIES = settings.get_profile(os.environ.get("HWBPD_HYPOTHESIS", "short")).max_examples
READ, WRITE, EXECUTE = Access.READ, Access.WRITE, Access.EXECUTE
AT, CODE, LOOP = 0x1_0000, 0x2_0000, 0x3_0000
BLOCKS = range(AT, AT + 32, 8)  # of data, disjoint
RING = 4096

PROFILES = [
    "x86-64x2",
    "i686x2",
    "bulldozer+x86-64",
    "cortex-a15+cortex-a7x2",
    "cortex-a5+cortex-a15",
    "cortex-a72x2",
    "arm64-min+arm64-max",
]


# --- what is asked for, and what should come of it -------------------------------------------------------------------


class Wish(NamedTuple):
    """A resource to be armed."""

    whose: str  # "cpus", "process" or the number of a thread
    cpus: tuple[int, ...] | None
    piece: Piece
    mode: Mode


class Expected(NamedTuple):
    """A resource that is armed, as this test keeps it: who is entitled, on which CPUs, and whether it may trap."""

    wish: Wish
    tasks: frozenset[Task] | None  # None: whoever runs
    cpus: frozenset[int] | None  # where it is not dead; None: anywhere
    places: frozenset[int] | None  # where it was armed at first


def words(kind: Kind, file: RegisterFile) -> Counter[tuple[object, ...]]:
    """The armed slots, each as what its registers hold, and not by its number."""
    unit = kind.unit
    if isinstance(unit, X86DebugUnit):
        slots = zip(dr7.decode(file["DR7"]).slots, masks_of(file), strict=True)
        return Counter(
            (slot.access, slot.length, mask, file[f"DR{n}"]) for n, (slot, mask) in enumerate(slots) if slot.armed
        )
    assert isinstance(unit, Arm64DebugUnit | Armv7DebugUnit)
    pairs = [*((pair, "B") for pair in unit.breakpoints), *((pair, "W") for pair in unit.watchpoints)]
    return Counter((sort, file[pair.address], file[pair.control]) for pair, sort in pairs if file[pair.control] & 1)


def words_of(kind: Kind, piece: Piece) -> Counter[tuple[object, ...]]:
    """The same for one piece alone, armed on a CPU that was just reset."""
    file = kind.unit.reset()
    for write in kind.unit.plan(file, {(piece.pool, 0): kind.handling.armed(piece)}):
        file = kind.unit.write(file, write.register, write.value)
    return words(kind, file)


class Judge:
    """What should be in the registers, and how often each resource should have been hit."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.running: dict[int, Task] = {}  # by CPU
        self.armed: dict[int, Expected] = {}
        self.left: dict[tuple[int, int], int] = {}  # of fuses, by resource and CPU (-1: a thread's)
        self.silent: set[int] = set()
        self.hits: Counter[int] = Counter()

    def traps(self, resource_id: int, cpu: int) -> bool:
        """Whether a resource should be armed on a CPU, for the thread that runs there."""
        expected = self.armed[resource_id]
        task = self.running.get(cpu)
        if expected.wish.mode.delivery is Delivery.HOLD or resource_id in self.silent:
            return False
        if expected.tasks is not None and (task is None or task not in expected.tasks):
            return False
        return (expected.cpus is None or cpu in expected.cpus) and self.left.get(self.fuse(resource_id, cpu), 1) > 0

    def fuse(self, resource_id: int, cpu: int) -> tuple[int, int]:
        return resource_id, cpu if self.armed[resource_id].cpus is not None else -1

    def stepped(self, task: Task, cpu: int, step: Step) -> None:
        self.running = {where: other for where, other in self.running.items() if other != task} | {cpu: task}
        for resource_id, expected in self.armed.items():
            if not self.traps(resource_id, cpu) or not is_touched(expected.wish, step):
                continue
            # On Arm a slot at a user address is not for the kernel's accesses.
            if step.in_kernel and self.world.cpus[cpu].kind.facts.architecture.startswith(("arm", "aarch")):
                continue
            if not (expected.wish.mode.kernel if step.in_kernel else expected.wish.mode.user):
                continue
            self.hits[resource_id] += 1
            key = self.fuse(resource_id, cpu)
            if key in self.left:
                self.left[key] -= 1

    def check(self) -> None:
        for number, cpu in enumerate(self.world.cpus):
            assert cpu.running == self.running.get(number)
            due: Counter[tuple[object, ...]] = Counter()
            for resource_id, expected in self.armed.items():
                if self.traps(resource_id, number):
                    due += words_of(cpu.kind, expected.wish.piece)
            assert words(cpu.kind, cpu.file) == due, f"cpu {number}"
        assert {one: self.world.armed(one).hits for one in self.armed} == {one: self.hits[one] for one in self.armed}


def is_touched(wish: Wish, step: Step) -> bool:
    span = wish.piece.span
    if step.access is EXECUTE:
        return wish.piece.access is EXECUTE and step.address == span.address
    bytes_ = range(max(step.address, span.address), min(step.address + step.length_bytes, end_of(span)))
    return bool(wish.piece.access & step.access) and len(bytes_) > 0


def end_of(span: Span) -> int:
    return span.address + span.length_bytes


# --- what happens ----------------------------------------------------------------------------------------------------


TIDS = (10, 11, 20)
wishes = st.tuples(
    st.sampled_from(["cpus", "process", "10", "11", "20"]),
    st.sampled_from([None, (0,), (1,), (0, 1)]),
    st.sampled_from([*BLOCKS, CODE, CODE + 8]),
    st.builds(
        Mode,
        st.booleans(),
        st.booleans(),
        st.sampled_from(list(Delivery)),
        ring_bytes=st.just(RING),
        fuse_hits=st.sampled_from([0, 0, 1, 3]),
    ),
)
# Each data access lies in one block, for on Arm one that touches two is told of one only.
touches = st.one_of(
    st.builds(
        lambda block, access, kernel: Step(access, block, 8, LOOP + 8, LOOP + 12, kernel),
        st.sampled_from(BLOCKS),
        st.sampled_from([READ, WRITE, READ | WRITE]),
        st.booleans(),
    ),
    st.builds(lambda at: Step(EXECUTE, at, 4, at, at + 4), st.sampled_from([CODE, CODE + 8])),
)
happenings = st.one_of(
    st.tuples(st.just("arm"), wishes),
    st.tuples(st.just("step"), st.tuples(st.sampled_from(TIDS), touches)),
    st.tuples(st.just("step"), st.tuples(st.sampled_from(TIDS), touches)),
    st.tuples(st.just("step"), st.tuples(st.sampled_from(TIDS), touches)),
    st.tuples(st.just("move"), st.tuples(st.sampled_from(TIDS), st.integers(0, 1))),
    st.tuples(st.sampled_from(["disarm", "silence", "rearm"]), st.integers(0, 7)),
    st.tuples(st.just("exit"), st.sampled_from(TIDS)),
    st.tuples(st.just("exec"), st.sampled_from((10, 20))),
    st.tuples(st.just("clone"), st.just(10)),
    st.tuples(st.just("cpu"), st.just(1)),
)


def piece_for(world: World, address: int) -> Piece:
    """What a backend makes of a block, or of the instruction there: for all CPUs of the machine."""
    backend = backend_of(world.cpus[0].kind)
    told = backend.describe()
    access = EXECUTE if address >= CODE else READ | WRITE
    length = told["default_lengths"]["x"] if access is EXECUTE else max(n for n in told["lengths"]["rw"] if n <= 8)
    (piece,) = backend.fit(Span(address, length), access, Mode()).pieces
    return piece


class History:
    """A world, and the judge of it; each happening is told to both."""

    def __init__(self, profile: str) -> None:
        self.world = world = World(kinds(profile))
        world.start_process(10, "ten", 0)
        world.start_thread(10, 11, 1)
        world.start_process(20, "twenty", 0)
        self.judge = Judge(world)
        self.next_id = 0

    def alive(self, tid: int) -> bool:
        return self.world.is_alive(tid)

    def chosen(self, nth: int) -> int | None:
        ids = sorted(self.judge.armed)
        return ids[nth % len(ids)] if ids else None

    def arm(self, drawn: tuple[str, tuple[int, ...] | None, int, Mode]) -> None:
        whose, cpus, address, mode = drawn
        if whose not in ("cpus", "process") and not self.alive(int(whose)):
            return
        if whose == "process":
            if not self.alive(10):
                return
            process = self.world.process(10)
            tasks = frozenset(map(self.world.task, self.world.threads(process)))
            target, places = Target(process=process), None
        elif whose == "cpus":
            target, tasks = Target(cpus=cpus), None
            places = frozenset(self.world.online if cpus is None else cpus)
        else:
            task = self.world.task(int(whose))
            target, tasks = Target(task, cpus), frozenset({task})
            places = None if cpus is None else frozenset(cpus)
        wish = Wish(whose, cpus, piece_for(self.world, address), mode)
        resource_id, self.next_id = self.next_id, self.next_id + 1
        try:
            self.world.arm(resource_id, wish.piece, target, mode)
        except ArmError as refused:
            is_armv7 = self.world.cpus[0].kind.facts.architecture == "armv7l"
            if refused.errno in (errno.ENOSPC, errno.ENODEV) or (is_armv7 and whose == "cpus"):
                return
            raise
        self.judge.armed[resource_id] = Expected(wish, tasks, places, places)
        self.put_fuses(resource_id)

    def put_fuses(self, resource_id: int) -> bool:
        """Put new ones where a resource is fused; return whether it is."""
        expected = self.judge.armed[resource_id]
        mode = expected.wish.mode
        if not mode.fuse_hits or mode.delivery is Delivery.HOLD or expected.wish.whose == "process":
            return False
        for place in (-1,) if expected.places is None else expected.places:
            self.judge.left[resource_id, place] = mode.fuse_hits
        return True

    def step(self, drawn: tuple[int, Step]) -> None:
        tid, step = drawn
        if not self.alive(tid):
            return
        for one in (step, Step(EXECUTE, LOOP, 4, LOOP, LOOP + 4)):  # elsewhere, so that no step past a hit lasts
            task = self.world.task(tid)
            self.world.step(tid, one)
            self.judge.stepped(task, self.world.cpu_of[task], one)

    def move(self, drawn: tuple[int, int]) -> None:
        tid, cpu = drawn
        if self.alive(tid) and cpu in self.world.online:
            task = self.world.task(tid)
            if self.world.cpu_of[task] != cpu:
                self.leave(task)
            self.world.move(tid, cpu)

    def leave(self, task: Task) -> None:
        self.judge.running = {cpu: other for cpu, other in self.judge.running.items() if other != task}

    def disarm(self, nth: int) -> None:
        if (resource_id := self.chosen(nth)) is not None:
            self.world.disarm(resource_id)
            del self.judge.armed[resource_id]

    def silence(self, nth: int) -> None:
        if (resource_id := self.chosen(nth)) is not None:
            self.world.silence(resource_id)
            self.judge.silent.add(resource_id)

    def rearm(self, nth: int) -> None:
        resource_id = self.chosen(nth)
        if resource_id is None:
            return
        expected = self.judge.armed[resource_id]
        mode = expected.wish.mode
        try:
            self.world.rearm(resource_id, mode.fuse_hits)
        except ArmError as refused:  # whoever it was for is gone, and so are its slots
            if refused.errno not in (errno.ESRCH, errno.ENODEV):
                raise
            self.disarm(nth)
            return
        self.judge.silent.discard(resource_id)
        if self.put_fuses(resource_id):  # in new slots, which are not dead
            self.judge.armed[resource_id] = expected._replace(cpus=expected.places)

    def exit(self, tid: int) -> None:
        if self.alive(tid):
            task = self.world.task(tid)
            self.leave(task)
            self.world.exit_thread(tid)
            self.gone({task})

    def exec(self, pid: int) -> None:
        if not self.alive(pid):
            return
        first = self.world.task(pid)
        others = {self.world.task(tid) for tid in self.world.threads(self.world.process(pid)) if tid != pid}
        for task in others:
            self.leave(task)
        self.world.exec_process(pid, "another")
        self.gone({first, *others})

    def gone(self, tasks: set[Task]) -> None:
        """Nothing traps for them any more: no mode here goes on across an exec."""
        for resource_id, expected in self.judge.armed.items():
            if expected.tasks is not None:
                self.judge.armed[resource_id] = expected._replace(tasks=expected.tasks - tasks)

    def clone(self, pid: int) -> None:
        if not self.alive(pid):
            return
        parent = self.world.task(pid)
        tid = next(tid for tid in range(12, 99) if not self.alive(tid) and tid != 20)
        born = self.world.start_thread(pid, tid, self.world.online[0])
        first = self.world.task(self.world.threads(self.world.process(pid))[0])
        assert first == parent
        for resource_id, expected in self.judge.armed.items():
            if expected.wish.whose == "process" and expected.tasks is not None and parent in expected.tasks:
                self.judge.armed[resource_id] = expected._replace(tasks=expected.tasks | {born})
        self.step((tid, Step(EXECUTE, LOOP, 4, LOOP, LOOP + 4)))

    def cpu(self, number: int) -> None:
        """Take a CPU away, or bring it back."""
        if number not in self.world.online:
            self.world.bring_cpu_online(number)
            return
        self.world.take_cpu_offline(number)
        self.judge.running.pop(number, None)
        for resource_id, expected in self.judge.armed.items():
            if expected.tasks is None and expected.cpus is not None:
                self.judge.armed[resource_id] = expected._replace(cpus=expected.cpus - {number})


@pytest.mark.parametrize("profile", PROFILES)
def test_registers_hold_what_runs_there_and_hits_go_to_those_entitled(profile: str) -> None:
    @settings(max_examples=TRIES // 2)
    @given(st.integers(0, 40).flatmap(lambda length: st.lists(happenings, min_size=length, max_size=length)))
    def holds(story: list[tuple[str, object]]) -> None:
        history = History(profile)
        for what, how in story:
            getattr(history, what)(how)
            history.judge.check()
        for resource_id in sorted(history.judge.armed):
            history.world.disarm(resource_id)
            del history.judge.armed[resource_id]
        history.judge.check()

    holds()


# --- a few on purpose ------------------------------------------------------------------------------------------------


def test_a_leg_keeps_its_slot_while_it_is_armed_and_the_lowest_free_one_is_taken() -> None:
    # given three slots of a thread that runs
    world = World(kinds("x86-64"))
    world.start_process(10, "ten")
    world.step(10, Step(EXECUTE, LOOP, 1, LOOP, LOOP + 4))
    for resource_id in range(3):
        world.arm(resource_id, piece_for(world, BLOCKS[resource_id]), Target(world.task(10)), Mode(ring_bytes=RING))
    assert addresses_in(world.cpus[0]) == [*BLOCKS[:3]]

    # when the first is given back and another is taken, then that one has its register and the others stay
    world.disarm(0)
    world.arm(3, piece_for(world, BLOCKS[3]), Target(world.task(10)), Mode(ring_bytes=RING))
    assert addresses_in(world.cpus[0]) == [BLOCKS[3], BLOCKS[1], BLOCKS[2]]

    # and after its thread was away they are in the order in which they were made
    world.start_process(20, "twenty")
    world.step(20, Step(EXECUTE, LOOP, 1, LOOP, LOOP + 4))
    assert addresses_in(world.cpus[0]) == []
    world.step(10, Step(EXECUTE, LOOP, 1, LOOP, LOOP + 4))
    assert addresses_in(world.cpus[0]) == [BLOCKS[1], BLOCKS[2], BLOCKS[3]]


def addresses_in(cpu: Cpu) -> list[int]:
    armed = dr7.decode(cpu.file["DR7"]).slots
    return [cpu.file[f"DR{n}"] for n, slot in enumerate(armed) if slot.armed]


def test_a_cpu_that_comes_back_has_lost_its_registers() -> None:
    world = World(kinds("cortex-a72x2"))
    world.arm(1, piece_for(world, AT), Target(cpus=(1,)), Mode(ring_bytes=RING))
    assert words(world.cpus[1].kind, world.cpus[1].file)

    world.take_cpu_offline(1)
    world.bring_cpu_online(1)

    assert world.cpus[1].file == world.cpus[1].kind.unit.reset()


@pytest.mark.parametrize("meanwhile", ["another thread runs", "another slot is armed", "it is silenced for a while"])
def test_a_step_past_a_hit_on_armv7_outlasts_what_happens_to_the_registers_meanwhile(meanwhile: str) -> None:
    # given a thread that has hit its watchpoint, which is off until the next instruction elsewhere
    world = World(kinds("cortex-a15"))
    world.start_process(10, "ten")
    world.start_process(20, "twenty")
    store, loop = Step(WRITE, AT, 8, CODE, CODE + 4), Step(EXECUTE, LOOP, 4, LOOP, LOOP + 4)
    target = Target(world.task(10))
    world.arm(1, piece_for(world, AT), target, Mode(delivery=Delivery.COUNT))
    world.step(10, store)
    assert [slot for slot, _ in world.cpus[0].stepping] == [(Pool.DATA, 0)]

    # when the registers become others
    if meanwhile == "another thread runs":
        world.step(20, loop)
        assert not words(world.cpus[0].kind, world.cpus[0].file)
    elif meanwhile == "another slot is armed":
        world.arm(2, piece_for(world, AT + 8), target, Mode(delivery=Delivery.COUNT))
    else:
        world.silence(1)
        assert not words(world.cpus[0].kind, world.cpus[0].file)
        world.rearm(1, 0)

    # then it is off at that instruction still, and on again after the next one
    world.step(10, store)
    assert world.armed(1).hits == 1
    world.step(10, loop)
    assert not world.cpus[0].stepping
    world.step(10, store)
    assert world.armed(1).hits == 2


@pytest.mark.parametrize(
    ("profile", "hits", "ip"), [("x86-64", 2, CODE + 4), ("cortex-a72", 1, CODE), ("cortex-a15", 2, CODE)]
)
def test_an_access_to_two_slots_is_reported_as_linux_does_it_there(profile: str, hits: int, ip: int) -> None:
    # given two words side by side, each in a slot of a thread's
    world = World(kinds(profile))
    world.start_process(10, "ten")
    for resource_id in range(2):
        world.arm(resource_id, piece_for(world, BLOCKS[resource_id]), Target(world.task(10)), Mode(ring_bytes=RING))

    # when one instruction writes to both
    world.step(10, Step(WRITE, AT, 16, CODE, CODE + 4))

    # then both are told, or only the one at the reported address; and where the thread was then
    batches = [world.disarm(resource_id)[0] for resource_id in range(2)]
    assert sum(batch.hits for batch in batches) == hits
    assert {RECORD.unpack_from(batch.records)[3] for batch in batches if batch.hits} == {ip}


@pytest.mark.parametrize(
    ("profile", "address", "is_wide", "refusal"),
    [
        ("cortex-a15", AT, True, errno.EINVAL),
        ("cortex-a72", AT, True, 0),
        ("cortex-a72", 0xFFFF_0000_0000_0000, False, errno.EINVAL),
        ("cortex-a72", 0xFFFF_0000_0000_0000, True, 0),
        ("x86-64", 0xFFFF_8000_0000_0000, False, 0),
    ],
)
def test_the_kernel_refuses_what_its_architecture_cannot_take(
    profile: str, address: int, is_wide: bool, refusal: int
) -> None:
    world = World(kinds(profile))
    world.start_process(10, "ten")
    piece = msgspec.structs.replace(piece_for(world, AT), span=Span(address, 8))
    target = Target() if is_wide else Target(world.task(10))

    refused = 0
    try:
        world.arm(1, piece, target, Mode(delivery=Delivery.COUNT))
    except ArmError as why:
        refused = why.errno

    assert refused == refusal


def test_a_backend_without_a_model_of_its_registers_is_told_so() -> None:
    backend = FakeBackend({next(iter(backend_of(kinds("x86-64")[0]).slots())): 4}, 8)

    with pytest.raises(NotSupported, match="fake has no model of its registers"):
        kind_of(PLUGINS.profiles["x86-64"], backend)


def test_a_backend_from_elsewhere_is_simulated_like_ours() -> None:
    # given CPUs of somebody else's architecture, and a slot on a thread there
    with thirdparty.installed():
        plugins = type(PLUGINS)()
    facts = plugins.profiles["pdq1"]
    backend = plugins.backend(facts)
    world = World([kind_of(facts, backend)] * 2)
    world.start_process(10, "ten")
    (piece,) = backend.fit(Span(AT, 8), WRITE, Mode()).pieces
    world.arm(1, piece, Target(world.task(10)), Mode(delivery=Delivery.COUNT))

    # when the thread writes there, and beside it
    for address in (AT, AT + 8, AT + 4):
        world.step(10, Step(WRITE, address, 4, CODE, CODE + 4))

    # then that is told
    assert world.armed(1).hits == 2
