"""
The whole of it on a real daemon: hostile processes of several users, and an honest client beside them.

While it runs the honest client's hits, counts and answers are exact and the daemon logs no error. When the hostile ones
are gone, what they cost is given back: descriptors, claims, sessions, slots as the kernel counts them; memory may have
grown by ``GROWTH_MIB_MAX`` since the daemon was warm.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hwbp
from examples.target import Target
from tests.fuzz.assailant import Assailant, Order, Outcome
from tests.hardware.daemon import Daemon, books_free, kernel_free

UIDS = (0, 0, 60001, 60002)
SHARES = (0.4, 0.2, 0.25, 0.15)  # of the messages, for each of them
WRITES = 20  # by the watched program, each round
WARM = 0.25  # of the messages; by then every table of bounded size is full
GROWTH_MIB_MAX = 32  # some ten are measured in 200 000 messages, and no more in 400 000
SETTLE_S = 40.0  # for what is given back in other threads
TELL_EVERY_S = 5.0
MIB = 2**20


class Failed(AssertionError):
    """The daemon did not stand it."""


class Result(NamedTuple):
    """What came of it."""

    messages: int
    replies: int
    dropped: int
    leaks: list[str]


class Witness:
    """An honest client: one watch, whose every hit comes, and questions that are answered."""

    def __init__(self, daemon: Daemon, target: Target) -> None:
        self.client = daemon.connect("an honest client")
        self._target = target
        self._written = 0
        self.watch = self.client.claim(address=target.variable, length=8, access="w", tid=target.tid, guard=0)

    def round(self) -> None:
        """Let the program write, and see that nothing is missing."""
        self._target.command(f"write {WRITES}")
        self._written += WRITES
        came = 0
        for _ in self.watch.hits(timeout=SETTLE_S):
            came += 1
            if came == WRITES:
                break
        counts = self.watch.counts()
        if (came, counts.hits, counts.delivered, self.watch.state) != (WRITES, self._written, self._written, "armed"):
            raise Failed(f"of {WRITES} writes the honest client got {came}; {counts}, {self.watch}")
        if not any(claim.claim == self.watch.claim_id for row in self.client.slots().resources for claim in row.claims):
            raise Failed("the honest client's claim is not in the books")


class Vitals:
    """The daemon as the kernel and its log show it."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.sessions = 0
        self.lines = 0

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._daemon.pid}/fd"))

    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self._daemon.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB

    def read_log(self) -> None:
        """Take in what was logged since; raises ``Failed`` for an error, or what is no line of a log."""
        lines = self._daemon.log[:]
        del self._daemon.log[: len(lines)]
        self.lines += len(lines)
        for line in lines:
            self.sessions += (line["event"] == "session") - (line["event"] == "session over")
        bad = [line for line in lines if line.get("level") in ("error", "critical")]
        if bad or self._daemon.unreadable:
            raise Failed(f"the daemon said {bad[:3]} {self._daemon.unreadable[-30:]}")


def run(messages: int, seed: int, tell: Callable[[str], None]) -> Result:
    """
    Send so many messages, or a few more.

    :param tell: gets a line about how far it is, now and then.
    :raises AssertionError: when the daemon does not keep its word, with the last messages.
    """
    users = UIDS if os.geteuid() == 0 else (os.geteuid(),) * len(UIDS)
    assailants = [Assailant(f"{number} as uid {uid}", seed, uid) for number, uid in enumerate(users)]
    try:
        with Target("--threads", "6") as target, Daemon() as daemon:
            return _besiege(daemon, target, assailants, messages, tell)
    finally:
        for assailant in assailants:
            assailant.end()


