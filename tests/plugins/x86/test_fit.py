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
from tests.plugins.x86.requests import nearest_of, recommends, refusal_of

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
BESIDE = Mode(over_report=True)


# --- against a slow rule ---------------------------------------------------------------------------------------------


def watched(address: int, ignored_bits: int) -> set[int]:
    """The bytes whose addresses compare equal to the register when that many low bits are left out."""
    window = 1 << ignored_bits
    return {
        byte for byte in range(address - window, address + window) if byte >> ignored_bits == address >> ignored_bits
    }


def one_slot_holds(facts: CpuFacts, address: int, length: int, access: Access) -> bool:
    """Try every setting of one slot; return whether one of them is just what was asked for."""
    word_bytes = 8 if facts.architecture == "x86_64" else 4
    if access == X:
        return length == word_bytes
    asked = set(range(address, address + length))
    by_len = range(4 if word_bytes == 8 else 3)
    ignored = range(9) if "bpext" in facts.features else by_len
    return access in (W, R | W) and any(watched(address, bits) == asked for bits in ignored)


@pytest.mark.parametrize("facts", [INTEL, AMD, OLD])
def test_every_small_request_is_judged_as_the_registers_would(facts: CpuFacts) -> None:
    backend = X86Backend(facts)
    bases = (0x404000, 0x404008, 0x404010, 0x404020)
    for length, access, base, offset in product([*range(10), 16, 64], EVERY_ACCESS, bases, range(8)):
        request = Span(base + offset, length), access, SEE_ALL
        refusal = refusal_of(backend, request)
        if one_slot_holds(facts, base + offset, length, access):
            assert refusal is None
            assert backend.fit(*request) == Plan((Piece(request[0], access, Pool.ANY),))
        elif refusal is None:
            # Data can be cut into pieces (tests/plugins/test_planner.py has how many), each of which a slot holds.
            pieces = backend.fit(*request).pieces
            assert 1 < len(pieces) <= 4
            assert all(one_slot_holds(facts, one.span.address, one.span.length_bytes, one.access) for one in pieces)
        else:
            assert isinstance(refusal, BadClaim | NotSupported)


def test_a_span_is_cut_into_neighbours_in_ascending_order() -> None:
    plan = X86Backend(INTEL).fit(Span(0x404041, 7), R | W, SEE_ALL)
    spans = [Span(0x404041, 1), Span(0x404042, 2), Span(0x404044, 4)]
    assert plan == Plan(tuple(Piece(span, R | W, Pool.ANY) for span in spans))


def test_hits_beside_the_span_save_slots_for_those_who_accept_them() -> None:
    # Given seven bytes of eight, which take three slots,
    backend, span = X86Backend(INTEL), Span(0x404041, 7)

    # when hits of the eighth are welcome, then one does; where nothing is saved, nothing is widened.
    assert backend.fit(span, W, BESIDE).pieces == (Piece(Span(0x404040, 8), W, Pool.ANY),)
    assert backend.fit(Span(0x404044, 4), W, BESIDE) == backend.fit(Span(0x404044, 4), W, SEE_ALL)


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
    for address in (end - word_bytes + 1, end - 1):
        refusal = refusal_of(backend, (Span(address, word_bytes), X, SEE_ALL))
        assert isinstance(refusal, BadClaim)
        assert nearest_of(refusal)[0][0] == Span(end - word_bytes, word_bytes)
    for address in (end, end + 5):
        refusal = refusal_of(backend, (Span(address, word_bytes), X, SEE_ALL))
        assert isinstance(refusal, BadClaim)
        assert not recommends(refusal), "nothing has any of those bytes"
    assert refusal_of(backend, (Span(end - 1, 1), W, SEE_ALL)) is None
    assert isinstance(refusal_of(backend, (Span(end - 1, 2), W, SEE_ALL)), BadClaim)
    assert isinstance(refusal_of(backend, (Span(end, 1), W, SEE_ALL)), BadClaim)


@pytest.mark.parametrize("power", range(4, 33))
def test_an_address_mask_covers_blocks_up_to_its_own_width(power: int) -> None:
    span = Span(1 << 40, 1 << power)
    assert refusal_of(X86Backend(AMD), (span, W, SEE_ALL)) is None
    # Without masks, four slots of eight bytes are the most.
    assert isinstance(refusal_of(X86Backend(INTEL), (span, W, SEE_ALL)), NotSupported) == (power > 5)


