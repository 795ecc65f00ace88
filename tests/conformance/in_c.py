"""examples/client.c as a way for messages: the suite writes them, and what comes is what the C program reads in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tests.conformance.newcomer import WAIT_S, Lost, Map
from tests.conformance.vectors import with_binary

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "client.c"
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror"]


def compiled(folder: Path) -> Path:
    """Return the program, or skip the test where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler here: on Debian, apt-get install gcc libc6-dev")
    program = folder / "client"
    subprocess.run([compiler, *WARNINGS, "-O1", "-o", str(program), str(SOURCE)], check=True, timeout=120)
    return program


class InC:
    """The program with --relay."""

    def __init__(self, program: Path, path: str) -> None:
        self._process = subprocess.Popen(
            [str(program), "--relay", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self._process.pid

    def send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data.hex() + "\n")
        self._process.stdin.flush()

    def receive(self) -> Map:
        assert self._process.stdout is not None
        too_late = threading.Timer(WAIT_S, self._process.kill)
        too_late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            too_late.cancel()
            too_late.join()
        if line == "lost\n":
            raise Lost
        assert line, f"the C client ended with status {self._process.wait(WAIT_S)}"
        message: Map = with_binary(json.loads(line))
        return message

    def close(self) -> None:
        self._process.communicate(timeout=WAIT_S)
        assert self._process.returncode == 0
