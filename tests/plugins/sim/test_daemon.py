"""The whole daemon on the simulated machine, as its users have it: a process of its own, and clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import hwbp
from hwbpd_sim.workload import COUNTER
from tests.hardware.daemon import WAIT_S, Daemon

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 60001  # an ordinary user

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users takes root: run the tests as root")

# As an ordinary user, who may not read this tree: everything is imported before.
BECOME = f"""
import ctypes, os, sys
def become(uid):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: a process that changed its ids is closed to others of its uid
nobody = {NOBODY}
"""
DAEMON = BECOME + """
from hwbpd import daemon, logs
from hwbpd.plugins import Plugins
from hwbpd.settings import Settings
plugins = Plugins()
become(nobody)
logs.set_up("json", "info")
daemon.run(Settings(socket=sys.argv[1], machine="sim"), plugins)
"""
CLIENT = BECOME + """
import json, hwbp
become(int(sys.argv[2]))
told = []
with hwbp.connect(sys.argv[1], timeout=20.0) as client:
    for whose in ({"tid": 1000}, {"tid": 1000, "kernel": True}, {"cpus": [0]}):
        try:
            event = hwbp.parse_event("mem:0x601000/8:w" if whose.pop("kernel", False) else "mem:0x601000/8:w:u")
            client.claim(event, delivery="count", **whose).release()
            told.append("granted")
        except hwbp.HwbpError as refusal:
            told.append(type(refusal).__name__)
