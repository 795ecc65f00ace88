"""Answers as people read them, at 80 columns, and as programs do."""

from __future__ import annotations

import json

import pytest

import hwbp
from hwbp.errors import refusal_of
from hwbp.values import value_of
from hwbpctl import render
from tests.clients.fake_daemon import CAPABILITIES
from tests.clients.rows import cpu, held, lines, slots_of

# --- numbers ---------------------------------------------------------------------------------------------------------


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


# --- single answers --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([8], "8"),
        ([2, 4], "2, 4"),
        ([1, 2, 4, 8], "1, 2, 4, 8"),
        ([1, 2, 3, 4, 5, 6, 7, 8], "1 to 8"),
        ([2**n for n in range(33)], "powers of two from 1 to 2^32"),
        ([1, 2, 4, 8, 16, 33], "1, 2, 4, 8, 16, 33"),
    ],
)
def test_lengths_are_said_in_few_words_and_no_others_with_them(lengths: list[int], text: str) -> None:
    registers = dict(CAPABILITIES["registers"]) | {"lengths": {"w": lengths}, "default_lengths": {}}  # type: ignore[arg-type]

    said = render.capabilities(value_of(hwbp.Capabilities, CAPABILITIES, registers=registers))

    assert f"w              {text} bytes; reported after the access" in said.splitlines()


def test_capabilities_of_cpus_that_differ_have_both_numbers() -> None:
    some = [{"cpus": [2, 3], "pools": {"inst": 5, "data": 4}}, {"cpus": [0, 1], "pools": {"inst": 4, "data": 4}}]
    value = value_of(
        hwbp.Capabilities,
        CAPABILITIES,
        pools={"inst": 4, "data": 4},
        pools_on=tuple(value_of(hwbp.PoolsRow, row) for row in some),
    )
    assert render.capabilities(value).splitlines()[2:5] == [
        "slots per cpu  4 (inst), 4 (data) wherever it runs; bound to a cpu:",
        "  cpu 2-3      5 (inst), 4 (data)",
        "  cpu 0-1      4 (inst), 4 (data)",
    ]


def test_a_plan_says_which_slots_of_how_many() -> None:
    pieces = tuple(hwbp.Piece(0x404040 + offset, 8, "w", "any") for offset in (0, 8))
    assert render.plan(hwbp.Plan(pieces, {"any": 2}, {"any": 4})) == (
        "takes 2 of the 4 slots of a cpu: 0x404040/8:w, 0x404048/8:w"
    )
    wide = hwbp.Plan(pieces[:1], {"data": 1}, {"inst": 6, "data": 1}, over_reported=1)
    assert render.plan(wide) == (
        "takes 1 of the 1 data slot of a cpu: 0x404040/8:w; reports accesses to 1 byte beside what was asked for, too"
    )


def test_a_story_is_one_sentence_a_line() -> None:
    assert render.why(hwbp.Why(3, "over", ("asked", "armed"))) == "claim 3: over\n  asked\n  armed"


def test_why_there_is_no_room_is_nobodys_story() -> None:
    assert render.why(hwbp.Why(0, "", ("tid 812 is full", "claim 9 waits"))) == "tid 812 is full\nclaim 9 waits"


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (113, "113th"),
                         (21, "21st"), (102, "102nd")],
)  # fmt: skip
def test_a_place_is_said_as_people_do(number: int, text: str) -> None:
    assert render.ordinal(number) == text


def test_what_fits_once_others_have_given_way_says_so() -> None:
    value = hwbp.Fit(True, (hwbp.Piece(0x404040, 8, "w", "any"),), first="once claim 4 has given way: tid 812 is full")
    first, _ = render.fit(value, "tid 812").split("\n")
    assert first == "fits, with 1 slot on tid 812: 0x404040/8:w, once claim 4 has given way: tid 812 is full"


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
    counts = [("mem:0x404040/8:w", hwbp.Counts(1234567, 0, 0, 0), False), ("mem:1", hwbp.Counts(9, 0, 0, 0), True)]
    assert render.stat(counts, "tid 812", 1.5).split("\n") == [
        "",
        " Counts for tid 812:",
        "",
        "         1,234,567      mem:0x404040/8:w",
        "                 9      mem:1  (guarded: the count stopped)",
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
