"""
What every backend, every machine and every debug unit keeps, as ``hwbpd/hookspecs.py`` and ``hwbpd/debug_unit.py`` say
it; run on each plugin that is found, and on those that are in tests/thirdparty.

A new plugin is tried here without a line of its own, but for a machine's world: what makes its breakpoints fire.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import NamedTuple, Protocol

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from examples.target import Target as Program
from hwbpd.core.errors import BadClaim, NotSupported, TargetGone
from hwbpd.core.model import Access, Delivery, Mode, Piece, Plan, Pool, Span, Target, Totals
from hwbpd.debug_unit import Armed, DebugUnit, Handling, MemoryAccess, RegisterFile
from hwbpd.hookspecs import ArmError, Backend, BackendFactory, Batch, CpuFacts, Machine, TargetEnd
from hwbpd.plugins import Plugins
from hwbpd_sim.cpus import kind_of
from hwbpd_sim.machine import SimMachine
from hwbpd_sim.outsiders import TRACER, Outsider
from hwbpd_sim.profiles import parse
from hwbpd_sim.records import Step
from hwbpd_sim.world import World as SimulatedWorld
from tests import thirdparty
from tests.fakes import RECORD, FakeBackend, FakeMachine
from tests.hardware.tracer import TRACES, Tracer
from tests.host import HostBusy, exclusive

with thirdparty.installed():
    PLUGINS = Plugins()
WAIT_S = 30
RING = Mode(ring_bytes=64 * mmap.PAGESIZE)
SMALL_RING = Mode(ring_bytes=mmap.PAGESIZE)
COUNT = Mode(delivery=Delivery.COUNT)
HOLD = Mode(delivery=Delivery.HOLD)
WRITE = Access.WRITE


# --- backends --------------------------------------------------------------------------------------------------------


FACTORIES: dict[str, BackendFactory] = {
    "fake": BackendFactory("fake", frozenset({"fake"}), lambda _: FakeBackend({Pool.INST: 2, Pool.DATA: 4}, 8)),
    **PLUGINS.backends,
}


def backends() -> Mapping[str, Backend]:
    """The backend of each architecture, for CPUs with and without what came later; of those alike, the first."""
    named: dict[str, Backend] = {}
    seen = []
    for name, factory in FACTORIES.items():
        for architecture in sorted(factory.architectures):
            for features in (frozenset[str](), frozenset({"bpext", "la57"})):
                backend = factory.make(CpuFacts(architecture, features))
                told = (backend.name, backend.slots(), backend.describe())
                if told not in seen:
                    seen.append(told)
                    named[f"{name} on {architecture}{'+' * bool(features)}"] = backend
    return named


BACKENDS = [pytest.param(backend, id=name) for name, backend in backends().items()]

accesses = st.sampled_from(range(8)).map(Access)
edges = [2**n + d for n in (12, 32, 47, 63) for d in (-8, 0, 8)]
addresses = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from(edges))
lengths = st.one_of(st.integers(1, 2**32), st.sampled_from([2**n for n in range(33)]))
modes = st.sampled_from([Mode(), Mode(user=False), Mode(kernel=False), Mode(over_report=True), COUNT, HOLD])


def covers(plan: Plan, span: Span) -> bool:
    """Whether each byte of the span lies in a piece; pieces are few."""
    at = span.address
    for piece in sorted(plan.pieces, key=lambda piece: piece.span.address):
        if piece.span.address <= at:
            at = max(at, piece.span.address + piece.span.length_bytes)
    return at >= span.address + span.length_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_says_how_many_slots_there_are(backend: Backend) -> None:
    assert isinstance(backend, Backend)
    assert backend.name
    assert backend.slots()
    assert all(isinstance(pool, Pool) and count >= 1 for pool, count in backend.slots().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_fits_any_span_or_says_why_not(backend: Backend) -> None:
    @given(addresses, lengths, accesses, modes)
    def fits_or_refuses(address: int, length: int, access: Access, mode: Mode) -> None:
        span = Span(address, length % 2**12 + 1 if backend.name == "fake" else length)
        try:
            plan = backend.fit(span, access, mode)
        except (BadClaim, NotSupported) as why:
            refusal = str(why)
        else:
            refusal = ""
        if refusal:
            assert f"{address:#x}" in refusal, "it says what was asked for"
            return
        assert plan == backend.fit(span, access, mode), "the same answer to the same question"
        assert plan.pieces
        assert covers(plan, span)
        if not mode.over_report:
            held = sum(piece.span.length_bytes for piece in plan.pieces)
            assert held == span.length_bytes, "what was asked for, and nothing beside it"
        for piece in plan.pieces:
            assert piece.pool in backend.slots()
            assert piece.access == access
            assert piece.span.length_bytes >= 1

    fits_or_refuses()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_backend_describes_is_what_it_fits(backend: Backend) -> None:
    told = backend.describe()

    assert {"lengths", "default_lengths", "reports", "notes"} <= told.keys()
    assert all(isinstance(note, str) for note in told["notes"])
    assert told["lengths"].keys() == told["default_lengths"].keys() == told["reports"].keys()
    for letters, of_letters in told["lengths"].items():
        assert list(of_letters) == sorted(set(of_letters))
        assert told["default_lengths"][letters] in of_letters
        assert told["reports"][letters] in ("before", "after")
        for length in of_letters:
            span = Span(0, length)
            access = Access.from_letters(letters)
            plan = backend.fit(span, access, Mode())
            assert [(piece.span, piece.access) for piece in plan.pieces] == [(span, access)], "one slot holds it"


# --- debug units -----------------------------------------------------------------------------------------------------

Slots = Mapping[tuple[Pool, int], Armed]

READ_WRITE = Access.READ | Access.WRITE
BASE = 0x40_0000  # where pieces are
LENGTH_MAX = 64  # of these, so that they come to lie beside and upon each other,
NEAR = 16  # or where every access is tried
EVERY_ACCESS = [
    MemoryAccess(kind, BASE + offset, 1, kernel=kernel)
    for kind in (Access.READ, Access.WRITE, Access.EXECUTE)
    for offset in range(-2, NEAR + 2)
    for kernel in (False, True)
]
TRIES = settings.get_profile(os.environ.get("HWBPD_HYPOTHESIS", "short")).max_examples
EXAMPLES = settings(max_examples=TRIES // 10)  # there are many CPUs


class Modelled(NamedTuple):
    """A CPU whose registers are modelled."""

    backend: Backend
    unit: DebugUnit


def modelled() -> Mapping[str, Modelled]:
    """The CPUs that have a name, and architectures of whose CPUs none has one; of CPUs that are alike, the first."""
    cpus: dict[str, Modelled] = {}
    seen = []
    for factory in FACTORIES.values():
        unnamed = {name: CpuFacts(name) for name in sorted(factory.architectures)}
        for name, facts in (factory.profiles or unnamed).items():
            backend = factory.make(facts)
            unit = backend.debug_unit()
            told = (type(unit), backend.slots(), backend.describe())
            if unit is not None and told not in seen:
                seen.append(told)
                cpus[name] = Modelled(backend, unit)
    return cpus


UNITS = [pytest.param(cpu, id=name) for name, cpu in modelled().items()]


def pieces(backend: Backend, within: int) -> Mapping[Pool, list[Piece]]:
    """What one slot of each pool can hold, within so many bytes."""
    of_pool: dict[Pool, list[Piece]] = {pool: [] for pool in backend.slots()}
    for letters, lengths in backend.describe()["lengths"].items():
        for length in (length for length in lengths if length <= within):
            for offset in range(0, within, length):
                with suppress(BadClaim, NotSupported):
                    plan = backend.fit(Span(BASE + offset, length), Access.from_letters(letters), Mode())
                    for piece in plan.pieces:
                        of_pool[piece.pool].append(piece)
    return of_pool


def armable(backend: Backend, within: int) -> Mapping[tuple[Pool, int], list[Armed]]:
    """Every slot with what it can be armed with, for somebody or for everybody, within so many bytes."""
    levels = [(True, True), (True, False), (False, True)]
    return {
        (pool, number): [Armed(piece, *whose) for piece in of_pool for whose in levels]
        for pool, of_pool in pieces(backend, within).items()
        for number in range(backend.slots()[pool])
    }


def wanted(backend: Backend, most: int = 4) -> st.SearchStrategy[Slots]:
    """Some slots, and what they are to hold."""
    there_are = [(slot, armed) for slot, of_slot in armable(backend, LENGTH_MAX).items() for armed in of_slot]
    return st.lists(st.sampled_from(there_are), max_size=most).map(dict)


def changes(backend: Backend) -> st.SearchStrategy[tuple[Slots, Slots]]:
    """What two slots hold, and what they are to hold, close together; one of them may stay as it is."""
    of_slots = armable(backend, NEAR)
    moved = st.sampled_from(sorted(of_slots)).flatmap(
        lambda slot: st.tuples(st.just(slot), *2 * [st.sampled_from([*of_slots[slot], None])])
    )
    kept = st.sampled_from(sorted(of_slots)).flatmap(
        lambda slot: st.sampled_from(of_slots[slot]).map(lambda armed: (slot, armed, armed))
    )
    return st.tuples(kept | moved, moved).map(
        lambda drawn: (
            {slot: old for slot, old, _ in drawn if old is not None},
            {slot: new for slot, _, new in drawn if new is not None},
        )
    )


@st.composite
def probes(draw: st.DrawFn) -> MemoryAccess:
    """An access somewhere near the pieces."""
    kind = draw(st.sampled_from([Access.READ, Access.WRITE, READ_WRITE, Access.EXECUTE]))
    length = 2 if kind == Access.EXECUTE else draw(st.sampled_from([1, 2, 4, 8]))
    step = draw(st.sampled_from([1, 4, 8]))
    offset = draw(st.integers(-8 // step, LENGTH_MAX // step)) * step
    return MemoryAccess(kind, BASE + offset, length, kernel=draw(st.booleans()))


def carried_out(unit: DebugUnit, file: RegisterFile, slots: Slots) -> RegisterFile:
    """The registers after the plan that leads to ``slots``."""
    for write in unit.plan(file, slots):
        file = unit.write(file, write.register, write.value)
    return file


def trapping(unit: DebugUnit, file: RegisterFile, access: MemoryAccess) -> set[tuple[Pool, int]]:
    """The slots that an instruction with this one access traps at."""
    trap = unit.check(file, [access])
    assert trap is None or trap.slots, "a trap by no slot"
    return set() if trap is None else set(trap.slots)


def is_met(piece: Piece, access: MemoryAccess, *, surely: bool) -> bool:
    """
    Whether a piece is met, whoever makes the access.

    :param surely: of a breakpoint only its very address; not what else of its length hardware may compare.
    """
    first, end = piece.span.address, piece.span.address + piece.span.length_bytes
    if Access.EXECUTE in access.access:
        start = access.address
        return piece.access == Access.EXECUTE and (start == first if surely else first <= start < end)
    return bool(piece.access & access.access) and access.address < end and access.address + access.length_bytes > first


def check_armed(unit: DebugUnit, file: RegisterFile, slots: Slots, access: MemoryAccess) -> None:
    """Exactly those slots trap that are to; whose accesses count is not in the registers of every architecture."""
    met = trapping(unit, file, access)
    counts = {slot for slot, armed in slots.items() if (armed.kernel if access.kernel else armed.user)}
    assert met >= {slot for slot in counts if is_met(slots[slot].piece, access, surely=True)}
    assert met <= {slot for slot, armed in slots.items() if is_met(armed.piece, access, surely=False)}


@pytest.mark.parametrize("cpu", UNITS)
def test_a_debug_unit_has_the_slots_of_its_backend_and_a_reset_arms_none(cpu: Modelled) -> None:
    assert isinstance(cpu.unit, DebugUnit)
    assert cpu.unit.slots() == cpu.backend.slots()

    @EXAMPLES
    @given(probes())
    def nothing_traps(access: MemoryAccess) -> None:
        for file in (cpu.unit.reset(), carried_out(cpu.unit, cpu.unit.reset(), {})):
            assert cpu.unit.check(file, [access]) is None

    nothing_traps()


@pytest.mark.parametrize("cpu", UNITS)
def test_an_access_to_an_armed_piece_traps_exactly_that_slot_before_or_after_as_described(cpu: Modelled) -> None:
    reports = cpu.backend.describe()["reports"]

    @EXAMPLES
    @given(wanted(cpu.backend, most=1))
    def traps(slots: Slots) -> None:
        file = carried_out(cpu.unit, cpu.unit.reset(), slots)
        for slot, armed in slots.items():
            span, access = armed.piece.span, armed.piece.access
            for byte in (0, span.length_bytes - 1) if access != Access.EXECUTE else (0,):
                asked = MemoryAccess(access, span.address + byte, 1, kernel=not armed.user)
                trap = cpu.unit.check(file, [asked])
                assert trap is not None
                assert trap.slots == (slot,)
                assert trap.before == (reports[access.letters] == "before")
                assert trap.status, "an exception says something of itself"
            for beside in (span.address - 1, span.address + span.length_bytes):
                assert cpu.unit.check(file, [MemoryAccess(READ_WRITE, beside, 1)]) is None

    traps()


@pytest.mark.parametrize("cpu", UNITS)
def test_a_plan_arms_exactly_what_is_wanted_and_then_there_is_nothing_left_to_write(cpu: Modelled) -> None:
    @EXAMPLES
    @given(wanted(cpu.backend), wanted(cpu.backend), st.lists(probes(), min_size=8, max_size=8))
    def leads_there(first: Slots, second: Slots, accesses: list[MemoryAccess]) -> None:
        file = cpu.unit.reset()
        for slots in (first, second, {}):
            file = carried_out(cpu.unit, file, slots)
            for access in accesses:
                check_armed(cpu.unit, file, slots, access)
            assert not cpu.unit.plan(file, slots)

    leads_there()


@pytest.mark.parametrize("cpu", UNITS)
def test_on_the_way_a_slot_is_what_it_was_or_what_it_is_to_be_or_disarmed(cpu: Modelled) -> None:
    @EXAMPLES
    @given(changes(cpu.backend))
    def goes(slots: tuple[Slots, Slots]) -> None:
        # given the registers for some slots, and what they are to be
        old, new = slots
        file = carried_out(cpu.unit, cpu.unit.reset(), old)
        other = carried_out(cpu.unit, cpu.unit.reset(), new)
        before = [trapping(cpu.unit, file, access) for access in EVERY_ACCESS]
        after = [trapping(cpu.unit, other, access) for access in EVERY_ACCESS]
        staying = {slot for slot, armed in old.items() if new.get(slot) == armed}

        # when one register is written after another
        for write in cpu.unit.plan(file, new):
            file = cpu.unit.write(file, write.register, write.value)

            # then nothing traps that neither did before nor will afterwards, and what stays always does
            for access, was, will in zip(EVERY_ACCESS, before, after, strict=True):
                now = trapping(cpu.unit, file, access)
                assert now <= was | will, f"{write} leaves a slot half armed"
                assert now >= was & will & staying, f"{write} disarms what was to stay"
        assert [trapping(cpu.unit, file, access) for access in EVERY_ACCESS] == after

    goes()


@pytest.mark.parametrize("cpu", UNITS)
def test_a_plan_leads_out_of_whatever_the_registers_hold(cpu: Modelled) -> None:
    @EXAMPLES
    @given(st.data(), wanted(cpu.backend), st.lists(probes(), min_size=8, max_size=8))
    def leads_out(data: st.DataObject, slots: Slots, accesses: list[MemoryAccess]) -> None:
        # given registers that somebody has left as they are
        file = cpu.unit.reset()
        words = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(file), max_size=len(file)))
        for register, word in zip(sorted(file), words, strict=True):
            with suppress(ValueError):  # what cannot be written stays as it is
                file = cpu.unit.write(file, register, word)

        # when a plan is carried out, where that guards its registers no longer
        try:
            file = carried_out(cpu.unit, file, slots)
        except ValueError:
            reject()

        # then what is wanted is armed, and nothing else
        for access in accesses:
            check_armed(cpu.unit, file, slots, access)
        assert not cpu.unit.plan(file, slots)

    leads_out()


@pytest.mark.parametrize("cpu", UNITS)
def test_a_register_holds_what_it_reads_as_and_a_file_does_not_change(cpu: Modelled) -> None:
    registers = sorted(cpu.unit.reset())

    @EXAMPLES
    @given(st.sampled_from(registers), st.integers(0, 2**32 - 1), wanted(cpu.backend))
    def holds(register: str, word: int, slots: Slots) -> None:
        file = carried_out(cpu.unit, cpu.unit.reset(), slots)
        copy = dict(file)
        try:
            written = cpu.unit.write(file, register, word)
            again = cpu.unit.write(written, register, word)
            read_back = cpu.unit.write(written, register, written[register])
        except ValueError:
            written = again = read_back = file  # the hardware would raise an exception
        assert again == written, "to write a word twice is to write it once"
        assert read_back == written, "to write what was read changes nothing"
        assert file == copy

    holds()


@pytest.mark.parametrize("cpu", UNITS)
def test_a_handling_gets_past_every_hit_and_leaves_the_registers_as_they_were(cpu: Modelled) -> None:
    handling = cpu.backend.handling()
    if handling is None:
        pytest.skip("nobody has modelled what a kernel does there")
    assert isinstance(handling, Handling)

    @EXAMPLES
    @given(wanted(cpu.backend), st.lists(probes(), min_size=1, max_size=3))
    def gets_past(slots: Slots, data: list[MemoryAccess]) -> None:
        # given slots as the kernel arms them, and an instruction in user mode
        file = carried_out(cpu.unit, cpu.unit.reset(), {slot: handling.armed(slots[slot].piece) for slot in slots})
        instruction = [
            MemoryAccess(Access.EXECUTE, BASE, 4),
            *(replace(access, kernel=False) for access in data if access.access != Access.EXECUTE),
        ]

        # when it is executed
        told = handling.execute(file, instruction, {})

        # then the first exception is the one that the registers raise, and only slots that are armed are reported
        trap = cpu.unit.check(file, instruction)
        assert [handled.trap for handled in told.handled[:1]] == ([] if trap is None else [trap])
        assert {slot for handled in told.handled for slot in handled.reported} <= slots.keys()
        for slot in told.stepping:
            assert any(slot in handled.reported for handled in told.handled)

        # and what is not being stepped past is armed as it was
        after = file
        for write in told.writes:
            after = cpu.unit.write(after, write.register, write.value)
        if not told.stepping:
            assert after == file
        for access in data:
            assert trapping(cpu.unit, after, access) >= trapping(cpu.unit, file, access) - told.stepping.keys()

    gets_past()


# --- machines --------------------------------------------------------------------------------------------------------


class World(Protocol):
    """A machine, and a program on it that does what it is told to."""

    machine: Machine
    tid: int  # a thread that lives, the only one of its process
    piece: Piece  # what the program writes to

    def write(self, times: int) -> None:
        """Let the thread write so many times; return when it has."""
        ...

    def end_thread(self) -> None:
        """Let the thread exit, the only one of its process; return when it has."""
        ...

    def run_another_program(self) -> None:
        """Let the thread exec; return when it has."""
        ...

    def poke(self) -> None:
        """Let a tracer set an address register of the thread; return when it has left the thread alone."""
        ...

    def another_machine(self) -> Machine:
        """The same registers once more."""
        ...

    def close(self) -> None: ...


class FakeWorld:
    """Registers in memory."""

    def __init__(self) -> None:
        self._registers = FakeMachine({Pool.ANY: 4}, 2, random.Random(0))
        self.machine: Machine = self._registers
        self.tid = 812
        self._registers.start_task(self.tid)
        self.piece = Piece(Span(0x404040, 8), WRITE, Pool.ANY)

    def write(self, times: int) -> None:
        for resource_id in self._registers.armed:
            self._registers.hit(resource_id, times)

    def end_thread(self) -> None:
        self._registers.exit_task(self.tid)

    def run_another_program(self) -> None:
        self._registers.exec_task(self.tid)

    def poke(self) -> None:
        self._registers.poke(self.tid)

    def another_machine(self) -> Machine:
        return self.machine

    def close(self) -> None:
        self.machine.close()


class RealWorld:
    """A machine that is this host, and a program that runs on it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.machine = PLUGINS.machine(name, {})
        self._program = Program().__enter__()
        self.tid = self._program.tid
        backend = PLUGINS.backend(self.machine.facts)
        (self.piece,) = backend.fit(Span(self._program.variable, 8), WRITE, Mode()).pieces
        self._poked = 0  # address registers

    def write(self, times: int) -> None:
        assert self._program.command(f"write {times}")["did"] == times

    def end_thread(self) -> None:
        self._program.kill()

    def run_another_program(self) -> None:
        self._program.command("exec")

    def poke(self) -> None:
        if not TRACES:
            pytest.skip("the tracer of these tests knows x86-64 only")
        with Tracer(self.tid) as tracer:
            tracer.poke(self._poked)
        self._poked += 1

    def another_machine(self) -> Machine:
        return PLUGINS.machine(self._name, {})

    def close(self) -> None:
        self.machine.close()
        self._program.__exit__(None, None, None)


