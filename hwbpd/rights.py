"""
What a peer may do here.

- **claim**: what the kernel would let it do itself, asked of the kernel in its name (``warden.py``). For a thread or a
  process the question is asked again once the slots are taken: an exec in between may have made the target privileged.
- **know where the kernel runs** (instruction pointers, call chains), **go without a guard**, **release what others
  hold, see their addresses**, and **be served as kgdb or kvm**: peers as mighty as the daemon only. Others' claims of
  those two kinds are served as perf.
"""

from __future__ import annotations

from hwbpd import credentials
from hwbpd.core.errors import NotPermitted
from hwbpd.core.model import Claim, Kind, Mode, Span, Target, Task
from hwbpd.credentials import Credentials
from hwbpd.hookspecs import Machine
from hwbpd.peers import Peer
from hwbpd.warden import Permission, Question

KERNEL_SPACE = 0x7FFF_FFFF_F000  # the lowest address that a kernel of any 64-bit kind may call its own

RESERVED_KINDS = frozenset({Kind.KGDB, Kind.KVM})


class Rights:
    """The rights of peers, asked anew for each claim: a process may have changed since."""

    def __init__(self, permission: Permission, machine: Machine) -> None:
        self._permission = permission
        self._machine = machine

    def is_privileged(self, peer: Peer) -> bool:
        """Whether the kernel could not refuse it what it grants the daemon; raises ``NotPermitted`` if it is gone."""
        return self._credentials(peer).is_as_mighty_as_we()

    def may_claim(self, peer: Peer, target: Target, span: Span, mode: Mode) -> None:
        """
        Return if the kernel would let this peer do that itself.

        :raises NotPermitted: naming the rule; :raises TargetGone: :raises CpuOffline: when there is no such thing.
        """
        asking = self._credentials(peer)
        if asking.is_as_mighty_as_we():
            return
        if not target.is_cpu_wide and not asking.in_our_pid_namespace:
            raise NotPermitted("you are in another pid namespace: your thread ids name other threads here")
        kernel_address = span.address + span.length_bytes > KERNEL_SPACE
        if target.vcpu is not None:
            # Whoever may watch a VMM's thread may have a breakpoint in its guest; no address or mode is the host's.
            self._permission.check(asking, Question(target.vcpu.thread.tid, None, True, False, False))
            return
        for tid in self._tids(target):
            question = Question(tid, target.cpus, mode.user, mode.kernel, kernel_address)
            self._permission.check(asking, question)

    def still_may(self, peer: Peer, claim: Claim) -> None:
        """The same, once its slots are taken; whoever could not be refused before cannot be now."""
        if not (claim.privileged or claim.target.is_cpu_wide):
            self.may_claim(peer, claim.target, claim.span, claim.mode)

    def may_ask_about(self, peer: Peer, task: Task, of_any: bool = False) -> None:
        """Return if that is a thread of this very process, or ``of_any``, and known to it by that number."""
        if not credentials.is_in_our_pid_namespace(peer.pid, peer.pidfd):
            raise NotPermitted("you are in another pid namespace: your thread ids name other threads here")
        if not of_any and (task.process is None or task.process.pid != peer.pid):
            raise NotPermitted(f"tid {task.tid} is no thread of yours, pid {peer.pid}")

    def kind_served(self, wanted: Kind, privileged: bool) -> Kind:
        """A kind is a request."""
        return Kind.PERF if wanted in RESERVED_KINDS and not privileged else wanted

    def _tids(self, target: Target) -> tuple[int, ...]:
        if target.process is not None:
            # Threads of one process may differ in their ids; those born later inherit from one that was asked about.
            return tuple(self._machine.threads(target.process))
        if target.vcpu is not None:
            return (target.vcpu.thread.tid,)
        return (target.task.tid if target.task is not None else 0,)

    @staticmethod
    def _credentials(peer: Peer) -> Credentials:
        return credentials.read(peer.pid, peer.pidfd, uid=peer.uid, gid=peer.gid)
