"""What fits a slot of DR0-DR3, judged by a rule that works out which bytes each setting of the registers watches."""

from __future__ import annotations

from itertools import product

import msgspec
import pluggy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hwbpd_x86
from hwbpd.core.errors import BadClaim, NotSupported
from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Span
from hwbpd.hookspecs import Backend, BackendFactory, CpuFacts, HookSpecs
from hwbpd_x86.fit import X86Backend
from tests.plugins.x86.requests import nearest_of, refusal_of

INTEL = CpuFacts("x86_64")
AMD = CpuFacts("x86_64", frozenset({"bpext"}))
LA57 = CpuFacts("x86_64", frozenset({"la57"}))
OLD = CpuFacts("i686")
ALL_FACTS = [INTEL, AMD, LA57, OLD]

R, W, X = Access.READ, Access.WRITE, Access.EXECUTE
NOTHING = Access(0)
EVERY_ACCESS = [Access(bits) for bits in range(8)]
SEE_ALL = Mode()
USER_ONLY = Mode(kernel=False)


# --- against a slow rule ---------------------------------------------------------------------------------------------


def watched(address: int, ignored_bits: int) -> set[int]:
    """The bytes whose addresses compare equal to the register when that many low bits are left out."""
    window = 1 << ignored_bits
    return {
        byte for byte in range(address - window, address + window) if byte >> ignored_bits == address >> ignored_bits
    }


def slow_verdict(facts: CpuFacts, address: int, length: int, access: Access) -> type[Exception] | None:
    """Try every setting of one slot; return how it refuses the request, or ``None`` when one of them is just that."""
    word_bytes = 8 if facts.architecture == "x86_64" else 4
    if access == X:
        return None if length == word_bytes else BadClaim
    asked = set(range(address, address + length))
    expressible = access in (W, R | W)
    by_len = any(watched(address, bits) == asked for bits in range(4 if word_bytes == 8 else 3))
    by_mask = any(watched(address, bits) == asked for bits in range(9))
    if expressible and by_len:
        return None
    if expressible and by_mask:
        return None if "bpext" in facts.features else NotSupported
    return BadClaim


@pytest.mark.parametrize("facts", [INTEL, AMD, OLD])
def test_every_small_request_is_judged_as_the_registers_would(facts: CpuFacts) -> None:
    backend = X86Backend(facts)
    bases = (0x404000, 0x404008, 0x404010, 0x404020)
    for length, access, base, offset in product([*range(10), 16, 64], EVERY_ACCESS, bases, range(8)):
        refusal = refusal_of(backend, (Span(base + offset, length), access, SEE_ALL))
        verdict = slow_verdict(facts, base + offset, length, access)
        assert (type(refusal) if refusal else None) is verdict, f"{base + offset:#x}/{length} {access}: {refusal}"


def test_what_fits_is_one_piece_and_exactly_what_was_asked() -> None:
    plan = X86Backend(INTEL).fit(Span(0x404040, 8), R | W, SEE_ALL)
    assert plan == Plan((Piece(Span(0x404040, 8), R | W, Pool.ANY),))


# --- the ends of the address space -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("facts", "top"), [(INTEL, 0x7FFF_FFFF_F000), (LA57, 0xFF_FFFF_FFFF_F000), (OLD, 0xC000_0000)])
@pytest.mark.parametrize("access", [W, R | W, X])
def test_a_kernel_address_needs_the_kernels_hits(facts: CpuFacts, top: int, access: Access) -> None:
    backend = X86Backend(facts)
    length = 4 if facts is OLD else 8

    # Below the top, nothing is asked; an execution breakpoint is where its address is, whatever its nominal length.
    last = top - 1 if access == X else top - length
    assert refusal_of(backend, (Span(last, length), access, USER_ONLY)) is None

    # From it on, user hits alone are refused, and the way out is to see the kernel's.
    request = Span(top, length), access, USER_ONLY
    refusal = refusal_of(backend, request)
    assert isinstance(refusal, BadClaim)
    assert nearest_of(refusal) == ((Span(top, length), access, SEE_ALL), None)
    assert refusal_of(backend, (Span(top, length), access, SEE_ALL)) is None


def test_an_address_that_is_not_canonical_counts_as_the_kernels() -> None:
    backend = X86Backend(INTEL)
    assert isinstance(refusal_of(backend, (Span(1 << 47, 1), W, USER_ONLY)), BadClaim)
    assert refusal_of(backend, (Span(1 << 47, 1), W, SEE_ALL)) is None
    assert refusal_of(backend, (Span(1 << 63, 1), W, SEE_ALL)) is None


