"""
The verbs that claim: watch prints hits, stat counts them, hold keeps the slots.

Several events are claimed all or nothing: a refusal ends the session, and with it the claims before it. With ``-w``
each waits for what the ones before have left of the time, and those before are held meanwhile. A command runs only once
all its slots are held, and its exit status is then ours. Whoever asks a claim to give way finds it willing: nothing
here needs the grace.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import hwbp
from hwbpctl import render
from hwbpctl.command import Command
from hwbpctl.stop import Stop
from hwbpctl.symbols import NOWHERE, PROC, Symbols

REFUSED = 1
NOT_REACHABLE = 3

SIMULATED = "sim"  # the machine that has no threads of this host

_TAKEN_AWAY = frozenset({"forced", "stolen", "exec"})  # the daemon is there, and the claim ended before its target


@dataclass(frozen=True)
class Job:
    """What the command line asked for. Without a target, the command is the target."""

    socket: str | None
    json: bool
    events: Sequence[hwbp.Event]
    tid: int
    pid: int
    cpus: tuple[int, ...] | None
    every_cpu: bool
    argv: Sequence[str]
    kind: str = "perf"
    label: str = ""
    guard: int | None = None
    only_pid: int = 0
    priority: int = 0
    wait_s: float = 0.0
    over_report: bool = False

    @property
    def watches_its_command(self) -> bool:
        """Whether the command is what is watched: its main thread, from its exec on."""
        return bool(self.argv) and not (self.tid or self.pid or self.cpus or self.every_cpu)

    @property
    def of_what(self) -> str:
        cpus = "" if self.cpus is None else f"cpu {hwbp.format_cpus(self.cpus)}"
        if self.every_cpu:
            return "all cpus"
        if self.pid:
            return f"pid {self.pid}"
        if self.tid:
            return f"tid {self.tid}" + (f" on {cpus}" if cpus else "")
        return cpus or f"'{' '.join(self.argv)}'"


class _Held:
    """The claims of a job while it runs, and how it went."""

    def __init__(self, client: hwbp.Client, watches: Sequence[hwbp.Watch], stop: Stop, json: bool) -> None:
        self.client = client
        self.json = json
        self.watches = watches
        self.stop = stop
        self.status = 0
        self._yielded_to: dict[int, hwbp.Change] = {}  # what each claim has given way to last

    def until_over(self, take_hits: Callable[[], bool] = lambda: True) -> None:
        """
        Call ``take_hits`` whenever there may be some, until it returns false, it is time to stop, or all is over.

        What happens to the claims meanwhile is told on stderr.
        """
        while take_hits() and not self.stop.asked() and not all(watch.ended for watch in self.watches):
            self.tell_changes()
            if not self._give_way():  # with the answer to that, anything may have come
                self.client.wait(self.stop.left_s(), self.stop.fileno())
        self.tell_changes()

    def tell_changes(self) -> None:
        """Say what happened to claims that go on: silenced, suspended, resumed, on a CPU that is gone or back."""
        for watch in self.watches:
            for change in watch.changes():
                if self.json:
                    print(json.dumps(render.plain_change(watch.claim_id, str(watch.event), change)), file=sys.stderr)
                else:
                    print(render.change(watch.claim_id, str(watch.event), change), file=sys.stderr)

    def _give_way(self) -> bool:
        """Let claims give way that are asked to; return whether there was one."""
        given = False
        for watch in self.watches:
            if watch.revoke is None or watch.revoke is self._yielded_to.get(watch.claim_id):
                continue
            self._yielded_to[watch.claim_id] = watch.revoke
            with suppress(hwbp.HwbpError):  # it is over; that is told elsewhere
                watch.yield_()
            given = True
        return given

    def final_counts(self) -> list[hwbp.Counts | None]:
        """Release what is held and return the counts; None where the session was lost before they were told."""
        totals: list[hwbp.Counts | None] = []
        for watch in self.watches:
            try:
                totals.append(watch.release())
            except hwbp.Stale:
                totals.append(None)
        return totals


@contextmanager
def _held(job: Job, delivery: str, timeout_s: float | None = None, **options: Any) -> Iterator[_Held]:
    """Hold the slots of a job, let its command run, and afterwards say what became of the claims."""
    command = Command(job.argv) if job.argv else None
    try:
        with hwbp.connect(job.socket, name="hwbpctl") as client, Stop(command) as stop:
            # The command waits behind its gate in a program of ours: the exec that makes it the command must not end
            # the claim. Whoever names a target means the program it runs now.
            tid = command.pid if command and job.watches_its_command else job.tid
            watches = []
            waits_until = time.monotonic() + job.wait_s
            for event in job.events:
                chains = {f"{mode}_chain": getattr(event, mode) for mode in ("user", "kernel") if options.get("chain")}
                pending = client.queue(
                    event,
                    wait=max(0.0, waits_until - time.monotonic()) if job.wait_s else 0.0,
                    tid=tid,
                    pid=job.pid,
                    only_pid=job.only_pid,
                    cpus=job.cpus,
                    across_exec=job.watches_its_command,
                    guard=job.guard,
                    kind=job.kind,
                    label=job.label,
                    priority=job.priority,
                    delivery=delivery,
                    over_report=job.over_report,
                    **chains,
                )
                watches.append(_granted(job, pending, stop))
            stop.limit(timeout_s)
            if command:
                command.start()
            held = _Held(client, watches, stop, job.json)
            yield held
            for watch in watches:
                if watch.ended and watch.ended.reason not in ("released", "exit"):
                    held.status = REFUSED if watch.ended.reason in _TAKEN_AWAY else NOT_REACHABLE
                    _tell_end(job, watch)
            if command:
                if stop.signalled == signal.SIGTERM:
                    command.terminate()
                held.status = command.finish()
    finally:
        if command:
            command.finish()


def _granted(job: Job, pending: hwbp.Pending, stop: Stop) -> hwbp.Watch:
    """Wait for a claim, and say so; raises what refuses it, or ``hwbp.WaitTimedOut`` when it is time to stop."""
    if pending.is_waiting:
        line = json.dumps(render.plain_waiting(pending)) if job.json else render.waiting(pending)
        print(line, file=sys.stderr, flush=True)
    while (watch := pending.granted(until=stop.fileno())) is None:
        if stop.asked():
            pending.cancel()
            raise hwbp.WaitTimedOut("stopped while it waited; nothing is held", claim_id=pending.claim_id)
    return watch


def _tell_end(job: Job, watch: hwbp.Watch) -> None:
    assert watch.ended
    if job.json:
        end = {"claim": watch.claim_id, "reason": watch.ended.reason, "sentence": watch.ended.sentence}
        print(json.dumps(end), file=sys.stderr)
    else:
        print(f"hwbpctl: claim {watch.claim_id} is over: {watch.ended.sentence}", file=sys.stderr)


def watch(job: Job, count: int | None, callchain: bool) -> int:
    """Print hits until ``count`` of them, Ctrl-C, or the end of all targets; return the exit status."""
    shown = 0
    with _held(job, "hits", chain=callchain) as held:
        symbols = Symbols(NOWHERE if held.client.machine == SIMULATED else PROC)

        def show(pairs: Iterator[tuple[hwbp.Watch, hwbp.Hit]]) -> bool:
            nonlocal shown
            for of, hit in pairs:
                _print_hit(job, symbols, of, hit)
                shown += 1
                if shown == count or held.stop.signalled:
                    return False
            sys.stdout.flush()
            symbols.forget()
            return True

        held.until_over(lambda: show(held.client.hits(timeout=0)))
        totals = held.final_counts()
        for each in held.watches:  # what came between the last look and the release
            if shown != count and not held.stop.signalled:
                show((each, hit) for hit in each.hits(timeout=0))
        _print_summary(job, held, totals, shown)
    return held.status


def _print_hit(job: Job, symbols: Symbols, of: hwbp.Watch, hit: hwbp.Hit) -> None:
    comm, where = symbols.comm(hit.tid), symbols.where(hit.pid, hit.ip, hit.in_kernel)
    if job.json:
        print(json.dumps(render.plain_hit(hit, of.claim_id, str(of.event), comm, where)))
        return
    print(render.hit(hit, comm, where, str(of.event) if len(job.events) > 1 else ""))
    for chain, in_kernel in ((hit.kernel_chain, True), (hit.user_chain, False)):
        for ip in chain:
            print(render.chain_entry(ip, symbols.where(hit.pid, ip, in_kernel)))


def _print_summary(job: Job, held: _Held, totals: Sequence[hwbp.Counts | None], shown: int) -> None:
    for each, total in zip(held.watches, totals, strict=True):
        if job.json:
            line = {"type": "end", "claim": each.claim_id, "event": str(each.event), "shown": shown}
            print(json.dumps(line | (render.plain(total) if total else {}) | {"discarded": each.discarded}))
            continue
        discarded = f", {each.discarded} discarded unread" if each.discarded else ""
        known = render.counts(total) if total else "the session was lost before its counts were told"
        print(f"{each.event}: {known}{discarded}")
    if not job.json and shown != sum(total.delivered for total in totals if total):
        print(f"{shown} shown")
    sys.stdout.flush()


def stat(job: Job, timeout_s: float | None) -> int:
    """Count until Ctrl-C, the time limit, or the end of all targets; print the counts; return the exit status."""
    with _held(job, "count", timeout_s) as held:
        began = time.monotonic()
        held.until_over()
        stopped = [each.state == "guarded" for each in held.watches]
        totals = held.final_counts()
        elapsed_s = time.monotonic() - began
        triples = zip(held.watches, totals, stopped, strict=True)
        results = [(str(each.event), total, guarded) for each, total, guarded in triples if total]
        if job.json:
            events = [{"event": event, **render.plain(total), "guarded": flag} for event, total, flag in results]
            print(json.dumps({"events": events, "elapsed_s": elapsed_s}))
        else:
            print(render.stat(results, job.of_what, elapsed_s))
        sys.stdout.flush()
    return held.status


def hold(job: Job) -> int:
    """Keep the slots, unarmed, until Ctrl-C or the end of all targets, or around a command; return the exit status."""
    with _held(job, "hold") as held:
        if job.json:
            claims = [{"claim": each.claim_id, "event": str(each.event)} for each in held.watches]
            print(json.dumps({"type": "held", "claims": claims}), flush=True)
        elif not job.argv:
            claims_text = ", ".join(f"{each.claim_id} ({each.event})" for each in held.watches)
            print(f"held on {job.of_what}: claim {claims_text}; Ctrl-C gives back", flush=True)
        held.until_over()
        held.final_counts()
    return held.status
