"""How the documents about registers write pictures, tables and words. Every function returns lines of Markdown."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence

from hwbpd.core.errors import BadClaim, NotSupported
from hwbpd.core.model import Access, Mode, Plan, Pool, Span
from hwbpd.debug_unit import DebugUnit, RegisterFile, Trap, Write
from hwbpd.fields import Field, draw
from hwbpd.hookspecs import Backend

Fields = tuple[Field, ...]
INDENT = "    "


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table. A bar in a cell would divide it."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def code(lines: Iterable[str]) -> list[str]:
    """Text as it stands."""
    return [(INDENT + line).rstrip() for line in lines]


def picture(fields: Fields, width_bits: int = 32, *, reserved: int = 0) -> list[str]:
    """The bits of a register."""
    return code(draw(fields, width_bits, reserved=reserved).splitlines())


def field_table(fields: Fields) -> list[str]:
    """What its fields mean, the highest first as in the picture."""
    rows = []
    for field in sorted(fields, key=lambda field: -field.first_bit):
        last = field.first_bit + field.width - 1
        bits = str(last) if field.width == 1 else f"{last}:{field.first_bit}"
        rows.append((bits, field.name, field.meaning))
    return table(("bits", "field", "meaning"), rows)


def said(fields: Fields, word: int) -> str:
    """What a word says: ``E=1 LSC=2 BAS=0xff``; fields that are zero are left out."""
    held = [(field.name, field.read(word)) for field in fields if field.read(word)]
    return " ".join(f"{name}={value if value < 10 else hex(value)}" for name, value in held)


def write_lines(writes: Sequence[Write], fields_of: Callable[[str], Fields]) -> list[str]:
    """
    One line for each write.

    :param fields_of: the fields of a register by its name, none for an address.
    """
    wide = max(len(write.register) for write in writes) if writes else 0
    lines = []
    for write in writes:
        meaning = said(fields_of(write.register), write.value)
        lines.append(f"{write.register:{wide}} = {write.value:#x}".ljust(wide + 24) + meaning)
    return [line.rstrip() for line in lines]


def carry_out(unit: DebugUnit, file: RegisterFile, writes: Iterable[Write]) -> RegisterFile:
    """The registers after some writes."""
    for write in writes:
        file = unit.write(file, write.register, write.value)
    return file


def trap_cells(trap: Trap | None, fields_of: Mapping[str, Fields]) -> tuple[str, str, str]:
    """When an exception comes, which slots it is of, and what it leaves."""
    if trap is None:
        return "nothing", "", ""
    slots = ", ".join(str(number) if pool is Pool.ANY else f"{pool} {number}" for pool, number in trap.slots)
    status = []
    for register, value in trap.status.items():
        meaning = said(fields_of[register], value) if register in fields_of else ""
        status.append(f"{register} = {value:#x}" + (f" ({meaning})" if meaning else ""))
    return "before" if trap.before else "after", slots, ", ".join(status)


def asked(span: Span, access: Access) -> str:
    """A request as perf writes it."""
    return f"`mem:{span.address:#x}/{span.length_bytes}:{access.letters}`"


def fitted(backend: Backend, span: Span, access: Access, *, over_report: bool = False) -> str:
    """How many slots a span takes, and what each of them holds; or why there is no plan."""
    try:
        plan = backend.fit(span, access, Mode(over_report=over_report))
    except (BadClaim, NotSupported) as why:
        return "refused: " + str(why).split(": ", 1)[1]
    return f"{len(plan.pieces)}: {held(plan)}"


def held(plan: Plan) -> str:
    """What the slots of a plan hold."""
    return ", ".join(f"{piece.span.address:#x}/{piece.span.length_bytes}" for piece in plan.pieces)


def errno_name(number: int) -> str:
    """``yes`` for 0."""
    if number == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # which has two names in Linux
    return errno.errorcode[number] if number else "yes"


def by_errno(of_lengths: Mapping[int, int]) -> str:
    """Lengths by what the kernel says to them: ``yes: 1, 2, 4, 8; EINVAL: 3, 5 to 7``."""
    answers: dict[int, list[int]] = {}
    for length, number in of_lengths.items():
        answers.setdefault(number, []).append(length)
    return "; ".join(f"{errno_name(number)}: {ranges(lengths)}" for number, lengths in sorted(answers.items()))


def ranges(numbers: Iterable[int]) -> str:
    """``1, 2, 4 to 8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(
        ", ".join(map(str, range(low, high + 1))) if high < low + 2 else f"{low} to {high}" for low, high in runs
    )


def alike(rows: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Rows of (what, where, answer), those of one what with the same answer made one; ``any`` for everywhere."""
    places: dict[tuple[str, str], list[str]] = {}
    everywhere: dict[str, list[str]] = {}
    for what, where, answer in rows:
        places.setdefault((what, answer), []).append(where)
        everywhere.setdefault(what, []).append(where)
    return [
        (what, "any" if wheres == everywhere[what] and len(wheres) > 1 else ", ".join(wheres), answer)
        for (what, answer), wheres in places.items()
    ]
