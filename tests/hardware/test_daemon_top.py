"""hwbpctl top against a daemon on real registers: rates of real hits, decisions as they come, and who may see what."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import hwbp
from examples.target import Target
from tests.clients.screen import top_on
from tests.hardware.daemon import MARKS, WAIT_S, Daemon, own_name

pytestmark = MARKS


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def client(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect("somebody") as client:
        yield client


def test_real_hits_have_a_rate_and_decisions_are_shown_as_they_come(
    daemon: Daemon, client: hwbp.Client, target: Target
) -> None:
    # Given top on a terminal, when a claim is granted and the target writes,
    with top_on(daemon.socket, "-d", "0.2", columns=120) as screen:
        screen.shows("no claims", "4 free")
        watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid, label="the counter")
        of_claim = f"{own_name()} claim {watch.claim_id}"
        screen.shows(f"granted  {of_claim}: mem:{target.variable:#x}/8:w for tid {target.tid}", "[=...] 3 free")
        target.command("write 7")
        screen.shows(f"claim {watch.claim_id}: uid {os.getuid()}", "7 hits")

        # then its story can be asked for, and when it is released from here, its owner is told and the slot is free.
        screen.press("w")
        screen.shows(f"why claim {watch.claim_id}: armed")
        screen.press("\x1b")
        screen.shows("-- decisions ")
        screen.press("r")
        screen.shows(f"release claim {watch.claim_id} of {own_name()}? y/n")
        screen.press("y")
        screen.shows("no claims", "4 free", f"ended    {of_claim}: forced")
        assert len(list(watch.hits(WAIT_S))) == 7  # all there are, as the claim is over
        assert watch.ended
        assert watch.ended.reason == "forced"
        screen.press("q")
        assert screen.end() == 0
        assert screen.is_as_before


def test_a_restarted_daemon_is_followed_again(alone: None) -> None:
    with Daemon() as own_daemon, top_on(own_daemon.socket, "-d", "0.2") as screen:
        screen.shows("no claims")
        own_daemon.kill()
        screen.shows("the session is over")
        own_daemon.start()
        screen.shows("a daemon is there again", "no claims")
        with own_daemon.connect("a newcomer"):
            screen.shows("session ", "a newcomer")


def test_others_than_root_see_neither_addresses_nor_decisions_of_others(
    daemon: Daemon, client: hwbp.Client, target: Target
) -> None:
    # Given a claim of root's,
    address = f"{target.variable:x}"
    watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid)

    # when somebody else watches, then there is a claim without an address,
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    with top_on(daemon.socket, "-d", "0.2", before=nobody) as screen:
        screen.shows(f"{watch.claim_id:>5} {own_name()}", "-/8:w")

        # and no decision about it.
        watch.release()
        screen.shows("no claims")
        assert address not in screen.written
        assert not any("ended" in line for line in screen.frame())
