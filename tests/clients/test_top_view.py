"""The frames of top: what stands where at three sizes of a terminal, and that nothing ever breaks one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hwbp
from hwbpctl import top_model, top_view
from hwbpctl.cells import fit, head, printable, width_of, wrap
from hwbpctl.top import KEYS, ansi
from hwbpctl.top_model import View
from tests.clients.fake_daemon import WAITING_ROW
from tests.clients.rows import cpu, held, lines, queued_row, slots_of

NOW = slots_of(
    [cpu(0, 1, 2), cpu(1, 1, 2), cpu(2, 0, 2), cpu(3, online=False)],
    held(3, tid=0, comm="perf", kind="perf", address=0xFFFFFFFF81234567, access="x", user=False, state="guarded"),
    held(4, tid=0, cpus=[1], pid=4000001, comm="hwbpctl", kind="perf", delivery="hold", age_ns=4 * 86400 * 10**9),
    held(12, pid=812, tid=813, uid=1000, hits=99999, length=4, access="rw", label="the list"),
)
BEFORE = slots_of([], held(12, hits=0, age_ns=64 * 10**9), held(3, age_ns=64 * 10**9), held(4, age_ns=0))


def decision(what: str, claim: int = 0, **fields: Any) -> hwbp.Decision:
    return hwbp.Decision(what, 0, 1, 97, "perf", 0, claim, **fields)


VIEW = View(
    daemon="linux, x86 at /run/hwbpd/hwbpd.sock",
    clock="12:00:10",
    slots=NOW,
    rows=tuple(top_model.rows_of(NOW, BEFORE)),
    selected=12,
    told=(
        ("12:00:07", decision("session", label="perf record")),
        ("12:00:08", decision("granted", 3, about="mem:0xffffffff81234567/8:x:k for all cpus as perf")),
        ("12:00:08", decision("refused", 5, errno="ENOSPC", sentence="no slot on cpu 3: 4 of 4 held (gdb[812])")),
        ("12:00:09", decision("ended", 2, reason="forced", sentence="root released it")),
        ("12:00:09", "the session is over"),
    ),
    missed=3,
    keys=KEYS,
)


def shown(view: View, width: int, height: int) -> list[str]:
    """The lines of a frame, none of which is too wide, nor are they too many."""
    frame = top_view.screen(view, width, height).plain.split("\n")
    assert len(frame) == height
    assert max(map(width_of, frame)) <= width
    return [line.rstrip() for line in frame]


# --- three sizes -----------------------------------------------------------------------------------------------------


def test_a_terminal_of_80_columns_shows_all_that_matters() -> None:
    assert "\n".join(shown(VIEW, 80, 24)) == lines("""
