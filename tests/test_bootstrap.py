"""
The way from a bare Python to a working .venv: what .ci/make_venv.py does where ensurepip is missing, and what it says.

The tests need no network: a package index on this host's loopback offers a pip that can do no more than install itself
and tell its version. ensurepip and pip are hidden from the Python under test by a sitecustomize module.
"""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

MAKE_VENV = Path(__file__).resolve().parent.parent / ".ci" / "make_venv.py"

# A stand-in for pip: from a wheel it copies itself into the environment, as pip does; installed, it tells its version.
SMALL_PIP = """
import sys, sysconfig, zipfile
if "install" in sys.argv:
    zipfile.ZipFile(sys.argv[-1]).extractall(sysconfig.get_path("purelib"))
elif "--version" in sys.argv:
    print("pip VERSION")
"""

# Hides ensurepip everywhere, and every pip but the one inside the environment under test.
BLINDFOLD = """
import os, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top == "ensurepip" or (top == "pip" and sys.prefix != os.environ["ENVIRONMENT_UNDER_TEST"]):
            if not sys.argv[0].endswith("pip"):
                raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Hidden())
"""


def small_pip(version: str) -> bytes:
    """A wheel, as bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pip/__init__.py", "")
        archive.writestr("pip/__main__.py", SMALL_PIP.replace("VERSION", version))
    return buffer.getvalue()


@dataclass
class Index:
    """A package index that knows one project, pip."""

    url: str = ""
    knows_json: bool = True
    wheels: dict[str, bytes] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)

    def add(self, name: str, body: bytes, sha256: str | None = None) -> None:
        self.wheels[name] = body
        self.sha256[name] = hashlib.sha256(body).hexdigest() if sha256 is None else sha256

    def page(self, accept: str) -> tuple[str, bytes]:
        """The project page in the format that the client asked for, with its content type."""
        if self.knows_json and "application/vnd.pypi.simple.v1+json" in accept:
            files = [
                {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": digest} if digest else {}}
                for name, digest in self.sha256.items()
            ]
            return "application/vnd.pypi.simple.v1+json", json.dumps({"name": "pip", "files": files}).encode()
        anchors = [
            f'<a href="../../files/{name}{f"#sha256={digest}" if digest else ""}" data-requires-python="&gt;=3.9">x</a>'
            for name, digest in self.sha256.items()
        ]
        return "text/html", "\n".join(anchors).encode()


@pytest.fixture
def index() -> Iterator[Index]:
    shared = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shared.asked.append(self.path)
            shared.authorization.append(self.headers["Authorization"])
            name = self.path.rsplit("/", 1)[-1]
            if self.path == "/simple/pip/":
                content_type, body = shared.page(self.headers["Accept"])
            elif name in shared.wheels:
                content_type, body = "application/octet-stream", shared.wheels[name]
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    shared.url = f"http://127.0.0.1:{server.server_port}/simple"
    try:
        yield shared
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Bootstrap:
    """Runs make_venv.py as a bare Python would, towards ``environment``."""

    environment: Path
    blindfold: Path

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("PIP_", "HTTP"))}
        surroundings = {
            **kept,
            "NO_PROXY": "127.0.0.1",
            "PIP_CONFIG_FILE": os.devnull,
            "PYTHONPATH": str(self.blindfold),
            "ENVIRONMENT_UNDER_TEST": str(self.environment),
            **variables,
        }
        command = [sys.executable, str(MAKE_VENV), str(self.environment)]
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)

    def pip_version(self) -> str:
        command = [str(self.environment / "bin" / "python"), "-m", "pip", "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def bootstrap(tmp_path: Path) -> Bootstrap:
    blindfold = tmp_path / "blindfold"
    blindfold.mkdir()
    (blindfold / "sitecustomize.py").write_text(textwrap.dedent(BLINDFOLD))
    return Bootstrap(tmp_path / "an environment", blindfold)


@pytest.mark.parametrize("knows_json", [True, False], ids=["PEP 691", "PEP 503"])
def test_without_ensurepip_the_newest_pip_of_the_index_installs_itself(
    index: Index, bootstrap: Bootstrap, knows_json: bool
) -> None:
    # Given an index with an older pip, the newest, a pre-release, and one without a checksum,
    index.knows_json = knows_json
    for version in ("9.0", "26.1", "24.3.1", "27.0rc1"):
        index.add(f"pip-{version}-py3-none-any.whl", small_pip(version))
    index.add("pip-99.0-py3-none-any.whl", small_pip("99.0"), sha256="")

    # when an environment is made by a Python that has neither ensurepip nor pip,
    result = bootstrap.run(PIP_INDEX_URL=index.url)

    # then it has the newest pip that could be checked, and each step was told in a line.
    assert result.returncode == 0, result.stderr
    assert bootstrap.pip_version() == "pip 26.1"
    assert len(result.stdout.splitlines()) == 2


def test_an_environment_that_works_is_kept_without_a_word(index: Index, bootstrap: Bootstrap) -> None:
    index.add("pip-26.1-py3-none-any.whl", small_pip("26.1"))
    assert bootstrap.run(PIP_INDEX_URL=index.url).returncode == 0
    index.asked.clear()

    result = bootstrap.run(PIP_INDEX_URL=index.url)

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert index.asked == []


def test_an_environment_whose_python_is_gone_is_made_anew(index: Index, bootstrap: Bootstrap) -> None:
    # Given an environment made by a Python that was removed since,
    index.add("pip-26.1-py3-none-any.whl", small_pip("26.1"))
    assert bootstrap.run(PIP_INDEX_URL=index.url).returncode == 0
    python = bootstrap.environment / "bin" / "python"
    for name in python.parent.glob("python*"):
        name.unlink()
        name.symlink_to("/nowhere/python3")

    # when it is asked for again,
    result = bootstrap.run(PIP_INDEX_URL=index.url)

    # then it works again.
    assert result.returncode == 0, result.stderr
    assert bootstrap.pip_version() == "pip 26.1"


def test_a_wheel_that_is_not_what_the_index_says_is_not_run(index: Index, bootstrap: Bootstrap) -> None:
    index.add("pip-26.1-py3-none-any.whl", small_pip("26.1"), sha256="0" * 64)

    result = bootstrap.run(PIP_INDEX_URL=index.url)

    assert result.returncode == 1
    assert "SHA-256" in result.stderr
    assert not list(bootstrap.environment.glob("lib/*/site-packages/pip"))


def test_the_next_index_is_asked_when_the_first_has_no_pip(index: Index, bootstrap: Bootstrap) -> None:
    index.add("pip-26.1-py3-none-any.whl", small_pip("26.1"))

    result = bootstrap.run(PIP_INDEX_URL=f"{index.url}/empty", PIP_EXTRA_INDEX_URL=index.url)

    assert result.returncode == 0, result.stderr
    assert bootstrap.pip_version() == "pip 26.1"


def test_the_index_of_pip_conf_is_used_with_its_password_which_is_not_shown(
    index: Index, bootstrap: Bootstrap, tmp_path: Path
) -> None:
    # Given a pip.conf that names an index with a user and a password,
    index.add("pip-26.1-py3-none-any.whl", small_pip("26.1"))
    url = index.url.replace("http://", "http://ann:s%40cret@")
    configuration = tmp_path / "pip.conf"
    configuration.write_text(f"[global]\nindex-url = {url}\n")

    # when an environment is made,
    result = bootstrap.run(PIP_CONFIG_FILE=str(configuration))

    # then the index was asked with them, and the output does not hold them.
    assert result.returncode == 0, result.stderr
    assert index.authorization[0] == "Basic YW5uOnNAY3JldA=="
    assert "cret" not in result.stdout + result.stderr


def test_when_no_way_leads_to_a_pip_the_package_that_helps_is_named(index: Index, bootstrap: Bootstrap) -> None:
    result = bootstrap.run(PIP_INDEX_URL=index.url)

    assert result.returncode == 1
    assert "ensurepip" in result.stderr
    assert "apt-get install python3-venv" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_something_else_is_left_alone(bootstrap: Bootstrap) -> None:
    bootstrap.environment.mkdir()
    (bootstrap.environment / "notes").write_text("dear diary")

    result = bootstrap.run()

    assert result.returncode == 1
    assert (bootstrap.environment / "notes").read_text() == "dear diary"
