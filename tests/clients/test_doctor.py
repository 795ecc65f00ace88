"""What hwbpctl doctor says of a host and a daemon, healthy or not, and its exit status."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import hwbp
from hwbpctl import check_daemon, check_firing, check_host, findings
from hwbpctl.__main__ import app
from hwbpctl.findings import Finding, Grade
from tests.clients.fake_daemon import CAPABILITIES, FakeDaemon, Message, always, error, hits, message, record

CPUS = sorted(os.sched_getaffinity(0))
NO_SUCH_CPU = 8191
LIMITS_HEAD = "Limit                     Soft Limit           Hard Limit           Units     \n"
ROOT_CAPABILITIES, NO_CAPABILITIES = "000001ffffffffff", "0000000000000000"


def serve_this_host(daemon: FakeDaemon, online: Sequence[int] = CPUS, fires_on: Sequence[int] = CPUS) -> None:
    """Let the fake be a daemon on this host whose breakpoints fire on some of the CPUs."""
    daemon.machine = "linux"
    limits = {"ring_bytes_default": 262144}
    daemon.answers["capabilities"] = always(
        message("capabilities", **CAPABILITIES | {"cpus_online": list(online), "limits": limits})
    )
    grant = daemon.answers["claim"]

    def granted(request: Message) -> list[Message]:
        (reply,) = grant(request)
        return [reply, hits(reply["claim"], *(record(cpu=cpu) for cpu in fires_on))]

    daemon.answers["claim"] = granted


def doctor(path: Path, *before: str) -> Result:
    return CliRunner().invoke(app, ["--socket", str(path), *before, "doctor"], catch_exceptions=False)


def trials(client: hwbp.Client) -> list[Finding]:
    return list(check_firing.trials(client, lambda _: None))


# --- the whole -------------------------------------------------------------------------------------------------------


def test_a_healthy_host_is_a_line_for_each_check_and_status_0(daemon: FakeDaemon) -> None:
    # Given a daemon on this host whose breakpoints fire on every CPU,
    serve_this_host(daemon)
    affinity = os.sched_getaffinity(0)

    # when it is examined, then nothing is broken, and all that was claimed has been given back.
    result = doctor(daemon.path)
    assert result.exit_code == 0
    assert "broken  " not in result.stdout
    for name in ("data, user", "exec, user", "data, kernel"):
        assert f"ok      {name:<17}fires on cpu {hwbp.format_cpus(CPUS)}\n" in result.stdout
    assert len(daemon.asked("release")) == len(daemon.asked("claim")) == 3
    assert daemon.requests[-1]["op"] == "goodbye"
    assert os.sched_getaffinity(0) == affinity
    assert [text for text in result.stdout.splitlines() if len(text) > 80 and str(daemon.path) not in text] == []


def test_a_breakpoint_that_never_fires_is_status_1_and_names_the_cpu(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a machine that takes breakpoints and never reports,
    monkeypatch.setattr(check_firing, "HIT_WAIT_S", 0.01)
    serve_this_host(daemon, fires_on=[])

    # when it is examined for a program, then it is told, with a remedy.
    result = doctor(daemon.path, "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["ok"] is False
    (finding,) = [each for each in answer["findings"] if each["name"] == "data, kernel"]
    assert finding["grade"] == "broken"
    assert finding["sentence"] == f"no hit came on cpu {hwbp.format_cpus(CPUS)}, though the slot was armed"
    assert finding["remedy"]


def test_without_a_daemon_the_host_is_still_examined(tmp_path: Path) -> None:
    result = doctor(tmp_path / "absent")
    assert result.exit_code == 1
    assert "kernel" in result.stdout
    assert "broken  daemon" in result.stdout
    assert "-> systemctl start hwbpd" in result.stdout


def test_a_check_that_fails_does_not_keep_the_others_from_being_made(daemon: FakeDaemon) -> None:
    serve_this_host(daemon)
    daemon.answers["foreign"] = always(error("EBADMSG", "an older daemon"))
    result = doctor(daemon.path)
    assert result.exit_code == 1
    assert "broken  outside          an older daemon" in result.stdout
    assert "data, kernel" in result.stdout


def test_a_finding_is_wrapped_with_its_remedy_below_and_commands_stay_whole() -> None:
    command = "sysctl-with-a-name-that-is-much-longer-than-the-line-has-room-for"
    text = findings.line(findings.note("paranoia", "word " * 30, command))
    first, *rest = text.split("\n")
    assert first.startswith("note    paranoia         word word")
    assert all(line.startswith(" " * 25) for line in rest)
    assert command in rest[-1]
    assert max(map(len, text.split("\n")[:-2])) <= 80


def test_all_is_well_only_without_a_note() -> None:
    well, noted, bad = findings.ok("a", ""), findings.note("b", ""), findings.broken("c", "", "")
    assert findings.summary([well]) == "all is well"
    assert findings.summary([well, noted]) == "nothing is broken, 1 note"
    assert findings.summary([noted, noted, bad]) == "1 thing broken, 2 notes"


# --- does it fire ----------------------------------------------------------------------------------------------------


def test_each_trial_claims_for_our_own_thread_what_it_then_hits(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.machine = "linux"
    with hwbp.connect(daemon.path) as on_this_host:
        serve_this_host(daemon)
        trials(on_this_host)
    asked = [(each["access"], each["user"], each["kernel"], each["length"]) for each in daemon.asked("claim")]
    assert asked == [("w", True, False, 8), ("x", True, False, 8), ("w", False, True, 8)]
    assert {each["tid"] for each in daemon.asked("claim")} == {os.getpid()}


def test_a_single_silent_cpu_is_named(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_firing, "HIT_WAIT_S", 0.01)
    serve_this_host(daemon, fires_on=CPUS[1:])
    with hwbp.connect(daemon.path) as client:
        assert {(each.grade, each.sentence.split(",")[0]) for each in trials(client)} == {
            (Grade.BROKEN, f"no hit came on cpu {CPUS[0]}")
        }


def test_a_cpu_where_we_may_not_run_is_not_called_silent(daemon: FakeDaemon) -> None:
    serve_this_host(daemon, online=[*CPUS, NO_SUCH_CPU])
    with hwbp.connect(daemon.path) as client:
        first = trials(client)[0]
    assert first.grade is Grade.NOTE
    assert first.sentence.endswith(f"not tried on cpu {NO_SUCH_CPU}, where this process may not run")


@pytest.mark.parametrize(
    ("errno_name", "grade"),
    [("ENOSPC", Grade.NOTE), ("EPERM", Grade.NOTE), ("EINVAL", Grade.BROKEN)],
)
def test_what_cannot_be_tried_is_told_with_the_reason(daemon: FakeDaemon, errno_name: str, grade: Grade) -> None:
    serve_this_host(daemon)
    daemon.answers["claim"] = always(error(errno_name, "the reason"))
    with hwbp.connect(daemon.path) as client:
        for finding in trials(client):
            assert finding.grade is grade
            assert "the reason" in finding.sentence
            assert finding.remedy


def test_another_machine_than_this_host_is_not_tried(client: hwbp.Client, daemon: FakeDaemon) -> None:
    assert [each.grade for each in trials(client)] == [Grade.NOTE]
    assert daemon.asked("claim") == []
    assert check_daemon.answers(client, daemon.path).grade is Grade.BROKEN


# --- the host --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "grade"),
    [
        ("6.0.0", Grade.OK),
        ("6.18.44-amd64", Grade.OK),
        ("10.1-rc1", Grade.OK),
        ("5.19.17", Grade.BROKEN),
        ("unknown", Grade.BROKEN),
    ],
)
def test_the_kernel_must_be_recent_enough(release: str, grade: Grade) -> None:
    assert check_host.kernel(release).grade is grade


@pytest.mark.parametrize(
    ("level", "grade", "says"),
    [
        (-1, Grade.NOTE, "whole CPUs"),
        (0, Grade.NOTE, "whole CPUs"),
        (1, Grade.OK, "hits in the kernel included"),
        (2, Grade.OK, "in user mode"),
        (4, Grade.NOTE, "refuse users everything"),
    ],
)
def test_paranoia_is_told_by_what_it_means(tmp_path: Path, level: int, grade: Grade, says: str) -> None:
    setting = tmp_path / "perf_event_paranoid"
    setting.write_text(f"{level}\n")
    finding = check_host.paranoia(setting)
    assert finding.grade is grade
    assert f"is {level}: " in finding.sentence
    assert says in finding.sentence


def test_a_kernel_without_perf_events_is_broken(tmp_path: Path) -> None:
    assert check_host.paranoia(tmp_path / "absent").grade is Grade.BROKEN


# --- the daemon ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "directory_mode", "grade", "says"),
    [
        (0o666, 0o755, Grade.OK, "everybody may connect"),
        (0o660, 0o755, Grade.OK, "group"),
        (0o644, 0o755, Grade.NOTE, "only uid"),
        (0o600, 0o755, Grade.NOTE, "only uid"),
        (0o666, 0o777, Grade.BROKEN, "answer in the daemon's place"),
        (0o666, 0o1777, Grade.OK, "everybody may connect"),
    ],
)
def test_a_socket_is_judged_by_who_may_connect_and_who_could_replace_it(
    tmp_path: Path, mode: int, directory_mode: int, grade: Grade, says: str
) -> None:
    directory = tmp_path / "hwbpd"
    directory.mkdir()
    path = directory / "hwbpd.sock"
    path.touch()
    path.chmod(mode)
    directory.chmod(directory_mode)
    finding = check_daemon.socket_file(path)
    assert finding.grade is grade
    assert says in finding.sentence


def test_a_socket_of_somebody_else_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "hwbpd.sock"
    path.touch()
    assert check_daemon.socket_file(path, frozenset({os.geteuid() + 1})).grade is Grade.BROKEN


def process_of(tmp_path: Path, *, descriptors: str, locked: str, capabilities: str) -> Path:
    """A /proc in which this process, where the fake listens, has these limits, and users 1 MiB of rings per CPU."""
    process, kernel = tmp_path / str(os.getpid()), tmp_path / "sys" / "kernel"
    process.mkdir()
    kernel.mkdir(parents=True)
    rows = {"Max open files": (descriptors, "files"), "Max locked memory": (locked, "bytes")}
    lines = [f"{name:<26}{value:<21}{value:<21}{unit:<10}\n" for name, (value, unit) in rows.items()]
    (process / "limits").write_text(LIMITS_HEAD + "".join(lines))
    (process / "status").write_text(f"Name:\thwbpd\nCapEff:\t{capabilities}\n")
    (kernel / "perf_event_mlock_kb").write_text("1024\n")
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "grade", "says"),
    [
        (("1048576", "65536", ROOT_CAPABILITIES), Grade.OK, "any number of rings"),
        (("1048576", "unlimited", NO_CAPABILITIES), Grade.OK, "any number of rings"),
        (("unlimited", "unlimited", NO_CAPABILITIES), Grade.OK, "any number of threads"),
        (("1024", "unlimited", ROOT_CAPABILITIES), Grade.NOTE, "more than 512 threads on 2 cpus is refused"),
        (("1048576", "262144", NO_CAPABILITIES), Grade.OK, "memory for 9 rings"),
        (("1048576", "0", NO_CAPABILITIES), Grade.OK, "memory for 8 rings"),
    ],
)
def test_the_daemons_limits_are_told_by_what_they_are_enough_for(
    daemon: FakeDaemon, tmp_path: Path, settings: tuple[str, str, str], grade: Grade, says: str
) -> None:
    serve_this_host(daemon, online=[0, 1])
    descriptors, locked, capabilities = settings
    proc = process_of(tmp_path, descriptors=descriptors, locked=locked, capabilities=capabilities)
    with hwbp.connect(daemon.path) as client:
        finding = check_daemon.limits(client, daemon.path, proc)
    assert finding.grade is grade
    assert says in finding.sentence


def test_too_little_memory_for_a_ring_per_slot_is_noted(daemon: FakeDaemon, tmp_path: Path) -> None:
    # Given 1 MiB for each of two CPUs, when rings have 1 MiB, then two of eight slots can have one.
    serve_this_host(daemon)
    limits = CAPABILITIES | {"limits": {"ring_bytes_default": 1 << 20}}
    daemon.answers["capabilities"] = always(message("capabilities", **limits))
    proc = process_of(tmp_path, descriptors="1048576", locked="0", capabilities=NO_CAPABILITIES)
    with hwbp.connect(daemon.path) as client:
        finding = check_daemon.limits(client, daemon.path, proc)
    assert finding.grade is Grade.NOTE
    assert "memory for only 2 rings of 1024 KiB" in finding.sentence


def test_holders_outside_the_daemon_are_a_note_and_nobody_is_well(daemon: FakeDaemon, client: hwbp.Client) -> None:
    assert check_daemon.foreign(client).grade is Grade.OK
    holder: dict[str, Any] = {"pid": 97, "comm": "perf", "uid": 0, "kind": "", "slots": 1, "evidence": "perf fd"}
    daemon.answers["foreign"] = always(message("foreign", holders=[holder | {"place": "cpu-wide on cpu 0"}]))
    finding = check_daemon.foreign(client)
    assert finding.grade is Grade.NOTE
    assert finding.sentence == "perf[97]: 1 cpu-wide on cpu 0, known from perf fd"
    daemon.answers["foreign"] = always(error("EPERM", "only root may look"))
    assert check_daemon.foreign(client).remedy == "sudo hwbpctl doctor"
