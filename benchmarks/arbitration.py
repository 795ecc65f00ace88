"""
What a decision costs in the core while others wait, and that it does not grow with them.

Ten or ten thousand claims wait for a thread whose slots are all held; the ratio is to the fewest in the same round.
Each kind of step is taken by itself, on the thread for which they wait and on one that nobody else wants.

In the second table each of them waits for a thread of its own, because CPU 0 is full. What is claimed on CPU 1 has room
beside all of them, and must not cost more for them; but a slot that a CPU-wide claim gives back there comes back to
each of these threads, so each is tried again. That is the one step which grows, with those whom it concerns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.harness import Row, Subject, compare
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Arm, Ended, Queued, Refuse, Suspend
from hwbpd.core.events import (
    AnyEvent,
    Armed,
    ClaimRequested,
    Disarmed,
    ReleaseRequested,
    Suspended,
    YieldRequested,
)
from hwbpd.core.model import Access, Kind, Mode, Owner, Piece, Plan, Pool, Span, Target, Task, Totals
from hwbpd.core.policy import NS_PER_S, Policy

WAITERS = (10, 1_000, 10_000)
SLOTS = 4
CPUS = 8
TIMES_PER_ROUND = 50
WAITS_UNTIL_NS = 10**6 * NS_PER_S
OWNER = Owner(session_id=1, pid=812, uid=0, gid=0, comm="bench")

BUSY, QUIET = Target(task=Task(1000, 1)), Target(task=Task(1001, 1))
FULL_CPU, FREE_CPU, QUIET_THERE = Target(cpus=(0,)), Target(cpus=(1,)), Target(task=Task(1001, 1), cpus=(1,))


class Host:
    """An arbiter, and the shell's part in it: what it orders is done at once."""

    def __init__(self) -> None:
        self.arbiter = Arbiter({Pool.ANY: SLOTS}, range(CPUS), range(CPUS), policy=Policy(reserve_slots=1))
        self._requests = 0
        self.held: dict[Target, list[int]] = {}  # the claims of a target that are to be released next, oldest first

    def request(self, target: Target, kind: Kind = Kind.PERF, *, waits: bool = False) -> ClaimRequested:
        """A claim for one slot, on an address that nobody else asks for: else it would share."""
        self._requests += 1
        span = Span(8 * self._requests, 8)
        plan = Plan((Piece(span, Access.WRITE, Pool.ANY),))
        until_ns = WAITS_UNTIL_NS if waits else 0
        return ClaimRequested(
            0, OWNER, self._requests, kind, span, Access.WRITE, Mode(), target, "", plan, 0, True, 0, until_ns
        )

    def release(self, claim_id: int) -> ReleaseRequested:
        return ReleaseRequested(0, OWNER, 0, claim_id, False)

    def take(self, target: Target, kind: Kind = Kind.PERF) -> int:
        """Bring a claim to its grant; return its id."""
        (order,) = self.arbiter.step(self.request(target, kind))
        assert isinstance(order, Arm), order
        self.arbiter.step(Armed(0, order.claim.claim_id))
        return order.claim.claim_id

    def fill(self, target: Target) -> None:
        self.held[target] = [self.take(target) for _ in range(SLOTS - 1)]

    def wait(self, target: Target) -> None:
        (answer, *_) = self.arbiter.step(self.request(target, waits=True))
        assert isinstance(answer, Queued), answer

    def arm_of(self, event: AnyEvent) -> int:
        """Step an event after which one claim is armed; return its id."""
        (order,) = [effect for effect in self.arbiter.step(event) if isinstance(effect, Arm)]
        self.arbiter.step(Armed(0, order.claim.claim_id))
        return order.claim.claim_id


def busy_host(waiters: int) -> Host:
    """A thread has no room, and so many wait for it."""
    host = Host()
    host.fill(BUSY)
    for _ in range(waiters):
        host.wait(BUSY)
    return host


def scattered_host(waiters: int) -> Host:
    """CPU 0 has no room, and for each of so many threads one waits that might run there."""
    host = Host()
    host.fill(FULL_CPU)
    for number in range(waiters):
        host.wait(Target(task=Task(2000 + number, 1)))
    return host


# --- one sort of step ------------------------------------------------------------------------------------------------
# Each is one round: nanoseconds per operation, and the host as it was before.


def refused_on(host: Host) -> float:
    """A claim for the thread for which the others wait, that does not wait."""
    asked = [host.request(BUSY) for _ in range(TIMES_PER_ROUND)]
    start = time.perf_counter_ns()
    answers = [host.arbiter.step(event)[0] for event in asked]
    elapsed = time.perf_counter_ns() - start
    assert all(isinstance(answer, Refuse) for answer in answers), answers
    return elapsed / TIMES_PER_ROUND


def queued_on(host: Host) -> float:
    """One that does."""
    asked = [host.request(BUSY, waits=True) for _ in range(TIMES_PER_ROUND)]
    start = time.perf_counter_ns()
    answers = [host.arbiter.step(event)[0] for event in asked]
    elapsed = time.perf_counter_ns() - start
    for answer in answers:
        assert isinstance(answer, Queued), answer
        host.arbiter.step(host.release(answer.claim.claim_id))
    return elapsed / TIMES_PER_ROUND