class SimWorld:
    """The simulated machine, and a process on it that does nothing by itself."""

    def __init__(self, profile: str) -> None:
        cpus = [cpu.facts for cpu in parse(profile, PLUGINS.profiles)]
        kinds = {facts: kind_of(facts, PLUGINS.backend(facts)) for facts in cpus}
        self._world = SimulatedWorld([kinds[facts] for facts in cpus])
        self._sim = SimMachine(self._world)
        self.machine: Machine = self._sim
        self.tid = 812
        backend = PLUGINS.backend(self.machine.facts)
        access = WRITE if "w" in backend.describe()["lengths"] else WRITE | Access.READ
        (self.piece,) = backend.fit(Span(0x404040, 8), access, Mode()).pieces
        with self._sim.world() as world:
            world.start_process(self.tid, "program")

    def write(self, times: int) -> None:
        with self._sim.world() as world:
            for _ in range(times):
                world.step(self.tid, Step(WRITE, self.piece.span.address, 8, 0x401000, 0x401004))
                world.step(self.tid, Step(Access.EXECUTE, 0x401004, 4, 0x401004, 0x401008))

    def end_thread(self) -> None:
        with self._sim.world() as world:
            world.exit_thread(self.tid)

    def run_another_program(self) -> None:
        with self._sim.world() as world:
            world.exec_process(self.tid, "another")

    def poke(self) -> None:
        debugger = Outsider(900, "debugger", evidence=TRACER)
        with self._sim.world() as world:
            world.take_outside(debugger, self.piece.pool, self.tid)
            world.leave_outside(debugger)

    def another_machine(self) -> Machine:
        return SimMachine(self._world)

    def close(self) -> None:
        self.machine.close()


