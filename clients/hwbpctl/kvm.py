"""
``hwbpctl kvm``: the virtual machines that the daemon knows; what this host's KVM can do with debug registers, and what
switching them costs.

Exit status: as for the other verbs; 1 also where there is no KVM to ask.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hwbpctl import kvm_costs

if TYPE_CHECKING:
    from hwbp import VcpuRow, VmRow
    from hwbp.kvm import Calibration, HostBreakpoints, Kvm, Measured, Report

app = typer.Typer(help="Debug registers of virtual machines: who has them, what KVM can do, what switching costs.")

app.command("compare")(kvm_costs.compare)
app.command("replay")(kvm_costs.replay)

AsJson = Annotated[bool, typer.Option("--json", help="answer for programs")]


@app.command("check")
def check_strategies(
    context: typer.Context,
    strategies: Annotated[list[str] | None, typer.Argument(metavar="[STRATEGY]...", help="only these")] = None,
    histories: Annotated[bool, typer.Option("--histories", help="how each broken promise comes to be broken")] = False,
    as_json: AsJson = False,
) -> None:
    """Search every world that the switch strategies can come to; needs neither a daemon nor KVM."""
    from hwbp.kvm import check_isolation

    options = ["--histories"] * histories + ["--json"] * (as_json or context.obj.json)
    raise typer.Exit(check_isolation([*(strategies or []), *options]))


@app.command("ls")
def list_vms(context: typer.Context, as_json: AsJson = False) -> None:
    """Show virtual machines and their vCPUs: slots, what is loaded, strategy, and what their VMMs have counted."""
    import hwbp
    from hwbpctl import render
    from hwbpctl.watching import NOT_REACHABLE, REFUSED

    try:
        with hwbp.connect(context.obj.socket, name="hwbpctl kvm ls") as client:
            vms = client.vms()
    except hwbp.HwbpError as why:
        print(render.refusal(why), file=sys.stderr)
        raise typer.Exit(NOT_REACHABLE if isinstance(why, hwbp.NotReachable) else REFUSED) from None
    print(json.dumps(render.plain(vms)) if as_json or context.obj.json else vms_text(vms))


@app.command("probe")
def probe_host(context: typer.Context, as_json: AsJson = False) -> None:
    """Try on a small guest which breakpoints work, the VMM's and the guest's own; nothing of the host's is touched."""
    with _kvm() as kvm:
        from hwbp.kvm import probe

        report = probe(kvm)
    print(json.dumps(_plain_report(report)) if as_json or context.obj.json else report_text(report))


@app.command("calibrate")
def calibrate_host(
    context: typer.Context,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="a price list, as JSON")] = None,
    rounds: Annotated[int, typer.Option("-r", "--rounds", min=2, max=1000, help="measure so often")] = 30,
) -> None:
    """Measure what KVM_RUN, its traps and a debug register cost here; host breakpoints are claimed from the daemon."""
    kvm_costs.require_writable(output)
    with _kvm() as kvm, _host_breakpoints(context.obj.socket) as host:
        from hwbp.kvm import calibrate

        try:
            found = calibrate(kvm, host, rounds=rounds, progress=_show_progress)
        except OSError as why:
            print(f"hwbpctl: KVM refused: {why.strerror}", file=sys.stderr)
            raise typer.Exit(1) from None
    if output is not None:
        output.write_text(json.dumps(found.price_list(), indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found.price_list()) if as_json or context.obj.json else calibration_text(found))


_COLUMNS = ("VCPU", "NR", "TID", "SLOTS", "LOADED", "STRATEGY", "OWNER", "ENTRIES", "SWITCHES", "TRAPS")
_TO_THE_LEFT = {"SLOTS", "LOADED", "STRATEGY", "OWNER"}


