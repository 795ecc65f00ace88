"""
The debug registers that a tracer sees of a thread: regsets on arm64, numbered registers on ARMv7 and for AArch32 tasks.

They are no registers. Linux keeps an event for each index that was ever written, per thread; events get real registers
while the thread runs, in any order. The rules that both views share:

1. An index has an address and a control word. The first write to either **makes an event and takes a slot at once**:
   disabled, at address 0, of length 4, X for breakpoints and RW for watchpoints. That can fail (ENOSPC).
2. A write changes the event as a whole; what Linux does not take (linux.py) leaves it as it was, and keeps the slot.
3. There are 16 indices of each sort, however many slots there are. Nothing gives a slot back but the thread's exit or
   exec; detaching does not. A child starts without any.
4. Kernel addresses are refused (EINVAL): ptrace's events exclude the kernel.

arm64, PTRACE_GETREGSET and SETREGSET with NT_ARM_HW_BREAK and NT_ARM_HW_WATCH (``Regset``):

5. The first word says the version of the architecture and how many slots there are; then 16 pairs of a doubleword, a
   word, and a word of padding. A set goes on in order for as many bytes as it has, each address and control word being
   a write of its own; at the first that is refused it stops, and what came before stays. So whoever sends all 264 bytes
   asks for 16 slots, and gets ENOSPC after as many as there are.
6. A control word without E only disables, whatever else it says. With E its BAS must be neighbouring bytes (EINVAL);
   the type that LSC says must not go beyond X, or RW (EINVAL); the address moves up by the lowest byte selected, **from
   where it is**: to write the control word twice without the address moves it twice.
7. What is read is what Linux would write to the registers: the address of the word or doubleword, BAS moved up to where
   the address was, PAC of user mode.

ARMv7, PTRACE_GETHBPREGS and SETHBPREGS (``Numbered``); on arm64 for AArch32 tasks:

8. Register 0 says how many there are, the greatest length and the version; writing it does nothing. Breakpoints have
   positive numbers, watchpoints negative; odd ones are addresses, even ones control words: 1 and 2, 3 and 4, and so on.
9. ARMv7: the control word's BAS starts at its lowest bit (1, 3, 0xf, 0xff; else EINVAL), since the address says where.
   It is taken at its word even without E, so **to write 0 is EINVAL**: to disable, clear E and leave the rest. What is
   read is the address as it was written, and BAS moved back down.
10. ARMv7: 33 to 64 lead to the watchpoints' indices, as if these were breakpoints. Beyond, and below -32, it is EINVAL.
    arm64 has 32 of either sign, with rules 6 and 7.

Linux, arch/arm64/kernel/ptrace.c, hw_break_set(), ptrace_hbp_set_ctrl(), compat_ptrace_sethbpregs(); arch/arm/kernel/
ptrace.c, ptrace_sethbpregs().
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EINVAL, ENOSPC

from msgspec import Struct
from msgspec.structs import replace

from hwbpd.core.model import Pool
from hwbpd_arm import wcr
from hwbpd_arm.linux import EXECUTE, READ_WRITE, Kernel, Request, Usable, contents, open_errno, parse_errno

INDICES = 16
REGSET_BYTES = 8 + 16 * INDICES
_ENTRY_BYTES = 16
_ADDRESS_BYTES, _CONTROL_BYTES = 8, 4

Index = tuple[Pool, int]


class Event(Struct, frozen=True):
    """The event behind an index."""

    bp_type: int
    bp_addr: int = 0
    bp_len: int = 4
    enabled: bool = False


class View(Struct, frozen=True):
    """The events of a thread; those that were never written are left out. The default: the thread after exec."""

    events: Mapping[Index, Event] = {}

    def slots_held(self, pool: Pool) -> int:
        """How many slots of a pool the thread has by ptrace."""
        return sum(_pool_of(event) == pool for event in self.events.values())


FRESH = View()
Outcome = tuple[View, int]  # the view afterwards, and 0 or the errno


class Tracer(Struct, frozen=True):
    """
    A kernel and a thread that is traced.

    :param free: how many slots of each pool the thread can have by ptrace, those that it has included.
    :param compat: arm64: whether the thread is in AArch32 state.
    """

    kernel: Kernel
    usable: Usable
    free: Mapping[Pool, int]
    compat: bool = False

    def _made(self, view: View, index: Index, bp_type: int) -> Outcome:
        """Rule 1."""
        if index in view.events:
            return view, 0
        event = Event(bp_type)
        pool = _pool_of(event)
        free = self.free.get(pool, 0) - view.slots_held(pool)
        errno = open_errno(self.kernel, self._request(event), free_slots=free)
        return (view, errno) if errno else (View({**view.events, index: event}), 0)

    def _changed(self, view: View, index: Index, event: Event) -> Outcome:
        """Rule 2."""
        errno = parse_errno(self.kernel, self._request(event))
        pool = _pool_of(event)
        if not errno and pool != _pool_of(view.events[index]) and view.slots_held(pool) >= self.free.get(pool, 0):
            errno = ENOSPC  # rule 10 leads here: what was a breakpoint becomes a watchpoint
        return (view, errno) if errno else (View({**view.events, index: event}), 0)

    def _request(self, event: Event) -> Request:
        return Request(event.bp_type, event.bp_addr, event.bp_len, compat=self.compat, own_handler=True)

    def _set_address(self, view: View, index: Index, address: int, bp_type: int) -> Outcome:
        view, errno = self._made(view, index, bp_type)
        if errno:
            return view, errno
        return self._changed(view, index, replace(view.events[index], bp_addr=address))

    def _set_control(self, view: View, index: Index, word: int, bp_type: int) -> Outcome:
        """Rule 6."""
        view, errno = self._made(view, index, bp_type)
        if errno:
            return view, errno
        event = view.events[index]
        control = wcr.decode(word)
        if not control.enabled:
            return self._changed(view, index, replace(event, enabled=False))
        lowest = (control.byte_select & -control.byte_select).bit_length() - 1
        length = control.byte_select.bit_length() - lowest
        wanted = int(control.load_store) or EXECUTE
        if not control.byte_select or control.byte_select.bit_count() != length or wanted & bp_type != wanted:
            return view, EINVAL
        return self._changed(view, index, Event(wanted, event.bp_addr + lowest, length, enabled=True))

    def _read(self, view: View, index: Index) -> tuple[int, int]:
        """Rule 7: address and control word."""
        event = view.events.get(index)
        if event is None:
            return 0, 0
        held = contents(self.kernel, self._request(event), enabled=event.enabled)
        return held.address, held.control


class Regset(Tracer, frozen=True):
    """The view of an arm64 tracer."""

    def read(self, view: View, pool: Pool) -> bytes:
        """Return all 264 bytes that PTRACE_GETREGSET has for breakpoints (INST) or watchpoints (DATA)."""
        slots = self.usable.breakpoints if pool == Pool.INST else self.usable.watchpoints
        raw = (self.kernel.version << 8 | slots).to_bytes(8, "little")
        for number in range(INDICES):
            address, control = self._read(view, (pool, number))
            raw += address.to_bytes(8, "little") + control.to_bytes(8, "little")
        return raw

    def write(self, view: View, pool: Pool, raw: bytes) -> Outcome:
        """
        Write as PTRACE_SETREGSET does: rule 5.

        :param raw: any number of bytes; more than 264 are left out.
        :return: the view afterwards, and 0 or the errno. After a refusal the view may have changed, too.
        """
        if len(raw) % 4:
            return view, EINVAL
        bp_type = EXECUTE if pool == Pool.INST else READ_WRITE
        errno = 0
        for number, start in enumerate(range(8, min(len(raw), REGSET_BYTES), _ENTRY_BYTES)):
            entry = raw[start : start + _ENTRY_BYTES]
            if len(entry) < _ADDRESS_BYTES:
                return view, EINVAL
            address = int.from_bytes(entry[:_ADDRESS_BYTES], "little")
            view, errno = self._set_address(view, (pool, number), address, bp_type)
            if errno:
                break
            control = entry[_ADDRESS_BYTES : _ADDRESS_BYTES + _CONTROL_BYTES]
            if control:
                word = int.from_bytes(control, "little")
                view, errno = self._set_control(view, (pool, number), word, bp_type)
                if errno:
                    break
        return view, errno


class Numbered(Tracer, frozen=True):
    """The view of a 32-bit tracer, on ARMv7 or, of an AArch32 task, on arm64."""

    def peek(self, view: View, number: int) -> tuple[int, int]:
        """Return what register ``number`` reads as, and 0; or 0 and the errno."""
        if number == 0:
            words = (self.kernel.version, self.kernel.lanes, self.usable.watchpoints, self.usable.breakpoints)
            return int.from_bytes(bytes(words), "big"), 0
        index = self._index(number)
        if index is None:
            return 0, EINVAL
        address, control = self._read(view, index)
        event = view.events.get(index)
        if event is not None and not self.kernel.arm64:  # rule 9
            decoded = wcr.decode(control)
            select = decoded.byte_select // (decoded.byte_select & -decoded.byte_select)
            address, control = event.bp_addr, wcr.encode(replace(decoded, byte_select=select))
        return (address & 0xFFFF_FFFF if number % 2 else control), 0

    def poke(self, view: View, number: int, value: int) -> Outcome:
        """
        Write register ``number``.

        :return: the view afterwards, and 0 or the errno. After a refusal a slot may have been taken: rule 1.
        """
        if number == 0:
            return view, 0
        index = self._index(number)
        if index is None:
            return view, EINVAL
        bp_type = EXECUTE if number > 0 else READ_WRITE
        if number % 2:
            return self._set_address(view, index, value, bp_type)
        if self.kernel.arm64:
            return self._set_control(view, index, value, bp_type)
        return self._set_control_v7(view, index, value, bp_type)

    def _set_control_v7(self, view: View, index: Index, word: int, bp_type: int) -> Outcome:
        """Rule 9."""
        view, errno = self._made(view, index, bp_type)
        if errno:
            return view, errno
        control = wcr.decode(word)
        length = {0x1: 1, 0x3: 2, 0xF: 4, 0xFF: 8}.get(control.byte_select)
        wanted = int(control.load_store) or EXECUTE
        if length is None or wanted & bp_type != wanted:
            return view, EINVAL
        return self._changed(view, index, Event(wanted, view.events[index].bp_addr, length, control.enabled))

    def _index(self, number: int) -> Index | None:
        """Rules 8 and 10."""
        place = (abs(number) - 1) // 2
        pool = Pool.INST if number > 0 else Pool.DATA
        if pool == Pool.INST and not self.kernel.arm64 and INDICES <= place < 2 * INDICES:
            return Pool.DATA, place - INDICES
        return (pool, place) if place < INDICES else None


def _pool_of(event: Event) -> Pool:
    return Pool.INST if event.bp_type == EXECUTE else Pool.DATA
