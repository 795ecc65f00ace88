"""A VMM in the library: what it loads and when, what it tells, and how its vCPUs are shown. The daemon is a fake."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest
from typer.testing import CliRunner

import hwbp
from hwbp.kvm import REPORT_NS, Switch, VcpuThread
from hwbpctl import listing
from hwbpctl.__main__ import app
from hwbpctl.kvm import vms_text
from tests.clients.fake_daemon import FakeDaemon, Message, always, error, message, notice
from tests.clients.rows import cpu, held, slots_of
from tests.clients.test_status_page import Written

SLOT = {"resource": 9, "pool": "any", "number": 2, "address": 0x404040, "length": 8, "access": "w"}
TID = 812


def registers(version: int, *slots: dict[str, Any]) -> Message:
    return notice("registers", vcpu=5, version=version, slots=list(slots), registers={"DR7": 0x90602} if slots else {})


@pytest.fixture
def vcpu(daemon: FakeDaemon, client: hwbp.Client) -> hwbp.Vcpu:
    daemon.answers["vm"] = always(message("vm", vm=3))
    daemon.answers["vcpu"] = always(message("vcpu", vcpu=5, pools={"any": 4}))
    for op in ("vcpu_loaded", "vcpu_report"):
        daemon.answers[op] = always(message(op, vcpu=5))
    daemon.answers["vcpu_hit"] = always(message("vcpu_hit", vcpu=5, counted=1))
    return client.vm("guest").vcpu(1, TID, strategy="x86-wont-exit")


def sent(daemon: FakeDaemon, op: str) -> list[Message]:
    """What was asked under that name, without what every request has."""
    every = ("op", "id", "epoch", "deadline_ns")
    return [
        {name: value for name, value in request.items() if name not in every}
        for request in daemon.requests
        if request["op"] == op
    ]


def told(daemon: FakeDaemon, client: hwbp.Client, *notices: Message) -> None:
    """Let these arrive, as a daemon that has something to tell amid whatever is asked."""
    daemon.answers["vms"] = always(*notices, message("vms", vms=[]))
    client.vms()


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_a_vcpu_is_registered_as_it_was_said(daemon: FakeDaemon, vcpu: hwbp.Vcpu) -> None:
    assert sent(daemon, "vm") == [{"label": "guest"}]
    said = {"vm": 3, "number": 1, "tid": TID, "strategy": "x86-wont-exit", "profile": ""}
    assert sent(daemon, "vcpu") == [said]
    assert (vcpu.vcpu_id, vcpu.pools, vcpu.loaded.slots) == (5, {"any": 4}, ())


def test_only_what_was_told_last_is_loaded_and_answered_once(
    daemon: FakeDaemon, client: hwbp.Client, vcpu: hwbp.Vcpu
) -> None:
    # given nothing that was told, then nothing is loaded
    written: list[hwbp.Contents] = []
    assert not vcpu.load(written.append)

    # when the daemon tells
    told(daemon, client, registers(1, SLOT))
    assert vcpu.load(written.append)

    # then it is written, kept as what is loaded, and answered; and that was all there was to do
    assert [(contents.version, contents.registers) for contents in written] == [(1, {"DR7": 0x90602})]
    assert vcpu.loaded is written[0]
    assert sent(daemon, "vcpu_loaded") == [{"vcpu": 5, "version": 1}]
    assert not vcpu.load(written.append)


def test_what_cannot_be_written_is_said_and_what_was_loaded_stays(
    daemon: FakeDaemon, client: hwbp.Client, vcpu: hwbp.Vcpu
) -> None:
    told(daemon, client, registers(1, SLOT))
    vcpu.load(lambda _: None)
    told(daemon, client, registers(2))

    def write(_: hwbp.Contents) -> None:
        raise OSError(errno.EINVAL, "not these")

    assert not vcpu.load(write)
    assert sent(daemon, "vcpu_loaded")[-1] == {"vcpu": 5, "version": 2, "errno": errno.EINVAL}
    assert vcpu.loaded.version == 1


def test_a_hit_names_what_is_in_the_slots_that_were_hit(
    daemon: FakeDaemon, client: hwbp.Client, vcpu: hwbp.Vcpu
) -> None:
    told(daemon, client, registers(1, SLOT))
    vcpu.load(lambda _: None)

    # a slot that holds something, one that holds nothing, and one of another pool
    assert vcpu.hit([2], 0x401000) == 1
    assert vcpu.hit([0], 0x401000) == 0
    assert vcpu.hit([2], 0x401000, pool="data") == 0

    assert sent(daemon, "vcpu_hit") == [{"vcpu": 5, "resources": [9], "ip": 0x401000, "kernel": True}]


def test_kgdb_is_heard_of(daemon: FakeDaemon, client: hwbp.Client, vcpu: hwbp.Vcpu) -> None:
    assert client.kgdb_claims == 0
    told(daemon, client, notice("kgdb", claims=2, sentence="kgdb takes registers"))
    assert client.kgdb_claims == 2


def test_a_claim_on_a_vcpu_says_so_and_hears_that_it_is_loaded(daemon: FakeDaemon, client: hwbp.Client) -> None:
    piece = {"address": 0x404040, "length": 8, "access": "w", "pool": "any"}
    granted = message("granted", claim=1, pieces=[piece], ring_bytes=0, kind="perf", guard=0)
    daemon.answers["claim"] = always(granted)

    watch = client.claim("mem:0x404040/8:w", vcpu=5)
    told(daemon, client, notice("loaded", claim=1, sentence="its VMM has loaded it"))

    assert [request["vcpu"] for request in sent(daemon, "claim")] == [5]
    assert [change.what for change in watch.changes()] == ["loaded"]
    assert watch.state == "armed"


def test_the_hosts_contents_are_values(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["host_contents"] = always(message("host_contents", slots=[SLOT], registers={"DR0": 1}))

    contents = client.host_contents(3, TID)

    assert sent(daemon, "host_contents") == [{"cpu": 3, "tid": TID}]
    assert (contents.slots[0].address, contents.registers) == (0x404040, {"DR0": 1})


# --- what is counted -------------------------------------------------------------------------------------------------


def test_stays_are_counted_and_told_once_a_second(
    daemon: FakeDaemon, vcpu: hwbp.Vcpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a vCPU thread with a strategy that switches where the guest has touched a register
    now_ns = 10 * REPORT_NS
    monkeypatch.setattr("hwbp.kvm.time.monotonic_ns", lambda: now_ns)
    switch = Switch("x86-wont-exit")
    thread = VcpuThread(Written().handle(), 0, switch, vcpu)

    # when it enters the guest, which writes a register and arms it, and then again and again within a second
    with thread.guest():
        switch.accessed("DR0", 0x1000)
        switch.accessed("DR7", 0x403)
    for _ in range(3):
        with thread.guest():
            pass
    assert sent(daemon, "vcpu_report") == [
        {"vcpu": 5, "entries": 1, "switches": 0, "traps": 1, "owner": "guest"}
    ]

    # then the rest is told with the next stay after it
    now_ns += REPORT_NS
    with thread.guest():
        pass
    last = sent(daemon, "vcpu_report")[-1]
    assert (last["entries"], last["switches"], last["traps"], last["owner"]) == (5, 4, 1, "guest")
    assert thread.tally is not None
    assert thread.tally.entries == 5


def test_the_owner_is_the_vmm_where_it_has_loaded_anything(
    daemon: FakeDaemon, client: hwbp.Client, vcpu: hwbp.Vcpu
) -> None:
    thread = VcpuThread(Written().handle(), 0, vcpu=vcpu)
    assert thread.tally is not None
    assert thread.tally.owner == ""
    told(daemon, client, registers(1, SLOT))
    vcpu.load(lambda _: None)
    assert thread.tally.owner == "vmm"


# --- what is shown ---------------------------------------------------------------------------------------------------

ROW = {"vcpu": 5, "number": 0, "tid": 901, "strategy": "arm64-owner", "loaded": True}
POOLS = {"pools": {"inst": 6, "data": 4}, "held": {"inst": 1, "data": 0}}
VM: Message = {"vm": 3, "label": "guest", "pid": 900, "comm": "vmm", "uid": 1000}


def test_kvm_ls_shows_a_line_for_each_vcpu(daemon: FakeDaemon) -> None:
    counted = {"owner": "guest", "entries": 1_000_000, "switches": 30, "traps": 12}
    second = {"vcpu": 6, "number": 1, "tid": 902, "strategy": "", "loaded": False} | POOLS
    daemon.answers["vms"] = always(message("vms", vms=[VM | {"vcpus": [ROW | POOLS | counted, second]}]))

    shown = CliRunner().invoke(app, ["--socket", str(daemon.path), "kvm", "ls"], catch_exceptions=False)

    assert shown.exit_code == 0
    assert shown.stdout.splitlines() == [
        "  VCPU NR TID SLOTS              LOADED  STRATEGY    OWNER ENTRIES SWITCHES TRAPS",
        "vm 3 guest: vmm[900], uid 1000",
        "     5  0 901 1/6 inst, 0/4 data yes     arm64-owner guest   1000k       30    12",
        "     6  1 902 1/6 inst, 0/4 data not yet -           -           0        0     0",
    ]


def test_kvm_ls_answers_for_programs_and_says_when_there_is_nothing(daemon: FakeDaemon) -> None:
    daemon.answers["vms"] = always(message("vms", vms=[VM | {"vcpus": [ROW | POOLS]}]))
    words = ["--socket", str(daemon.path), "kvm", "ls", "--json"]
    (vm,) = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
    assert (vm["label"], vm["vcpus"][0]["tid"], vm["vcpus"][0]["entries"]) == ("guest", 901, 0)

    assert vms_text(()).startswith("no virtual machines")

    daemon.answers["vms"] = always(error("EBADMSG", "unknown"))
    refused = CliRunner().invoke(app, words[:-1])
    assert (refused.exit_code, refused.stderr) == (1, "hwbpctl: EBADMSG: unknown\n")


def test_ls_shows_the_slots_of_a_vcpu_by_themselves() -> None:
    # given a claim on a vCPU and none on a CPU
    value = slots_of([cpu(0)], held(7, tid=0, label="guest", access="x") | {"vcpu": 5})

    # then the CPU is as free as it was, and the vCPU has a place of its own
    shown = listing.slots(value, 0).splitlines()
    assert "cpu 0: 4 of 4 slots free" in shown
    assert shown.index("vcpu 5: 1 slot") == len(shown) - 2
    assert shown[-1].split()[0] == "7"
