"""What Arm's slots hold: the fewest pieces, each taken whole by Linux, each trapping at its bytes and no others."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.errors import BadClaim, HwbpError, NotSupported
from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Span
from hwbpd.debug_unit import Armed
from hwbpd.hookspecs import Backend, CpuFacts
from hwbpd_arm import ARM64_ARCHITECTURES, ARMV7_ARCHITECTURES, hwbpd_backends
from hwbpd_arm.fit import Arm64Backend, ArmBackend, Armv7Backend
from hwbpd_arm.identification import DebugVersion
from hwbpd_arm.linux import EXECUTE, READ_WRITE, Kernel, Request, contents, parse_errno
from hwbpd_arm.profiles import ARM64, ARMV7
from hwbpd_arm.wcr import decode, watched
from tests.plugins.arm.units import R, W, X, carry_out, execute, read

ALL = Mode()
A57 = Arm64Backend(ARM64["cortex-a57"])
A15 = Armv7Backend(ARMV7["cortex-a15"])
A9 = Armv7Backend(ARMV7["cortex-a9"])
MAX64 = Arm64Backend(ARM64["arm64-max"])
MAX32 = Armv7Backend(ARMV7["armv7-max"])
ON_ARMV8 = Armv7Backend(CpuFacts("armv8l", breakpoints=6, watchpoints=4, debug_version=DebugVersion.V8))
BASE = 0x1_0000
KERNEL_64 = 0xFFFF_8000_0000_0000


def kernel_of(backend: ArmBackend) -> Kernel:
    if isinstance(backend, Arm64Backend):
        return Kernel(user_top=1 << 48)
    return Kernel(arm64=False, version=DebugVersion.V7_1, user_top=0xBF00_0000)


@cache
def one_slot_spans(is_arm64: bool) -> frozenset[tuple[int, int]]:
    """(offset, length) of what one watchpoint holds at BASE, found by asking the kernel's rules for each."""
    kernel = kernel_of(A57 if is_arm64 else A15)
    spans = set()
    for offset in range(32):
        for length in range(1, 9):
            request = Request(READ_WRITE, BASE + offset, length)
            if parse_errno(kernel, request) == 0:
                held = contents(kernel, request)
                if watched(decode(held.control), held.address) == Span(BASE + offset, length):
                    spans.add((offset, length))
    return frozenset(spans)


@cache
def fewest(is_arm64: bool, first: int, end: int) -> int:
    """The fewest spans that cover [first, end) exactly; every way is tried."""
    if first == end:
        return 0
    ends = {offset + length for offset, length in one_slot_spans(is_arm64) if offset == first}
    return min(1 + fewest(is_arm64, here, end) for here in ends if here <= end)


@pytest.mark.parametrize("backend", [MAX64, MAX32], ids=["arm64", "armv7"])
def test_it_takes_as_few_slots_as_trying_every_way(backend: ArmBackend) -> None:
    for first in range(8):
        for end in range(first + 1, 30):
            plan = backend.fit(Span(BASE + first, end - first), R | W, ALL)
            assert len(plan.pieces) == fewest(backend is MAX64, first, end), f"{first} to {end}"
            held = [byte for piece in plan.pieces for byte in range(*piece_ends(piece))]
            assert held == list(range(BASE + first, BASE + end)), "each byte once, and no other"


def piece_ends(piece: Piece) -> tuple[int, int]:
    return piece.span.address, piece.span.address + piece.span.length_bytes


@pytest.mark.parametrize("backend", [A57, A15, A9], ids=["a57", "a15", "a9"])
def test_each_piece_is_taken_by_linux_and_traps_where_it_says(backend: ArmBackend) -> None:
    for offset, length in one_slot_spans(backend is A57):
        if offset >= 8:
            continue
        (piece,) = backend.fit(Span(BASE + offset, length), R | W, ALL).pieces
        unit = backend.debug_unit()
        file = carry_out(unit, unit.reset(), {(Pool.DATA, 0): Armed(piece, user=True, kernel=False)})
        trapping = [n for n in range(-8, 24) if unit.check(file, [read(BASE + n, 1)])]
        assert trapping == list(range(offset, offset + length))