REAL = [name for name, factory in PLUGINS.machines.items() if factory.real]


@pytest.fixture(scope="module")
def host() -> Iterator[None]:
    """The lock on this host's breakpoints, for all tests of this file: others may be waiting in line."""
    with ExitStack() as lock:
        try:
            lock.enter_context(exclusive())
        except HostBusy as busy:
            pytest.skip(f"breakpoints of this host are in use: {busy}")
        yield


PROFILES = ("x86-64x2", "cortex-a15x2+cortex-a7x3", "cortex-a72x2")
SIMULATED: dict[str, Callable[[], World]] = {
    "fake": FakeWorld,
    **{f"sim {profile}": partial(SimWorld, profile) for profile in PROFILES},
}


@pytest.fixture(params=[*SIMULATED, *(pytest.param(name, marks=pytest.mark.hardware) for name in REAL)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param in SIMULATED:
        world = SIMULATED[request.param]()
    else:
        request.getfixturevalue("host")
        world = RealWorld(request.param)
    before = set(os.listdir("/proc/self/fd"))
    yield world
    world.close()
    assert set(os.listdir("/proc/self/fd")) <= before, "a descriptor stayed open"


def task(world: World) -> Target:
    return Target(world.machine.task(world.tid))


def process(world: World) -> Target:
    return Target(process=world.machine.process(world.tid))


def slots(world: World) -> int:
    """How many slots like this piece there are on one CPU."""
    if isinstance(world, FakeWorld):
        return 4
    return PLUGINS.backend(world.machine.facts).slots()[world.piece.pool]


def arm(world: World, resource_id: int, target: Target, mode: Mode = HOLD) -> None:
    try:
        world.machine.arm(resource_id, world.piece, target, mode)
    except ArmError as refused:
        if refused.errno == errno.EINVAL and target.is_cpu_wide and world.machine.facts.architecture == "armv7l":
            pytest.skip("a 32-bit Arm kernel takes nothing that is CPU-wide: docs/simulator.md")
        raise


def drained(world: World, resource_id: int, budget_bytes: int = 2**20) -> Batch:
    """Everything that is in the rings, in bites of about ``budget_bytes``."""
    batches = [world.machine.drain(resource_id, budget_bytes)]
    while batches[-1].more:
        batches.append(world.machine.drain(resource_id, budget_bytes))
        assert len(batches) < 10_000, "more, and never all"
    records = b"".join(batch.records for batch in batches)
    return Batch(records, sum(batch.hits for batch in batches), sum(batch.lost for batch in batches), more=False)


def test_every_machine_that_is_found_is_tried_here() -> None:
    tried = {*REAL, *(name.split()[0] for name in SIMULATED)} - {"fake"}
    assert PLUGINS.machines.keys() == tried, "a machine that is not real needs a world that makes its breakpoints fire"


def test_a_machine_knows_its_cpus_and_what_they_are(world: World) -> None:
    topology = world.machine.topology()

    assert isinstance(world.machine, Machine)
    assert world.machine.name
    assert world.machine.facts.architecture
    assert topology.online
    assert set(topology.online) <= set(topology.possible)


def test_a_thread_is_known_while_it_lives(world: World) -> None:
    assert world.machine.task(world.tid).tid == world.tid
    assert world.machine.task(world.tid) == world.machine.task(world.tid)

    world.end_thread()

    with pytest.raises(TargetGone):
        world.machine.task(world.tid)


def test_a_process_is_known_with_its_threads_while_it_lives(world: World) -> None:
    known = world.machine.process(world.tid)
    assert known.pid == world.tid
    assert known == world.machine.process(world.tid) == world.machine.task(world.tid).process
    assert list(world.machine.threads(known)) == [world.tid]

    world.end_thread()

    with pytest.raises(TargetGone):
        world.machine.process(world.tid)
    assert list(world.machine.threads(known)) == []


@pytest.mark.parametrize("mode", [RING, COUNT, HOLD], ids=lambda mode: str(mode.delivery))
@pytest.mark.parametrize("form", ["every cpu", "one cpu", "thread", "thread on one cpu", "process"])
def test_a_slot_is_taken_from_arm_to_disarm_in_every_mode(world: World, form: str, mode: Mode) -> None:
    # given a place to arm on
    cpu = world.machine.topology().online[-1]
    target = {
        "every cpu": Target(),
        "one cpu": Target(cpus=(cpu,)),
        "thread": task(world),
        "thread on one cpu": Target(task(world).task, (cpu,)),
        "process": process(world),
    }[form]
    most = slots(world)

    # when every slot there is taken, then one more is refused as the kernel does
    for _ in range(2):
        for resource_id in range(most):
            arm(world, resource_id, target, mode)
        with pytest.raises(ArmError) as refused:
            arm(world, most, target, mode)
        assert refused.value.errno == errno.ENOSPC

        # and each is free once it is given back
        for resource_id in range(most):
            world.machine.disarm(resource_id)


def test_of_several_legs_all_are_armed_or_none(world: World) -> None:
    # given a CPU without a free slot
    first, *_, last = world.machine.topology().online
    if first == last:
        pytest.skip("it takes two online CPUs to refuse one leg of two")
    for resource_id in range(slots(world)):
        arm(world, resource_id, Target(cpus=(last,)))

    # when every CPU is asked for
    with pytest.raises(ArmError) as refused:
        arm(world, 100, Target())

    # then the refusal says where, and no leg is left behind on another CPU
    assert refused.value.cpu == last
    for resource_id in range(200, 200 + slots(world)):
        arm(world, resource_id, Target(cpus=(first,)))


def test_what_is_gone_cannot_be_armed(world: World) -> None:
    gone = task(world), process(world)
    world.end_thread()

    for target in gone:
        with pytest.raises(ArmError) as refused:
            arm(world, 1, target, RING)
        assert (refused.value.errno, refused.value.tid) == (errno.ESRCH, world.tid)


@pytest.mark.parametrize("whose", [task, process])
def test_every_hit_is_a_record_and_is_counted(world: World, whose: Callable[[World], Target]) -> None:
    arm(world, 1, whose(world), RING)

    world.write(100)

    assert world.machine.totals(1) == Totals(hits=100, lost=0)
    batch = drained(world, 1)
    assert (batch.hits, batch.lost, len(batch.records)) == (100, 0, 100 * RECORD.size)
    assert {RECORD.unpack_from(batch.records, at)[7] for at in range(0, len(batch.records), RECORD.size)} == {
        world.piece.span.address
    }
    assert world.machine.drain(1, 2**20) == Batch(b"", 0, 0, more=False)
    assert world.machine.totals(1) == Totals(hits=100, lost=0), "to drain is not to forget"


def test_a_budget_bounds_a_drain_and_loses_nothing(world: World) -> None:
    arm(world, 1, task(world), RING)
    world.write(100)
    budget_bytes = 10 * RECORD.size

    batch = world.machine.drain(1, budget_bytes)

    assert batch.more
    assert 0 < len(batch.records) <= 2 * budget_bytes
    assert len(batch.records) == batch.hits * RECORD.size, "whole records"
    assert batch.hits + drained(world, 1, budget_bytes).hits == 100


def test_to_disarm_hands_over_what_is_left_and_the_final_counts(world: World) -> None:
    arm(world, 1, task(world), RING)
    world.write(60)
    first = world.machine.drain(1, 10 * RECORD.size)

    rest, totals = world.machine.disarm(1)

    assert not rest.more
    assert (first.hits + rest.hits, rest.lost) == (60, 0)
    assert len(rest.records) == rest.hits * RECORD.size
    assert totals == Totals(hits=60, lost=0)


@pytest.mark.parametrize("drain_between", [True, False])
def test_hits_without_room_are_lost_and_counted_to_the_hit(world: World, drain_between: bool) -> None:
    # given a ring of one page
    arm(world, 1, task(world), SMALL_RING)

    # when more hits come than it has room for, twice
    drained_hits = told_lost = 0
    for _ in range(2):
        world.write(1000)
        if drain_between:
            batch = drained(world, 1)
            drained_hits += batch.hits
            told_lost += batch.lost
    rest, totals = world.machine.disarm(1)

    # then what was handed over and what was lost is what was hit, and each loss was told of once
    assert totals.hits == 2000
    assert totals.lost >= 2000 - 2 * SMALL_RING.ring_bytes // RECORD.size
    assert drained_hits + rest.hits + totals.lost == totals.hits
    assert told_lost + rest.lost == totals.lost


def test_who_only_counts_has_the_count_and_no_records(world: World) -> None:
    arm(world, 1, task(world), COUNT)

    world.write(1000)

    assert world.machine.totals(1) == Totals(hits=1000)
    assert world.machine.drain(1, 2**20) == Batch(b"", 0, 0, more=False)
    assert world.machine.disarm(1) == (Batch(b"", 0, 0, more=False), Totals(hits=1000))


def test_a_slot_that_is_only_held_reports_nothing(world: World) -> None:
    arm(world, 1, task(world), HOLD)

    world.write(1000)

    assert world.machine.disarm(1) == (Batch(b"", 0, 0, more=False), Totals())


def test_a_cpu_wide_slot_sees_the_thread_too(world: World) -> None:
    arm(world, 1, Target(), RING)

    world.write(10)

    batch, totals = world.machine.disarm(1)
    assert batch.hits % 10 == 0
    assert totals.hits == batch.hits > 0
    assert not batch.lost


def test_a_descriptor_tells_of_new_hits(world: World) -> None:
    # given an armed slot that was looked into after its descriptors were polled
    arm(world, 1, task(world), RING)
    with select.epoll() as epoll:
        for fd in world.machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)
        drained(world, 1)
        assert epoll.poll(0) == []

        # when it is hit, then one of them is readable, again and again
        for _ in range(3):
            world.write(1)
            assert epoll.poll(WAIT_S)
            assert drained(world, 1).hits == 1


@pytest.mark.parametrize("mode", [RING, COUNT, HOLD], ids=lambda mode: str(mode.delivery))
def test_the_end_of_the_thread_is_told_and_takes_no_hit_away(world: World, mode: Mode) -> None:
    # given a slot on a thread, and one that is CPU-wide
    arm(world, 1, task(world), mode)
    arm(world, 2, Target())
    world.write(5)
    assert world.machine.end_of_target(1) is None
    with select.epoll() as epoll:
        for fd in world.machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)
        drained_before = drained(world, 1)

        # when the thread exits
        world.end_thread()

        # then the slot's descriptors say so, and it can be asked
        while world.machine.end_of_target(1) is None:
            assert epoll.poll(WAIT_S), "nothing tells of the end"
        assert epoll.poll(WAIT_S)
    assert world.machine.end_of_target(1) is TargetEnd.EXIT, "to ask takes nothing away"
    assert world.machine.end_of_target(2) is None

    # and its counts are what they were
    rest, totals = world.machine.disarm(1)
    assert totals == Totals(hits=0 if mode is HOLD else 5)
    assert drained_before.hits + rest.hits == (5 if mode is RING else 0)


