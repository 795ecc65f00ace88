"""
A reading in the terms of OpenMetrics: every metric with its name, type and meaning.

docs/metrics.md lists the same; a test compares the two. Names follow OpenMetrics: what only grows ends in ``_total``, a
unit is spelled out and comes last. A moment is given in seconds since 1970, never as an age, so that whoever evaluates
it sees it grow old even if nobody reads anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hwbpd.metrics import BOUNDS_NS, Histogram, Reading

NS_PER_S = 1_000_000_000
_BOUNDS = (*(repr(bound_ns / NS_PER_S) for bound_ns in BOUNDS_NS), "+Inf")

Row = tuple[Sequence[str], float]  # the values of the labels, and the metric's


class Families(Collector):
    """What one reading says, together with what the kernel says of this process."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        yield from self._slots()
        yield from self._claims()
        yield from self._hits()
        yield from self._daemon()
        yield from ProcessCollector(registry=None).collect()

    def _slots(self) -> Iterator[Metric]:
        reading = self._reading
        yield gauge(
            "hwbpd_slots", "Slots that every CPU has.", ["pool"], (([pool], n) for pool, n in reading.slots.items())
        )
        yield gauge(
            "hwbpd_slots_held",
            "Slots of an online CPU held by claims: CPU-wide ones, and those of the busiest task that may run there.",
            ["cpu", "pool"],
            (([str(cpu), pool], held) for (cpu, pool), held in reading.held.items()),
        )
        yield gauge(
            "hwbpd_slots_free",
            "Slots of an online CPU that are left for CPU-wide claims, by the daemon's books.",
            ["cpu", "pool"],
            (([str(cpu), pool], reading.slots_on[cpu, pool] - held) for (cpu, pool), held in reading.held.items()),
        )
        yield gauge(
            "hwbpd_foreign_slots",
            "Slots of a CPU that the last look there found held outside the daemon.",
            ["cpu", "pool"],
            (([str(cpu), pool], look.slots) for (cpu, pool), look in reading.foreign.items()),
        )
        yield gauge(
            "hwbpd_foreign_look_timestamp_seconds",
            "When the last look at a CPU was done.",
            ["cpu", "pool"],
            (([str(cpu), pool], look.at_s) for (cpu, pool), look in reading.foreign.items()),
        )
        of_task = reading.foreign_of_task.items()
        yield gauge(
            "hwbpd_foreign_task_slots",
            "Slots held outside the daemon on the thread or process that was looked at last.",
            ["pool"],
            (([pool], look.slots) for pool, look in of_task),
        )
        yield gauge(
            "hwbpd_foreign_task_look_timestamp_seconds",
            "When the last look at a thread or process was done.",
            ["pool"],
            (([pool], look.at_s) for pool, look in of_task),
        )
        meaning = "Held slots, each counted once, on however many CPUs it counts."
        yield gauge("hwbpd_resources", meaning, [], [([], reading.resources)])

    def _claims(self) -> Iterator[Metric]:
        reading = self._reading
        yield gauge(
            "hwbpd_claims",
            "Claims that are not over.",
            ["kind", "state"],
            (([kind, state], n) for (kind, state), n in reading.claims.items()),
        )
        yield counter(
            "hwbpd_grants", "Claims granted.", ["kind"], (([kind], n) for kind, n in reading.grants.items())
        )
        yield counter(
            "hwbpd_refusals",
            "Requests refused: at the door, by the books, or when they were to be armed.",
            ["by", "errno"],
            ((key, n) for key, n in reading.refusals.items()),
        )
        yield counter(
            "hwbpd_claims_ended",
            "Claims that were granted or queued and are over.",
            ["how"],
            (([how], n) for how, n in reading.ended.items()),
        )
        yield counter("hwbpd_guard_trips", "Claims silenced for too many hits.", [], [([], reading.guard_trips)])

    def _hits(self) -> Iterator[Metric]:
        reading = self._reading
        yield counter(
            "hwbpd_hits",
            "Hits seen, by what the claim is for: records of them (hits) or their number (count).",
            ["delivery"],
            (([delivery], n) for delivery, n in reading.hits.items()),
        )
        for name, meaning, n in (
            ("delivered", "Hits put on their way to a client.", reading.delivered),
            ("lost", "Hits for which the kernel's ring had no room.", reading.lost),
            ("dropped", "Hits dropped because their client did not read.", reading.dropped),
            ("filtered", "Hits of other processes than the one a claim is for.", reading.filtered),
        ):
            yield counter(f"hwbpd_hits_{name}", meaning, [], [([], n)])

    def _daemon(self) -> Iterator[Metric]:
        reading = self._reading
        yield gauge("hwbpd_sessions", "Sessions that are open.", [], [([], reading.sessions)])
        yield counter("hwbpd_messages", "Messages received.", [], [([], reading.messages)])
        yield counter("hwbpd_wakeups", "Turns of the loop, each after one epoll_wait.", [], [([], reading.wakeups)])
        by_event = (([event.__name__], histogram) for event, histogram in reading.steps.items())
        yield histograms("hwbpd_step_seconds", "Time for one step of the core.", ["event"], by_event)
        served = "Time from a message's receipt until its reply is with the transport, or waits for a look at others."
        yield histograms("hwbpd_message_seconds", served, [], [([], reading.served)])
        yield gauge(
            "hwbpd_heartbeat_timestamp_seconds", "When the loop made this reading.", [], [([], reading.at_s)]
        )
        about = {
            "version": reading.about.version,
            "machine": reading.about.machine,
            "backend": reading.about.backend,
        }
        yield InfoMetricFamily("hwbpd_daemon", "Which daemon this is.", about)


def gauge(name: str, meaning: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
    """One family of numbers that go up and down."""
    family = GaugeMetricFamily(name, meaning, labels=labels, unit=_unit(name))
    for values, number in rows:
        family.add_metric(values, number)
    return family


def counter(name: str, meaning: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
    """One family of numbers that only grow; ``_total`` is added to its name."""
    family = CounterMetricFamily(name, meaning, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def histograms(
    name: str, meaning: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], Histogram]]
) -> Metric:
    """One family of histograms, in seconds."""
    family = HistogramMetricFamily(name, meaning, labels=labels, unit=_unit(name))
    for values, histogram in rows:
        so_far, buckets = 0, []
        for bound, count in zip(_BOUNDS, histogram.counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        family.add_metric(values, buckets, histogram.sum_ns / NS_PER_S)
    return family


def _unit(name: str) -> str:
    return "seconds" if name.endswith("_seconds") else ""
