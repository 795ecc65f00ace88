"""
Nobody is named for what somebody else may have: rules and counts, on a kernel in memory that keeps the real formula.

The search through /proc is tried on processes that hold events which take no slot, so it needs no debug registers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.model import Pool, Task
from hwbpd_linux import foreign, perf_event, perf_fds, processes
from hwbpd_linux.foreign import Found, explain
from hwbpd_linux.occupancy import Counted, Counter, Place
from hwbpd_linux.perf_fds import NOBODY, Holder, Holders, find_holders
from hwbpd_linux.processes import Process, Tracers, find_tracers
from tests.slow_model import Event, SlowBooks, cpu_wide, of_busiest, of_task

SLOTS = 4
CPUS = (0, 1)
LIVE, DEAD = (11, 12, 13), 19  # threads
CALLER, KTHREADD = 0, 2
PROFILER, ANOTHER, DEBUGGER = Process(97, "perf", 0), Process(98, "perf", 1000), Process(55, "gdb", 1000)

BY_FD, BY_PTRACE, OUT_OF_SIGHT, OURS = "fd", "ptrace", "out of sight", "ours"


class Slot(NamedTuple):
    """A slot in the kernel: how it was taken, and by whom."""

    how: str
    who: Process
    place: Place


class World:
    """A kernel in memory, with what its users have."""

    def __init__(self, wanted: list[Slot], tracer_of: dict[int, Process]) -> None:
        self.rule = SlowBooks({Pool.ANY: SLOTS}, CPUS, CPUS)
        self.tracer_of = tracer_of
        self.slots: list[Slot] = []
        self.probes: dict[int, Event] = {}
        for slot in wanted:
            if self.rule.admits(_event(slot.place), self.events()):
                self.slots.append(slot)

    def events(self) -> list[Event]:
        return [*(_event(slot.place) for slot in self.slots), *self.probes.values()]

    def others(self) -> list[Event]:
        return [_event(slot.place) for slot in self.slots if slot.how != OURS]

    def open(self, address: int, length_bytes: int, bp_type: int, *, tid: int, cpu: int, **_: object) -> int:
        if tid not in (-1, CALLER, KTHREADD, *LIVE):
            raise OSError(errno.ESRCH, "no such thread")
        event = _event((None if tid == -1 else tid, cpu))
        if not self.rule.admits(event, self.events()):
            raise OSError(errno.ENOSPC, "no room")
        number = 1000 + len(self.probes)
        self.probes[number] = event
        return number

    def close(self, number: int) -> None:
        del self.probes[number]

    @contextmanager
    def runs(self) -> Iterator[None]:
        with (
            mock.patch.object(perf_event, "open_breakpoint", self.open),
            mock.patch.object(os, "close", self.close),
        ):
            yield
        assert not self.probes

    def holders(self) -> Holders:
        everybody = (PROFILER, ANOTHER)
        events = {
            who: frozenset(at for at, slot in enumerate(self.slots) if (slot.how, slot.who) == (BY_FD, who))
            for who in everybody
        }
        return Holders(tuple(Holder(who, events[who], frozenset()) for who in everybody if events[who]), True)

    def ask(self, place: Place) -> tuple[Found, ...]:
        tid, cpu = place
        ours = [slot.place for slot in self.slots if slot.how == OURS]
        counter = Counter(SLOTS, Pool.ANY, ours, time.monotonic() + 60)
        with self.runs():
            counted = (
                counter.of_cpus(CPUS, cpu, list(self.tracer_of)) if tid is None else counter.of_thread(CPUS, tid, cpu)
            )
        return explain(counted, self.holders(), Tracers(self.tracer_of, True))


def _event(place: Place) -> Event:
    tid, cpu = place
    return Event(None if tid is None else Task(tid, 0), -1 if cpu is None else cpu, Pool.ANY)


CPU_WIDE = st.sampled_from(CPUS).map(lambda cpu: (None, cpu))
THREAD = st.sampled_from([(tid, cpu) for tid in (*LIVE, DEAD, CALLER) for cpu in (None, *CPUS)])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Up to eight slots of a few users, so that every CPU and thread may be full."""
    tracer_of = draw(st.dictionaries(st.sampled_from(LIVE), st.just(DEBUGGER)))
    untraced = [tid for tid in (*LIVE, DEAD, CALLER) if tid not in tracer_of]
    by_fd = st.builds(Slot, st.just(BY_FD), st.sampled_from([PROFILER, ANOTHER]), CPU_WIDE | THREAD)
    by_ptrace = st.builds(Slot, st.just(BY_PTRACE), st.just(DEBUGGER), st.sampled_from([(tid, None) for tid in LIVE]))
    hidden_places = CPU_WIDE | st.sampled_from([(tid, cpu) for tid in untraced for cpu in (None, *CPUS)])
    hidden = st.builds(Slot, st.just(OUT_OF_SIGHT), st.just(ANOTHER), hidden_places)
    ours = st.builds(Slot, st.just(OURS), st.just(Process(1, "hwbpd", 0)), CPU_WIDE | THREAD)
    return World(draw(st.lists(by_fd | by_ptrace | hidden | ours, max_size=8)), tracer_of)