@pytest.mark.parametrize("whose", [task, process])
@pytest.mark.parametrize("across_exec", [True, False])
def test_an_exec_of_the_target_ends_what_was_not_to_go_on(
    world: World, whose: Callable[[World], Target], across_exec: bool
) -> None:
    # given a slot with hits
    mode = Mode(ring_bytes=RING.ring_bytes, across_exec=across_exec)
    arm(world, 1, whose(world), mode)
    world.write(5)
    with select.epoll() as epoll:
        for fd in world.machine.descriptors(1):
            epoll.register(fd, select.EPOLLIN)
        before = drained(world, 1).hits

        # when its target runs another program
        world.run_another_program()

        # then that is told, unless it goes on
        while not across_exec and world.machine.end_of_target(1) is None:
            assert epoll.poll(WAIT_S), "nothing tells of the end"
    assert world.machine.end_of_target(1) is (None if across_exec else TargetEnd.EXEC)

    # and no hit is taken away
    rest, totals = world.machine.disarm(1)
    assert (before + rest.hits, totals.lost) == (totals.hits, 0)
    assert totals.hits >= 5 if across_exec else totals.hits == 5


# --- slots that are a tracer's ---------------------------------------------------------------------------------------


def told_of_its_end(world: World, resource_id: int) -> TargetEnd:
    """Wait for the end of a resource's target, as its descriptors tell of it."""
    with select.epoll() as epoll:
        for fd in world.machine.descriptors(resource_id):
            epoll.register(fd, select.EPOLLIN)
        until = time.monotonic() + WAIT_S
        while (end := world.machine.end_of_target(resource_id)) is None:
            assert time.monotonic() < until, "the end is never told"
            assert epoll.poll(WAIT_S), "nothing tells of the end"
        assert epoll.poll(WAIT_S), "to ask takes nothing away"
    return end