def given_up_on(host: Host) -> float:
    """The last in the queue leaves it."""
    total_ns = 0
    for _ in range(TIMES_PER_ROUND):
        (answer, *_) = host.arbiter.step(host.request(BUSY, waits=True))
        assert isinstance(answer, Queued), answer
        event = host.release(answer.claim.claim_id)
        start = time.perf_counter_ns()
        (ended,) = host.arbiter.step(event)
        total_ns += time.perf_counter_ns() - start
        assert isinstance(ended, Ended), ended
    return total_ns / TIMES_PER_ROUND


def granted_on(host: Host) -> float:
    """A slot is released, and the first in the queue has it: four steps."""
    total_ns = 0
    held = host.held[BUSY]
    for _ in range(TIMES_PER_ROUND):
        claim_id = held.pop(0)
        event = host.release(claim_id)
        start = time.perf_counter_ns()
        host.arbiter.step(event)
        next_id = host.arm_of(Disarmed(0, claim_id, Totals()))
        total_ns += time.perf_counter_ns() - start
        held.append(next_id)
        host.wait(BUSY)
    return total_ns / TIMES_PER_ROUND


def displaced_on(host: Host) -> float:
    """A claim of higher rank takes a slot of a lower one, which yields: four steps."""
    total_ns = 0
    for _ in range(TIMES_PER_ROUND):
        event = host.request(BUSY, Kind.PTRACE)
        start = time.perf_counter_ns()
        (revoke,) = host.arbiter.step(event)
        victim = revoke.claim.claim_id  # type: ignore[union-attr]  # a Tell, or the next step fails
        orders = host.arbiter.step(YieldRequested(0, OWNER, 0, victim))
        higher = host.arm_of(Suspended(0, victim))
        total_ns += time.perf_counter_ns() - start
        assert isinstance(orders[0], Suspend), orders
        host.arbiter.step(host.release(higher))
        resumed = host.arm_of(Disarmed(0, higher, Totals()))
        assert resumed == victim
    return total_ns / TIMES_PER_ROUND


def taken_on(host: Host, target: Target = QUIET) -> float:
    """A claim for what nobody waits for, to its grant: two steps."""
    total_ns = 0
    for _ in range(TIMES_PER_ROUND):
        start = time.perf_counter_ns()
        claim_id = host.take(target)
        total_ns += time.perf_counter_ns() - start
        host.arbiter.step(host.release(claim_id))
        host.arbiter.step(Disarmed(0, claim_id, Totals()))
    return total_ns / TIMES_PER_ROUND


def let_go_on(host: Host) -> float:
    """A CPU-wide claim is over, and nobody has room for that: two steps."""
    claim_id = host.take(FREE_CPU)
    start = time.perf_counter_ns()
    host.arbiter.step(host.release(claim_id))
    effects = host.arbiter.step(Disarmed(0, claim_id, Totals()))
    elapsed = time.perf_counter_ns() - start
    assert isinstance(effects[-1], Ended), effects
    return elapsed


def taken_once_on(host: Host) -> float:
    """A CPU-wide claim, to its grant: two steps."""
    start = time.perf_counter_ns()
    claim_id = host.take(FREE_CPU)
    elapsed = time.perf_counter_ns() - start
    host.arbiter.step(host.release(claim_id))
    host.arbiter.step(Disarmed(0, claim_id, Totals()))
    return elapsed


SteppedOn = tuple[str, Callable[[Host], float]]
ONE_THREAD: tuple[SteppedOn, ...] = (
    ("refused", refused_on),
    ("queued", queued_on),
    ("gives up", given_up_on),
    ("released, next granted", granted_on),
    ("displaced", displaced_on),
    ("unrelated, granted", taken_on),
)
THREADS_EACH: tuple[SteppedOn, ...] = (
    ("another thread, granted", partial(taken_on, target=QUIET_THERE)),
    ("another CPU, granted", taken_once_on),
    ("another CPU, released", let_go_on),
)


def by_waiters(steps: Sequence[SteppedOn], hosts: Sequence[tuple[int, Host]]) -> list[Subject]:
    """:param hosts: how many wait, and where; the fewest first."""
    subjects = []
    for what, measure in steps:
        names = [f"{what}: {f'{waiters:,}'.replace(',', ' ')} wait" for waiters, _ in hosts]
        for name, (_, host) in zip(names, hosts, strict=True):
            subjects.append(Subject(name, partial(measure, host), "" if name == names[0] else names[0]))
    return subjects


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """Return a table for those who wait for one thread, and one for those who wait for a thread each."""
    busy = [(waiters, busy_host(waiters)) for waiters in WAITERS]
    scattered = [(waiters, scattered_host(waiters)) for waiters in WAITERS]
    return [
        ("the core, by claims that wait for one thread", compare(by_waiters(ONE_THREAD, busy), rounds)),
        ("the core, by claims that wait for a thread each", compare(by_waiters(THREADS_EACH, scattered), rounds)),
    ]
