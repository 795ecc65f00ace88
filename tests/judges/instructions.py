"""
Random instructions, and what each of them accesses by its definition.

The table below says it in the manual's terms, and nothing of debug registers is known here: an instruction is its bytes
and, for every round of it, the reads and writes with their addresses and lengths. An ordinary instruction has one
round, a repeated string instruction one for each iteration. Rules:

- Addresses are absolute, or in registers that a stub begins with and whose value is followed from instruction to
  instruction, so that any sequence can be run without knowing what memory holds. Where an instruction takes its way
  from memory (a jump, a selector), it comes first in its stub, and the stub says what must be there.
- No instruction faults or waits: alignment is kept where it is asked for, and no lock is split over two cache lines.
- What the definition leaves open is not in the table: masked stores, gathers, XSAVE, bit strings by register.

Intel SDM Vol. 2, "Instruction Set Reference"; AMD64 APM Vol. 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct

from hwbpd.core.model import Access
from hwbpd.debug_unit import MemoryAccess
from tests.judges.stub_process import CODE, DATA, DF, FLAGS

R, W = Access.READ, Access.WRITE
RW = R | W
LINE_BYTES = 64
WINDOW_BYTES = 2 * LINE_BYTES
CODE_BYTES = 0x4000  # of stubs; some way below the data
USER_DATA_SELECTOR = 0x2B  # Linux, __USER_DS
INT1 = b"\xf1"
INT3 = b"\xcc"


class Instruction(NamedTuple):
    """One instruction: how it is written, its bytes, and its data accesses round by round."""

    text: str
    code: bytes
    rounds: tuple[tuple[MemoryAccess, ...], ...]
    holds_back: bool = False  # it keeps a trap waiting until after the next instruction: MOV SS
    raises: bool = False  # an exception of its own, after it: INT1, INT3
    left: tuple[int, ...] = ()  # what each round leaves in RCX; nothing where RCX stays
    is_fast_string: bool = False  # the CPU may do some of its rounds at once

    @property
    def accesses(self) -> Iterator[MemoryAccess]:
        for accesses in self.rounds:
            yield from accesses


class Stub(Struct, frozen=True):
    """A few instructions one after the other, and INT3 behind them; where they lie, and what they begin with."""

    address: int
    instructions: tuple[Instruction, ...]
    registers: Mapping[str, int]
    memory: Mapping[int, bytes]
    window: int  # the address of the two cache lines that are accessed

    @property
    def code(self) -> bytes:
        return b"".join(instruction.code for instruction in self.instructions) + INT3

    def starts(self) -> list[int]:
        """The address of each instruction, INT3 among them."""
        starts = [self.address]
        for instruction in self.instructions:
            starts.append(starts[-1] + len(instruction.code))
        return starts


# --- instructions with one operand in memory -------------------------------------------------------------------------
# Text, bytes before ModRM, the register field of ModRM, bytes after the operand, length, access. {} is the operand.

Row = tuple[str, str, int, str, int, Access]

_PLAIN: tuple[Row, ...] = (
    ("mov al, {}", "8a", 0, "", 1, R),
    ("mov ax, {}", "66 8b", 0, "", 2, R),
    ("mov eax, {}", "8b", 0, "", 4, R),
    ("mov rax, {}", "48 8b", 0, "", 8, R),
    ("movzx eax, byte {}", "0f b6", 0, "", 1, R),
    ("movsx rax, word {}", "48 0f bf", 0, "", 2, R),
    ("cmovz rax, {}", "48 0f 44", 0, "", 8, R),
    ("cmovnz eax, {}", "0f 45", 0, "", 4, R),
    ("cmp {}, ax", "66 39", 0, "", 2, R),
    ("test {}, rax", "48 85", 0, "", 8, R),
    ("cmp byte {}, 7", "80", 7, "07", 1, R),
    ("add eax, {}", "03", 0, "", 4, R),
    ("imul rax, {}", "48 0f af", 0, "", 8, R),
    ("bt dword {}, 9", "0f ba", 4, "09", 4, R),
    ("mov {}, al", "88", 0, "", 1, W),
    ("mov {}, ax", "66 89", 0, "", 2, W),
    ("mov {}, eax", "89", 0, "", 4, W),
    ("mov {}, rax", "48 89", 0, "", 8, W),
    ("mov byte {}, 5", "c6", 0, "05", 1, W),
    ("mov word {}, 5", "66 c7", 0, "0500", 2, W),
    ("mov qword {}, 5", "48 c7", 0, "05000000", 8, W),
    ("setz {}", "0f 94", 0, "", 1, W),
    ("movnti {}, eax", "0f c3", 0, "", 4, W),
    ("movnti {}, rax", "48 0f c3", 0, "", 8, W),
    ("add {}, al", "00", 0, "", 1, RW),
    ("add {}, ax", "66 01", 0, "", 2, RW),
    ("xor {}, eax", "31", 0, "", 4, RW),
    ("sub {}, rax", "48 29", 0, "", 8, RW),
    ("inc byte {}", "fe", 0, "", 1, RW),
    ("dec qword {}", "48 ff", 1, "", 8, RW),
    ("not word {}", "66 f7", 2, "", 2, RW),
    ("shl dword {}, 1", "d1", 4, "", 4, RW),
    ("shr qword {}, 3", "48 c1", 5, "03", 8, RW),
    ("bts word {}, 3", "66 0f ba", 5, "03", 2, RW),
    ("xadd {}, eax", "0f c1", 0, "", 4, RW),
    ("movq xmm0, {}", "f3 0f 7e", 0, "", 8, R),
    ("movss xmm0, {}", "f3 0f 10", 0, "", 4, R),
    ("movups xmm0, {}", "0f 10", 0, "", 16, R),
    ("lddqu xmm0, {}", "f2 0f f0", 0, "", 16, R),
    ("movsd {}, xmm0", "f2 0f 11", 0, "", 8, W),
    ("movhps {}, xmm0", "0f 17", 0, "", 8, W),
    ("movups {}, xmm0", "0f 11", 0, "", 16, W),
    ("movdqu {}, xmm0", "f3 0f 7f", 0, "", 16, W),
    ("fld dword {}", "d9", 0, "", 4, R),
    ("fld qword {}", "dd", 0, "", 8, R),
    ("fld tbyte {}", "db", 5, "", 10, R),
    ("fild word {}", "df", 0, "", 2, R),
    ("fstp dword {}", "d9", 3, "", 4, W),
    ("fstp qword {}", "dd", 3, "", 8, W),
    ("fstp tbyte {}", "db", 7, "", 10, W),
    ("fnstcw {}", "d9", 7, "", 2, W),
)
_AVX: tuple[Row, ...] = (
    ("vmovups ymm0, {}", "c5 fc 10", 0, "", 32, R),
    ("vmovups {}, ymm0", "c5 fc 11", 0, "", 32, W),
)
_ALIGNED: tuple[Row, ...] = (
    ("movaps xmm0, {}", "0f 28", 0, "", 16, R),
    ("movaps {}, xmm0", "0f 29", 0, "", 16, W),
    ("movntdq {}, xmm0", "66 0f e7", 0, "", 16, W),
    ("paddd xmm0, {}", "66 0f fe", 0, "", 16, R),
)
# CMPXCHG writes its operand even where the comparison fails: what was there.
_LOCKED: tuple[Row, ...] = (
    ("xchg {}, al", "86", 0, "", 1, RW),
    ("xchg {}, ax", "66 87", 0, "", 2, RW),
    ("xchg {}, eax", "87", 0, "", 4, RW),
    ("xchg {}, rax", "48 87", 0, "", 8, RW),
    ("lock add {}, eax", "f0 01", 0, "", 4, RW),
    ("lock inc qword {}", "f0 48 ff", 0, "", 8, RW),
    ("lock xadd {}, ax", "66 f0 0f c1", 0, "", 2, RW),
    ("lock bts dword {}, 0", "f0 0f ba", 5, "00", 4, RW),
    ("lock cmpxchg {}, ecx", "f0 0f b1", 1, "", 4, RW),
    ("lock cmpxchg {}, rcx", "f0 48 0f b1", 1, "", 8, RW),
    ("cmpxchg {}, cl", "0f b0", 1, "", 1, RW),
    ("lock cmpxchg8b {}", "f0 0f c7", 1, "", 8, RW),
)
# The operand is an address, and nothing is accessed there.
_UNTOUCHED: tuple[Row, ...] = (
    ("lea rax, {}", "48 8d", 0, "", 8, Access(0)),
    ("nop dword {}", "0f 1f", 0, "", 4, Access(0)),
    ("prefetcht0 {}", "0f 18", 1, "", 1, Access(0)),
    ("prefetchw {}", "0f 0d", 1, "", 1, Access(0)),
)
_STRINGS = (  # name, opcode of the byte form, whether it reads at rsi, and what it does at rdi
    ("lods", 0xAC, True, Access(0)),
    ("stos", 0xAA, False, W),
    ("movs", 0xA4, True, W),
    ("scas", 0xAE, False, R),
    ("cmps", 0xA6, True, R),
)
# Those whose REP asks for nothing but a count. A CPU may do MOVS and STOS in groups, so they are the rarer ones.
_REPEATED = (*_STRINGS[:1] * 4, *_STRINGS[1:3])
_PREFIXES = (b"", b"", b"", b"\x3e", b"\x2e\x3e", b"\x66\x66")  # without effect where they are put


class Composer:
    """Makes stubs from one source of randomness."""

    def __init__(self, source: random.Random, *, avx: bool, int1: bool) -> None:
        """
        :param avx: whether the CPU has AVX.
        :param int1: whether to use INT1, which some hypervisors do not get past.
        """
        self._random = source
        self._first = (self._jump, self._load_ss, *((self._int1,) if int1 else ()))
        self._plain = _PLAIN + (_AVX if avx else ())
        self._window = 0
        self._now: dict[str, int] = {}  # the registers as they will be when the next instruction begins
        self._memory: dict[int, bytes] = {}
        kinds: Sequence[tuple[Callable[[], Instruction], int]] = (
            (self._operand, 10),
            (self._lock, 3),
            (self._string, 3),
            (self._repeated, 1),
            (self._stack, 3),
            (self._two_operands, 2),
            (self._aside, 2),
        )
        self._kinds = [kind for kind, weight in kinds for _ in range(weight)]

    def stub(self) -> Stub:
        """Return the next one: one to three instructions on two cache lines, which may lie in two pages."""
        draw = self._random
        self._window = DATA + 0x1000 + draw.choice((-LINE_BYTES, 0, 0, 4 * LINE_BYTES))
        self._now = {
            "rax": draw.getrandbits(64),
            "rcx": draw.choice((0, 1, 2, 3, 4, 8)),
            "rbx": draw.getrandbits(64),
            "rsp": self._somewhere(8),
            "rsi": self._somewhere(8),
            "rdi": self._somewhere(8),
            "eflags": FLAGS | draw.choice((0, 0, 0, DF)),
        }
        self._memory = {}
        begin = dict(self._now)
        address = CODE + draw.randrange(CODE_BYTES)
        special = draw.random() < 0.12
        first = [draw.choice(self._first)(address)] if special else []
        count = draw.choice((0, 1, 2)) if first else draw.choice((1, 1, 2, 3))
        others = [draw.choice(self._kinds)() for _ in range(count)]
        if first and first[0].holds_back and not others:
            others = [self._aside()]  # what comes right behind MOV SS must not be an exception of its own
        return Stub(address, (*first, *others), begin, dict(self._memory), self._window)

    # --- kinds of instruction ----------------------------------------------------------------------------------------

    def _operand(self) -> Instruction:
        draw = self._random
        if draw.random() < 0.12:
            row = draw.choice(_ALIGNED)
            return _of_row(row, self._somewhere(row[4], row[4]), b"")
        row = draw.choice(self._plain)
        # Legacy prefixes go before REX and the opcode; 66, F2 and F3 would change what SSE instructions are.
        prefix = draw.choice(_PREFIXES[:-1])
        return _of_row(row, self._somewhere(row[4]), prefix)

    def _lock(self) -> Instruction:
        row = self._random.choice(_LOCKED)
        address = self._somewhere(row[4])
        if address % LINE_BYTES > LINE_BYTES - row[4]:
            address -= row[4]  # not split over two lines, which takes the whole bus, or a signal from Linux
        return _of_row(row, address, b"")

    def _aside(self) -> Instruction:
        """Nothing that a data breakpoint could see."""
        if self._random.random() < 0.3:
            return Instruction("nop", self._random.choice(_PREFIXES) + b"\x90", ((),))
        return _of_row(self._random.choice(_UNTOUCHED), self._somewhere(8), b"")

    def _string(self) -> Instruction:
        row = self._random.choice(_STRINGS)
        length = self._random.choice((1, 2, 4, 8))
        return Instruction(_string_text(row, length), _string_code(row, length), (self._iteration(row, length),))

    def _repeated(self) -> Instruction:
        row = self._random.choice(_REPEATED)
        length = self._random.choice((1, 2, 4, 8))
        count, self._now["rcx"] = self._now["rcx"], 0
        rounds = tuple(self._iteration(row, length) for _ in range(count)) or ((),)
        text = f"rep {_string_text(row, length)} x{count}"
        left = tuple(reversed(range(count))) or (0,)
        code = b"\xf3" + _string_code(row, length)
        return Instruction(text, code, rounds, left=left, is_fast_string=row[0] in ("movs", "stos"))

    def _iteration(self, row: tuple[str, int, bool, Access], length: int) -> tuple[MemoryAccess, ...]:
        _name, _opcode, reads, at_rdi = row
        step = -length if self._now["eflags"] & DF else length
        accesses = []
        if reads:
            accesses.append(MemoryAccess(R, self._now["rsi"], length))
            self._now["rsi"] += step
        if at_rdi:
            accesses.append(MemoryAccess(at_rdi, self._now["rdi"], length))
            self._now["rdi"] += step
        return tuple(accesses)

    def _stack(self) -> Instruction:
        # PUSHes and a POP; CALL goes to the instruction behind it.
        text, code, length, pushes = self._random.choice(
            (
                ("push rdx", "52", 8, True),
                ("push 5", "6a 05", 8, True),
                ("push dx", "66 52", 2, True),
                ("pushfq", "9c", 8, True),
                ("call +0", "e8 00000000", 8, True),
                ("pop rdx", "5a", 8, False),
                ("pop dx", "66 5a", 2, False),
            )
        )
        if pushes:
            self._now["rsp"] -= length
        access = MemoryAccess(W if pushes else R, self._now["rsp"], length)
        if not pushes:
            self._now["rsp"] += length
        return Instruction(text, bytes.fromhex(code), ((access,),))

    def _two_operands(self) -> Instruction:
        """Two places in one instruction."""
        address = self._somewhere(8)
        match self._random.randrange(3):
            case 0:
                self._now["rsp"] -= 8
                accesses = (MemoryAccess(R, address, 8), MemoryAccess(W, self._now["rsp"], 8))
                return Instruction(f"push qword [{address:#x}]", b"\xff" + _absolute(6, address), (accesses,))
            case 1:
                accesses = (MemoryAccess(R, self._now["rsp"], 8), MemoryAccess(W, address, 8))
                self._now["rsp"] += 8
                return Instruction(f"pop qword [{address:#x}]", b"\x8f" + _absolute(0, address), (accesses,))
            case _:
                row = self._random.choice(_STRINGS[2:3] + _STRINGS[4:])  # MOVS, CMPS
                return Instruction(_string_text(row, 8), _string_code(row, 8), (self._iteration(row, 8),))

    # --- kinds that come first ---------------------------------------------------------------------------------------

    def _jump(self, at: int) -> Instruction:
        """A jump to the next instruction, by an address in memory."""
        address = self._somewhere(8)
        match self._random.randrange(3):
            case 0:
                text, code = f"jmp qword [{address:#x}]", b"\xff" + _absolute(4, address)
                accesses: tuple[MemoryAccess, ...] = (MemoryAccess(R, address, 8),)
            case 1:
                text, code = "ret", b"\xc3"
                address = self._now["rsp"]
                accesses = (MemoryAccess(R, address, 8),)
                self._now["rsp"] += 8
            case _:
                text, code = f"call qword [{address:#x}]", b"\xff" + _absolute(2, address)
                self._now["rsp"] -= 8
                accesses = (MemoryAccess(R, address, 8), MemoryAccess(W, self._now["rsp"], 8))
        self._memory[address] = (at + len(code)).to_bytes(8, "little")
        return Instruction(text, code, (accesses,))

    def _load_ss(self, _at: int) -> Instruction:
        address = self._somewhere(2)
        self._memory[address] = USER_DATA_SELECTOR.to_bytes(2, "little")
        access = MemoryAccess(R, address, 2)
        return Instruction(f"mov ss, [{address:#x}]", b"\x8e" + _absolute(2, address), ((access,),), holds_back=True)

    def _int1(self, _at: int) -> Instruction:
        return Instruction("int1", INT1, ((),), raises=True)

    def _somewhere(self, length_bytes: int, alignment: int = 1) -> int:
        """Anywhere in the two lines; the last accesses go beyond them."""
        offset = self._random.randrange(WINDOW_BYTES)
        return self._window + offset - offset % alignment


def _of_row(row: Row, address: int, prefix: bytes) -> Instruction:
    text, before, field, after, length, access = row
    code = prefix + bytes.fromhex(before) + _absolute(field, address) + bytes.fromhex(after)
    accesses = (MemoryAccess(access, address, length),) if access else ()
    return Instruction(text.format(f"[{address:#x}]"), code, (accesses,))


def _absolute(field: int, address: int) -> bytes:
    """ModRM, SIB and displacement for an operand at an absolute address below 2 GiB."""
    return bytes((field << 3 | 4, 0x25)) + address.to_bytes(4, "little")


def _string_code(row: tuple[str, int, bool, Access], length: int) -> bytes:
    prefix = {1: b"", 2: b"\x66", 4: b"", 8: b"\x48"}[length]
    return prefix + bytes([row[1] + (length > 1)])


def _string_text(row: tuple[str, int, bool, Access], length: int) -> str:
    return row[0] + {1: "b", 2: "w", 4: "d", 8: "q"}[length]
