"""
The debug registers that a tracer sees of a thread, by PTRACE_PEEKUSER and POKEUSER at struct user's u_debugreg[n].

They are no registers. Linux keeps an event for each of DR0-DR3 that was ever written, a DR7 and a DR6, per thread; the
events get real registers while the thread runs, in any order. The rules:

1. DR0-DR3 read as the address of their event, 0 without one. DR4 and DR5 read as 0, and writing them is EIO.
2. DR6 holds what was written, whole and unchecked, until the next trap; see ``trapped``. It starts as 0xffff0ff0.
3. DR7 reads as what was last written and taken, whole, reserved bits and L bits and all. It starts as 0, not 0x400.
4. Writing DRn makes an event: of writes to one byte, disabled. **It takes a slot at once**, whatever DR7 says, and that
   can fail (ENOSPC), before the address is looked at.
5. Writing DRn again moves the event, which keeps its type, length and slot. The address has to suit them, also while it
   is disabled: EINVAL. Zero is an address like any other, and gives nothing back.
6. Writing DR7 gives, in the order of the slots, each event its type, length and whether it is enabled (by L or G); also
   type and length of those it disables, which are checked just the same. Where there is no event, enabling makes one at
   address 0, at which every length fits, and disabling does nothing.
7. Rule 6 can fail (EINVAL: R/W 2, execution with LEN not 0, an address not aligned or, on a 32-bit kernel, LEN 2;
   ENOSPC). Then DR7 stays as it was, and DR7 is written once more inside, as the *enabled* events were before. So these
   are what they were. But those that were **disabled become execution breakpoints**, disabled, to which any address is
   aligned; and those made on the way stay, as such too, and **keep their slots**.
8. An address of the kernel is EINVAL always, even for root: ptrace's events exclude the kernel.
9. A slot, once taken, stays taken until the thread exits or execs; detaching or dying, the tracer gives nothing back.
   An exec leads to ``FRESH``. A child, or a new thread, inherits no event and no DR7, but a copy of DR6: ``born``.

This is the view of a tracer of the kernel's own word size; a 32-bit tracer on a 64-bit kernel sees the lower halves.

Linux, arch/x86/kernel/ptrace.c, ptrace_get_debugreg(), ptrace_set_debugreg(), ptrace_write_dr7(); ptrace(2).
"""

from __future__ import annotations

from collections.abc import Iterable
from errno import EINVAL, EIO

from msgspec import Struct
from msgspec.structs import replace

from hwbpd.fields import by_name
from hwbpd_x86 import dr6, dr7
from hwbpd_x86.dr7 import RW, SLOTS, Len, SlotControl
from hwbpd_x86.linux import EXECUTE, READ_WRITE, WRITE, Kernel, Request, open_errno, parse_errno

STATUS, CONTROL = 6, 7  # the numbers of DR6 and DR7

_DR6 = by_name(dr6.FIELDS)
_TYPES = {RW.EXECUTE: EXECUTE, RW.WRITE: WRITE, RW.READ_WRITE: READ_WRITE}


class Event(Struct, frozen=True):
    """The event behind one of DR0-DR3."""

    address: int
    access: RW = RW.WRITE
    length: Len = Len.ONE
    enabled: bool = False


class View(Struct, frozen=True):
    """What a tracer can read, and what it cannot: the events' types and lengths."""

    events: tuple[Event | None, ...] = (None,) * SLOTS
    status: int = dr6.RESET
    control: int = 0

    @property
    def slots_held(self) -> int:
        """How many slots the thread has by ptrace."""
        return sum(event is not None for event in self.events)


FRESH = View()  # after exec


def peek(view: View, number: int) -> int:
    """Return what DR``number`` reads as, 0 to 7: rules 1 to 3."""
    if number == STATUS:
        return view.status
    if number == CONTROL:
        return view.control
    event = view.events[number] if number < SLOTS else None
    return 0 if event is None else event.address


