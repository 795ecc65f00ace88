"""
Every metric is documented, and every name in the alerts, the dashboard and the documentation is a metric.

The alerts are also tried: each fires for the trouble it is about, and none does while nothing is wrong. That takes
promtool, which comes with Prometheus.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import CounterMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric

from hwbpd.attribution import Place
from hwbpd.core.model import Pool, Target
from hwbpd.hookspecs import Foreign
from hwbpd.metered import MeteredServer
from hwbpd.metrics import Reading
from hwbpd.metrics_families import Families
from tests import strategies
from tests.fakes import Rig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "metrics.md"
ALERTS = ROOT / "etc" / "prometheus-alerts.yml"
DASHBOARD = ROOT / "etc" / "grafana-dashboard.json"

NAME = re.compile(r"\b(?:hwbpd|process)_[a-z_]+\b")
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<type>\w+) \|(?P<labels>[^|]*)\|", re.MULTILINE)

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not on PATH: apt-get install prometheus, or unpack a release from prometheus.io",
)


def reading() -> Reading:
    """Of a daemon where somebody has looked at a CPU and at a thread, so that every metric has a value."""
    rig = Rig(make_server=MeteredServer)
    assert isinstance(rig.server, MeteredServer)
    meter = rig.server.meter
    meter.looked(Place(Pool.ANY, Target(), 0), [Foreign(7, "perf", 0, 1, "cpu-wide on cpu 0", "perf fd")])
    meter.looked(Place(Pool.ANY, Target(strategies.task(0)), None), [])
    found = meter.reading()
    rig.stop()
    return found


def families() -> dict[str, Metric]:
    """Every metric, by the name under which it is asked for."""
    endings = {CounterMetricFamily: "_total", InfoMetricFamily: "_info"}
    return {family.name + endings.get(type(family), ""): family for family in Families(reading()).collect()}


def names_of_samples() -> set[str]:
    return {sample.name for family in families().values() for sample in family.samples}


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    rows = ROW.finditer(DOCUMENT.read_text())
    documented = {row["name"]: (row["type"], set(re.findall(r"`(\w+)`", row["labels"]))) for row in rows}
    of_buckets = {"le"}

    assert documented == {
        name: (family.type, {label for sample in family.samples for label in sample.labels} - of_buckets)
        for name, family in families().items()
    }


def test_every_metric_says_what_it_is_and_has_a_value() -> None:
    for name, family in families().items():
        assert family.documentation.endswith("."), name
        assert family.samples, name


@pytest.mark.parametrize("path", [DOCUMENT, ALERTS, DASHBOARD], ids=lambda path: path.name)
def test_every_name_that_is_used_exists(path: Path) -> None:
    used = set(NAME.findall(path.read_text()))

    assert used
    assert used - names_of_samples() - families().keys() == set()


def test_there_are_as_many_series_as_documented() -> None:
    [most] = re.findall(r"about (\d+) series", DOCUMENT.read_text())

    series = sum(len(family.samples) for family in families().values())

    assert int(most) * 0.9 < series < int(most) * 1.1


def test_the_dashboard_has_panels_that_do_not_overlap_and_ask_for_something() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]

    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len({*places}) == len({panel["id"] for panel in panels}) == len(panels) > 10
    for panel in panels:
        assert panel["description"]
        assert all(NAME.search(target["expr"]) for target in panel["targets"])


# --- promtool --------------------------------------------------------------------------------------------------------


def promtool(*arguments: str, said: bytes = b"") -> None:
    result = subprocess.run(["promtool", *arguments], input=said, capture_output=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr).decode()


@needs_promtool
def test_promtool_finds_nothing_wrong_with_a_page() -> None:
    promtool("check", "metrics", said=generate_latest(Families(reading())))


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_alerts() -> None:
    promtool("check", "rules", str(ALERTS))


# What one host reports, a value a minute, and the one alert that must come of it after half an hour.
TROUBLE = {
    "HwbpdDown": ('up{job="hwbpd"}', "0x40"),
    "HwbpdHeartbeatStale": ("hwbpd_heartbeat_timestamp_seconds", "0x40"),
    "HwbpdNoFreeSlots": ('hwbpd_slots_free{cpu="3",pool="any"}', "0x40"),
    "HwbpdHitsLost": ("hwbpd_hits_lost_total", "0+1x40"),
    "HwbpdGuardTripping": ("hwbpd_guard_trips_total", "0+1x40"),
}
HEALTHY = [
    ('up{job="hwbpd"}', "1x40"),
    ("hwbpd_heartbeat_timestamp_seconds", "0+60x40"),
    ('hwbpd_slots_free{cpu="3",pool="any"}', "1x40"),
    ('hwbpd_foreign_slots{cpu="3",pool="any"}', "0x40"),
    ('hwbpd_foreign_look_timestamp_seconds{cpu="3",pool="any"}', "0+60x40"),
    ("hwbpd_hits_lost_total", "7x40"),
    ("hwbpd_hits_dropped_total", "7x40"),
    ("hwbpd_guard_trips_total", "7x40"),
    ('hwbpd_refusals_total{by="books",errno="ENOSPC"}', "0+1x40"),
]


def check_alerts(folder: Path, series: list[tuple[str, str]], at: str, firing: str | None) -> None:
    """Let promtool evaluate the alerts for what a host reports; only ``firing`` may and must fire."""
    names = re.findall(r"alert: (\w+)", ALERTS.read_text())
    expected: list[dict[str, Any]] = [{"eval_time": at, "alertname": name} for name in names if name != firing]
    tests: dict[str, Any] = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series],
                "alert_rule_test": expected,
                "promql_expr_test": [] if firing is None else [
                    {
                        "expr": f'count(ALERTS{{alertname="{firing}",alertstate="firing"}})',
                        "eval_time": at,
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    }
                ],
            }
        ],
    }
    path = folder / "tests.yml"
    path.write_text(json.dumps(tests))  # which YAML is, too
    promtool("test", "rules", str(path))


@needs_promtool
def test_no_alert_fires_while_nothing_is_wrong(tmp_path: Path) -> None:
    check_alerts(tmp_path, HEALTHY, "30m", None)


@needs_promtool
@pytest.mark.parametrize("alert", TROUBLE)
def test_an_alert_fires_for_its_trouble_and_alone(tmp_path: Path, alert: str) -> None:
    name, values = TROUBLE[alert]

    check_alerts(tmp_path, [*((of, now) for of, now in HEALTHY if of != name), (name, values)], "30m", alert)


@needs_promtool
def test_foreign_slots_are_told_while_the_look_is_recent(tmp_path: Path) -> None:
    slots = ('hwbpd_foreign_slots{cpu="3",pool="any"}', "2x200")
    recent = ('hwbpd_foreign_look_timestamp_seconds{cpu="3",pool="any"}', "0+60x200")
    long_ago = ('hwbpd_foreign_look_timestamp_seconds{cpu="3",pool="any"}', "0x200")

    check_alerts(tmp_path, [slots, recent], "120m", "HwbpdForeignSlots")
    check_alerts(tmp_path, [slots, long_ago], "120m", None)


@needs_promtool
def test_refusals_are_compared_with_the_day_before(tmp_path: Path) -> None:
    name = 'hwbpd_refusals_total{by="books",errno="ENOSPC"}'
    steady, rising = (name, "0+60x1500"), (name, "0+60x1430 85860+600x70")

    check_alerts(tmp_path, [steady], "1490m", None)
    check_alerts(tmp_path, [rising], "1490m", "HwbpdRefusalsRising")