@pytest.mark.parametrize(("facts", "end"), [(INTEL, 2**64), (OLD, 2**32)])
def test_no_span_reaches_past_the_last_address(facts: CpuFacts, end: int) -> None:
    backend = X86Backend(facts)
    word_bytes = 4 if facts is OLD else 8
    assert refusal_of(backend, (Span(end - word_bytes, word_bytes), X, SEE_ALL)) is None
    for address in (end - word_bytes + 1, end - 1, end, end + 5):
        refusal = refusal_of(backend, (Span(address, word_bytes), X, SEE_ALL))
        assert isinstance(refusal, BadClaim)
        assert nearest_of(refusal)[0][0] == Span(end - word_bytes, word_bytes)
    assert refusal_of(backend, (Span(end - 1, 1), W, SEE_ALL)) is None
    assert isinstance(refusal_of(backend, (Span(end - 1, 2), W, SEE_ALL)), BadClaim)
    assert isinstance(refusal_of(backend, (Span(end, 1), W, SEE_ALL)), BadClaim)


@pytest.mark.parametrize("power", range(4, 33))
def test_an_address_mask_covers_blocks_up_to_its_own_width(power: int) -> None:
    span = Span(1 << 40, 1 << power)
    assert refusal_of(X86Backend(AMD), (span, W, SEE_ALL)) is None
    assert isinstance(refusal_of(X86Backend(INTEL), (span, W, SEE_ALL)), NotSupported)


def test_no_mask_covers_more_than_its_own_width() -> None:
    for facts in (INTEL, AMD):
        assert isinstance(refusal_of(X86Backend(facts), (Span(0, 1 << 33), W, SEE_ALL)), BadClaim)


# --- what a refusal says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "request_", "sentence"),
    [
        (
            INTEL,
            (Span(0x404041, 4), W, SEE_ALL),
            "mem:0x404041/4:w: DR0-DR3 hold 4 bytes only at an address divisible by 4; nearest: mem:0x404040/8:w",
        ),
        (
            INTEL,
            (Span(0x404046, 4), W, SEE_ALL),
            "mem:0x404046/4:w: DR0-DR3 hold 4 bytes only at an address divisible by 4; "
            "nearest: mem:0x404046/2:w, 2 of the 4 bytes",
        ),
        (
            INTEL,
            (Span(0x401000, 1), X, USER_ONLY),
            "mem:0x401000/1:x:u: LEN of an execution breakpoint is always 0 in DR7, which Linux calls 8 bytes; "
            "nearest: mem:0x401000/8:x:u",
        ),
        (
            INTEL,
            (Span(0x404040, 4), R, SEE_ALL),
            "mem:0x404040/4:r: R/W of DR7 has no code for reads alone; rw reports reads and writes; "
            "nearest: mem:0x404040/4:rw",
        ),
        (
            INTEL,
            (Span(0x404040, 3), R | W, SEE_ALL),
            "mem:0x404040/3:rw: LEN of DR7 has no code for 3 bytes, only for 1, 2, 4 and 8; nearest: mem:0x404040/4:rw",
        ),
        (
            INTEL,
            (Span(0x404040, 4), W | X, SEE_ALL),
            "mem:0x404040/4:wx: R/W of DR7 holds one code, for execution or for data; x needs a slot of its own; "
            "nearest: mem:0x404040/4:w",
        ),
        (
            INTEL,
            (Span(0x404000, 16), W, SEE_ALL),
            "mem:0x404000/16:w: LEN of DR7 ends at 8 bytes, and this CPU lacks the address masks (bpext) for more; "
            "nearest: mem:0x404000/8:w, 8 of the 16 bytes",
        ),
        (
            AMD,
            (Span(0x404008, 16), W, SEE_ALL),
            "mem:0x404008/16:w: address masks cover 16 bytes only at an address divisible by 16; "
            "nearest: mem:0x404000/32:w",
        ),
        (
            INTEL,
            (Span(0x404008, 16), W, Mode(user=False)),
            "mem:0x404008/16:w:k: LEN of DR7 has no code for 16 bytes, only for 1, 2, 4 and 8; "
            "nearest: mem:0x404008/8:w:k, 8 of the 16 bytes",
        ),
    ],
)
def test_a_refusal_names_the_register_the_rule_and_the_way_out(
    facts: CpuFacts, request_: tuple[Span, Access, Mode], sentence: str
) -> None:
    assert str(refusal_of(X86Backend(facts), request_)) == sentence


