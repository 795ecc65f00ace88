"""
The warden says of every peer what the kernel says to that peer.

Real processes with all sorts of credentials open real breakpoints, on all sorts of threads and on CPUs, under every
value of kernel.perf_event_paranoid; the warden is asked the same. It must never allow what the kernel refused. It must
not refuse what the kernel allowed either, but for the rules in ``STRICTER``, each of which must be seen at work.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from hwbpd import credentials
from hwbpd.core.errors import NotPermitted
from hwbpd.warden import Question, Warden
from tests.host import exclusive
from tests.peer import (
    CAP_NET_RAW,
    CAP_PERFMON,
    CAP_SYS_ADMIN,
    CAP_SYS_PTRACE,
    KERNEL_ADDRESS,
    USER_ADDRESS,
    Identity,
    Peer,
)

PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
VALUES = (-1, 0, 1, 2, 3, 4)

ROOT_IDS = (0, 0, 0)
PEERS = {
    "plain": Identity(),
    "plain with groups": Identity(groups=(60002, 60003)),
    "other gid": Identity(gids=(60002, 60002, 60002)),
    "mixed gids": Identity(gids=(60001, 60002, 60002)),
    "mixed uids": Identity((60001, 60002, 60001)),
    "real uid other": Identity((60002, 60001, 60001)),
    "net_raw": Identity(capabilities=CAP_NET_RAW),
    "perfmon": Identity(capabilities=CAP_PERFMON),
    "sys_ptrace": Identity(capabilities=CAP_SYS_PTRACE),
    "sys_admin": Identity(capabilities=CAP_SYS_ADMIN),
    "perfmon and sys_admin": Identity(capabilities=CAP_PERFMON | CAP_SYS_ADMIN),
    "uid 0 without capabilities": Identity(ROOT_IDS, ROOT_IDS, capabilities=0),
    "root": Identity(ROOT_IDS, ROOT_IDS, tuple(os.getgroups()), capabilities=None),
    "root of a user namespace": Identity(user_namespace=True),
    "root of a user namespace, uid 0 outside": Identity(ROOT_IDS, ROOT_IDS, capabilities=None, user_namespace=True),
    "not dumpable": Identity(dumpable=False),
    "not dumpable, perfmon": Identity(capabilities=CAP_PERFMON, dumpable=False),
    "in a pid namespace": Identity(pid_namespace=True),
    "in a pid namespace, perfmon": Identity(capabilities=CAP_PERFMON, pid_namespace=True),
}
TARGETS = {
    "same uid": Identity(),
    "same uid, not dumpable": Identity(dumpable=False),
    "same uid, holds net_raw": Identity(capabilities=CAP_NET_RAW),
    "same uid, other gid": Identity(gids=(60002, 60002, 60002)),
    "setuid-like": Identity((60001, 0, 0)),
    "other uid": Identity((60002, 60002, 60002)),
    "uid 0 without capabilities": Identity(ROOT_IDS, ROOT_IDS, capabilities=0),
    "root": Identity(ROOT_IDS, ROOT_IDS, capabilities=None),
    "same uid, root of a user namespace": Identity(user_namespace=True),
    "same uid, in a pid namespace": Identity(pid_namespace=True),
}
ITSELF = "itself"


class Case(NamedTuple):
    """One claim: on a thread or CPU-wide, on a CPU or not, with hits in the kernel or not, at such an address."""

    on_thread: bool
    on_cpu: bool
    kernel: bool
    address: int

    def __str__(self) -> str:
        thread = ("thread on a cpu" if self.on_cpu else "thread") if self.on_thread else "cpu-wide"
        kernel_address = " at a kernel address" if self.address == KERNEL_ADDRESS else ""
        return f"{thread}, {'user and kernel' if self.kernel else 'user'} hits{kernel_address}"


THREAD_CASES = [
    Case(True, False, False, USER_ADDRESS),
    Case(True, False, True, USER_ADDRESS),
    Case(True, True, False, USER_ADDRESS),
    Case(True, False, True, KERNEL_ADDRESS),
]
CPU_CASES = [
    Case(False, True, False, USER_ADDRESS),
    Case(False, True, True, USER_ADDRESS),
    Case(False, True, True, KERNEL_ADDRESS),
]

# What is refused although the kernel would allow it: the rule, and to whom it applies.
Rule = Callable[[Identity, str, Case], bool]
STRICTER: dict[str, Rule] = {
    "capabilities of a process that is not dumpable do not count": lambda peer, target, case: (
        not peer.dumpable and peer.capabilities != 0
    ),
    "a thread's number means nothing in another pid namespace": lambda peer, target, case: (
        peer.pid_namespace and case.on_thread
    ),
    "a process may look into itself, but we ask as another process": lambda peer, target, case: (
        target == ITSELF and (not peer.dumpable or len(set(peer.uids)) > 1 or len(set(peer.gids)) > 1)
    ),
}

pytestmark = [
    pytest.mark.hardware,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users takes root: run the tests as root"),
]


@pytest.fixture
def paranoid() -> Iterator[list[int]]:
    """The values that can be set here; as it was afterwards."""
    before = PARANOID.read_text()
    try:
        yield [value for value in VALUES if may_set(value)]
    finally:
        PARANOID.write_text(before)


def may_set(value: int) -> bool:
    try:
        PARANOID.write_text(f"{value}\n")
    except OSError as refusal:
        print(f"perf_event_paranoid = {value} is left out: {refusal.strerror}")
        return False
    return int(PARANOID.read_text()) == value


def test_the_warden_agrees_with_the_kernel(paranoid: list[int]) -> None:
    laxer: list[str] = []
    stricter: list[str] = []
    answers: Counter[str] = Counter()
    by_rule: Counter[str] = Counter()
    with ExitStack() as stack:
        stack.enter_context(exclusive())
        warden = Warden()
        stack.callback(warden.close)
        peers = {name: stack.enter_context(Peer(identity)) for name, identity in PEERS.items()}
        targets = {name: stack.enter_context(Peer(identity)).pid for name, identity in TARGETS.items()}
        for value in paranoid:
            PARANOID.write_text(f"{value}\n")
            for name, peer in peers.items():
                for target, tid, case in cases_of(peer, targets):
                    kernels = ask_the_kernel(peer, target, tid, case)
                    wardens = ask_the_warden(warden, peer, tid, case)
                    answers["allowed" if kernels == 0 else errno.errorcode[kernels]] += 1
                    line = f"paranoid {value}: {name} on {target}: {case}: kernel {kernels}, warden {wardens}"
                    if kernels != 0 and wardens is None:
                        laxer.append(line)
                    elif kernels == 0 and wardens is not None:
                        rules = [rule for rule, holds in STRICTER.items() if holds(peer.identity, target, case)]
                        by_rule.update(rules)
                        stricter.extend([] if rules else [line])
    print(f"{sum(answers.values())} combinations compared, paranoid in {paranoid}; the kernel: {dict(answers)}")
    print(f"refused although the kernel allows it: {dict(by_rule)}")
    assert not laxer, "\n".join(["the kernel refuses, the warden allows:", *laxer])
    assert not stricter, "\n".join(["the kernel allows, the warden refuses:", *stricter])
    assert set(by_rule) == set(STRICTER), "a rule that is never at work has no place here"
    assert min(answers["allowed"], answers["EACCES"], answers["EPERM"]) > 0


def cases_of(peer: Peer, targets: dict[str, int]) -> Iterator[tuple[str, int, Case]]:
    for target, tid in {**targets, ITSELF: peer.pid}.items():
        for case in THREAD_CASES:
            yield target, tid, case
    for case in CPU_CASES:
        yield "a cpu", -1, case


def ask_the_kernel(peer: Peer, target: str, tid: int, case: Case) -> int:
    """Return the errno that the peer gets, or 0. In a pid namespace of its own only itself has a number: 0 will do."""
    if target == ITSELF:
        tid = 0
    return peer.open(tid=tid, cpu=0 if case.on_cpu else -1, kernel=case.kernel, address=case.address)


def ask_the_warden(warden: Warden, peer: Peer, tid: int, case: Case) -> str | None:
    """Return the sentence of a refusal, or None."""
    uid, gid = peer.identity.uids[1], peer.identity.gids[1]
    question = Question(
        tid=tid if case.on_thread else 0,
        cpus=(0,) if case.on_cpu else None,
        kernel=case.kernel,
        kernel_address=case.address == KERNEL_ADDRESS,
    )
    try:
        warden.check(credentials.read(peer.pid, peer.pidfd, uid=uid, gid=gid), question)
    except NotPermitted as refusal:
        return str(refusal)
    return None
