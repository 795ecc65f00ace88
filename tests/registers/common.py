"""What docs/registers.md shows: architectures side by side."""

from __future__ import annotations

from collections.abc import Mapping

from hwbpd.core import admission
from hwbpd.core.books import Books
from hwbpd.core.errors import NoFreeSlot
from hwbpd.core.model import Access, Mode, Piece, Plan, Pool, Resource, Span, Target, Task
from hwbpd.hookspecs import Backend, CpuFacts
from hwbpd_arm import profiles as arm
from hwbpd_arm.fit import Arm64Backend, Armv7Backend
from hwbpd_x86 import profiles as x86
from hwbpd_x86.fit import X86Backend
from tests.registers.writing import fitted, ranges, table

CPUS: Mapping[str, Backend] = {
    "x86-64": X86Backend(x86.PROFILES["x86-64"]),
    "AMD with masks": X86Backend(x86.PROFILES["bulldozer"]),
    "Cortex-A15": Armv7Backend(arm.ARMV7["cortex-a15"]),
    "Cortex-A72": Arm64Backend(arm.ARM64["cortex-a72"]),
}

BIG, LITTLE = CpuFacts("aarch64", breakpoints=6, watchpoints=4), CpuFacts("aarch64", breakpoints=4, watchpoints=2)


def architectures() -> list[str]:
    rows = []
    for name, backend in CPUS.items():
        told = backend.describe()
        slots = " + ".join(f"{count} {pool}" for pool, count in backend.slots().items())
        lengths = "; ".join(f"{letters}: {_lengths(of_letters)}" for letters, of_letters in told["lengths"].items())
        reports = "; ".join(f"{letters}: {when}" for letters, when in told["reports"].items())
        rows.append((name, slots, lengths, reports))
    return table(("CPU", "slots", "lengths of one slot", "reports"), rows)


def _lengths(lengths: list[int]) -> str:
    if len(lengths) < 10:
        return ranges(lengths)
    return f"powers of two to 2^{lengths[-1].bit_length() - 1}"


def spans() -> list[str]:
    """The same spans on several CPUs, as reads and writes, which all of them have."""
    read_write = Access.READ | Access.WRITE
    rows = []
    for span in (Span(0x404040, 8), Span(0x404041, 7), Span(0x40403E, 4), Span(0x404040, 32), Span(0x404000, 4096)):
        cells = []
        for backend in CPUS.values():
            answer = fitted(backend, span, read_write)
            cells.append(answer.partition("; nearest")[0].partition(", and a CPU")[0])
        rows.append((f"`{span.address:#x}/{span.length_bytes}`", *cells))
    return table(("span", *CPUS), rows)


def over_report() -> list[str]:
    """What leave to report neighbouring bytes saves."""
    read_write = Access.READ | Access.WRITE
    rows = []
    for span in (Span(0x404041, 7), Span(0x40403E, 4)):
        for name in ("x86-64", "Cortex-A15"):
            exact = CPUS[name].fit(span, read_write, Mode())
            wide = CPUS[name].fit(span, read_write, Mode(over_report=True))
            held = sum(piece.span.length_bytes for piece in wide.pieces)
            cells = (str(len(exact.pieces)), str(len(wide.pieces)), str(held - span.length_bytes))
            rows.append((f"`{span.address:#x}/{span.length_bytes}`", name, *cells))
    return table(("span", "CPU", "slots", "with over-report", "bytes beside it"), rows)


def unlike() -> list[str]:
    """How many watchpoints fit on a machine of two big CPUs and two little ones."""
    cpus = {0: BIG, 1: BIG, 2: LITTLE, 3: LITTLE}
    least = Arm64Backend(LITTLE).slots()
    task = Task(812, 5)
    cases = {
        "on cpu 0, whatever runs there": Target(cpus=(0,)),
        "on cpu 2, whatever runs there": Target(cpus=(2,)),
        "on every CPU": Target(),
        "of a thread, wherever it runs": Target(task),
        "of a thread, while it is on cpu 0": Target(task, (0,)),
    }
    rows = []
    for name, target in cases.items():
        books = Books(least, cpus, cpus, {cpu: Arm64Backend(facts).slots() for cpu, facts in cpus.items()})
        fit = {pool: _how_many(books, pool, target) for pool in (Pool.INST, Pool.DATA)}
        rows.append((name, str(fit[Pool.INST]), str(fit[Pool.DATA])))
    return table(("claims", "breakpoints", "watchpoints"), rows)


def _how_many(books: Books, pool: Pool, target: Target) -> int:
    """How many slots the core grants, one after the other."""
    access = Access.EXECUTE if pool is Pool.INST else Access.WRITE
    piece = Piece(Span(0x404040, 4), access, pool)
    granted = 0
    try:
        while True:
            admission.fits(books, target, Plan((piece,)))
            books.take(Resource(1 + len(books.resources), piece, target, Mode()))
            granted += 1
    except NoFreeSlot:
        return granted


BLOCKS = (architectures, spans, over_report, unlike)
