"""
The helper that asks the kernel in a peer's name: ``python warden_process.py FD``, started by ``hwbpd/warden.py``.

The kernel's rules for perf events and for looking into a thread are many, differ between versions and distributions,
and change; none of them is repeated here. A child of this process becomes the peer as far as permission goes (groups,
gids, uids, user namespace, capabilities), asks the kernel for an event, and answers what the kernel said.

The event is a software one that counts nothing, with the thread, CPU and modes of the claim. Permission is the same for
every type of event, and this one takes no slot: a real breakpoint would take one before permission is looked at, so a
full machine would answer ENOSPC to those who may not know. Only kernel addresses have a rule of their own
(CAP_SYS_ADMIN in the initial user namespace), which is read off the capabilities the kernel says the child has.

A process for each peer that asks, because

- whoever has the peer's uid can kill or stop it: it then harms nothing but its own question, and the parent notices;
- only a process without other threads can enter a user namespace;
- the daemon must never be such a process: its memory and descriptors are not the peer's business. Nor are ours: this
  process and its children are non-dumpable, so that a peer cannot trace one and answer in its stead.

A fork is slow, so the next child is there before the question is, and has rehearsed with our own credentials: the
pages it is going to write to are its own by then. A child that has become a peer answers whatever else is asked in that
very name, each time by asking the kernel; for another name, or after a moment without a question, it makes room for
the next one. A thread with credentials of its own would be about as quick, and a
peer that kills or stops it would kill or stop the whole helper.

Only the standard library is used, and as little of it as will do: each page is copied at each fork.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import gc
import mmap
import os
import select
import signal
import socket
import struct
import sys
from typing import Final, NamedTuple, NoReturn

GROUPS_MAX: Final = 8192

# serial, tid, cpu, event flags, kernel address; uids, gids; effective, permitted; namespace and whose; groups
_REQUEST: Final = struct.Struct("=QiiQI3I3IQQQiI")
_ANSWER: Final = struct.Struct("=Qii")
_REQUEST_BYTES_MAX: Final = _REQUEST.size + 4 * GROUPS_MAX

EXCLUDE_USER: Final = 1 << 4  # bits of perf_event_attr
EXCLUDE_KERNEL: Final = 1 << 5
EXCLUDE_HV: Final = 1 << 6


class Verdict(enum.IntEnum):
    """What the kernel said. Where it refused, by which rule, found out by asking it for less."""

    ALLOWED = 0
    EVERYTHING = 1  # refused even a user-only event on itself
    KERNEL_HITS = 2  # refused hits in the kernel even on itself
    CPU_WIDE = 3
    THREAD = 4  # may not look into that thread
    KERNEL_ADDRESS = 5
    OTHER = 6  # no matter of permission: no such thread, CPU offline; the errno says
    NOT_TAKEN_ON = 7  # the child could not become the peer
    ENDED = 8  # the child was killed or stopped


class Request(NamedTuple):
    """A question, and in whose name."""

    serial: int
    tid: int  # -1: CPU-wide
    cpu: int  # -1: wherever the thread runs
    flags: int
    kernel_address: bool
    uids: tuple[int, int, int]
    gids: tuple[int, int, int]
    effective: int
    permitted: int
    user_namespace: int  # inode number, 0 for ours
    pid: int  # a process in that namespace
    groups: tuple[int, ...]


_IN_WHOSE_NAME: Final = Request._fields.index("uids")  # from here on a request says in whose name it is


class Answer(NamedTuple):
    """``errno`` is the kernel's, 0 where it allowed."""

    serial: int
    verdict: Verdict
    errno: int


def pack_request(request: Request) -> bytes:
    """Return the message; at most ``GROUPS_MAX`` groups fit."""
    fixed = _REQUEST.pack(*request[:5], *request.uids, *request.gids, *request[7:11], len(request.groups))
    return fixed + struct.pack(f"={len(request.groups)}I", *request.groups)


def unpack_request(message: bytes) -> Request:
    """:raises ValueError: for anything but a whole request."""
    if len(message) < _REQUEST.size:
        raise ValueError("not a request")
    serial, tid, cpu, flags, kernel_address, *rest = _REQUEST.unpack_from(message)
    r, e, s, rg, eg, sg, effective, permitted, user_namespace, pid, count = rest
    if count > GROUPS_MAX or len(message) != _REQUEST.size + 4 * count:
        raise ValueError("not a request")
    groups = struct.unpack_from(f"={count}I", message, _REQUEST.size)
    uids, gids = (r, e, s), (rg, eg, sg)
    return Request(
        serial, tid, cpu, flags, bool(kernel_address), uids, gids, effective, permitted, user_namespace, pid, groups
    )


