"""What a look tells, and what two of them tell: claims as rows, with rates, in an order, one of them selected."""

from __future__ import annotations

import pytest

from hwbpctl.top_model import ORDERS, Row, index_of, moved, next_order, rows_of
from tests.clients.fake_daemon import CLAIM_ROW
from tests.clients.rows import held, queued_row, slots_of

SECOND_NS = 10**9


def test_a_rate_is_the_hits_between_two_looks_over_the_time_that_the_daemon_saw_pass() -> None:
    # Given a claim that had 100 hits, and half a second of the daemon's time later has 150,
    before = slots_of([], held(1, hits=100, age_ns=8 * SECOND_NS))
    now = slots_of([], held(1, hits=150, age_ns=8 * SECOND_NS + SECOND_NS // 2), held(2, hits=30, age_ns=3 * SECOND_NS))

    # then it has a rate, one that is new has that of its whole life, and with one look nobody has any.
    assert [row.hits_per_s for row in rows_of(now, before)] == [100.0, 10.0]
    assert [row.hits_per_s for row in rows_of(now, None)] == [None, None]
    assert [row.hits_per_s for row in rows_of(now, now)] == [None, None]


def test_a_claim_of_several_slots_is_one_row_with_the_hits_of_all() -> None:
    # Given two slots of one claim, side by side, and a rider on one of them,
    first = held(1, tid=0, address=0x1000, hits=3, lost=1, dropped=5)
    second = held(1, tid=0, address=0x1008, hits=4, lost=2, dropped=5) | {"resource": 2}
    first["claims"] = [*first["claims"], CLAIM_ROW | {"claim": 9, "comm": "lldb"}]

    # then hits and losses of the rings add up, and what was dropped is told once for the claim.
    both, rider = rows_of(slots_of([], first, second), None)
    assert (both.claim, both.span, both.hits, both.lost, both.dropped) == (1, "0x1000/16:w", 7, 3, 5)
    assert (rider.claim, rider.owner, rider.span) == (9, "lldb[812]", "0x1000/8:w")


@pytest.mark.parametrize(
    ("changes", "target", "span", "state"),
    [
        ({"tid": 0}, "all cpus", "0x404040/8:w", "armed"),
        ({"tid": 0, "cpus": [0, 1, 4]}, "cpu 0-1,4", "0x404040/8:w", "armed"),
        ({"cpus": [2], "user": False}, "tid 813 cpu 2", "0x404040/8:w:k", "armed"),
        ({"kernel": False, "delivery": "hold"}, "tid 813", "0x404040/8:w:u", "held"),
        ({"delivery": "hold", "state": "suspended"}, "tid 813", "0x404040/8:w", "suspended"),
        ({"address": None}, "tid 813", "-/8:w", "armed"),
    ],
)
def test_a_row_says_where_and_what(changes: dict[str, object], target: str, span: str, state: str) -> None:
    (row,) = rows_of(slots_of([], held(1, **changes)), None)
    assert (row.target, row.span, row.state) == (target, span, state)


def test_a_process_is_named_by_its_pid() -> None:
    (row,) = rows_of(slots_of([], held(1, tid=0) | {"pid": 812}), None)
    assert row.target == "pid 812"


def test_a_claim_that_waits_is_a_row_without_hits_and_with_a_place() -> None:
    waiting = [queued_row(9, blockers=[1, 4], position=2), queued_row(2, state="suspended", target="cpu-wide on cpu 1")]
    armed, suspended, behind = rows_of(slots_of([], held(1), waiting=waiting), None)
    assert (armed.claim, armed.position, armed.hits) == (1, 0, 3)
    assert (suspended.claim, suspended.state, suspended.target, suspended.hits) == (2, "suspended", "cpu 1", None)
    assert (behind.claim, behind.position, behind.blockers, behind.span) == (9, 2, (1, 4), "0x404048/8:w")


def test_a_claim_that_was_suspended_has_no_rate_in_the_look_in_which_it_is_back() -> None:
    # Given 1000 hits from before it gave way, then they are no rate of now.
    before = slots_of([], waiting=[queued_row(1, state="suspended", age_ns=8 * SECOND_NS)])
    (row,) = rows_of(slots_of([], held(1, hits=1000, age_ns=9 * SECOND_NS)), before)
    assert (row.hits, row.hits_per_s) == (1000, None)


def rows(*claims: int) -> list[Row]:
    return rows_of(slots_of([], *(held(claim, tid=900 - claim, hits=claim) for claim in claims)), slots_of([]))


def test_orders_follow_each_other_and_put_what_matters_first() -> None:
    assert [next_order(name) for name in ORDERS] == ["rate", "owner", "target", "claim"]
    fast_first = sorted(rows(1, 2, 3), key=ORDERS["rate"])
    assert [row.claim for row in fast_first] == [3, 2, 1]
    assert [row.claim for row in sorted(rows(1, 2, 3), key=ORDERS["target"])] == [3, 2, 1]


def test_the_selection_stays_with_its_claim_and_within_the_rows() -> None:
    assert moved([], 5, 1) == 0
    assert [moved(rows(1, 2, 3), 2, by) for by in (-10, -1, 0, 1, 10)] == [1, 1, 2, 3, 3]

    # When the selected claim is gone, then the one that took its row is selected.
    assert moved(rows(1, 3, 4), 2, 0, at=1) == 3
    assert moved(rows(1), 3, 0, at=2) == 1
    assert index_of(rows(1, 3), 3) == 1
