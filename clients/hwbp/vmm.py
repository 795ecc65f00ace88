"""
For VMMs: a virtual machine and its vCPUs, whose slots others may claim, and which this process loads.

    with hwbp.connect() as client:
        vcpu = client.vm("guest").vcpu(0)              # in the thread that runs it, or with its tid
        while running:
            vcpu.load(set_guest_debug)                 # what it is to hold, if that has changed
            why = run(vcpu_fd)
            if a breakpoint of vcpu.loaded stopped it:
                vcpu.hit(slots, ip)

A debugger's stub, a fuzzer, or the VMM for its guest claim with ``vcpu=``, from a session of their own or from this
one; the daemon decides, and tells the VMM what comes of it. ``load`` hands that to whoever writes the registers and
tells the daemon how it went.

What is told is the whole of it, each time, and nothing more is told until it was answered. So a VMM that is late is
late, and never wrong.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hwbp.connection import Connection
from hwbp.values import Contents, contents_of
from hwbp.watch import deadline_after


class Vcpu:
    """
    One vCPU; made by ``Vm.vcpu``.

    ``vcpu_id`` is what others claim with; ``pools`` how many slots it has; ``loaded`` what its registers hold, as far
    as this VMM has loaded it.
    """

    def __init__(self, connection: Connection, vcpu_id: int, pools: Mapping[str, int]) -> None:
        self.vcpu_id = vcpu_id
        self.pools = pools
        self.loaded = Contents(0, (), {})
        self._connection = connection
        connection.told_of_vcpu[vcpu_id] = None

    def load(self, write: Callable[[Contents], None], timeout: float = 0.0) -> bool:
        """
        Load what the vCPU is to hold, if that has changed; before an entry to the guest.

        :param write: writes the registers, all of them, and raises ``OSError`` where that fails. Then the claims that
            this was about are over, and what was loaded before stays.
        :param timeout: seconds to wait for something to load, if nothing is there.
        :return: whether something was loaded.
        """
        told = self._told(timeout)
        if told is None:
            return False
        wanted = contents_of(told)
        number = 0
        try:
            write(wanted)
        except OSError as refused:
            number = refused.errno or errno.EIO
        else:
            self.loaded = wanted
        about = {"vcpu": self.vcpu_id, "version": wanted.version}
        self._connection.request("vcpu_loaded", **(about | ({"errno": number} if number else {})))
        return not number

    def _told(self, timeout: float) -> dict[str, Any] | None:
        connection, deadline_ns = self._connection, deadline_after(timeout) if timeout else 0
        while connection.wait(0) or (not connection.told_of_vcpu[self.vcpu_id] and connection.wait(deadline_ns)):
            pass
        told = connection.told_of_vcpu[self.vcpu_id]
        connection.told_of_vcpu[self.vcpu_id] = None
        return told

    def hit(self, numbers: Collection[int], ip: int, *, pool: str = "", in_kernel: bool = True) -> int:
        """
        Tell that slots of ``loaded`` were hit: their owners get a hit each.

        :param numbers: of the slots; on x86 those of the bits B0 to B3 of DR6.
        :param pool: whose numbers these are, where there is more than one.
        :param ip: the guest's instruction pointer; :param in_kernel: whether it was in its kernel.
        :return: how many of them anybody still has.
        """
        hit = [slot.resource for slot in self.loaded.slots if slot.number in numbers and pool in ("", slot.pool)]
        if not hit:
            return 0
        about = {"vcpu": self.vcpu_id, "resources": hit, "ip": ip, "kernel": in_kernel}
        return int(self._connection.request("vcpu_hit", **about)["counted"])

    def report(self, entries: int, switches: int = 0, traps: int = 0, owner: str = "") -> None:
        """
        Tell operators what was counted since the vCPU was made; at most ten times a second.

        :param owner: whose registers are in force while the guest runs: "host", "guest", "vmm", or "" for nobody's.
        :raises LimitReached: when it was told just before.
        """
        counted = {"entries": entries, "switches": switches, "traps": traps, "owner": owner}
        self._connection.request("vcpu_report", vcpu=self.vcpu_id, **counted)


class Vm:
    """
    One virtual machine; made by ``Client.vm``. It lasts as long as the session.

    ``vm_id`` lets another session of this process have vCPUs of it: one for each thread, say.
    """

    def __init__(self, connection: Connection, vm_id: int) -> None:
        self.vm_id = vm_id
        self._connection = connection

    def vcpu(self, number: int, tid: int | None = None, *, strategy: str = "", profile: str = "") -> Vcpu:
        """
        Register a vCPU.

        :param tid: the thread of this process that runs it; None for the calling one. With it the vCPU ends.
        :param strategy: how its debug registers are switched, for people; the name of a preset, if it is one.
        :param profile: which CPU it is, by a name that the daemon knows; empty for one like the host's.
        :raises BadClaim: for a number that is taken, or a profile that nobody knows; ``LimitReached``; ``TargetGone``.
        """
        thread = threading.get_native_id() if tid is None else tid
        asked = {"vm": self.vm_id, "number": number, "tid": thread, "strategy": strategy, "profile": profile}
        reply = self._connection.request("vcpu", **asked)
        return Vcpu(self._connection, int(reply["vcpu"]), dict(reply["pools"]))
