"""What a claim on real registers sees is what the watched program did, hit for hit."""

from __future__ import annotations

import mmap
import os
import select
import time

import pytest

from examples.target import Target
from hwbpd.core.model import Mode, Totals
from hwbpd.core.model import Target as Where
from hwbpd_linux.cpus import online_cpus
from hwbpd_linux.machine import LinuxMachine
from tests.hardware.common import (
    COUNT,
    HITS,
    HOLD,
    KERNEL_CONTEXT,
    RING_BYTES,
    USER_CONTEXT,
    X86,
    decode,
    drain_all,
    piece,
)
from tests.host import free_slots

pytestmark = pytest.mark.hardware

SEES_THE_KERNEL = pytest.mark.skipif(not X86, reason="on Arm, Linux keeps the kernel's accesses to itself")


def the_task(machine: LinuxMachine, target: Target) -> Where:
    return Where(task=machine.task(target.tid))


@pytest.mark.parametrize(("letters", "seen"), [("w", 300), ("rw", 1000), ("x", 50)])
def test_every_access_of_the_kind_is_a_hit_and_no_other(
    machine: LinuxMachine, target: Target, letters: str, seen: int
) -> None:
    address = target.function if letters == "x" else target.variable
    machine.arm(1, piece(address, letters), the_task(machine, target), HITS)

    for order in ("write 300", "read 700", "call 50"):
        target.command(order)

    assert drain_all(machine, 1).hits == seen
    assert machine.totals(1) == Totals(hits=seen, lost=0)


def test_a_record_says_where_who_when_and_what(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), HITS)
    machine.arm(2, piece(target.function, "x"), the_task(machine, target), HITS)
    before_ns = time.monotonic_ns()

    target.command("write 3")
    target.command("call 2")

    after_ns = time.monotonic_ns()
    writes, calls = decode(drain_all(machine, 1)), decode(drain_all(machine, 2))
    assert [hit.address for hit in writes + calls] == [target.variable] * 3 + [target.function] * 2
    assert {(hit.where, hit.pid, hit.tid, hit.chain) for hit in writes + calls} == {(2, target.pid, target.tid, None)}
    assert {hit.cpu for hit in writes + calls} <= set(online_cpus())
    times = [hit.time_ns for hit in writes + calls]
    assert times == sorted(times)
    assert before_ns <= times[0]
    assert times[-1] <= after_ns
    store = target.code.start + (7 if X86 else 12)
    assert {hit.ip for hit in writes} == {store + 3 if X86 else store}
    assert {hit.ip for hit in calls} == {target.function}


def test_a_cpu_wide_claim_sees_the_program_on_every_cpu_it_runs_on(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(), HITS)

    for cpu in online_cpus():
        os.sched_setaffinity(target.tid, {cpu})
        target.command(f"write {10 + cpu}")

    hits = decode(drain_all(machine, 1))
    assert {cpu: sum(hit.cpu == cpu for hit in hits) for cpu in online_cpus()} == {
        cpu: 10 + cpu for cpu in online_cpus()
    }


@pytest.mark.parametrize("of_task", [False, True])
def test_a_claim_on_one_cpu_sees_what_happens_there_only(machine: LinuxMachine, target: Target, of_task: bool) -> None:
    here = online_cpus()[-1]
    task = machine.task(target.tid) if of_task else None
    machine.arm(1, piece(target.variable, "w"), Where(task=task, cpus=(here,)), HITS)

    for cpu in online_cpus():
        os.sched_setaffinity(target.tid, {cpu})
        target.command("write 20")

    assert [hit.cpu for hit in decode(drain_all(machine, 1))] == [here] * 20


def test_a_claim_on_a_thread_sees_no_other_thread_of_its_process(machine: LinuxMachine) -> None:
    with Target("--threads", "3") as target:
        machine.arm(1, piece(target.variable, "w"), Where(task=machine.task(target.tids[1])), HITS)

        assert target.command("write 40")["did"] == 120

        assert [hit.tid for hit in decode(drain_all(machine, 1))] == [target.tids[1]] * 40


def test_a_claim_that_counts_has_the_count_and_no_records(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), COUNT)

    target.command("write 1234")

    assert drain_all(machine, 1).hits == 0
    batch, totals = machine.disarm(1)
    assert (batch.records, totals) == (b"", Totals(hits=1234, lost=0))


def test_a_held_slot_is_taken_and_does_not_trap(machine: LinuxMachine, target: Target) -> None:
    free_before = free_slots()
    machine.arm(1, piece(target.variable, "w"), Where(), HOLD)

    target.command("write 1000")

    assert {place: free_before[place] - free for place, free in free_slots().items()} == {
        place: int(place[1] != "inst") for place in free_before
    }
    assert machine.disarm(1)[1] == Totals(hits=0, lost=0)


@SEES_THE_KERNEL
def test_user_and_kernel_mode_are_seen_apart(machine: LinuxMachine, target: Target) -> None:
    where = the_task(machine, target)
    machine.arm(1, piece(target.variable, "w"), where, Mode(kernel=False, ring_bytes=RING_BYTES))
    machine.arm(2, piece(target.variable, "w"), where, Mode(user=False, ring_bytes=RING_BYTES))

    target.command("write 5")
    target.command("copy 7")

    assert [hit.where for hit in decode(drain_all(machine, 1))] == [2] * 5
    # How many stores the kernel needs for eight bytes is its own choice, the same each time.
    by_kernel = decode(drain_all(machine, 2))
    assert {hit.where for hit in by_kernel} == {1}
    assert len(by_kernel) % 7 == 0
    assert len(by_kernel) > 0


