"""
How soon, and how exactly, the daemon reacts: ``python -m benchmarks.reactions [--hotplug]``.

These are not operations one repeats in a loop, so there is no floor beside them: each happens many times, and the table
shows the half, the hundredth and the slowest. ``--hotplug`` takes CPU 1 offline and back, which disturbs the host.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hwbp
from benchmarks.placement import ANY_CPUS
from benchmarks.stand import Daemon, daemon
from examples.target import Target
from hwbpd import credentials
from hwbpd.warden import Question, Warden
from tests.host import exclusive
from tests.judges.opener import KernelOpener

TIMES = 200
SLOTS = 4
GUARD_PER_S = 1000
FLOOD = 100_000
NOBODY = 65534
CPU1 = Path("/sys/devices/system/cpu/cpu1/online")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reactions", description=__doc__.splitlines()[1])
    parser.add_argument("--hotplug", action="store_true", help="also take CPU 1 offline and back, ten times")
    arguments = parser.parse_args()
    with exclusive(), tempfile.TemporaryDirectory(prefix="hwbpd-bench-") as name, anywhere(Path(name)) as (socket, _):
        show("client killed, until its slots are free", "us", sorted(deaths(socket)))
        for what, samples in handovers(socket).items():
            show(what, "us", sorted(samples))
        show("permission asked of the kernel, allowed", "us", sorted(permissions()))
        show(f"hits let through beyond a guard of {GUARD_PER_S} a second", "hits", sorted(overshoots(socket)))
        if arguments.hotplug:
            show("CPU online again, until the slot there is back", "us", sorted(comings_back(socket)))
    return 0


def anywhere(folder: Path) -> contextlib.AbstractContextManager[Daemon]:
    """A daemon that runs on any CPU, as it must meet those who are killed and flooded on any."""
    return daemon(folder, cpus=ANY_CPUS)


def show(what: str, unit: str, samples: Sequence[float]) -> None:
    half, hundredth = samples[len(samples) // 2], samples[len(samples) * 99 // 100]
    print(f"{what:52} p50 {half:9.0f}  p99 {hundredth:9.0f}  max {samples[-1]:9.0f} {unit}, of {len(samples)}")


def deaths(socket: Path) -> list[float]:
    """SIGKILL of a client that has every slot of CPU 0; the kernel is asked until it gives one away."""
    samples = []
    opener = KernelOpener()
    for _ in range(TIMES):
        ready, told = os.pipe()
        client = os.fork()
        if not client:
            connection = hwbp.connect(socket)
            for _ in range(SLOTS):
                connection.claim("mem:0x1000/8:w", cpus=[0], delivery="hold")
            os.write(told, b".")
            signal.pause()
        os.read(ready, 1)
        began = time.perf_counter_ns()
        os.kill(client, signal.SIGKILL)
        samples.append((until(lambda: opener_has_room(opener)) - began) / 1e3)
        os.waitpid(client, 0)
        os.close(ready)
        os.close(told)
    return samples


def handovers(socket: Path) -> dict[str, list[float]]:
    """
    Every slot of CPU 0 is held, and somebody else wants one.

    :return: microseconds by what was done, from the request to the moment that the one it is about has heard. Requests
        that are answered before come with their answer. A claim that finds room is there to compare.
    """
    with hwbp.connect(socket) as holder, hwbp.connect(socket) as other:
        samples: dict[str, list[float]] = {
            "claim that finds room": [],
            "holder releases, until the waiter has heard": [],
            "kgdb wants a slot, until it has that of another": [],
            "ptrace wants one, whose holder yields as it is asked": [],
            "displacer releases, until the displaced has heard": [],
        }
        room, released, kgdb, yielded, resumed = samples.values()

        def hold(client: hwbp.Client, kind: str = "perf") -> hwbp.Watch:
            return client.claim("mem:0x1000/8:w", cpus=[0], delivery="hold", kind=kind)

        for _ in range(SLOTS - 1):
            hold(holder, "kvm")
        for _ in range(TIMES):
            began = time.perf_counter_ns()
            last = hold(holder)
            room.append((time.perf_counter_ns() - began) / 1e3)

            waiting = other.queue("mem:0x1000/8:w", cpus=[0], delivery="hold", wait=60.0)
            began = time.perf_counter_ns()
            last.release()
            waited_for = waiting.granted()
            released.append((time.perf_counter_ns() - began) / 1e3)
            assert waited_for is not None

            began = time.perf_counter_ns()
            displacer = hold(holder, "kgdb")
            kgdb.append((time.perf_counter_ns() - began) / 1e3)
            began = time.perf_counter_ns()
            displacer.release()
            while not any(change.what == "resumed" for change in waited_for.changes()):
                other.wait()
            resumed.append((time.perf_counter_ns() - began) / 1e3)
            waited_for.release()
        with yielding(socket):
            for _ in range(TIMES):
                began = time.perf_counter_ns()
                displacer = hold(holder, "ptrace")
                yielded.append((time.perf_counter_ns() - began) / 1e3)
                displacer.release()
                until(lambda: not holder.slots().waiting)
    return samples


@contextlib.contextmanager
def yielding(socket: Path) -> Iterator[None]:
    """A process with a slot of CPU 0, which gives way whenever it is asked to."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with hwbp.connect(socket) as client:
            watch = client.claim("mem:0x1000/8:w", cpus=[0], delivery="hold")
            os.write(told, b".")
            while client.wait():
                if watch.revoke:
                    watch.yield_()
    os.read(ready, 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)


