"""
The options that verbs share, each with its help: what to watch, where, and as what.
"""

from __future__ import annotations

from typing import Annotated

import typer

Events = Annotated[
    list[str],
    typer.Option("-e", "--event", metavar="EVENT", help="mem:ADDRESS[/LENGTH][:ACCESS][:MODIFIERS], as perf writes it"),
]
OneEvent = Annotated[str | None, typer.Option("-e", "--event", metavar="EVENT", help="the same, as for watch")]
Tid = Annotated[int, typer.Option("-t", "--tid", metavar="TID", min=0, help="this thread")]
Pid = Annotated[
    int, typer.Option("-p", "--pid", metavar="PID", min=0, help="this process: all its threads, and later ones")
]
OnlyPid = Annotated[
    int, typer.Option("--only-pid", metavar="PID", min=0, help="with -a or -C: only what this process does there")
]
Cpus = Annotated[
    str, typer.Option("-C", "--cpu", metavar="CPUS", help="on these CPUs, as in 0,2-3; with -t, while it runs there")
]
All = Annotated[bool, typer.Option("-a", "--all-cpus", help="on all CPUs, whatever runs there")]
Argv = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- COMMAND", help="run this meanwhile; without -t, -p, -C or -a it is what is watched"),
]
OverReport = Annotated[
    bool, typer.Option("--over-report", help="take hits of bytes beside the event's, too, where that saves slots")
]
Guard = Annotated[
    int | None,
    typer.Option("--guard", metavar="N", min=0, help="silence the claim above N hits a second; 0: never (root)"),
]
Kind = Annotated[
    str, typer.Option("--kind", metavar="KIND", help="claim as ptrace, perf, kgdb, kvm or background do")
]
Label = Annotated[str, typer.Option("--label", metavar="TEXT", help="what ls shows beside the claim")]
Wait = Annotated[
    float | None,
    typer.Option("-w", "--wait", metavar="SECONDS", min=0, help="wait for room, for all events together as long"),
]
Nonblock = Annotated[bool, typer.Option("-n", "--nonblock", help="fail at once where there is no room: the default")]
Priority = Annotated[
    int,
    typer.Option("--priority", metavar="N", min=-100, max=100, help="among claims of its kind; above 0: for root"),
]
ClaimId = Annotated[int, typer.Argument(metavar="CLAIM", min=1, help="a claim's number, as ls shows it")]
