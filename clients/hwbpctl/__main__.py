"""
hwbpctl: who holds the hardware breakpoints, and the use of some, from a shell.

Exit status: 0 done, 1 refused (``fit``: does not fit; ``doctor``: something is broken), 2 wrong usage, 3 no daemon
answers. With a command behind ``--``, the command's own; ``replay`` has that of the replay.
What a verb needs is imported when it runs: ``--help`` should not wait for a transport.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwbpctl import kvm
from hwbpctl.options import (
    All,
    Argv,
    ClaimId,
    Cpus,
    Events,
    Guard,
    Kind,
    Label,
    Nonblock,
    OneEvent,
    OnlyPid,
    OverReport,
    Pid,
    Priority,
    Tid,
    Wait,
)

if TYPE_CHECKING:
    from hwbpctl.watching import Job

app = typer.Typer(
    name="hwbpctl",
    help="Who holds the hardware breakpoints of this machine, and the use of some of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes would reflow the lines that point into an event
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(kvm.app, name="kvm", no_args_is_help=True)

# A command's own options must not be taken for ours: parsing ends at its name.
_WITH_COMMAND = {"allow_interspersed_args": False}


@dataclass(frozen=True)
class _Common:
    """The options before the verb."""

    socket: str | None
    json: bool


@app.callback()
def _common(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="answer for programs")] = False,
    socket: Annotated[str | None, typer.Option("--socket", metavar="PATH", help="where hwbpd listens")] = None,
) -> None:
    context.obj = _Common(socket, as_json)


# --- verbs that ask --------------------------------------------------------------------------------------------------


@app.command("ls")
def list_slots(
    context: typer.Context,
    foreign: Annotated[bool, typer.Option("--foreign", help="also look for holders outside hwbpd (root)")] = False,
) -> None:
    """Show who holds which slots, and who waits for which."""
    with _client(context) as client:
        from hwbpctl import listing, render

        value, now_ns = client.slots(), time.monotonic_ns()
        if not foreign:
            _answer(context, value, lambda: listing.slots(value, now_ns))
            return
        holders = client.foreign()
        both = render.plain(value) | {"foreign": render.plain(holders)}
        _answer(context, both, lambda: f"{listing.slots(value, now_ns)}\n\n{listing.foreign(holders)}")


@app.command("caps")
def capabilities(context: typer.Context) -> None:
    """Show what the registers of this machine can hold."""
    with _client(context) as client:
        from hwbpctl import render

        value = client.capabilities()
        _answer(context, value, lambda: render.capabilities(value))


@app.command()
def why(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="CLAIM|ENOSPC", help="a claim's number, or why there is no room")],
) -> None:
    """Tell the story of a claim, granted, waiting or refused; or who holds everything, and what would help."""
    is_errno = what.upper() == "ENOSPC"
    if not is_errno and not (what.isascii() and what.isdecimal() and int(what) > 0):
        raise typer.BadParameter(f"a claim's number, as ls shows it, or ENOSPC, not {what!r}")
    with _client(context) as client:
        from hwbpctl import render

        value = client.why(errno="ENOSPC") if is_errno else client.why(int(what))
        _answer(context, value, lambda: render.why(value))


@app.command()
def rearm(context: typer.Context, claim: ClaimId) -> None:
    """Let a guarded claim report again, whoever has it."""
    with _client(context) as client:
        client.rearm(claim)
        _answer(context, {"claim": claim}, lambda: f"claim {claim} reports again")


@app.command()
def fit(
    context: typer.Context,
    event: Annotated[str | None, typer.Argument(metavar="EVENT", help="as for watch")] = None,
    option: OneEvent = None,
    tid: Tid = 0,
    pid: Pid = 0,
    cpus: Cpus = "",
    every_cpu: All = False,
    kind: Kind = "perf",
    priority: Priority = 0,
    over_report: OverReport = False,
) -> None:
    """
    Tell which slots an event takes; with a target, whether a claim would fit there now, or who is in the way.

    Nothing is taken.
    """
    asked = event if option is None else option
    if asked is None or (event is not None and option is not None):
        raise typer.BadParameter("name one event, as in fit mem:0x404040/8:w")
    if not (tid or pid or cpus or every_cpu):
        _plan(context, asked, over_report)
        return
    job = _job(context, [asked], tid, pid, cpus, every_cpu, None, kind=kind, over_report=over_report)
    with _client(context) as client:
        from hwbpctl import render
        from hwbpctl.watching import REFUSED

        target = {"tid": tid, "pid": pid, "cpus": job.cpus}
        value = client.fit(job.events[0], **target, kind=kind, priority=priority, over_report=over_report)
        _answer(context, value, lambda: render.fit(value, job.of_what))
    raise typer.Exit(0 if value.fits else REFUSED)


def _plan(context: typer.Context, text: str, over_report: bool) -> None:
    from hwbp import syntax

    try:
        event = syntax.parse_event(text)
    except syntax.BadSyntax as error:
        raise typer.BadParameter(str(error)) from error
    with _client(context) as client:
        from hwbpctl import render

        value = client.plan(event, over_report=over_report)
        _answer(context, value, lambda: render.plan(value))


@app.command()
def enabled(context: typer.Context, cpus: Cpus = "", tid: Tid = 0) -> None:
    """Tell where a breakpoint may be installed: on each CPU, or for a thread (with -C: while it runs there)."""
    from hwbp import syntax

    try:
        numbers = syntax.parse_cpus(cpus) if cpus else None
    except syntax.BadSyntax as error:
        raise typer.BadParameter(str(error)) from error
    with _client(context) as client:
        from hwbpctl import enabled as question

        answers = question.ask(client, numbers, tid)
        _answer(context, answers, lambda: question.text(answers))


@app.command()
def doctor(context: typer.Context) -> None:
    """Find out whether breakpoints work here, by using some; each finding with its remedy."""
    from hwbpctl import doctor as practice

    raise typer.Exit(practice.examine(context.obj.socket, context.obj.json))


@app.command()
def release(context: typer.Context, claim: ClaimId) -> None:
    """Release a claim, whoever has it."""
    with _client(context) as client:
        from hwbpctl import render

        value = client.release(claim)
        _answer(context, value, lambda: f"claim {claim} released: {render.counts(value)}")


@app.command()
def top(
    context: typer.Context,
    delay: Annotated[float, typer.Option("-d", "--delay", metavar="SECONDS", min=0.1, help="between looks")] = 1.0,
    frames: Annotated[int | None, typer.Option("-n", "--frames", min=1, help="end after so many looks")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="an object per look, for programs")] = False,
) -> None:
    """Watch who holds what, how fast it is hit, and what is decided: a screen with keys, or text where it is piped."""
    with _refusals(context):
        from hwbpctl import top as screen

        job = screen.Job(context.obj.socket, context.obj.json or as_json, delay, frames)
        raise typer.Exit(screen.run(job))


@app.command()
def replay(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what hwbpd --journal has written")],
    until: Annotated[int | None, typer.Option("--until", metavar="N", min=0, help="only the first N events")] = None,
    check: Annotated[bool, typer.Option("--check", help="hold every step to the invariants")] = False,
) -> None:
    """Run a journal of the daemon again, without the machine, and show what state it comes to."""
    import subprocess

    # -P: whoever runs this in a folder of somebody else's runs nothing that lies there.
    command = [sys.executable, "-P", "-m", "hwbpd.replay", str(file)]
    command += ["--json"] if context.obj.json else []
    command += [] if until is None else ["--until", str(until)]
    status = subprocess.run([*command, "--check"] if check else command, check=False).returncode
    raise typer.Exit(status if status >= 0 else 128 - status)


# --- verbs that claim ------------------------------------------------------------------------------------------------


@app.command(context_settings=_WITH_COMMAND)
def watch(
    context: typer.Context,
    event: Events,
    tid: Tid = 0,
    pid: Pid = 0,
    cpus: Cpus = "",
    every_cpu: All = False,
    only_pid: OnlyPid = 0,
    guard: Guard = None,
    kind: Kind = "perf",
    priority: Priority = 0,
    wait: Wait = None,
    nonblock: Nonblock = False,
    label: Label = "",
    count: Annotated[int | None, typer.Option("-c", "--count", min=1, help="stop after so many hits")] = None,
    callchain: Annotated[bool, typer.Option("--callchain", help="with the call chain of each hit")] = False,
    over_report: OverReport = False,
    argv: Argv = None,
) -> None:
    """Print each hit, until Ctrl-C or the end of the target."""
    if only_pid and (tid or pid or not (cpus or every_cpu)):
        raise typer.BadParameter("--only-pid picks from what all of a CPU does; it goes with -a or -C")
    how = _how(kind, label, priority, wait, nonblock) | {"over_report": over_report}
    job = _job(context, event, tid, pid, cpus, every_cpu, argv, **how, guard=guard, only_pid=only_pid)
    with _refusals(context):
        from hwbpctl import watching

        raise typer.Exit(watching.watch(job, count, callchain))


@app.command(context_settings=_WITH_COMMAND)
def stat(
    context: typer.Context,
    event: Events,
    tid: Tid = 0,
    pid: Pid = 0,
    cpus: Cpus = "",
    every_cpu: All = False,
    guard: Guard = None,
    kind: Kind = "perf",
    priority: Priority = 0,
    wait: Wait = None,
    nonblock: Nonblock = False,
    label: Label = "",
    timeout: Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", min=0, help="stop then")] = None,
    over_report: OverReport = False,
    argv: Argv = None,
) -> None:
    """Count hits, until Ctrl-C or the end of the target."""
    how = _how(kind, label, priority, wait, nonblock) | {"over_report": over_report}
    job = _job(context, event, tid, pid, cpus, every_cpu, argv, **how, guard=guard)
    with _refusals(context):
        from hwbpctl import watching

        raise typer.Exit(watching.stat(job, timeout))


@app.command(context_settings=_WITH_COMMAND)
def hold(
    context: typer.Context,
    event: Events,
    tid: Tid = 0,
    pid: Pid = 0,
    cpus: Cpus = "",
    every_cpu: All = False,
    kind: Kind = "perf",
    priority: Priority = 0,
    wait: Wait = None,
    nonblock: Nonblock = False,
    label: Label = "",
    over_report: OverReport = False,
    argv: Argv = None,
) -> None:
    """Keep slots without using them, until Ctrl-C or while a command runs."""
    how = _how(kind, label, priority, wait, nonblock) | {"over_report": over_report}
    job = _job(context, event, tid, pid, cpus, every_cpu, argv, **how)
    with _refusals(context):
        from hwbpctl import watching

        raise typer.Exit(watching.hold(job))


def _job(
    context: typer.Context,
    events: list[str],
    tid: int,
    pid: int,
    cpus: str,
    every_cpu: bool,
    argv: list[str] | None,
    *,
    kind: str,
    **others: Any,
) -> Job:
    """Check what can be wrong with the command line alone; ``others`` are fields of the job as they are."""
    import hwbp
    from hwbp import syntax
    from hwbpctl.watching import Job

    if every_cpu and (tid or pid or cpus):
        raise typer.BadParameter("-a is every CPU; it does not go with -t, -p or -C")
    if pid and (tid or cpus):
        raise typer.BadParameter("-p is all threads of a process, wherever they run; it does not go with -t or -C")
    if kind not in hwbp.KINDS:
        raise typer.BadParameter(f"--kind is one of {', '.join(hwbp.KINDS)}, not {kind!r}")
    if not (every_cpu or tid or pid or cpus or argv):
        ways = "-t TID, -p PID, -C CPUS, -a for all CPUs" + ("" if argv is None else ", or -- COMMAND")
        raise typer.BadParameter(f"say what to watch: {ways}")
    try:
        parsed = [syntax.parse_event(text) for text in events]
        cpu_numbers = syntax.parse_cpus(cpus) if cpus else None
    except syntax.BadSyntax as error:
        raise typer.BadParameter(str(error)) from error
    return Job(
        context.obj.socket,
        context.obj.json,
        parsed,
        tid,
        pid,
        cpu_numbers,
        every_cpu,
        argv or [],
        kind=kind,
        **others,
    )


def _how(kind: str, label: str, priority: int, wait: float | None, nonblock: bool) -> dict[str, Any]:
    """Return how to claim; -w and -n are as flock(1) has them."""
    if nonblock and wait is not None:
        raise typer.BadParameter("-n fails at once and -w waits: one of them")
    if wait is not None and not math.isfinite(wait):
        raise typer.BadParameter("-w is a number of seconds: nobody waits for ever")
    return {"kind": kind, "label": label, "priority": priority, "wait_s": wait or 0.0}


# --- answers and refusals --------------------------------------------------------------------------------------------


@contextmanager
def _client(context: typer.Context) -> Iterator[Any]:
    with _refusals(context):
        import hwbp

        with hwbp.connect(context.obj.socket, name="hwbpctl") as client:
            yield client


def _answer(context: typer.Context, value: Any, text: Any) -> None:
    from hwbpctl import render

    print(json.dumps(render.plain(value)) if context.obj.json else text())


@contextmanager
def _refusals(context: typer.Context) -> Iterator[None]:
    """Turn a refusal into lines on stderr and an exit status."""
    import hwbp
    from hwbpctl import render
    from hwbpctl.watching import NOT_REACHABLE, REFUSED

    try:
        yield
    except hwbp.HwbpError as error:
        print(json.dumps(render.plain_refusal(error)) if context.obj.json else render.refusal(error), file=sys.stderr)
        silent = isinstance(error, hwbp.NotReachable | hwbp.RequestTimedOut | hwbp.Stale)
        raise typer.Exit(NOT_REACHABLE if silent else REFUSED) from None


def main() -> None:
    """The entry point of the command ``hwbpctl``."""
    app()


if __name__ == "__main__":
    main()
