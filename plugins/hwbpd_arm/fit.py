"""
Which slots hold what a claim asks for; and if none can, why not and what comes nearest.

Breakpoints and watchpoints have registers and pools of their own: INST and DATA. The rules, in the order in which they
are tried:

1. access: x, or any of r, w and rw, which LSC of a watchpoint tells apart; execution and data not together. A 32-bit
   kernel before Armv8 takes only rw, for the CPU does not tell it which of them a hit was.
2. width: addresses are 64 or 32 bits wide, and no span wraps around their end.
3. execution: a breakpoint is at one instruction: 4 bytes at a multiple of 4 (A64, A32), or 2 at an even address (T32).
4. number: a slot holds data within one aligned doubleword: on arm64 any bytes that are neighbours. A 32-bit kernel
   takes 1, 2 or 4 of the same word, and 8. Any other span is cut into the fewest such blocks; more than the slots of a
   CPU no claim gets.
5. whose: a slot counts user mode's accesses at user addresses and the kernel's at the kernel's, and no span has both.
   A claim has to want those hits. A 32-bit kernel takes no kernel address at all, since it cannot step there.

What the hardware could do besides, and Linux leaves unused, is in ``blocks``: address masks, for an aligned block of a
power of two from 8 bytes to 2 GiB.

What is not decided here, since it depends on the target: arm64 takes kernel addresses for CPU-wide claims only; a
32-bit kernel takes no CPU-wide claims; an AArch32 task on arm64 is bound by its words. ``describe`` says so, linux.py
has the rules, ``Handling.refusal`` applies the first two, and the kernel refuses with EINVAL.

A hit does not say which of a block's bytes was touched. So blocks hold what was asked for and nothing else, unless the
claim accepts hits of bytes beside it (``Mode.over_report``) and that saves slots.

Linux, arch/arm/kernel/hw_breakpoint.c and arch/arm64/kernel/hw_breakpoint.c; see linux.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from hwbpd.core.errors import BadClaim, HwbpError, NotSupported
from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Span
from hwbpd.cover import Blocks
from hwbpd.debug_unit import DebugUnit, Handling
from hwbpd.hookspecs import CpuFacts
from hwbpd.refusals import Asked, sentence
from hwbpd_arm.handling import Arm64Handling, Armv7Handling
from hwbpd_arm.identification import REGISTERS_MAX, DebugVersion
from hwbpd_arm.linux import USER_TOP, USER_TOP_32, Kernel, usable_v7, usable_v8
from hwbpd_arm.v7_unit import Armv7DebugUnit
from hwbpd_arm.v8_unit import Arm64DebugUnit
from hwbpd_arm.wcr import MASK_MAX

READ_WRITE = Access.READ | Access.WRITE
DATA = (Access.READ, Access.WRITE, READ_WRITE)

# The least that the architectures allow, for CPUs that nobody could ask.
BREAKPOINTS_MIN = 2
WATCHPOINTS_MIN_V8 = 2
WATCHPOINTS_MIN_V7 = 1

_NEIGHBOURS = frozenset((offset, length) for offset in range(8) for length in range(1, 9 - offset))
_IN_WORDS = frozenset((offset, length) for offset, length in _NEIGHBOURS if offset % 4 + length <= 4)
_STRICT = frozenset(block for block in _IN_WORDS if block[1] in (1, 2, 4)) | {(0, 8)}
_MASKED = tuple(1 << bits for bits in range(4, MASK_MAX + 1))
_T32, _A64 = 2, 4  # the lengths of instructions


class ArmBackend:
    """The breakpoint and watchpoint registers as Linux hands them out: what arm64 and ARMv7 have in common."""

    name: str
    _address_bits: int
    _user_top: int
    _unit: DebugUnit
    _handling: Handling
    _data: tuple[Access, ...]  # rule 1
    _by_linux: Blocks  # rule 4
    _by_hardware: Blocks
    _lengths: tuple[int, ...]  # of data, that one slot can hold at an address where any of them can be
    _kernel_too: bool  # rule 5
    _notes: tuple[str, ...]

    def slots(self) -> Mapping[Pool, int]:
        """Two pools, which do not compete."""
        return self._unit.slots()

    def debug_unit(self) -> DebugUnit:
        """The registers themselves, which can do more than Linux asks of them."""
        return self._unit

    def handling(self) -> Handling:
        """What Linux does with them."""
        return self._handling

    def blocks(self, access: Access, *, by_hardware: bool = False) -> Blocks:
        """
        Return the spans of data that one slot can hold.

        :param access: r, w or rw.
        :param by_hardware: what the registers can do, in place of what Linux asks of them.
        :raises ValueError: for execution, which has no spans: an instruction is one block.
        """
        if access not in DATA:
            raise ValueError(f"{access} is not an access to data")
        return self._by_hardware if by_hardware else self._by_linux

    def fit(self, span: Span, access: Access, mode: Mode) -> Plan:
        """
        Return the fewest pieces that hold ``span``, in ascending order.

        :raises BadClaim: for a rule of this file that is broken, with the nearest request that keeps all of them.
        :raises NotSupported: for rule 1, where Armv8 could, and rule 4, where a CPU with more slots could.
        """
        address, length, end = span.address, span.length_bytes, 1 << self._address_bits
        if access != Access.EXECUTE and access not in self._data:  # rule 1
            raise self._refusal(NotSupported if access in DATA else BadClaim, span, access, mode, _why_not(access))
        if length < 1:
            raise self._refusal(BadClaim, span, access, mode, "a slot holds at least one byte")
        if address < 0 or address + length > end:  # rule 2
            rule = f"addresses are {self._address_bits} bits wide, and a span may not reach beyond or wrap around"
            raise self._refusal(BadClaim, span, access, mode, rule)
        if access == Access.EXECUTE:
            if length not in (_T32, _A64) or address % length:  # rule 3
                rule = "BAS of DBGBCR selects an instruction: 4 bytes at a multiple of 4, or 2 (T32) at an even address"
                raise self._refusal(BadClaim, span, access, mode, rule)
            blocks = [span]
        else:
            slots = self.slots()[Pool.DATA]
            reach = self._reach(span) if mode.over_report else None
            cost = self._by_linux.cost(span, reach)
            assert cost is not None, "a slot can hold any one byte"
            if cost.slots > slots:  # rule 4
                refusal = NotSupported if cost.slots <= REGISTERS_MAX else BadClaim
                raise self._refusal(refusal, span, access, mode, self._why_not_number(span, mode))
            blocks = list(self._by_linux.cover(span, reach))
        if why := self._why_not_whose(span, mode):  # rule 5
            raise self._refusal(BadClaim, span, access, mode, why)
        pool = Pool.INST if access == Access.EXECUTE else Pool.DATA
        return Plan(tuple(Piece(block, access, pool) for block in blocks))

    def describe(self) -> Mapping[str, Any]:
        """What the slots can hold, for ``hwbpctl caps``."""
        lengths = {access.letters: list(self._lengths) for access in self._data} | {"x": [_T32, _A64]}
        data = ", ".join(access.letters for access in self._data)
        return {
            "lengths": lengths,
            "default_lengths": dict.fromkeys(lengths, 4),
            "reports": dict.fromkeys(lengths, "before"),
            "notes": [
                f"breakpoints (x) and watchpoints ({data}) have slots of their own, which do not compete",
                "an execution breakpoint is 4 bytes at a multiple of 4, or 2 at an even address for T32 code",
                *self._notes,
            ],
        }

    # --- refusals ----------------------------------------------------------------------------------------------------

    def _reach(self, span: Span) -> Span | None:
        """How far blocks may hold bytes beside a span: up to the kernel's addresses, or down to them."""
        end = 1 << self._address_bits
        low, high = (0, self._user_top) if span.address < self._user_top else (self._user_top, end)
        return Span(low, high - low) if _end(span) <= high else None

    def _why_not_whose(self, span: Span, mode: Mode) -> str | None:
        if _end(span) <= self._user_top:
            if mode.user:
                return None
            return f"below {self._user_top:#x} a slot counts user mode's accesses, and its hits are not asked for"
        if span.address < self._user_top:
            return f"the kernel's addresses begin at {self._user_top:#x}, and a slot counts for one side only"
        if not self._kernel_too:
            return f"addresses from {self._user_top:#x} on are the kernel's, where a 32-bit kernel takes no breakpoint"
        if not mode.kernel:
            return f"addresses from {self._user_top:#x} on are the kernel's, and its hits are not asked for"
        return None

    def _why_not_number(self, span: Span, mode: Mode) -> str:
        slots = self.slots()[Pool.DATA]
        exact, wide = self._by_linux.cost(span), self._by_linux.cost(span, self._reach(span))
        assert exact is not None
        assert wide is not None
        one = "1 slot" if slots == 1 else f"{slots} slots"
        rule = f"it takes {(wide if mode.over_report else exact).slots} slots, and a CPU has {one} for data: one holds "
        rule += self._holds
        if not mode.over_report and wide.slots <= slots:
            rule += f"; {wide.slots} would do with over-report, and report {wide.length_bytes} bytes"
        return rule

    @property
    def _holds(self) -> str:
        if self._by_linux.in_word == _NEIGHBOURS:
            return "bytes of one aligned doubleword"
        *most, last = self._lengths
        return f"{', '.join(map(str, most))} or {last} bytes of one aligned word" + " or doubleword" * (last == 8)

    def _refusal(self, refusal: type[HwbpError], span: Span, access: Access, mode: Mode, rule: str) -> HwbpError:
        asked = Asked(span, access, mode)
        return refusal(sentence(asked, rule, self._nearest(span, access, mode)))

    def _nearest(self, span: Span, access: Access, mode: Mode) -> Asked:
        """
        Return the request that keeps every rule and is nearest to this one.

        Of data it holds as many of the bytes asked for as the slots of a CPU can, and no others, on the side of user
        and kernel where the first of them is. Where execution and data were asked for, it is the data.
        """
        if access != Access.EXECUTE and access not in self._data:
            wanted = access & READ_WRITE
            access = wanted if wanted in self._data else READ_WRITE
        end = 1 << self._address_bits if self._kernel_too else self._user_top
        first = min(max(span.address, 0), end - 1)
        top = self._user_top if first < self._user_top else end
        if access == Access.EXECUTE:
            length = _T32 if span.length_bytes == _T32 or first % _A64 else _A64
            near = Span(first - first % length, length)
        else:
            stop = min(max(_end(span), first + 1), top)
            most = self._by_linux.most_of(Span(first, stop - first), self.slots()[Pool.DATA])
            assert most is not None, "a slot can hold any one byte"
            near = most
        if near.address >= self._user_top:
            return Asked(near, access, replace(mode, kernel=True))
        return Asked(near, access, replace(mode, user=True))


