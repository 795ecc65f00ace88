"""The operator's command against a daemon on real registers: what it prints, and with which status it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import hwbp
from examples.target import Target
from hwbpd_linux.cpus import online_cpus
from tests.hardware.common import EXECUTE_BYTES, X86
from tests.hardware.daemon import (
    MARKS,
    POOL,
    WAIT_S,
    Daemon,
    all_free,
    kernel_free,
    kernel_room,
    lines_until,
    own_name,
)

pytestmark = MARKS

KIND, UNUSED = ("", "") if X86 else ("data ", "6 of 6 inst slots free; ")
FREE = f"{KIND}slots free"
TOO_LONG = "EINVAL: mem:0x1001/80:w: it takes 13" if X86 else "EOPNOTSUPP: mem:0x1001/80:w: it takes 11"
DONE, REFUSED, USAGE, NOT_REACHABLE = 0, 1, 2, 3
WAIT_FOR_A_LINE = ["--", "sh", "-c", "echo runs; read line; exit 7"]


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def client(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect() as client:
        yield client


def argv(daemon: Daemon, *words: str) -> list[str]:
    return [sys.executable, "-m", "hwbpctl", "--socket", str(daemon.socket), *words]


def hwbpctl(daemon: Daemon, *words: str, status: int = DONE) -> subprocess.CompletedProcess[str]:
    """Run it to its end, which must have that status."""
    done = subprocess.run(argv(daemon, *words), capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    return done


def answer(daemon: Daemon, *words: str) -> Any:
    """Return its answer to programs."""
    return json.loads(hwbpctl(daemon, "--json", *words).stdout)


@contextmanager
def running(daemon: Daemon, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run it meanwhile."""
    pipe = subprocess.PIPE
    with subprocess.Popen(argv(daemon, *words), stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str], line: str = "") -> tuple[int, str, str]:
    """Say ``line`` to it and wait for its end; return status, output and complaints."""
    output, complaints = process.communicate(line, timeout=WAIT_S)
    return process.returncode, output, complaints


def write_event(target: Target) -> str:
    return f"mem:{target.variable:#x}/8:w"


# --- asking ----------------------------------------------------------------------------------------------------------


def test_ls_shows_who_holds_what(daemon: Daemon, client: hwbp.Client, target: Target) -> None:
    assert f"4 of 4 {FREE}" in hwbpctl(daemon, "ls").stdout
    wide = client.claim(address=0x1000, length=8, access="rw", delivery="hold", label="spare")
    watch = client.claim(write_event(target), tid=target.tid, kind="ptrace")
    target.command("write 12")

    shown = hwbpctl(daemon, "ls").stdout.splitlines()

    on_cpus, of_wide, of_thread, of_watch = shown[1:]
    assert f"cpu 0-{max(online_cpus())}: {UNUSED}2 of 4 {FREE} (1 cpu-wide, 1 on the busiest task)" in on_cpus
    assert of_wide.split()[:2] == [str(wide.claim_id), own_name()]
    assert "held" in of_wide
    assert of_wide.endswith("spare")
    assert of_thread == f"tid {target.tid}: 1 slot"
    assert of_watch.split()[:6] == [str(watch.claim_id), own_name(), "0", "ptrace", f"{target.variable:#x}/8", "w"]
    assert " 12 armed" in of_watch


def test_ls_answers_programs_with_the_books(daemon: Daemon, client: hwbp.Client, target: Target) -> None:
    watch = client.claim(write_event(target), tid=target.tid)

    told = answer(daemon, "ls")

    assert told["pools"][POOL] == 4
    of_busiest = {pool: int(pool == POOL) for pool in told["pools"]}
    assert [row["busiest_task"] for row in told["cpus"] if row["online"]] == [of_busiest] * len(online_cpus())
    (resource,) = told["resources"]
    assert (int(resource["address"], 16), resource["tid"]) == (target.variable, target.tid)
    assert [claim["claim"] for claim in resource["claims"]] == [watch.claim_id]


def test_caps_tells_what_the_registers_can_hold(daemon: Daemon, client: hwbp.Client) -> None:
    text, told = hwbpctl(daemon, "caps").stdout, answer(daemon, "caps")

    assert f"slots per cpu  {'4' if X86 else '6 (inst), 4 (data)'}" in text
    backend, pools = ("x86", {"any": 4}) if X86 else ("arm64", {"inst": 6, "data": 4})
    assert (told["machine"], told["backend"], told["pools"]) == ("linux", backend, pools)
    assert told["cpus_online"] == list(online_cpus())
    assert told["registers"]["lengths"]["x"] == ([8] if X86 else [2, 4])