ANY_PLACE = CPU_WIDE | st.sampled_from([(tid, cpu) for tid in LIVE for cpu in (None, *CPUS)]) | st.just((None, None))


@given(worlds(), ANY_PLACE)
def test_whoever_is_named_has_what_is_said(world: World, place: Place) -> None:
    for found in world.ask(place):
        theirs = [slot for slot in world.slots if slot.who.pid == found.pid]
        if found.evidence == foreign.TRACER:
            tid = int(found.place.removeprefix("on tid "))
            assert world.tracer_of[tid].pid == found.pid
            assert 0 < found.slots <= sum((slot.how, slot.place) == (BY_PTRACE, (tid, None)) for slot in theirs)
        elif found.evidence == foreign.PERF_FD and found.slots:
            cpu = int(found.place.removeprefix("cpu-wide on cpu "))
            assert found.slots <= sum((slot.how, slot.place) == (BY_FD, (None, cpu)) for slot in theirs)
        elif found.evidence == foreign.PERF_FD:
            assert any(slot.how == BY_FD for slot in theirs)
        else:
            assert (found.evidence, found.pid, found.uid) == (foreign.UNATTRIBUTED, 0, -1)


@given(worlds(), ANY_PLACE)
def test_the_numbers_of_a_place_add_up_to_what_others_have_there(world: World, place: Place) -> None:
    told: dict[str, int] = {}
    for found in world.ask(place):
        where = found.place.split(",")[0]
        told[where] = told.get(where, 0) + found.slots
    for where, count in told.items():
        if where.startswith("cpu-wide"):
            assert count == cpu_wide(world.others(), int(where.split()[-1]), Pool.ANY)
        elif where.startswith("on tid"):
            task = Task(int(where.split()[-1]), 0)
            assert count in {of_task(world.others(), task, cpu, Pool.ANY) for cpu in CPUS}
        elif where == foreign.NOT_FOUND:
            assert count <= max(of_busiest(world.others(), cpu, Pool.ANY) for cpu in CPUS)


@given(worlds(), st.sampled_from(LIVE))
def test_what_follows_a_thread_is_what_others_have_on_it_on_every_cpu(world: World, tid: int) -> None:
    ours = [slot.place for slot in world.slots if slot.how == OURS]
    with world.runs():
        following = Counter(SLOTS, Pool.ANY, ours, time.monotonic() + 60).following(CPUS, tid)

    assert following == min(of_task(world.others(), Task(tid, 0), cpu, Pool.ANY) for cpu in CPUS)