INTERESTING = (0, 0x404000, 0x7FFF_FFFF_F000, 1 << 32, 0xFF_FFFF_FFFF_F000, 1 << 47, 1 << 63, 2**64)
ADDRESSES = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(lambda base, offset: max(0, base + offset), st.sampled_from(INTERESTING), st.integers(-20, 20)),
)
LENGTHS = st.one_of(st.integers(0, 20), st.integers(0, 2**33), st.sampled_from([1 << n for n in range(34)]))
MODES = st.builds(Mode, user=st.booleans(), kernel=st.booleans())


@given(st.sampled_from(ALL_FACTS), ADDRESSES, LENGTHS, st.sampled_from(EVERY_ACCESS), MODES)
def test_the_nearest_request_is_accepted(
    facts: CpuFacts, address: int, length: int, access: Access, mode: Mode
) -> None:
    # Given any request that is refused,
    backend = X86Backend(facts)
    refusal = refusal_of(backend, (Span(address, length), access, mode))
    if refusal is None:
        return

    # when the request it recommends is made instead, then it is accepted as it stands,
    nearest, _ = nearest_of(refusal)
    assert refusal_of(backend, nearest) is None

    # and sees at least what was asked for, of data at least.
    assert access & (R | W) in nearest[1] or access == NOTHING
    assert nearest[2].user == mode.user
    assert nearest[2].kernel >= mode.kernel


@pytest.mark.parametrize(
    ("facts", "lengths"), [(INTEL, (1, 2, 4, 8)), (AMD, (1, 2, 4, 8, 16, 32, 64)), (OLD, (1, 2, 4))]
)
def test_the_nearest_watchpoint_covers_the_most_that_one_slot_can_and_the_fewest_others(
    facts: CpuFacts, lengths: tuple[int, ...]
) -> None:
    backend = X86Backend(facts)
    blocks = [Span(start, length) for length in lengths for start in range(0x403FC0, 0x404080, length)]
    for address, length in product(range(0x404000, 0x404010), range(1, 36)):
        refusal = refusal_of(backend, (Span(address, length), R, SEE_ALL))
        assert refusal is not None
        (near, access, _), coverage = nearest_of(refusal)

        def covered(block: Span, first: int = address, end: int = address + length) -> int:
            return max(0, min(block.address + block.length_bytes, end) - max(block.address, first))

        most = max(map(covered, blocks))
        assert covered(near) == most
        assert near.length_bytes == min(block.length_bytes for block in blocks if covered(block) == most)
        assert access == R | W
        # What it leaves out is said; where it leaves out nothing, nothing is.
        assert coverage == (None if most == length else (most, length))


# --- what the backend says of itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", ALL_FACTS)
def test_what_is_described_is_what_fits(facts: CpuFacts) -> None:
    backend = X86Backend(facts)
    described = backend.describe()
    for access in EVERY_ACCESS:
        fitting = [n for n in range(130) if refusal_of(backend, (Span(0x404000, n), access, SEE_ALL)) is None]
        assert [n for n in described["lengths"].get(access.letters, []) if n < 130] == fitting, access
    for letters, lengths in described["lengths"].items():
        assert lengths == sorted(lengths)
        assert described["default_lengths"][letters] in lengths
        assert described["reports"][letters] == ("before" if letters == "x" else "after")
    assert all(isinstance(note, str) for note in described["notes"])


@pytest.mark.parametrize("facts", ALL_FACTS)
def test_the_description_is_plain_enough_for_the_wire(facts: CpuFacts) -> None:
    described = X86Backend(facts).describe()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(described)) == described


def test_breakpoints_and_watchpoints_share_one_pool_of_four() -> None:
    assert X86Backend(INTEL).slots() == {Pool.ANY: 4}


def test_the_plugin_brings_one_backend_for_both_widths() -> None:
    # Given the plugin as the daemon registers it,
    manager = pluggy.PluginManager("hwbpd")
    manager.add_hookspecs(HookSpecs)
    manager.register(hwbpd_x86)
    manager.check_pending()

    # when it is asked for backends,
    [[factory]] = manager.hook.hwbpd_backends()

    # then there is one, which makes what the contract wants.
    assert isinstance(factory, BackendFactory)
    assert factory.architectures >= {"x86_64", "i686"}
    backend = factory.make(INTEL)
    assert isinstance(backend, Backend)
    assert backend.name == factory.name == "x86"
