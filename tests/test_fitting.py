"""From a request to what the core decides on: what is filled in, and what is refused before anything is counted."""

from __future__ import annotations

import mmap
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd import fitting
from hwbpd.core.errors import BadClaim, HwbpError, LimitReached, NotPermitted, TargetGone
from hwbpd.core.model import Access, ArmedBy, Delivery, Kind, Mode, Piece, Plan, Pool, Span, Target
from hwbpd.fitting import Fitted
from hwbpd.hookspecs import Backend
from hwbpd.messages import ClaimRequest
from hwbpd.plugins import Plugins
from hwbpd.settings import Guard, Rings, Settings
from tests.fakes import FakeBackend, FakeMachine

RINGS = Rings(bytes_default=2**16, bytes_max=2**20)
USUAL = 500  # hits a second
TID = 812


class PickyBackend(FakeBackend):
    """Slots that can hold nothing."""

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        raise BadClaim("DR0-DR3 hold nothing")


def fit(
    picky: bool = False,
    piece_bytes: int = 0,
    privileged: bool = True,
    usual: int = USUAL,
    backend: Backend | None = None,
    **fields: Any,
) -> Fitted:
    """Fit a wish for eight bytes, changed by ``fields``, on a machine with one process of two threads."""
    machine = FakeMachine({Pool.ANY: 4}, 4, random.Random(0))
    machine.start_task(TID)
    machine.start_task(TID + 1)
    backend = backend or (PickyBackend if picky else FakeBackend)({Pool.ANY: 4}, piece_bytes)
    asked: dict[str, Any] = {"id": 5, "epoch": 1, "address": 0x404040, "length": 8, "access": "w", **fields}
    settings = Settings(rings=RINGS, guard=Guard(hits_per_s=usual))
    return fitting.fit(
        ClaimRequest(**asked), privileged=privileged, machine=machine, backend=backend, settings=settings
    )


def test_a_wish_comes_down_to_what_it_asks_for() -> None:
    fitted = fit(tid=TID, cpus=[3, 1, 3], kernel=False, user_chain=True, across_exec=True)

    assert (fitted.span, fitted.access) == (Span(0x404040, 8), Access.WRITE)
    assert fitted.mode == Mode(
        kernel=False, user_chain=True, ring_bytes=RINGS.bytes_default, across_exec=True, fuse_hits=USUAL
    )
    assert fitted.target.task is not None
    assert (fitted.target.task.tid, fitted.target.cpus, fitted.target.process) == (TID, (1, 3), None)
    assert fitted.plan == Plan((Piece(Span(0x404040, 8), Access.WRITE, Pool.ANY),))
    assert fitted.guard_per_s == USUAL


def test_a_process_is_asked_for_by_its_number() -> None:
    target = fit(pid=TID).target

    assert (target.task, target.cpus) == (None, None)
    assert target.process is not None
    assert target.process.pid == TID


def test_of_cpu_wide_hits_those_of_one_process_can_be_asked_for() -> None:
    assert (fit(only_pid=4711).mode.only_pid, fit(only_pid=4711, cpus=[1]).target) == (4711, Target(cpus=(1,)))
    assert fit().mode.only_pid == 0


# --- where the kernel runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("privileged", [True, False])
def test_where_the_kernel_runs_is_hidden_from_who_sees_its_hits_without_privileges(
    privileged: bool, kernel: bool
) -> None:
    assert fit(privileged=privileged, kernel=kernel).mode.hide_kernel is (kernel and not privileged)


def test_call_chains_of_the_kernel_are_for_the_privileged() -> None:
    assert fit(kernel_chain=True).mode.kernel_chain
    assert fit(privileged=False, user_chain=True).mode.user_chain
    with pytest.raises(NotPermitted, match="kernel call chains are for root only"):
        fit(privileged=False, kernel_chain=True)


# --- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("privileged", [True, False])
def test_who_does_not_mention_the_guard_gets_the_usual_one(privileged: bool) -> None:
    fitted = fit(privileged=privileged)

    assert (fitted.guard_per_s, fitted.mode.fuse_hits) == (USUAL, USUAL)


@pytest.mark.parametrize(
    ("asked", "privileged", "usual", "is_given"),
    [
        (1, False, USUAL, True),
        (USUAL, False, USUAL, True),
        (USUAL + 1, False, USUAL, False),
        (0, False, USUAL, False),
        (USUAL + 1, True, USUAL, True),
        (0, True, USUAL, True),
        (10**9, False, 0, True),
        (0, False, 0, True),
    ],
)
def test_more_than_the_usual_guard_or_none_is_for_the_privileged(
    asked: int, privileged: bool, usual: int, is_given: bool
) -> None:
    if is_given:
        fitted = fit(guard=asked, privileged=privileged, usual=usual)
        assert (fitted.guard_per_s, fitted.mode.fuse_hits) == (asked, asked)
        return
    with pytest.raises(LimitReached) as refused:
        fit(guard=asked, privileged=privileged, usual=usual)
    assert f"at most {usual} (guard.hits_per_s)" in str(refused.value)
    assert f"{asked} hits a second" in str(refused.value) or (not asked and "no bound" in str(refused.value))