class Arm64Backend(ArmBackend):
    """arm64: 2 to 16 breakpoints and 2 to 16 watchpoints; any bytes of a doubleword."""

    name = "arm64"
    _address_bits = 64
    _user_top = USER_TOP
    _data = DATA
    _by_linux = Blocks(_NEIGHBOURS)
    _by_hardware = Blocks(_NEIGHBOURS, _MASKED)
    _lengths = tuple(range(1, 9))
    _kernel_too = True

    def __init__(self, facts: CpuFacts) -> None:
        """
        :param facts: ``breakpoints`` and ``watchpoints`` matter; where they are None, there are two of each.
        """
        usable = usable_v8(facts.breakpoints or BREAKPOINTS_MIN, facts.watchpoints or WATCHPOINTS_MIN_V8)
        version = DebugVersion.V8 if facts.debug_version is None else facts.debug_version
        self._unit = unit = Arm64DebugUnit(usable.breakpoints, usable.watchpoints, version=version)
        self._handling = Arm64Handling(unit, Kernel(version=version, user_top=USER_TOP))
        self._notes = (
            "one slot holds any neighbouring bytes of an aligned doubleword; other spans of data take several",
            "at user addresses a slot sees user mode's accesses only, at kernel addresses the kernel's only",
            "Linux refuses (EINVAL) kernel addresses of a task; CPU-wide they are taken",
            "of AArch32 tasks Linux takes 8 bytes at a multiple of 8, 1 to 7 at one of 4, else 1 or 2 of a word; "
            "others are EINVAL",
            "Linux does not use address masks, which would hold aligned powers of two up to 2^31 in one slot",
        )