def test_to_attend_takes_no_slot_and_sees_nothing(world: World) -> None:
    # given a thread that is attended to
    world.machine.attend(100, task(world), RING)

    # then every slot is free, and hits are none of its business
    for resource_id in range(slots(world)):
        arm(world, resource_id, task(world))
    world.write(5)
    assert world.machine.end_of_target(100) is None
    assert not any(select.select(world.machine.descriptors(100), [], [], 0))
    assert world.machine.drain(100, 2**20) == Batch(b"", 0, 0, more=False)
    assert world.machine.totals(100) == Totals()
    assert not world.machine.is_fused(100)
    assert world.machine.disarm(100) == (Batch(b"", 0, 0, more=False), Totals())


@pytest.mark.parametrize("across_exec", [True, False])
@pytest.mark.parametrize("end", [TargetEnd.EXIT, TargetEnd.EXEC])
def test_once_the_end_of_an_attended_thread_is_told_its_tracers_slots_are_free(
    world: World, end: TargetEnd, across_exec: bool
) -> None:
    # given a thread with slots that a tracer took, on a machine that is full with them
    world.machine.attend(100, task(world), Mode(across_exec=across_exec))
    for _ in range(slots(world)):
        world.poke()
    with pytest.raises(ArmError):
        arm(world, 1, Target())

    # when it ends, in whichever mode
    if end is TargetEnd.EXIT:
        world.end_thread()
    else:
        world.run_another_program()

    # then that is told, and not before there is room
    assert told_of_its_end(world, 100) is end
    for resource_id in range(slots(world)):
        arm(world, resource_id, Target())
    assert world.machine.disarm(100) == (Batch(b"", 0, 0, more=False), Totals())


