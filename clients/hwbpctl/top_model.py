"""
What ``hwbpctl top`` knows when it draws: claims as one row each, with rates from two looks. Pure.

The rate of a claim is its hits between two looks over the time between them, and both come from the daemon in one
answer: a claim's age is how its clock is read, so neither the way to us nor our own pace falsifies the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hwbp import ClaimRow, Decision, ResourceRow, Slots, WaitingRow, format_cpus


@dataclass(frozen=True, slots=True)
class Row:
    """
    One claim, over all its slots, or one that waits and has none: then ``hits`` is None.

    ``hits_per_s`` is None where only one look has seen it.
    """

    claim: int
    owner: str
    uid: int
    kind: str
    target: str
    span: str  # and access, as perf writes it: "0x404040/8:w"
    hits_per_s: float | None
    hits: int | None
    lost: int
    dropped: int
    state: str
    age_ns: int
    label: str
    position: int = 0  # in the queue, from 1
    blockers: tuple[int, ...] = ()  # claims in its way


@dataclass(frozen=True, slots=True)
class View:
    """All that a frame shows."""

    daemon: str = ""  # machine, backend and socket
    clock: str = ""  # the time of day
    slots: Slots | None = None  # None: nobody answers
    rows: tuple[Row, ...] = ()  # as sorted
    sort: str = "claim"
    selected: int = 0  # a claim
    told: tuple[tuple[str, Decision | str], ...] = ()  # time of day and what was decided, oldest first
    missed: int = 0  # decisions that never came
    pane: tuple[str, tuple[str, ...]] | None = None  # title and lines, in place of the decisions
    note: str = ""  # in place of the keys: a question, an answer
    trouble: str = ""  # why the daemon cannot be asked
    keys: Sequence[tuple[str, str]] = ()


def _target(resource: ResourceRow) -> str:
    on = "" if resource.cpus is None else f"cpu {format_cpus(resource.cpus)}"
    if resource.is_cpu_wide:
        return on or "all cpus"
    if resource.vcpu:
        return f"vcpu {resource.vcpu}"
    task = f"pid {resource.pid}" if resource.pid else f"tid {resource.tid}"
    return f"{task} {on}".rstrip()


def _span(pieces: Sequence[ResourceRow]) -> str:
    """What the slots of a claim cover together."""
    first = pieces[0]
    mode = "" if first.user and first.kernel else ":u" if first.user else ":k"
    known = [(piece.address, piece.length) for piece in pieces if piece.address is not None]
    if len(known) < len(pieces):
        return f"-/{sum(piece.length for piece in pieces)}:{first.access}{mode}"
    begin = min(address for address, _ in known)
    end = max(address + length for address, length in known)
    return f"{begin:#x}/{end - begin}:{first.access}{mode}"


def _by_claim(slots: Slots) -> dict[int, tuple[ClaimRow, list[ResourceRow], int, int]]:
    """Each claim with its slots, and its hits and those that its rings lost over all of them."""
    found: dict[int, tuple[ClaimRow, list[ResourceRow], int, int]] = {}
    for resource in slots.resources:
        for claim in resource.claims:
            _, pieces, hits, lost = found.get(claim.claim, (claim, [], 0, 0))
            found[claim.claim] = (claim, [*pieces, resource], hits + claim.hits, lost + claim.lost)
    return found


def rows_of(now: Slots, before: Slots | None) -> list[Row]:
    """Return the claims of a look in the order of their numbers, with rates since the look before."""
    earlier = {} if before is None else _by_claim(before)
    waited = set() if before is None else {row.claim for row in before.waiting}  # what they have now came at once
    rows = [_waiting(row) for row in now.waiting]
    for claim, pieces, hits, lost in _by_claim(now).values():
        then = earlier.get(claim.claim)
        elapsed_ns = claim.age_ns - (then[0].age_ns if then else 0)
        since = hits - (then[2] if then else 0)
        is_known = before is not None and elapsed_ns > 0 and claim.claim not in waited
        rate = since * 1e9 / elapsed_ns if is_known else None
        state = "held" if pieces[0].delivery == "hold" and claim.state == "armed" else claim.state
        rows.append(
            Row(
                claim.claim,
                f"{claim.comm}[{claim.pid}]",
                claim.uid,
                claim.kind,
                _target(pieces[0]),
                _span(pieces),
                rate,
                hits,
                lost,
                claim.dropped,
                state,
                claim.age_ns,
                claim.label,
            )
        )
    return sorted(rows, key=lambda row: row.claim)


def _waiting(row: WaitingRow) -> Row:
    target = row.target.removeprefix("cpu-wide on ")
    span = f"{'-' if row.address is None else f'{row.address:#x}'}/{row.length}:{row.access}"
    return Row(
        row.claim,
        f"{row.comm}[{row.pid}]",
        row.uid,
        row.kind,
        target,
        span,
        None,
        None,
        0,
        0,
        row.state,
        row.age_ns,
        row.label,
        row.position,
        row.blockers,
    )


ORDERS: Mapping[str, Callable[[Row], tuple[object, ...]]] = {
    "claim": lambda row: (row.claim,),
    "rate": lambda row: (-(row.hits_per_s or 0.0), row.claim),
    "owner": lambda row: (row.owner, row.claim),
    "target": lambda row: (row.target, row.claim),
}


def next_order(name: str) -> str:
    """The order after this one."""
    names = list(ORDERS)
    return names[(names.index(name) + 1) % len(names)]


def moved(rows: Sequence[Row], selected: int, by: int, at: int = 0) -> int:
    """
    Return the claim that is selected ``by`` rows further, 0 where there are none.

    :param at: the row to start from where the selected claim is gone.
    """
    if not rows:
        return 0
    return rows[max(0, min(len(rows) - 1, index_of(rows, selected, at) + by))].claim


def index_of(rows: Sequence[Row], claim: int, otherwise: int = 0) -> int:
    """Return the row of a claim."""
    return next((index for index, row in enumerate(rows) if row.claim == claim), otherwise)
