"""
Who holds what, as ``hwbpctl ls`` shows it: the daemon's claims, those that wait, and those outside it. Pure, like
``render.py``.

A claim is one line of 80 columns: where room is short its label gives way, then the owner's name, never a number. CPUs
that look the same are shown once, so that a machine of 256 CPUs is as readable as one of two. Those that wait stand
below the places, in the order of the queue, with the claims in their way as lslocks(8) has its BLOCKER.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hwbp import ClaimRow, CpuRow, Holder, ResourceRow, Slots, WaitingRow, format_cpus
from hwbpctl.render import age, amount, plural

WIDTH = 80
_OWNER_MIN = 12  # columns, enough for the longest pid
_HEAD = ("CLAIM", "OWNER", "UID", "KIND", "SPAN", "ACC", "AGE", "HITS", "STATE", "LABEL")
_WAITING_HEAD = ("CLAIM", "OWNER", "UID", "KIND", "SPAN", "POS", "LEFT", "STATE", "BLOCKER", "LABEL")
_RIGHT = {"CLAIM", "UID", "AGE", "HITS", "POS", "LEFT"}
_BLOCKERS_SHOWN = 2

_STATES = {  # what the name alone does not say
    "taken": "its tracer has armed it by ptrace, so nobody can take it back",
    "residue": "the claim is over, and the thread keeps the slot until it exits or runs another program",
}

_EVIDENCE = {
    "perf fd": "it has a descriptor that was shown to be a breakpoint",
    "perf fd?": "it has a perf descriptor that may be a breakpoint",
    "tracer": "it traces the thread, whose slots nothing else explains",
    "unattributed": "the kernel counts them, and nobody was found who has them",
}


def slots(value: Slots, now_ns: int, width: int = WIDTH) -> str:
    """
    Return who holds what: CPU-wide claims under their CPUs, then the tasks, then vCPUs; then who waits for what.

    :param now_ns: CLOCK_MONOTONIC, to tell how much of a wait is left.
    """
    groups = [(_cpus_title(value.pools, rows), held) for rows, held in _cpu_groups(value)]
    tasks: dict[tuple[int, int, tuple[int, ...] | None], list[ResourceRow]] = {}
    for resource in value.resources:
        if not (resource.is_cpu_wide or resource.vcpu):
            tasks.setdefault((resource.pid, resource.tid, resource.cpus), []).append(resource)
    for (pid, tid, cpus), held in sorted(tasks.items(), key=lambda task: task[0][0] or task[0][1]):
        on = "" if cpus is None else f" on cpu {format_cpus(cpus)}"
        each = " on each of its threads" if pid else ""
        groups.append((f"{f'pid {pid}' if pid else f'tid {tid}'}{on}: {plural(len(held), 'slot')}{each}", held))

    vcpus: dict[int, list[ResourceRow]] = {}
    for resource in value.resources:
        if resource.vcpu:
            vcpus.setdefault(resource.vcpu, []).append(resource)
    groups += [(f"vcpu {vcpu}: {plural(len(held), 'slot')}", held) for vcpu, held in sorted(vcpus.items())]

    tables = [[_claim_cells(resource, claim) for resource in held for claim in resource.claims] for _, held in groups]
    text = _grouped([title for title, _ in groups], tables, _HEAD, width)
    states = {claim.state for resource in value.resources for claim in resource.claims}
    text += [f"  {state}: {meaning}" for state, meaning in _STATES.items() if state in states]
    if value.waiting:
        text += ["", *_waiting(value.waiting, now_ns, width)]
    return "\n".join(text)


def _grouped(
    titles: Sequence[str], tables: Sequence[Sequence[tuple[str, ...]]], head: Sequence[str], width: int
) -> list[str]:
    """Return tables of the same columns, each under its title, with one head for all."""
    lines = _table([row for table in tables for row in table], head, width)
    text: list[str] = lines[:1]
    rest = iter(lines[1:])
    for title, table in zip(titles, tables, strict=True):
        text += [title, *(next(rest) for _ in table)]
    return text


def _waiting(rows: Sequence[WaitingRow], now_ns: int, width: int) -> list[str]:
    """Return those that wait, under what they wait for."""
    by_target: dict[str, list[WaitingRow]] = {}
    for row in rows:
        by_target.setdefault(row.target, []).append(row)
    titles = [f"waiting for {target}: {plural(len(held), 'claim')}" for target, held in by_target.items()]
    tables = [[_waiting_cells(row, now_ns) for row in held] for held in by_target.values()]
    return _grouped(titles, tables, _WAITING_HEAD, width)


def _waiting_cells(row: WaitingRow, now_ns: int) -> tuple[str, ...]:
    left = "-" if not row.deadline_ns or row.state == "suspended" else age(max(0, row.deadline_ns - now_ns))
    return (
        str(row.claim),
        f"{row.comm}[{row.pid}]",
        str(row.uid),
        f"{row.kind}{row.priority:+}" if row.priority else row.kind,
        f"{'-' if row.address is None else f'{row.address:#x}'}/{row.length}:{row.access}",
        str(row.position),
        left,
        row.state,
        _blockers(row.blockers),
        row.label,
    )


def _blockers(claims: Sequence[int]) -> str:
    """Return claims in few columns; a hyphen where none is in the way, but somebody outside, or the reserve."""
    shown = ",".join(map(str, claims[:_BLOCKERS_SHOWN])) or "-"
    more = len(claims) - _BLOCKERS_SHOWN
    return f"{shown}+{more}" if more > 0 else shown


def _cpu_groups(value: Slots) -> list[tuple[list[CpuRow], list[ResourceRow]]]:
    """Return CPUs that look the same together, in the order of their first, with the CPU-wide slots they hold."""
    groups: dict[str, tuple[list[CpuRow], list[ResourceRow]]] = {}
    wide = [resource for resource in value.resources if resource.is_cpu_wide]
    for row in value.cpus:
        held = [each for each in wide if (row.online if each.cpus is None else row.cpu in each.cpus)]
        numbers = [each.resource for each in held]
        look = repr((row.online, sorted(row.cpu_wide.items()), sorted(row.busiest_task.items()), numbers, row.slots))
        groups.setdefault(look, ([], held))[0].append(row)
    return list(groups.values())


def _cpus_title(pools: Mapping[str, int], rows: Sequence[CpuRow]) -> str:
    name = f"cpu {format_cpus(row.cpu for row in rows)}"
    row = rows[0]
    if not row.online:
        return f"{name}: offline"
    parts = []
    for pool, every_cpu_has in pools.items():
        slots_per_cpu = row.slots.get(pool, every_cpu_has)
        wide, task = row.cpu_wide.get(pool, 0), row.busiest_task.get(pool, 0)
        kind = "" if len(pools) == 1 else f"{pool} "
        used = f" ({wide} cpu-wide, {task} on the busiest task)" if wide or task else ""
        parts.append(f"{slots_per_cpu - wide - task} of {slots_per_cpu} {kind}slots free{used}")
    return f"{name}: {'; '.join(parts)}"


def _claim_cells(resource: ResourceRow, claim: ClaimRow) -> tuple[str, ...]:
    mode = "" if resource.user and resource.kernel else ":u" if resource.user else ":k"
    # A slot that is only held is "armed" as far as room goes, but nothing traps, and that is what people look for.
    state = "held" if resource.delivery == "hold" and claim.state == "armed" else claim.state
    return (
        str(claim.claim),
        f"{claim.comm}[{claim.pid}]",
        str(claim.uid),
        claim.kind,
        f"{'-' if resource.address is None else f'{resource.address:#x}'}/{resource.length}",
        resource.access + mode,
        age(claim.age_ns),
        amount(claim.hits),
        state,
        claim.label,
    )


def _table(rows: Sequence[tuple[str, ...]], head: Sequence[str], width: int) -> list[str]:
    """Return the head and one line per row, indented by two; without rows, nothing."""
    if not rows:
        return []
    labelled = any(row[-1] for row in rows)
    cells = [list(head if labelled else head[:-1]), *(list(row if labelled else row[:-1]) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    excess = sum(widths) + len(widths) + 1 - width  # a space between columns, two before the first
    if excess > 0 and labelled:
        cut = min(excess, widths[-1] - len("LABEL"))
        widths[-1] -= cut
        excess -= cut
    if excess > 0:
        widths[1] = max(_OWNER_MIN, widths[1] - excess)
    for row in cells[1:]:
        row[1] = _short_owner(row[1], widths[1])
        if labelled:
            row[-1] = _short(row[-1], widths[-1])
    return ["  " + _line(row, head, widths) for row in cells]


def _line(row: Sequence[str], head: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if name in _RIGHT else cell.ljust(width)
        for cell, width, name in zip(row, widths, head, strict=False)
    ]
    return " ".join(padded).rstrip()


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


def _short_owner(owner: str, width: int) -> str:
    comm, _, pid = owner.rpartition("[")
    return f"{_short(comm, width - len(pid) - 1)}[{pid}"


# --- outside the daemon ----------------------------------------------------------------------------------------------


def foreign(holders: Sequence[Holder]) -> str:
    """Return who holds slots outside the daemon, and at the end what each sort of evidence means."""
    if not holders:
        return "outside hwbpd: nobody was found"
    rows = [("SLOTS", "PLACE", "WHO", "UID", "EVIDENCE")]
    for holder in holders:
        who = f"{holder.comm}[{holder.pid}]" if holder.pid else "-"
        uid = str(holder.uid) if holder.pid else "-"
        rows.append((str(holder.slots or "?"), holder.place, who, uid, holder.evidence))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["outside hwbpd:"]
    for slots_held, place, who, uid, evidence in rows:
        cells = (slots_held.rjust(widths[0]), place.ljust(widths[1]), who.ljust(widths[2]), uid.rjust(widths[3]))
        lines.append(f"  {' '.join(cells)} {evidence}")
    met = [evidence for evidence in _EVIDENCE if any(holder.evidence == evidence for holder in holders)]
    return "\n".join([*lines, *(f"  {evidence}: {_EVIDENCE[evidence]}" for evidence in met)])
