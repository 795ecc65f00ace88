"""
Values -> text for people, and plain values for ``--json``. Pure: nothing here asks or prints.

The tables of ``ls`` are in ``listing.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

from hwbp import Capabilities, Change, Counts, Fit, Hit, HwbpError, Pending, Plan, Why, format_cpus

# --- single answers --------------------------------------------------------------------------------------------------


def capabilities(value: Capabilities) -> str:
    """Return what the machine's registers can hold."""
    everywhere = " wherever it runs; bound to a cpu:" if value.pools_on else ""
    lines = [
        f"machine        {value.machine}",
        f"backend        {value.backend} ({value.architecture})",
        f"slots per cpu  {_per_pool(value.pools)}{everywhere}",
        *(f"  cpu {format_cpus(row.cpus):<9}{_per_pool(row.pools)}" for row in value.pools_on),
        f"cpus           {format_cpus(value.cpus_online)} online, {format_cpus(value.cpus_possible)} possible",
    ]
    defaults, reports = value.registers.get("default_lengths", {}), value.registers.get("reports", {})
    for access, lengths in value.registers.get("lengths", {}).items():
        default = f", {defaults[access]} if none is given" if access in defaults else ""
        when = f"; reported {reports[access]} the access" if access in reports else ""
        lines.append(f"{access:<14} {_ranges(lengths)} bytes{default}{when}")
    lines += [f"{name:<30} {limit}" for name, limit in value.limits.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in value.registers.get("notes", ()))])


def _per_pool(pools: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({pool})" if len(pools) > 1 else str(count) for pool, count in pools.items())


def _ranges(lengths: Sequence[int]) -> str:
    """Return lengths, ascending, in few words and never other ones."""
    first, last = lengths[0], lengths[-1]
    if len(lengths) > 2 and last - first == len(lengths) - 1:
        return f"{first} to {last}"
    if len(lengths) > 4 and all(later == 2 * length for length, later in pairwise(lengths)):
        return f"powers of two from {first} to 2^{last.bit_length() - 1}"
    return ", ".join(map(str, lengths))


def why(value: Why) -> str:
    """Return the story of a claim, or of a refusal that is nobody's in particular."""
    if not value.claim:
        return "\n".join(value.lines)
    return "\n".join([f"claim {value.claim}: {value.state}", *(f"  {line}" for line in value.lines)])


def waiting(value: Pending) -> str:
    """Return the line that tells the place of a claim that waits, and behind whom."""
    behind = f"behind {', '.join(map(str, value.holders))}" if value.holders else value.sentence
    return f"hwbpctl: claim {value.claim_id} ({value.event}) waiting, {ordinal(value.position)}: {behind}"


def counts(value: Counts) -> str:
    """Return what became of the hits of a claim."""
    filtered = f", {value.filtered} of other processes" if value.filtered else ""
    ours = f"{value.delivered} delivered, {value.lost} lost, {value.dropped} dropped"
    return f"{plural(value.hits, 'hit')}: {ours}{filtered}"


def fit(value: Fit, of_what: str) -> str:
    """Return whether a claim would fit, with which slots, or who is in the way."""
    plan = f"{plural(len(value.pieces), 'slot')} on {of_what}: {_pieces(value)}{_beside(value)}"
    if value.fits:
        first = f", {value.first}" if value.first else ""
        outside = "slots held outside hwbpd show only when a claim is made, or in hwbpctl ls --foreign"
        return f"fits, with {plan}{first}\n{outside}"
    if value.refusal is None:
        return f"does not fit: {plan}"
    holders = [f"  held by {holder}" for holder in value.refusal.holders]
    return "\n".join([f"does not fit: {value.refusal.errno_name}: {value.refusal}", *holders, f"  it takes {plan}"])


def plan(value: Plan) -> str:
    """Return which slots an event takes, of how many that each CPU has."""
    named = len(value.pools) > 1
    lines = []
    for pool, slots in value.slots.items():
        of_pool = f" {pool}" if named else ""
        lines.append(f"takes {slots} of the {plural(value.pools[pool], f'{of_pool} slot'.strip())} of a cpu")
    lines[-1] += f": {_pieces(value)}{_beside(value)}"
    return "\n".join(lines)


def _pieces(value: Fit | Plan) -> str:
    return ", ".join(f"{piece.address:#x}/{piece.length}:{piece.access}" for piece in value.pieces)


def _beside(value: Fit | Plan) -> str:
    if not value.over_reported:
        return ""
    return f"; reports accesses to {plural(value.over_reported, 'byte')} beside what was asked for, too"


def change(claim_id: int, event: str, value: Change) -> str:
    """Return the line that tells what happened to a claim that goes on."""
    remedy = f" (hwbpctl rearm {claim_id})" if value.what == "guarded" else ""
    return f"hwbpctl: claim {claim_id} ({event}) {value.what}: {value.sentence}{remedy}"


def refusal(error: HwbpError) -> str:
    """Return the lines that say what could not be done and who is in the way."""
    lines = [f"hwbpctl: {error.errno_name}: {error}", *(f"  held by {holder}" for holder in error.holders)]
    if error.claim_id:
        lines.append(f"  the whole story: hwbpctl why {error.claim_id}")
    return "\n".join(lines)


# --- numbers ---------------------------------------------------------------------------------------------------------


def plural(number: int, noun: str) -> str:
    """Return ``1 slot``, ``2 slots``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def ordinal(number: int) -> str:
    """Return ``1st``, ``2nd``, ``11th``."""
    ending = "th" if 10 < number % 100 < 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


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


def stat(results: Sequence[tuple[str, Counts, bool]], of_what: str, elapsed_s: float) -> str:
    """Return counts as perf stat shows them: event, counts, and whether counting was cut short by the guard."""
    rows = [
        f"{counts.hits:>18,}      {event}{'  (guarded: the count stopped)' if guarded else ''}"
        for event, counts, guarded in results
    ]
    return "\n".join(["", f" Counts for {of_what}:", "", *rows, "", f"{elapsed_s:18.9f} seconds elapsed", ""])


# --- for programs ----------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """
    Return an answer as JSON can say it.

    Addresses become text, ``"0x404040"``: many readers of JSON keep numbers as doubles, and these have 64 bits.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, HwbpError):
        return plain_refusal(value)
    if isinstance(value, Mapping):
        return {
            key: f"{each:#x}" if key == "address" and each is not None else plain(each) for key, each in value.items()
        }
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


def plain_change(claim_id: int, event: str, value: Change) -> dict[str, Any]:
    """Return what happened to a claim that goes on as JSON can say it."""
    line: dict[str, Any] = {"type": value.what, "claim": claim_id, "event": event, "sentence": value.sentence}
    line["cpu"] = value.cpu
    if value.holders:
        line["holders"] = [plain(holder) for holder in value.holders]
    return line | ({"deadline_ns": value.deadline_ns} if value.deadline_ns else {})


def plain_waiting(value: Pending) -> dict[str, Any]:
    """Return the place of a claim that waits as JSON can say it."""
    line: dict[str, Any] = {"type": "waiting", "claim": value.claim_id, "event": str(value.event)}
    line |= {"position": value.position, "sentence": value.sentence}
    return line | {"holders": [plain(holder) for holder in value.holders]}


def plain_refusal(error: HwbpError) -> dict[str, Any]:
    """Return a refusal as JSON can say it."""
    answer: dict[str, Any] = {"errno": error.errno_name, "class": type(error).__name__, "sentence": str(error)}
    return answer | {"claim": error.claim_id, "holders": [plain(holder) for holder in error.holders]}
