"""Who is in the way is told as it is: perf, gdb and other users, on real registers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from shutil import which

import pytest

from hwbpd_linux import perf_event
from hwbpd_linux.cpus import online_cpus
from hwbpd_linux.foreign import Found, find
from hwbpd_linux.occupancy import Place
from tests.host import slots_taken
from tests.judges import foreigners
from tests.judges.users import Gdb, Perf, Sleeper, User, taken, wait_until

pytestmark = [
    pytest.mark.hardware,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the foreign users of these tests know x86-64 only"),
    pytest.mark.skipif(os.geteuid() != 0, reason="whole CPUs and other users' processes: run the tests as root"),
]
perf_needed = pytest.mark.skipif(which("perf") is None, reason="perf is not installed: linux-perf on Debian")
gdb_needed = pytest.mark.skipif(which("gdb") is None, reason="gdb is not installed")

SLOTS = 4
CPUS = online_cpus()


@pytest.fixture
def users(host: None) -> Iterator[ExitStack]:
    """Where users are put away; in the end every slot must be free."""
    assert slots_taken() == []
    with ExitStack() as users:
        yield users
    wait_until(lambda: not slots_taken(), "every slot is free again")


@pytest.fixture
def user(users: ExitStack) -> User:
    user = User()
    users.callback(user.close)
    return user


@pytest.fixture
def sleeper(users: ExitStack) -> Sleeper:
    sleeper = Sleeper()
    users.callback(sleeper.close)
    return sleeper


def ask(tid: int | None = None, cpu: int | None = None, ours: dict[int, Place] | None = None) -> list[Found]:
    """Ask who is in the way, and see that asking leaves nothing behind."""
    descriptors = os.listdir("/proc/self/fd")
    places = [(-1, each) for each in CPUS] + ([] if tid is None else [(tid, each) for each in CPUS])
    before = [taken(*place) for place in places]

    found = find(SLOTS, ours or {}, CPUS, tid, cpu)

    assert [taken(*place) for place in places] == before
    assert os.listdir("/proc/self/fd") == descriptors
    return list(found)


def nobody(slots: int, place: str) -> Found:
    return Found(0, "unattributed", -1, slots, place, "unattributed")


def test_on_an_idle_host_nobody_is_in_the_way(users: ExitStack, sleeper: Sleeper) -> None:
    assert ask(cpu=CPUS[0]) == ask(tid=sleeper.tid) == ask() == []


def test_who_fills_a_cpu_is_named_with_its_slots(user: User, sleeper: Sleeper) -> None:
    assert sum(user.do("open", -1, CPUS[-1]) for _ in range(SLOTS)) == SLOTS
    theirs = Found(user.pid, comm_of(user.pid), 0, SLOTS, f"cpu-wide on cpu {CPUS[-1]}", "perf fd")

    assert ask(cpu=CPUS[-1]) == [theirs]
    assert ask(tid=sleeper.tid) == [theirs]
    assert ask(tid=sleeper.tid, cpu=CPUS[-1]) == [theirs]
    assert CPUS[0] == CPUS[-1] or ask(cpu=CPUS[0]) == []


def test_our_own_slots_are_not_blamed_on_anybody(user: User) -> None:
    # Given two slots of ours and two of another's on one CPU,
    cpu = CPUS[0]
    ours: dict[int, Place] = {}
    try:
        for _ in range(2):
            ours[perf_event.open_breakpoint(0x1000, 4, 2, tid=-1, cpu=cpu)] = (None, cpu)
        assert sum(user.do("open", -1, cpu) for _ in range(2)) == 2

        # when it is asked who is in the way,
        found = ask(cpu=cpu, ours=ours)
    finally:
        for fd in ours:
            os.close(fd)

    # then only theirs are told of.
    assert [(each.pid, each.slots) for each in found] == [(user.pid, 2)]


def test_a_breakpoint_goes_on_counting_while_its_kind_is_found_out(host: None) -> None:
    from examples.target import Target

    with Target() as target:
        command = ["perf", "stat", "-x,", "-e", f"mem:{target.variable:#x}:w", "-p", str(target.tid), "--", "cat"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as perf:
            assert perf.stdin is not None
            assert perf.stdout is not None
            perf.stdin.write(b"counting\n")
            perf.stdin.flush()
            perf.stdout.readline()
            target.send("write 50000")
            searches = 0
            while not target.has_answered() or searches < 3:
                found = find(SLOTS, {}, CPUS, target.tid, None)
                assert [(each.pid, each.evidence) for each in found][-1] == (perf.pid, "perf fd")
                searches += 1
            assert target.answer()["did"] == 50000
            _, said = perf.communicate(timeout=30)

    assert said.decode().splitlines()[-1].split(",")[0] == "50000"


def test_the_slots_of_a_thread_are_told_and_not_whose_they_must_be(user: User, sleeper: Sleeper) -> None:
    # A descriptor does not tell where its breakpoint is, so this might be another's slot.
    for cpu in (-1, CPUS[0]):
        assert user.do("open", sleeper.tid, cpu) == 1

    assert ask(tid=sleeper.tid) == [
        nobody(2, f"on tid {sleeper.tid}"),
        Found(user.pid, comm_of(user.pid), 0, 0, "somewhere", "perf fd"),
    ]


def test_an_event_of_a_thread_that_has_exited_is_not_forgotten(user: User) -> None:
    gone = Sleeper()
    assert sum(user.do("open", gone.tid, -1) for _ in range(SLOTS)) == SLOTS
    gone.close()

    assert ask(cpu=CPUS[0]) == [
        nobody(SLOTS, "on a thread that was not found"),
        Found(user.pid, comm_of(user.pid), 0, 0, "somewhere", "perf fd"),
    ]


def test_a_process_that_fills_its_own_thread_is_found_there(user: User) -> None:
    assert sum(user.do("open", user.pid, -1) for _ in range(SLOTS)) == SLOTS

    assert ask(cpu=CPUS[0])[0] == nobody(SLOTS, f"on tid {user.pid}")


def test_other_events_are_not_blamed(users: ExitStack, user: User) -> None:
    decoy = User()
    users.callback(decoy.close)
    decoy.do("decoy")
    user.do("hide", -1, CPUS[0])

    assert ask(cpu=CPUS[0]) == [nobody(1, f"cpu-wide on cpu {CPUS[0]}")]


def test_a_tracer_is_named_and_once_it_has_left_nobody_is(user: User, sleeper: Sleeper) -> None:
    assert user.do("trace", sleeper.tid, 3) == 3
    theirs = Found(user.pid, comm_of(user.pid), 0, 3, f"on tid {sleeper.tid}", "tracer")
    assert ask(tid=sleeper.tid) == ask(cpu=CPUS[0]) == [theirs]

    user.do("leave", sleeper.tid)

    assert ask(tid=sleeper.tid) == [nobody(3, f"on tid {sleeper.tid}")]


@perf_needed
def test_perf_on_all_cpus_is_named(users: ExitStack) -> None:
    perf = Perf("-a")
    users.callback(perf.close)
    assert perf.counts

    assert ask() == [Found(perf.pid, "perf", 0, 1, f"cpu-wide on cpu {cpu}", "perf fd") for cpu in CPUS]


@gdb_needed
def test_gdb_is_named_for_its_watchpoints(users: ExitStack, sleeper: Sleeper) -> None:
    gdb = Gdb(sleeper.tid, 3)
    users.callback(gdb.close)

    theirs = Found(gdb.pid, "gdb", 0, 3, f"on tid {sleeper.tid}", "tracer")
    assert ask(tid=sleeper.tid) == ask(cpu=CPUS[0]) == [theirs]


@gdb_needed
@perf_needed
def test_gdb_is_named_for_what_perf_beside_it_cannot_have(users: ExitStack, sleeper: Sleeper) -> None:
    perf = Perf("-C", str(CPUS[0]))
    users.callback(perf.close)
    gdb = Gdb(sleeper.tid, 3)
    users.callback(gdb.close)

    assert ask(cpu=CPUS[0]) == [
        Found(gdb.pid, "gdb", 0, 2, f"on tid {sleeper.tid}", "tracer"),
        nobody(1, f"cpu-wide on cpu {CPUS[0]}"),
        nobody(1, f"on tid {sleeper.tid}"),
        Found(perf.pid, "perf", 0, 0, "somewhere", "perf fd"),
    ]


@perf_needed
@gdb_needed
def test_in_random_scenarios_nobody_is_named_wrongly(host: None, capsys: pytest.CaptureFixture[str]) -> None:
    status = foreigners.judge(40, seed=7)

    output = capsys.readouterr().out
    assert status == 0, output
    assert output.splitlines()[-1].endswith("wrong=0")


def comm_of(pid: int) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
        return file.read().strip()
