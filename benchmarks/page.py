"""
What it costs to ask the status page whether a breakpoint may be installed here, and what the page costs its writer.

The floors are what no reader can do without, calling a Python function and asking for the time, and for the writer the
claim that concerns one word. Nothing here needs registers, a daemon or root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hwbp
from benchmarks.harness import Row, Subject, compare
from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Process, Resource, Span, Target, Task
from hwbpd.status_page import Registration, StatusPage, map_page

READS = 20_000
CLAIMS = 2_000
ROOT = Path(__file__).resolve().parent.parent
C_READER = ROOT / "tests" / "clients" / "page_reader.c"
C_HEADER = ROOT / "clients" / "c"

ME = Task(812, 1, Process(812, 1))


def reads(operation: Callable[[int], object]) -> Callable[[], float]:
    """Return what measures one call of ``operation`` with a CPU, less the loop around it."""

    def measure_ns() -> float:
        numbers = [0] * READS
        start = time.perf_counter_ns()
        for _ in numbers:
            pass
        loop_ns = time.perf_counter_ns() - start
        start = time.perf_counter_ns()
        for cpu in numbers:
            operation(cpu)
        return (time.perf_counter_ns() - start - loop_ns) / READS

    return measure_ns


def least_work(cpu: int, _now: Callable[[], float] = time.monotonic) -> bool:
    return _now() < cpu


def claims(page: StatusPage, target: Target) -> Callable[[], float]:
    """Return what measures all that the page does for one claim, from before it is armed to after it is disarmed."""
    piece = Piece(Span(0x1000, 8), Access.WRITE, Pool.ANY)
    resource = Resource(1, piece, target, Mode(delivery=Delivery.COUNT))

    def measure_ns() -> float:
        start = time.perf_counter_ns()
        for _ in range(CLAIMS):
            page.show(resource)
            page.clear(1)
        return (time.perf_counter_ns() - start) / CLAIMS

    return measure_ns


class CReader:
    """``page_reader.c``, which measures itself in a process of its own."""

    def __init__(self, folder: Path, page: Path, registration: Registration) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise FileNotFoundError("no C compiler: install gcc or clang")
        program = folder / "reader"
        subprocess.run([compiler, "-std=gnu11", "-O2", "-I", C_HEADER, "-o", program, C_READER], check=True)
        self._process = subprocess.Popen([program, page], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._question = f"speed {registration.nth} {registration.number}\n"
        assert self._line() == "0", "it could not open the page"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def measure_ns(self, column: int) -> float:
        """Nanoseconds for an answer, 0: to a caller who has the time, 1: to one who has to ask for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(self._question)
        self._process.stdin.flush()
        return float(self._line().split()[column])

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def a_page() -> Iterator[tuple[Path, Path, StatusPage]]:
    with tempfile.TemporaryDirectory(prefix="hwbpd-page-") as name:
        folder = Path(name)
        path = folder / "page"
        yield folder, path, StatusPage(map_page(path), epoch=1)


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """Return the tables: readers, and the writer."""
    with a_page() as (folder, path, writer):
        registration = writer.register(1, ME)
        writer.beat(time.monotonic_ns())
        page = hwbp.open_page(path)
        me = hwbp.Thread(page, os.getpid(), *registration)

        def beaten(measure_ns: Callable[[], float]) -> Callable[[], float]:
            def measure() -> float:
                writer.beat(time.monotonic_ns())
                return measure_ns()

            return measure

        floor = "Python: a call that asks for the time"
        readers = [
            Subject(floor, reads(least_work)),
            Subject("Python: handle, its thread and its CPU", beaten(reads(me.enabled)), floor),
            Subject("Python: page, a CPU", beaten(reads(page.enabled)), floor),
        ]
        in_c = None
        try:
            in_c = CReader(folder, path, registration)
        except FileNotFoundError as why:
            print(f"page: the C reader is not measured: {why}", file=sys.stderr)
        else:
            c_floor = "C: its thread and its CPU, the time is known"
            readers.append(Subject(c_floor, beaten(lambda: in_c.measure_ns(0))))
            readers.append(Subject("C: the same, asking for the time", beaten(lambda: in_c.measure_ns(1)), c_floor))
        try:
            tables = [("an answer from the status page: none of ours", compare(readers, rounds))]
        finally:
            if in_c is not None:
                in_c.close()
        writers = [
            Subject("one CPU", claims(writer, Target(cpus=(1,)))),
            Subject("all CPUs", claims(writer, Target()), "one CPU"),
            Subject("64 CPUs", claims(writer, Target(cpus=tuple(range(64)))), "one CPU"),
            Subject("a thread that is registered", claims(writer, Target(ME)), "one CPU"),
            Subject("one that is not", claims(writer, Target(Task(1, 1, None))), "one CPU"),
        ]
        tables.append(("the page's share of a claim, armed and disarmed", compare(writers, rounds)))
    return tables
