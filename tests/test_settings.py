"""Settings: the file that is shipped is the defaults, and what is wrong with another is said before anything starts."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hwbpd.core.policy import Policy as CorePolicy
from hwbpd.settings import BadSettings, Limits, Rings, Settings, load, socket_path

SHIPPED = Path(__file__).resolve().parent.parent / "etc" / "hwbpd.toml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hwbpd.toml"
    path.write_text(text)
    return path


def test_the_shipped_file_says_every_default_and_nothing_else() -> None:
    shipped = tomllib.loads(SHIPPED.read_text())

    assert shipped == msgspec.to_builtins(Settings())
    assert load(SHIPPED) == Settings()


def test_without_a_file_the_defaults_hold() -> None:
    assert load(None) == Settings()


def test_what_a_file_leaves_out_is_at_its_default(tmp_path: Path) -> None:
    path = written(tmp_path, 'machine = "linux"\n[limits]\nsessions = 3\n')

    assert load(path) == Settings(machine="linux", limits=Limits(sessions=3))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('sokcet = "/tmp/x"', "sokcet"),
        ("[limits]\nsession = 3", "session"),
        ("[ring]\nbytes_max = 8192", "ring"),
        ("[limits]\nsessions = 0", "$.limits.sessions"),
        ('[limits]\nsessions = "3"', "$.limits.sessions"),
        ("[limits]\nsessions = 2.0", "$.limits.sessions"),
        ("[limits]\nmessage_bytes = 1023", "$.limits.message_bytes"),
        ("[rings]\nbytes_max = 2147483648", "$.rings.bytes_max"),
        ('log_format = "xml"', "$.log_format"),
        ("log_level = 3", "$.log_level"),
        ("journal = true", "$.journal"),
        ("journal_max_bytes = 65535", "$.journal_max_bytes"),
        ('[metrics]\nlisten = "9464"', "$.metrics.listen"),
        ('[metrics]\nlisten = "localhost:"', "$.metrics.listen"),
        ('[metrics]\nlisten = "localhost:65536"', "$.metrics.listen"),
        ('[metrics]\nlisten = "unix:metrics.sock"', "$.metrics.listen"),
        ("[policy]\nreserve_slots = -1", "$.policy.reserve_slots"),
        ("[policy]\nrevoke_grace_s = 61", "$.policy.revoke_grace_s"),
        ("[policy]\nwait_max_s = -1", "$.policy.wait_max_s"),
        ("[policy]\nretry_s = 0", "$.policy.retry_s"),
        ("limits = 3", "$.limits"),
        ("machine = auto", "line 1"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_file(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)

    with pytest.raises(BadSettings) as refused:
        load(path)

    assert str(path) in str(refused.value)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("bytes_default = 5000", "bytes_default"),
        ("bytes_max = 5000", "bytes_max"),
        ("bytes_default = 16384\nbytes_max = 8192", "bytes_default"),
    ],
    ids=["default is no power of two", "most is no power of two", "default is more than the most"],
)
def test_a_ring_that_no_machine_can_have_is_refused_at_start(tmp_path: Path, text: str, field: str) -> None:
    # A claim that names no ring gets the default: if that cannot be armed, the daemon fails at the first claim.
    with pytest.raises(BadSettings, match=field):
        load(written(tmp_path, f"[rings]\n{text}\n"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=r"absent\.toml"):
        load(tmp_path / "absent.toml")
    with pytest.raises(BadSettings, match=str(tmp_path)):
        load(tmp_path)


@pytest.mark.parametrize(
    ("asked", "environment", "path"),
    [
        ("/a/b.sock", {"HWBPD_SOCKET": "/c.sock", "XDG_RUNTIME_DIR": "/run/user/0"}, "/a/b.sock"),
        ("", {"HWBPD_SOCKET": "/c.sock", "XDG_RUNTIME_DIR": "/run/user/0"}, "/c.sock"),
        ("", {"XDG_RUNTIME_DIR": "/run/user/0"}, "/run/user/0/hwbpd/hwbpd.sock"),
        ("", {"HWBPD_SOCKET": "", "XDG_RUNTIME_DIR": ""}, "/run/hwbpd/hwbpd.sock"),
        ("", {}, "/run/hwbpd/hwbpd.sock"),
    ],
)
def test_the_socket_is_where_the_first_says_who_says_anything(
    monkeypatch: pytest.MonkeyPatch, asked: str, environment: dict[str, Any], path: str
) -> None:
    for name in ("HWBPD_SOCKET", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert socket_path(asked) == Path(path)


def test_settings_are_values() -> None:
    with pytest.raises(AttributeError):
        Settings().machine = "sim"  # type: ignore[misc]
    assert Settings(rings=Rings()) == Settings()


def test_the_policies_come_to_the_core_in_nanoseconds(tmp_path: Path) -> None:
    path = written(tmp_path, "[policy]\nreserve_slots = 2\nrevoke_grace_s = 0.25\nwait_max_s = 60\nretry_s = 2\n")

    policy = load(path).policy

    assert policy.wait_max_s == 60
    assert policy.for_core() == CorePolicy(reserve_slots=2, revoke_grace_ns=250_000_000, retry_ns=2_000_000_000)
