"""
The view of a tracer, one rule at a time, on kernels that this host need not be.

Whether the rules are the running kernel's is asked in tests/judges/test_pokes.py.
"""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from hwbpd_x86.dr7 import RW, SLOTS, Dr7, Len, SlotControl, encode
from hwbpd_x86.linux import Kernel, kernel_of
from hwbpd_x86.profiles import PROFILES
from hwbpd_x86.ptrace_view import CONTROL, FRESH, STATUS, Event, View, born, peek, poke, trapped

KERNEL = Kernel()
NARROW = kernel_of(PROFILES["i686"])
LONGEST = SlotControl(global_=True, access=RW.WRITE, length=Len.EIGHT)


def word(*slots: SlotControl) -> int:
    first, second, third, fourth = (*slots, *(SlotControl(),) * (SLOTS - len(slots)))
    return encode(Dr7(slots=(first, second, third, fourth)))


def after(*writes: tuple[int, int]) -> View:
    """The view after writes that are all taken."""
    view = FRESH
    for number, value in writes:
        view, answer = poke(KERNEL, view, number, value, free_slots=SLOTS - view.slots_held)
        assert answer == 0
    return view


def test_a_fresh_thread_reads_as_one_that_was_never_traced() -> None:
    assert [peek(FRESH, n) for n in range(8)] == [0, 0, 0, 0, 0, 0, 0xFFFF_0FF0, 0]
    assert FRESH.slots_held == 0


def test_an_address_takes_a_slot_at_once_and_zero_does_not_give_it_back() -> None:
    view = after((2, 0x5001), (2, 0))
    assert view.events == (None, None, Event(0), None)
    assert poke(KERNEL, view, 0, 0x5000, free_slots=0) == (view, errno.ENOSPC)
    assert poke(KERNEL, view, 2, 0x7777, free_slots=0)[1] == 0, "the event that is there needs no other slot"


def test_without_room_a_bad_address_is_refused_for_want_of_room() -> None:
    assert poke(KERNEL, FRESH, 0, KERNEL.user_top, free_slots=1)[1] == errno.EINVAL
    assert poke(KERNEL, FRESH, 0, KERNEL.user_top, free_slots=0)[1] == errno.ENOSPC


def test_a_disabled_event_still_minds_its_length() -> None:
    view = after((0, 0x5000), (CONTROL, word(replace(LONGEST, global_=False))))
    assert not view.events[0].enabled  # type: ignore[union-attr]
    assert poke(KERNEL, view, 0, 0x5001, free_slots=3) == (view, errno.EINVAL)


def test_control_enables_what_was_never_written_at_address_zero() -> None:
    view = after((CONTROL, word(SlotControl(), LONGEST)))
    assert view.events == (None, Event(0, RW.WRITE, Len.EIGHT, enabled=True), None, None)
    assert after((CONTROL, word(replace(LONGEST, global_=False)))).slots_held == 0


@pytest.mark.parametrize(
    "refused",
    [
        replace(LONGEST, access=RW.IO),
        replace(LONGEST, access=RW.EXECUTE),
        replace(LONGEST, global_=False, access=RW.IO),
        LONGEST,  # which does not suit the address
    ],
)
def test_a_refused_control_word_leaves_traces(refused: SlotControl) -> None:
    # Given an enabled event, a disabled one of eight bytes, and one at an odd address,
    disabled = replace(LONGEST, global_=False)
    held = after((0, 0x5000), (1, 0x6000), (3, 0x7001), (CONTROL, word(LONGEST, disabled)))
    assert held.events[1] == Event(0x6000, RW.WRITE, Len.EIGHT)

    # when a control word is refused for the last of them,
    view, answer = poke(KERNEL, held, CONTROL, word(disabled, disabled, LONGEST, refused), free_slots=1)

    # then the word and the enabled event are what they were; the disabled ones are for execution; and the third,
    # which was not there, is now, with its slot.
    assert answer == errno.EINVAL
    assert peek(view, CONTROL) == peek(held, CONTROL)
    assert view.events[0] == held.events[0]
    assert [view.events[n] for n in (1, 2, 3)] == [Event(a, RW.EXECUTE) for a in (0x6000, 0, 0x7001)]
    assert poke(KERNEL, view, 1, 0x6001, free_slots=0)[1] == 0


def test_control_runs_out_of_room_on_the_way() -> None:
    view, answer = poke(KERNEL, FRESH, CONTROL, word(LONGEST, LONGEST, LONGEST), free_slots=2)
    assert answer == errno.ENOSPC
    assert view.slots_held == 2
    assert peek(view, CONTROL) == 0


@given(st.integers(0, 2**64 - 1))
def test_reserved_bits_of_control_and_all_of_status_read_back_as_written(noise: int) -> None:
    control = word(LONGEST) ^ noise & 0xFFFF_FFFF_0000_FF00
    view = after((STATUS, noise), (CONTROL, control))
    assert (peek(view, STATUS), peek(view, CONTROL)) == (noise, control)


@pytest.mark.parametrize("number", [4, 5])
def test_there_is_no_dr4_or_dr5(number: int) -> None:
    view = after((0, 0x5000))
    assert poke(KERNEL, view, number, 0, free_slots=3) == (view, errno.EIO)
    assert peek(view, number) == 0


def test_a_narrow_kernel_has_no_length_of_eight_and_a_lower_end() -> None:
    assert poke(NARROW, FRESH, CONTROL, word(LONGEST), free_slots=0)[1] == errno.EINVAL
    view, answer = poke(NARROW, FRESH, 0, 0xBFFF_FFFF, free_slots=4)
    assert answer == 0
    assert poke(NARROW, view, CONTROL, word(replace(LONGEST, global_=False)), free_slots=3)[1] == errno.EINVAL
    assert poke(NARROW, view, 0, 0xC000_0000, free_slots=3) == (view, errno.EINVAL)


def test_a_trap_replaces_what_was_in_status() -> None:
    view = after((0, 0x5000), (3, 0x5000), (STATUS, 0), (CONTROL, word(LONGEST, SlotControl(), SlotControl(), LONGEST)))
    assert peek(trapped(view, [0, 3]), STATUS) == 0xFFFF_0FF9
    assert peek(trapped(view, [], single_step=True), STATUS) == 0xFFFF_4FF0
    assert trapped(view, [0]).events == view.events


def test_a_child_has_only_a_copy_of_status() -> None:
    view = after((0, 0x5000), (STATUS, 0x1234), (CONTROL, word(LONGEST)))
    assert [peek(born(view), n) for n in range(8)] == [0, 0, 0, 0, 0, 0, 0x1234, 0]
    assert born(view).slots_held == 0
