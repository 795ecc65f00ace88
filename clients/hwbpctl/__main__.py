"""
hwbpctl: who holds the hardware breakpoints, and the use of some, from a shell.

Exit status: 0 done, 1 refused, 2 wrong usage, 3 no daemon answers. With a command behind ``--``, the command's own.
What a verb needs is imported when it runs: ``--help`` should not wait for a transport.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

# A command's own options must not be taken for ours: parsing ends at its name.
_WITH_COMMAND = {"allow_interspersed_args": False}

_Events = Annotated[
    list[str],
    typer.Option("-e", "--event", metavar="EVENT", help="mem:ADDRESS[/LENGTH][:ACCESS][:MODIFIERS], as perf writes it"),
]
_Tid = Annotated[int, typer.Option("-t", "--tid", metavar="TID", min=0, help="watch this thread")]
_Cpus = Annotated[
    str, typer.Option("-C", "--cpu", metavar="CPUS", help="on these CPUs, as in 0,2-3; with -t, while it runs there")
]
_All = Annotated[bool, typer.Option("-a", "--all-cpus", help="on all CPUs, whatever runs there")]
_Argv = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- COMMAND", help="run this meanwhile; without -t, -C or -a it is what is watched"),
]
_Kind = Annotated[
    str, typer.Option("--kind", metavar="KIND", help="claim as ptrace, perf, kgdb, kvm or background do")
]
_Label = Annotated[str, typer.Option("--label", metavar="TEXT", help="what ls shows beside the claim")]
_ClaimId = Annotated[int, typer.Argument(metavar="CLAIM", min=1, help="a claim's number, as ls shows it")]


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
def list_slots(context: typer.Context) -> None:
    """Show who holds which slots."""
    with _client(context) as client:
        from hwbpctl import render

        value = client.slots()
        _answer(context, value, lambda: render.slots(value))


@app.command("caps")
def capabilities(context: typer.Context) -> None:
    """Show what the registers of this machine can hold."""
    with _client(context) as client:
        from hwbpctl import render

        value = client.capabilities()
        _answer(context, value, lambda: render.capabilities(value))


@app.command()
def why(context: typer.Context, claim: _ClaimId) -> None:
    """Tell the story of a claim, granted or refused."""
    with _client(context) as client:
        from hwbpctl import render

        value = client.why(claim)
        _answer(context, value, lambda: render.why(value))


@app.command()
def release(context: typer.Context, claim: _ClaimId) -> None:
    """Release a claim, whoever has it."""
    with _client(context) as client:
        from hwbpctl import render

        value = client.release(claim)
        _answer(context, value, lambda: f"claim {claim} released: {render.counts(value)}")


# --- verbs that claim ------------------------------------------------------------------------------------------------


@app.command(context_settings=_WITH_COMMAND)
def watch(
    context: typer.Context,
    event: _Events,
    tid: _Tid = 0,
    cpus: _Cpus = "",
    every_cpu: _All = False,
    kind: _Kind = "perf",
    label: _Label = "",
    count: Annotated[int | None, typer.Option("-c", "--count", min=1, help="stop after so many hits")] = None,
    callchain: Annotated[bool, typer.Option("--callchain", help="with the call chain of each hit")] = False,
    argv: _Argv = None,
) -> None:
    """Print each hit, until Ctrl-C or the end of the target."""
    job = _job(context, event, tid, cpus, every_cpu, argv, kind=kind, label=label)
    with _refusals(context):
        from hwbpctl import watching

        raise typer.Exit(watching.watch(job, count, callchain))


@app.command(context_settings=_WITH_COMMAND)
def stat(
    context: typer.Context,
    event: _Events,
    tid: _Tid = 0,
    cpus: _Cpus = "",
    every_cpu: _All = False,
    kind: _Kind = "perf",
    label: _Label = "",
    timeout: Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", min=0, help="stop then")] = None,
    argv: _Argv = None,
) -> None:
    """Count hits, until Ctrl-C or the end of the target."""
    job = _job(context, event, tid, cpus, every_cpu, argv, kind=kind, label=label)
    with _refusals(context):
        from hwbpctl import watching

        raise typer.Exit(watching.stat(job, timeout))


@app.command(context_settings=_WITH_COMMAND)
def hold(
    context: typer.Context,
    event: _Events,
    tid: _Tid = 0,
    cpus: _Cpus = "",
    every_cpu: _All = False,
    kind: _Kind = "perf",
    label: _Label = "",
    argv: _Argv = None,
) -> None:
    """Keep slots without using them, until Ctrl-C or while a command runs."""
    job = _job(context, event, tid, cpus, every_cpu, argv, kind=kind, label=label)
    with _refusals(context):
        from hwbpctl import watching

        raise typer.Exit(watching.hold(job))


def _job(
    context: typer.Context,
    events: list[str],
    tid: int,
    cpus: str,
    every_cpu: bool,
    argv: list[str] | None,
    *,
    kind: str,
    label: str,
) -> Job:
    """Check what can be wrong with the command line alone."""
    import hwbp
    from hwbp import syntax
    from hwbpctl.watching import Job

    if every_cpu and (tid or cpus):
        raise typer.BadParameter("-a is every CPU; it does not go with -t or -C")
    if kind not in hwbp.KINDS:
        raise typer.BadParameter(f"--kind is one of {', '.join(hwbp.KINDS)}, not {kind!r}")
    if not (every_cpu or tid or cpus or argv):
        raise typer.BadParameter("say what to watch: -t TID, -C CPUS, -a for all CPUs, or -- COMMAND")
    try:
        parsed = [syntax.parse_event(text) for text in events]
        cpu_numbers = syntax.parse_cpus(cpus) if cpus else None
    except syntax.BadSyntax as error:
        raise typer.BadParameter(str(error)) from error
    return Job(context.obj.socket, context.obj.json, parsed, tid, cpu_numbers, every_cpu, argv or [], kind, label)


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