def test_what_follows_a_thread_is_not_told_of_one_that_is_gone_nor_out_of_time() -> None:
    world = World([Slot(BY_PTRACE, DEBUGGER, (LIVE[0], None))], {})
    with world.runs():
        assert Counter(SLOTS, Pool.ANY, [], time.monotonic() + 60).following(CPUS, DEAD) is None
        assert Counter(SLOTS, Pool.ANY, [], time.monotonic()).following(CPUS, LIVE[0]) is None
        assert Counter(SLOTS, Pool.ANY, [], time.monotonic() + 60).following((), LIVE[0]) is None


@given(worlds(), st.sampled_from(CPUS))
def test_where_hwbpd_has_nothing_every_full_cpu_is_explained(world: World, cpu: int) -> None:
    world.slots = [slot for slot in world.slots if slot.how != OURS]
    full = not world.rule.admits(_event((None, cpu)), world.events())

    found = world.ask((None, cpu))

    by_place = {each.place.split(",")[0]: 0 for each in found}
    for each in found:
        by_place[each.place.split(",")[0]] += each.slots
    wide = by_place.pop(f"cpu-wide on cpu {cpu}", 0)
    if full:
        assert wide + max(by_place.values(), default=0) == SLOTS


def told(world: World, place: Place) -> list[tuple[str, int, str, str]]:
    return [(found.comm, found.slots, found.place, found.evidence) for found in world.ask(place)]


def test_a_profiler_alone_on_the_cpus_is_named_with_its_slots() -> None:
    world = World([Slot(BY_FD, PROFILER, (None, cpu)) for cpu in CPUS], {})

    assert told(world, (None, 1)) == [("perf", 1, "cpu-wide on cpu 1", "perf fd")]


def test_a_slot_beside_a_profilers_is_nobodys() -> None:
    world = World([*(Slot(BY_FD, PROFILER, (None, 0)) for _ in range(2)), Slot(OUT_OF_SIGHT, ANOTHER, (None, 0))], {})

    assert told(world, (11, None)) == [
        ("perf", 2, "cpu-wide on cpu 0", "perf fd"),
        ("unattributed", 1, "cpu-wide on cpu 0", "unattributed"),
    ]


@pytest.mark.parametrize(
    ("beside", "named"),
    [(0, [("perf", 2), ("unattributed", 1)]), (1, [("perf", 1), ("unattributed", 2)]), (2, []), (None, [])],
)
def test_a_descriptor_that_may_be_of_the_other_pool_is_no_evidence(
    beside: int | None, named: list[tuple[str, int]]
) -> None:
    # given a profiler with two descriptors, and a CPU with three slots taken in the pool that was full
    counted = Counted({0: 3, 1: 0}, (0,), {}, 0, True)
    holders = Holders((Holder(PROFILER, frozenset({1, 2}), frozenset()),), complete=True)

    # when so many slots are taken in the other pool
    found = explain(counted, holders, Tracers({}, complete=True), beside)

    # then only those it must have here are told as its own
    assert [(one.comm, one.slots) for one in found if one.slots] == (named or [("unattributed", 3)])


@pytest.mark.parametrize("other", [None, 11, DEAD])
def test_what_others_have_in_a_pool_is_counted_where_no_thread_has_any(other: int | None) -> None:
    place = Slot(BY_FD, PROFILER, (other, None if other else 1))
    world = World([Slot(BY_FD, PROFILER, (None, 0)), Slot(OURS, PROFILER, (None, 1)), place], {})

    with world.runs():
        assert Counter(SLOTS, Pool.ANY, [(None, 1)], time.monotonic() + 60).beside(CPUS) == (None if other else 2)


def test_a_debugger_is_named_for_the_thread_it_traces_and_not_for_hwbpds_slot_there() -> None:
    world = World([Slot(OURS, PROFILER, (11, None)), *[Slot(BY_PTRACE, DEBUGGER, (11, None))] * 2], {11: DEBUGGER})

    assert told(world, (11, None)) == [("gdb", 2, "on tid 11", "tracer")]
    assert told(world, (None, 0)) == [("gdb", 2, "on tid 11", "tracer")]


