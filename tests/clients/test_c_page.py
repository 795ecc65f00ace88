"""The C header: it has the numbers of the layout, and reads a page that another process writes."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hwbp.status_page as python_reader
from hwbp import Answer
from hwbpd import page_layout
from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Resource, Span, Target, Task
from hwbpd.status_page import StatusPage, map_page

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "clients" / "c"
READER = Path(__file__).with_name("page_reader.c")
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wno-sign-conversion"]
STANDARDS = ["-std=gnu11", "-std=gnu17"]


@pytest.fixture(scope="module")
def cc() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        pytest.skip("no C compiler: install gcc or clang")
    return found


@pytest.fixture(scope="module")
def reader(cc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("c") / "reader"
    command = [cc, *WARNINGS, "-std=gnu11", "-O2", "-I", str(HEADER), "-o", str(program), str(READER)]
    subprocess.run(command, check=True)
    return program


class Reader:
    """The C program, in a process of its own, with a page open."""

    def __init__(self, program: Path, path: Path) -> None:
        self.process = subprocess.Popen(
            [program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.opened = int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def enabled(self, cpu: int, index: int = -1, registration: int = 0) -> Answer:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{cpu} {index} {registration}\n")
        return Answer(int(self.line()))

    def close(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    return tmp_path / "hwbpd.sock.page"


@pytest.fixture
def writer(page_file: Path) -> StatusPage:
    writer = StatusPage(map_page(page_file), epoch=1)
    writer.beat(time.monotonic_ns())
    return writer


@pytest.fixture
def other(reader: Path, page_file: Path, writer: StatusPage) -> Iterator[Reader]:
    other = Reader(reader, page_file)
    assert other.opened == 0
    yield other
    other.close()


def resource(number: int, target: Target) -> Resource:
    piece = Piece(Span(0x1000, 8), Access.WRITE, Pool.ANY)
    return Resource(number, piece, target, Mode(delivery=Delivery.COUNT))


def test_the_header_has_the_numbers_of_the_layout(reader: Path) -> None:
    lines = subprocess.run([reader], check=True, capture_output=True, text=True).stdout.splitlines()
    numbers = {name: int(value) for name, value in (line.split() for line in lines)}
    assert {name: numbers.pop(name) for name in ("NONE", "YES", "UNKNOWN")} == {one.name: one for one in Answer}
    assert numbers.pop("HEADER_BYTES") == page_layout.CPUS_FROM * page_layout.WORD_BYTES
    assert len(numbers) == 16
    assert numbers == {name: getattr(page_layout, name) for name in numbers}
    assert numbers == {name: getattr(python_reader, name) for name in numbers}


def test_it_answers_what_another_process_writes(writer: StatusPage, other: Reader) -> None:
    # given a page without anything, and a thread
    task = Task(800, 1, None)
    nth, number = writer.register(1, task)
    assert [other.enabled(cpu) for cpu in (0, 1, 8191)] == [Answer.NONE] * 3
    assert other.enabled(1, nth, number) is Answer.NONE

    # when something comes and goes, then it is seen where it is, and nowhere else
    writer.show(resource(1, Target(cpus=(1,))))
    assert (other.enabled(0), other.enabled(1), other.enabled(1, nth, number)) == (0, 1, 1)
    writer.clear_armed(1)
    assert other.enabled(1) is Answer.NONE
    writer.show(resource(2, Target(task)))
    assert (other.enabled(0), other.enabled(0, nth, number)) == (0, 1)
    writer.clear(2)
    writer.show(resource(3, Target()))
    assert (other.enabled(0), other.enabled(77), other.enabled(0, nth, number)) == (1, 1, 1)
    writer.clear(3)
    assert other.enabled(0, nth, number) is Answer.NONE


def test_what_is_not_there_is_unknown(writer: StatusPage, other: Reader) -> None:
    nth, number = writer.register(1, Task(800, 1, None))
    assert other.enabled(8192) is Answer.UNKNOWN
    assert other.enabled(0, 8192, number) is Answer.UNKNOWN
    assert other.enabled(0, nth, number + 1) is Answer.UNKNOWN
    writer.unregister_all(1)
    assert other.enabled(0, nth, number) is Answer.UNKNOWN
    assert other.enabled(0) is Answer.NONE
    writer.stop()
    assert other.enabled(0) is Answer.UNKNOWN


def test_another_daemon_is_read_without_opening_again(writer: StatusPage, other: Reader, page_file: Path) -> None:
    nth, number = writer.register(1, Task(800, 1, None))
    after = StatusPage(map_page(page_file), epoch=2)
    assert other.enabled(0) is Answer.UNKNOWN
    after.beat(time.monotonic_ns())
    assert (other.enabled(0), other.enabled(0, nth, number)) == (Answer.NONE, Answer.UNKNOWN)


@pytest.mark.parametrize(
    ("change", "errno_name"),
    [("absent", "ENOENT"), ("short", "EPROTO"), ("magic", "EPROTO"), ("layout", "EPROTO"), ("earlier boot", "ESTALE")],
)
def test_what_cannot_be_read_is_refused(
    reader: Path, writer: StatusPage, page_file: Path, change: str, errno_name: str
) -> None:
    import errno

    words = map_page(page_file)
    match change:
        case "absent":
            page_file.unlink()
        case "short":
            page_file.write_bytes(b"hwbpage\0")
        case "magic":
            words[page_layout.MAGIC_AT] = 1
        case "layout":
            words[page_layout.LAYOUT_AT] = 2
        case _:
            words[page_layout.VALID_UNTIL_S_AT] = int(time.monotonic()) + 1000
    other = Reader(reader, page_file)
    assert other.opened == -getattr(errno, errno_name)
    other.close()


@pytest.mark.parametrize("standard", STANDARDS)
def test_the_example_of_the_document_compiles(cc: str, standard: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "status-page.md").read_text()
    (example,) = re.findall(r"^```c\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "example.c").write_text(example)
    command = [cc, *WARNINGS, standard, "-O2", "-I", str(HEADER), "-c", "-o", "/dev/null", str(tmp_path / "example.c")]
    subprocess.run(command, check=True)
