"""
``hwbpctl kvm compare`` and ``replay``: what the switch strategies cost, on made-up histories and on recorded ones.

The numbers come from the switch engine (``hwbp.kvm``); here they are laid out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hwbp.kvm import DrExits, Model, Row, SeedFigure, Standing

AsJson = Annotated[bool, typer.Option("--json", help="answer for programs")]
Prices = Annotated[
    Path | None, typer.Option("--prices", metavar="FILE", help="a price list, as `kvm calibrate -o` writes it")
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="also draw it, as SVG")]
Strategies = Annotated[list[str] | None, typer.Option("-s", "--strategy", metavar="NAME", help="only this; repeatable")]


def compare(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option("-m", "--model", help="only this kind of CPU; repeatable")] = None,
    workload: Annotated[
        list[str] | None, typer.Option("-w", "--workload", help="only this, in detail; repeatable")
    ] = None,
    strategy: Strategies = None,
    prices: Prices = None,
    intervals: Annotated[int, typer.Option("-n", "--intervals", min=10, help="of the guest, in each history")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="of what is drawn by lot")] = 1,
    optimum: Annotated[
        int, typer.Option("--optimum", metavar="N", min=0, help="hold the policies to the optimum on N histories more")
    ] = 0,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Tell what each switch strategy costs, by kind of CPU and workload."""
    from hwbp import kvm

    if model and prices:
        raise typer.BadParameter("--prices brings its own kind of CPU; leave --model out")
    require_writable(plot)
    models = _models(model, prices)
    workloads = _chosen("workload", workload, kvm.WORKLOADS)
    presets = [kvm.PRESETS[name] for name in _chosen("strategy", strategy, kvm.PRESETS)]
    rows = list(kvm.compare(models, workloads, presets, intervals, seed))
    figures, exits = kvm.seed_figures(), kvm.forty_percent()
    standings = list(kvm.all_standings(models, optimum, seed)) if optimum else []
    if plot is not None:
        _draw(plot, rows)
    if as_json or context.obj.json:
        print(json.dumps(_value(models, rows, figures, exits, standings)))
        return
    print(details(rows) if workload else overview(rows))
    print(f"\n{prices_text(models)}\n\n{figures_text(figures)}\n\n{exits_text(exits)}")
    if standings:
        print(f"\n{standings_text(standings)}")


def replay(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="one vCPU's history; docs/kvm-traces.md")],
    strategy: Strategies = None,
    prices: Prices = None,
    tracepoints: Annotated[
        str, typer.Option("--tracepoints", metavar="LAYOUT", help="TRACE is text of kvm tracepoints; of such CPUs")
    ] = "",
    vcpu: Annotated[int, typer.Option("--vcpu", min=0, help="whose history, of tracepoints")] = 0,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Tell what each switch strategy would have cost in a history that was recorded."""
    from hwbp import kvm

    presets = [kvm.PRESETS[name] for name in _chosen("strategy", strategy, kvm.PRESETS)]
    require_writable(plot)
    if tracepoints:
        _chosen("tracepoints", [tracepoints], kvm.LAYOUTS)
    try:
        with trace.open(encoding="utf-8") as lines:
            layout = kvm.LAYOUTS[tracepoints] if tracepoints else None
            history = kvm.parse(lines) if layout is None else kvm.from_tracepoints(lines, layout, vcpu)
        rows = list(kvm.replay(history, trace.name, presets, _models(None, prices)))
    except OSError as why:
        print(f"hwbpctl: {trace}: {why.strerror}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (UnicodeDecodeError, ValueError) as why:
        print(f"hwbpctl: {trace}: {why}", file=sys.stderr)
        raise typer.Exit(1) from None
    if plot is not None:
        _draw(plot, rows)
    print(json.dumps([_row_value(row) for row in rows]) if as_json or context.obj.json else details(rows))


def _models(names: list[str] | None, prices: Path | None) -> list[Model]:
    """Return the kinds of CPU asked for; with a price list, that one alone."""
    from hwbp import kvm

    if prices is None:
        return [kvm.MODELS[name] for name in _chosen("model", names, kvm.MODELS)]
    try:
        return [kvm.model_of(kvm.load_prices(prices))]
    except OSError as why:
        print(f"hwbpctl: {prices}: {why.strerror}", file=sys.stderr)
        raise typer.Exit(1) from None
    except ValueError as why:
        print(f"hwbpctl: {why}", file=sys.stderr)
        raise typer.Exit(1) from None


def require_writable(path: Path | None) -> None:
    """End with a sentence, before any work is done, where its outcome could not be written; a file there is kept."""
    if path is None:
        return
    try:
        with path.open("a"):
            pass
    except OSError as why:
        print(f"hwbpctl: cannot write {path}: {why.strerror}", file=sys.stderr)
        raise typer.Exit(1) from None


def _chosen(what: str, names: list[str] | None, known: Iterable[str]) -> list[str]:
    """Return the names asked for, or all; one that nobody knows is wrong usage."""
    every = list(known)
    for name in names or ():
        if name not in every:
            raise typer.BadParameter(f"no {what} {name!r}; there are {', '.join(every)}")
    return list(names or every)


def _draw(path: Path, rows: Sequence[Row]) -> None:
    from hwbpctl import kvm_plot

    path.write_text(kvm_plot.svg(rows), encoding="utf-8")


# --- as text ---------------------------------------------------------------------------------------------------------


def overview(rows: Sequence[Row]) -> str:
    """Return a table for each kind of CPU: what an interval costs, strategies down, workloads across."""
    tables = []
    for name, group in groupby(rows, key=lambda row: row.model):
        own = list(group)
        workloads = list(dict.fromkeys(row.workload for row in own))
        costs = {(row.strategy, row.workload): row.cost for row in own}
        lines: list[tuple[str, ...]] = [("", *workloads)]
        for strategy in dict.fromkeys(row.strategy for row in own):
            row = next(row for row in own if row.strategy == strategy)
            lines.append((_label(row), *(f"{costs[strategy, workload]:.0f}" for workload in workloads)))
        title = f"{name}: {own[0].unit} for an interval of the guest, {own[0].intervals} intervals"
        tables.append("\n".join([title, *_aligned(lines), *_warning(own)]))
    return "\n\n".join(tables)


def _label(row: Row) -> str:
    """Return the strategy's name, marked where it is wrong."""
    return f"{row.strategy} !" if row.breaks else row.strategy


