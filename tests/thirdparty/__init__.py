"""
Packages that are not part of hwbpd, and how tests come to have them: as pip would leave them, without pip.

Each folder here with a ``pyproject.toml`` is a project with packages beside that file. What makes an installed project
a plugin is its metadata: a folder ``NAME-VERSION.dist-info`` with ``entry_points.txt`` on the path that modules are
looked for on. ``installed`` writes that for each project, from what its ``pyproject.toml`` says.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent


def projects() -> list[Path]:
    """The folders of the projects."""
    return sorted(file.parent for file in HERE.glob("*/pyproject.toml"))


@contextmanager
def installed() -> Iterator[list[str]]:
    """
    Let their entry points be found here.

    :return: what to prepend to PYTHONPATH for another process, while this lasts.
    """
    with tempfile.TemporaryDirectory() as site:
        for project in projects():
            _write_metadata(project, Path(site))
        path = [site, *map(str, projects())]
        before = list(sys.path)
        sys.path[:0] = path
        try:
            yield path
        finally:
            sys.path[:] = before


def _write_metadata(folder: Path, site: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    name = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (metadata / "METADATA").write_text(name, encoding="utf-8")
    lines = []
    for group, entries in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{entry} = {where}" for entry, where in entries.items()), ""]
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
