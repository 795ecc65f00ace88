"""hwbpctl as a shell sees it: what it prints where, and its exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hwbpctl.__main__ import app
from tests.clients.fake_daemon import (
    RESOURCE_ROW,
    WAITING_ROW,
    FakeDaemon,
    always,
    error,
    final,
    gone,
    guarded,
    hits,
    message,
    offline,
    queued,
    record,
    resumed,
    revoke,
    room,
    suspended,
)

ROOT = Path(__file__).parents[2]
EVENT = "mem:0x404040/8:w"
HOLDER = {"pid": 812, "comm": "gdb", "uid": 0, "kind": "ptrace", "slots": 3, "place": "on tid 812"} | {
    "claim_ids": [4, 5, 6], "evidence": "books",
}  # fmt: skip
FULL = error("ENOSPC", "no slot on tid 812", holders=[HOLDER], claim=9)


def run(daemon: FakeDaemon, *words: str, as_json: bool = False) -> Result:
    before = ["--socket", str(daemon.path)] + (["--json"] if as_json else [])
    return CliRunner().invoke(app, [*before, *words], catch_exceptions=False)


def start(daemon: FakeDaemon, *words: str) -> subprocess.Popen[str]:
    """Start hwbpctl as a process of its own."""
    path = os.pathsep.join([str(ROOT / "clients"), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-m", "hwbpctl", "--socket", str(daemon.path), *words],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def grant_then(daemon: FakeDaemon, *messages: dict[str, Any]) -> None:
    """Let the daemon send these right behind each grant."""
    grant = daemon.answers["claim"]
    daemon.answers["claim"] = lambda request: [*grant(request), *messages]


# --- verbs that ask --------------------------------------------------------------------------------------------------


def test_ls_shows_owners_and_free_slots(daemon: FakeDaemon) -> None:
    cpu = {"cpu": 0, "online": True, "cpu_wide": {}, "busiest_task": {"any": 1}}
    answer = message("slots", pools={"any": 4}, cpus=[cpu], resources=[RESOURCE_ROW], more=False)
    daemon.answers["slots"] = always(answer)
    text = run(daemon, "ls")
    assert text.exit_code == 0
    assert "cpu 0: 3 of 4 slots free (0 cpu-wide, 1 on the busiest task)" in text.stdout
    assert "gdb[812]" in text.stdout
    value = json.loads(run(daemon, "ls", as_json=True).stdout)
    assert value["resources"][0]["claims"][0]["pid"] == 812


def test_caps_why_and_release_answer_people_and_programs(daemon: FakeDaemon) -> None:
    daemon.answers["release"] = always(final(claim=7, hits=12, delivered=11, dropped=1))
    assert "slots per cpu  4" in run(daemon, "caps").stdout
    assert run(daemon, "why", "7").stdout == "claim 7: armed\n  asked\n  armed\n"
    assert run(daemon, "release", "7").stdout == "claim 7 released: 12 hits: 11 delivered, 0 lost, 1 dropped\n"
    assert json.loads(run(daemon, "caps", as_json=True).stdout)["pools"] == {"any": 4}
    assert json.loads(run(daemon, "why", "7", as_json=True).stdout)["lines"] == ["asked", "armed"]
    assert json.loads(run(daemon, "release", "7", as_json=True).stdout)["dropped"] == 1


@pytest.mark.parametrize("word", ["ENOSPC", "enospc"])
def test_why_there_is_no_room_may_be_asked_without_a_claim(daemon: FakeDaemon, word: str) -> None:
    assert run(daemon, "why", word).stdout == "tid 813: 4 of 4 slots are held\nclaim 9 waits\n"
    assert json.loads(run(daemon, "why", word, as_json=True).stdout)["claim"] == 0
    assert [ask["errno"] for ask in daemon.asked("why")] == ["ENOSPC"] * 2


def test_ls_shows_who_waits_and_what_is_in_the_way(daemon: FakeDaemon) -> None:
    waiting = [WAITING_ROW | {"deadline_ns": time.monotonic_ns() + 90 * 10**9}]
    answer = message("slots", pools={"any": 4}, cpus=[], resources=[RESOURCE_ROW], more=False, waiting=waiting)
    daemon.answers["slots"] = always(answer)
    text = run(daemon, "ls").stdout
    assert "waiting for tid 813: 1 claim" in text
    assert re.search(r"perf\[97\] .* 1m[0-3][0-9]s waiting +1$", text, re.MULTILINE)
    assert json.loads(run(daemon, "ls", as_json=True).stdout)["waiting"][0]["blockers"] == [1]


def test_ls_looks_outside_the_daemon_only_when_asked(daemon: FakeDaemon) -> None:
    # Given a slot that perf has outside the daemon,
    perf = HOLDER | {"pid": 97, "comm": "perf", "kind": "", "slots": 1, "place": "cpu-wide on cpu 0", "claim_ids": []}
    daemon.answers["foreign"] = always(message("foreign", holders=[perf | {"evidence": "perf fd"}]))

    # when slots are listed, then it shows with --foreign alone.
    assert "perf[97]" not in run(daemon, "ls").stdout
    assert daemon.asked("foreign") == []
    text = run(daemon, "ls", "--foreign").stdout
    assert "outside hwbpd:" in text
    assert "perf[97]" in text
    value = json.loads(run(daemon, "ls", "--foreign", as_json=True).stdout)
    assert value["foreign"][0]["evidence"] == "perf fd"
    assert value["pools"] == {"any": 4}


def test_fit_tells_whether_with_its_exit_status_and_claims_nothing(daemon: FakeDaemon) -> None:
    # Given a daemon with room,
    fitting = run(daemon, "fit", "-e", EVENT, "-p", "812")
    assert fitting.exit_code == 0
    assert fitting.stdout.startswith("fits, with 1 slot on pid 812: 0x404040/8:w\n")

    # and one without, then the holders are named on standard output: they are the answer.
    daemon.answers["fit"] = always(FULL | {"op": "fit", "fits": False, "pieces": []})
    full = run(daemon, "fit", "-e", EVENT, "-C", "0,1")
    assert full.exit_code == 1
    assert full.stdout.splitlines()[:2] == [
        "does not fit: ENOSPC: no slot on tid 812",
        "  held by gdb[812] as ptrace: 3 on tid 812 (claims 4,5,6)",
    ]
    as_json = run(daemon, "fit", "-e", EVENT, "-t", "1", as_json=True)
    assert as_json.exit_code == 1
    value = json.loads(as_json.stdout)
    assert (value["fits"], value["refusal"]["errno"], value["refusal"]["holders"]) == (False, "ENOSPC", [HOLDER])
    assert [(ask["pid"] if "pid" in ask else ask["tid"], ask.get("cpus")) for ask in daemon.asked("fit")] == [
        (812, None),
        (0, [0, 1]),
        (1, None),
    ]
    assert daemon.asked("claim") == []


def test_fit_without_a_target_tells_which_slots_an_event_takes(daemon: FakeDaemon) -> None:
    text = run(daemon, "fit", "mem:0x404040/16:w", "--over-report")
    assert text.exit_code == 0
    assert text.stdout == "takes 2 of the 4 slots of a cpu: 0x404040/8:w, 0x404048/8:w\n"
    value = json.loads(run(daemon, "fit", "-e", "mem:0x404040/16:w", as_json=True).stdout)
    assert (len(value["pieces"]), value["slots"], value["pools"]) == (2, {"any": 2}, {"any": 4})
    assert [ask.get("over_report", False) for ask in daemon.asked("plan")] == [True, False]
    assert daemon.asked("fit") == daemon.asked("claim") == []


def test_rearm_lets_a_claim_report_again(daemon: FakeDaemon) -> None:
    assert run(daemon, "rearm", "7").stdout == "claim 7 reports again\n"
    assert json.loads(run(daemon, "rearm", "7", as_json=True).stdout) == {"claim": 7}
    daemon.answers["rearm"] = always(error("EINVAL", "claim 7 is armed"))
    refused = run(daemon, "rearm", "7")
    assert refused.exit_code == 1
    assert refused.stderr == "hwbpctl: EINVAL: claim 7 is armed\n"


def test_enabled_asks_for_each_cpu_or_for_a_thread(daemon: FakeDaemon) -> None:
    # Given a daemon with an armed slot on CPU 0 and a held one on CPU 2,
    counts = {0: (1, 1), 2: (0, 1)}

    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        armed, held = counts.get(request.get("cpu", 0), (0, 0))
        return [message("enabled", enabled=armed > 0, armed=armed, held=held)]

    daemon.answers["enabled"] = answer

    # when it is asked about some, then each has its line, and without any, those that are online have.
    lines = ["cpu 0: yes, 1 of 1 slot armed", "cpu 1: none of ours", "cpu 2: none armed, 0 of 1 slot armed"]
    assert run(daemon, "enabled", "-C", "0-2").stdout.splitlines() == lines
    assert run(daemon, "enabled").stdout.splitlines() == lines[:2]
    assert run(daemon, "enabled", "-t", "812", "-C", "0").stdout == "tid 812 on cpu 0: yes, 1 of 1 slot armed\n"
    assert run(daemon, "enabled", "-t", "812").stdout == "tid 812: yes, 1 of 1 slot armed\n"
    value = json.loads(run(daemon, "enabled", "-C", "0", "-t", "812", as_json=True).stdout)
    assert value == [{"cpu": 0, "tid": 812, "enabled": True, "armed": 1, "held": 1}]
    assert run(daemon, "enabled", "-C", "x").exit_code == 2
    asked = [(ask.get("cpu"), ask.get("tid")) for ask in daemon.asked("enabled")]
    assert asked[5:] == [(0, 812), (None, 812), (0, 812)]


# --- refusals and wrong usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["watch", "stat", "hold"])
def test_a_refusal_is_one_line_and_one_more_per_holder(daemon: FakeDaemon, verb: str) -> None:
    daemon.answers["claim"] = always(FULL)
    result = run(daemon, verb, "-e", EVENT, "-t", "812")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "hwbpctl: ENOSPC: no slot on tid 812",
        "  held by gdb[812] as ptrace: 3 on tid 812 (claims 4,5,6)",
        "  the whole story: hwbpctl why 9",
    ]


def test_a_refusal_for_programs_is_json_on_stderr(daemon: FakeDaemon) -> None:
    daemon.answers["claim"] = always(FULL)
    result = run(daemon, "hold", "-e", EVENT, "-a", as_json=True)
    assert result.exit_code == 1
    refusal = json.loads(result.stderr)
    assert (refusal["errno"], refusal["class"], refusal["claim"]) == ("ENOSPC", "NoFreeSlot", 9)
    assert refusal["holders"] == [HOLDER]


def test_of_several_events_all_are_claimed_or_none(daemon: FakeDaemon) -> None:
    # Given a daemon with one free slot, when two events are asked for,
    grant = daemon.answers["claim"]
    daemon.answers["claim"] = lambda request: grant(request) if len(daemon.asked("claim")) == 1 else [FULL]
    result = run(daemon, "hold", "-e", EVENT, "-e", "mem:0x404048/8:w", "-a")

    # then the first is given back, with the session it was claimed in.
    assert result.exit_code == 1
    assert daemon.requests[-1]["op"] == "goodbye"


def test_without_a_daemon_the_status_is_3_and_the_remedy_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--socket", str(tmp_path / "absent"), "ls"])
    assert result.exit_code == 3
    assert "Start the daemon with: hwbpd" in result.stderr
    result = CliRunner().invoke(app, ["--json", "--socket", str(tmp_path / "absent"), "watch", "-e", EVENT, "-a"])
    assert result.exit_code == 3
    assert json.loads(result.stderr)["class"] == "NotReachable"


def test_a_bad_event_is_pointed_at(daemon: FakeDaemon) -> None:
    result = run(daemon, "watch", "-e", "mem:0x404040/8:q", "-a")
    assert result.exit_code == 2
    assert "  mem:0x404040/8:q\n                 ^\n" in result.stderr
    assert "mem:ADDRESS[/LENGTH][:ACCESS][:MODIFIERS]" in result.stderr
    assert daemon.requests == []


@pytest.mark.parametrize(
    "words",
    [
        ["watch", "-e", EVENT],
        ["watch", "-a"],
        ["watch", "-e", EVENT, "-a", "-t", "1"],
        ["watch", "-e", EVENT, "-a", "-C", "0"],
        ["watch", "-e", EVENT, "-C", "0-"],
        ["watch", "-e", EVENT, "-a", "-c", "0"],
        ["watch", "-e", EVENT, "-p", "1", "-t", "1"],
        ["watch", "-e", EVENT, "-p", "1", "-C", "0"],
        ["watch", "-e", EVENT, "-p", "1", "-a"],
        ["watch", "-e", EVENT, "--only-pid", "1"],
        ["watch", "-e", EVENT, "--only-pid", "1", "-t", "1"],
        ["watch", "-e", EVENT, "--only-pid", "1", "--", "true"],
        ["watch", "-e", EVENT, "-a", "--guard", "-1"],
        ["fit"],
        ["fit", EVENT, "-e", EVENT],
        ["fit", "mem:"],
        ["rearm"],
        ["stat", "-e", EVENT, "-t", "-1"],
        ["release"],
        ["why", "gdb"],
        ["why", "0"],
        ["why", "EIO"],
        ["watch", "-e", EVENT, "-a", "-w", "5", "-n"],
        ["watch", "-e", EVENT, "-a", "-w", "-1"],
        ["hold", "-e", EVENT, "-a", "-w", "inf"],
        ["stat", "-e", EVENT, "-a", "--priority", "101"],
        ["replay"],
        ["nosuch"],
    ],
)
def test_wrong_usage_is_status_2_and_asks_nobody(daemon: FakeDaemon, words: Sequence[str]) -> None:
    assert run(daemon, *words).exit_code == 2
    assert daemon.requests == []


def test_help_names_every_verb() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert all(verb in text for verb in ("ls", "watch", "stat", "hold", "fit", "rearm", "caps", "doctor", "why"))


# --- verbs that claim ------------------------------------------------------------------------------------------------


def test_watch_prints_hits_until_the_target_exits_and_then_the_totals(daemon: FakeDaemon) -> None:
    end = gone(1, hits=4, delivered=2, lost=1, dropped=1)
    grant_then(daemon, hits(1, record(time_ns=1_500_000_000), record(0x401140)), end)
    result = run(daemon, "watch", "-e", EVENT, "-t", "813")
    first, second, summary = result.stdout.splitlines()
    assert result.exit_code == 0
    assert first.startswith("      1.500000 ")
    assert "[812/813]" in first
    assert "cpu 1   0x401136" in first
    assert "0x401140" in second
    assert summary == f"{EVENT}: 4 hits: 2 delivered, 1 lost, 1 dropped"
    (request,) = daemon.asked("claim")
    assert (request["tid"], request["delivery"], "user_chain" in request) == (813, "hits", False)


def test_watch_for_programs_is_a_line_of_json_for_each_hit_and_each_end(daemon: FakeDaemon) -> None:
    grant_then(daemon, hits(1, record(chain=[2**64 - 512, 0x401136, 0x401000])), gone(1, hits=1, delivered=1))
    result = run(daemon, "watch", "-e", f"{EVENT}:u", "-t", "813", "--callchain", as_json=True)
    hit, end = map(json.loads, result.stdout.splitlines())
    assert (hit["type"], hit["ip"], hit["user_chain"]) == ("hit", "0x401136", ["0x401136", "0x401000"])
    assert (end["type"], end["delivered"], end["lost"], end["shown"]) == ("end", 1, 0, 1)
    (request,) = daemon.asked("claim")
    assert (request["user_chain"], request["kernel_chain"]) == (True, False)


def test_watch_prints_call_chains_below_their_hit(daemon: FakeDaemon) -> None:
    grant_then(daemon, hits(1, record(chain=[2**64 - 512, 0x401136, 0x401000])), gone(1, hits=1, delivered=1))
    lines = run(daemon, "watch", "-e", EVENT, "-t", "813", "--callchain").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0x401136", "0x401000"]


def test_watch_stops_after_so_many_hits(daemon: FakeDaemon) -> None:
    grant_then(daemon, hits(1, record(1), record(2), record(3)))
    daemon.answers["release"] = always(final(hits=3, delivered=3))
    result = run(daemon, "watch", "-e", EVENT, "-t", "813", "-c", "2")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2:] == [f"{EVENT}: 3 hits: 3 delivered, 0 lost, 0 dropped", "2 shown"]


def test_a_process_a_guard_and_a_filter_are_passed_on(daemon: FakeDaemon) -> None:
    grant_then(daemon, gone(1))
    run(daemon, "watch", "-e", EVENT, "-p", "812", "--guard", "50")
    daemon.answers["claim"] = always(message("granted", claim=2, pieces=[], ring_bytes=0), gone(2))
    run(daemon, "watch", "-e", EVENT, "-a", "--only-pid", "812")
    process, filtered = daemon.asked("claim")
    assert (process["pid"], process["tid"], process["guard"]) == (812, 0, 50)
    assert (filtered["only_pid"], "pid" in filtered, "cpus" in filtered) == (812, False, False)
    assert not any("across_exec" in request for request in (process, filtered))


@pytest.mark.parametrize("verb", ["watch", "stat", "hold"])
def test_what_happens_to_a_claim_is_told_beside_the_hits(daemon: FakeDaemon, verb: str) -> None:
    # Given a claim that is silenced, is armed again, and loses a CPU before its target exits,
    resumed = message("resumed", claim=1, sentence="it reports again")
    between = [hits(1, record())] if verb == "watch" else []
    grant_then(daemon, guarded(1), *between, resumed, offline(1, 1), gone(1, hits=1, delivered=1))
    result = run(daemon, verb, "-e", EVENT, "-t", "813")

    # then each is a line on stderr, with the remedy where there is one, and none of them ends it.
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"hwbpctl: claim 1 ({EVENT}) guarded: silenced: more than 10000 hits a second (hwbpctl rearm 1)",
        f"hwbpctl: claim 1 ({EVENT}) resumed: it reports again",
        f"hwbpctl: claim 1 ({EVENT}) offline: cpu 1 went offline",
    ]
    assert verb != "watch" or "0x401136" in result.stdout


def test_what_happens_to_a_claim_is_json_for_programs(daemon: FakeDaemon) -> None:
    grant_then(daemon, offline(1, 1), gone(1))
    result = run(daemon, "hold", "-e", EVENT, "-t", "813", as_json=True)
    assert json.loads(result.stderr) == {"type": "offline", "claim": 1, "event": EVENT, "cpu": 1} | {
        "sentence": "cpu 1 went offline",
    }


def test_a_count_that_the_guard_cut_short_is_marked(daemon: FakeDaemon) -> None:
    grant_then(daemon, guarded(1))
    daemon.answers["release"] = always(final(hits=10_000))
    assert "10,000      mem:0x404040/8:w  (guarded: the count stopped)" in (
        run(daemon, "stat", "-e", EVENT, "-a", "--timeout", "0.2").stdout
    )


@pytest.mark.parametrize(("reason", "status"), [("exec", 1), ("stolen", 1)])
def test_a_claim_that_ends_before_its_target_is_told_why(daemon: FakeDaemon, reason: str, status: int) -> None:
    grant_then(daemon, gone(1, reason))
    result = run(daemon, "watch", "-e", EVENT, "-t", "813")
    assert result.exit_code == status
    assert result.stderr.startswith("hwbpctl: claim 1 is over: ")


def test_stat_counts_until_its_time_is_over(daemon: FakeDaemon) -> None:
    daemon.answers["release"] = lambda request: [final(claim=request["claim"], hits=1000 * request["claim"])]
    result = run(daemon, "stat", "-e", EVENT, "-e", "mem:0x404048:rw", "-C", "0,1", "--timeout", "0.01")
    assert result.exit_code == 0
    assert " Counts for cpu 0-1:" in result.stdout
    assert "             1,000      mem:0x404040/8:w" in result.stdout
    assert "             2,000      mem:0x404048/4:rw" in result.stdout
    requests = daemon.asked("claim")
    assert [(request["cpus"], request["delivery"]) for request in requests] == [([0, 1], "count")] * 2
    value = json.loads(run(daemon, "stat", "-e", EVENT, "-a", "--timeout", "0.01", as_json=True).stdout)
    assert value["events"][0]["hits"] == 3000


def test_hold_ends_with_its_target(daemon: FakeDaemon) -> None:
    grant_then(daemon, gone(1))
    result = run(daemon, "hold", "-e", EVENT, "-t", "813", "-C", "1")
    assert result.exit_code == 0
    assert result.stdout == f"held on tid 813 on cpu 1: claim 1 ({EVENT}); Ctrl-C gives back\n"
    assert daemon.asked("claim")[0]["delivery"] == "hold"


def test_a_claim_that_an_operator_released_is_status_1(daemon: FakeDaemon) -> None:
    grant_then(daemon, gone(1, "forced"))
    result = run(daemon, "hold", "-e", EVENT, "-a")
    assert result.exit_code == 1
    assert result.stderr == "hwbpctl: claim 1 is over: root released it\n"
    daemon.answers["claim"] = always(message("granted", claim=5, pieces=[], ring_bytes=0), gone(5, "forced"))
    as_json = run(daemon, "hold", "-e", EVENT, "-a", as_json=True)
    assert json.loads(as_json.stderr) == {"claim": 5, "reason": "forced", "sentence": "root released it"}


def test_a_daemon_that_ends_meanwhile_is_status_3(daemon: FakeDaemon) -> None:
    grant_then(daemon, hits(1, record()), message("closing", sentence="hwbpd ends"))
    result = run(daemon, "watch", "-e", EVENT, "-a")
    assert result.exit_code == 3
    assert "the session was lost before its counts were told" in result.stdout
    assert result.stderr == "hwbpctl: claim 1 is over: hwbpd ends\n"


# --- waiting, and giving way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["watch", "stat", "hold"])
def test_whoever_may_wait_shows_its_place_until_there_is_room(daemon: FakeDaemon, verb: str) -> None:
    # Given a daemon without room at first,
    daemon.answers["claim"] = always(queued(1), room(1), gone(1))

    # when a verb may wait, then it says behind whom it does, in a line, and goes on as ever once it has its slot.
    result = run(daemon, verb, "-e", EVENT, "-t", "813", "-w", "30", "--priority", "-2")
    assert result.exit_code == 0
    assert result.stderr == (
        f"hwbpctl: claim 1 ({EVENT}) waiting, 2nd: behind gdb[812] as ptrace: 1 on tid 813 (claim 4)\n"
    )
    (request,) = daemon.asked("claim")
    assert (request["priority"], request["wait_until_ns"] > 0) == (-2, True)


@pytest.mark.parametrize("words", [[], ["-n"], ["-w", "0"]])
def test_who_does_not_ask_for_a_wait_fails_at_once(daemon: FakeDaemon, words: list[str]) -> None:
    daemon.answers["claim"] = always(FULL)
    assert run(daemon, "hold", "-e", EVENT, "-a", *words).exit_code == 1
    assert "wait_until_ns" not in daemon.asked("claim")[0]


def test_a_wait_in_vain_is_a_refusal(daemon: FakeDaemon) -> None:
    in_vain = gone(1, "timeout") | {"sentence": "no room came for tid 813 in 5.000 s"}
    daemon.answers["claim"] = always(queued(1), in_vain)
    result = run(daemon, "hold", "-e", EVENT, "-a", "-w", "5", as_json=True)
    waiting, refused = map(json.loads, result.stderr.splitlines())
    assert result.exit_code == 1
    assert (waiting["type"], waiting["position"], waiting["holders"][0]["pid"]) == ("waiting", 2, 812)
    assert (refused["class"], refused["errno"], refused["claim"]) == ("WaitTimedOut", "ETIMEDOUT", 1)


def test_of_several_events_the_later_ones_wait_for_what_is_left_of_the_time(daemon: FakeDaemon) -> None:
    grant_then(daemon)
    daemon.answers["claim"] = _each_then_gone(daemon.answers["claim"])
    run(daemon, "hold", "-e", EVENT, "-e", "mem:0x404048/8:w", "-a", "-w", "30")
    first, second = (request["wait_until_ns"] for request in daemon.asked("claim"))
    assert abs(first - second) < 1_000_000, "one deadline for both"


def _each_then_gone(grant: Any) -> Any:
    return lambda request: [*(granted := grant(request)), gone(granted[0]["claim"])]


def test_who_is_asked_to_give_way_does_and_says_so(daemon: FakeDaemon) -> None:
    # Given a claim that has to give way, and is resumed later,
    grant_then(daemon, revoke(1))
    daemon.answers["yield"] = always(message("yielded", claim=1), suspended(1), resumed(1), gone(1))
    result = run(daemon, "hold", "-e", EVENT, "-t", "813")

    # then it does so at once, exactly once, and each step is told.
    assert result.exit_code == 0
    assert len(daemon.asked("yield")) == 1
    assert [line.split(") ")[1] for line in result.stderr.splitlines()] == [
        "revoke: has to give way to claim 4",
        "suspended: it has given way",
        "resumed: it has its slots again",
    ]


def test_what_asks_to_give_way_is_named_for_programs(daemon: FakeDaemon) -> None:
    grant_then(daemon, revoke(1, deadline_ns=5))
    daemon.answers["yield"] = always(suspended(1), gone(1), error("EINVAL", "too late"))
    told = [json.loads(line) for line in run(daemon, "hold", "-e", EVENT, "-a", as_json=True).stderr.splitlines()]
    assert (told[0]["type"], told[0]["holders"][0]["pid"], told[0]["deadline_ns"]) == ("revoke", 812, 5)
    assert told[1]["type"] == "suspended"


@pytest.mark.parametrize(
    ("words", "passed_on"),
    [([], []), (["--until", "7", "--check"], ["--until", "7", "--check"])],
)
def test_replay_runs_the_daemons_own_and_passes_its_status_on(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, words: list[str], passed_on: list[str]
) -> None:
    ran = []

    def run_instead(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 1 if words else -9)

    monkeypatch.setattr(subprocess, "run", run_instead)
    assert run(daemon, "replay", "the journal", *words, as_json=True).exit_code == (1 if words else 128 + 9)
    assert ran == [[sys.executable, "-P", "-m", "hwbpd.replay", "the journal", "--json", *passed_on]]
    assert daemon.requests == []


# --- as a process of its own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_hold_cleanly_and_gives_the_slots_back(daemon: FakeDaemon, number: int) -> None:
    with start(daemon, "hold", "-e", EVENT, "-a") as process:
        assert line_of(process).startswith("held on all cpus")
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr
        assert process.stderr.read() == ""
    assert [request["op"] for request in daemon.requests[-2:]] == ["release", "goodbye"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_wait_and_runs_no_command(daemon: FakeDaemon, tmp_path: Path, number: int) -> None:
    daemon.answers["claim"] = always(queued(1))
    with start(daemon, "hold", "-e", EVENT, "-a", "-w", "600", "touch", str(tmp_path / "ran")) as process:
        assert process.stderr
        assert "waiting, 2nd" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(30) == 1
        assert process.stderr.readline() == "hwbpctl: ETIMEDOUT: stopped while it waited; nothing is held\n"
    assert not (tmp_path / "ran").exists()
    assert [request["op"] for request in daemon.requests[-2:]] == ["release", "goodbye"]


def test_ctrl_c_ends_watch_with_its_totals(daemon: FakeDaemon) -> None:
    grant_then(daemon, hits(1, record()))
    daemon.answers["release"] = always(final(hits=1, delivered=1))
    with start(daemon, "watch", "-e", EVENT, "-a") as process:
        assert "0x401136" in line_of(process)
        process.send_signal(signal.SIGINT)
        assert line_of(process) == f"{EVENT}: 1 hit: 1 delivered, 0 lost, 0 dropped\n"
        assert process.wait(30) == 0


def test_hold_runs_a_command_once_the_slots_are_held_and_returns_its_status(daemon: FakeDaemon, tmp_path: Path) -> None:
    # Given a daemon that looks, when it grants, whether the command has run,
    trace = tmp_path / "ran"
    early = []
    grant = daemon.answers["claim"]

    def looking(request: dict[str, Any]) -> list[dict[str, Any]]:
        early.append(trace.exists())
        return grant(request)

    daemon.answers["claim"] = looking

    # when a command runs while two slots are held, then it ran after both were granted, and its status is ours.
    with start(daemon, "hold", "-e", EVENT, "-e", EVENT, "-a", "--", "sh", "-c", f"touch {trace}; exit 9") as process:
        assert process.wait(30) == 9
    assert early == [False, False]
    assert trace.exists()
    assert len(daemon.asked("release")) == 2


def test_hits_that_come_with_the_release_are_shown_when_the_command_has_ended(daemon: FakeDaemon) -> None:
    daemon.answers["release"] = always(hits(1, record(0x77)), final(hits=1, delivered=1))
    with start(daemon, "watch", "-e", EVENT, "-a", "true") as process:
        assert "cpu 1   0x77" in line_of(process)
        assert line_of(process) == f"{EVENT}: 1 hit: 1 delivered, 0 lost, 0 dropped\n"
        assert process.wait(30) == 0


def test_a_command_without_another_target_is_the_target(daemon: FakeDaemon, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with start(daemon, "stat", "-e", EVENT, "--", "sh", "-c", f"echo $$ > {pid_file}; kill -9 $$") as process:
        assert process.wait(30) == 128 + 9
    (request,) = daemon.asked("claim")
    assert request["tid"] == int(pid_file.read_text())
    assert request["across_exec"] is True


def test_a_command_beside_another_target_says_nothing_of_its_exec(daemon: FakeDaemon) -> None:
    with start(daemon, "stat", "-e", EVENT, "-t", str(os.getpid()), "--", "true") as process:
        assert process.wait(30) == 0
    assert "across_exec" not in daemon.asked("claim")[0]


def test_a_command_does_not_run_when_its_slots_are_refused(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["claim"] = always(FULL)
    with start(daemon, "hold", "-e", EVENT, "-a", "touch", str(tmp_path / "ran")) as process:
        assert process.wait(30) == 1
    assert not (tmp_path / "ran").exists()


def test_a_command_that_does_not_exist_is_reported_as_shells_do(daemon: FakeDaemon) -> None:
    with start(daemon, "hold", "-e", EVENT, "-a", "--", "no-such-command") as process:
        assert process.wait(30) == 127
        assert process.stderr
        assert process.stderr.read() == "hwbpctl: no-such-command: no such command\n"


def test_the_transport_is_not_loaded_for_help() -> None:
    code = "import sys, hwbpctl.__main__; print('zmq' in sys.modules, 'rich' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "clients")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"
