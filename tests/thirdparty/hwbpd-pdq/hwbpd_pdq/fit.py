"""
Which slots hold what a claim asks for; and if none can, why not and what comes nearest.

1. access: x for the breakpoint; r, w or rw for a watchpoint. Not both in one.
2. width: addresses have 32 bits, and no span wraps around their end.
3. execution: an instruction is two bytes at an even address.
4. number: a watchpoint holds any neighbouring bytes of one line, which is 16 bytes at an address divisible by 16. A
   longer span takes a watchpoint for each line it touches, and a claim gets no more than the CPU has.

A line has a bit for every byte, so pieces never hold bytes beside a span, and to accept more would save no slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwbpd.core.errors import BadClaim, HwbpError, NotSupported
from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Span
from hwbpd.hookspecs import CpuFacts
from hwbpd_pdq.control import WATCHPOINTS_MAX
from hwbpd_pdq.debug_unit import ADDRESSES_END, DATA, INSTRUCTION_BYTES, LINE_BYTES, READ_WRITE, PdqDebugUnit
from hwbpd_pdq.handling import PdqHandling


class PdqBackend:
    """The slots of a PDQ-1: one breakpoint, and up to three watchpoints."""

    name = "pdq"

    def __init__(self, facts: CpuFacts) -> None:
        """
        :param facts: ``watchpoints`` matters; where it is None, there is one.
        """
        self._watchpoints = facts.watchpoints or 1
        self._unit = PdqDebugUnit(self._watchpoints)

    def slots(self) -> Mapping[Pool, int]:
        """Two pools, which do not compete."""
        return self._unit.slots()

    def debug_unit(self) -> PdqDebugUnit:
        """The registers themselves."""
        return self._unit

    def handling(self) -> PdqHandling:
        """How a kernel gets past a hit."""
        return PdqHandling(self._unit)

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        """
        Return the pieces that hold ``span``, one for each line, in ascending order.

        :raises BadClaim: for a rule of this file that is broken, with the nearest request that keeps all of them.
        :raises NotSupported: for rule 4, where a CPU with more watchpoints could.
        """
        slots = len(_lines(span))
        if access != Access.EXECUTE and access not in DATA:  # rule 1
            raise self._refusal(BadClaim, span, access, "DCTL has bits for r, w and rw, and a slot of its own for x")
        if span.length_bytes < 1 or not 0 <= span.address <= ADDRESSES_END - span.length_bytes:  # rule 2
            raise self._refusal(BadClaim, span, access, "a span has at least a byte, and addresses have 32 bits")
        if access == Access.EXECUTE:
            if span.address % INSTRUCTION_BYTES or span.length_bytes != INSTRUCTION_BYTES:  # rule 3
                raise self._refusal(BadClaim, span, access, "an instruction is 2 bytes at an even address")
            return Plan((Piece(span, access, Pool.INST),))
        if slots > self._watchpoints:  # rule 4
            refusal = NotSupported if slots <= WATCHPOINTS_MAX else BadClaim
            rule = f"it takes {slots} slots, and this CPU has {self._watchpoints}: one holds bytes of a line of 16"
            raise self._refusal(refusal, span, access, rule)
        end = _end(span)
        parts = ((max(line, span.address), min(line + LINE_BYTES, end)) for line in _lines(span))
        return Plan(tuple(Piece(Span(low, high - low), access, Pool.DATA) for low, high in parts))

    def describe(self) -> Mapping[str, Any]:
        """What the slots can hold, for ``hwbpctl caps``."""
        lengths = {access.letters: list(range(1, LINE_BYTES + 1)) for access in DATA} | {"x": [INSTRUCTION_BYTES]}
        return {
            "lengths": lengths,
            "default_lengths": {"r": 4, "w": 4, "rw": 4, "x": INSTRUCTION_BYTES},
            "reports": dict.fromkeys(lengths, "before"),
            "notes": ["one watchpoint holds any neighbouring bytes of an aligned line of 16"],
        }

    def _refusal(self, refusal: type[HwbpError], span: Span, access: Access, rule: str) -> HwbpError:
        nearest = _as_perf_writes(*self._nearest(span, access))
        return refusal(f"{_as_perf_writes(span, access)}: {rule}; nearest: {nearest}")

    def _nearest(self, span: Span, access: Access) -> tuple[Span, Access]:
        """The request that keeps every rule and begins where this one does, or as near as it can."""
        first = min(max(span.address, 0), ADDRESSES_END - INSTRUCTION_BYTES)
        if access == Access.EXECUTE:
            return Span(first - first % INSTRUCTION_BYTES, INSTRUCTION_BYTES), access
        last_line = first - first % LINE_BYTES + (self._watchpoints - 1) * LINE_BYTES
        end = min(max(_end(span), first + 1), last_line + LINE_BYTES, ADDRESSES_END)
        return Span(first, end - first), access & READ_WRITE or READ_WRITE


def _end(span: Span) -> int:
    return span.address + span.length_bytes


def _lines(span: Span) -> range:
    """The lines that a span touches, by their addresses."""
    return range(span.address - span.address % LINE_BYTES, _end(span), LINE_BYTES)


def _as_perf_writes(span: Span, access: Access) -> str:
    return f"mem:{span.address:#x}/{span.length_bytes}" + (f":{access.letters}" if access else "")
