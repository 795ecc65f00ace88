"""
What one step of the core costs, and that it does not grow with the host.

A round is many whole lives of a claim, requested, armed, released and disarmed, on an arbiter that holds others
already, or one sort of step alone. Claims for a thread or for one CPU must be flat in the number of live claims and in
the number of CPUs: the ratio is to the smallest host in the same round, and below 2 is what the design promises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.harness import Row, Subject, compare
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Arm, Disarm, Refuse
from hwbpd.core.events import Armed, ClaimRequested, Disarmed, HitsCounted, ReleaseRequested
from hwbpd.core.model import Access, Kind, Mode, Owner, Piece, Plan, Pool, Span, Target, Task, Totals

STEPS_PER_LIFE = 4
LIVES_PER_ROUND = 500
SLOTS = 4

SPANS = [Span(0x404040 + 8 * number, 8) for number in range(SLOTS + 1)]  # equal claims would share one slot
PLANS = [Plan((Piece(span, Access.WRITE, Pool.ANY),)) for span in SPANS]
MODE = Mode()
OWNER = Owner(session_id=1, pid=812, uid=0, gid=0, comm="bench")


def a_thread(number: int) -> Target:
    return Target(task=Task(tid=1000 + number, start_ticks=number))


ONE_CPU = Target(cpus=(1,))
NEW_THREAD = a_thread(-1)


def request(target: Target, request_id: int, place: int = 0) -> ClaimRequested:
    """:param place: which of ``SPANS``."""
    span, plan = SPANS[place], PLANS[place]
    return ClaimRequested(request_id, OWNER, request_id, Kind.PERF, span, Access.WRITE, MODE, target, "", plan)


def hold(arbiter: Arbiter, target: Target, request_id: int, place: int = 0) -> int:
    """Take the arbiter through the first half of a claim's life; return its id."""
    (order,) = arbiter.step(request(target, request_id, place))
    assert isinstance(order, Arm), order
    arbiter.step(Armed(request_id, order.claim.claim_id))
    return order.claim.claim_id


def let_go(arbiter: Arbiter, claim_id: int, request_id: int) -> None:
    """And through the second."""
    (order,) = arbiter.step(ReleaseRequested(request_id, OWNER, request_id, claim_id, False))
    assert isinstance(order, Disarm), order
    arbiter.step(Disarmed(request_id, claim_id, Totals()))


def a_host(live_threads: int, cpus: int) -> Arbiter:
    """An arbiter of that many CPUs on which each of so many threads has one claim."""
    arbiter = Arbiter({Pool.ANY: SLOTS}, range(cpus), range(cpus))
    for number in range(live_threads):
        hold(arbiter, a_thread(number), number)
    return arbiter


def lives_on(arbiter: Arbiter, target: Target) -> Callable[[], float]:
    """Return the measurement of one round: nanoseconds per step."""

    def measure_ns() -> float:
        start = time.perf_counter_ns()
        for number in range(LIVES_PER_ROUND):
            let_go(arbiter, hold(arbiter, target, number), number)
        return (time.perf_counter_ns() - start) / (LIVES_PER_ROUND * STEPS_PER_LIFE)

    return measure_ns


# --- one sort of step ------------------------------------------------------------------------------------------------


def claims_on(arbiter: Arbiter) -> float:
    """Return nanoseconds for a claim from its request to the grant, the two steps of it."""
    total_ns = 0
    for number in range(LIVES_PER_ROUND):
        start = time.perf_counter_ns()
        claim_id = hold(arbiter, NEW_THREAD, number)
        total_ns += time.perf_counter_ns() - start
        let_go(arbiter, claim_id, number)
    return total_ns / LIVES_PER_ROUND


def releases_on(arbiter: Arbiter) -> float:
    """The same for its other half."""
    total_ns = 0
    for number in range(LIVES_PER_ROUND):
        claim_id = hold(arbiter, NEW_THREAD, number)
        start = time.perf_counter_ns()
        let_go(arbiter, claim_id, number)
        total_ns += time.perf_counter_ns() - start
    return total_ns / LIVES_PER_ROUND


def hits_on(arbiter: Arbiter) -> float:
    """Return nanoseconds for the news that a claim without a guard has had hits."""
    (order,) = arbiter.step(request(NEW_THREAD, 0))
    assert isinstance(order, Arm), order
    arbiter.step(Armed(0, order.claim.claim_id))
    resource_id = order.resources[0].resource_id
    start = time.perf_counter_ns()
    for number in range(LIVES_PER_ROUND):
        arbiter.step(HitsCounted(number, resource_id, 1, 0))
    elapsed = time.perf_counter_ns() - start
    let_go(arbiter, order.claim.claim_id, 0)
    return elapsed / LIVES_PER_ROUND


def refusals_on(arbiter: Arbiter) -> float:
    """Return nanoseconds for a claim on a thread that has no slot left; the refusal names all who hold them."""
    held = [hold(arbiter, NEW_THREAD, number, number) for number in range(SLOTS)]
    start = time.perf_counter_ns()
    for number in range(LIVES_PER_ROUND):
        (refusal,) = arbiter.step(request(NEW_THREAD, number, SLOTS))
    elapsed = time.perf_counter_ns() - start
    assert isinstance(refusal, Refuse), refusal
    assert len(refusal.error.holders) > 0, refusal
    for claim_id in held:
        let_go(arbiter, claim_id, 0)
    return elapsed / LIVES_PER_ROUND


STEPS: tuple[tuple[str, Callable[[Arbiter], float]], ...] = (
    ("claim to grant", claims_on),
    ("release to end", releases_on),
    ("hits counted", hits_on),
    ("refusal", refusals_on),
)


def by_step(hosts: Sequence[tuple[int, Arbiter]]) -> list[Subject]:
    """:param hosts: how many live claims, and the arbiter that holds them; the smallest first."""
    subjects = []
    for what, measure in STEPS:
        names = [f"{what}: {live:,} live claims".replace(",", " ") for live, _ in hosts]
        for name, (_, arbiter) in zip(names, hosts, strict=True):
            floor = "" if name == names[0] else names[0]
            subjects.append(Subject(name, partial(measure, arbiter), floor))
    return subjects


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """Return a titled table for each way in which a host can be large, and one for each sort of step."""
    by_claims = [(live, a_host(live, cpus=64)) for live in (10, 1_000, 100_000)]
    by_cpus = [(cpus, a_host(1_000, cpus)) for cpus in (2, 64, 4096)]
    tables = []
    for what, sizes in (("live claims, 64 CPUs", by_claims), ("CPUs, 1 000 live claims", by_cpus)):
        subjects = []
        for who, target in (("thread", NEW_THREAD), ("one CPU", ONE_CPU)):
            names = [f"{who}: {size:,} {what}".replace(",", " ", f"{size:,}".count(",")) for size, _ in sizes]
            for name, (_, arbiter) in zip(names, sizes, strict=True):
                floor = "" if name == names[0] else names[0]
                subjects.append(Subject(name, lives_on(arbiter, target), floor))
        tables.append((f"one step of the core, by {what.split(',')[0]}", compare(subjects, rounds)))
    tables.append(("the steps of the core, by live claims", compare(by_step(by_claims), rounds)))
    return tables
