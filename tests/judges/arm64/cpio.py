"""
Writes a root file system for a kernel: a cpio archive in the "newc" form, uncompressed.

Written by hand rather than by cpio(1), for two reasons: every file belongs to root in it, whoever runs this, and the
paths that are left out are told here and not by a list for a tool. Linux unpacks several archives one after the other
from one file, later ones over earlier ones, so what changes goes into a small archive of its own behind the large one.

Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

_DIRECTORY = stat.S_IFDIR | 0o755
_TRAILER = "TRAILER!!!"


class Archive:
    """One archive, written in the order of the calls; directories that a path needs are added by themselves."""

    def __init__(self, into: IO[bytes]) -> None:
        self._into = into
        self._number = 0
        self._directories: set[str] = set()

    def add_tree(self, folder: Path, at: str, keep: Callable[[Path], bool] = lambda path: True) -> None:
        """
        Add what is in a folder.

        :param at: where it goes, "" for the root.
        :param keep: whether a path below the folder, relative to it, goes in; of a directory, with all below it.
        """
        for name in sorted(os.listdir(folder)):
            self._add_path(folder, Path(name), at, keep)

    def _add_path(self, folder: Path, path: Path, at: str, keep: Callable[[Path], bool]) -> None:
        if not keep(path):
            return
        source, name = folder / path, f"{at}/{path}".lstrip("/")
        if source.is_symlink():
            self.add_link(name, os.readlink(source))
        elif source.is_dir():
            self._add_directory(name)
            for below in sorted(os.listdir(source)):
                self._add_path(folder, path / below, at, keep)
        elif source.is_file():
            self.add_file(name, source.read_bytes(), executable=os.access(source, os.X_OK))

    def add_file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        """Add a file of root's."""
        self._add_parents(name)
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def add_link(self, name: str, to: str) -> None:
        """Add a symbolic link."""
        self._add_parents(name)
        self._add(name, stat.S_IFLNK | 0o777, to.encode())

    def add_directory(self, name: str) -> None:
        """Add an empty directory, as a place to mount something."""
        self._add_parents(name)
        self._add_directory(name)

    def close(self) -> None:
        """Write the end of the archive, filled up so that another may follow."""
        self._add(_TRAILER, 0, b"")
        self._into.write(bytes(-self._into.tell() % 512))

    def _add_parents(self, name: str) -> None:
        parts = name.split("/")[:-1]
        for count in range(1, len(parts) + 1):
            self._add_directory("/".join(parts[:count]))

    def _add_directory(self, name: str) -> None:
        if name not in self._directories:
            self._directories.add(name)
            self._add(name, _DIRECTORY, b"")

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._number += 1
        path = name.encode() + b"\0"
        # inode, mode, uid, gid, links, time, size, device (two), device of a special file (two), name's length, check
        numbers = (self._number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        self._write(b"070701" + b"".join(b"%08X" % number for number in numbers) + path)
        self._write(data)

    def _write(self, data: bytes) -> None:
        self._into.write(data + bytes(-len(data) % 4))