def test_a_slot_that_is_only_held_has_no_fuse() -> None:
    assert fit(delivery=Delivery.HOLD).mode.fuse_hits == 0
    assert fit(delivery=Delivery.HOLD, guard=7).mode.fuse_hits == 0


def test_hits_beside_the_span_are_for_those_who_accept_them_or_compare_values() -> None:
    assert not fit().mode.over_report
    assert fit(over_report=True).mode.over_report

    # A debugger that stops at each write sees what has changed. Of a read there is nothing to see, and others may not
    # look.
    tracer: dict[str, Any] = {"tid": TID, "armed_by": ArmedBy.TRACER}
    assert fit(**tracer, kind=Kind.PTRACE).mode.over_report
    assert not fit(**tracer, kind=Kind.PTRACE, access="rw").mode.over_report
    assert not fit(**tracer, kind=Kind.PERF).mode.over_report
    assert not fit(tid=TID, kind=Kind.PTRACE).mode.over_report


def test_what_one_slot_cannot_hold_is_cut_by_the_backend() -> None:
    fitted = fit(length=20, piece_bytes=8)

    assert fitted.span == Span(0x404040, 20)
    assert [piece.span.length_bytes for piece in fitted.plan.pieces] == [8, 8, 4]


def test_without_a_thread_and_cpus_a_claim_is_for_every_cpu() -> None:
    assert fit().target == Target()


def test_to_see_only_the_kernel_or_only_the_user_is_something_to_see() -> None:
    assert (fit(user=False).mode.user, fit(user=False).mode.kernel) == (False, True)
    assert (fit(kernel=False).mode.user, fit(kernel=False).mode.kernel) == (True, False)


@pytest.mark.parametrize("delivery", [Delivery.COUNT, Delivery.HOLD])
def test_who_wants_no_hits_gets_no_ring(delivery: Delivery) -> None:
    fuse_hits = USUAL if delivery is Delivery.COUNT else 0
    assert fit(delivery=delivery).mode == Mode(delivery=delivery, ring_bytes=0, fuse_hits=fuse_hits)


@pytest.mark.parametrize(
    ("fields", "refusal", "says"),
    [
        ({"tid": 4711}, TargetGone, "4711"),
        ({"pid": 4711}, TargetGone, "4711"),
        ({"pid": TID, "tid": TID}, BadClaim, "does not go with tid or cpus"),
        ({"pid": TID, "cpus": [0]}, BadClaim, "does not go with tid or cpus"),
        ({"only_pid": 5, "pid": TID}, BadClaim, "does not go with pid, tid or mere counts"),
        ({"only_pid": 5, "tid": TID}, BadClaim, "does not go with pid, tid or mere counts"),
        ({"only_pid": 5, "delivery": Delivery.COUNT}, BadClaim, "does not go with pid, tid or mere counts"),
        ({"only_pid": 5, "delivery": Delivery.HOLD}, BadClaim, "does not go with pid, tid or mere counts"),
        ({"cpus": []}, BadClaim, "at least one cpu"),
        ({"user": False, "kernel": False}, BadClaim, "neither user nor kernel"),
        ({"delivery": Delivery.COUNT, "user_chain": True}, BadClaim, "brings none; ask for 'hits'"),
        ({"delivery": Delivery.HOLD, "kernel_chain": True}, BadClaim, "brings none; ask for 'hits'"),
        ({"delivery": Delivery.COUNT, "ring_bytes": 4096}, BadClaim, "leave ring_bytes out"),
        ({"ring_bytes": 2**20 + 1}, LimitReached, f"{2**20} (rings.bytes_max)"),
        ({"picky": True}, BadClaim, "DR0-DR3 hold nothing"),
    ],
)
def test_what_could_never_work_is_refused_and_says_why(
    fields: dict[str, Any], refusal: type[HwbpError], says: str
) -> None:
    with pytest.raises(HwbpError) as refused:
        fit(**fields)

    assert type(refused.value) is refusal
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("cpu", "address", "taken", "refused", "says"),
    [
        # A 32-bit kernel steps past a hit by a breakpoint of the thread;
        ("cortex-a15", 0x404040, {"tid": TID}, {}, "cpu-wide on these CPUs (EINVAL); of a thread or process it does"),
        ("cortex-a15", 0x404040, {"pid": TID}, {"cpus": [0]}, "mem:0x404040/8:rw: Linux does not take it cpu-wide"),
        # arm64 keeps threads away from the kernel's addresses.
        ("cortex-a72", 0xFFFF_8000_0000_0000, {"cpus": [1]}, {"tid": TID}, "of a thread or process on these CPUs"),
        ("cortex-a72", 0xFFFF_8000_0000_0000, {}, {"tid": TID, "cpus": [0]}, "(EINVAL); cpu-wide it does"),
    ],
)
def test_what_linux_takes_for_one_sort_of_target_only_is_refused_for_the_other(
    cpu: str, address: int, taken: dict[str, Any], refused: dict[str, Any], says: str
) -> None:
    plugins = Plugins()
    backend = plugins.backend(plugins.profiles[cpu])

    assert len(fit(backend=backend, address=address, access="rw", **taken).plan.pieces) == 1

    with pytest.raises(BadClaim) as refusal:
        fit(backend=backend, address=address, access="rw", **refused)
    assert says in str(refusal.value)


