"""
What the debug registers of one CPU do, and what Linux does about it: the contract between a register model and a
simulated machine.

A **register file** is a mapping from the names of the manual ("DR7", "DBGBCR3_EL1") to what the registers hold. It
changes only by ``write``, which stores what the hardware would store, and the order of writes is planned by ``plan``:
what is given up is disarmed first, an address never changes under an armed control word, and arming comes last. So no
access can meet a slot that is half its old self and half its new one.

Which access traps, in which order and with what status, is ``check``'s answer. It is asked once for each access that an
instruction makes, fetches first, and it knows the registers only. What Linux then does with the exception, for events
of perf's, is a **handling**: which slots it reports, and how it gets past them. Whose they are, whether they are to be
counted and what a record says is the machine's business.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from msgspec import Struct

from hwbpd.core.model import Access, Piece, Pool

RegisterFile = Mapping[str, int]
Slot = tuple[Pool, int]  # its number counts from 0 in each pool


class Armed(Struct, frozen=True):
    """What one slot is to hold: a piece of a plan, and at which levels its accesses count."""

    piece: Piece
    user: bool = True
    kernel: bool = True


class Write(Struct, frozen=True):
    """One register written."""

    register: str
    value: int


class MemoryAccess(Struct, frozen=True):
    """One access that an instruction makes; both letters for a read-modify-write, ``EXECUTE`` for its fetch."""

    access: Access
    address: int
    length_bytes: int
    kernel: bool = False


class Trap(Struct, frozen=True):
    """
    A debug exception.

    ``slots`` are (pool, number) of those whose condition was met and that are armed. ``before`` says that the
    instruction has not been executed. ``status`` is what the exception leaves in registers of its own: {"DR6": ...};
    {"ESR_EL1": ..., "FAR_EL1": ...}; {"DBGDSCR.MOE": ..., "DFAR": ...}.
    """

    slots: tuple[tuple[Pool, int], ...]
    before: bool
    status: Mapping[str, int]


@runtime_checkable
class DebugUnit(Protocol):
    """The debug registers of one CPU as pure functions of their contents."""

    def slots(self) -> Mapping[Pool, int]:
        """How many slots each pool has, as the backend says."""
        ...

    def reset(self) -> RegisterFile:
        """The file after a reset of the CPU, every register of the model in it."""
        ...

    def write(self, file: RegisterFile, register: str, value: int) -> RegisterFile:
        """
        Return the file after a write: reserved bits as the register keeps them.

        :raises ValueError: where the hardware would raise an exception instead (#GP, #UD, UNDEFINED), naming it.
        """
        ...

    def plan(self, file: RegisterFile, wanted: Mapping[tuple[Pool, int], Armed]) -> Sequence[Write]:
        """
        Return the writes, in order, after which exactly the ``wanted`` slots are armed; none where nothing changes.

        Slots that stay as they are stay armed throughout.

        :param wanted: by (pool, number); a slot that is left out ends disarmed.
        """
        ...

    def check(self, file: RegisterFile, accesses: Sequence[MemoryAccess]) -> Trap | None:
        """
        Return the debug exception that one instruction raises, or None.

        :param accesses: the accesses of the instruction in program order: its fetch, then its data.
        """
        ...


class Handled(Struct, frozen=True):
    """A debug exception, and the slots whose events the kernel has reported for it, in the order in which it did."""

    trap: Trap
    reported: tuple[Slot, ...]


class Executed(Struct, frozen=True):
    """
    What it took to get one instruction executed.

    ``writes`` are what the kernel wrote to the registers over all that. ``stepping`` are the slots that are still being
    stepped past, each with what the handling has to remember of it.
    """

    handled: tuple[Handled, ...] = ()
    writes: tuple[Write, ...] = ()
    stepping: Mapping[Slot, Hashable] = {}


@runtime_checkable
class Handling(Protocol):
    """
    What Linux does with breakpoints of perf's on one architecture, as pure functions of the registers.

    Where a kernel needs registers to step past a hit, and more instructions than the one that hit, a slot is *being
    stepped past*: it may be unarmed until a later instruction, and goes on being so when its thread is switched out and
    in between.
    """

    def refusal(self, piece: Piece, *, kernel: bool, of_task: bool) -> int:
        """
        Return the errno with which the kernel refuses an event that there is a slot for, or 0.

        :param kernel: whether the kernel's hits are asked for.
        :param of_task: whether it is for a task, not for a CPU.
        """
        ...

    def armed(self, piece: Piece) -> Armed:
        """Return how the kernel arms an event: at which levels, whatever hits are asked for."""
        ...

    def execute(
        self, file: RegisterFile, accesses: Sequence[MemoryAccess], stepping: Mapping[Slot, Hashable]
    ) -> Executed:
        """
        Let one instruction be executed, however many exceptions that takes.

        :param accesses: as for ``DebugUnit.check``; the first is the fetch.
        :param stepping: the slots that are being stepped past already.
        """
        ...

    def step_on(self, file: RegisterFile, slot: Slot, remembered: Hashable) -> Executed:
        """
        Go on stepping past a slot that has just been armed, maybe another than it was before.

        :return: the writes for it, and of ``stepping`` this slot.
        """
        ...