def test_four_masks_cover_no_more_than_four_times_their_own_width() -> None:
    assert refusal_of(X86Backend(AMD), (Span(0, 1 << 34), W, SEE_ALL)) is None
    for facts in (INTEL, AMD):
        assert isinstance(refusal_of(X86Backend(facts), (Span(0, (1 << 34) + 1), W, SEE_ALL)), BadClaim)


# --- what a refusal says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "request_", "sentence"),
    [
        (
            INTEL,
            (Span(0x404041, 40), W, SEE_ALL),
            "mem:0x404041/40:w: it takes 8 slots, and a CPU has 4: one holds 1, 2, 4 or 8 bytes, at an address "
            "divisible by that; nearest: mem:0x404048/32:w, 32 of the 40 bytes",
        ),
        (
            INTEL,
            (Span(0x404041, 30), W, SEE_ALL),
            "mem:0x404041/30:w: it takes 8 slots, and a CPU has 4: one holds 1, 2, 4 or 8 bytes, at an address "
            "divisible by that; 4 would do with over-report, and report 32 bytes; nearest: mem:0x404044/24:w, "
            "24 of the 30 bytes",
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
            (Span(0x404040, 4), W | X, SEE_ALL),
            "mem:0x404040/4:wx: R/W of DR7 holds one code, for execution or for data; x needs a slot of its own; "
            "nearest: mem:0x404040/4:w",
        ),
        (
            INTEL,
            (Span(0x404000, 64), W, BESIDE),
            "mem:0x404000/64:w: it takes 8 slots, and a CPU has 4: one holds 1, 2, 4 or 8 bytes, at an address "
            "divisible by that; this CPU lacks the address masks (bpext) that would hold it; nearest: "
            "mem:0x404000/32:w, 32 of the 64 bytes",
        ),
        (
            AMD,
            (Span(0x404001, 62), W, Mode(user=False)),
            "mem:0x404001/62:w:k: it takes 10 slots, and a CPU has 4: one holds a power of two up to 2^32 bytes, at an "
            "address divisible by it; 1 would do with over-report, and report 64 bytes; nearest: mem:0x404008/48:w:k, "
            "48 of the 62 bytes",
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
    if not recommends(refusal):
        # (but for what no address register can hold a byte of)
        assert address >= (2**32 if facts is OLD else 2**64)
        return

    # when the request it recommends is made instead, then it is accepted as it stands,
    nearest, _ = nearest_of(refusal)
    assert refusal_of(backend, nearest) is None

    # and sees at least what was asked for, of data at least.
    assert access & (R | W) in nearest[1] or access == NOTHING
    assert nearest[2].user == mode.user
    assert nearest[2].kernel >= mode.kernel


@pytest.mark.parametrize("facts", [INTEL, AMD, OLD])
def test_the_nearest_watchpoint_holds_the_most_that_the_slots_can_and_no_others(facts: CpuFacts) -> None:
    backend = X86Backend(facts)
    for address, length in product(range(0x404000, 0x404008), (*range(1, 20), 33)):
        asked = Span(address, length)
        refusal = refusal_of(backend, (asked, R, SEE_ALL))
        assert refusal is not None
        (near, access, _), coverage = nearest_of(refusal)

        parts = (Span(first, n) for n in range(length, 0, -1) for first in range(address, address + length - n + 1))
        most = next(part for part in parts if refusal_of(backend, (part, R | W, SEE_ALL)) is None).length_bytes
        assert (near.length_bytes, access) == (most, R | W)
        assert address <= near.address
        assert near.address + most <= address + length
        # What it leaves out is said; where it leaves out nothing, nothing is.
        assert coverage == (None if most == length else (most, length))


# --- what the backend says of itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", ALL_FACTS)
def test_what_is_described_is_what_fits(facts: CpuFacts) -> None:
    backend = X86Backend(facts)
    described = backend.describe()
    for access in EVERY_ACCESS:
        fitting = [n for n in range(130) if one_slot_holds(facts, 0x404000, n, access)]
        assert all(len(backend.fit(Span(0x404000, n), access, SEE_ALL).pieces) == 1 for n in fitting)
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
