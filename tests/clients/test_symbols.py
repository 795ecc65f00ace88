"""Names for addresses and threads come from /proc; what is not there is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwbpctl.symbols import NOWHERE, Symbols

MAPS = """\
00400000-00401000 r--p 00000000 fe:00 1234                               /usr/bin/a program
00401000-00402000 r-xp 00001000 fe:00 1234                               /usr/bin/a program
7f0000000000-7f0000001000 rw-p 00000000 00:00 0
7fff00000000-7fff00001000 r-xp 00000000 00:00 0                          [vdso]
"""
KALLSYMS = """\
ffffffff81000000 T startup
ffffffff81000100 t helper	[module]
ffffffff81000050 D data
ffffffff81000080 W weak
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "812").mkdir()
    (tmp_path / "812" / "maps").write_text(MAPS)
    (tmp_path / "812" / "comm").write_text("loop\n")
    (tmp_path / "kallsyms").write_text(KALLSYMS)
    return tmp_path


@pytest.mark.parametrize(
    ("ip", "where"),
    [
        (0x401136, "/usr/bin/a program+0x1136"),
        (0x400000, "/usr/bin/a program+0x0"),
        (0x402000, ""),  # just behind
        (0x3FFFFF, ""),
        (0x7F0000000010, ""),  # in no file
        (0x7FFF00000010, "[vdso]+0x10"),
    ],
)
def test_a_user_address_is_a_file_and_an_offset_in_it(proc: Path, ip: int, where: str) -> None:
    assert Symbols(proc).where(812, ip, in_kernel=False) == where


@pytest.mark.parametrize(
    ("ip", "where"),
    [
        (0xFFFFFFFF81000000, "startup+0x0"),
        (0xFFFFFFFF81000060, "startup+0x60"),  # data is no place where code runs
        (0xFFFFFFFF81000090, "weak+0x10"),
        (0xFFFFFFFF81000101, "helper+0x1"),
        (0xFFFFFFFF80000000, ""),
    ],
)
def test_a_kernel_address_is_a_function_and_an_offset_in_it(proc: Path, ip: int, where: str) -> None:
    assert Symbols(proc).where(812, ip, in_kernel=True) == where


def test_a_kernel_that_hides_its_addresses_gives_no_names(proc: Path) -> None:
    (proc / "kallsyms").write_text("0000000000000000 T startup\n")
    assert Symbols(proc).where(812, 0xFFFFFFFF81000000, in_kernel=True) == ""


def test_what_is_gone_has_no_names(proc: Path) -> None:
    symbols = Symbols(proc)
    assert symbols.comm(999) == "?"
    assert symbols.where(999, 0x401136, in_kernel=False) == ""
    (proc / "kallsyms").unlink()
    assert symbols.where(812, 1, in_kernel=True) == ""


def test_names_are_remembered_until_they_are_to_be_forgotten(proc: Path) -> None:
    # Given a process whose names were asked for,
    symbols = Symbols(proc)
    assert (symbols.comm(812), symbols.where(812, 0x401000, False)) == ("loop", "/usr/bin/a program+0x1000")

    # when it executes something else, then that shows once the old is forgotten.
    (proc / "812" / "comm").write_text("other\n")
    (proc / "812" / "maps").write_text(MAPS.replace("a program", "other"))
    assert symbols.comm(812) == "loop"
    symbols.forget()
    assert (symbols.comm(812), symbols.where(812, 0x401000, False)) == ("other", "/usr/bin/other+0x1000")


def test_of_a_machine_that_is_not_this_host_no_name_is_made_up_from_this_host() -> None:
    symbols = Symbols(NOWHERE)

    assert symbols.comm(1) == "?"
    assert symbols.where(1, 0x401136, in_kernel=False) == ""
    assert symbols.where(1, 0xFFFFFFFF81000000, in_kernel=True) == ""
