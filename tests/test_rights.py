"""What is asked of the kernel in a peer's name, of whom, and when; what the kernel answers is ``test_warden.py``'s."""

from __future__ import annotations

import os
import random

import msgspec
import pytest

from hwbpd import credentials
from hwbpd.core.errors import NotPermitted
from hwbpd.core.model import Access, Claim, Kind, Mode, Owner, Pool, Span, Target, Task
from hwbpd.credentials import Credentials
from hwbpd.peers import Peer
from hwbpd.rights import KERNEL_SPACE, Rights
from hwbpd.warden import Question
from tests.fakes import FakeMachine

PEER = Peer(4001, 1000, 100, "gdb", 5)
SPAN = Span(0x404040, 8)
USER_ONLY = Mode(kernel=False)
TIDS = (812, 813)  # one process
TASK_TID = 812
TASK = Target(Task(TASK_TID, 5))
STRANGER = Credentials(
    pid=PEER.pid,
    uids=(1000, 1000, 1000),
    gids=(100, 100, 100),
    groups=(100, 7),
    effective=0,
    permitted=0,
    user_namespace=4711,
    in_our_user_namespace=True,
    in_our_pid_namespace=True,
)


class Kernel:
    """Remembers what it was asked, and refuses what it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Credentials, Question]] = []
        self.refuses: set[int] = set()  # tids

    def check(self, credentials: Credentials, question: Question) -> None:
        self.asked.append((credentials, question))
        if question.tid in self.refuses:
            raise NotPermitted(f"you may not look into thread {question.tid}")


class Somebody:
    """A peer with credentials of the test's choice, read anew for each question, and a kernel that is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = Kernel()
        self.machine = FakeMachine({Pool.ANY: 4}, 2, random.Random(0))
        for tid in TIDS:
            self.machine.start_task(tid)
        self.rights = Rights(self.kernel, self.machine)
        self.now: Credentials | None = STRANGER
        self.read: list[tuple[int, int, int, int]] = []
        monkeypatch.setattr(credentials, "read", self._read)
        monkeypatch.setattr(credentials, "is_in_our_pid_namespace", lambda *_: self.now.in_our_pid_namespace)

    def _read(self, pid: int, pidfd: int, *, uid: int, gid: int) -> Credentials:
        self.read.append((pid, pidfd, uid, gid))
        if self.now is None:
            raise NotPermitted("the process that connected is gone or cannot be looked at")
        return self.now

    @property
    def questions(self) -> list[Question]:
        return [question for _, question in self.kernel.asked]

    def may(self, target: Target, span: Span = SPAN, mode: Mode = USER_ONLY) -> None:
        self.rights.may_claim(PEER, target, span, mode)

    def still_may(self, target: Target, *, privileged: bool = False) -> None:
        owner = Owner(1, PEER.pid, PEER.uid, PEER.gid, PEER.comm)
        claim = Claim(7, owner, Kind.PERF, SPAN, Access.WRITE, USER_ONLY, target, "", 0, privileged)
        self.rights.still_may(PEER, claim)

    def process(self) -> Target:
        return Target(process=self.machine.process(TIDS[0]))


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> Somebody:
    return Somebody(monkeypatch)


def ourselves() -> Credentials:
    return credentials._look_at(os.getpid())


# --- who is privileged -----------------------------------------------------------------------------------------------


def test_who_is_as_mighty_as_the_daemon_is_privileged_and_nothing_is_asked_about_it(somebody: Somebody) -> None:
    somebody.now = ourselves()

    assert somebody.rights.is_privileged(PEER)
    somebody.may(Target())
    somebody.may(TASK, Span(KERNEL_SPACE, 8), Mode())
    assert somebody.kernel.asked == []


def test_who_is_less_is_not_and_the_kernel_is_asked_in_its_name(somebody: Somebody) -> None:
    assert not somebody.rights.is_privileged(PEER)

    somebody.may(TASK)

    assert somebody.kernel.asked == [(STRANGER, Question(TASK_TID, None, user=True, kernel=False))]


def test_each_time_the_process_is_looked_at_anew_by_the_ids_it_connected_with(somebody: Somebody) -> None:
    # given a peer that was privileged
    somebody.now = ourselves()
    assert somebody.rights.is_privileged(PEER)

    # when it has become somebody else, then that counts
    somebody.now = STRANGER
    assert not somebody.rights.is_privileged(PEER)
    somebody.may(TASK)
    assert len(somebody.kernel.asked) == 1
    assert set(somebody.read) == {(PEER.pid, PEER.pidfd, PEER.uid, PEER.gid)}

    # and of one that is gone nothing can be said
    somebody.now = None
    with pytest.raises(NotPermitted, match="gone"):
        somebody.rights.is_privileged(PEER)
    with pytest.raises(NotPermitted, match="gone"):
        somebody.may(TASK)
    assert len(somebody.kernel.asked) == 1