def pack_answer(answer: Answer) -> bytes:
    return _ANSWER.pack(*answer)


def unpack_answer(message: bytes) -> Answer:
    """:raises ValueError: for anything but an answer."""
    if len(message) != _ANSWER.size:
        raise ValueError("not an answer")
    serial, verdict, number = _ANSWER.unpack(message)
    return Answer(serial, Verdict(verdict), number)


# --- the kernel ------------------------------------------------------------------------------------------------------

_PERF_EVENT_OPEN: Final = {"x86_64": 298, "aarch64": 241}.get(os.uname().machine) if sys.maxsize > 2**32 else None
_FLAG_FD_CLOEXEC: Final = 8
# type, size, config, sample_period, sample_type, read_format, flags, wakeup, bp_type, config1, config2
_ATTR: Final = struct.Struct("=IIQQQQQIIQQ")
_TYPE_SOFTWARE, _CONFIG_DUMMY, _DISABLED = 1, 9, 1

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_CLONE_NEWUSER: Final = 0x10000000
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAP_SYS_ADMIN: Final = 1 << 21
_INITIAL_USER_NAMESPACE: Final = 0xEFFFFFFD  # as in credentials.py; importing it would bring much along

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: object) -> int:
    """Call the C library; raises ``OSError``."""
    result = int(getattr(_libc, function)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def _capabilities() -> tuple[int, int]:
    """Return what this process has: effective, permitted."""
    words = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, the low halves first
    _call("capget", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), words)
    return words[0] | words[3] << 32, words[1] | words[4] << 32


def _set_capabilities(effective: int, permitted: int) -> None:
    """Have these and no inheritable ones; ambient ones the kernel then takes away by itself."""
    low = 2**32 - 1
    words = (effective & low, permitted & low, 0, effective >> 32, permitted >> 32, 0)
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)(*words))


def _try_event(tid: int, cpu: int, flags: int) -> int:
    """Open an event that counts nothing and close it; return 0, or the errno of the refusal."""
    if _PERF_EVENT_OPEN is None:
        return errno.ENOSYS
    attr = _ATTR.pack(_TYPE_SOFTWARE, _ATTR.size, _CONFIG_DUMMY, 0, 0, 0, flags | _DISABLED, 0, 0, 0, 0)
    try:
        # Each argument is widened by hand: a variadic function would get the upper halves as they happen to be.
        arguments = (ctypes.c_long(number) for number in (tid, cpu, -1, _FLAG_FD_CLOEXEC))
        os.close(_call("syscall", ctypes.c_long(_PERF_EVENT_OPEN), attr, *arguments))
    except OSError as refusal:
        return refusal.errno or errno.EIO
    return 0


# --- one question ----------------------------------------------------------------------------------------------------


def _become(request: Request) -> None:
    """
    Take on the credentials of a peer, for good.

    :raises OSError: when the kernel does not let us, or the namespace is no longer there.
    """
    namespace = -1
    if request.user_namespace:
        namespace = os.open(f"/proc/{request.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(namespace).st_ino != request.user_namespace:
            raise OSError(errno.ESRCH, "the peer has left its user namespace")
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)  # else a change of uid takes permitted capabilities away
    os.setgroups(request.groups)
    os.setresgid(*request.gids)
    os.setresuid(*request.uids)
    if namespace >= 0:
        # After the ids, which are given as our namespace names them and stay what they are. Entering takes
        # CAP_SYS_ADMIN, which the change of uid has made ineffective, and gives every capability in there.
        _, permitted = _capabilities()
        _set_capabilities(permitted, permitted)
        _call("setns", namespace, _CLONE_NEWUSER)
    _, permitted = _capabilities()  # what we lack ourselves, no peer can be given: stricter, never laxer
    _set_capabilities(request.effective & permitted, request.permitted & permitted)


def _judge(request: Request, in_initial_namespace: bool) -> tuple[Verdict, int]:
    """Ask the kernel, as whoever this process is now."""
    number = _try_event(request.tid, request.cpu, request.flags)
    if number == 0:
        effective, _ = _capabilities()
        may_stop_the_kernel = in_initial_namespace and not request.user_namespace and effective & _CAP_SYS_ADMIN
        if request.kernel_address and not may_stop_the_kernel:
            return Verdict.KERNEL_ADDRESS, errno.EPERM
        return Verdict.ALLOWED, 0
    if number not in (errno.EACCES, errno.EPERM):
        return Verdict.OTHER, number
    if _try_event(0, -1, EXCLUDE_KERNEL | EXCLUDE_HV):
        return Verdict.EVERYTHING, number
    if _try_event(0, -1, request.flags):
        return Verdict.KERNEL_HITS, number
    return (Verdict.CPU_WIDE if request.tid == -1 else Verdict.THREAD), number