def test_a_debugger_is_named_only_for_what_no_descriptor_can_explain() -> None:
    slots = [*[Slot(BY_PTRACE, DEBUGGER, (11, None))] * 2, Slot(BY_FD, PROFILER, (DEAD, None))]

    assert told(World(slots, {11: DEBUGGER}), (11, None)) == [
        ("gdb", 1, "on tid 11", "tracer"),
        ("unattributed", 1, "on tid 11", "unattributed"),
        ("perf", 0, "somewhere", "perf fd"),
    ]
    assert told(World(slots[1:], {11: DEBUGGER}), (11, None)) == [
        ("unattributed", 1, "on tid 11, which gdb[55] traces", "unattributed"),
        ("perf", 0, "somewhere", "perf fd"),
    ]


def test_what_a_debugger_left_behind_is_nobodys() -> None:
    world = World([Slot(BY_PTRACE, DEBUGGER, (11, None))], {})

    assert told(world, (11, 1)) == [("unattributed", 1, "on tid 11", "unattributed")]


def test_the_slots_of_a_thread_that_has_exited_are_on_no_thread_that_can_be_found() -> None:
    world = World([Slot(BY_FD, PROFILER, (DEAD, None))] * 4, {})

    assert told(world, (None, 0)) == [
        ("unattributed", 4, "on a thread that was not found", "unattributed"),
        ("perf", 0, "somewhere", "perf fd"),
    ]


def test_where_nobody_else_has_anything_nobody_is_told_of() -> None:
    assert told(World([Slot(OURS, PROFILER, (None, 0)), Slot(OURS, PROFILER, (11, None))], {}), (None, 0)) == []
    assert told(World([Slot(OURS, PROFILER, (DEAD, None))] * 3, {}), (None, 0)) == []


def test_of_many_threads_that_are_as_busy_the_first_are_told_and_those_traced_before_them() -> None:
    counted = Counted({0: 0}, (), dict.fromkeys(range(20, 30), 4), 0, False)

    found = explain(counted, NOBODY, Tracers({29: DEBUGGER}, complete=True))

    assert [(each.comm, each.slots, each.place) for each in found] == [
        ("gdb", 4, "on tid 29"),
        *(("unattributed", 4, f"on tid {tid}") for tid in (20, 21, 22)),
        ("unattributed", 0, "on 6 more threads"),
    ]


def test_a_search_that_was_cut_short_names_no_tracer_and_says_so() -> None:
    world = World([Slot(BY_PTRACE, DEBUGGER, (11, None))], {11: DEBUGGER})
    with world.runs():
        counted = Counter(SLOTS, Pool.ANY, [], time.monotonic() + 60).of_thread(CPUS, 11, None)

    found = explain(counted, Holders((), complete=False), Tracers({11: DEBUGGER}, complete=True))

    assert [(each.pid, each.slots, each.place) for each in found] == [
        (0, 1, "on tid 11, which gdb[55] traces"),
        (0, 0, "more was not looked at"),
    ]


def test_a_search_that_changed_during_the_count_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World([Slot(BY_FD, PROFILER, (None, 0))], {})
    searches = iter([world.holders(), Holders((), complete=True)])
    monkeypatch.setattr(foreign, "find_holders", lambda *_: next(searches))
    with world.runs():
        found = foreign.find(SLOTS, {}, CPUS, None, 0)

    assert [(each.pid, each.slots, each.place) for each in found] == [
        (0, 1, "cpu-wide on cpu 0"),
        (0, 0, "it changed while it was looked at"),
    ]


# --- the search through /proc ----------------------------------------------------------------------------------------

SOON = 60.0

HOLDER = """
import sys
from hwbpd_linux import perf_event
fds = [perf_event.open_dummy(0) for _ in range(int(sys.argv[1]))]
print(*fds, flush=True)
sys.stdin.read()
"""