# --- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "tid", "cpus"),
    [
        (Target(), 0, None),
        (Target(cpus=(0, 1)), 0, (0, 1)),
        (Target(Task(812, 5)), 812, None),
        (Target(Task(812, 5), (1,)), 812, (1,)),
    ],
)
@pytest.mark.parametrize("mode", [Mode(), Mode(user=False), Mode(kernel=False)])
def test_the_question_is_that_of_the_claim(
    somebody: Somebody, target: Target, tid: int, cpus: tuple[int, ...] | None, mode: Mode
) -> None:
    somebody.may(target, mode=mode)

    assert somebody.questions == [Question(tid, cpus, mode.user, mode.kernel, kernel_address=False)]


@pytest.mark.parametrize(
    ("address", "length_bytes", "is_kernels"),
    [
        (0, 8, False),
        (KERNEL_SPACE - 8, 8, False),
        (KERNEL_SPACE - 8, 9, True),
        (KERNEL_SPACE - 7, 8, True),
        (KERNEL_SPACE, 1, True),
        (0xFFFF_FFFF_8100_0000, 8, True),
        (2**64 - 1, 1, True),
        (0, 2**48, True),
    ],
)
def test_a_span_that_reaches_into_the_kernel_is_a_kernel_address(
    somebody: Somebody, address: int, length_bytes: int, is_kernels: bool
) -> None:
    somebody.may(TASK, Span(address, length_bytes))

    assert [question.kernel_address for question in somebody.questions] == [is_kernels]


def test_for_a_process_each_of_its_threads_is_asked_about(somebody: Somebody) -> None:
    somebody.may(somebody.process())
    assert [question.tid for question in somebody.questions] == list(TIDS)

    somebody.kernel.refuses = {TIDS[1]}
    with pytest.raises(NotPermitted, match=f"thread {TIDS[1]}"):
        somebody.may(somebody.process())


def test_thread_numbers_of_another_pid_namespace_are_not_looked_up_here(somebody: Somebody) -> None:
    somebody.now = msgspec.structs.replace(STRANGER, in_our_pid_namespace=False)

    for target in (TASK, Target(Task(TASK_TID, 5), (0,)), somebody.process()):
        with pytest.raises(NotPermitted, match="another pid namespace"):
            somebody.may(target)
    assert somebody.kernel.asked == []

    somebody.may(Target())
    assert len(somebody.kernel.asked) == 1, "a CPU is the same everywhere"


# --- once the slots are taken ----------------------------------------------------------------------------------------


def test_for_a_thread_or_a_process_the_question_is_asked_again(somebody: Somebody) -> None:
    for target in (TASK, somebody.process()):
        somebody.kernel.asked.clear()
        somebody.may(target)
        first = list(somebody.questions)

        somebody.still_may(target)
        assert somebody.questions == first * 2

    somebody.kernel.refuses = {TASK_TID}
    with pytest.raises(NotPermitted):
        somebody.still_may(TASK)


def test_for_a_cpu_or_a_privileged_owner_it_is_not(somebody: Somebody) -> None:
    somebody.kernel.refuses = {0, TASK_TID}

    somebody.still_may(Target())
    somebody.still_may(Target(cpus=(1,)))
    somebody.still_may(TASK, privileged=True)

    assert (somebody.kernel.asked, somebody.read) == ([], [])


# --- kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Kind))
def test_a_kind_is_a_request_that_only_the_privileged_are_sure_to_get(somebody: Somebody, kind: Kind) -> None:
    assert somebody.rights.kind_served(kind, privileged=True) is kind
    reserved = kind in (Kind.KGDB, Kind.KVM)
    assert somebody.rights.kind_served(kind, privileged=False) is (Kind.PERF if reserved else kind)


# --- whose thread ----------------------------------------------------------------------------------------------------


def test_a_thread_is_asked_about_by_its_own_process_which_knows_it_by_that_number(somebody: Somebody) -> None:
    # given a thread, its process, and others
    task = somebody.machine.task(TASK_TID)
    own = Peer(TIDS[0], 1000, 100, "vmm", 5)

    # then its process may ask, and others only where they may about any
    somebody.rights.may_ask_about(own, task)
    with pytest.raises(NotPermitted, match=f"tid {TASK_TID} is no thread of yours"):
        somebody.rights.may_ask_about(PEER, task)
    somebody.rights.may_ask_about(PEER, task, of_any=True)

    # and nobody for whom the number means another thread
    somebody.now = msgspec.structs.replace(STRANGER, in_our_pid_namespace=False)
    for asking, of_any in ((own, False), (own, True), (PEER, True)):
        with pytest.raises(NotPermitted, match="pid namespace"):
            somebody.rights.may_ask_about(asking, task, of_any=of_any)