class Armv7Backend(ArmBackend):
    """A 32-bit kernel: usable breakpoints are one less than the CPU has, and before v7.1 there is one watchpoint."""

    name = "armv7"
    _address_bits = 32
    _user_top = USER_TOP_32
    _by_linux = Blocks(_STRICT)
    _by_hardware = Blocks(_NEIGHBOURS, _MASKED)
    _lengths = (1, 2, 4, 8)
    _kernel_too = False

    def __init__(self, facts: CpuFacts) -> None:
        """
        :param facts: ``breakpoints``, ``watchpoints`` and ``debug_version`` matter; where they are None, there are two
            BRPs, one of them reserved, one WRP, and v7.1.
        """
        version = DebugVersion.V7_1 if facts.debug_version is None else facts.debug_version
        breakpoints = facts.breakpoints or BREAKPOINTS_MIN
        watchpoints = facts.watchpoints or WATCHPOINTS_MIN_V7
        usable = usable_v7(breakpoints, watchpoints, version)
        if not usable.breakpoints or not usable.watchpoints:
            raise NotSupported(f"Linux has no breakpoints on this CPU: debug architecture {version} is not in CP14")
        self._unit = unit = Armv7DebugUnit(breakpoints, watchpoints, version=version)
        kernel = Kernel(arm64=False, version=version, user_top=USER_TOP_32, has_mismatch=unit.reserved is not None)
        self._handling = Armv7Handling(unit, kernel)
        self._data = DATA if version >= DebugVersion.V8 else (READ_WRITE,)
        self._notes = (
            "one slot holds 1, 2 or 4 bytes of one word, or an aligned doubleword; other spans of data take several",
            f"of {breakpoints} BRPs one is reserved for stepping past watchpoints",
            "Linux refuses (EINVAL) CPU-wide claims: it steps past a hit by a mismatch breakpoint of the task",
            "after a hit the watchpoint is off until the next instruction begins, which in T32 code may be one later",
        )
        if version < DebugVersion.V7_1 and watchpoints > 1:
            self._notes += (f"of {watchpoints} WRPs one is used: before v7.1 the CPU does not say where a hit was",)
        if version < DebugVersion.V8:
            self._notes += ("r and w alone are not supported before Armv8; rw reports both",)


def _end(span: Span) -> int:
    return span.address + span.length_bytes


def _why_not(access: Access) -> str:
    if access in DATA:
        return "before Armv8 a hit does not tell a 32-bit kernel whether it was a read or a write, so it takes only rw"
    if Access.EXECUTE in access:
        return "breakpoints and watchpoints have slots of their own; x needs one of its own"
    return "LSC of DBGWCR has codes for r, w and rw, and no access is asked for"
