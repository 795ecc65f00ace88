"""
Values -> text for people, and plain values for ``--json``. Pure: nothing here asks or prints.

A claim is one line of 80 columns: where room is short its label gives way, then the owner's name, never a number. CPUs
that look the same are shown once, so that a machine of 256 CPUs is as readable as one of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from hwbp import Capabilities, ClaimRow, Counts, CpuRow, Hit, HwbpError, ResourceRow, Slots, Why, format_cpus

WIDTH = 80
_OWNER_MIN = 12  # columns, enough for the longest pid
_HEAD = ("CLAIM", "OWNER", "UID", "KIND", "SPAN", "ACC", "AGE", "HITS", "STATE", "LABEL")
_RIGHT = {"CLAIM", "UID", "AGE", "HITS"}


# --- who holds what --------------------------------------------------------------------------------------------------


def slots(value: Slots, width: int = WIDTH) -> str:
    """Return who holds what: CPU-wide claims under their CPUs, then the tasks."""
    groups = [(_cpus_title(value.pools, rows), held) for rows, held in _cpu_groups(value)]
    tasks: dict[tuple[int, tuple[int, ...] | None], list[ResourceRow]] = {}
    for resource in value.resources:
        if resource.tid:
            tasks.setdefault((resource.tid, resource.cpus), []).append(resource)
    for (tid, cpus), held in sorted(tasks.items(), key=lambda task: task[0][0]):
        on = "" if cpus is None else f" on cpu {format_cpus(cpus)}"
        groups.append((f"tid {tid}{on}: {_plural(len(held), 'slot')}", held))

    tables = [[_claim_cells(resource, claim) for resource in held for claim in resource.claims] for _, held in groups]
    lines = _table([row for table in tables for row in table], width)
    text: list[str] = lines[:1]
    rest = iter(lines[1:])
    for (title, _), table in zip(groups, tables, strict=True):
        text += [title, *(next(rest) for _ in table)]
    return "\n".join(text)


def _cpu_groups(value: Slots) -> list[tuple[list[CpuRow], list[ResourceRow]]]:
    """Return CPUs that look the same together, in the order of their first, with the CPU-wide slots they hold."""
    groups: dict[str, tuple[list[CpuRow], list[ResourceRow]]] = {}
    wide = [resource for resource in value.resources if not resource.tid]
    for row in value.cpus:
        held = [each for each in wide if (row.online if each.cpus is None else row.cpu in each.cpus)]
        numbers = [each.resource for each in held]
        look = repr((row.online, sorted(row.cpu_wide.items()), sorted(row.busiest_task.items()), numbers))
        groups.setdefault(look, ([], held))[0].append(row)
    return list(groups.values())


def _cpus_title(pools: Mapping[str, int], rows: Sequence[CpuRow]) -> str:
    name = f"cpu {format_cpus(row.cpu for row in rows)}"
    row = rows[0]
    if not row.online:
        return f"{name}: offline"
    parts = []
    for pool, slots_per_cpu in pools.items():
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
        f"{resource.address:#x}/{resource.length}",
        resource.access + mode,
        age(claim.age_ns),
        amount(claim.hits),
        state,
        claim.label,
    )


def _table(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Return the head and one line per row, indented by two; without rows, nothing."""
    if not rows:
        return []
    labelled = any(row[-1] for row in rows)
    cells = [list(_HEAD if labelled else _HEAD[:-1]), *(list(row if labelled else row[:-1]) for row in rows)]
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
    return ["  " + _line(row, widths) for row in cells]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if head in _RIGHT else cell.ljust(width)
        for cell, width, head in zip(row, widths, _HEAD, strict=False)
    ]
    return " ".join(padded).rstrip()


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


def _short_owner(owner: str, width: int) -> str:
    comm, _, pid = owner.rpartition("[")
    return f"{_short(comm, width - len(pid) - 1)}[{pid}"


def age(age_ns: int) -> str:
    """Return a duration in the one or two units that matter: ``12s``, ``3m05s``, ``2h10m``, ``4d03h``."""
    seconds = age_ns // 1_000_000_000
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02}h"


