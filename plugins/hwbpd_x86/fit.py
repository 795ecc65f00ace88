"""
Whether a slot can hold what a claim asks for; and if not, why not and what comes nearest.

The rules, in the order in which they are tried:

1. access: R/W of DR7 has codes for execution, for writes, and for reads and writes. There is none for reads alone, nor
   for execution and data in one slot.
2. width: DR0-DR3 hold addresses of the machine's word, and no span wraps around its end.
3. length: an execution breakpoint has no length of its own (LEN is 0); Linux wants ``sizeof(long)`` there and nothing
   else. For data LEN has codes for 1, 2, 4 and 8 bytes, 8 only on a 64-bit kernel; the address masks of AMD's bpext
   cover greater powers of two, and Linux lets them do so for data.
4. alignment: the low bits of the address do not take part in the comparison, so a slot covers an aligned block.
   Execution breakpoints may be anywhere.
5. masks: where the CPU has none, a length that needs one is not supported.
6. kernel: at a kernel address only the kernel's hits are worth a slot; Linux refuses one that is not to see them.

What is not decided here: Linux also refuses, with EINVAL, some kernel addresses that only the running kernel knows. See
``KERNEL_NOTES``. And a span that needs more than one slot is refused, with the nearest that needs one; cutting it into
pieces belongs here, too, which is why a plan is a tuple of them.

We turned down widening a span silently, even where one slot could cover it: a hit does not say which of the bytes was
touched, so the owner would be told of accesses it did not ask about. The refusal names the wider span instead.

Intel SDM Vol. 3B, "Breakpoint Field Recognition"; AMD64 APM Vol. 2, "Debug Breakpoint Address Masking"; Linux,
arch/x86/kernel/hw_breakpoint.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from hwbpd.core.errors import BadClaim, HwbpError, NotSupported
from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Span
from hwbpd.hookspecs import CpuFacts
from hwbpd_x86.dr7 import SLOTS, Len

READ_WRITE = Access.READ | Access.WRITE

# An address mask names the low bits that a comparison leaves out, and the mask registers have this many.
MASK_BITS = 32

# Where the kernel's addresses begin. User space stops a page short of the half, so that SYSRET never sees a
# non-canonical return address. What is not canonical lies above and so counts as the kernel's.
USER_TOP = 2**47 - 4096
USER_TOP_LA57 = 2**56 - 4096
# On a 32-bit kernel this is a choice of its configuration; none puts it higher, so we refuse nothing that one of them
# takes, and leave the rest to the kernel.
USER_TOP_32 = 0xC000_0000

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
        wide = facts.architecture == "x86_64"
        self._word_bytes = 8 if wide else 4
        self._end = 2 ** (8 * self._word_bytes)  # one past the last address
        self._user_top = (USER_TOP_LA57 if "la57" in facts.features else USER_TOP) if wide else USER_TOP_32
        self._has_masks = "bpext" in facts.features
        self._len_lengths = tuple(sorted(code.length_bytes for code in Len if code.length_bytes <= self._word_bytes))
        self._mask_lengths = tuple(2**n for n in range(MASK_BITS + 1) if 2**n > self._word_bytes)
        data = self._len_lengths + (self._mask_lengths if self._has_masks else ())
        self._lengths = {Access.WRITE: data, READ_WRITE: data, Access.EXECUTE: (self._word_bytes,)}

    def slots(self) -> Mapping[Pool, int]:
        """One pool for both uses."""
        return {Pool.ANY: SLOTS}

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        """
        Return the one piece that is ``span`` itself.

        :raises BadClaim: for a rule of this file that is broken, with the nearest request that keeps all of them.
        :raises NotSupported: for rule 5.
        """
        address, length = span.address, span.length_bytes
        if access not in self._lengths:  # rule 1
            raise self._refusal(BadClaim, span, access, mode, _why_not_access(access))
        if address < 0 or address + length > self._end:  # rule 2
            rule = f"DR0-DR3 are {8 * self._word_bytes} bits wide, and a span may not reach beyond or wrap around"
            raise self._refusal(BadClaim, span, access, mode, rule)
        if access == Access.EXECUTE:
            if length != self._word_bytes:  # rule 3
                rule = f"LEN of an execution breakpoint is always 0 in DR7, which Linux calls {self._word_bytes} bytes"
                raise self._refusal(BadClaim, span, access, mode, rule)
        elif length not in self._len_lengths and length not in self._mask_lengths:  # rule 3
            raise self._refusal(BadClaim, span, access, mode, self._why_not_length(length))
        elif address % length:  # rule 4
            # Where there are no masks, an aligned address would not help.
            if length in self._lengths[access]:
                where = "DR0-DR3 hold" if length in self._len_lengths else "address masks cover"
                rule = f"{where} {_bytes(length)} only at an address divisible by {length}"
            else:
                rule = self._why_not_length(length)
            raise self._refusal(BadClaim, span, access, mode, rule)
        elif length not in self._lengths[access]:  # rule 5
            rule = f"LEN of DR7 ends at {self._word_bytes} bytes, and this CPU lacks the address masks (bpext) for more"
            raise self._refusal(NotSupported, span, access, mode, rule)
        # Rule 6. The first byte tells for all: a block of LEN does not straddle a page, Linux gives execution
        # breakpoints one byte here, and for a masked block it looks no further either.
        if address >= self._user_top and not mode.kernel:
            rule = f"addresses from {self._user_top:#x} on are the kernel's, and its hits are not asked for"
            raise self._refusal(BadClaim, span, access, mode, rule)
        return Plan((Piece(span, access, Pool.ANY),))

    def describe(self) -> Mapping[str, Any]:
        """What the slots can hold, for ``hwbpctl caps``."""
        notes = [
            f"DR0-DR3: {SLOTS} slots, each for a breakpoint or a watchpoint; Linux picks the register",
            "there is no read-only watchpoint; rw reports reads and writes, and does not say which it was",
            f"an execution breakpoint always has length {self._word_bytes}, and may be at any address",
            "a watchpoint's address must be divisible by its length",
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

    def _why_not_length(self, length: int) -> str:
        *most, last = self._len_lengths
        rule = f"LEN of DR7 has no code for {_bytes(length)}, only for {', '.join(map(str, most))} and {last}"
        return f"{rule}, and address masks cover powers of two up to 2^{MASK_BITS}" if self._has_masks else rule

    def _refusal(self, refusal: type[HwbpError], span: Span, access: Access, mode: Mode, rule: str) -> HwbpError:
        near_span, near_access, near_mode = self._nearest(span, access, mode)
        nearest = _as_perf_writes(near_span, near_access, near_mode)
        covered = max(0, _covered(near_span, span))
        if near_access != Access.EXECUTE and covered < span.length_bytes:
            nearest += f", {covered} of the {span.length_bytes} bytes"
        return refusal(f"{_as_perf_writes(span, access, mode)}: {rule}; nearest: {nearest}")

    def _nearest(self, span: Span, access: Access, mode: Mode) -> tuple[Span, Access, Mode]:
        """
        Return the request that keeps every rule and is nearest to this one.

        Of data it covers as many of the bytes asked for as one slot can, all of them where that is possible; then as
        few others as that allows; then it is the lowest. Where execution and data were asked for, it is the data.
        """
        if access not in self._lengths:
            access = Access.WRITE if Access.WRITE in access and Access.READ not in access else READ_WRITE
        first = min(max(span.address, 0), self._end - 1)
        if access == Access.EXECUTE:
            near = Span(min(first, self._end - self._word_bytes), self._word_bytes)
        else:
            end = min(max(span.address + span.length_bytes, first + 1), self._end)
            asked = Span(first, end - first)
            near = max(
                self._blocks(asked),
                key=lambda block: (_covered(block, asked), -block.length_bytes, -block.address),
            )
        if near.address >= self._user_top and not mode.kernel:
            mode = replace(mode, kernel=True)
        return near, access, mode

    def _blocks(self, asked: Span) -> Iterator[Span]:
        """The blocks worth a look: of each length the one that holds the first byte asked for, and the next one."""
        for length in self._lengths[READ_WRITE]:
            block = Span(asked.address - asked.address % length, length)
            yield block
            if _end(block) < _end(asked):
                # Where a third is touched, too, this one lies wholly within, and the third covers no more.
                yield Span(_end(block), length)


def _end(span: Span) -> int:
    return span.address + span.length_bytes


def _covered(block: Span, asked: Span) -> int:
    """How many bytes of ``asked`` lie in ``block``; negative for the distance where they do not meet."""
    return min(_end(block), _end(asked)) - max(block.address, asked.address)


def _why_not_access(access: Access) -> str:
    if access == Access.READ:
        return "R/W of DR7 has no code for reads alone; rw reports reads and writes"
    if Access.EXECUTE in access:
        return "R/W of DR7 holds one code, for execution or for data; x needs a slot of its own"
    return "R/W of DR7 has codes for x, w and rw, and no access is asked for"


def _as_perf_writes(span: Span, access: Access, mode: Mode) -> str:
    """``mem:ADDR/LEN:ACCESS``, and a modifier where not every hit is seen (``h``: neither user's nor kernel's)."""
    seen = {(True, True): "", (True, False): ":u", (False, True): ":k", (False, False): ":h"}[mode.user, mode.kernel]
    letters = f":{access.letters}" if access else ""
    return f"mem:{span.address:#x}/{span.length_bytes}{letters}{seen}"


def _bytes(length: int) -> str:
    return f"{length} byte" if length == 1 else f"{length} bytes"
