"""Answers as people read them, at 80 columns, and as programs do."""

from __future__ import annotations

import json
from typing import Any

import pytest

import hwbp
from hwbp.errors import refusal_of
from hwbp.values import cpus_of, resources_of, value_of
from hwbpctl import render
from tests.clients.fake_daemon import CAPABILITIES, CLAIM_ROW, RESOURCE_ROW


def cpu(number: int, wide: int = 0, task: int = 0, online: bool = True) -> dict[str, Any]:
    used = {"cpu_wide": {"any": wide}, "busiest_task": {"any": task}}
    return {"cpu": number, "online": online} | used


def slots_of(cpus: list[dict[str, Any]], *resources: dict[str, Any], pools: dict[str, int] | None = None) -> hwbp.Slots:
    return hwbp.Slots(pools or {"any": 4}, cpus_of(cpus), resources_of(resources))


def held(number: int, **changes: Any) -> dict[str, Any]:
    """A resource with one claim of the same number; ``changes`` may be to either."""
    claim = CLAIM_ROW | {"claim": number} | {name: each for name, each in changes.items() if name in CLAIM_ROW}
    resource = {name: each for name, each in changes.items() if name in RESOURCE_ROW}
    return RESOURCE_ROW | {"resource": number, "claims": [claim]} | resource


def lines(text: str) -> str:
    """A golden text as it stands in the test, without the line breaks around it."""
    return text.strip("\n")


# --- ls --------------------------------------------------------------------------------------------------------------


def test_slots_are_shown_under_their_cpus_and_tasks() -> None:
    # Given claims on all CPUs, on one, and on a thread, and a CPU that is offline,
    value = slots_of(
        [cpu(0, 1, 1), cpu(1, 2, 1), cpu(2, 1, 1), cpu(3, online=False)],
        held(3, tid=0, comm="perf", kind="perf", address=0xFFFFFFFF81234567, access="x", user=False, hits=1234567),
        held(4, tid=0, cpus=[1], pid=4000001, comm="hwbpctl", kind="perf", delivery="hold", age_ns=4 * 86400 * 10**9),
        held(12, pid=812, tid=813, uid=1000, hits=99999, length=4, access="rw"),
    )

    # then CPUs that look alike share their lines, and nothing is wider than a terminal.
    assert render.slots(value) == lines("""
  CLAIM OWNER             UID KIND   SPAN                 ACC   AGE  HITS STATE
cpu 0,2: 2 of 4 slots free (1 cpu-wide, 1 on the busiest task)
      3 perf[812]           0 perf   0xffffffff81234567/8 x:k 1m05s 1234k armed
cpu 1: 1 of 4 slots free (2 cpu-wide, 1 on the busiest task)
      3 perf[812]           0 perf   0xffffffff81234567/8 x:k 1m05s 1234k armed
      4 hwbpctl[4000001]    0 perf   0x404040/8           w   4d00h     3 held
cpu 3: offline
tid 813: 1 slot
     12 gdb[812]         1000 ptrace 0x404040/4           rw  1m05s 99999 armed
""")


def test_without_claims_free_slots_are_shown() -> None:
    assert render.slots(slots_of([cpu(number) for number in range(256)])) == "cpu 0-255: 4 of 4 slots free"


def test_pools_of_an_arm_cpu_are_told_apart() -> None:
    row = {"cpu": 0, "online": True, "cpu_wide": {"inst": 1, "data": 0}, "busiest_task": {"inst": 2, "data": 0}}
    assert render.slots(slots_of([row], pools={"inst": 6, "data": 4})) == (
        "cpu 0: 3 of 6 inst slots free (1 cpu-wide, 2 on the busiest task); 4 of 4 data slots free"
    )


def test_a_task_on_some_cpus_and_riders_of_one_slot_have_their_own_lines() -> None:
    resource = held(1, cpus=[0, 1, 2]) | {"claims": [CLAIM_ROW, CLAIM_ROW | {"claim": 2, "comm": "lldb"}]}
    text = render.slots(slots_of([], resource)).splitlines()
    assert text[1] == "tid 813 on cpu 0-2: 1 slot"
    assert [line.split()[:2] for line in text[2:]] == [["1", "gdb[812]"], ["2", "lldb[812]"]]


