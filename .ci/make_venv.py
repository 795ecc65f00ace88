"""
Makes the virtual environment that everything in this tree runs in, with pip inside.

    python3 .ci/make_venv.py .venv

Uses the standard library only, because nothing else is there yet. Debian's python3 has ``venv`` but not ``ensurepip``
(that is in python3-venv), so there are three ways to a pip, tried in this order:

1. ensurepip, where Python has it: no network needed.
2. the pip of the Python that runs this, told to work on the new environment.
3. pip's own wheel from the package index that pip would use (PIP_INDEX_URL, pip.conf, or PyPI), which can be run
   as it is. It is run only after its SHA-256 has been compared with the one the index gives.

An environment that works already is kept. One that is half made is completed, and one whose Python is gone (an upgrade
of the distribution) is made anew. When no way works, each failure is told, with the package that would help.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import html.parser
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PYTHON_MIN = (3, 11)
PYPI = "https://pypi.org/simple"
REQUEST_TIMEOUT_S = 60
# PEP 691 first; an index that does not know it answers with the HTML of PEP 503.
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


class NoPip(Exception):
    """One of the ways to a pip is closed; the text says why, in one line."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: make_venv.py DIRECTORY", file=sys.stderr)
        return 2
    if sys.version_info < PYTHON_MIN:
        print(f"make_venv: Python {sys.version.split()[0]} is too old, 3.11 or later is needed", file=sys.stderr)
        return 1
    directory = Path(arguments[0])
    python = directory / "bin" / "python"
    if has_pip(python):
        return 0
    if directory.exists() and any(directory.iterdir()) and not (directory / "pyvenv.cfg").exists():
        print(f"make_venv: {directory} is there and is not a virtual environment; remove it first", file=sys.stderr)
        return 1
    print(f"making a virtual environment in {directory} with {sys.executable}", flush=True)
    try:
        venv.create(directory, symlinks=True, with_pip=False, clear=not runs(python))
    except OSError as error:
        print(f"make_venv: cannot write {directory}: {error}", file=sys.stderr)
        return 1
    failures = []
    for way in (by_ensurepip, by_own_pip, by_wheel):
        try:
            way(python)
        except NoPip as failure:
            failures.append(str(failure))
        else:
            return 0
    print(f"make_venv: no way to get pip into {directory}:", file=sys.stderr)
    for line in failures:
        print(f"  {line}", file=sys.stderr)
    print("on Debian: apt-get install python3-venv, then try again", file=sys.stderr)
    return 1


def runs(python: Path) -> bool:
    """Whether the environment's Python starts and is new enough."""
    check = f"import sys; sys.exit(sys.version_info < {PYTHON_MIN})"
    return python.exists() and run(python, "-c", check).returncode == 0


def has_pip(python: Path) -> bool:
    return runs(python) and run(python, "-m", "pip", "--version").returncode == 0


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = (result.stderr or result.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit status {result.returncode}"


# --- the three ways --------------------------------------------------------------------------------------------------


def by_ensurepip(python: Path) -> None:
    result = run(python, "-m", "ensurepip", "--default-pip")
    if not has_pip(python):
        raise NoPip(f"ensurepip: {last_line(result)}")


def by_own_pip(python: Path) -> None:
    result = run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "pip")
    if not has_pip(python):
        raise NoPip(f"{sys.executable} -m pip: {last_line(result)}")