@contextmanager
def holder_of_other_events(count: int) -> Iterator[tuple[int, list[int]]]:
    """A process with that many events that are no breakpoints, and their descriptors."""
    with _python(HOLDER, str(count)) as child:
        assert child.stdout is not None
        yield child.pid, [int(fd) for fd in child.stdout.readline().split()]


@contextmanager
def _python(code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def _may_open_events() -> bool:
    try:
        os.close(perf_event.open_dummy(0))
    except OSError:
        return False
    return True


events_needed = pytest.mark.skipif(not _may_open_events(), reason="this host lets this process open no perf events")


@events_needed
def test_events_of_other_kinds_are_no_breakpoints() -> None:
    with holder_of_other_events(3) as (pid, _):
        found = find_holders((), time.monotonic() + SOON)

    assert pid not in {holder.process.pid for holder in found.holders}


@events_needed
def test_where_kinds_cannot_be_told_every_event_may_be_a_breakpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_fds, "_answers_as_expected", lambda: False)
    with holder_of_other_events(3) as (pid, fds):
        found = find_holders((), time.monotonic() + SOON)

    (holder,) = [holder for holder in found.holders if holder.process.pid == pid]
    assert (holder.breakpoints, holder.unknown) == (frozenset(), frozenset(fds))
    assert holder.process.uid == os.getuid()


@events_needed
def test_our_own_events_are_passed_over_in_other_processes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_fds, "_answers_as_expected", lambda: False)
    ours = perf_event.open_dummy(0)
    command = ["cat"]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[ours]) as heir:
            as_ours = find_holders([ours], time.monotonic() + SOON)
            as_others = find_holders([], time.monotonic() + SOON)
            assert heir.stdin is not None
            heir.stdin.close()
    finally:
        os.close(ours)

    assert heir.pid in {holder.process.pid for holder in as_others.holders}
    assert heir.pid not in {holder.process.pid for holder in as_ours.holders}


def test_this_kernel_tells_kinds_apart_or_is_known_not_to() -> None:
    if perf_fds._answers_as_expected():
        assert perf_event.TYPE_BREAKPOINT not in perf_fds._types_to_ask()
        assert set(perf_fds._listed_types()) - {perf_event.TYPE_BREAKPOINT} <= set(perf_fds._types_to_ask())


def test_a_search_out_of_time_or_room_says_that_it_is_not_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not find_holders((), time.monotonic() - 1).complete
    assert not find_tracers(time.monotonic() - 1).complete
    monkeypatch.setattr(perf_fds, "FDS_MAX", 1)
    assert not find_holders((), time.monotonic() + SOON).complete


TRACER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
child = os.fork()
if child == 0:
    libc.prctl(1, 9)  # PR_SET_PDEATHSIG
    libc.ptrace(0, 0, 0, 0)  # PTRACE_TRACEME
    os.kill(os.getpid(), 19)  # SIGSTOP
os.waitpid(child, 0)
print(child, flush=True)
sys.stdin.read()
os.kill(child, 9)
"""


def test_a_tracer_is_found_with_the_thread_it_traces() -> None:
    with _python(TRACER) as tracer:
        assert tracer.stdout is not None
        traced = int(tracer.stdout.readline())
        found = find_tracers(time.monotonic() + SOON)
        assert found.complete
        process = found.of(traced)
        assert tracer.stdin is not None
        tracer.stdin.close()
        tracer.wait(30)

    assert process is not None
    assert (process.pid, process.uid) == (tracer.pid, os.getuid())
    assert process.comm.startswith("python")
    assert found.of(os.getpid()) is None


def test_a_name_cannot_forge_who_a_process_is() -> None:
    libc = ctypes.CDLL(None)
    comm = processes._read("/proc/self/comm").strip()
    try:
        libc.prctl(15, b"x\nUid:\t4711\n", 0, 0, 0)  # PR_SET_NAME
        process = processes.describe(os.getpid())
    finally:
        libc.prctl(15, comm, 0, 0, 0)

    assert process is not None
    assert (process.pid, process.uid) == (os.getpid(), os.getuid())
