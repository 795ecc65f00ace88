"""
What one vCPU's debug registers are to hold, and what its VMM has said of it.

The VMM is always told the whole file, never a change: whatever it has missed, what it loads is a state that was wanted,
with no more slots than there are. It is told again only once it has answered (``answered``), so however fast claims
come and go, one message is on its way to it. What the daemon books is free or taken at once; the vCPU follows at its
next entry.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from hwbpd import contents
from hwbpd.core.errors import BadClaim
from hwbpd.core.model import Delivery, Mode, Piece, Totals
from hwbpd.debug_unit import Slot
from hwbpd.hookspecs import Backend, Batch

# docs/protocol.md, "Hit records".
_RECORD: Final = struct.Struct("=IHHQIIQQII")
_SAMPLE: Final = 9
_GUEST_KERNEL: Final = 4
_GUEST_USER: Final = 5


class Place(Struct, frozen=True):
    """Where something happened: on the vCPU's thread, in the VMM's process."""

    pid: int
    tid: int
    number: int  # of the vCPU


class Entry:
    """One slot of the file."""

    __slots__ = ("is_armed", "piece", "records", "slot", "totals", "wants_records")

    def __init__(self, slot: Slot, piece: Piece, mode: Mode) -> None:
        self.slot = slot
        self.piece = piece
        self.is_armed = mode.delivery is not Delivery.HOLD
        self.wants_records = mode.delivery is Delivery.HITS
        self.records: deque[bytes] = deque()  # reported and not drained yet
        self.totals = 0


class SlotFile:
    """
    The slots of one vCPU, as ``backend`` has them; resources by their ids.

    :param has_news: called whenever ``news`` may have something to tell.
    """

    def __init__(self, backend: Backend, has_news: Callable[[], None]) -> None:
        self.backend = backend
        self._has_news = has_news
        self.entries: dict[int, Entry] = {}
        self.version = 0  # of what was told last
        self.is_awaited = False  # it has not been answered yet
        self._is_changed = False
        self._told: frozenset[int] = frozenset()
        self.loaded: frozenset[int] = frozenset()

    @property
    def is_loaded(self) -> bool:
        """Whether the VMM has loaded all that is wanted, as far as it has said."""
        return not (self._is_changed or self.is_awaited)

    def put(self, resource_id: int, piece: Piece, mode: Mode) -> None:
        """A slot is taken. The caller has asked ``admission.fits``."""
        number = contents.lowest_free((entry.slot for entry in self.entries.values()), piece.pool)
        self.entries[resource_id] = Entry((piece.pool, number), piece, mode)
        self._changed(self.entries[resource_id].is_armed)

    def take_out(self, resource_id: int) -> tuple[Batch, Totals]:
        """It is free again; return what was reported and not drained, and all there was."""
        batch = self.drain(resource_id)
        entry = self.entries.pop(resource_id)
        self._changed(entry.is_armed)
        return batch, Totals(entry.totals)

    def arm(self, resource_id: int, is_armed: bool) -> None:
        """Let it report again, or not."""
        entry = self.entries[resource_id]
        self._changed(entry.is_armed != is_armed)
        entry.is_armed = is_armed

    def _changed(self, is_change: bool) -> None:
        if is_change:
            self._is_changed = True
            self._has_news()

    def news(self) -> tuple[dict[int, Entry], dict[str, int]] | None:
        """Return what the VMM has to be told now, resources and registers; None if nothing, or it owes an answer."""
        if self.is_awaited or not self._is_changed:
            return None
        armed = {resource_id: entry for resource_id, entry in self.entries.items() if entry.is_armed}
        self.version += 1
        self.is_awaited, self._is_changed = True, False
        self._told = frozenset(armed)
        wanted = {entry.slot: entry.piece for entry in armed.values()}
        return armed, contents.registers(self.backend, wanted)

    def answered(self, version: int, failed: bool) -> list[int]:
        """
        The VMM has loaded what it was told, or could not.

        :return: the resources that this answer is the first one about, those that are not held any more left out.
        :raises BadClaim: for an answer to nothing.
        """
        if not self.is_awaited or version != self.version:
            raise BadClaim(f"version {version} waits for no answer; the last one told is {self.version}")
        self.is_awaited = False
        self._has_news()
        new = sorted(self._told - self.loaded)
        if not failed:
            self.loaded = self._told
        return [resource_id for resource_id in new if resource_id in self.entries]

    def hit(self, resource_id: int, place: Place, ip: int, in_kernel: bool, now_ns: int) -> bool:
        """A slot was hit; false if it is not armed any more, and the hit is nobody's."""
        entry = self.entries.get(resource_id)
        if entry is None or not entry.is_armed:
            return False
        entry.totals += 1
        if entry.wants_records:
            mode = _GUEST_KERNEL if in_kernel else _GUEST_USER
            address = entry.piece.span.address
            entry.records.append(
                _RECORD.pack(
                    _SAMPLE, mode, _RECORD.size, ip, place.pid, place.tid, now_ns, address, place.number, 0
                )
            )
        return True

    def drain(self, resource_id: int) -> Batch:
        """Take what was reported."""
        records = self.entries[resource_id].records
        batch = Batch(b"".join(records), len(records), 0, False)
        records.clear()
        return batch