def _besiege(
    daemon: Daemon, target: Target, assailants: list[Assailant], messages: int, tell: Callable[[str], None]
) -> Result:
    vitals = Vitals(daemon)
    witness = Witness(daemon, target)
    witness.round()
    vitals.read_log()
    free, descriptors, sessions = kernel_free(), vitals.descriptors(), vitals.sessions
    order = Order(
        path=str(daemon.socket),
        epoch=int(witness.client._connection.welcome["epoch"]),
        spared=witness.watch.claim_id,
        tids=[target.tid, *target.tids],
        addresses=[target.variable, target.variable + 8, target.function],
        messages=0,
    )
    for assailant, share in zip(assailants, SHARES, strict=True):
        assailant.begin(order._replace(messages=int(messages * share)))
    warm_mib = _until_they_are_done(assailants, witness, vitals, messages, tell)
    outcomes = [assailant.outcome for assailant in assailants if assailant.outcome is not None]
    leaks = _leaks(witness, vitals, free, descriptors, sessions)
    resident_mib = vitals.resident_mib()
    tell(f"resident {warm_mib:.0f} MiB when warm, {resident_mib:.0f} at the end; {vitals.lines} lines of log")
    if resident_mib - warm_mib > GROWTH_MIB_MAX:
        leaks.append(f"{resident_mib - warm_mib:.0f} MiB of memory")
    witness.client.close()
    return Result(
        sum(outcome.messages for outcome in outcomes),
        sum(outcome.replies for outcome in outcomes),
        sum(outcome.dropped for outcome in outcomes),
        leaks,
    )


def _until_they_are_done(
    assailants: list[Assailant], witness: Witness, vitals: Vitals, messages: int, tell: Callable[[str], None]
) -> float:
    """Go round as the honest client; return the daemon's memory in MiB when it was warm."""
    warm_mib = 0.0
    tell_at = time.monotonic() + TELL_EVERY_S
    while any([assailant.look() is None for assailant in assailants]):  # noqa: C419 - each is to be looked at
        for assailant in assailants:
            if assailant.outcome is not None:
                _check(assailant.name, assailant.outcome)
        try:
            witness.round()
            vitals.read_log()
        except (hwbp.HwbpError, OSError) as why:
            raise Failed(f"the honest client is not served: {why}\n{_last_words(assailants)}") from why
        said = sum(assailant.said for assailant in assailants)
        if not warm_mib and said > WARM * messages:
            warm_mib = vitals.resident_mib()
        if time.monotonic() > tell_at:
            tell(f"{said} messages, {vitals.descriptors()} descriptors, {vitals.resident_mib():.0f} MiB")
            tell_at += TELL_EVERY_S
    for assailant in assailants:
        assert assailant.outcome is not None
        _check(assailant.name, assailant.outcome)
    return warm_mib or vitals.resident_mib()


def _check(name: str, outcome: Outcome) -> None:
    if outcome.wrong:
        raise Failed(f"assailant {name}: {outcome.wrong}\nthe last messages:\n" + "\n".join(outcome.last))


def _last_words(assailants: list[Assailant]) -> str:
    told = []
    for assailant in assailants:
        outcome = assailant.look()
        if outcome is not None and outcome.wrong:
            told.append(f"assailant {assailant.name}: {outcome.wrong}\n" + "\n".join(outcome.last))
    return "\n".join(told)


def _leaks(
    witness: Witness, vitals: Vitals, free: dict[int, int], descriptors: int, sessions: int
) -> list[str]:
    """What has not been given back; the honest client goes round until nothing is missing, or too long."""
    give_up = time.monotonic() + SETTLE_S
    while True:
        witness.round()
        vitals.read_log()
        claims = sorted({claim.claim for row in witness.client.slots().resources for claim in row.claims})
        found: dict[str, tuple[object, object]] = {
            "descriptors": (descriptors, vitals.descriptors()),
            "claims in the books": ([witness.watch.claim_id], claims),
            "sessions in the log": (sessions, vitals.sessions),
        }
        differing = [(what, *counts) for what, counts in found.items() if counts[0] != counts[1]]
        leaks = [f"{what}: {before} before, {after} after" for what, before, after in differing]
        if not leaks or time.monotonic() > give_up:
            break
    after, books = kernel_free(), books_free(witness.client)
    if not free == after == books:
        leaks.append(f"slots free by cpu: {free} before, {after} after, {books} by the books")
    return leaks
