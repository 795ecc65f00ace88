"""etc/hwbpd.service: what systemd would refuse, and what would quietly take away what the daemon is for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "etc" / "hwbpd.service"

# Directives that systemd carries out by a seccomp filter, systemd.exec(5).
BY_SECCOMP = {
    "LockPersonality", "MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock", "ProtectHostname",
    "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "RestrictAddressFamilies",
    "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "SystemCallArchitectures", "SystemCallFilter",
    "SystemCallLog",
}  # fmt: skip

# What the daemon and its helper do, and the capability that takes.
NEEDED = {
    "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH",
    "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_KILL",
}  # fmt: skip


def directives() -> list[tuple[str, str]]:
    lines = [line for line in UNIT.read_text(encoding="utf-8").splitlines() if line and line[0] not in "#["]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def test_no_directive_works_by_a_seccomp_filter() -> None:
    # The daemon refuses clients that have more filters than itself: one of its own would let one of theirs pass.
    assert BY_SECCOMP & {name for name, _ in directives()} == set()


def test_the_unit_has_the_capabilities_the_daemon_needs_and_says_why_for_each() -> None:
    granted = {name for key, value in directives() if key == "CapabilityBoundingSet" for name in value.split()}
    assert granted == NEEDED
    comments = " ".join(line for line in UNIT.read_text(encoding="utf-8").splitlines() if line.startswith("# CAP_"))
    assert {word.rstrip(":") for word in comments.split() if word.startswith("CAP_")} == granted


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here; it is in systemd")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    # Given the unit with a program that is there on every host,
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace("/usr/bin/hwbpd", sys.executable), encoding="utf-8")

    # when systemd reads it, then it has nothing to say.
    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