def test_a_thread_that_is_gone_cannot_be_attended_to(world: World) -> None:
    gone = task(world)
    world.end_thread()

    with pytest.raises(ArmError) as refused:
        world.machine.attend(1, gone, RING)

    assert (refused.value.errno, refused.value.tid) == (errno.ESRCH, world.tid)
    assert world.machine.slots_outside(world.piece.pool, gone) is None


def test_slots_outside_are_those_of_the_thread_that_the_machine_did_not_take(world: World) -> None:
    # given slots of ours on the thread, on its process, and on every CPU, and a free one
    target, pool = task(world), world.piece.pool
    arm(world, 1, target)
    arm(world, 2, process(world))
    arm(world, 3, Target())
    assert world.machine.slots_outside(pool, target) == 0

    # when a tracer takes the last one, then that one is told, and it stays when the tracer has left
    world.poke()
    assert world.machine.slots_outside(pool, target) == 1
    with pytest.raises(ArmError):
        arm(world, 4, target)

    # and each one more is
    world.machine.disarm(1)
    world.machine.disarm(3)
    world.poke()
    assert world.machine.slots_outside(pool, target) == 2

    # and to ask has taken nothing
    arm(world, 5, target)
    with pytest.raises(ArmError):
        arm(world, 6, target)


# --- too many hits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delivery", [Delivery.HITS, Delivery.COUNT])
def test_a_fuse_stops_a_flood_at_the_very_hit_and_a_top_up_in_time_lets_more_through(
    world: World, delivery: Delivery
) -> None:
    # given a slot with a fuse of a hundred hits
    ring_bytes = RING.ring_bytes if delivery is Delivery.HITS else 0
    arm(world, 1, task(world), Mode(delivery=delivery, ring_bytes=ring_bytes, fuse_hits=100))
    assert world.machine.is_fused(1)

    # when it is topped up before it has blown
    world.write(60)
    assert world.machine.top_up(1, 50)
    world.write(1000)

    # then it has let through as many as both, and to top it up is too late
    assert world.machine.totals(1).hits == 150
    assert not world.machine.top_up(1, 50)
    world.write(1000)
    assert world.machine.totals(1).hits == 150

    # and with a new fuse it goes on, in the slot it had
    for resource_id in range(2, 1 + slots(world)):
        arm(world, resource_id, task(world))
    world.machine.rearm(1, 20)
    world.write(1000)
    batch, totals = world.machine.disarm(1)
    assert totals == Totals(hits=170)
    assert batch.hits == (170 if delivery is Delivery.HITS else 0)


