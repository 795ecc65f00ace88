"""
A resource on a process: legs on every thread and CPU, and one ring per CPU.

- Legs are inherited by the threads that a thread makes, not by processes it forks. An inherited leg must be bound to a
  CPU to have a ring at all, so there is one per thread and CPU; those of one CPU share a ring (``outlets``).
- ``coverage`` decides which threads need legs from here. The number of descriptors is known before the first is opened.
- Nothing stops by itself here: the kernel has no fuse for inherited events. ``silence`` does.
- Legs are stopped, and started, twice over: a thread that is made of an inherited one in the midst of it may be born in
  the state before. The second time reaches it.
- A CPU that goes offline takes nothing along, as every leg belongs to a thread: it goes on when the CPU is back.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from hwbpd.core.model import Delivery, Mode, Piece, Pool, Process, Totals
from hwbpd.hookspecs import ArmError, Batch, TargetEnd
from hwbpd_linux import cpus, perf_event, threads
from hwbpd_linux.coverage import Coverage
from hwbpd_linux.legs import Leg, sample_bytes_max
from hwbpd_linux.occupancy import Place
from hwbpd_linux.outlets import LISTENING_BYTES, Birth, Outlet
from hwbpd_linux.rings import PLAIN_BYTES
from hwbpd_linux.watch import Post, ProcessWatch

SPARE_DESCRIPTORS = 64  # left for sessions and other claims

SlotsOn = Callable[[int, int], int]


class ProcessLegs:
    """
    The legs of a resource on a process. Methods are those of ``hwbpd.hookspecs.Machine``.

    :param own_on: how many slots this machine's thread claims have on a thread, for the time it runs on a CPU.
    :raises ArmError: as ``Machine.arm``; nothing is held then. EAGAIN when the process makes threads faster than they
        can be followed.
    """

    is_fused = False

    def __init__(self, piece: Piece, process: Process, mode: Mode, post: Post, own_on: SlotsOn) -> None:
        self._piece = piece
        self._process = process
        self._mode = mode
        self._own_on = own_on
        self._reports = mode.delivery is not Delivery.HOLD
        self._delivers_hits = mode.delivery is Delivery.HITS
        self._legs: list[Leg] = []
        self._outlets: list[Outlet] = []
        self._next_outlet = 0
        self._lost_known = 0
        try:
            self._watch = ProcessWatch(post, process, mode.across_exec)
        except OSError as refusal:
            raise ArmError(refusal.errno or errno.ESRCH, tid=process.pid) from refusal
        try:
            self._cover(cpus.online_cpus())
        except BaseException:
            self.close()
            raise

    def legs_on(self, tid: int, cpu: int) -> int:
        """None that other threads do not inherit."""
        return 0

    def places(self, pool: Pool) -> dict[int, Place]:
        """Where it has slots of a pool, by descriptor; those that were inherited have none, and count down from -1."""
        if self._piece.pool is not pool:
            return {}
        by_fd: dict[int, Place] = {leg.fd: (leg.tid, leg.cpu) for leg in list(self._legs)}
        everywhere = {(tid, leg.cpu) for tid in threads.tids(self._process) for leg in list(self._legs)}
        inherited = sorted(everywhere - set(by_fd.values()))
        return by_fd | {-1 - index: place for index, place in enumerate(inherited)}

    def top_up(self, hits: int) -> bool:
        return True  # there is no fuse to come too late for

    def silence(self) -> None:
        self._reports = False
        self._for_each_leg(Leg.disable)

    def rearm(self, fuse_hits: int) -> None:
        if self._mode.delivery is not Delivery.HOLD:
            self._reports = True
            self._for_each_leg(Leg.enable)

    def drop_cpu(self, cpu: int) -> None:
        pass

    def add_cpu(self, cpu: int) -> None:
        if all(leg.cpu != cpu for leg in self._legs):
            self._cover((cpu,))

    def stop(self) -> tuple[Batch, Totals]:
        self._for_each_leg(Leg.disable)
        rest = self.drain(sys.maxsize)
        totals = self.totals()
        lost, self._lost_known = rest.lost + totals.lost - self._lost_known, totals.lost
        return Batch(rest.records, rest.hits, lost if self._delivers_hits else 0, False), totals

    def totals(self) -> Totals:
        """The kernel adds what inherited legs counted to the one they come from, also when their thread has ended."""
        counts = [leg.counts() for leg in self._legs]
        return Totals(hits=sum(count.hits for count in counts), lost=sum(count.lost for count in counts))

    def descriptors(self) -> Sequence[int]:
        rings = [outlet.fd for outlet in self._outlets] if self._delivers_hits else []
        return [*rings, self._watch.fd]

    def drain(self, budget_bytes: int) -> Batch:
        if not self._delivers_hits or not self._outlets:
            return Batch(b"", 0, 0, False)
        chunks: list[bytes] = []
        hits = 0
        more = loss_possible = False
        left_bytes = budget_bytes
        round_ = self._outlets[self._next_outlet :] + self._outlets[: self._next_outlet]
        for waiting, outlet in zip(range(len(round_), 0, -1), round_, strict=True):
            chunk = outlet.take(left_bytes // waiting)
            left_bytes = max(0, left_bytes - len(chunk.records))
            hits += chunk.hits
            more = more or chunk.more
            loss_possible = loss_possible or chunk.loss_possible
            if chunk.records:
                chunks.append(chunk.records)
        self._next_outlet = (self._next_outlet + 1) % len(self._outlets)
        lost = 0
        if loss_possible:
            lost_before, self._lost_known = self._lost_known, self.totals().lost
            lost = self._lost_known - lost_before
        return Batch(chunks[0] if len(chunks) == 1 else b"".join(chunks), hits, lost, more)

    def end_of_target(self) -> TargetEnd | None:
        return self._watch.end()

    def close(self) -> None:
        for leg in self._legs:
            leg.close()
        for outlet in self._outlets:
            outlet.close()
        self._watch.close()

    def _for_each_leg(self, do: Callable[[Leg], None]) -> None:
        for leg in self._legs * 2:
            do(leg)

    def _cover(self, places: Sequence[int]) -> None:
        """Give every thread a leg on each of these CPUs, or none; then let them report, if the resource does."""
        self._check_descriptors(len(places))
        opening = _Opening(self._piece, self._mode, self._process, self._own_on)
        try:
            for cpu in places:
                opening.listen(cpu)
            Coverage(opening, places).complete()
            if not threads.tids(self._process):
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            outlets = opening.finish()
            if self._reports:
                for leg in opening.legs * 2:
                    leg.enable()
        except OSError as refusal:
            opening.undo()
            raise ArmError(refusal.errno or errno.EAGAIN, cpu=opening.cpu, tid=opening.tid) from refusal
        except BaseException:
            opening.undo()
            raise
        self._legs += opening.legs
        self._outlets += outlets

    def _check_descriptors(self, places: int) -> None:
        needed = (len(threads.tids(self._process)) + 1) * places
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = max(0, limit - len(os.listdir("/proc/self/fd")) - SPARE_DESCRIPTORS)
        if needed > allowed:
            raise ArmError(errno.EMFILE, tid=self._process.pid, needed=needed, allowed=allowed)


class _Opening:
    """What is opened while a process is covered; keeps ``coverage.Surroundings``."""

    def __init__(self, piece: Piece, mode: Mode, process: Process, own_on: SlotsOn) -> None:
        self._piece = piece
        self._mode = mode
        self._process = process
        self._own_on = own_on
        self._outlets: dict[int, Outlet] = {}
        self.legs: list[Leg] = []
        self.cpu: int | None = None  # where a leg was refused
        self.tid: int | None = process.pid

    def listen(self, cpu: int) -> None:
        # The ring for hits tells of births first; without hits there is one for the time of opening.
        delivers_hits = self._mode.delivery is Delivery.HITS
        data_bytes = self._mode.ring_bytes if delivers_hits else LISTENING_BYTES
        self._outlets[cpu] = Outlet(cpu, data_bytes, sample_bytes_max(self._mode) if delivers_hits else PLAIN_BYTES)
        self._outlets[cpu].listen()

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def listed(self) -> Iterable[int]:
        return threads.tids(self._process)

    def births(self) -> Iterable[Birth]:
        births = [birth for outlet in self._outlets.values() for birth in outlet.births()]
        return sorted(birth for birth in births if birth.pid == self._process.pid)

    def is_asleep(self, tid: int) -> bool:
        stat = threads.read(tid)
        return stat is None or stat.is_gone or stat.is_asleep

    def open(self, tid: int, cpus: Sequence[int]) -> bool:
        opened = len(self.legs)
        for cpu in cpus:
            try:
                leg = Leg(self._piece, self._mode, tid, cpu, inherited=True)
            except ProcessLookupError:
                for leg in self.legs[opened:]:
                    leg.close()
                del self.legs[opened:]
                return False
            except OSError:
                self.cpu, self.tid = cpu, tid
                raise
            self.legs.append(leg)
            if self._mode.delivery is Delivery.HITS:
                leg.write_into(self._outlets[cpu].fd)
        return True

    def slots_free(self, tid: int, cpu: int) -> int | None:
        span, held = self._piece.span, []
        try:
            while True:
                held.append(
                    perf_event.open_breakpoint(
                        span.address, span.length_bytes, self._piece.access.value, tid=tid, cpu=cpu
                    )
                )
        except ProcessLookupError:
            return None
        except OSError as refusal:
            if refusal.errno != errno.ENOSPC:
                raise
            return len(held) + self._own_on(tid, cpu)
        finally:
            for fd in held:
                os.close(fd)

    def rest(self) -> None:
        time.sleep(0.0001)

    def finish(self) -> list[Outlet]:
        """Stop listening; return the rings for hits. They are empty, as no leg has reported yet."""
        outlets = list(self._outlets.values())
        if self._mode.delivery is Delivery.HITS:
            for outlet in outlets:
                outlet.stop_listening()
            return outlets
        self._outlets = {}
        for outlet in outlets:
            outlet.close()
        return []

    def undo(self) -> None:
        for leg in self.legs:
            leg.close()
        for outlet in self._outlets.values():
            outlet.close()