def vms_text(vms: Sequence[VmRow]) -> str:
    """Return virtual machines, each with a line for every vCPU; slots are held of those there are."""
    if not vms:
        return "no virtual machines: none has told the daemon of itself"
    rows = [[_vcpu_cells(vcpu) for vcpu in vm.vcpus] for vm in vms]
    cells = [_COLUMNS, *(row for of_vm in rows for row in of_vm)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    lines = [_row(_COLUMNS, widths)] if len(cells) > 1 else []
    for vm, of_vm in zip(vms, rows, strict=True):
        label = f" {vm.label}" if vm.label else ""
        lines += [f"vm {vm.vm}{label}: {vm.comm}[{vm.pid}], uid {vm.uid}", *(_row(row, widths) for row in of_vm)]
    return "\n".join(lines)


def _vcpu_cells(vcpu: VcpuRow) -> tuple[str, ...]:
    from hwbpctl.render import amount

    named = len(vcpu.pools) > 1
    slots = ", ".join(
        f"{vcpu.held[pool]}/{count}" + (f" {pool}" if named else "") for pool, count in vcpu.pools.items()
    )
    numbers = (amount(number) for number in (vcpu.entries, vcpu.switches, vcpu.traps))
    loaded = "yes" if vcpu.loaded else "not yet"
    about = (str(vcpu.vcpu), str(vcpu.number), str(vcpu.tid), slots, loaded, vcpu.strategy or "-", vcpu.owner or "-")
    return (*about, *numbers)


def _row(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if name in _TO_THE_LEFT else cell.rjust(width)
        for cell, width, name in zip(row, widths, _COLUMNS, strict=True)
    )
    return "  " + " ".join(padded).rstrip()


def report_text(report: Report) -> str:
    """Return the abilities as a table, one line each, with what came instead where one does not work."""
    rows = [(each.ability, f"ring {each.ring}", "yes" if each.works else "NO", each.found) for each in report.findings]
    lines = [f"ring 0 is executed by {report.ring_0}; ring 3 by {report.ring_3}", ""]
    width = max(len(ability) for ability, *_ in rows)
    lines += [f"{ability:{width}}  {ring}  {works:3}  {found}" for ability, ring, works, found in rows]
    works = sum(each.works for each in report.findings)
    lines += ["", f"{works} of {len(rows)} work as on a CPU"]
    if works < len(rows):
        lines.append("NO is a limit of this host's KVM: do without, or debug where the CPU executes the guest")
    return "\n".join(lines)


def calibration_text(found: Calibration) -> str:
    """Return what was measured and what follows, as tables: the median, and the quartiles around it."""
    lines = [found.source, f"ring 0 is executed by {found.execution}", ""]
    lines += _table(found.measured)
    lines += ["", "prices:"]
    lines += _table(tuple(found.prices.values()))
    return "\n".join([*lines, *([""] if found.notes else []), *found.notes])


def _table(ways: tuple[Measured, ...]) -> list[str]:
    width = max(len(way.name) for way in ways)
    return [f"  {way.name:{width}}  {way.median:9.0f} ns  ({way.low:.0f} to {way.high:.0f})" for way in ways]


def _plain_report(report: Report) -> dict[str, object]:
    findings = [
        {"ability": each.ability, "ring": each.ring, "works": each.works, "found": each.found}
        for each in report.findings
    ]
    return {"ring_0": report.ring_0, "ring_3": report.ring_3, "findings": findings}


def _show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


@contextmanager
def _kvm() -> Iterator[Kvm]:
    """/dev/kvm, or a sentence about what is missing, and exit status 1."""
    from hwbp.kvm import Kvm, what_is_missing

    missing = what_is_missing()
    if missing is not None:
        print(f"hwbpctl: {missing}", file=sys.stderr)
        raise typer.Exit(1)
    with Kvm() as kvm:
        yield kvm


@contextmanager
def _host_breakpoints(socket: str | None) -> Iterator[HostBreakpoints | None]:
    """Breakpoints claimed from the daemon, or None, with a line on stderr, where none answers."""
    import hwbp
    from hwbp.kvm import host_breakpoints

    try:
        client = hwbp.connect(socket, name="hwbpctl kvm calibrate")
    except hwbp.NotReachable as why:
        print(f"hwbpctl: without breakpoints of the host: {why}", file=sys.stderr)
        yield None
        return
    with client:
        yield host_breakpoints(client)
