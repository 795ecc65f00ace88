"""What is read of a peer: its ids as they are, its capabilities only where they cannot have been come by since."""

from __future__ import annotations

import os
import subprocess

import msgspec
import pytest

from hwbpd import credentials
from hwbpd.core.errors import NotPermitted
from hwbpd.credentials import Credentials
from tests.peer import CAP_PERFMON, CAP_SYS_PTRACE, Identity, Peer

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users takes root: run the tests as root")


def read(peer: Peer) -> Credentials:
    return credentials.read(peer.pid, peer.pidfd, uid=peer.identity.uids[1], gid=peer.identity.gids[1])


def ourselves() -> Credentials:
    pidfd = os.pidfd_open(os.getpid())
    try:
        return credentials.read(os.getpid(), pidfd, uid=os.geteuid(), gid=os.getegid())
    finally:
        os.close(pidfd)


def test_we_are_as_mighty_as_we() -> None:
    us = ourselves()

    assert us.uids == os.getresuid()
    assert us.gids == os.getresgid()
    assert sorted(us.groups) == sorted(os.getgroups())
    assert us.in_our_user_namespace
    assert us.in_our_pid_namespace
    assert us.is_as_mighty_as_we()


@pytest.mark.parametrize(
    "less",
    [
        {"uids": (os.getuid() + 1, *os.getresuid()[1:])},
        {"gids": (*os.getresgid()[:2], os.getgid() + 1)},
        {"in_our_user_namespace": False},
        {"has_more_filters": True},
    ],
    ids=str,
)
def test_whoever_differs_from_us_is_not_as_mighty(less: dict[str, object]) -> None:
    assert not msgspec.structs.replace(ourselves(), **less).is_as_mighty_as_we()


@needs_root
@pytest.mark.parametrize("field", ["effective", "permitted"])
def test_whoever_lacks_one_of_our_capabilities_is_not_as_mighty(field: str) -> None:
    us = ourselves()
    one = 1 << (getattr(us, field).bit_length() - 1)

    assert not msgspec.structs.replace(us, **{field: getattr(us, field) & ~one}).is_as_mighty_as_we()


@needs_root
def test_ids_groups_and_capabilities_are_those_the_process_has() -> None:
    identity = Identity((60001, 60002, 60001), (60003, 60004, 60005), (60006, 60007), CAP_PERFMON | CAP_SYS_PTRACE)
    with Peer(identity) as peer:
        found = read(peer)

    assert found == Credentials(
        pid=peer.pid,
        uids=identity.uids,
        gids=identity.gids,
        groups=identity.groups,
        effective=CAP_PERFMON | CAP_SYS_PTRACE,
        permitted=CAP_PERFMON | CAP_SYS_PTRACE,
        user_namespace=found.user_namespace,
        in_our_user_namespace=True,
        in_our_pid_namespace=True,
    )
    assert (found.uid, found.gid) == (60002, 60004)


@needs_root
def test_capabilities_of_a_process_that_is_not_dumpable_are_withheld() -> None:
    with Peer(Identity(capabilities=CAP_PERFMON, dumpable=False)) as peer:
        found = read(peer)

    assert (found.effective, found.permitted) == (0, 0)
    assert found.capabilities_withheld


@needs_root
def test_a_process_without_capabilities_has_none_withheld() -> None:
    with Peer(Identity(dumpable=False)) as peer:
        assert not read(peer).capabilities_withheld


@needs_root
def test_root_of_another_user_namespace_is_told_from_ours() -> None:
    with Peer(Identity(user_namespace=True)) as peer:
        found = read(peer)

    assert found.uids == (60001, 60001, 60001)  # as we name it
    assert found.permitted & CAP_PERFMON  # valid in there only
    assert not found.in_our_user_namespace
    assert not found.is_as_mighty_as_we()


@needs_root
def test_another_pid_namespace_is_told_from_ours() -> None:
    with Peer(Identity(pid_namespace=True)) as peer:
        found = read(peer)

    assert not found.in_our_pid_namespace
    assert found.in_our_user_namespace


@needs_root
def test_a_process_in_strict_seccomp_has_more_filters_than_we() -> None:
    with Peer(Identity(strict_seccomp=True)) as peer:
        with open(f"/proc/{peer.pid}/status", encoding="utf-8") as status:
            while "Seccomp:\t1" not in status.read():  # it says its pid just before
                status.seek(0)

        assert read(peer).has_more_filters


@needs_root
def test_whoever_changed_its_user_after_connecting_has_to_connect_again() -> None:
    # Given a socket that uid 60002 connected, and which its process holds as uid 60001 now
    with (
        Peer(Identity()) as peer,
        pytest.raises(NotPermitted, match=r"connected as uid 60002, gid 60001 and is now uid 60001"),
    ):
        credentials.read(peer.pid, peer.pidfd, uid=60002, gid=60001)


@needs_root
def test_whoever_changed_its_group_after_connecting_has_to_connect_again() -> None:
    with Peer(Identity()) as peer, pytest.raises(NotPermitted, match="connect again"):
        credentials.read(peer.pid, peer.pidfd, uid=60001, gid=60002)


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_nothing_is_read_of_a_process_that_has_exited(reaped: bool) -> None:
    process = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        process.wait()
    try:
        with pytest.raises(NotPermitted, match="gone"):
            credentials.read(process.pid, pidfd, uid=os.geteuid(), gid=os.getegid())
    finally:
        process.wait()
        os.close(pidfd)


def test_a_living_process_does_not_stand_in_for_a_dead_one_of_the_same_number() -> None:
    # Given the pidfd of a process that has exited, and somebody else living under its number
    process = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(process.pid)
    process.wait()

    with pytest.raises(NotPermitted, match="gone"):
        credentials.read(os.getpid(), pidfd, uid=os.geteuid(), gid=os.getegid())
    os.close(pidfd)


def test_a_process_in_our_pid_namespace_knows_threads_by_our_numbers_until_it_is_gone() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            assert credentials.is_in_our_pid_namespace(process.pid, pidfd)
            process.kill()
            process.wait()
            with pytest.raises(NotPermitted, match="is gone"):
                credentials.is_in_our_pid_namespace(process.pid, pidfd)
        finally:
            os.close(pidfd)