def opener_has_room(opener: KernelOpener) -> bool:
    try:
        opener.close(opener.open(-1, 0))
    except OSError:
        return False
    return True


def permissions() -> list[float]:
    """The question whether a process without privileges may watch itself, asked each time as it."""
    samples = []
    child = os.fork()
    if not child:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        ctypes.CDLL(None).prctl(4, 1)  # dumpable again, as a program is that it started with these ids
        signal.pause()
    pidfd = os.pidfd_open(child)
    warden = Warden()
    try:
        time.sleep(0.1)
        for _ in range(TIMES):
            began = time.perf_counter_ns()
            asking = credentials.read(child, pidfd, uid=NOBODY, gid=NOBODY)
            warden.check(asking, Question(tid=child, kernel=False))
            samples.append((time.perf_counter_ns() - began) / 1e3)
    finally:
        warden.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pidfd)
    return samples


def overshoots(socket: Path) -> list[float]:
    """What a flood brings beyond the guard's room and what it refilled while the flood lasted."""
    samples = []
    with Target() as target, hwbp.connect(socket) as client:
        for _ in range(TIMES // 10):
            event = f"mem:{target.variable:#x}/8:w"
            with client.claim(event, tid=target.tid, guard=GUARD_PER_S) as watch:
                began = time.perf_counter_ns()
                target.send(f"write {FLOOD}")
                until(lambda watch=watch: waited(client) and watch.state == "guarded")  # type: ignore[misc]
                seconds = (time.perf_counter_ns() - began) / 1e9
                target.answer()
                samples.append(max(0.0, watch.counts().hits - GUARD_PER_S * (1 + seconds)))
    return samples


def comings_back(socket: Path) -> list[float]:
    """The notice that a CPU-wide claim has its slot on a CPU that came back."""
    samples = []
    with hwbp.connect(socket) as client, client.claim("mem:0x1000/8:w", cpus=None) as watch:
        for _ in range(TIMES // 20):
            watch.changes()
            CPU1.write_text("0")
            CPU1.write_text("1")
            began = time.perf_counter_ns()
            until(lambda: waited(client) and any(one.what == "resumed" for one in watch.changes()))
            samples.append((time.perf_counter_ns() - began) / 1e3)
    return samples


def waited(client: hwbp.Client) -> bool:
    """Let notices come in."""
    for watch, _ in client.hits(0.01):
        del watch
    return True


def until(done: Callable[[], bool], limit_s: float = 10.0) -> int:
    """Return when ``done`` was first seen true, in ns."""
    limit = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > limit:
            raise TimeoutError
    return time.perf_counter_ns()


if __name__ == "__main__":
    sys.exit(main())
