"""
The tree is tidy: types and lint are clean, imports point downward, and every file says what it is for.

Lint is ``ruff check`` only. The formatter is not enforced: tables and aligned comments are laid out by hand where that
reads better.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file imports only what stands in a later row. Files of one row do not import each other.
DAEMON_ORDER = (
    ("__main__",),
    ("replay",),
    ("daemon",),
    ("metrics_endpoint",),
    ("metrics_families",),
    ("metered",),
    ("metrics",),
    ("server",),
    ("journal",),
    ("requests",),
    ("vmms",),
    ("machines",),
    ("slot_file",),
    ("contents",),
    ("performer",),
    ("teller",),
    ("attribution",),
    ("views",),
    ("shortage",),
    ("drains",),
    ("followers",),
    ("enabled",),
    ("status_page",),
    ("page_layout",),
    ("hits",),
    ("records",),
    ("outbox",),
    ("rights",),
    ("simulated_rights",),
    ("warden",),
    ("warden_process", "credentials"),
    ("sessions",),
    ("networks",),
    ("seqpacket",),
    ("network",),
    ("connections",),
    ("memory",),
    ("peers",),
    ("fitting",),
    ("plugins",),
    ("settings",),
    ("clock", "logs"),
    ("wire",),
    ("messages", "hookspecs"),
    ("cover", "debug_unit", "fields", "refusals"),
    ("__init__",),
)
CORE_ORDER = (
    ("arbiter",),
    ("worlds",),
    ("giving_way", "tracers", "floods", "hotplug"),
    ("desk",),
    ("placing",),
    ("invariants",),
    ("queue", "preemption"),
    ("admission",),
    ("books",),
    ("counts",),
    ("guard",),
    ("policy",),
    ("lifecycle",),
    ("story",),
    ("events",),
    ("effects",),
    ("model",),
    ("errors",),
    ("__init__",),
)

# The core has no clock, socket, file, thread or randomness, so what it may import is listed, not what it may not.
PURE_MODULES = frozenset(
    {"__future__", "abc", "bisect", "collections", "contextlib", "dataclasses", "enum", "errno", "functools", "heapq"}
    | {"itertools", "math", "operator", "string", "struct", "textwrap", "types", "typing"}
)

# What a plugin may know of the daemon.
PLUGIN_CONTRACT = (
    "hwbpd.hookspecs",
    "hwbpd.core.model",
    "hwbpd.core.errors",
    # What register models are written with.
    "hwbpd.fields",
    "hwbpd.cover",
    "hwbpd.debug_unit",
    "hwbpd.refusals",
)

# What a client may use beside the standard library and itself. Clients are written from docs/protocol.md.
CLIENT_PACKAGES = {
    "hwbp": frozenset({"zmq", "msgpack"}),
    "hwbpctl": frozenset({"zmq", "msgpack", "typer", "rich", "hwbp"}),
}
CLIENT_EXCEPTIONS = {("clients/hwbp/kvm.py", "hwbpd_kvm")}  # the switch engine runs in the client's process

CODE_FOLDERS = ("hwbpd", "plugins", "clients", "tests", "benchmarks", "examples", ".ci")


@cache
def tracked_files() -> tuple[PurePosixPath, ...]:
    """Every file that is, or could be, committed, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = [name for name in listing.split("\0") if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        # No git, or an unpacked archive: then nothing but the code folders can be told from what tools left behind.
        names = [
            path.relative_to(ROOT).as_posix()
            for folder in CODE_FOLDERS
            for path in (ROOT / folder).rglob("*.py")
        ]
    return tuple(PurePosixPath(name) for name in sorted(names))


def python_files(*folders: str) -> list[PurePosixPath]:
    return [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] in folders]


@cache
def syntax_tree(path: PurePosixPath) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def module_name(path: PurePosixPath) -> str:
    """The dotted name a file is imported under: plugins/hwbpd_x86/fit.py is hwbpd_x86.fit."""
    parts = path.with_suffix("").parts
    if parts[0] in ("plugins", "clients"):
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def known_modules() -> frozenset[str]:
    return frozenset(module_name(path) for path in python_files(*CODE_FOLDERS))


def imports(path: PurePosixPath) -> Iterator[tuple[int, str]]:
    """Every import of a file, wherever it stands, as line number and absolute module name."""
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                package = package[: len(package) - node.level + (path.name == "__init__.py")]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                # "from hwbpd.core import model" imports a module, "from hwbpd.core.model import Span" a name.
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known_modules() else base


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def told(problems: list[str]) -> str:
    return "\n".join(["", *dict.fromkeys(problems)])


# --- types and lint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("ruff", "check"), ("mypy",)], ids=["lint", "types"])
def test_the_tools_find_nothing(command: tuple[str, ...]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}:\n{result.stdout}{result.stderr}"


