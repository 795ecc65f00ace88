"""
Which slots hold what a claim asks for; and if none can, why not and what comes nearest.

The rules, in the order in which they are tried:

1. access: R/W of DR7 has codes for execution, for writes, and for reads and writes. There is none for reads alone, nor
   for execution and data in one slot.
2. width: DR0-DR3 hold addresses of the machine's word, and no span wraps around its end.
3. execution: a breakpoint is at one address and has no length of its own (LEN is 0); Linux wants ``sizeof(long)`` there
   and nothing else. It may be anywhere.
4. number: the low bits of the address do not take part in the comparison, so a slot holds an aligned block of data. LEN
   has codes for 1, 2, 4 and 8 bytes, 8 only on a 64-bit kernel; the address masks of AMD's bpext cover greater powers
   of two, and Linux lets them do so for data. Any span is cut into the fewest such blocks; more than the four slots of
   a CPU no claim gets.
5. kernel: at a kernel address only the kernel's hits are worth a slot; Linux refuses one that is not to see them.

What is not decided here: Linux also refuses, with EINVAL, some kernel addresses that only the running kernel knows. See
``KERNEL_NOTES``.

A hit does not say which of a block's bytes was touched. So blocks hold what was asked for and nothing else, unless the
claim accepts hits of bytes beside it (``Mode.over_report``) and that saves slots; even then none reaches from user
addresses to the kernel's or back, where its owner may have no rights.

Intel SDM Vol. 3B, "Breakpoint Field Recognition"; AMD64 APM Vol. 2, "Debug Breakpoint Address Masking"; Linux,
arch/x86/kernel/hw_breakpoint.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from hwbpd.core.errors import BadClaim, HwbpError, NotSupported
from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Span
from hwbpd.cover import aligned
from hwbpd.hookspecs import CpuFacts
from hwbpd.refusals import Asked, sentence
from hwbpd_x86.debug_unit import X86DebugUnit
from hwbpd_x86.dr7 import SLOTS, Len
from hwbpd_x86.handling import X86Handling
from hwbpd_x86.linux import kernel_of
from hwbpd_x86.registers import MASK_BITS, cpu_of

READ_WRITE = Access.READ | Access.WRITE

KERNEL_NOTES = (
    "Linux refuses (EINVAL) any slot on the CPU entry area, the per-CPU offsets, GDT, TSS, TLB state and DR7 shadow",
    "Linux refuses (EINVAL) execution breakpoints in the kernel where kprobes may not go; built without kprobes, all",
)


class X86Backend:
    """DR0-DR3 as Linux hands them out: one pool of four, each slot for a breakpoint or a watchpoint."""

    name = "x86"

    def __init__(self, facts: CpuFacts) -> None:
        """
        :param facts: ``architecture`` is the kernel's, which decides about lengths; of ``features``, "bpext" (address
            masks) and "la57" (five-level paging, in use) matter here.
        """
        self._debug_unit = X86DebugUnit(cpu_of(facts))
        self._handling = X86Handling(self._debug_unit, facts)
        wide = facts.architecture == "x86_64"
        self._word_bytes = 8 if wide else 4
        self._end = 2 ** (8 * self._word_bytes)  # one past the last address
        self._user_top = kernel_of(facts).user_top
        self._has_masks = "bpext" in facts.features
        self._len_lengths = tuple(sorted(code.length_bytes for code in Len if code.length_bytes <= self._word_bytes))
        self._mask_lengths = tuple(2**n for n in range(MASK_BITS + 1) if 2**n > self._word_bytes)
        data = self._len_lengths + (self._mask_lengths if self._has_masks else ())
        self._lengths = {Access.WRITE: data, READ_WRITE: data, Access.EXECUTE: (self._word_bytes,)}
        self._blocks = aligned(data)
        self._blocks_with_masks = aligned(self._len_lengths + self._mask_lengths)

    def slots(self) -> Mapping[Pool, int]:
        """One pool for both uses."""
        return {Pool.ANY: SLOTS}

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        """
        Return the fewest pieces that hold ``span``, in ascending order.

        :raises BadClaim: for a rule of this file that is broken, with the nearest request that keeps all of them.
        :raises NotSupported: for rule 4, where a CPU with address masks has slots enough.
        """
        address, length = span.address, span.length_bytes
        if access not in self._lengths:  # rule 1
            raise self._refusal(BadClaim, span, access, mode, _why_not_access(access))
        if address < 0 or length < 1 or address + length > self._end:  # rule 2
            rule = f"DR0-DR3 are {8 * self._word_bytes} bits wide, and a span may not reach beyond or wrap around"
            if length < 1:
                rule = "a slot holds at least one byte"
            raise self._refusal(BadClaim, span, access, mode, rule)
        if access == Access.EXECUTE:
            if length != self._word_bytes:  # rule 3
                rule = f"LEN of an execution breakpoint is always 0 in DR7, which Linux calls {self._word_bytes} bytes"
                raise self._refusal(BadClaim, span, access, mode, rule)
            blocks = [span]
        else:
            reach = self._reach(span) if mode.over_report else None
            cost = self._blocks.cost(span, reach)
            if cost is None or cost.slots > SLOTS:  # rule 4
                refusal = NotSupported if self._would_do_with_masks(span, reach) else BadClaim
                raise self._refusal(refusal, span, access, mode, self._why_not_number(span, mode))
            blocks = list(self._blocks.cover(span, reach))
        # Rule 5. The first byte tells for all: a block of LEN does not straddle a page, Linux gives execution
        # breakpoints one byte here, and for a masked block it looks no further either.
        if blocks[-1].address >= self._user_top and not mode.kernel:
            rule = f"addresses from {self._user_top:#x} on are the kernel's, and its hits are not asked for"
            raise self._refusal(BadClaim, span, access, mode, rule)
        return Plan(tuple(Piece(block, access, Pool.ANY) for block in blocks))

    def debug_unit(self) -> X86DebugUnit:
        """The registers themselves, which can do more than Linux asks of them."""
        return self._debug_unit

    def handling(self) -> X86Handling:
        """What Linux does with them."""
        return self._handling

    def describe(self) -> Mapping[str, Any]:
        """What the slots can hold, for ``hwbpctl caps``."""
        notes = [
            f"DR0-DR3: {SLOTS} slots, each for a breakpoint or a watchpoint; Linux picks the register",
            "there is no read-only watchpoint; rw reports reads and writes, and does not say which it was",
            f"an execution breakpoint always has length {self._word_bytes}, and may be at any address",
            "one slot holds these lengths at an address divisible by them; other spans of data take several slots",
        ]
        if self._has_masks:
            notes.append(f"lengths above {self._word_bytes} use the address masks (bpext), and are for data only")
        notes += KERNEL_NOTES
        return {
            "lengths": {access.letters: list(lengths) for access, lengths in self._lengths.items()},
            "default_lengths": {"w": 4, "rw": 4, "x": self._word_bytes},
            "reports": {"w": "after", "rw": "after", "x": "before"},
            "notes": notes,
        }

    def _reach(self, span: Span) -> Span | None:
        """How far blocks may hold bytes beside a span; None for one that is on both sides of the border already."""
        low, high = (0, self._user_top) if span.address < self._user_top else (self._user_top, self._end)
        return Span(low, high - low) if _end(span) <= high else None

    def _would_do_with_masks(self, span: Span, reach: Span | None) -> bool:
        cost = self._blocks_with_masks.cost(span, reach)
        return not self._has_masks and cost is not None and cost.slots <= SLOTS

    def _why_not_number(self, span: Span, mode: Mode) -> str:
        *most, last = self._len_lengths
        holds = f"one holds {', '.join(map(str, most))} or {last} bytes, at an address divisible by that"
        if self._has_masks:
            holds = f"one holds a power of two up to 2^{MASK_BITS} bytes, at an address divisible by it"
        exact = self._blocks.cost(span)
        wide = self._blocks.cost(span, self._reach(span))
        assert exact is not None
        assert wide is not None
        rule = f"it takes {(wide if mode.over_report else exact).slots} slots, and a CPU has {SLOTS}: {holds}"
        if self._would_do_with_masks(span, self._reach(span) if mode.over_report else None):
            rule += "; this CPU lacks the address masks (bpext) that would hold it"
        if not mode.over_report and wide.slots <= SLOTS:
            rule += f"; {wide.slots} would do with over-report, and report {wide.length_bytes} bytes"
        return rule

    def _refusal(self, refusal: type[HwbpError], span: Span, access: Access, mode: Mode, rule: str) -> HwbpError:
        asked = Asked(span, access, mode)
        return refusal(sentence(asked, rule, self._nearest(span, access, mode)))

    def _nearest(self, span: Span, access: Access, mode: Mode) -> Asked:
        """
        Return the request that keeps every rule and is nearest to this one.

        Of data it holds as many of the bytes asked for as the slots of a CPU can, all of them where that is possible,
        and no others. Where execution and data were asked for, it is the data.
        """
        if access not in self._lengths:
            access = Access.WRITE if Access.WRITE in access and Access.READ not in access else READ_WRITE
        first = min(max(span.address, 0), self._end - 1)
        if access == Access.EXECUTE:
            near: Span | None = Span(min(first, self._end - self._word_bytes), self._word_bytes)
        else:
            end = min(max(_end(span), first + 1), self._end)
            near = self._blocks.most_of(Span(first, end - first), SLOTS)
        assert near is not None, "a slot can hold any one byte"
        if _end(near) > self._user_top and not mode.kernel:
            mode = replace(mode, kernel=True)
        return Asked(near, access, mode)


def _end(span: Span) -> int:
    return span.address + span.length_bytes


def _why_not_access(access: Access) -> str:
    if access == Access.READ:
        return "R/W of DR7 has no code for reads alone; rw reports reads and writes"
    if Access.EXECUTE in access:
        return "R/W of DR7 holds one code, for execution or for data; x needs a slot of its own"
    return "R/W of DR7 has codes for x, w and rw, and no access is asked for"
