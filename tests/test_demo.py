"""
The demo runs on real registers where there are any, and where there are none on simulated ones, saying so.

A host without breakpoints is this one behind a seccomp filter that refuses perf_event_open(2). On real registers the
demo's commands are tried by ``tests/hardware``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hwbpd_linux.readiness import NOT_PERMITTED, NOT_PERMITTED_ROOT

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo.py"
WAIT_S = 120

PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}.get(os.uname().machine)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO


def without_breakpoints() -> None:
    """Have this process, and all that come of it, refused every perf event."""
    assert PERF_EVENT_OPEN is not None
    instructions = [
        (LOAD_WORD, 0, 0, 0),  # the number of the call
        (JUMP_IF_EQUAL, 0, 1, PERF_EVENT_OPEN),
        (RETURN, 0, 0, FAIL_WITH | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    header = struct.pack("@HP", len(instructions), ctypes.addressof(program))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0, os.strerror(ctypes.get_errno())


def demo(*options: str, prepare: Callable[[], None] | None = None) -> list[str]:
    """Run the demo to its good end; return what it said."""
    ran = subprocess.run(
        [sys.executable, str(DEMO), *options],
        preexec_fn=prepare,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


def assert_all_was_shown(said: list[str]) -> None:
    text = "\n".join(said)
    assert text.count("0x401104") == 7, "five hits, and two"
    assert "5 hits: 5 delivered, 0 lost, 0 dropped" in text
    assert "ENOSPC: no slot on tid 1000" in text
    assert text.count("held by hwbpctl") == 4
    assert "4 of 4 slots free" in said[-4], "nothing is left behind"


@pytest.mark.skipif(PERF_EVENT_OPEN is None, reason="the number of perf_event_open is known for 64-bit x86 and Arm")
def test_without_breakpoints_the_demo_is_simulated_and_its_first_and_last_line_say_so_and_why() -> None:
    said = demo(prepare=without_breakpoints)

    why = NOT_PERMITTED_ROOT if os.geteuid() == 0 else NOT_PERMITTED
    assert said[0].startswith("SIMULATED")
    assert said[0].endswith(why)
    assert said[-1] == said[0]
    assert_all_was_shown(said)


def test_a_simulated_demo_can_be_asked_for() -> None:
    said = demo("--simulated")

    assert said[0] == said[-1]
    assert said[0].startswith("SIMULATED, as asked")
    assert_all_was_shown(said)