def amount(number: int) -> str:
    """Return a number in at most five characters: as it is up to 99999, then ``1234k``, ``12M``."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < (100_000 if not unit else 10_000):
            return f"{number}{unit}"
        number = number // 1000
    return f"{number}E"


# --- single answers --------------------------------------------------------------------------------------------------


def capabilities(value: Capabilities) -> str:
    """Return what the machine's registers can hold."""
    named = len(value.pools) > 1
    pools = ", ".join(f"{count} ({pool})" if named else str(count) for pool, count in value.pools.items())
    lines = [
        f"machine        {value.machine}",
        f"backend        {value.backend} ({value.architecture})",
        f"slots per cpu  {pools}",
        f"cpus           {format_cpus(value.cpus_online)} online, {format_cpus(value.cpus_possible)} possible",
    ]
    defaults, reports = value.registers.get("default_lengths", {}), value.registers.get("reports", {})
    for access, lengths in value.registers.get("lengths", {}).items():
        default = f", {defaults[access]} if none is given" if access in defaults else ""
        when = f"; reported {reports[access]} the access" if access in reports else ""
        lines.append(f"{access:<14} {_ranges(lengths)} bytes{default}{when}")
    lines += [f"{name:<30} {limit}" for name, limit in value.limits.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in value.registers.get("notes", ()))])


def _ranges(lengths: Sequence[int]) -> str:
    if len(lengths) > 8:
        return f"{lengths[0]} to {lengths[-1]}"
    return ", ".join(map(str, lengths))


def why(value: Why) -> str:
    """Return the story of a claim."""
    return "\n".join([f"claim {value.claim}: {value.state}", *(f"  {line}" for line in value.lines)])


def counts(value: Counts) -> str:
    """Return what became of the hits of a claim."""
    return f"{_plural(value.hits, 'hit')}: {value.delivered} delivered, {value.lost} lost, {value.dropped} dropped"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def refusal(error: HwbpError) -> str:
    """Return the lines that say what could not be done and who is in the way."""
    lines = [f"hwbpctl: {error.errno_name}: {error}", *(f"  held by {holder}" for holder in error.holders)]
    if error.claim_id:
        lines.append(f"  the whole story: hwbpctl why {error.claim_id}")
    return "\n".join(lines)


# --- hits and counts -------------------------------------------------------------------------------------------------


def hit(value: Hit, comm: str, where: str, event: str = "") -> str:
    """Return one line for one hit; ``where`` is what is known of the instruction pointer, ``event`` may be left out."""
    time_s, rest_ns = divmod(value.time_ns, 1_000_000_000)
    owner = f"{comm}[{value.pid}]" if value.pid == value.tid else f"{comm}[{value.pid}/{value.tid}]"
    line = f"{time_s:7}.{rest_ns // 1000:06} {owner:<20} cpu {value.cpu:<3} {value.ip:#x} {where}"
    return f"{line.rstrip()} {event}".rstrip()


def chain_entry(ip: int, where: str) -> str:
    """Return one line for one entry of a call chain."""
    return f"{'':16}{ip:#x} {where}".rstrip()


def stat(results: Sequence[tuple[str, Counts]], of_what: str, elapsed_s: float) -> str:
    """Return counts as perf stat shows them."""
    rows = [f"{counts.hits:>18,}      {event}" for event, counts in results]
    return "\n".join(["", f" Counts for {of_what}:", "", *rows, "", f"{elapsed_s:18.9f} seconds elapsed", ""])


# --- for programs ----------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """
    Return an answer as JSON can say it.

    Addresses become text, ``"0x404040"``: many readers of JSON keep numbers as doubles, and these have 64 bits.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: f"{each:#x}" if key == "address" else plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def plain_hit(value: Hit, claim_id: int, event: str, comm: str, where: str) -> dict[str, Any]:
    """Return one hit as JSON can say it; instruction pointers are text, as addresses are."""
    line: dict[str, Any] = {"type": "hit", "claim": claim_id, "event": event, "time_ns": value.time_ns}
    line |= {"pid": value.pid, "tid": value.tid, "comm": comm, "cpu": value.cpu, "in_kernel": value.in_kernel}
    line |= {"ip": f"{value.ip:#x}", "where": where, "address": f"{value.address:#x}"}
    for name, chain in (("kernel_chain", value.kernel_chain), ("user_chain", value.user_chain)):
        if chain:
            line[name] = [f"{ip:#x}" for ip in chain]
    return line


def plain_refusal(error: HwbpError) -> dict[str, Any]:
    """Return a refusal as JSON can say it."""
    answer: dict[str, Any] = {"errno": error.errno_name, "class": type(error).__name__, "sentence": str(error)}
    return answer | {"claim": error.claim_id, "holders": [plain(holder) for holder in error.holders]}
