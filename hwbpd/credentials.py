"""
What the kernel would look at, were a peer to ask it for a breakpoint itself.

Who a peer is was fixed when it connected; what it may do is read anew for each claim, for it can change. Two rules keep
a connection from becoming worth more than it was made with:

1. The effective ids must still be those of the connect (SO_PEERCRED). Otherwise somebody could connect, leave the
   socket with a child, execute a setuid program and claim with that program's rights.
2. Capabilities count only while the process is dumpable. Executing a program with file capabilities gains them under
   the same uid, and the kernel then makes the process non-dumpable; so nothing gained that way counts. This withholds
   them also from those who got them so before they connected: the two cannot be told apart. Ambient capabilities
   count, and so do those of a process that made itself dumpable again (PR_SET_DUMPABLE). Of a process with uid 0 we
   cannot see whether it is dumpable; executing anything gives it what its bounding set has, so nothing is gained.

A seccomp filter may forbid perf_event_open, and what a filter does cannot be asked; a peer that has more filters than
the daemon is therefore refused. The labels of security modules (SELinux, AppArmor, Landlock) are not looked at.

A process is judged by its main thread: the others share its memory, so a lesser right of theirs protects nothing.
"""

from __future__ import annotations

import functools
import os
import select

from msgspec import Struct

from hwbpd.core.errors import NotPermitted

INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO: its inode number is part of the kernel's interface

GONE = "the process that connected is gone or cannot be looked at"

_READ_BYTES = 8192

Ids = tuple[int, int, int]  # real, effective, saved


class Credentials(Struct, frozen=True):
    """A process as the kernel's permission checks see it. Ids are as our user namespace names them."""

    pid: int
    uids: Ids
    gids: Ids
    groups: tuple[int, ...]
    effective: int  # capabilities, bit n for capability n; they are valid in its own user namespace only
    permitted: int
    user_namespace: int  # inode number
    in_our_user_namespace: bool
    in_our_pid_namespace: bool
    has_more_filters: bool = False  # seccomp filters, than the daemon has
    capabilities_withheld: bool = False  # it has some, and they do not count because it is not dumpable

    @property
    def uid(self) -> int:
        return self.uids[1]

    @property
    def gid(self) -> int:
        return self.gids[1]

    def is_as_mighty_as_we(self) -> bool:
        """Whether the kernel cannot refuse it what it grants the daemon; then nothing needs to be asked."""
        ours = _ours()
        return (
            self.in_our_user_namespace
            and not self.has_more_filters
            and (self.uids, self.gids) == (ours.uids, ours.gids)
            and self.effective & ours.effective == ours.effective
            and self.permitted & ours.permitted == ours.permitted
        )


def read(pid: int, pidfd: int, *, uid: int, gid: int) -> Credentials:
    """
    Return the credentials a connected process has now.

    :param pidfd: names the process for certain; while it is alive, its pid is nobody else's.
    :param uid: effective at connect, as SO_PEERCRED says; ``gid`` likewise.
    :raises NotPermitted: when it has exited, cannot be looked at, or is no longer who connected.
    """
    try:
        found = _look_at(pid)
    except (OSError, ValueError):
        found = None
    if found is None or _is_gone(pidfd):  # what was read may then be of a later process with the same number
        raise NotPermitted(GONE)
    if (found.uid, found.gid) != (uid, gid):
        raise NotPermitted(
            f"your process connected as uid {uid}, gid {gid} and is now uid {found.uid}, gid {found.gid}; connect again"
        )
    if _ours().user_namespace != INITIAL_USER_NAMESPACE and _overflow_uid() in found.uids:
        raise NotPermitted("your uid has no name in the daemon's user namespace, so nothing can be asked in your name")
    return found


def is_in_our_pid_namespace(pid: int, pidfd: int) -> bool:
    """Whether a connected process knows threads by the numbers we do; raises ``NotPermitted`` when it has exited."""
    try:
        number = namespace_number(f"/proc/{pid}/ns/pid")
    except OSError:
        number = None
    if number is None or _is_gone(pidfd):
        raise NotPermitted(GONE)
    return number == _our_namespace("pid")


def _look_at(pid: int) -> Credentials:
    """:raises OSError: ValueError: when there is no such process or it has no such lines."""
    directory = f"/proc/{pid}"
    user_namespace, pid_namespace = (namespace_number(f"{directory}/ns/{kind}") for kind in ("user", "pid"))
    status = _read(f"{directory}/status")
    # After the capabilities: what an exec in between gained is then withheld. The kernel gives files in the directory
    # of a non-dumpable process to root; the directory itself always belongs to the effective uid. By name, because what
    # an open descriptor says of the owner is as old as the descriptor.
    owner = os.stat(f"{directory}/status")
    uids, gids = _three(_field(status, b"Uid")), _three(_field(status, b"Gid"))
    dumpable = (owner.st_uid, owner.st_gid) == (uids[1], gids[1])
    effective, permitted = int(_field(status, b"CapEff"), 16), int(_field(status, b"CapPrm"), 16)
    return Credentials(
        pid=pid,
        uids=uids,
        gids=gids,
        groups=tuple(map(int, _field(status, b"Groups").split())),
        effective=effective if dumpable else 0,
        permitted=permitted if dumpable else 0,
        user_namespace=user_namespace,
        in_our_user_namespace=user_namespace == _our_namespace("user"),
        in_our_pid_namespace=pid_namespace == _our_namespace("pid"),
        has_more_filters=_filters(status) > _our_filters(),
        capabilities_withheld=not dumpable and permitted != 0,
    )


def namespace_number(link: str) -> int:
    """Return the inode number in a link like /proc/PID/ns/user, "user:[4026531837]"; raises ``OSError``."""
    return int(os.readlink(link).partition("[")[2].rstrip("]"))


@functools.cache
def _our_namespace(kind: str) -> int:
    return namespace_number(f"/proc/self/ns/{kind}")


def _read(path: str) -> bytes:
    """The whole of a small file, at a third of what ``open`` takes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, _READ_BYTES)
        while len(data) % _READ_BYTES == 0 and (more := os.read(fd, _READ_BYTES)):  # of 65 536 groups, say
            data += more
        return data
    finally:
        os.close(fd)


def _field(status: bytes, name: bytes) -> bytes:
    """What a line of /proc/PID/status says, or nothing. The kernel lets no line break into a process's name."""
    _, found, rest = status.partition(b"\n" + name + b":")
    return rest[: rest.index(b"\n")].strip() if found else b""


def _three(line: bytes) -> Ids:
    real, effective, saved, _filesystem = map(int, line.split())
    return real, effective, saved


def _filters(status: bytes) -> int:
    # Strict mode (1) is no filter to the kernel's count, but allows less than any. Before Linux 5.9 there is no count.
    mode = int(_field(status, b"Seccomp") or 0)
    return int(_field(status, b"Seccomp_filters") or mode) if mode != 1 else 2**31


@functools.cache
def _our_filters() -> int:
    return _filters(_read("/proc/self/status"))


@functools.cache
def _ours() -> Credentials:
    return _look_at(os.getpid())


@functools.cache
def _overflow_uid() -> int:
    with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
        return int(file.read())


def _is_gone(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