@pytest.mark.parametrize("backend", [A57, A15], ids=["a57", "a15"])
def test_an_execution_breakpoint_is_at_one_instruction(backend: ArmBackend) -> None:
    for offset in range(8):
        for length in range(1, 9):
            span = Span(BASE + offset, length)
            if (length, offset % length) in ((2, 0), (4, 0)):
                assert backend.fit(span, X, ALL) == Plan((Piece(span, X, Pool.INST),))
                unit = backend.debug_unit()
                file = carry_out(unit, unit.reset(), {(Pool.INST, 0): Armed(Piece(span, X, Pool.INST))})
                hit = [n for n in range(0, 12, 2) if unit.check(file, [execute(BASE + n, 2)])]
                assert hit == list(range(offset, offset + length, 2))
                kernel = kernel_of(backend)
                assert parse_errno(kernel, Request(EXECUTE, BASE + offset, length, compat=True)) == 0
            else:
                with pytest.raises(BadClaim, match="BAS of DBGBCR"):
                    backend.fit(span, X, ALL)


def test_what_hardware_holds_beyond_linux_is_there_to_be_asked() -> None:
    assert 64 not in A57.blocks(W).lengths
    assert A57.blocks(W, by_hardware=True).lengths == tuple(2**n for n in range(4, 32))
    assert (1, 3) not in A15.blocks(R | W).in_word
    assert (1, 3) in A15.blocks(R | W, by_hardware=True).in_word
    with pytest.raises(ValueError, match="not an access to data"):
        A57.blocks(X)


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal_of(backend: Backend, address: int, length: int, access: Access, mode: Mode = ALL) -> HwbpError | None:
    try:
        backend.fit(Span(address, length), access, mode)
    except HwbpError as refusal:
        return refusal
    return None


@pytest.mark.parametrize("access", [R, W])
def test_reads_and_writes_are_told_apart_by_arm64_and_not_before_armv8(access: Access) -> None:
    assert refusal_of(A57, BASE, 4, access) is None
    assert refusal_of(ON_ARMV8, BASE, 4, access) is None
    refusal = refusal_of(A15, BASE, 4, access)
    assert isinstance(refusal, NotSupported)
    assert str(refusal).endswith("; nearest: mem:0x10000/4:rw")


@pytest.mark.parametrize("backend", [A57, A15], ids=["a57", "a15"])
def test_execution_and_data_do_not_share_a_slot(backend: ArmBackend) -> None:
    for access in (X | W, X | R, X | R | W, Access(0)):
        assert isinstance(refusal_of(backend, BASE, 4, access), BadClaim)


def test_more_than_the_slots_of_a_cpu_is_refused_with_what_would_do() -> None:
    refusal = refusal_of(A9, BASE, 16, R | W)
    assert isinstance(refusal, NotSupported), "CPUs with two watchpoints could"
    assert "it takes 2 slots, and a CPU has 1 slot for data" in str(refusal)
    assert str(refusal).endswith("; nearest: mem:0x10000/8:rw, 8 of the 16 bytes")
    assert isinstance(refusal_of(A57, BASE, 17 * 8, W), BadClaim), "and no CPU could hold this"


def test_where_nothing_near_has_any_of_the_bytes_nothing_is_recommended() -> None:
    # A 32-bit kernel takes no slot on any of these.
    assert "nearest" not in str(refusal_of(A15, 0xC060_1000, 4, R | W))
    assert "nearest" not in str(refusal_of(A15, 0xC060_1000, 4, X))
    assert str(refusal_of(A15, 0xBEFF_FFFC, 8, R | W)).endswith("; nearest: mem:0xbefffffc/4:rw, 4 of the 8 bytes")


def test_over_report_saves_slots_and_says_so() -> None:
    assert len(A15.fit(Span(BASE + 1, 6), R | W, ALL).pieces) > 1
    plan = A15.fit(Span(BASE + 1, 6), R | W, Mode(over_report=True))
    assert [piece.span for piece in plan.pieces] == [Span(BASE, 8)]
    refusal = refusal_of(A9, BASE + 1, 6, R | W)
    assert refusal is not None
    assert "1 would do with over-report, and report 8 bytes" in str(refusal)