@given(st.one_of(st.integers(1, RINGS.bytes_max), st.sampled_from([2**n + d for n in range(21) for d in (-1, 0, 1)])))
def test_a_ring_is_a_power_of_two_pages_or_the_refusal_names_one_that_works(asked: int) -> None:
    def is_a_ring(size: int) -> bool:
        return size in [mmap.PAGESIZE << power for power in range(20)] and size <= RINGS.bytes_max

    if not asked or asked > RINGS.bytes_max:
        return
    if is_a_ring(asked):
        assert fit(ring_bytes=asked).mode.ring_bytes == asked
        return
    with pytest.raises(BadClaim) as refused:
        fit(ring_bytes=asked)
    found = re.search(r"nearest: (\d+)$", str(refused.value))
    assert found is not None
    nearest = int(found[1])
    assert is_a_ring(nearest)
    assert asked < nearest < max(2 * asked, mmap.PAGESIZE + 1), "no smaller ring holds as much"


# --- tracers, priorities, waits --------------------------------------------------------------------------------------


def test_of_what_a_tracer_arms_only_the_place_is_held_here() -> None:
    fitted = fit(tid=TID, armed_by=ArmedBy.TRACER)

    assert fitted.mode == Mode(delivery=Delivery.HOLD)
    assert fitted.target.task is not None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "name a tid"),
        ({"pid": TID}, "name a tid"),
        ({"tid": TID, "cpus": [0]}, "no pid or cpus"),
        ({"tid": TID, "user_chain": True}, "without chain"),
        ({"tid": TID, "kernel_chain": True}, "without chain"),
        ({"tid": TID, "ring_bytes": 4096}, "ring_bytes"),
        ({"tid": TID, "guard": 5}, "guard"),
        ({"tid": TID, "only_pid": 5}, "only_pid"),
        ({"tid": TID, "across_exec": True}, "exec"),
    ],
)
def test_what_a_debug_register_set_by_ptrace_cannot_do_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadClaim, match=says):
        fit(armed_by=ArmedBy.TRACER, **fields)


def test_to_go_before_others_of_its_kind_is_for_the_privileged() -> None:
    assert fit(tid=TID, priority=100)
    assert fit(tid=TID, priority=0, privileged=False)
    assert fit(tid=TID, priority=-100, privileged=False)
    with pytest.raises(NotPermitted, match="priority 1 is for root only"):
        fit(tid=TID, priority=1, privileged=False)


NOW_NS = 5_000_000_000


def waits_until_ns(until_ns: int, most_s: float = 60) -> int:
    request = ClaimRequest(1, epoch=1, address=0, length=1, access="w", wait_until_ns=until_ns)
    return fitting.wait_until_ns(request, NOW_NS, most_s)


@pytest.mark.parametrize("until_ns", [0, 1, NOW_NS - 1, NOW_NS])
def test_a_wait_until_a_time_that_has_come_is_none(until_ns: int) -> None:
    assert waits_until_ns(until_ns) == 0


def test_a_wait_is_bounded_and_what_is_longer_is_refused_with_the_setting() -> None:
    assert waits_until_ns(NOW_NS + 1) == NOW_NS + 1
    assert waits_until_ns(NOW_NS + 60 * 10**9) == NOW_NS + 60 * 10**9

    with pytest.raises(BadClaim, match=r"61 s is more than the 60 s of this daemon \(policy.wait_max_s\)"):
        waits_until_ns(NOW_NS + 61 * 10**9)
