"""
What registers hold when pieces are armed in them, as values: what a VMM loads, and what it finds of the host's.

A register that is not in the answer holds what it holds after a reset. Where nobody has modelled the registers there
are no values, only pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count

from hwbpd.core.books import Books
from hwbpd.core.errors import CpuOffline
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Delivery, Piece, Pool, Resource, Task
from hwbpd.debug_unit import Armed, Slot
from hwbpd.hookspecs import Backend

_IN_FORCE = frozenset({State.ARMED, State.YIELDING, State.TAKEN})


def registers(backend: Backend, wanted: Mapping[Slot, Piece]) -> dict[str, int]:
    """Return the values of all registers that differ from those after a reset, once exactly ``wanted`` is armed."""
    unit = backend.debug_unit()
    if unit is None:
        return {}
    file = reset = unit.reset()
    for write in unit.plan(reset, {slot: Armed(piece) for slot, piece in wanted.items()}):
        file = unit.write(file, write.register, write.value)
    return {name: value for name, value in file.items() if value != reset[name]}


def of_host(books: Books, cpu: int, task: Task | None) -> list[tuple[Slot, Resource]]:
    """
    Return what the books have in force on a CPU, for whatever runs there and for a thread, oldest first.

    The numbers are places: Linux may have the same contents in other registers. What is held and not armed, guarded, or
    on its way is not in it; of what a tracer has taken, what it claimed.

    :raises CpuOffline: for a CPU that is not there.
    """
    if cpu not in books.online:
        raise CpuOffline(f"cpu {cpu} is offline or not there: no register holds anything")
    placed: list[tuple[Slot, Resource]] = []
    for pool in books.pools:
        ids = books.cpu_wide_on(cpu, pool) + (books.of_task(task, cpu, pool) if task is not None else [])
        numbers = count()
        in_force = (books.resources[one] for one in sorted(ids) if _is_in_force(books, one))
        placed += [((pool, number), resource) for number, resource in zip(numbers, in_force, strict=False)]
    return placed


def _is_in_force(books: Books, resource_id: int) -> bool:
    states = {books.claims[claim.claim_id].state for claim in books.riders[resource_id]}
    is_armed = books.resources[resource_id].mode.delivery is not Delivery.HOLD or State.TAKEN in states
    return is_armed and bool(states & _IN_FORCE)


def lowest_free(taken: Iterable[Slot], pool: Pool) -> int:
    """Return the first number of a pool that nobody has."""
    numbers = {number for of_pool, number in taken if of_pool is pool}
    return next(number for number in count() if number not in numbers)