def poke(kernel: Kernel, view: View, number: int, value: int, *, free_slots: int) -> tuple[View, int]:
    """
    Write DR``number``, 0 to 7, which holds a word of the kernel.

    :param free_slots: how many slots the thread can have beside those it has.
    :return: the view afterwards, and 0 or the errno. After a refusal the view may have changed, too: rule 7.
    """
    assert 0 <= value < kernel.end, f"{value:#x} is no word of this kernel"
    if number < SLOTS:
        return _poke_address(kernel, view, number, value, free_slots)
    if number == STATUS:
        return replace(view, status=value), 0
    if number == CONTROL:
        return _poke_control(kernel, view, value, free_slots)
    return view, EIO


def trapped(view: View, hit: Iterable[int], *, single_step: bool = False) -> View:
    """
    Return the view after a #DB in user mode.

    DR6 is written anew, not added to: the slots that were hit by their numbers in this view, and BS. What else the
    hardware has to say (BD, BT, BLD, RTM) never shows. A #DB in the kernel leaves the view alone.

    :param hit: numbers of enabled events.
    """
    reasons = _DR6["BS"].place(single_step)
    for number in hit:
        reasons |= _DR6[f"B{number}"].mask
    return replace(view, status=dr6.to_hardware(reasons))


def born(view: View) -> View:
    """Return the view of a thread or process that one with ``view`` has just made."""
    return View(status=view.status)


def _poke_address(kernel: Kernel, view: View, number: int, address: int, free_slots: int) -> tuple[View, int]:
    event = view.events[number]
    if event is None:  # rule 4
        event = Event(address)
        errno = open_errno(kernel, _request(kernel, event), free_slots=free_slots)
    else:  # rule 5
        event = replace(event, address=address)
        errno = parse_errno(kernel, _request(kernel, event))
    return (view, errno) if errno else (_with(view, number, event), 0)


def _poke_control(kernel: Kernel, view: View, word: int, free_slots: int) -> tuple[View, int]:
    after, errno = _controlled(kernel, view, dr7.decode(word).slots, free_slots)
    if not errno:
        return replace(after, control=word), 0
    # Rule 7. Of what was disabled, the word made from the events before says nothing, and that reads as execution.
    before = tuple(
        SlotControl(global_=True, access=event.access, length=event.length)
        if event is not None and event.enabled
        else SlotControl()
        for event in view.events
    )
    undone, failed = _controlled(kernel, after, before, 0)
    assert not failed, f"{view} cannot be put back"
    return undone, errno


def _controlled(
    kernel: Kernel, view: View, controls: tuple[SlotControl, ...], free_slots: int
) -> tuple[View, int]:
    """Return the view with its events changed by rule 6, as far as that went, and 0 or the errno."""
    for number, (event, control) in enumerate(zip(view.events, controls, strict=True)):
        if event is None and not control.armed:
            continue
        if not _can_say(kernel, control):
            return view, EINVAL
        changed = Event(0 if event is None else event.address, control.access, control.length, control.armed)
        if event is None:
            errno = open_errno(kernel, _request(kernel, changed), free_slots=free_slots)
            free_slots -= 1
        else:
            errno = parse_errno(kernel, _request(kernel, changed))
        if errno:
            return view, errno
        view = _with(view, number, changed)
    return view, 0


def _can_say(kernel: Kernel, control: SlotControl) -> bool:
    """Whether Linux has a type and a length for it."""
    if control.access == RW.EXECUTE:
        return control.length == Len.ONE
    return control.access in _TYPES and control.length.length_bytes <= kernel.word_bytes


def _request(kernel: Kernel, event: Event) -> Request:
    length = kernel.word_bytes if event.access == RW.EXECUTE else event.length.length_bytes
    return Request(_TYPES[event.access], event.address, length)


def _with(view: View, number: int, event: Event) -> View:
    return replace(view, events=(*view.events[:number], event, *view.events[number + 1 :]))
