"""
The frames of ``hwbpctl top``: a view, a width and a height -> what stands on the screen. Pure.

From above: who this is; the CPUs; the claims; what is decided, or a pane that was asked for; one line of keys, or of a
question. No line is wider than the screen and no frame is higher. Where room is short, whole columns are left out, in
the order of ``_Column.rank``: a number is never cut. Bars are of ASCII: terminals do not agree on how wide blocks are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from hwbp import CpuRow, Decision, Slots, format_cpus
from hwbpctl.cells import fit, printable, width_of, wrap
from hwbpctl.render import age, amount, ordinal, plural
from hwbpctl.top_model import Row, View, index_of

BAR_MAX = 16  # slots of a pool that are drawn; of more, only the numbers are shown
PANE_MIN = 3  # lines of the lower pane, with its title

LEGEND = "# cpu-wide  = busiest task  . free"
HELP = (
    "up down j k  select a claim     page up, page down, home, end  further",
    "w            why: the story of the selected claim; esc closes it",
    "r            release the selected claim, after a question",
    "a            arm it again, if it is guarded",
    "s            sort by claim, rate, owner or target",
    "?            this help        q  quit        ctrl-z  suspend",
    "bars: # held cpu-wide   = held by the busiest task   . free for a cpu-wide claim",
    "HITS/s is since the look before; LOST: the ring had no room; DROP: the owner did not read",
    "waiting, suspended: it holds nothing; residue: its thread keeps the slot until it ends",
)

_STATES = {
    "armed": "green",
    "held": "cyan",
    "guarded": "bold yellow",
    "suspended": "yellow",
    "yielding": "bold yellow",
    "waiting": "yellow",
    "displacing": "yellow",
    "taking": "cyan",
    "taken": "green",
    "residue": "magenta",
}
_DECISIONS = {
    "granted": "green",
    "resumed": "green",
    "refused": "red",
    "guarded": "yellow",
    "suspended": "yellow",
    "offline": "yellow",
    "queued": "yellow",
    "revoke": "yellow",
    "spared": "green",
    "contended": "dim",
    "foreign": "red",
    "session": "dim",
    "session over": "dim",
}


def screen(view: View, width: int, height: int) -> Text:
    """Return a frame of at most ``height`` lines of at most ``width`` cells."""
    foot = [_foot(view, width)] if height >= 3 else []
    lines = _title(view, width)[: height - len(foot)]
    body = height - len(lines) - len(foot)
    if view.slots is not None and body >= 3:
        cpus = cpu_lines(view.slots, width)
        shown = max(1, height // 5)
        if len(cpus) > shown:
            left_out = Text(fit(f"... and {plural(len(cpus) - shown + 1, 'more line')} of CPUs", width), "dim")
            cpus = [*cpus[: shown - 1], left_out] if shown > 1 else cpus[:1]
        lines += cpus
        body -= len(cpus)
    pane = _pane(view, width)
    pane_height = _share(len(pane), len(view.rows) + 3, body, greedy=view.pane is not None)
    lines += claim_lines(view, width, body - pane_height)
    if view.pane is None and len(pane) > pane_height:
        pane = [pane[0], *pane[len(pane) - pane_height + 1 :]]  # the newest
    lines += pane[:pane_height]
    lines += [Text()] * (height - len(lines) - len(foot))
    return Text("\n").join([*lines, *foot])


def batch(view: View, width: int) -> str:
    """Return a frame as text without a bound on its height: every claim, and what was decided since the one before."""
    lines = _title(view, width)
    if view.slots is not None:
        lines += [*cpu_lines(view.slots, width), *claim_lines(view, width, len(view.rows) + 1)]
    if view.told or view.missed:
        # Nobody can look at these again, so they are not cut.
        lines += [_pane(view, width)[0], *(decision_line(at, what, 10_000) for at, what in view.told)]
    return "\n".join(line.plain.rstrip() for line in lines)


def _share(pane: int, claims: int, body: int, greedy: bool) -> int:
    """Return how many lines of the body the lower pane gets: what the claims leave, or its share if they want more."""
    if body < PANE_MIN + 2:
        return body if greedy else 0
    share = max(PANE_MIN, body * 2 // 3 if greedy else body // 3)
    return min(body - 2, max(share, body - claims), pane if greedy else body)


# --- above -----------------------------------------------------------------------------------------------------------


def _title(view: View, width: int) -> list[Text]:
    queued = sum(row.position > 0 for row in view.rows)
    waiting = f", {queued} waiting," if queued else ""
    claims = "" if view.slots is None else f"{plural(len(view.rows), 'claim')}{waiting} by {view.sort}  "
    right = printable(f"{claims}{view.clock}")
    left = printable(f"hwbpd {view.daemon}")
    room = width - width_of(right) - 2
    line = Text(f"{fit(left, room)}  {right}" if room >= len("hwbpd") else fit(left, width), "bold")
    if not view.trouble:
        return [line]
    return [line, *(Text(fit(each, width), "bold red") for each in wrap(printable(view.trouble), width)[:3])]


def cpu_lines(slots: Slots, width: int) -> list[Text]:
    """Return the CPUs in as many columns as there is room for; those that look the same stand together."""
    looks: dict[str, list[CpuRow]] = {}
    for row in slots.cpus:
        look = repr((row.online, sorted(row.cpu_wide.items()), sorted(row.busiest_task.items()), row.slots))
        looks.setdefault(look, []).append(row)
    names = [printable(f"cpu {format_cpus(row.cpu for row in rows)}") for rows in looks.values()]
    name_width = min(max(map(width_of, names), default=0), max(0, width // 3))
    bars = [
        Text(fit(name, name_width), "bold").append(" ").append_text(_bars(slots.pools, rows[0]))
        for name, rows in zip(names, looks.values(), strict=True)
    ]
    cell_width = max((width_of(cell.plain) for cell in bars), default=0)
    columns = max(1, (width + 3) // (cell_width + 3))
    lines = []
    for begin in range(0, len(bars), columns):
        line = Text("   ").join(_fitted(cell, cell_width) for cell in bars[begin : begin + columns])
        lines.append(_fitted(line, width))
    if lines:
        lines[-1].rstrip()
        if width_of(lines[-1].plain) + 3 + len(LEGEND) <= width:
            lines[-1].append("   ").append(LEGEND, "dim")
    return lines


def _bars(pools: Mapping[str, int], row: CpuRow) -> Text:
    if not row.online:
        return Text("offline", "dim")
    text = Text()
    for pool, every_cpu_has in pools.items():
        slots = row.slots.get(pool, every_cpu_has)
        wide, task = row.cpu_wide.get(pool, 0), row.busiest_task.get(pool, 0)
        free = max(0, slots - wide - task)
        text.append(f"{' ' if text.plain else ''}{'' if len(pools) == 1 else printable(pool) + ' '}")
        if wide + task + free <= BAR_MAX:
            text.append("[").append("#" * wide, "magenta").append("=" * task, "blue").append("." * free, "green")
            text.append("]")
        text.append(f" {free} free", "" if free else "bold red")
    return text


# --- claims ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """:param rank: the greater, the sooner it is left out; :param least: to what it may shrink; 0: not at all."""

    head: str
    rank: int
    cell: Callable[[Row], str]
    right: bool = False
    least: int = 0


_COLUMNS = (
    _Column("CLAIM", 1, lambda row: str(row.claim), right=True),
    _Column("OWNER", 2, lambda row: row.owner, least=12),
    _Column("UID", 11, lambda row: str(row.uid), right=True),
    _Column("KIND", 10, lambda row: row.kind),
    _Column("TARGET", 5, lambda row: row.target, least=8),
    _Column("SPAN", 6, lambda row: row.span),
    _Column("HITS/s", 3, lambda row: per_second(row.hits_per_s), right=True),
    _Column("HITS", 9, lambda row: "-" if row.hits is None else amount(row.hits), right=True),
    _Column("LOST", 7, lambda row: amount(row.lost), right=True),
    _Column("DROP", 8, lambda row: amount(row.dropped), right=True),
    _Column("STATE", 4, lambda row: row.state),
    _Column("AGE", 12, lambda row: age(row.age_ns), right=True),
    _Column("LABEL", 13, lambda row: row.label, least=5),
)


def per_second(rate: float | None) -> str:
    """Return a rate in at most five characters; a hyphen where it is not known."""
    if rate is None:
        return "-"
    return f"{rate:.1f}" if 0 < rate < 9.95 else amount(max(0, round(rate)))


def claim_lines(view: View, width: int, height: int) -> list[Text]:
    """Return the table of claims, scrolled to the selected one, and below it what the table leaves out of that."""
    rows = view.rows
    if height < 1 or view.slots is None:
        return []
    if not rows:
        return [Text(fit("no claims", width), "dim")]
    table = [[printable(column.cell(row)) for column in _COLUMNS] for row in rows]
    widths = _widths(table, width)
    detail = _detail(rows, view.selected, width)[: max(0, height - len(rows) - 1)]
    lines = [Text(_line([column.head for column in _COLUMNS], widths, " ", width), "reverse")]
    at = index_of(rows, view.selected)
    visible = height - 1
    begin = max(0, at - visible + 1)
    for row, cells in list(zip(rows, table, strict=True))[begin : begin + visible]:
        is_selected = row.claim == view.selected
        line = Text(_line(cells, widths, ">" if is_selected else " ", width), "bold" if is_selected else "")
        state = _STATES.get(row.state, "red")
        line.highlight_words([printable(row.state)], state)
        lines.append(line)
    return [*lines, *detail]


def _widths(table: Sequence[Sequence[str]], width: int) -> dict[int, int]:
    """Choose the columns that have room, by rank; return their widths by their place."""
    natural = [
        max(len(column.head), *(width_of(cells[index]) for cells in table)) for index, column in enumerate(_COLUMNS)
    ]
    wanted = [index for index in range(len(_COLUMNS)) if any(cells[index] for cells in table)]
    chosen: dict[int, int] = {}
    room = width - 1  # the mark of the selected row
    for index in sorted(wanted, key=lambda index: _COLUMNS[index].rank):
        least = min(natural[index], _COLUMNS[index].least or natural[index])
        if least + 1 <= room:
            chosen[index] = least
            room -= least + 1
    for index in sorted(chosen):
        more = min(room, natural[index] - chosen[index])
        chosen[index] += more
        room -= more
    return chosen


def _line(cells: Sequence[str], widths: Mapping[int, int], mark: str, width: int) -> str:
    padded = [fit(_owner(cells[index], widths[index], index), widths[index], _COLUMNS[index].right)
              for index in sorted(widths)]  # fmt: skip
    return fit(" ".join([mark, *padded]), width)


def _owner(text: str, width: int, index: int) -> str:
    """Of an owner that is too long, the name gives way and not the pid."""
    if _COLUMNS[index].head != "OWNER" or width_of(text) <= width:
        return text
    comm, bracket, pid = text.rpartition("[")
    return fit(comm, max(0, width - len(pid) - 1)) + bracket + pid


def _detail(rows: Sequence[Row], selected: int, width: int) -> list[Text]:
    if not selected:
        return []
    row = rows[index_of(rows, selected)]
    if row.hits is None:
        behind = f" behind claim {', '.join(map(str, row.blockers))}" if row.blockers else ""
        counts = f"{ordinal(row.position)} in the queue{behind}"
    else:
        counts = f"{plural(row.hits, 'hit')}, {row.lost} lost, {row.dropped} dropped"
    label = f", '{row.label}'" if row.label else ""
    text = f"claim {row.claim}: uid {row.uid} as {row.kind}, {row.span} on {row.target}, {age(row.age_ns)}, {counts}"
    return [Text(fit(line, width), "dim") for line in wrap(printable(text + label), width, "    ")]


# --- below -----------------------------------------------------------------------------------------------------------


def _pane(view: View, width: int) -> list[Text]:
    """The lower pane with its title: the decisions, or what was asked for."""
    if view.pane is not None:
        title, content = view.pane
        told = [each for line in content for each in wrap(printable(line), width, "    ")]
        return [_rule(title, width), *(Text(fit(line, width)) for line in told)]
    missed = f" ({view.missed} missed)" if view.missed else ""
    return [_rule(f"decisions{missed}", width), *(decision_line(at, what, width) for at, what in view.told)]


def decision_line(at: str, what: Decision | str, width: int) -> Text:
    """Return a decision, or something that befell ourselves, in one line."""
    if isinstance(what, str):
        return Text(fit(printable(f"{at} {what}"), width), "bold")
    parts = [f"claim {what.claim}"] if what.claim else []
    if what.what.startswith("session"):
        parts = [f"uid {what.uid}" + (f", {what.label}" if what.label else "")]
    parts += [each for each in (what.errno, what.reason if what.reason != "released" else "") if each]
    parts.append(what.sentence or what.about)
    text = f"{at} {what.what:<8} {what.comm}[{what.pid}] {': '.join(each for each in parts if each)}"
    return Text(fit(printable(text), width), _DECISIONS.get(what.what, ""))


def _rule(title: str, width: int) -> Text:
    text = printable(f"-- {title} ")
    return Text(fit(text + "-" * max(0, width - width_of(text)), width), "dim")


def _foot(view: View, width: int) -> Text:
    if view.note:
        return Text(fit(printable(view.note), width), "bold yellow")
    keys = Text()
    for key, does in view.keys:
        keys.append(key, "bold").append(f" {does}  ", "dim")
    return _fitted(keys, width)


def _fitted(line: Text, width: int) -> Text:
    """A styled line of printable text in exactly so many cells."""
    fitted = fit(line.plain, width)
    result = Text(fitted)
    for span in line.spans:
        result.stylize(span.style, span.start, min(span.end, len(fitted)))
    if line.style:
        result.stylize(line.style, 0, min(len(line.plain), len(fitted)))
    return result