# --- imports point downward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "order"),
    [("hwbpd", DAEMON_ORDER), ("hwbpd/core", CORE_ORDER)],
    ids=["daemon", "core"],
)
def test_a_file_imports_only_what_stands_below_it(folder: str, order: tuple[tuple[str, ...], ...]) -> None:
    package = folder.replace("/", ".")
    rows = {name: row for row, names in enumerate(order) for name in names}
    problems = []
    for path in python_files("hwbpd"):
        if path.parent.as_posix() != folder:
            continue
        if path.stem not in rows:
            problems.append(f"{path}: add it to the order in {Path(__file__).name}, where its imports point downward")
            continue
        for line, module in imports(path):
            if not module.startswith(package + "."):
                continue
            name = module.removeprefix(package + ".").split(".")[0]
            # A name without a row is the core, which is below every file of the daemon, or is told of by itself.
            if rows.get(name, len(order)) <= rows[path.stem]:
                problems.append(f"{path}:{line} imports {module}, which does not stand below it")
    assert not problems, told(problems)


def test_the_core_is_pure() -> None:
    problems = [
        f"{path}:{line} imports {module}"
        for path in python_files("hwbpd")
        if path.parts[1] == "core"
        for line, module in imports(path)
        if not is_within(module, "hwbpd.core") and module.split(".")[0] not in PURE_MODULES | {"msgspec"}
    ]
    assert not problems, told(problems)


def test_a_plugin_knows_only_its_contract_and_no_other_plugin() -> None:
    plugins = {path.parts[1] for path in python_files("plugins")}
    problems = []
    for path in python_files("plugins"):
        for line, module in imports(path):
            top = module.split(".")[0]
            is_other_plugin = top in plugins and top != path.parts[1]
            is_client = top in CLIENT_PACKAGES
            is_beyond_contract = top == "hwbpd" and not any(is_within(module, part) for part in PLUGIN_CONTRACT)
            if is_other_plugin or is_client or is_beyond_contract:
                problems.append(f"{path}:{line} imports {module}")
    assert not problems, told(problems)


def test_a_client_takes_nothing_from_the_daemon() -> None:
    problems = []
    for path in python_files("clients"):
        allowed = sys.stdlib_module_names | CLIENT_PACKAGES[path.parts[1]] | {path.parts[1]}
        for line, module in imports(path):
            top = module.split(".")[0]
            if top not in allowed and (str(path), top) not in CLIENT_EXCEPTIONS:
                problems.append(f"{path}:{line} imports {module}")
    assert not problems, told(problems)


# --- what every file keeps -------------------------------------------------------------------------------------------


def test_every_file_opens_with_what_it_is_for() -> None:
    problems = [
        f"{path}: no docstring at its top"
        for path in python_files(*CODE_FOLDERS)
        if syntax_tree(path).body and ast.get_docstring(syntax_tree(path)) is None
    ]
    assert not problems, told(problems)


# Places of one machine, and notes to oneself. Written so that the patterns do not match this file.
LEFT_BEHIND = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w|\b(?:TO[D]O|FIX[M]E)\b")

# Characters that look like ASCII and are not: hyphens and dashes, the minus sign, curly quotes, the ellipsis.
LOOK_ALIKES = frozenset("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2018\u2019\u201c\u201d\u2026")


# Unicode's general categories for what nobody can see: controls, formats, odd spaces, and code points without meaning.
UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zs", "Zl", "Zp"})


def is_surprising(character: str) -> bool:
    """Whether a reader cannot see which character it is: invisible, a control, an odd space, or a look-alike."""
    if character in "\n\t " or "!" <= character <= "~":
        return False
    return character in LOOK_ALIKES or unicodedata.category(character) in UNSEEN


def text_lines() -> Iterator[tuple[str, str]]:
    """Every line of every text file with its place."""
    for path in tracked_files():
        raw = (ROOT / path).read_bytes()
        if b"\0" in raw:
            continue  # a picture or a captured message
        for number, line in enumerate(raw.decode("utf-8").split("\n"), start=1):
            yield f"{path}:{number}", line


def test_the_text_holds_no_surprises() -> None:
    problems = []
    for place, line in text_lines():
        odd = sorted({f"U+{ord(character):04X}" for character in line if is_surprising(character)})
        if odd:
            problems.append(f"{place}: {', '.join(odd)}")
        if line != line.rstrip():
            problems.append(f"{place}: ends in white space")
        if LEFT_BEHIND.search(line):
            problems.append(f"{place}: a path of one machine, or a note to oneself: {line.strip()}")
    assert not problems, told(problems)


# --- the rules themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_left_behind"),
    [
        ("see /ho" "me/ann/notes", True),
        ("# TO" "DO: later", True),
        ("https://example.org/ho" "me/page", False),
        ("mastodon", False),
    ],
)
def test_what_was_left_behind_is_recognised(text: str, is_left_behind: bool) -> None:
    assert bool(LEFT_BEHIND.search(text)) is is_left_behind


def test_relative_imports_are_resolved_like_absolute_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a file in the core that imports in every way there is,
    path = PurePosixPath("hwbpd/core/model.py")
    source = "import time\nfrom . import errors\nfrom .errors import Holder\nfrom ..hookspecs import Machine\n"
    monkeypatch.setattr(f"{__name__}.syntax_tree", lambda _path: ast.parse(source))

    # when its imports are listed,
    found = [module for _, module in imports(path)]

    # then each is an absolute module name.
    assert found == ["time", "hwbpd.core.errors", "hwbpd.core.errors", "hwbpd.hookspecs"]