def test_why_tells_the_story_of_a_refusal(daemon: Daemon, client: hwbp.Client) -> None:
    for _ in range(4):
        client.claim(address=0x1000, length=8, access="w", delivery="hold")
    refused = hwbpctl(daemon, "hold", "-e", "mem:0x1000/8:w", "-a", status=REFUSED)
    assert refused.stderr.startswith(f"hwbpctl: ENOSPC: no {KIND}slot on cpu ")
    assert f"held by {own_name()} as perf: 4 cpu-wide on cpu " in refused.stderr
    story = refused.stderr.split()[-1]

    told = hwbpctl(daemon, "why", story).stdout

    assert told.startswith(f"claim {story}: refused\n")
    assert "asked for mem:0x1000/8:w" in told
    assert f"4 of 4 held ({own_name()}" in told
    assert answer(daemon, "why", story)["state"] == "refused"


def test_a_refusal_is_told_to_programs_too(daemon: Daemon, client: hwbp.Client) -> None:
    for _ in range(4):
        client.claim(address=0x1000, length=8, access="w", delivery="hold")

    refused = hwbpctl(daemon, "--json", "hold", "-e", "mem:0x1000/8:w", "-a", status=REFUSED)

    told = json.loads(refused.stderr)
    assert (told["errno"], told["class"]) == ("ENOSPC", "NoFreeSlot")
    assert [(holder["pid"], holder["slots"]) for holder in told["holders"]] == [(os.getpid(), 4)]


# --- using slots -----------------------------------------------------------------------------------------------------


def test_watch_prints_so_many_hits_and_ends(daemon: Daemon, alone: None, target: Target) -> None:
    with running(daemon, "watch", "-e", write_event(target), "-t", str(target.tid), "-c", "5", "--label", "five") as it:
        daemon.logged("granted", label="five")
        target.command("write 9")

        status, output, complaints = end_of(it)

    assert (status, complaints) == (DONE, "")
    after_store = target.code.start + (10 if X86 else 12)  # Arm reports before the store
    hits = [line for line in output.splitlines() if f"[{target.pid}]" in line]
    assert len(hits) == 5
    assert all(f" {after_store:#x}" in line for line in hits)
    assert kernel_free() == all_free()


def test_watch_ends_with_its_target_having_shown_all(daemon: Daemon, alone: None, target: Target) -> None:
    words = [
        "--json",
        "watch",
        "-e",
        write_event(target),
        "-t",
        str(target.tid),
        "--callchain",
        "--label",
        "to the end",
    ]
    with running(daemon, *words) as it:
        daemon.logged("granted", label="to the end")
        target.command("write 200")
        target.kill()

        status, output, complaints = end_of(it)

    assert (status, complaints) == (DONE, "")
    *hits, end = map(json.loads, output.splitlines())
    assert len(hits) == 200
    assert {(hit["tid"], int(hit["address"], 16)) for hit in hits} == {(target.tid, target.variable)}
    assert all(hit["user_chain"][0] == hit["ip"] for hit in hits)
    assert (end["type"], end["shown"], end["hits"], end["lost"], end["dropped"]) == ("end", 200, 200, 0, 0)


def test_stat_counts_while_a_command_runs_and_ends_with_its_status(daemon: Daemon, alone: None, target: Target) -> None:
    events = ["-e", write_event(target), "-e", f"mem:{target.function:#x}/{EXECUTE_BYTES}:x"]
    with running(daemon, "stat", *events, "-t", str(target.tid), *WAIT_FOR_A_LINE) as it:
        lines_until(it, "runs")
        target.command("write 321")
        target.command("call 1234")

        status, output, complaints = end_of(it, "\n")

    assert (status, complaints) == (7, "")
    assert [line.split() for line in output.splitlines() if "mem:" in line] == [
        ["321", write_event(target)],
        ["1,234", f"mem:{target.function:#x}/{EXECUTE_BYTES}:x"],
    ]


def test_stat_ends_when_its_time_is_up(daemon: Daemon, alone: None, target: Target) -> None:
    told = answer(daemon, "stat", "-e", write_event(target), "-t", str(target.tid), "--timeout", "0.05")

    assert [(each["event"], each["hits"]) for each in told["events"]] == [(write_event(target), 0)]
    assert told["elapsed_s"] > 0


