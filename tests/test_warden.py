"""The warden passes on what the kernel says, names the rule, and refuses whenever it could not ask."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd import credentials, warden_process
from hwbpd.core.errors import CpuOffline, NotPermitted, TargetGone
from hwbpd.credentials import Credentials
from hwbpd.warden import Question, Warden
from hwbpd.warden_process import Answer, Request, Verdict
from tests.peer import CAP_NET_RAW, CAP_PERFMON, WAIT_S, Identity, Peer, readable

ROOT = Path(__file__).resolve().parent.parent
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users takes root: run the tests as root")

u16 = st.integers(0, 2**16)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
three = st.tuples(u32, u32, u32)
requests = st.builds(
    Request, u64, i32, i32, u32, st.booleans(), three, three, u64, u64, u64, i32, st.lists(u32, max_size=40).map(tuple)
)
SOMEBODY = Credentials(
    pid=1,
    uids=(60001, 60001, 60001),
    gids=(60001, 60001, 60001),
    groups=(),
    effective=0,
    permitted=0,
    user_namespace=1,
    in_our_user_namespace=True,
    in_our_pid_namespace=True,
)
A_REQUEST = Request(7, -1, 0, 0, False, (1, 1, 1), (1, 1, 1), 0, 0, 0, 0, ())


def credentials_of(peer: Peer) -> Credentials:
    return credentials.read(peer.pid, peer.pidfd, uid=peer.identity.uids[1], gid=peer.identity.gids[1])


def on(tid: int) -> Question:
    """User-mode hits of a thread: what anybody may have of a thread it may look into."""
    return Question(tid=tid, kernel=False)


@pytest.fixture
def warden() -> Iterator[Warden]:
    warden = Warden()
    yield warden
    warden.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer(Identity()) as peer:
        yield peer


# --- messages --------------------------------------------------------------------------------------------------------


@given(requests)
def test_a_request_arrives_as_it_was_sent(request: Request) -> None:
    assert warden_process.unpack_request(warden_process.pack_request(request)) == request


@given(requests, st.integers(-8, 8).filter(bool))
def test_a_request_that_is_longer_or_shorter_than_it_says_is_none(request: Request, off: int) -> None:
    message = warden_process.pack_request(request)

    with pytest.raises(ValueError, match="not a request"):
        warden_process.unpack_request(message[:off] if off < 0 else message + bytes(off))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused(message: bytes) -> None:
    try:
        request = warden_process.unpack_request(message)
    except ValueError:
        return
    assert len(warden_process.pack_request(request)) == len(message)


@given(u64, st.sampled_from(Verdict), i32)
def test_an_answer_arrives_as_it_was_sent(serial: int, verdict: Verdict, number: int) -> None:
    answer = Answer(serial, verdict, number)

    assert warden_process.unpack_answer(warden_process.pack_answer(answer)) == answer


# --- what needs no question ------------------------------------------------------------------------------------------


def test_a_peer_as_mighty_as_the_daemon_is_not_asked_about(warden: Warden) -> None:
    # Given ourselves as the peer, and a helper that is no more
    pidfd = os.pidfd_open(os.getpid())
    us = credentials.read(os.getpid(), pidfd, uid=os.geteuid(), gid=os.getegid())
    os.close(pidfd)
    warden.close()

    warden.check(us, Question(kernel_address=True))

    assert warden.helper_pid is None


@pytest.mark.parametrize(
    ("unfit", "question", "rule"),
    [
        ({"has_more_filters": True}, Question(cpus=(0,)), "seccomp"),
        ({"in_our_pid_namespace": False}, Question(tid=1), "pid namespace"),
        ({"groups": tuple(range(warden_process.GROUPS_MAX + 1))}, Question(cpus=(0,)), "groups"),
    ],
    ids=["seccomp filter", "thread of another pid namespace", "too many groups"],
)
def test_what_cannot_be_asked_is_refused(
    warden: Warden, unfit: dict[str, object], question: Question, rule: str
) -> None:
    with pytest.raises(NotPermitted, match=rule):
        warden.check(msgspec.structs.replace(SOMEBODY, **unfit), question)


# --- rules -----------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(
    ("target", "rule"),
    [
        (Identity((60002, 60002, 60002)), "belongs to uid 60002 and you are uid 60001; CAP_PERFMON would do"),
        (Identity((60001, 60002, 60001)), "belongs to uid 60001/60002 and you are uid 60001"),
        (Identity(gids=(60002, 60002, 60002)), "belongs to gid 60002 and you are gid 60001"),
        (Identity(dumpable=False), "not dumpable"),
        (Identity(capabilities=CAP_NET_RAW), "holds capabilities that you do not"),
    ],
    ids=["other uid", "mixed uids", "other gid", "not dumpable", "with a capability"],
)
def test_a_refused_thread_is_refused_with_the_rule(warden: Warden, peer: Peer, target: Identity, rule: str) -> None:
    with Peer(target) as other, pytest.raises(NotPermitted, match=f"thread {other.pid} .*{rule}|{other.pid} .*{rule}"):
        warden.check(credentials_of(peer), on(other.pid))


@needs_root
def test_a_thread_of_ones_own_uid_is_allowed(warden: Warden, peer: Peer) -> None:
    with Peer(Identity()) as other:
        warden.check(credentials_of(peer), on(other.pid))
        warden.check(credentials_of(peer), on(peer.pid))


@needs_root
def test_a_thread_of_another_user_namespace_is_refused_with_the_rule(warden: Warden) -> None:
    # Given root of a user namespace, and a process outside with the same uid
    with (
        Peer(Identity(user_namespace=True)) as peer,
        Peer(Identity()) as outside,
        pytest.raises(NotPermitted, match="another user namespace"),
    ):
        warden.check(credentials_of(peer), on(outside.pid))


@needs_root
def test_a_kernel_address_takes_more_than_cap_perfmon(warden: Warden) -> None:
    with Peer(Identity(capabilities=CAP_PERFMON)) as peer:
        peers_credentials = credentials_of(peer)

        warden.check(peers_credentials, Question(tid=peer.pid))  # hits in the kernel at a user address
        warden.check(peers_credentials, Question(cpus=(0,)))
        with pytest.raises(NotPermitted, match="kernel address takes CAP_SYS_ADMIN"):
            warden.check(peers_credentials, Question(tid=peer.pid, kernel_address=True))


@needs_root
def test_whose_capabilities_are_withheld_is_told_so(warden: Warden) -> None:
    with (
        Peer(Identity(capabilities=CAP_PERFMON, dumpable=False)) as peer,
        Peer(Identity((60002, 60002, 60002))) as other,
        pytest.raises(NotPermitted, match="do not count here because it is not dumpable"),
    ):
        warden.check(credentials_of(peer), on(other.pid))


@needs_root
def test_a_thread_that_is_no_more_is_gone_and_not_forbidden(warden: Warden, peer: Peer) -> None:
    exited = subprocess.Popen(["true"])
    exited.wait()

    with pytest.raises(TargetGone, match=f"no thread {exited.pid}"):
        warden.check(credentials_of(peer), on(exited.pid))


@needs_root
def test_a_user_namespace_that_is_not_the_peers_is_not_entered(warden: Warden, peer: Peer) -> None:
    # Given credentials from before the peer went elsewhere
    stale = msgspec.structs.replace(credentials_of(peer), user_namespace=1, in_our_user_namespace=False)

    with pytest.raises(NotPermitted, match=r"cannot ask the kernel in the name of uid 60001 \(ESRCH\)"):
        warden.check(stale, on(peer.pid))


# --- when something goes wrong ---------------------------------------------------------------------------------------


@needs_root
def test_a_dead_helper_refuses_one_question_and_is_replaced(warden: Warden, peer: Peer) -> None:
    dead = warden.helper_pid
    assert dead is not None
    os.kill(dead, signal.SIGKILL)
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)

    with pytest.raises(NotPermitted, match="has ended"):
        warden.check(credentials_of(peer), on(peer.pid))

    assert warden.helper_pid != dead
    warden.check(credentials_of(peer), on(peer.pid))


@needs_root
def test_a_hanging_helper_refuses_one_question_and_is_replaced(peer: Peer) -> None:
    # Given a helper that is stopped, and at most one child, which leaves for the first question in another name
    warden = Warden(answer_limit_s=0.5)
    try:
        stopped = warden.helper_pid
        assert stopped is not None
        wait_until(lambda: child_of(stopped) is not None)
        os.kill(stopped, signal.SIGSTOP)
        with open(f"/proc/{stopped}/stat", encoding="utf-8") as stat:
            wait_until(lambda: stat.seek(0) == 0 and stat.read().split()[2] == "T")
        warden.check(credentials_of(peer), on(peer.pid))

        with (
            Peer(Identity((60002, 60002, 60002))) as other,
            pytest.raises(NotPermitted, match=r"no answer within 0\.5 s"),
        ):
            warden.check(credentials_of(other), on(other.pid))

        assert warden.helper_pid != stopped
        warden.check(credentials_of(peer), on(peer.pid))
    finally:
        warden.close()


@needs_root
def test_questions_in_many_names_are_each_answered_in_their_own(warden: Warden, peer: Peer) -> None:
    with Peer(Identity((60002, 60002, 60002))) as other:
        for one, another in [(peer, other), (other, peer)] * 5:
            warden.check(credentials_of(one), on(one.pid))
            with pytest.raises(NotPermitted, match="belongs to uid"):
                warden.check(credentials_of(one), on(another.pid))


@needs_root
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_a_child_that_is_killed_or_stopped_between_questions_harms_none(
    warden: Warden, peer: Peer, how: signal.Signals
) -> None:
    helper = warden.helper_pid
    assert helper is not None
    warden.check(credentials_of(peer), on(peer.pid))
    wait_until(lambda: child_of(helper) is not None)
    child = child_of(helper)
    assert child is not None
    os.kill(child, how)

    warden.check(credentials_of(peer), on(peer.pid))

    assert warden.helper_pid == helper


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda how: how.name)
def test_a_child_that_is_killed_or_stopped_harms_its_own_question_only(
    monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    # Given a child that the peer it has become sends a signal, when the question is the seventh
    judge = warden_process._judge

    def hit(request: Request, in_initial_namespace: bool) -> tuple[Verdict, int]:
        if request.serial == A_REQUEST.serial:
            os.kill(os.getpid(), how)
        return judge(request, in_initial_namespace)

    monkeypatch.setattr(warden_process, "_judge", hit)
    with serving() as channel:
        channel.send(warden_process.pack_request(A_REQUEST))
        channel.send(warden_process.pack_request(A_REQUEST._replace(serial=8)))

        answers = [warden_process.unpack_answer(channel.recv(64)) for _ in range(2)]

    # Then that one was not answered, and the next one was, by another child.
    assert answers[0] == Answer(7, Verdict.ENDED, 0)
    assert answers[1].serial == 8
    assert answers[1].verdict is not Verdict.ENDED


def test_an_answer_after_which_the_child_is_killed_stands() -> None:
    # Given a child that dies between its answer and its end
    sent = socket.socket.send

    class Deadly(socket.socket):
        def send(self, data: object, flags: int = 0) -> int:
            size = sent(self, data, flags)  # type: ignore[arg-type]
            if os.getpid() != self.parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return size

        parent = 0

    with serving(Deadly) as channel:
        channel.send(warden_process.pack_request(A_REQUEST._replace(cpu=-1)))
        first, second = (warden_process.unpack_answer(channel.recv(64)) for _ in range(2))

    # Then both speak of the same question, and whoever asked the next one will not take the second for its own.
    assert (first.serial, second) == (7, Answer(7, Verdict.ENDED, 0))
    assert first.verdict is not Verdict.ENDED


def test_the_helper_ends_when_the_daemon_is_gone() -> None:
    program = "from hwbpd.warden import Warden; w = Warden(); print(w.helper_pid, flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        helper = int(daemon.stdout.readline())
        pidfd = os.pidfd_open(helper)
        wait_until(lambda: child_of(helper) is not None)
        spare = child_of(helper)
        assert spare is not None
        sparefd = os.pidfd_open(spare)

        daemon.kill()

        for fd in (pidfd, sparefd):
            assert readable(fd, WAIT_S), "it lives on"
            os.close(fd)


@needs_root
def test_no_peer_can_trace_the_helper_or_its_child(warden: Warden) -> None:
    # Given a helper with its child waiting, neither of which has become anybody else
    helper = warden.helper_pid
    assert helper is not None
    wait_until(lambda: child_of(helper) is not None)
    with Peer(Identity((0, 0, 0), (0, 0, 0), (), 0)) as powerless_root:
        for pid in (helper, child_of(helper)):
            assert pid is not None
            assert powerless_root.open(tid=pid, cpu=-1, kernel=False, address=0x1000) == errno.EACCES


@needs_root
def test_a_cpu_that_there_is_not_is_offline_and_not_forbidden(warden: Warden) -> None:
    possible = Path("/sys/devices/system/cpu/possible").read_text()
    beyond = int(possible.strip().rpartition("-")[2].rpartition(",")[2]) + 1
    with Peer(Identity(capabilities=CAP_PERFMON)) as peer, pytest.raises(CpuOffline, match=f"cpu {beyond}"):
        warden.check(credentials_of(peer), Question(cpus=(beyond,)))


# --- means -----------------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    """Nothing announces a fork or a stop to a third process: look until it is so."""
    for _ in range(int(WAIT_S * 1000)):
        if condition():
            return
        select.select([], [], [], 0.001)
    raise AssertionError("it did not come to that")


def child_of(pid: int) -> int | None:
    """Return the child a process has, when it waits for a question (in the kernel, after its rehearsal)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] == "S":
                return int(entry.name)
    return None


@contextmanager
def serving(kind: type[socket.socket] = socket.socket) -> Iterator[socket.socket]:
    """Give the daemon's end of a helper that runs in a child of this process, with what a test has put in its place."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with warnings.catch_warnings():
        # Since Python 3.12 a fork beside other threads warns; this child uses nothing that they could hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        helper = os.fork()
    if helper == 0:
        try:
            ours.close()
            with kind(fileno=theirs.detach()) as channel:
                if hasattr(channel, "parent"):
                    channel.parent = os.getpid()
                warden_process.serve(channel)
        finally:
            os._exit(0)
    theirs.close()
    ours.settimeout(WAIT_S)
    with ours:
        yield ours
    os.waitpid(helper, 0)
