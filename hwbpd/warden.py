"""
May this peer have that breakpoint? Decided by the kernel, asked as the peer; nothing is granted that it would refuse.

The asking is done by a process of its own (``hwbpd/warden_process.py``). Whatever goes wrong there (it dies, hangs, or
cannot become the peer) is a refusal of that one question, and the next one finds a new process.

What the kernel allowed can be undone by the target's next exec, so an answer is not kept, and a claim on a thread is
asked about once more after its slot is taken and before anything of it is told: a thread that became privileged before
the slot was taken is refused then, and one that does so later loses the event by the kernel's own hand.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import subprocess
import sys
import time
from typing import Protocol

from msgspec import Struct

from hwbpd import warden_process
from hwbpd.core.errors import CpuOffline, HwbpError, NotPermitted, TargetGone
from hwbpd.credentials import Credentials, namespace_number
from hwbpd.warden_process import Answer, Request, Verdict

ANSWER_LIMIT_S = 2.0  # an answer takes a tenth of a millisecond, a start some thirty


class Question(Struct, frozen=True):
    """What a peer wants to do, in the terms of perf_event_open."""

    tid: int = 0  # 0: CPU-wide
    cpus: tuple[int, ...] | None = None  # None: all, or wherever the thread runs
    user: bool = True  # whether hits there are wanted
    kernel: bool = True
    kernel_address: bool = False


class Permission(Protocol):
    """Who decides."""

    def check(self, credentials: Credentials, question: Question) -> None:
        """
        Return if the kernel would let this peer do that.

        :raises NotPermitted: naming the rule; :raises TargetGone: :raises CpuOffline: when there is no such thing.
        """
        ...


class Warden:
    """Asks the running kernel. The thread that makes one must outlive it: the process ends with that thread."""

    def __init__(self, answer_limit_s: float = ANSWER_LIMIT_S) -> None:
        """:raises OSError: when the process cannot be started."""
        self._answer_limit_s = answer_limit_s
        self._serials = itertools.count(1)
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def helper_pid(self) -> int | None:
        """The process that asks; None between its end and the next question."""
        return None if self._process is None else self._process.pid

    def check(self, credentials: Credentials, question: Question) -> None:
        """See ``Permission``. Blocks for at most the time limit; a peer as mighty as the daemon is not asked about."""
        if credentials.has_more_filters:
            raise NotPermitted(
                "your process has a seccomp filter, which may forbid perf_event_open; the daemon cannot ask a filter"
            )
        if credentials.is_as_mighty_as_we():
            return
        if question.tid and not credentials.in_our_pid_namespace:
            raise NotPermitted(f"tid {question.tid} means another thread in your pid namespace than in the daemon's")
        if len(credentials.groups) > warden_process.GROUPS_MAX:
            raise NotPermitted(f"you are in more than {warden_process.GROUPS_MAX} groups, which cannot be taken on")
        request = self._request(credentials, question)
        answer = self._ask(request)
        if answer.verdict is not Verdict.ALLOWED:
            raise _refusal(answer, request, credentials)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._channel = self._process = None

    def _request(self, credentials: Credentials, question: Question) -> Request:
        cpu = question.cpus[0] if question.cpus else -1
        if not question.tid and cpu == -1:
            cpu = _an_online_cpu()  # CPU-wide is allowed on all CPUs or on none
        return Request(
            serial=next(self._serials),
            tid=question.tid or -1,
            cpu=cpu,
            flags=(0 if question.user else warden_process.EXCLUDE_USER)
            | (0 if question.kernel else warden_process.EXCLUDE_KERNEL | warden_process.EXCLUDE_HV),
            kernel_address=question.kernel_address,
            uids=credentials.uids,
            gids=credentials.gids,
            effective=credentials.effective,
            permitted=credentials.permitted,
            user_namespace=0 if credentials.in_our_user_namespace else credentials.user_namespace,
            pid=credentials.pid,
            groups=credentials.groups,
        )

    def _ask(self, request: Request) -> Answer:
        deadline = time.monotonic() + self._answer_limit_s
        try:
            if self._channel is None:
                self._start()
            assert self._channel is not None
            self._channel.settimeout(self._answer_limit_s)
            self._channel.send(warden_process.pack_request(request))
            while True:
                answer = warden_process.unpack_answer(self._channel.recv(64))  # ValueError: the end of the stream
                if answer.serial == request.serial:
                    return answer
                # It belongs to an earlier question, whose child was killed after it had answered.
                self._channel.settimeout(max(0.001, deadline - time.monotonic()))
        except TimeoutError:
            what = f"gave no answer within {self._answer_limit_s:g} s"
        except (OSError, ValueError) as why:
            what = f"has ended ({why})"
        self._restart()
        raise NotPermitted(f"the process that asks the kernel in your name {what}; nothing was granted, try again")

    def _restart(self) -> None:
        self.close()
        with contextlib.suppress(OSError):  # the next question tries again, and is refused with the reason
            self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                # By its path, without site packages or anything from the environment: a small process is forked sooner.
                # A session of its own keeps a Ctrl-C at the daemon's terminal from it.
                command = [sys.executable, "-I", "-S", warden_process.__file__, str(theirs.fileno()), str(os.getpid())]
                self._process = subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        self._channel = ours


# --- which rule ------------------------------------------------------------------------------------------------------


def _refusal(answer: Answer, request: Request, credentials: Credentials) -> HwbpError:
    match answer.verdict:
        case Verdict.OTHER if answer.errno == errno.ESRCH:
            return TargetGone(f"there is no thread {request.tid}")
        case Verdict.OTHER if answer.errno == errno.ENODEV or (answer.errno == errno.EINVAL and request.cpu >= 0):
            # EINVAL is for numbers beyond every CPU this kernel could have; nothing else of a request is free to vary.
            return CpuOffline(f"cpu {request.cpu} does not exist or is offline")
        case Verdict.OTHER:
            return NotPermitted(
                f"asked in your name, the kernel answered {errno.errorcode.get(answer.errno, answer.errno)}"
            )
        case Verdict.NOT_TAKEN_ON:
            name = errno.errorcode.get(answer.errno, str(answer.errno))
            return NotPermitted(f"the daemon cannot ask the kernel in the name of uid {credentials.uid} ({name})")
        case Verdict.ENDED:
            return NotPermitted("the process that asked the kernel in your name was killed or stopped; nothing granted")
    return NotPermitted(_rule(answer.verdict, request, credentials) + _withheld(credentials))


def _rule(verdict: Verdict, request: Request, credentials: Credentials) -> str:
    level = _paranoid()
    match verdict:
        case Verdict.KERNEL_ADDRESS:
            return "a breakpoint on a kernel address takes CAP_SYS_ADMIN in the initial user namespace"
        case Verdict.KERNEL_HITS:
            return (
                f"seeing hits in the kernel takes CAP_PERFMON: kernel.perf_event_paranoid is {level}, and only 1 or "
                "less lets everybody; ask for hits in user mode only"
            )
        case Verdict.CPU_WIDE:
            return (
                f"a CPU-wide breakpoint takes CAP_PERFMON: kernel.perf_event_paranoid is {level}, and only 0 or less "
                "lets everybody; ask for a thread"
            )
        case Verdict.EVERYTHING:
            return (
                f"this kernel refuses uid {credentials.uid} every perf event, even on itself: "
                f"kernel.perf_event_paranoid is {level} (some distributions' kernels do so from 3 up), or a security "
                "module forbids it"
            )
        case _:
            return _why_not_that_thread(request.tid, credentials)


def _why_not_that_thread(tid: int, credentials: Credentials) -> str:
    """The kernel does not say which of its rules it was; this looks at the thread, and only explains."""
    return _difference(tid, credentials) + "; CAP_PERFMON would do, or CAP_SYS_PTRACE"


def _difference(tid: int, credentials: Credentials) -> str:
    ruid, rgid = credentials.uids[0], credentials.gids[0]
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as status:
            lines = dict(line.partition(":")[::2] for line in status)
        uids, gids = set(map(int, lines["Uid"].split()[:3])), set(map(int, lines["Gid"].split()[:3]))
        if uids != {ruid}:
            return f"thread {tid} belongs to uid {_listed(uids)} and you are uid {ruid}"
        if gids != {rgid}:
            return f"thread {tid} belongs to gid {_listed(gids)} and you are gid {rgid}"
        if os.stat(f"/proc/{tid}/status").st_uid not in uids:
            return f"the process of thread {tid} is not dumpable, which closes it to other processes of its uid"
        if namespace_number(f"/proc/{tid}/ns/user") != credentials.user_namespace:
            return f"thread {tid} is in another user namespace than you"
        if int(lines["CapPrm"], 16) & ~credentials.permitted:
            return f"thread {tid} holds capabilities that you do not"
    except (OSError, KeyError, ValueError):
        pass
    return f"you may not look into thread {tid}: the kernel, or a security module, refuses ptrace access to it"


def _withheld(credentials: Credentials) -> str:
    if not credentials.capabilities_withheld:
        return ""
    return (
        ". Your process has capabilities that do not count here because it is not dumpable, as after executing a file "
        "that gives them: have them as ambient capabilities instead, or set PR_SET_DUMPABLE"
    )


def _listed(numbers: set[int]) -> str:
    return "/".join(map(str, sorted(numbers)))


def _paranoid() -> str:
    try:
        with open("/proc/sys/kernel/perf_event_paranoid", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "not to be read"


def _an_online_cpu() -> int:
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        return int(file.read().replace("-", ",").split(",")[0])