def test_a_row_that_is_too_wide_gives_up_the_label_first_and_then_the_owners_name() -> None:
    # Given a label that does not fit, then it is cut, and nothing else.
    value = slots_of([], held(1, label="the counter that should not change, ever"))
    (row,) = [line for line in render.slots(value).splitlines() if "gdb" in line]
    assert len(row) == 80
    assert "gdb[812]" in row
    assert row.endswith("~")
    assert " the counter " in row

    # When the rest alone is too wide, then the owner's name gives way, and its pid stays.
    wide = {"comm": "kworker-flusher", "pid": 4194303, "address": 2**64 - 8, "label": "a label"}
    (row,) = [line for line in render.slots(slots_of([], held(12, **wide))).splitlines() if "419" in line]
    assert len(row) <= 80
    assert "  12 kw" in row
    assert "~[4194303]" in row


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (86399, "23h59m"), (90000, "1d01h")],
)
def test_an_age_has_the_units_that_matter(seconds: int, text: str) -> None:
    assert render.age(seconds * 10**9 + 999_999_999) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (99_999, "99999"), (100_000, "100k"), (10**6, "1000k"), (10**7, "10M"), (2**64, "18E")],
)
def test_an_amount_takes_five_columns_at_most(number: int, text: str) -> None:
    assert render.amount(number) == text


# --- the other answers -----------------------------------------------------------------------------------------------


def test_capabilities_say_what_the_registers_can_hold() -> None:
    assert render.capabilities(value_of(hwbp.Capabilities, CAPABILITIES)) == lines("""
machine        fake
backend        x86 (x86_64)
slots per cpu  4
cpus           0-1 online, 0-1 possible
w              1, 2, 4, 8 bytes, 4 if none is given; reported after the access
rw             1, 2, 4, 8 bytes, 4 if none is given; reported after the access
x              8 bytes, 8 if none is given; reported before the access
claims_max                     64
note: reads alone cannot be watched
""")


def test_a_story_is_one_sentence_a_line() -> None:
    assert render.why(hwbp.Why(3, "over", ("asked", "armed"))) == "claim 3: over\n  asked\n  armed"


def test_a_refusal_names_each_holder_and_where_the_story_is() -> None:
    holder = {"pid": 812, "comm": "gdb", "uid": 0, "kind": "ptrace", "slots": 3, "place": "on tid 812"}
    refusal = refusal_of(
        {"errno": "ENOSPC", "sentence": "no slot on tid 812", "claim": 9, "holders": [holder | {"claim_ids": [4, 5]}]}
    )
    assert render.refusal(refusal) == lines("""
hwbpctl: ENOSPC: no slot on tid 812
  held by gdb[812] as ptrace: 3 on tid 812 (claims 4,5)
  the whole story: hwbpctl why 9
""")


def test_a_hit_is_one_line() -> None:
    hit = hwbp.Hit(0x401136, 0x404040, 812, 812, 12_345_678_901, 1, False)
    assert render.hit(hit, "loop", "/usr/bin/loop+0x1136") == (
        "     12.345678 loop[812]            cpu 1   0x401136 /usr/bin/loop+0x1136"
    )
    assert render.hit(hit._replace(tid=813), "loop", "", "mem:0x404040/8:w") == (
        "     12.345678 loop[812/813]        cpu 1   0x401136 mem:0x404040/8:w"
    )


def test_counts_are_shown_as_perf_stat_shows_them() -> None:
    text = render.stat([("mem:0x404040/8:w", hwbp.Counts(1234567, 0, 0, 0))], "tid 812", 1.5)
    assert text.split("\n") == [
        "",
        " Counts for tid 812:",
        "",
        "         1,234,567      mem:0x404040/8:w",
        "",
        "       1.500000000 seconds elapsed",
        "",
    ]


# --- for programs ----------------------------------------------------------------------------------------------------


def test_addresses_are_text_for_programs_as_they_do_not_fit_in_a_double() -> None:
    # Given an address above 2^53, when it goes through a reader that has only doubles,
    value = render.plain(slots_of([cpu(0)], held(1, address=2**64 - 1)))
    read = json.loads(json.dumps(value), parse_int=lambda text: int(float(text)))

    # then it is what it was, and everything else is as in the protocol.
    assert read["resources"][0]["address"] == "0xffffffffffffffff"
    assert read["resources"][0]["claims"][0]["comm"] == "gdb"
    assert read["cpus"][0]["cpu_wide"] == {"any": 0}


def test_a_hit_for_programs_has_chains_only_where_there_are_some() -> None:
    hit = hwbp.Hit(0x401136, 0x404040, 812, 813, 5, 1, True, (2**64 - 4,), ())
    assert render.plain_hit(hit, 1, "mem:0x404040/8:w", "loop", "f+0x2") == {
        "type": "hit", "claim": 1, "event": "mem:0x404040/8:w", "time_ns": 5, "pid": 812, "tid": 813, "comm": "loop",
        "cpu": 1, "in_kernel": True, "ip": "0x401136", "where": "f+0x2", "address": "0x404040",
        "kernel_chain": ["0xfffffffffffffffc"],
    }  # fmt: skip
