"""The tables of ls, at 80 columns: claims under their CPUs and tasks, and holders outside the daemon."""

from __future__ import annotations

import hwbp
from hwbpctl import listing
from tests.clients.fake_daemon import CLAIM_ROW
from tests.clients.rows import cpu, held, lines, queued_row, slots_of

NOW_NS = 1_000 * 10**9


def shown(value: hwbp.Slots) -> str:
    return listing.slots(value, NOW_NS)


# --- claims ----------------------------------------------------------------------------------------------------------


def test_slots_are_shown_under_their_cpus_and_tasks() -> None:
    # Given claims on all CPUs, on one, and on a thread, and a CPU that is offline,
    value = slots_of(
        [cpu(0, 1, 1), cpu(1, 2, 1), cpu(2, 1, 1), cpu(3, online=False)],
        held(3, tid=0, comm="perf", kind="perf", address=0xFFFFFFFF81234567, access="x", user=False, hits=1234567),
        held(4, tid=0, cpus=[1], pid=4000001, comm="hwbpctl", kind="perf", delivery="hold", age_ns=4 * 86400 * 10**9),
        held(12, pid=812, tid=813, uid=1000, hits=99999, length=4, access="rw"),
    )

    # then CPUs that look alike share their lines, and nothing is wider than a terminal.
    assert shown(value) == lines("""
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
    assert shown(slots_of([cpu(number) for number in range(256)])) == "cpu 0-255: 4 of 4 slots free"


def test_pools_of_an_arm_cpu_are_told_apart() -> None:
    row = {"cpu": 0, "online": True, "cpu_wide": {"inst": 1, "data": 0}, "busiest_task": {"inst": 2, "data": 0}}
    assert shown(slots_of([row], pools={"inst": 6, "data": 4})) == (
        "cpu 0: 3 of 6 inst slots free (1 cpu-wide, 2 on the busiest task); 4 of 4 data slots free"
    )


def test_cpus_with_more_slots_than_every_cpu_has_are_shown_with_theirs() -> None:
    rows = [cpu(0), cpu(1) | {"slots": {"any": 6}}, cpu(2)]
    assert shown(slots_of(rows)).splitlines() == ["cpu 0,2: 4 of 4 slots free", "cpu 1: 6 of 6 slots free"]


def test_a_task_on_some_cpus_and_riders_of_one_slot_have_their_own_lines() -> None:
    resource = held(1, cpus=[0, 1, 2]) | {"claims": [CLAIM_ROW, CLAIM_ROW | {"claim": 2, "comm": "lldb"}]}
    text = shown(slots_of([], resource)).splitlines()
    assert text[1] == "tid 813 on cpu 0-2: 1 slot"
    assert [line.split()[:2] for line in text[2:]] == [["1", "gdb[812]"], ["2", "lldb[812]"]]


def test_a_row_that_is_too_wide_gives_up_the_label_first_and_then_the_owners_name() -> None:
    # Given a label that does not fit, then it is cut, and nothing else.
    value = slots_of([], held(1, label="the counter that should not change, ever"))
    (row,) = [line for line in shown(value).splitlines() if "gdb" in line]
    assert len(row) == 80
    assert "gdb[812]" in row
    assert row.endswith("~")
    assert " the counter " in row

    # When the rest alone is too wide, then the owner's name gives way, and its pid stays.
    wide = {"comm": "kworker-flusher", "pid": 4194303, "address": 2**64 - 8, "label": "a label"}
    (row,) = [line for line in shown(slots_of([], held(12, **wide))).splitlines() if "419" in line]
    assert len(row) <= 80
    assert "  12 kw" in row
    assert "~[4194303]" in row


def test_a_process_holds_its_slots_on_each_of_its_threads() -> None:
    # Given two slots of a process, one of them of a claim that is guarded, and a slot of a thread,
    of_process = {"pid": 812, "tid": 0}
    value = slots_of([], held(1, state="guarded") | of_process, held(2) | of_process, held(3, tid=811))

    # then the process has a heading of its own, and its claims do not look CPU-wide.
    assert [row.is_cpu_wide for row in value.resources] == [False, False, False]
    assert shown(value) == lines("""
  CLAIM OWNER    UID KIND   SPAN       ACC   AGE HITS STATE
tid 811: 1 slot
      3 gdb[812]   0 ptrace 0x404040/8 w   1m05s    3 armed
pid 812: 2 slots on each of its threads
      1 gdb[812]   0 ptrace 0x404040/8 w   1m05s    3 guarded
      2 gdb[812]   0 ptrace 0x404040/8 w   1m05s    3 armed
""")


def test_an_address_that_is_kept_from_us_is_a_hyphen() -> None:
    assert " -/8 " in shown(slots_of([], held(1, address=None)))


def test_those_that_wait_stand_below_with_what_is_in_their_way() -> None:
    # Given a slot and three claims that wait, one of which has given way,
    on_cpus = "cpu-wide on all cpus"
    value = slots_of(
        [],
        held(1),
        waiting=[
            queued_row(9, kind="ptrace", priority=5, deadline_ns=NOW_NS + 90 * 10**9, blockers=[1, 4, 12], position=1),
            queued_row(10, deadline_ns=NOW_NS - 1, position=2, address=None, label="the list", blockers=[]),
            queued_row(3, kind="background", state="suspended", deadline_ns=NOW_NS + 9, target=on_cpus, access="rw"),
        ],
    )

    # then they are told apart by what they wait for, and no number is made up.
    text = shown(value)
    assert text.split("\n\n")[1] == lines("""
  CLAIM OWNER     UID KIND       SPAN          POS  LEFT STATE     BLOCKER LABEL
waiting for tid 813: 2 claims
      9 perf[97] 1000 ptrace+5   0x404048/8:w    1 1m30s waiting   1,4+1
     10 perf[97] 1000 perf       -/8:w           2    0s waiting   -       the ~
waiting for cpu-wide on all cpus: 1 claim
      3 perf[97] 1000 background 0x404048/8:rw   1     - suspended 1
""")
    assert max(map(len, text.split("\n"))) <= listing.WIDTH


def test_what_a_tracer_has_and_leaves_behind_is_named() -> None:
    text = shown(slots_of([], held(1, state="taken"), held(2, state="residue"), held(3))).split("\n")
    assert [line.split()[-1] for line in text[2:5]] == ["taken", "residue", "armed"]
    assert text[5:] == [
        "  taken: its tracer has armed it by ptrace, so nobody can take it back",
        "  residue: the claim is over, and the thread keeps the slot until it exits or runs another program",
    ]


# --- outside the daemon ----------------------------------------------------------------------------------------------


def outside(pid: int, comm: str, slots: int, place: str, evidence: str) -> hwbp.Holder:
    return hwbp.Holder(pid, comm, 1000 if pid else -1, "", slots, place, (), evidence)


def test_holders_outside_are_shown_with_how_each_is_known() -> None:
    # Given holders of three grades of evidence, one of them without a name and one without a number,
    holders = [
        outside(97, "perf", 1, "cpu-wide on cpu 0", "perf fd"),
        outside(0, "unattributed", 2, "on tid 900", "unattributed"),
        outside(4000001, "bpftrace", 0, "somewhere", "perf fd?"),
    ]

    # then each evidence that was met is explained below, and what is not known is not made up.
    text = listing.foreign(holders)
    assert text == lines("""
outside hwbpd:
  SLOTS PLACE             WHO                UID EVIDENCE
      1 cpu-wide on cpu 0 perf[97]          1000 perf fd
      2 on tid 900        -                    - unattributed
      ? somewhere         bpftrace[4000001] 1000 perf fd?
  perf fd: it has a descriptor that was shown to be a breakpoint
  perf fd?: it has a perf descriptor that may be a breakpoint
  unattributed: the kernel counts them, and nobody was found who has them
""")
    assert max(map(len, text.split("\n"))) <= listing.WIDTH


def test_an_evidence_of_a_later_daemon_is_shown_as_it_is() -> None:
    assert "bpf link" in listing.foreign([outside(5, "x", 1, "somewhere", "bpf link")])


def test_nobody_outside_is_said_in_a_line() -> None:
    assert listing.foreign([]) == "outside hwbpd: nobody was found"
