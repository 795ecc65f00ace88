"""
Starts a guest, tells what it says as it says it, and ends when it does.

The guest has no disk and no network: its root file system is two archives in memory, the lasting one of ``debian`` and
a small one with our tree, and its serial port is its only voice. Its init powers it off, which ends QEMU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec import Struct

from tests.judges.arm64.cpio import Archive
from tests.judges.arm64.debian import Guest, Missing, compile_tree, root

# The trees that the guest gets; what it runs is what lies here now.
TREE: Final = ("hwbpd", "plugins", "clients", "examples", "tests", "benchmarks", "etc", "docs")


class Board(Struct, frozen=True):
    """A machine that QEMU emulates."""

    program: str
    arguments: tuple[str, ...]


# All 64-bit models have 6 breakpoints and 4 watchpoints; this one is the fastest that has the atomic instructions of
# Armv8.1, and its kernel runs at EL2 where there is one.
ARM64: Final = Board("qemu-system-aarch64", ("-M", "virt", "-cpu", "neoverse-n1", "-smp", "2", "-m", "1024"))
# 5 breakpoints beside the one that is reserved, and 4 watchpoints. "-cpu max" hangs at the first hit.
ARMHF: Final = Board("qemu-system-arm", ("-M", "virt,highmem=off", "-cpu", "cortex-a15", "-smp", "2", "-m", "1024"))


STATUS: Final = "guest: status "


class NoAnswer(Exception):
    """The guest ended without saying that it was done."""


def missing(board: Board) -> str | None:
    """Return what this host lacks to run a board, and how to get it, or None."""
    if shutil.which(board.program) is None:
        return f"{board.program} is needed: on Debian and Ubuntu, apt-get install qemu-system-arm"
    return None


def version(board: Board) -> str:
    """QEMU's version, as it says it."""
    said = subprocess.run([board.program, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("\n", 1)[0].removeprefix("QEMU emulator version ")


@contextmanager
def overlay(work: Path, script: str, *, tree: bool = True, files: dict[str, bytes] | None = None) -> Iterator[Path]:
    """
    Give the archive of one run: our tree at /hwbpd, and what the guest is to do.

    :param script: for /bin/sh; its exit status is told.
    :param files: further files, by their path in the guest.
    """
    with tempfile.TemporaryDirectory(prefix="run-", dir=work) as folder:
        copy = Path(folder, "tree")
        if tree:
            for name in TREE:
                if (root() / name).is_dir():
                    shutil.copytree(root() / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "node_*"))
            compile_tree(copy)
            shutil.copy(root() / "pyproject.toml", copy)
        path = Path(folder, "overlay.cpio")
        with path.open("wb") as file:
            archive = Archive(file)
            if tree:
                archive.add_tree(copy, "hwbpd")
                for name, text in _installed().items():
                    archive.add_file(f"hwbpd/{name}", text.encode())
            for name, data in (files or {}).items():
                archive.add_file(name, data)
            archive.add_file("extra/run", script.encode(), executable=True)
            archive.close()
        yield path


def run(board: Board, guest: Guest, overlay: Path, limit_s: float) -> Iterator[str]:
    """
    Boot a guest and give each line it says from the moment its init runs, the last one with the status of its script;
    return when it has powered itself off.

    :raises NoAnswer: when it ends without, or does not within ``limit_s``; its last lines are in the message.
    """
    initrd = overlay.parent / "initrd"
    with initrd.open("wb") as together:  # QEMU takes one file; a copy costs less than any trick to spare it
        for archive in (guest.base, overlay):
            with archive.open("rb") as part:
                shutil.copyfileobj(part, together, 1 << 20)
    command = [board.program, *board.arguments, "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
    command += ["-kernel", str(guest.kernel), "-initrd", str(initrd), "-append", "console=ttyAMA0 panic=-1 quiet"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    too_late = threading.Timer(limit_s, process.kill)
    too_late.start()
    last: list[str] = []
    up = done = False
    try:
        for text in process.stdout:
            line = text.rstrip("\r\n")
            last = [*last[-20:], line]
            if up and not done:
                yield line
            done = done or (up and line.startswith(STATUS))
            up = up or line.startswith("guest: up")
    finally:
        too_late.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    if not done:
        raise NoAnswer(f"the guest ended, or took longer than {limit_s:.0f} s, after:\n" + "\n".join(last))


def _installed() -> dict[str, str]:
    """What an editable install writes beside the tree: the name, and where plugins are found."""
    project = tomllib.loads((root() / "pyproject.toml").read_text())["project"]
    folder = f"{project['name']}-{project['version']}.dist-info"
    groups = "".join(
        f"[{group}]\n" + "".join(f"{name} = {module}\n" for name, module in entries.items())
        for group, entries in project["entry-points"].items()
    )
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    return {f"{folder}/METADATA": metadata, f"{folder}/entry_points.txt": groups}


def cache() -> Path:
    """The folder for what may be fetched again: $XDG_CACHE_HOME/hwbpd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hwbpd"


__all__ = ["ARM64", "ARMHF", "Board", "Missing", "NoAnswer", "cache", "missing", "overlay", "run", "version"]
