"""
hwbpctl doctor: does a breakpoint that is armed here really fire, and what stands in the way?

Nothing is concluded from settings where it can be tried: breakpoints are claimed from the daemon, as any user would,
and hit. What is only looked at (settings, limits, permissions) explains, or warns of what others will meet. The checks
are in ``check_host.py``, ``check_daemon.py`` and ``check_firing.py``; here is their order, and what becomes of one that
fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator

import hwbp
from hwbpctl import check_daemon, check_firing, check_host, render
from hwbpctl.findings import Finding, Grade, Progress, broken, line, note, summary

_SOMETHING_BROKEN = 1


def examine(socket: str | None, as_json: bool) -> int:
    """Tell each finding as soon as it is made; return the exit status: 1 when something is broken."""
    findings: list[Finding] = []
    for finding in _findings(socket, _progress):
        findings.append(finding)
        if not as_json:
            print(line(finding), flush=True)
    is_broken = any(finding.grade is Grade.BROKEN for finding in findings)
    if as_json:
        print(json.dumps({"ok": not is_broken, "findings": render.plain(findings)}))
    else:
        print(summary(findings))
    return _SOMETHING_BROKEN if is_broken else 0


def _findings(socket: str | None, progress: Progress) -> Iterator[Finding]:
    """Make the checks, the host's first: they say what may be wrong with those after them."""
    yield from _each(None, (check_host.kernel, check_host.paranoia))
    path = hwbp.socket_path(socket)
    try:
        client = hwbp.connect(path, name="hwbpctl doctor")
    except hwbp.HwbpError as refusal:
        remedy = "systemctl start hwbpd, or run hwbpd as root; then: journalctl -u hwbpd"
        yield broken("daemon", str(refusal), remedy)
        return
    with client:
        yield from _each("daemon", (lambda: check_daemon.answers(client, path),))
        yield from _each("socket", (lambda: check_daemon.socket_file(path),))
        yield from _each("limits", (lambda: check_daemon.limits(client, path),))
        yield from _each("outside", (lambda: check_daemon.foreign(client),))
        yield from check_firing.trials(client, progress)


def _each(name: str | None, checks: Iterable[Callable[[], Finding]]) -> Iterator[Finding]:
    """Make checks; one that cannot be made is itself a finding, and the others go on."""
    for check in checks:
        try:
            yield check()
        except hwbp.HwbpError as refusal:
            yield broken(name or check.__name__, str(refusal), "journalctl -u hwbpd shows the daemon's side of it")
        except OSError as error:
            yield note(name or check.__name__, f"cannot be looked at: {error}")


def _progress(text: str) -> None:
    """Show what goes on, on a terminal only, and wipe it out before the next line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
