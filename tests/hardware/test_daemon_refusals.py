"""A refusal names who is in the way, ours or not, and what would work; and it leaves books and kernel as they were."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import hwbp
from examples.target import Target
from hwbpd_linux.cpus import online_cpus, possible_cpus
from tests.hardware.common import X86
from tests.hardware.daemon import (
    MARKS,
    WAIT_S,
    Daemon,
    all_free,
    books_free,
    kernel_free,
    kernel_room,
    lines_until,
    outside,
    own_name,
)

pytestmark = MARKS

OFFLINE = sorted(set(possible_cpus()) - set(online_cpus()))

# Connects as another user. What it needs is imported first, as that user may not be able to read it.
STRANGER = """
import os, sys, hwbp
os.setgroups([]), os.setgid(65534), os.setuid(65534)
tid = int(sys.argv[2])
for event, target in (("mem:0x1000/8:w:u", {}), ("mem:0x1000/8:w", {"tid": tid}), ("mem:0x1000/8:w:u", {"tid": tid})):
    try:
        hwbp.connect(sys.argv[1]).claim(event, **target)
        print("granted")
    except hwbp.HwbpError as refusal:
        print(type(refusal).__name__, refusal)
"""


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def client(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect() as client:
        yield client


def refusal_of(client: hwbp.Client, **claim: Any) -> hwbp.HwbpError:
    """Return the refusal of a claim, having seen that it changed nothing."""
    held = [(row.resource, row.claims[0].claim) for row in client.slots().resources]
    books, kernel = books_free(client), kernel_free()
    usual: dict[str, Any] = {"address": 0x1000, "length": 8, "access": "w", "delivery": "hold"}
    with pytest.raises(hwbp.HwbpError) as refused:
        client.claim(**usual | claim)
    assert [(row.resource, row.claims[0].claim) for row in client.slots().resources] == held
    assert (books_free(client), kernel_free()) == (books, kernel)
    return refused.value


def attributed_refusal_of(client: hwbp.Client, **claim: Any) -> hwbp.HwbpError:
    """The same, once somebody has looked who is outside: that happens at most once a second."""
    give_up = time.monotonic() + WAIT_S
    while True:
        refusal = refusal_of(client, **claim)
        if all(holder.evidence != "the kernel refused" for holder in refusal.holders):
            return refusal
        assert time.monotonic() < give_up, f"nobody looked: {refusal}"


# --- no room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpus", [None, online_cpus()[-1:]])
def test_slots_held_outside_on_a_cpu_are_named(client: hwbp.Client, cpus: Sequence[int] | None) -> None:
    cpu = online_cpus()[-1]
    with outside(4, cpu=cpu):
        refusal = attributed_refusal_of(client, cpus=cpus)

    assert isinstance(refusal, hwbp.NoFreeSlot)
    assert "outside hwbpd" in str(refusal)
    assert f"cpu {cpu}" in str(refusal)
    (culprit,) = refusal.holders
    assert (culprit.pid, culprit.slots, culprit.evidence) == (os.getpid(), 4, "perf fd")
    assert client.why(refusal.claim_id).state == "refused"
    assert any("refused by the kernel" in line for line in client.why(refusal.claim_id).lines)


def test_slots_held_outside_on_a_thread_are_told_from_ours(client: hwbp.Client, target: Target) -> None:
    for place in range(2):
        client.claim(address=target.variable + 8 * place, length=8, access="w", tid=target.tid, kind="ptrace")
    with outside(2, tid=target.tid):
        refusal = attributed_refusal_of(client, tid=target.tid)
        client.claim(address=target.variable, length=8, access="w", tid=os.getpid(), delivery="hold")

    assert isinstance(refusal, hwbp.NoFreeSlot)
    ours, others, *_somewhere = refusal.holders
    assert (ours.pid, ours.kind, ours.slots, ours.place) == (os.getpid(), "ptrace", 2, f"on tid {target.tid}")
    assert (others.pid, others.slots, others.place) == (0, 2, f"on tid {target.tid}")
    assert f"{own_name()} as ptrace: 2 on tid {target.tid}" in str(refusal)


def test_once_the_outsider_is_gone_the_same_claim_is_granted(client: hwbp.Client, target: Target) -> None:
    with outside(4, tid=target.tid):
        refusal_of(client, tid=target.tid)

    watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid)

    target.command("write 5")
    assert watch.release().delivered == 5


def test_a_profiler_beside_the_daemon_is_named_as_outside(client: hwbp.Client, target: Target) -> None:
    perf = shutil.which("perf")
    if perf is None:
        pytest.skip("perf is not here: install the package linux-perf or linux-tools")
    events = [each for place in range(4) for each in ("-e", f"mem:{target.variable + 8 * place:#x}/8:w")]
    # perf starts the command only when its events are open.
    command = [perf, "stat", "-a", *events, "--", "sh", "-c", "echo open; read line"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as profiler:
        try:
            lines_until(profiler, "open")
            refusal = attributed_refusal_of(client, tid=target.tid)
            profiler.communicate("\n", timeout=WAIT_S)
        finally:
            profiler.kill()

    assert isinstance(refusal, hwbp.NoFreeSlot)
    assert f"perf[{profiler.pid}] outside hwbpd: 4 cpu-wide" in str(refusal)


@pytest.mark.parametrize(("kind", "tid"), [("perf", False), ("ptrace", True)])
def test_our_own_holders_are_named(client: hwbp.Client, daemon: Daemon, target: Target, kind: str, tid: bool) -> None:
    place: dict[str, Any] = {"tid": target.tid} if tid else {"cpus": online_cpus()[:1]}
    held = [
        client.claim(address=0x1000, length=8, access="w", delivery="hold", kind=kind, **place).claim_id
        for _ in range(4)
    ]
    with daemon.connect() as other:
        refusal = refusal_of(other, **place)

    assert isinstance(refusal, hwbp.NoFreeSlot)
    (holder,) = refusal.holders
    assert (holder.pid, holder.uid, holder.kind, holder.slots) == (os.getpid(), os.getuid(), kind, 4)
    assert (list(holder.claim_ids), holder.evidence) == (held, "books")
    where = f"on tid {target.tid}" if tid else f"cpu-wide on cpu {online_cpus()[0]}"
    assert f"{own_name()} as {kind}: 4 {where}" in str(refusal)
    assert "outside" not in str(refusal)


def test_what_a_debugger_has_on_a_thread_is_in_the_way_of_the_daemon(client: hwbp.Client, target: Target) -> None:
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("gdb is not here: install the package gdb")
    commands = [f"watch *(long*){target.variable + 8 * place:#x}" for place in range(2)]
    commands += ["shell echo go", "continue", "shell echo stopped; read line"]
    options = [option for each in commands for option in ("-ex", each)]
    command = [gdb, "-nx", "-batch", "-iex", "set auto-solib-add off", "-p", str(target.pid), *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as debugger:
        try:
            lines_until(debugger, "go")
            target.send("write 2")  # first 0, which it was, then 1: gdb stops for a new value only
            said = lines_until(debugger, "stopped")
            assert "New value = 1" in said
            assert kernel_room(tid=target.tid) == 2

            for _ in range(2):
                client.claim(address=target.variable, length=8, access="w", tid=target.tid, delivery="hold")
            refusal = attributed_refusal_of(client, tid=target.tid)

            debugger.communicate("\n", timeout=WAIT_S)
        finally:
            debugger.kill()
    assert isinstance(refusal, hwbp.NoFreeSlot)
    ours, others = refusal.holders
    assert (ours.pid, ours.slots) == (os.getpid(), 2)
    assert (others.comm, others.slots, others.evidence) == ("gdb", 2, "tracer")
    assert target.answer()["did"] == 2


# --- no slot can express it ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not X86, reason="these are the rules of x86; tests/plugins/arm has those of Arm")
@pytest.mark.parametrize(
    ("claim", "rule"),
    [
        ({"length": 3000}, "it takes 375 slots, and a CPU has 4"),
        ({"access": "r"}, "nearest: mem:0x1000/8:rw"),
        ({"access": "x", "length": 1}, "nearest: mem:0x1000/8:x"),
        ({"user": False, "kernel": False}, "neither user nor kernel"),
        ({"address": 2**63, "kernel": False}, "are the kernel's"),
        ({"user_chain": True}, "a call chain comes with a hit"),
        ({"cpus": []}, "cpus is an empty list"),
        ({"delivery": "hits", "ring_bytes": 5000}, "nearest: 8192"),
    ],
)
def test_what_no_slot_can_express_is_refused_with_the_rule(
    client: hwbp.Client, claim: dict[str, Any], rule: str
) -> None:
    refusal = refusal_of(client, **claim)

    assert isinstance(refusal, hwbp.BadClaim)
    assert rule in str(refusal)


def test_what_only_the_kernel_refuses_is_undone(client: hwbp.Client, target: Target) -> None:
    # On x86 the entry area of the CPUs, where a debug exception would come from its own handler; on arm64 any address
    # of the kernel's, for a thread.
    refusal = refusal_of(client, address=0xFFFF_FE00_0000_0000, tid=0 if X86 else target.tid)

    assert isinstance(refusal, hwbp.BadClaim)
    assert "the kernel does not accept" in str(refusal)
    assert client.why(refusal.claim_id).state == "refused"


# --- no such place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_tid", [False, True])
def test_a_cpu_that_does_not_exist_is_refused(client: hwbp.Client, target: Target, with_tid: bool) -> None:
    absent = max(possible_cpus()) + 1

    refusal = refusal_of(client, cpus=(online_cpus()[0], absent), tid=target.tid if with_tid else 0)

    assert isinstance(refusal, hwbp.CpuOffline)
    assert f"no cpu {absent}" in str(refusal)


@pytest.mark.skipif(not OFFLINE, reason="all CPUs of this host are online: take one offline to see this")
def test_a_cpu_that_is_offline_is_refused(client: hwbp.Client) -> None:
    refusal = refusal_of(client, cpus=OFFLINE[:1])

    assert isinstance(refusal, hwbp.CpuOffline)
    assert f"cpu {OFFLINE[0]} is offline" in str(refusal)


def test_a_thread_that_does_not_exist_is_refused(client: hwbp.Client, target: Target) -> None:
    target.kill()

    refusal = refusal_of(client, tid=target.tid)

    assert isinstance(refusal, hwbp.TargetGone)
    assert str(target.tid) in str(refusal)


# --- not for everybody -----------------------------------------------------------------------------------------------


def test_another_user_is_refused_what_the_kernel_would_refuse_it(daemon: Daemon, target: Target) -> None:
    cpu_wide, in_the_kernel, of_root = as_stranger(daemon, target)

    assert cpu_wide.startswith("NotPermitted "), cpu_wide
    assert in_the_kernel.startswith("NotPermitted "), in_the_kernel
    assert of_root.startswith("NotPermitted "), of_root
    assert str(target.tid) in of_root
    assert daemon.logged("refused", errno="EPERM")["uid"] == 65534


def test_an_administrator_can_keep_the_socket_to_root(alone: None) -> None:
    with Daemon('socket_mode = "0600"') as daemon, Target() as target:
        said = as_stranger(daemon, target)

        assert all(line.startswith("NotReachable ") for line in said)
        with daemon.connect() as client:
            assert books_free(client) == kernel_free() == all_free()


def as_stranger(daemon: Daemon, target: Target) -> list[str]:
    """Ask for three things as a user without rights; return what came of each."""
    command = [sys.executable, "-c", STRANGER, str(daemon.socket), str(target.tid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    return done.stdout.splitlines()
