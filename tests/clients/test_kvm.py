"""What a VMM asks at an entry, and the verbs of ``hwbpctl kvm``."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hwbp
from hwbp import Answer
from hwbp.kvm import Calibration, Finding, Kvm, Measured, Report, Switch, VcpuThread, calibrate, host_breakpoints
from hwbp.kvm import what_is_missing as kvm_missing
from hwbpctl.__main__ import app
from hwbpctl.kvm import calibration_text, report_text
from hwbpd_kvm.actions import Kind
from hwbpd_kvm.calibrate import with_host
from hwbpd_kvm.costs import from_value
from tests.clients.fake_daemon import FakeDaemon, always, error
from tests.clients.test_status_page import CPUS_FROM, ONE_ARMED, Written

CHANGES = 11  # docs/status-page.md, "Layout"
CPU = 2

needs_kvm = pytest.mark.skipif(kvm_missing() is not None, reason=kvm_missing() or "")


# --- the question before an entry ------------------------------------------------------------------------------------


def test_an_entry_knows_what_the_page_said_before_it() -> None:
    # Given a thread that runs a vCPU on one CPU,
    written = Written()
    vcpu = VcpuThread(written.handle(), CPU)

    # when it enters while nothing is armed there, then the answer is none, and it stood;
    with vcpu.guest() as entry:
        assert entry.answer is Answer.NONE
    assert entry.stood

    # when something is, then it is yes; another CPU's is not asked about.
    written.words[CPUS_FROM + CPU] = ONE_ARMED
    with vcpu.guest() as entry:
        assert entry.answer is Answer.YES
    with VcpuThread(written.handle(), CPU + 1).guest() as entry:
        assert entry.answer is Answer.NONE


def test_what_is_armed_between_the_question_and_the_exit_is_told_afterwards() -> None:
    # Given an entry with the answer none,
    written = Written()
    with VcpuThread(written.handle(), CPU).guest() as entry:
        assert entry.answer is Answer.NONE
        # when a breakpoint is armed before the guest is left,
        written.words[CPUS_FROM + CPU] = ONE_ARMED
        written.words[CHANGES] += 1
    # then the VMM learns that the answer may not have held.
    assert not entry.stood


def test_an_answer_from_nobody_never_stood() -> None:
    # Given a daemon that has stopped, when the vCPU enters, then the answer is unknown, which is true, and stood for
    # nothing although no count has changed.
    written = Written()
    written.words[9] = 0
    with VcpuThread(written.handle(), CPU).guest() as entry:
        assert entry.answer is Answer.UNKNOWN
        assert entry.answer
    assert not entry.stood


def test_an_exit_is_seen_by_the_strategy_when_the_run_raises() -> None:
    # Given a VMM with a strategy, when its run fails within an entry, then the vCPU is out of the guest all the same,
    vcpu = VcpuThread(Written().handle(), CPU, Switch("always-x86"))
    with pytest.raises(OSError), vcpu.guest() as entry:
        raise OSError(errno.EINTR, "a signal")
    assert entry.after
    # and can enter again.
    with vcpu.guest():
        pass


# --- a strategy on a real answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("armed", [False, True])
def test_the_four_cases_follow_the_page(armed: bool) -> None:
    # Given Dall's four cases, which switch where the host or the guest has breakpoints, and a guest that has none,
    written = Written()
    written.words[CPUS_FROM + CPU] = ONE_ARMED if armed else 0
    vcpu = VcpuThread(written.handle(), CPU, Switch("four-cases"))

    # when it enters and leaves,
    with vcpu.guest() as entry:
        pass

    # then registers are moved exactly where the page says that the host has some.
    moved = [action for action in (*entry.actions, *entry.after) if action.kind in (Kind.READ, Kind.WRITE)]
    assert bool(moved) is armed


def test_a_strategy_follows_the_guests_accesses_and_the_vmms_sleep() -> None:
    # Given the x86 strategy that stops trapping at the first access,
    switch = Switch("x86-wont-exit")
    vcpu = VcpuThread(Written().handle(), CPU, switch)

    # when the guest writes a register twice,
    with vcpu.guest():
        first, second = switch.accessed("DR0", 0x1000), switch.accessed("DR1", 0x2000)
    switch.put()

    # then only the first has trapped; after the exit it traps again.
    assert [[action.kind for action in actions].count(Kind.TRAP) for actions in (first, second)] == [1, 0]
    with vcpu.guest():
        assert Kind.TRAP in [action.kind for action in switch.accessed("DR0")]


def test_a_strategy_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="no strategy 'lazy'; there are always"):
        Switch("lazy")


# --- host breakpoints by claim ---------------------------------------------------------------------------------------


def test_breakpoints_that_the_daemon_refuses_are_a_refusal_with_its_errno(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    # Given a daemon without room, when a breakpoint is wanted, then its errno and its sentence arrive.
    daemon.answers["claim"] = always(error("ENOSPC", "no slot on tid 812"))
    with pytest.raises(OSError, match="no slot on tid 812") as why, host_breakpoints(client)(1):
        pass
    assert why.value.errno == errno.ENOSPC


# --- verbs -----------------------------------------------------------------------------------------------------------


def test_a_report_names_what_does_not_work_and_what_came_instead() -> None:
    report = Report(
        "KVM's emulator",
        "the CPU",
        (Finding("VMM: single step", 0, True, "KVM_EXIT_DEBUG"), Finding("VMM: INT3", 3, False, "exception 3")),
    )
    assert report_text(report).splitlines() == [
        "ring 0 is executed by KVM's emulator; ring 3 by the CPU",
        "",
        "VMM: single step  ring 0  yes  KVM_EXIT_DEBUG",
        "VMM: INT3         ring 3  NO   exception 3",
        "",
        "1 of 2 work as on a CPU",
        "NO is a limit of this host's KVM: do without, or debug where the CPU executes the guest",
    ]


def test_a_calibration_shows_medians_and_quartiles() -> None:
    measured, prices = (Measured("KVM_RUN", 1000, 900, 1100),), {"exit": Measured("exit", 5, 4, 6)}
    found = Calibration("h", "measured on h", "the CPU", measured, prices, ())
    assert calibration_text(found).splitlines() == [
        "measured on h",
        "ring 0 is executed by the CPU",
        "",
        "  KVM_RUN       1000 ns  (900 to 1100)",
        "",
        "prices:",
        "  exit          5 ns  (4 to 6)",
    ]


@needs_kvm
def test_the_probe_answers_for_programs() -> None:
    result = CliRunner().invoke(app, ["kvm", "probe", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert {"ring_0", "ring_3", "findings"} == set(answer)
    assert {"ability", "ring", "works", "found"} == set(answer["findings"][0])


@needs_kvm
def test_a_calibration_is_a_price_list(tmp_path: Path) -> None:
    # Given no daemon, when the host is calibrated into a file,
    file = tmp_path / "prices.json"
    words = ["--socket", str(tmp_path / "none.sock"), "kvm", "calibrate", "-r", "2", "-o", str(file)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)

    # then it says that the host's breakpoints are missing from it, and the file is one that the comparison takes.
    assert result.exit_code == 0
    assert "host breakpoints: not measured" in result.stdout
    prices = from_value(json.loads(file.read_text()))
    assert prices.unit == "ns"
    assert prices.exit.amount > 0


@needs_kvm
def test_host_breakpoints_are_measured_as_far_as_they_are_to_be_had() -> None:
    # Given a host that has two breakpoints left,
    held = []

    @contextmanager
    def host(count: int) -> Iterator[None]:
        if count > 2:
            raise OSError(errno.ENOSPC, "no room")
        held.append(count)
        yield

    # when it is calibrated,
    rounds = []
    with Kvm() as kvm:
        found = calibrate(kvm, host, rounds=2, runs=2, progress=lambda done, of: rounds.append((done, of)))

    # then both are in it, the third is a note, and every round was told.
    names = {way.name for way in found.measured}
    assert {with_host(1), with_host(2)} <= names
    assert with_host(3) not in names
    assert any("3 were not to be had (no room)" in note for note in found.notes)
    assert held.count(1) == held.count(2) == 1 + 2  # tried once, and once in each round
    assert rounds == [(1, 2), (2, 2)]