print(json.dumps(told))
"""


def simulating(settings: str = "", *options: str) -> Daemon:
    daemon = Daemon(settings)
    daemon.command += ["--machine", "sim", *options]
    return daemon


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with simulating("[sim]\naccesses_per_s = 200\noutsider_slots = 3\n", "--cpus", "8") as daemon:
        yield daemon


def hwbpctl(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hwbpctl", "--socket", str(daemon.socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT)


def granted(socket: Path, uid: int) -> list[str]:
    """What a process of that user is answered to three claims: of a thread, of it in the kernel too, of a CPU."""
    command = [sys.executable, "-c", CLIENT, str(socket), str(uid)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    told: list[str] = json.loads(ended.stdout)
    return told


def test_the_machine_is_as_asked_for_and_says_that_it_is_simulated(daemon: Daemon) -> None:
    caps = hwbpctl(daemon, "caps")
    listing = hwbpctl(daemon, "ls")

    assert "machine        sim\n" in caps.stdout
    assert "note: SIMULATED" in caps.stdout
    assert f"mem:{COUNTER:#x}/8:w" in caps.stdout
    assert listing.stdout == "cpu 0-7: 4 of 4 slots free\n"
    assert daemon.logged("ready")["cpus"] == 8
    assert [line for line in daemon.log if "simulated" in line["event"] and line["level"] == "warning"]


def test_hits_come_as_records(daemon: Daemon) -> None:
    watched = hwbpctl(daemon, "--json", "watch", "-e", f"mem:{COUNTER:#x}/8:w:u", "-t", "1001", "-c", "5")

    assert watched.returncode == 0, watched.stderr
    *hits, end = map(json.loads, watched.stdout.splitlines())
    assert len(hits) == 5
    assert {(hit["pid"], hit["tid"], hit["address"]) for hit in hits} == {(1000, 1001, f"{COUNTER:#x}")}
    assert sorted(hit["time_ns"] for hit in hits) == [hit["time_ns"] for hit in hits]
    assert {hit["comm"] for hit in hits} == {"?"}, "whoever has that number on this host is somebody else"
    assert end["hits"] == end["delivered"] + end["lost"] + end["dropped"] >= 5


def test_a_process_is_watched_with_all_its_threads_and_a_cpu_with_every_process(daemon: Daemon) -> None:
    event = hwbp.parse_event(f"mem:{COUNTER:#x}/8:w:u")
    with daemon.connect() as client:
        whole, wide = client.claim(event, pid=2000), client.claim(event)

        seen: dict[int, set[int]] = {whole.claim_id: set(), wide.claim_id: set()}
        for watch, hit in client.hits(timeout=WAIT_S):
            seen[watch.claim_id].add(hit.tid)
            if len(seen[whole.claim_id]) == 2 and len(seen[wide.claim_id]) == 6:
                break

    assert list(seen.values()) == [{2000, 2001}, {1000, 1001, 2000, 2001, 3000, 3001}]


def test_a_refusal_names_those_outside_who_are_in_the_way(daemon: Daemon) -> None:
    # given a thread of which somebody outside has three slots, and we the last one
    event = hwbp.parse_event(f"mem:{COUNTER:#x}/8:w:u")
    with daemon.connect("holder") as client:
        claim = client.claim(event, tid=1000)

        # when one more is asked for, which the books would allow
        with pytest.raises(hwbp.NoFreeSlot) as refused:
            client.claim(hwbp.parse_event(f"mem:{COUNTER + 8:#x}/8:w:u"), tid=1000)

        # then both are named
        held = {(one.comm, one.slots, one.place, one.evidence) for one in refused.value.holders}
        assert ("sim-gdb", 3, "on tid 1000", "tracer") in held
        assert [one.claim_ids for one in refused.value.holders if one.evidence == "books"] == [(claim.claim_id,)]
        assert [(one.comm, one.slots) for one in client.foreign()] == [("sim-gdb", 3)]


def test_no_process_is_started_to_ask_a_kernel_that_knows_nothing_of_it(daemon: Daemon) -> None:
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children")

    assert children.read_text() == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--machine", "sim", "--cpus", "0"], "--cpus 0"),
        (["--machine", "sim", "--cpus", "8193"], "--cpus 8193"),
        (["--cpus", "8"], "--machine sim"),
        (["--machine", "linux", "--cpus", "8"], "'linux'"),
        (["--profile", "cortex-a15"], "--machine sim"),
        (["--machine", "sim", "--cpus", "8", "--profile", "cortex-a15"], "not allowed with"),
    ],
)
def test_cpus_that_cannot_be_had_are_refused_at_start(tmp_path: Path, options: list[str], says: str) -> None:
    command = [sys.executable, "-m", "hwbpd", "--socket", str(tmp_path / "socket"), *options]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT)

    assert ended.returncode == 2
    assert says in ended.stderr


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("cortex-a16x2", "no CPU 'cortex-a16x2'; there are "),
        ("zen4+cortex-a15", "zen4 is x86_64 and cortex-a15 is armv7l"),
    ],
)
def test_a_profile_that_cannot_be_is_refused_at_start(tmp_path: Path, profile: str, says: str) -> None:
    options = ["--socket", str(tmp_path / "socket"), "--machine", "sim", "--profile", profile]
    command = [sys.executable, "-m", "hwbpd", *options]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT)

    assert ended.returncode == 1
    assert says in ended.stderr


def test_a_phone_of_unlike_cpus_is_served_with_both_numbers() -> None:
    # given two CPUs with few slots and one with many
    settings = "[sim]\naccesses_per_s = 200\n[policy]\nreserve_slots = 0\n"
    with simulating(settings, "--profile", "arm64-minx2+cortex-a72") as phone:
        caps = hwbpctl(phone, "caps").stdout
        listing = hwbpctl(phone, "ls").stdout

        # then both numbers are shown, and what can be watched there
        assert "its CPUs: 2 arm64-min (cpu 0-1), 1 cortex-a72 (cpu 2)" in caps
        assert "mem:0x401200/4:x:u  function" in caps
        assert "0x6010c0  inbox: written by the kernel, which no slot of these CPUs can see" in caps
        assert listing.splitlines() == [
            "cpu 0-1: 2 of 2 inst slots free; 2 of 2 data slots free",
            "cpu 2: 6 of 6 inst slots free; 4 of 4 data slots free",
        ]

        # and what is for one CPU may fill that, while a thread may go anywhere and gets no more than the least
        with phone.connect() as client:
            words = [hwbp.parse_event(f"mem:{COUNTER + 8 * n:#x}/8:w:u") for n in range(5)]
            for word in words[:4]:
                client.claim(word, cpus=[2], delivery="count")
            with pytest.raises(hwbp.NoFreeSlot):
                client.claim(words[4], cpus=[2], delivery="count")
            with pytest.raises(hwbp.NoFreeSlot):
                client.claim(words[4], tid=1000, delivery="count")
            (shown,) = [line for line in hwbpctl(phone, "caps").stdout.splitlines() if "registers of cpu" in line]
            assert "registers of cpu 2" in shown
            assert f"DBGWVR0_EL1={COUNTER:#x}" in shown
        with phone.connect() as client:
            for word in words[:2]:
                client.claim(word, tid=1000, delivery="count")
            with pytest.raises(hwbp.NoFreeSlot):
                client.claim(words[2], tid=1000, delivery="count")


def test_hits_on_arm_come_before_the_instruction_and_nothing_is_cpu_wide_there() -> None:
    with simulating("[sim]\naccesses_per_s = 200\n", "--profile", "cortex-a15x2+cortex-a7x3") as board:
        watched = hwbpctl(board, "--json", "watch", "-e", f"mem:{COUNTER:#x}/8:rw:u", "-p", "1000", "-c", "5")
        assert watched.returncode == 0, watched.stderr
        *hits, _ = map(json.loads, watched.stdout.splitlines())
        assert {hit["ip"] for hit in hits} == {"0x401100"}, "the very instruction that writes it"

        refused = hwbpctl(board, "watch", "-e", f"mem:{COUNTER:#x}/8:rw:u", "-a")
        assert refused.returncode != 0
        assert "EINVAL" in refused.stderr


@needs_root
def test_it_runs_as_an_ordinary_user_and_serves_that_user() -> None:
    # given a daemon of an ordinary user
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        socket = Path(folder) / "hwbpd.sock"
        command = [sys.executable, "-c", DAEMON, str(socket)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as daemon:
            assert daemon.stderr is not None
            try:
                events = (json.loads(line)["event"] for line in daemon.stderr)
                assert "ready" in events

                # then that user, who is as mighty as the daemon, may everything there
                assert granted(socket, NOBODY) == ["granted"] * 3
            finally:
                daemon.terminate()
            assert "stopped" in events
        assert daemon.returncode == 0


@needs_root
def test_of_roots_simulated_machine_others_get_nothing(daemon: Daemon) -> None:
    assert granted(daemon.socket, NOBODY) == ["NotPermitted"] * 3