def _die_with(parent: int) -> None:
    """Be killed when the parent is gone. A change of credentials undoes that, so it is asked for again after one."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(_CHANNEL_CLOSED)


# --- parent and child ------------------------------------------------------------------------------------------------

_DONE, _CHANNEL_CLOSED, _BROKEN = 0, 3, 4
_KEPT_MS: Final = 50  # how long a child waits for another question in the same name

_Name = tuple[object, ...]


class _Child:
    """What the next child does, from its fork to its end."""

    def __init__(self, channel: socket.socket, taken: mmap.mmap, parent: int, in_initial_namespace: bool) -> None:
        self._channel = channel
        self._taken = taken
        self._parent = parent
        self._in_initial_namespace = in_initial_namespace

    def run(self) -> NoReturn:
        outcome = _BROKEN
        try:
            _die_with(self._parent)
            self._rehearse()
            outcome = self._serve()
        finally:
            os._exit(outcome)  # never back into the parent's loop, whatever happened

    def _rehearse(self) -> None:
        effective, permitted = _capabilities()
        ids = os.getresuid(), os.getresgid()
        # tid and cpu of -1 are refused early: an event of its own would make the child's exit slow.
        request = Request(0, -1, -1, 0, True, *ids, effective, permitted, 0, 0, tuple(os.getgroups()[:GROUPS_MAX]))
        request = unpack_request(pack_request(request))
        unpack_answer(pack_answer(Answer(0, *self._answer(request, becoming=True))))

    def _serve(self) -> int:
        name: _Name | None = None
        # Not by a timeout of the socket: that makes it non-blocking, for the parent and the next child as well.
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            if name is not None and not poll.poll(_KEPT_MS):
                return _DONE
            message = self._channel.recv(_REQUEST_BYTES_MAX + 1, socket.MSG_PEEK)
            if not message:
                return _CHANNEL_CLOSED
            request = unpack_request(message)
            if name not in (None, request[_IN_WHOSE_NAME:]):
                return _DONE  # the question stays where it is, for the next child
            self._taken[:8] = struct.pack("=Q", request.serial)
            self._channel.recv(1)  # only now: a question that nobody has taken must not be lost
            answer = Answer(request.serial, *self._answer(request, becoming=name is None))
            self._channel.send(pack_answer(answer))
            if answer.verdict is Verdict.NOT_TAKEN_ON:
                return _DONE  # half somebody else
            self._taken[:8] = bytes(8)
            name = request[_IN_WHOSE_NAME:]

    def _answer(self, request: Request, becoming: bool) -> tuple[Verdict, int]:
        if becoming:
            try:
                _become(request)
                _die_with(self._parent)
            except OSError as refusal:
                return Verdict.NOT_TAKEN_ON, refusal.errno or errno.EIO
        return _judge(request, self._in_initial_namespace)


def serve(channel: socket.socket) -> None:
    """
    Answer until the other end closes.

    ``taken`` is memory shared with the child: the serial of the question it is at. When the child does not live to
    answer it, we do. Should it have died right after its answer, ours has a serial nobody waits for.
    """
    in_initial_namespace = os.stat("/proc/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE
    taken = mmap.mmap(-1, mmap.PAGESIZE)
    parent = os.getpid()
    gc.disable()
    gc.freeze()
    while True:
        taken[:8] = bytes(8)
        child = os.fork()
        if child == 0:
            _Child(channel, taken, parent, in_initial_namespace).run()
        _, status = os.waitpid(child, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _DONE:
            continue
        (serial,) = struct.unpack("=Q", taken[:8])
        if serial:
            channel.send(pack_answer(Answer(serial, Verdict.ENDED, 0)))
        elif os.WIFEXITED(status):
            return  # the channel is closed, or this cannot work: the daemon sees our end


def main() -> None:
    """Serve the daemon on the descriptor that was handed down, and die with it."""
    fd, daemon = map(int, sys.argv[1:])
    _die_with(daemon)
    # Before any child: a child that only lays capabilities down, uid 0 and all, would else stay open to its likes.
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    with socket.socket(fileno=fd) as channel:
        serve(channel)


if __name__ == "__main__":
    main()
