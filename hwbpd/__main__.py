"""
Start here: reads the settings, builds the daemon, runs it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from hwbpd import daemon, logs, settings
from hwbpd.core.errors import NotSupported
from hwbpd.journal import CannotJournal
from hwbpd.plugins import BrokenPlugin

DEFAULT_CONFIG = Path("/etc/hwbpd.toml")


def arguments() -> argparse.ArgumentParser:
    """The command line; what it leaves out comes from the settings file, what that leaves out from the defaults."""
    parser = argparse.ArgumentParser(
        prog="hwbpd", description="The arbiter of this host's hardware breakpoints. Runs in the foreground."
    )
    parser.add_argument("--config", type=Path, help=f"settings file (default: {DEFAULT_CONFIG}, if it exists)")
    parser.add_argument("--socket", help="where to listen (default: $HWBPD_SOCKET, $XDG_RUNTIME_DIR/hwbpd, /run/hwbpd)")
    parser.add_argument(
        "--machine",
        help="linux: this host's registers; sim: a simulated machine, see docs/simulator.md; auto: the first real "
        "machine, never the simulated one (default)",
    )
    simulated = parser.add_mutually_exclusive_group()
    simulated.add_argument("--cpus", type=int, metavar="N", help="how many the simulated machine has (default: 4)")
    simulated.add_argument(
        "--profile", metavar="NAMExN+...", help="which CPUs it has, as cortex-a15x2+cortex-a7x3 (default: x86)"
    )
    parser.add_argument(
        "--journal", metavar="FILE", help="write every event there, for `hwbpctl replay` (default: none)"
    )
    parser.add_argument("--log-format", choices=("auto", "console", "json"), help="default: console on a terminal")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    return parser


def main() -> int:
    """Run the daemon; return the exit status: 0 after a stop, 1 when it cannot run, 2 for bad settings."""
    asked = vars(arguments().parse_args())
    config = asked.pop("config") or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    try:
        chosen = settings.load(config)
        cpus, profile = asked.pop("cpus"), asked.pop("profile")
        chosen = msgspec.structs.replace(chosen, **{name: value for name, value in asked.items() if value is not None})
        if cpus is not None:
            chosen = settings.with_cpus(chosen, cpus)
        if profile is not None:
            chosen = settings.with_profile(chosen, profile)
    except settings.BadSettings as why:
        print(f"hwbpd: {why}", file=sys.stderr)
        return 2
    logs.set_up(chosen.log_format, chosen.log_level)
    try:
        daemon.run(chosen)
    except (daemon.AlreadyRunning, daemon.CannotListen, CannotJournal, NotSupported, BrokenPlugin) as why:
        print(f"hwbpd: {why}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