@pytest.mark.parametrize("whose", [task, process])
@pytest.mark.parametrize("fuse_hits", [0, 10_000])
def test_what_is_silenced_keeps_its_slot_and_reports_nothing_until_it_is_armed_again(
    world: World, whose: Callable[[World], Target], fuse_hits: int
) -> None:
    # given every slot of a thread, one of which reports
    arm(world, 1, whose(world), Mode(ring_bytes=RING.ring_bytes, fuse_hits=fuse_hits))
    for resource_id in range(2, 1 + slots(world)):
        arm(world, resource_id, task(world))
    world.write(7)

    # when it is silenced, then neither hits nor a top-up wake it, and its slot is nobody else's
    world.machine.silence(1)
    world.machine.top_up(1, 50)
    world.write(100)
    assert world.machine.totals(1).hits == 7
    with pytest.raises(ArmError) as refused:
        arm(world, 100, task(world))
    assert refused.value.errno == errno.ENOSPC

    # and armed again it reports again
    world.machine.rearm(1, fuse_hits)
    world.write(5)
    batch, totals = world.machine.disarm(1)
    assert (batch.hits, totals) == (12, Totals(hits=12))


def test_what_is_only_held_stays_quiet_when_it_is_armed_again(world: World) -> None:
    arm(world, 1, task(world), HOLD)
    world.machine.silence(1)

    world.machine.rearm(1, 10)
    world.write(5)

    assert world.machine.disarm(1) == (Batch(b"", 0, 0, more=False), Totals())


