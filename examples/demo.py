#!/usr/bin/env python3
"""
The main job of hwbpd in ten seconds, on this host's real debug registers.

A daemon of its own on a socket of its own, a small program to be watched, and clients that ask for its breakpoints as
a debugger, a profiler, a kernel debugger and a hypervisor would. Everything shown is what the tools print.

Where this host has no breakpoints to give, or with ``--simulated``, the same is shown on a simulated machine, and the
first and the last line say so. Only a demo may do that; the daemon by itself never does.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import hwbp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.target import Target  # the program beside this file
from hwbpd_linux.readiness import what_is_missing
from hwbpd_sim.workload import COUNTER, FUNCTION, PIDS

READY_S = 10.0


class Watched(Protocol):
    """A program to watch."""

    @property
    def tid(self) -> int: ...

    @property
    def variable(self) -> int: ...

    @property
    def function(self) -> int: ...

    def command(self, line: str, /) -> object:
        """Let it do something."""
        ...


class Simulated:
    """The first thread of the simulated machine. It writes and calls all the time, told to or not."""

    tid, variable, function = PIDS, COUNTER, FUNCTION

    def command(self, line: str) -> None:
        """There is nothing to be done."""


class Demo:
    """
    One run: the socket, and a voice.

    :param machine: whose registers, as the daemon is asked for them.
    """

    def __init__(self, folder: Path, machine: str) -> None:
        self.machine = machine
        self.socket = folder / "hwbpd.sock"
        self.log = folder / "hwbpd.log"

    def say(self, text: str) -> None:
        print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n## {text}", flush=True)

    def run(self, *arguments: str) -> int:
        """Run hwbpctl in the foreground, showing the command."""
        print(f"$ hwbpctl {shlex.join(arguments)}", flush=True)
        return subprocess.run([*self._hwbpctl(), *arguments], check=False, stderr=subprocess.STDOUT).returncode

    @contextlib.contextmanager
    def holding(self, kind: str, label: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Have a client hold a slot in the background; it is there when this returns."""
        command = ["hold", "--kind", kind, "--label", label, *arguments]
        print(f"$ hwbpctl {shlex.join(command)} &", flush=True)
        with hwbp.connect(self.socket) as client:
            before = len(client.slots().resources)
            # Its word that it holds the slot is what the table says a moment later.
            holder = subprocess.Popen([*self._hwbpctl(), *command], stdout=subprocess.DEVNULL)
            try:
                wait_until(lambda: len(client.slots().resources) > before, "the slot to be held", holder)
                yield holder
            finally:
                if holder.poll() is None:
                    holder.send_signal(signal.SIGINT)
                    holder.wait(READY_S)

    def _hwbpctl(self) -> Sequence[str]:
        return [str(Path(sys.executable).with_name("hwbpctl")), "--socket", str(self.socket)]

    @contextlib.contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        with self.log.open("wb") as log:
            # All slots are for the show: as it is set usually, the daemon leaves one of them to others.
            settings = self.socket.with_name("hwbpd.toml")
            settings.write_text("[policy]\nreserve_slots = 0\n")
            command = [sys.executable, "-m", "hwbpd", "--config", str(settings)]
            command += ["--socket", str(self.socket), "--machine", self.machine]
            daemon = subprocess.Popen(command, stderr=log)
        try:
            wait_until(self._answers, "the daemon", daemon)
            yield daemon
        finally:
            daemon.terminate()
            daemon.wait(READY_S)

    def _answers(self) -> bool:
        try:
            with hwbp.connect(self.socket, timeout=1.0):
                return True
        except hwbp.NotReachable:
            return False

    # --- the story ---------------------------------------------------------------------------------------------------

    def tell(self, target: Watched) -> None:
        variable, function = f"mem:{target.variable:#x}/8:w:u", f"mem:{target.function:#x}/8:x:u"
        tid = str(target.tid)
        self.say("A CPU can stop on 4 addresses and no more. Nobody has asked for one yet:")
        self.run("ls")

        self.say("A watchpoint: tell me who writes this variable. Five writes, five hits, with the code that did it:")
        self._watch_while(target, "write 5", "-e", variable, "-t", tid, "-c", "5")

        self.say("A breakpoint counts how often a function runs, without stopping it:")
        self._watch_while(target, "call 1000", "-e", function, "-t", tid, verb="stat", options=("--timeout", "1.5"))

        self.say("Now four clients of four kinds take a slot each, three on the program and one on every CPU:")
        with contextlib.ExitStack() as held:
            debugger = held.enter_context(self.holding("ptrace", "debugger", "-e", variable, "-t", tid))
            held.enter_context(self.holding("perf", "profiler", "-e", function, "-t", tid))
            held.enter_context(self.holding("kvm", "hypervisor", "-e", variable, "-t", tid))
            held.enter_context(self.holding("kgdb", "kernel debugger", "-e", variable, "-a"))
            self.run("ls")

            self.say("A fifth finds no slot. The kernel alone would say ENOSPC; here it hears who is in the way:")
            self.run("watch", "-e", variable, "-t", tid)

            self.say("The debugger is killed (SIGKILL). Its slot comes back by itself, and the fifth client gets it:")
            debugger.kill()
            debugger.wait(READY_S)
            self._watch_while(target, "write 2", "-e", variable, "-t", tid, "-c", "2")
        self.say("Everybody has let go; nothing is left behind:")
        self.run("ls")

    def _watch_while(
        self, target: Watched, command: str, *arguments: str, verb: str = "watch", options: tuple[str, ...] = ()
    ) -> None:
        """Run a watching verb in the foreground and let the program act once its claim is there."""
        print(f"$ hwbpctl {shlex.join((verb, *arguments))}", flush=True)
        with hwbp.connect(self.socket) as client:
            before = max((row.resource for row in client.slots().resources), default=0)
            watcher = subprocess.Popen([*self._hwbpctl(), verb, *arguments, *options])
            wait_until(lambda: any(row.resource > before for row in client.slots().resources), "the claim", watcher)
            target.command(command)
            watcher.wait(READY_S)


def wait_until(done: object, what: str, process: subprocess.Popen[bytes]) -> None:
    """Wait for a condition, as long as the process that will bring it about lives."""
    deadline = time.monotonic() + READY_S
    assert callable(done)
    while not done():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come; exit status {process.poll()}")
        time.sleep(0.01)


def main() -> int:
    """Run the demo; return its exit status."""
    parser = argparse.ArgumentParser(description="The main job of hwbpd in ten seconds.")
    parser.add_argument("--simulated", action="store_true", help="on simulated registers, whatever this host has")
    notice = ""
    if parser.parse_args().simulated:
        notice = "SIMULATED, as asked: these are simulated registers, not this host's."
    elif missing := what_is_missing():
        notice = f"SIMULATED: these are simulated registers. This host's cannot be used: {missing}"
    if notice:
        print(notice, flush=True)
    with tempfile.TemporaryDirectory(prefix="hwbpd-demo-") as folder, contextlib.ExitStack() as stack:
        demo = Demo(Path(folder), "sim" if notice else "linux")
        try:
            stack.enter_context(demo.daemon())
            demo.tell(Simulated() if notice else stack.enter_context(Target()))
        except SystemExit:
            print(demo.log.read_text(), end="", file=sys.stderr)
            raise
    print("\nThe daemon has stopped. `hwbpd` starts one to stay; README.md goes on from here.")
    if notice:
        print(notice)
    return 0


if __name__ == "__main__":
    sys.exit(main())
