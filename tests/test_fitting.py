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
from hwbpd.core.errors import BadClaim, HwbpError, LimitReached, TargetGone
from hwbpd.core.events import ClaimRequested
from hwbpd.core.model import Access, Delivery, Kind, Mode, Piece, Plan, Pool, Span, Target
from hwbpd.messages import ClaimRequest
from hwbpd.settings import Rings
from tests import strategies
from tests.fakes import FakeBackend, FakeMachine

RINGS = Rings(bytes_default=2**16, bytes_max=2**20)
OWNER = strategies.owner(0)
TID = 812


class PickyBackend(FakeBackend):
    """Slots that can hold nothing."""

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        raise BadClaim("DR0-DR3 hold nothing")


def fit(picky: bool = False, piece_bytes: int = 0, **fields: Any) -> ClaimRequested:
    """Fit a claim for eight bytes, changed by ``fields``, on a machine with one thread."""
    machine = FakeMachine({Pool.ANY: 4}, 4, random.Random(0))
    machine.start_task(TID)
    backend = (PickyBackend if picky else FakeBackend)({Pool.ANY: 4}, piece_bytes)
    asked: dict[str, Any] = {"id": 5, "epoch": 1, "address": 0x404040, "length": 8, "access": "w", **fields}
    return fitting.claim_requested(ClaimRequest(**asked), OWNER, 77, machine=machine, backend=backend, rings=RINGS)


def test_a_request_becomes_the_event_it_asks_for() -> None:
    event = fit(tid=TID, cpus=[3, 1, 3], kind=Kind.PTRACE, label="the list", kernel=False, user_chain=True)

    assert (event.now_ns, event.owner, event.request_id) == (77, OWNER, 5)
    assert (event.span, event.access, event.kind, event.label) == (
        Span(0x404040, 8),
        Access.WRITE,
        Kind.PTRACE,
        "the list",
    )
    assert event.mode == Mode(kernel=False, user_chain=True, ring_bytes=RINGS.bytes_default)
    assert event.target.task is not None
    assert (event.target.task.tid, event.target.cpus) == (TID, (1, 3))
    assert event.plan == Plan((Piece(Span(0x404040, 8), Access.WRITE, Pool.ANY),))


def test_what_one_slot_cannot_hold_is_cut_by_the_backend() -> None:
    event = fit(length=20, piece_bytes=8)

    assert event.span == Span(0x404040, 20)
    assert [piece.span.length_bytes for piece in event.plan.pieces] == [8, 8, 4]


def test_without_a_thread_and_cpus_a_claim_is_for_every_cpu() -> None:
    assert fit().target == Target()


def test_to_see_only_the_kernel_or_only_the_user_is_something_to_see() -> None:
    assert (fit(user=False).mode.user, fit(user=False).mode.kernel) == (False, True)
    assert (fit(kernel=False).mode.user, fit(kernel=False).mode.kernel) == (True, False)


@pytest.mark.parametrize("delivery", [Delivery.COUNT, Delivery.HOLD])
def test_who_wants_no_hits_gets_no_ring(delivery: Delivery) -> None:
    assert fit(delivery=delivery).mode == Mode(delivery=delivery, ring_bytes=0)


@pytest.mark.parametrize(
    ("fields", "refusal", "says"),
    [
        ({"tid": 4711}, TargetGone, "4711"),
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
