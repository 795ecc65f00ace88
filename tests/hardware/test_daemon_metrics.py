"""A daemon on real registers says to a scraper what its client was told."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import hwbp
from examples.target import Target
from hwbpd import metrics_endpoint
from hwbpd_linux.cpus import online_cpus
from tests.hardware.common import EXECUTE_BYTES
from tests.hardware.daemon import MARKS, WAIT_S, Daemon

pytestmark = MARKS

HITS = 300


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon('[metrics]\nlisten = "127.0.0.1:0"\n') as daemon:
        yield daemon


def scrape(daemon: Daemon) -> dict[str, float]:
    """What a new page says: each metric's sum over its labels."""
    where = daemon.logged("metrics")["listen"]
    request = urllib.request.Request(f"http://{where}{metrics_endpoint.PATH}")
    request.add_header("Accept", "application/openmetrics-text")
    with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
        page = reply.read().decode()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(page):  # type: ignore[no-untyped-call]
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def scrape_until(daemon: Daemon, name: str, value: float) -> dict[str, float]:
    """Scrape until a page is young enough to say so: the endpoint gives out one page for a second."""
    while True:
        sums = scrape(daemon)
        if sums[name] == value:
            return sums
        assert sums[name] < value, sums


def test_a_scraper_hears_of_a_claim_and_its_hits(alone: None, daemon: Daemon, target: Target) -> None:
    # given a watchpoint on a thread, and one on all CPUs that nobody touches
    with daemon.connect() as client:
        watch = client.claim(address=target.variable, length=8, access="w", tid=target.tid)
        client.claim(address=target.function, length=EXECUTE_BYTES, access="x", delivery="count")
        slots = 4 * len(online_cpus())

        # when the target writes, and the client has read all of it
        target.command(f"write {HITS}")
        while watch.counts().delivered < HITS:
            next(iter(watch.hits(timeout=WAIT_S)))

        # then that is what a scraper hears
        sums = scrape_until(daemon, "hwbpd_hits_delivered_total", HITS)
        assert sums["hwbpd_hits_total"] == HITS
        assert sums["hwbpd_claims"] == sums["hwbpd_grants_total"] == sums["hwbpd_resources"] == 2
        assert sums["hwbpd_slots_held"] == 2 * len(online_cpus()), "the thread's counts wherever it may run"
        assert sums["hwbpd_slots_free"] == slots - 2 * len(online_cpus())
        with pytest.raises(hwbp.HwbpError):
            client.claim(address=target.variable, length=8, access="w", tid=2**22)

    # and when the client has gone, that it has
    sums = scrape_until(daemon, "hwbpd_claims_ended_total", 2)
    assert sums["hwbpd_claims"] == sums["hwbpd_slots_held"] == 0
    assert sums["hwbpd_slots_free"] == slots
    assert sums["hwbpd_refusals_total"] == 1