def test_a_cpu_that_is_dropped_gives_its_slot_back_and_can_be_taken_again(world: World) -> None:
    """As when it goes offline and comes back, without that: what is given back is what is asked for."""
    # given slots on every CPU, all there are
    *_, last = world.machine.topology().online
    for resource_id in range(1, 1 + slots(world)):
        arm(world, resource_id, Target())

    # when one of them gives back its slot on a CPU, then that is free there, and others' are not
    world.machine.drop_cpu(1, last)
    arm(world, 100, Target(cpus=(last,)))
    with pytest.raises(ArmError) as refused:
        world.machine.add_cpu(1, last)
    assert (refused.value.errno, refused.value.cpu) == (errno.ENOSPC, last)

    # and it can have it again, once
    world.machine.disarm(100)
    for _ in range(2):
        world.machine.add_cpu(1, last)
    with pytest.raises(ArmError):
        arm(world, 101, Target(cpus=(last,)))
    world.machine.disarm(1)
    arm(world, 102, Target(cpus=(last,)))


def test_to_close_gives_everything_back(world: World) -> None:
    for resource_id in range(slots(world)):
        arm(world, resource_id, Target(), RING if resource_id % 2 else HOLD)

    world.machine.close()

    again = world.another_machine()
    for resource_id in range(slots(world)):
        again.arm(resource_id, world.piece, Target(), HOLD)
    again.close()
    world.machine.close()