hwbpd linux, x86 at /run/hwbpd/hwbpd.sock            3 claims by claim  12:00:10
cpu 0-1 [#==.] 1 free   cpu 2   [==..] 2 free   cpu 3   offline
  CLAIM OWNER         TARGET   SPAN                     HITS/s LOST DROP STATE
      3 perf[812]     all cpus 0xffffffff81234567/8:x:k      0    0    0 guarded
      4 hwb~[4000001] cpu 1    0x404040/8:w                  0    0    0 held
>    12 gdb[812]      tid 813  0x404040/4:rw             99999    0    0 armed
claim 12: uid 1000 as ptrace, 0x404040/4:rw on tid 813, 1m05s, 99999 hits, 0
    lost, 0 dropped, 'the list'
-- decisions (3 missed) --------------------------------------------------------
12:00:07 session  perf[97] uid 0, perf record
12:00:08 granted  perf[97] claim 3: mem:0xffffffff81234567/8:x:k for all cpus a~
12:00:08 refused  perf[97] claim 5: ENOSPC: no slot on cpu 3: 4 of 4 held (gdb[~
12:00:09 ended    perf[97] claim 2: forced: root released it
12:00:09 the session is over









q quit  ? help  w why  r release  a arm again  s sort  j k select
""")


def test_a_larger_terminal_shows_more() -> None:
    frame = shown(VIEW, 120, 40)
    assert frame[1].endswith("# cpu-wide  = busiest task  . free")
    assert frame[2].split() == [
        "CLAIM", "OWNER", "UID", "KIND", "TARGET", "SPAN", "HITS/s", "HITS", "LOST", "DROP", "STATE", "AGE", "LABEL",
    ]  # fmt: skip
    assert frame[5].split() == [
        ">", "12", "gdb[812]", "1000", "ptrace", "tid", "813", "0x404040/4:rw", "99999", "99999", "0", "0", "armed",
        "1m05s", "the", "list",
    ]  # fmt: skip
    assert "12:00:08 refused  perf[97] claim 5: ENOSPC: no slot on cpu 3: 4 of 4 held (gdb[812])" in frame


def test_a_tiny_terminal_shows_who_and_how_fast_with_the_selected_claim_and_the_newest_decision() -> None:
    assert "\n".join(shown(VIEW, 40, 10)) == lines("""
hwbpd linu~  3 claims by claim  12:00:10
cpu 0-1 [#==.] 1 free
... and 2 more lines of CPUs
  CLAIM OWNER        HITS/s LOST STATE
      4 hw~[4000001]      0    0 held
>    12 gdb[812]      99999    0 armed
-- decisions (3 missed) ----------------
12:00:09 ended    perf[97] claim 2: for~
12:00:09 the session is over
q quit  ? help  w why  r release  a arm~
""")


def test_text_for_no_terminal_has_every_claim_and_cuts_no_decision() -> None:
    many = slots_of([cpu(0)], *(held(number) for number in range(1, 200)))
    text = top_view.batch(replace(VIEW, slots=many, rows=tuple(top_model.rows_of(many, None))), 80)
    assert [line.split()[0] for line in text.split("\n") if "gdb[812]" in line and "tid 813" in line] == [
        *map(str, range(1, 12)), ">", *map(str, range(13, 200)),
    ]  # fmt: skip
    assert "4 of 4 held (gdb[812])" in text


def test_those_that_wait_stand_among_the_claims_and_say_behind_whom() -> None:
    waiting = [queued_row(9, position=2, blockers=[3, 4]), queued_row(10, state="suspended", blockers=[])]
    now = slots_of([cpu(0)], held(3), waiting=waiting)
    frame = shown(replace(VIEW, slots=now, rows=tuple(top_model.rows_of(now, None)), selected=9, told=()), 80, 24)
    assert frame[0].endswith("3 claims, 2 waiting, by claim  12:00:10")
    assert [line.split()[-1] for line in frame[3:6]] == ["armed", "waiting", "suspended"]
    assert "claim 9: uid 1000 as perf, 0x404048/8:w on tid 813, 1s, 2nd in the queue behind" in frame
    assert "    claim 3, 4" in frame


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_a_story_takes_the_place_of_the_decisions_and_is_wrapped() -> None:
    sentence = "refused by the kernel: " + "no slot on cpu 3, " * 8
    frame = shown(replace(VIEW, pane=("why claim 12: armed", ("asked", sentence))), 60, 24)
    begin = frame.index("-- why claim 12: armed " + "-" * 37)
    assert frame[begin + 1] == "asked"
    assert " ".join(line.strip() for line in frame[begin + 2 : begin + 6]).strip() == sentence.strip()
    assert not any("refused  perf" in line for line in frame)


def test_help_fits_on_the_smallest_usual_terminal() -> None:
    frame = shown(replace(VIEW, pane=("help", top_view.HELP)), 80, 24)
    assert "r            release the selected claim, after a question" in frame
    assert any(line.startswith("HITS/s is since") for line in frame)


def test_a_question_stands_where_the_keys_do() -> None:
    assert shown(replace(VIEW, note="release claim 12 of gdb[812]? y/n"), 80, 24)[-1].endswith("y/n")


def test_without_a_daemon_the_reason_is_shown_and_no_slot() -> None:
    gone = replace(VIEW, slots=None, rows=(), selected=0, trouble="no hwbpd at /run/hwbpd.sock: nobody listens")
    frame = shown(gone, 80, 24)
    assert frame[1] == "no hwbpd at /run/hwbpd.sock: nobody listens"
    assert not any("free" in line for line in frame)
    assert any("decisions" in line for line in frame)


def test_free_slots_are_shown_where_nobody_has_a_claim() -> None:
    frame = shown(replace(VIEW, slots=slots_of([cpu(0), cpu(1)]), rows=(), selected=0), 80, 24)
    assert frame[1] == "cpu 0-1 [....] 4 free   # cpu-wide  = busiest task  . free"
    assert frame[2] == "no claims"


def test_pools_of_an_arm_cpu_have_bars_of_their_own() -> None:
    row = {"cpu": 0, "online": True, "cpu_wide": {"inst": 1, "data": 0}, "busiest_task": {"inst": 2, "data": 4}}
    (line,) = top_view.cpu_lines(slots_of([row], pools={"inst": 6, "data": 4}), 60)
    assert line.plain == "cpu 0 inst [#==...] 3 free data [====] 0 free"


def test_of_many_cpus_that_differ_some_are_left_out_and_counted() -> None:
    cpus = [cpu(number, number % 4, number // 4 % 2) for number in range(64)]
    frame = shown(replace(VIEW, slots=slots_of(cpus)), 40, 10)
    assert frame[2] == "... and 7 more lines of CPUs"


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "-"), (0.0, "0"), (0.04, "0.0"), (9.94, "9.9"), (9.96, "10"), (1e6, "1000k"), (-1.0, "0")]
)
def test_a_rate_takes_five_columns_at_most(rate: float | None, text: str) -> None:
    assert top_view.per_second(rate) == text


# --- cells -----------------------------------------------------------------------------------------------------------


def test_what_a_terminal_would_act_on_is_replaced() -> None:
    assert printable("a\x1b[2Jb\r\n\t\0\x9b\u202e\u200d\u0301\ud800z") == "a?[2Jb?????????z"
    assert printable("gdb \u6f22\u5b57 \u00e9") == "gdb \u6f22\u5b57 \u00e9"


def test_text_is_cut_between_characters_and_the_cut_is_marked() -> None:
    assert fit("\u6f22\u5b57\u6f22", 6) == "\u6f22\u5b57\u6f22"
    assert fit("\u6f22\u5b57\u6f22", 5) == "\u6f22\u5b57~"
    assert fit("\u6f22\u5b57\u6f22", 4) == "\u6f22~ "
    assert fit("12", 4, right=True) == "  12"
    assert (fit("abc", 1), fit("abc", 0), head("abc", 0)) == ("~", "", "")


@given(st.text(max_size=60), st.integers(1, 30))
def test_wrapped_text_is_all_there(text: str, width: int) -> None:
    text = printable(text)
    wrapped = wrap(text, width, "  ")
    assert "".join(wrapped).replace(" ", "") == text.replace(" ", "")
    assert all(width_of(line) <= max(width, 2) for line in wrapped)


# --- anything --------------------------------------------------------------------------------------------------------

names = st.text(max_size=12) | st.sampled_from(["\x1b[2J", "\u6f22" * 9, "\U0001f512" * 5, "a\nb", "\u0e33", "\u1160x"])
numbers = st.integers(0, 2**64 - 1)
counts = st.integers(0, 10**12)
used = st.fixed_dictionaries({"any": st.integers(0, 20)})
cpu_rows = st.fixed_dictionaries(
    {"cpu": st.integers(0, 8191), "online": st.booleans(), "cpu_wide": used, "busiest_task": used}
)
claims = st.fixed_dictionaries(
    {"claim": st.integers(1, 2**62), "pid": st.integers(0, 2**22), "comm": names, "uid": st.integers(0, 2**32)}
    | {"kind": names, "label": names, "state": st.sampled_from(["armed", "guarded"]) | names}
    | {"age_ns": counts, "hits": numbers, "lost": counts, "dropped": counts}
)
resources = st.fixed_dictionaries(
    {"resource": counts, "address": st.none() | numbers, "length": st.integers(1, 2**32)}
    | {"access": st.sampled_from(["r", "w", "rw", "x"]), "pool": names, "user": st.booleans(), "kernel": st.booleans()}
    | {"delivery": names, "tid": st.integers(0, 2**22), "pid": st.integers(0, 2**22)}
    | {"cpus": st.none() | st.lists(st.integers(0, 8191), min_size=1, max_size=5)}
    | {"claims": st.lists(claims, min_size=1, max_size=3)}
)
decisions = st.builds(
    hwbp.Decision, names, counts, counts, counts, names, counts, counts, names, names, names, names, names, names
)
pools = st.dictionaries(names, st.integers(0, 40), max_size=2) | st.just({"any": 4})


queued_rows = st.lists(
    st.builds(
        lambda target, claim, comm, label, span, state, position, blockers: WAITING_ROW
        | {"target": target, "claim": claim, "comm": comm, "label": label, "address": span, "state": state}
        | {"position": position, "blockers": blockers},
        names, counts, names, names, st.none() | numbers, names, counts, st.lists(counts, max_size=16),
    ),
    max_size=4,
)  # fmt: skip


@st.composite
def views(draw: st.DrawFn) -> View:
    cpus, held_slots = st.lists(cpu_rows, max_size=6), st.lists(resources, max_size=6)
    looks = [
        slots_of(draw(cpus), *draw(held_slots), pools=draw(pools) or None, waiting=draw(queued_rows)) for _ in range(2)
    ]
    rows = tuple(top_model.rows_of(looks[1], draw(st.sampled_from([None, looks[0]]))))
    return View(
        daemon=draw(names),
        clock=draw(names),
        slots=draw(st.sampled_from([None, looks[1]])),
        rows=tuple(sorted(rows, key=top_model.ORDERS[draw(st.sampled_from(list(top_model.ORDERS)))])),
        selected=draw(st.sampled_from([0, 1, *(row.claim for row in rows)])),
        told=tuple(draw(st.lists(st.tuples(names, decisions | names), max_size=5))),
        missed=draw(counts),
        pane=draw(st.none() | st.tuples(names, st.lists(names, max_size=4).map(tuple))),
        note=draw(names),
        trouble=draw(names),
        keys=draw(st.sampled_from([(), KEYS])),
    )


@given(views(), st.integers(1, 130), st.integers(1, 50))
def test_nothing_that_anybody_claims_breaks_a_frame(view: View, width: int, height: int) -> None:
    frame = top_view.screen(view, width, height)
    rows = frame.plain.split("\n")
    assert len(rows) == height
    for row in rows:
        assert width_of(row) <= width, row
        assert printable(row) == row
    assert len(ansi(frame, width)) == height
    assert all(printable(line) == line for line in top_view.batch(view, width).split("\n"))