def _warning(rows: Sequence[Row]) -> list[str]:
    """Return what the mark says, if any of the rows has it."""
    is_any = any(row.breaks for row in rows)
    return ["! breaks promises, so its cost is that of a mistake: hwbpctl kvm check STRATEGY"] if is_any else []


HEADS = ("", "entry", "exit", "accesses", "rest", "in all", "reads", "writes", "traps/1000", "x optimum")


def details(rows: Sequence[Row]) -> str:
    """Return a table for each kind of CPU and workload, the cheapest strategy first."""
    tables = []
    for (model, workload), group in groupby(rows, key=lambda row: (row.model, row.workload)):
        own = sorted(group, key=lambda row: row.cost)
        lines: list[tuple[str, ...]] = [HEADS]
        for row in own:
            costs = (row.entry, row.exit, row.accesses, row.rest, row.cost)
            factor = "" if row.factor is None else f"{row.factor:.2f}"
            counts = (f"{row.reads:.1f}", f"{row.writes:.1f}", f"{1000 * row.traps:.0f}", factor)
            lines.append((_label(row), *(f"{cost:.0f}" for cost in costs), *counts))
        title = f"{model}, {workload}: {own[0].unit} for an interval of the guest, {own[0].intervals} intervals"
        tables.append("\n".join([title, *_aligned(lines), *_warning(own)]))
    return "\n\n".join(tables)


def prices_text(models: Sequence[Model]) -> str:
    """Return what was reckoned with, each price with how well it is known."""
    from hwbp.kvm import PRICED

    lines = [("prices", *(what.replace("_", " ") for what in PRICED))]
    for model in models:
        prices = [getattr(model.prices, what) for what in PRICED]
        cells = (f"{price.amount:.0f} {price.grade.value}" for price in prices)
        lines.append((f"{model.name}, {model.prices.unit}", *cells))
    note = "reported: in a paper that was not read; assumed: published by nobody. --json has the sources"
    return "\n".join([*_aligned(lines), note])


def figures_text(figures: Sequence[SeedFigure]) -> str:
    """Return the figures of the threads beside ours."""
    lines = [("figures of the threads", "said", "ours")]
    lines += [(figure.claim, f"{figure.said:g}", f"{figure.computed:g}") for figure in figures]
    return "\n".join(_aligned(lines))


def exits_text(exits: Sequence[DrExits]) -> str:
    """Return for which guests debug-register exits take 40 % of the time."""
    lines = [("40 % of the time goes to exits, if", "exit", "accesses", "work between", "untrapped")]
    for each in exits:
        counts = (f"{each.exit:.0f}", str(each.accesses), f"{each.work_at_40:.0f}", f"{each.share_untrapped:.0%}")
        lines.append((f"prices of {each.source}", *counts))
    note = "cycles; accesses and work for each task switch of the guest; untrapped: lost when only the first one traps"
    return "\n".join([*_aligned(lines), note])


def standings_text(standings: Sequence[tuple[Model, Sequence[Standing]]]) -> str:
    """Return how near the policies come to the optimum."""
    lines = [("times the optimum", "mean", "worst", "bound", "histories")]
    for model, own in standings:
        for each in own:
            numbers = (f"{each.mean:.3f}", f"{each.worst:.3f}", f"{each.bound:.3f}", str(each.histories))
            lines.append((f"{model.name}, {each.policy}", *numbers))
    note = "the lottery's bound is for its mean over the draws, where every access shows in the registers"
    return "\n".join([*_aligned(lines), note])


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for name, *numbers in lines:
        cells = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        aligned.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return aligned


# --- as values -------------------------------------------------------------------------------------------------------


def _row_value(row: Row) -> dict[str, object]:
    return {name: getattr(row, name) for name in row.__struct_fields__} | {"cost": row.cost}


def _prices_value(model: Model) -> dict[str, object]:
    from hwbp.kvm import PRICED

    prices = {what: getattr(model.prices, what) for what in PRICED}
    told = {
        what: {"amount": price.amount, "grade": price.grade.value, "source": price.source}
        for what, price in prices.items()
    }
    return {"model": model.name, "unit": model.prices.unit, "prices": told}


def _value(
    models: Sequence[Model],
    rows: Sequence[Row],
    figures: Sequence[SeedFigure],
    exits: Sequence[DrExits],
    standings: Sequence[tuple[Model, Sequence[Standing]]],
) -> dict[str, object]:
    return {
        "rows": [_row_value(row) for row in rows],
        "prices": [_prices_value(model) for model in models],
        "figures": [figure._asdict() for figure in figures],
        "forty_percent": [each._asdict() for each in exits],
        "optimum": [
            {"model": model.name} | each._asdict() | {"terms": each.terms._asdict()}
            for model, own in standings
            for each in own
        ],
    }