def by_wheel(python: Path) -> None:
    failures = []
    for index in index_urls():
        try:
            wheel = newest_pip(index)
            print(f"getting {wheel.name} from {without_password(index)}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / wheel.name
                path.write_bytes(checked(fetch(wheel.url)[0], wheel))
                # A wheel is a zip archive that Python can run from, so pip installs itself.
                result = run(python, path / "pip", "install", "--quiet", "--no-index", path)
            if has_pip(python):
                return
            raise NoPip(last_line(result))
        except (NoPip, OSError, ValueError) as failure:
            failures.append(f"{without_password(index)}: {failure}")
    raise NoPip("; ".join(failures))


# --- the package index -----------------------------------------------------------------------------------------------


class Wheel(NamedTuple):
    """A file of the index: where it is, and what it must hash to."""

    name: str
    url: str
    sha256: str


def index_urls() -> list[str]:
    """
    Return the indexes that pip would use, the main one first.

    Environment variables go before the user's pip.conf, which goes before the host's. Source: pip's documentation,
    "Configuration".
    """
    found: dict[str, str] = {}
    for path in config_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip will complain about it in its own words
        for section in ("global", "install"):
            if parser.has_section(section):
                found.update((key.replace("_", "-"), value) for key, value in parser.items(section))
    main_url = os.environ.get("PIP_INDEX_URL") or found.get("index-url") or PYPI
    extra = os.environ.get("PIP_EXTRA_INDEX_URL") or found.get("extra-index-url") or ""
    return [main_url.strip(), *extra.split()]


def config_files() -> Iterator[Path]:
    """The files that pip reads, the weakest first. /dev/null as PIP_CONFIG_FILE means: none at all."""
    if os.environ.get("PIP_CONFIG_FILE") == os.devnull:
        return
    for folder in reversed(os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")):
        yield Path(folder) / "pip" / "pip.conf"
    yield Path("/etc/pip.conf")
    home = Path(os.path.expanduser("~"))
    yield home / ".pip" / "pip.conf"
    yield Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    if os.environ.get("PIP_CONFIG_FILE"):
        yield Path(os.environ["PIP_CONFIG_FILE"])


def newest_pip(index: str) -> Wheel:
    """Return the newest released pip wheel of an index; raises ``NoPip`` when it has none with a checksum."""
    page_url = index.rstrip("/") + "/pip/"
    if page_url.startswith("file:"):
        page_url += "index.html"
    body, content_type, base = fetch(page_url)
    wheels = from_json(body, base) if content_type.endswith("json") else from_html(body.decode(), base)
    released = [(version, wheel) for wheel in wheels if (version := release_of(wheel.name)) and wheel.sha256]
    if not released:
        raise NoPip("no pip wheel with a SHA-256")
    return max(released)[1]


def release_of(name: str) -> tuple[int, ...]:
    """The version in a pip wheel's name as numbers; () for other files and for pre-releases."""
    match = re.fullmatch(r"pip-([0-9]+(?:\.[0-9]+)*)-py3-none-any\.whl", name)
    return tuple(int(number) for number in match[1].split(".")) if match else ()


def from_json(body: bytes, base: str) -> Iterator[Wheel]:
    """The usable files of an index page. PEP 691."""
    for file in json.loads(body)["files"]:
        if not file.get("yanked") and fits_this_python(file.get("requires-python")):
            url = urllib.parse.urljoin(base, file["url"])
            yield Wheel(file["filename"], url, file.get("hashes", {}).get("sha256", ""))


def from_html(text: str, base: str) -> Iterator[Wheel]:
    """The usable files of an index page. PEP 503."""
    anchors: list[dict[str, str | None]] = []

    class Anchors(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "a":
                anchors.append(dict(attrs))

    Anchors().feed(text)
    for anchor in anchors:
        if "data-yanked" not in anchor and fits_this_python(anchor.get("data-requires-python")):
            url, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(base, anchor.get("href") or ""))
            name = urllib.parse.unquote(url.rsplit("/", 1)[-1])
            algorithm, _, digest = fragment.partition("=")
            yield Wheel(name, url, digest if algorithm == "sha256" else "")


def fits_this_python(requires: str | None) -> bool:
    """Whether a Requires-Python such as ``>=3.9`` admits this Python. Only lower bounds occur for pip."""
    lower = re.search(r">=\s*([0-9]+)\.([0-9]+)", requires or "")
    return lower is None or sys.version_info[:2] >= (int(lower[1]), int(lower[2]))


def fetch(url: str) -> tuple[bytes, str, str]:
    """Return body, content type and final URL; proxies and certificates are taken from where pip takes them."""
    parts = urllib.parse.urlsplit(url)
    headers = {"Accept": ACCEPT}
    if parts.username is not None:
        # urllib does not take a name and password out of a URL by itself.
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
    request = urllib.request.Request(parts.geturl(), headers=headers)
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S, context=context) as answer:
        return answer.read(), answer.headers.get_content_type(), answer.url


def checked(body: bytes, wheel: Wheel) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    if digest != wheel.sha256.lower():
        raise NoPip(f"{wheel.name} has SHA-256 {digest}, the index says {wheel.sha256}")
    return body


def without_password(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