def test_hold_keeps_slots_while_a_command_runs(daemon: Daemon, alone: None) -> None:
    with running(daemon, "hold", "-e", "mem:0x1000/8:w", "-e", "mem:0x2000/8:w", "-a", *WAIT_FOR_A_LINE) as it:
        lines_until(it, "runs")
        assert kernel_free() == {cpu: free - 2 for cpu, free in all_free().items()}

        assert end_of(it, "\n")[0] == 7

    assert kernel_free() == all_free()


def test_hold_gives_back_at_ctrl_c(daemon: Daemon, alone: None, target: Target) -> None:
    with running(daemon, "hold", "-e", "mem:0x1000/8:w", "-t", str(target.tid), "--label", "until ctrl-c") as it:
        daemon.logged("granted", label="until ctrl-c")
        assert kernel_room(tid=target.tid) == 3
        assert it.stdout is not None
        assert it.stdout.readline().startswith(f"held on tid {target.tid}: claim ")

        it.send_signal(signal.SIGINT)

        assert end_of(it) == (DONE, "", "")
        assert kernel_free() == all_free()


def test_several_events_are_held_all_or_none(daemon: Daemon, alone: None) -> None:
    events = [word for place in range(5) for word in ("-e", f"mem:{0x1000 + 8 * place:#x}/8:w")]

    refused = hwbpctl(daemon, "hold", *events, "-a", *WAIT_FOR_A_LINE, status=REFUSED)

    assert "ENOSPC" in refused.stderr
    assert refused.stdout == ""  # the command did not run
    assert kernel_free() == all_free()


# --- how it ends otherwise -------------------------------------------------------------------------------------------


def test_release_takes_a_slot_away_and_its_holder_says_so(daemon: Daemon, alone: None) -> None:
    with running(daemon, "hold", "-e", "mem:0x1000/8:w", "-a", "--label", "to be taken") as it:
        claim_id = daemon.logged("granted", label="to be taken")["claim_id"]

        done = hwbpctl(daemon, "release", str(claim_id))

        assert done.stdout == f"claim {claim_id} released: 0 hits: 0 delivered, 0 lost, 0 dropped\n"
        assert kernel_free() == all_free()
        status, _, complaints = end_of(it)
    assert status == REFUSED
    assert complaints.startswith(f"hwbpctl: claim {claim_id} is over: released by ")
    assert f"claim {claim_id} is over" in hwbpctl(daemon, "release", str(claim_id), status=REFUSED).stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["release", "999999"], "ENOENT: there is no claim 999999"),
        (["why", "999999"], "ENOENT: there is no claim 999999"),
        (["hold", "-e", "mem:0x1001/80:w", "-a"], f"{TOO_LONG} slots, and a CPU has 4"),
        (["hold", "-e", "mem:0x1000/8:w", "-C", "8000"], "ENODEV: no cpu 8000"),
        (["hold", "-e", "mem:0x1000/8:w", "-t", "4194304"], "ESRCH: there is no thread 4194304"),
    ],
)
def test_what_is_refused_is_said_and_ends_with_one(
    daemon: Daemon, alone: None, words: list[str], complaint: str
) -> None:
    refused = hwbpctl(daemon, *words, status=REFUSED)

    assert refused.stderr.startswith(f"hwbpctl: {complaint}")
    assert refused.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["hold", "-e", "mem:nowhere", "-a"],
        ["hold", "-e", "mem:0x1000/8:w"],
        ["hold", "-a"],
        ["release", "all"],
        ["no-such-verb"],
    ],
)
def test_wrong_usage_ends_with_two(daemon: Daemon, alone: None, words: list[str]) -> None:
    assert hwbpctl(daemon, *words, status=USAGE).stderr


def test_without_a_daemon_it_ends_with_three_and_says_how_to_start_one(alone: None) -> None:
    with Daemon() as daemon, running(daemon, "hold", "-e", "mem:0x1000/8:w", "-a", "--label", "to be left") as it:
        daemon.logged("granted", label="to be left")

        daemon.kill()

        status, _, complaints = end_of(it)
        assert status == NOT_REACHABLE
        assert "was lost; its claims are over" in complaints
        assert "Start the daemon with: hwbpd" in hwbpctl(daemon, "ls", status=NOT_REACHABLE).stderr
        assert kernel_free() == all_free()