@pytest.mark.parametrize(
    ("backend", "address", "length", "mode", "rule"),
    [
        (A57, KERNEL_64, 8, Mode(kernel=False), "its hits are not asked for"),
        (A57, BASE, 8, Mode(user=False), "its hits are not asked for"),
        (A57, 2**52 - 4, 8, ALL, "one side only"),
        (A57, 2**64 - 4, 8, ALL, "wrap around"),
        (A57, -8, 8, ALL, "wrap around"),
        (A57, BASE, 0, ALL, "at least one byte"),
        (A15, 0xC000_0000, 8, ALL, "takes no breakpoint"),
        (A15, 2**32, 4, ALL, "wrap around"),
    ],
)
def test_each_rule_has_its_refusal(backend: ArmBackend, address: int, length: int, mode: Mode, rule: str) -> None:
    refusal = refusal_of(backend, address, length, R | W, mode)
    assert isinstance(refusal, BadClaim)
    assert rule in str(refusal)


_NEAREST = re.compile(r"; nearest: mem:(0x[0-9a-f]+)/(\d+):(r|w|rw|x)(?::([ukh]))?(?:, \d+ of the \d+ bytes)?$")

edges = [2**32, 2**52, 2**64, 0xBF00_0000, 2**48, 0]
addresses = st.one_of(
    st.integers(0, 2**64 - 1), st.sampled_from(edges).flatmap(lambda edge: st.integers(edge - 40, edge + 40))
)
lengths = st.one_of(st.integers(0, 80), st.integers(0, 2**33))


@pytest.mark.parametrize("backend", [A57, A9, A15, ON_ARMV8], ids=["a57", "a9", "a15", "aarch32"])
def test_what_a_refusal_recommends_works(backend: ArmBackend) -> None:
    modes = st.sampled_from([ALL, Mode(user=False), Mode(kernel=False)])

    @given(addresses, lengths, st.integers(0, 7).map(Access), modes)
    def works(address: int, length: int, access: Access, mode: Mode) -> None:
        refusal = refusal_of(backend, address, length, access, mode)
        if refusal is not None:
            match = _NEAREST.search(str(refusal))
            if match is None:
                # Nothing that a slot can hold has any of those bytes.
                end = 2**64 if backend is A57 else 0xBF00_0000
                assert address >= end or address + length <= 0 < length, str(refusal)
                return
            near, near_length, letters, seen = match.groups()
            near_mode = Mode(user=seen in (None, "u"), kernel=seen in (None, "k"))
            again = refusal_of(backend, int(near, 16), int(near_length), Access.from_letters(letters), near_mode)
            assert again is None, f"{refusal} -> {again}"

    works()


# --- the factories ---------------------------------------------------------------------------------------------------


def test_both_backends_are_there_with_their_architectures() -> None:
    arm64, armv7 = hwbpd_backends()
    assert (arm64.name, arm64.architectures) == ("arm64", ARM64_ARCHITECTURES)
    assert (armv7.name, armv7.architectures) == ("armv7", ARMV7_ARCHITECTURES)


def test_where_nobody_could_ask_there_is_the_least_the_architecture_allows() -> None:
    assert Arm64Backend(CpuFacts("aarch64")).slots() == {Pool.INST: 2, Pool.DATA: 2}
    assert Armv7Backend(CpuFacts("armv7l")).slots() == {Pool.INST: 1, Pool.DATA: 1}


def test_registers_in_memory_are_of_no_use_to_linux() -> None:
    with pytest.raises(NotSupported, match="not in CP14"):
        Armv7Backend(CpuFacts("armv7l", breakpoints=6, watchpoints=4, debug_version=DebugVersion.V7_MEMORY_MAPPED))


PROFILES = [(name, facts) for factory in hwbpd_backends() for name, facts in factory.profiles.items()]
SLOTS = {
    "cortex-a5": (2, 1),
    "cortex-a7": (5, 4),
    "cortex-a9": (5, 1),
    "cortex-a15": (5, 4),
    "armv7-max": (15, 16),
    "arm64-max": (16, 16),
    "arm64-min": (2, 2),
}


@pytest.mark.parametrize(("name", "facts"), PROFILES, ids=[name for name, _ in PROFILES])
def test_each_profile_has_the_slots_that_linux_reports(name: str, facts: CpuFacts) -> None:
    factory = next(factory for factory in hwbpd_backends() if name in factory.profiles)
    assert facts.architecture in factory.architectures
    backend = factory.make(facts)
    breakpoints, watchpoints = SLOTS.get(name, (6, 4))
    assert backend.slots() == {Pool.INST: breakpoints, Pool.DATA: watchpoints}
    unit = backend.debug_unit()
    assert unit is not None
    assert unit.slots() == backend.slots()
