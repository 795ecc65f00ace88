"""What the tests of both debug units share: accesses, armed slots, and what every plan keeps."""

from __future__ import annotations

from collections.abc import Mapping

from hwbpd.core.model import Access, Piece, Pool, Span
from hwbpd.debug_unit import Armed, DebugUnit, MemoryAccess, RegisterFile, Trap

R, W, X = Access.READ, Access.WRITE, Access.EXECUTE
E = 1


def read(address: int, length: int, *, kernel: bool = False) -> MemoryAccess:
    return MemoryAccess(R, address, length, kernel)


def write(address: int, length: int, *, kernel: bool = False) -> MemoryAccess:
    return MemoryAccess(W, address, length, kernel)


def update(address: int, length: int, *, kernel: bool = False) -> MemoryAccess:
    return MemoryAccess(R | W, address, length, kernel)


def execute(address: int, length: int = 4, *, kernel: bool = False) -> MemoryAccess:
    return MemoryAccess(X, address, length, kernel)


def armed(access: Access, address: int, length: int, *, user: bool | None = None, kernel: bool | None = None) -> Armed:
    """A slot as Linux arms it, for user mode at a user address and for the kernel at its own, if not said otherwise."""
    is_kernels = address >= 2**55
    piece = Piece(Span(address, length), access, Pool.INST if access == X else Pool.DATA)
    return Armed(piece, user=not is_kernels if user is None else user, kernel=is_kernels if kernel is None else kernel)


def slots_of(trap: Trap | None) -> set[tuple[Pool, int]]:
    return set() if trap is None else set(trap.slots)


def carry_out(unit: DebugUnit, file: RegisterFile, wanted: Mapping[tuple[Pool, int], Armed]) -> RegisterFile:
    for step in unit.plan(file, wanted):
        file = unit.write(file, step.register, step.value)
    return file


def armed_slots(file: RegisterFile) -> dict[str, tuple[int, int]]:
    """Control registers that are armed, with their contents and their address."""
    controls = {name: word for name, word in file.items() if name[:6] in ("DBGBCR", "DBGWCR") and word & E}
    return {name: (word, file[name.replace("CR", "VR")]) for name, word in controls.items()}


def check_plan(
    unit: DebugUnit, first: Mapping[tuple[Pool, int], Armed], second: Mapping[tuple[Pool, int], Armed]
) -> None:
    """
    Go from a reset to ``first`` and on to ``second``, and look at the registers after every single write.

    A slot is at any moment its old self, its new self or disarmed; where it ends does not depend on where it began.
    """
    fresh = armed_slots(carry_out(unit, unit.reset(), second))
    file = carry_out(unit, unit.reset(), first)
    before = armed_slots(file)
    for step in unit.plan(file, second):
        file = unit.write(file, step.register, step.value)
        now = armed_slots(file)
        for control, contents in now.items():
            assert contents in (before.get(control), fresh.get(control)), f"{control} is half one and half the other"
        if any(contents != before.get(control) for control, contents in now.items()):
            assert not now.keys() - fresh.keys(), "what is given up goes before anything is armed"

    assert armed_slots(file) == fresh
    assert {control[3] + control[6:].split("_")[0] for control in fresh} == {
        ("B" if pool == Pool.INST else "W") + str(number)
        for (pool, number), slot in second.items()
        if slot.user or slot.kernel
    }
    assert not unit.plan(file, second), "there is nothing left to write"