@pytest.mark.skipif(X86, reason="x86 sees them: run this on an arm64 machine")
def test_what_the_kernel_does_at_a_users_address_is_not_seen_on_arm(machine: LinuxMachine, target: Target) -> None:
    # given a watchpoint that is to see everybody's writes
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), HITS)

    # when the program writes, and has the kernel write
    target.command("write 5")
    target.command("copy 7")

    # then the kernel has stepped past its own, and told nobody
    assert [hit.where for hit in decode(drain_all(machine, 1))] == [2] * 5
    assert machine.disarm(1)[1] == Totals(hits=5, lost=0)


def test_a_user_call_chain_starts_at_the_instruction(machine: LinuxMachine, target: Target) -> None:
    mode = Mode(user_chain=True, ring_bytes=RING_BYTES)
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), mode)

    target.command("write 6")

    hits = decode(drain_all(machine, 1))
    assert len(hits) == 6
    for hit in hits:
        assert hit.chain is not None
        assert hit.chain[:2] == (USER_CONTEXT, hit.ip)
        assert KERNEL_CONTEXT not in hit.chain


@SEES_THE_KERNEL
def test_a_kernel_call_chain_is_apart_from_the_users(machine: LinuxMachine, target: Target) -> None:
    where = the_task(machine, target)
    machine.arm(1, piece(target.variable, "w"), where, Mode(kernel_chain=True, ring_bytes=RING_BYTES))
    machine.arm(2, piece(target.variable, "w"), where, Mode(kernel_chain=True, user_chain=True, ring_bytes=RING_BYTES))

    target.command("copy 1")

    (kernel_only, *_), (both, *_) = decode(drain_all(machine, 1)), decode(drain_all(machine, 2))
    assert kernel_only.chain is not None
    assert kernel_only.chain[0] == KERNEL_CONTEXT
    assert len(kernel_only.chain) > 2
    assert USER_CONTEXT not in kernel_only.chain
    assert both.chain is not None
    assert both.chain[0] == KERNEL_CONTEXT
    assert USER_CONTEXT in both.chain[1:]


def test_nothing_is_unaccounted_for_when_a_ring_of_one_page_is_flooded(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), Mode(ring_bytes=mmap.PAGESIZE))
    did = target.command("write 5000")["did"]  # more than the ring has room for, and nobody reads
    drained, lost = 0, 0

    target.send("write 150000")
    poll = select.poll()
    for fd in machine.descriptors(1):
        poll.register(fd, select.POLLIN)
    while not target.has_answered():
        batch = machine.drain(1, 1000)
        drained, lost = drained + batch.hits, lost + batch.lost
        if not batch.more:
            poll.poll(10)
    did += target.answer()["did"]

    batch, totals = machine.disarm(1)
    drained, lost = drained + batch.hits, lost + batch.lost
    assert totals.hits == did == 155_000
    assert drained + lost == totals.hits
    assert lost == totals.lost
    assert lost >= 5000 - mmap.PAGESIZE // 48


def test_a_loss_is_reported_by_the_next_drain(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), Mode(ring_bytes=mmap.PAGESIZE))
    room = (mmap.PAGESIZE - 1) // 48

    target.command(f"write {room + 100}")

    batch = drain_all(machine, 1)
    assert (batch.hits, batch.lost) == (room, 100)
    target.command("write 10")
    batch = drain_all(machine, 1)
    assert (batch.hits, batch.lost) == (10, 0)


def test_a_ring_goes_round_many_times_without_a_scratch(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), Mode(ring_bytes=mmap.PAGESIZE))
    times: list[int] = []

    for _ in range(60):
        target.command("write 61")
        hits = decode(drain_all(machine, 1))
        assert {(hit.tid, hit.address) for hit in hits} == {(target.tid, target.variable)}
        times += [hit.time_ns for hit in hits]

    assert len(times) == 60 * 61
    assert times == sorted(times)


def test_a_drain_keeps_to_its_budget_and_says_that_there_is_more(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), HITS)
    target.command("write 25")

    batches = [machine.drain(1, 10 * 48 + 47) for _ in range(3)]

    assert [(batch.hits, batch.more) for batch in batches] == [(10, True), (10, True), (5, False)]


@pytest.mark.skipif(len(online_cpus()) < 2, reason="fairness needs two CPUs")
def test_a_busy_cpu_does_not_keep_another_ones_hits_waiting(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), Where(), HITS)
    first, second = online_cpus()[:2]
    for cpu, times in ((first, 2000), (second, 20)):
        os.sched_setaffinity(target.tid, {cpu})
        target.command(f"write {times}")

    hits = decode(machine.drain(1, 40 * 48))

    assert sum(hit.cpu == second for hit in hits) == 20


def test_disarming_hands_over_what_nobody_had_drained(machine: LinuxMachine, target: Target) -> None:
    machine.arm(1, piece(target.variable, "w"), the_task(machine, target), HITS)
    target.command("write 333")

    batch, totals = machine.disarm(1)

    assert (batch.hits, batch.lost, batch.more, totals) == (333, 0, False, Totals(hits=333, lost=0))
    assert len(decode(batch)) == 333
