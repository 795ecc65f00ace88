"""
``python -m tests.fuzz --messages 200000 --seed 7``: hostile input against a daemon that must go on.

On this host's registers, held exclusively, where there are any and the tests run as root; otherwise the messages alone
are tried, on a daemon on fakes, and the last line but one says so. The last line counts; the exit status is 0 if
nothing went wrong. Otherwise the seed and the last messages are shown, and the status is 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys

import structlog

from tests.fuzz import campaign
from tests.fuzz.on_fakes import Siege
from tests.host import HostBusy, breakpoints_missing, exclusive

A_SIEGE = 5000  # messages of one history on fakes


def main() -> int:
    """Run as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile input against a daemon.")
    parser.add_argument("--messages", type=int, default=200_000, help="how many to send (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of everything that is random (default: a new one)")
    parser.add_argument("--fakes", action="store_true", help="without this host's registers, even if there are any")
    asked = parser.parse_args()
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    _tell(f"seed {seed}")
    missing = "asked for" if asked.fakes else breakpoints_missing()
    if missing is None and (os.uname().machine != "x86_64" or os.geteuid() != 0):
        missing = "the whole of it needs x86-64 and root"
    try:
        if missing is not None:
            result = _on_fakes(asked.messages, seed)
            _tell(f"on fakes, the messages only: {missing}")
        else:
            with exclusive():
                result = campaign.run(asked.messages, seed, _tell)
    except HostBusy as busy:
        _tell(f"not run: {busy}")
        return 2
    except AssertionError as failure:
        _tell(f"seed {seed}: {failure}")
        return 1
    for leak in result.leaks:
        _tell(f"seed {seed}: left behind: {leak}")
    counts = f"messages={result.messages} replies={result.replies} dropped_connections={result.dropped}"
    print(f"{counts} leaks={len(result.leaks)}")
    return 1 if result.leaks else 0


def _on_fakes(messages: int, seed: int) -> campaign.Result:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    said = replies = cut = 0
    while said < messages:
        siege = Siege(seed + said)
        try:
            tally = siege.run(min(A_SIEGE, messages - said))
        except Exception as failure:
            last = "\n".join(data.hex() for data in siege.last)
            raise AssertionError(f"{failure!r}; the last messages of seed {seed + said}:\n{last}") from failure
        said, replies, cut = said + tally.messages, replies + tally.replies, cut + tally.connections_cut
    return campaign.Result(said, replies, cut, [])


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
