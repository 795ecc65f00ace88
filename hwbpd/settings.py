"""
etc/hwbpd.toml as one frozen, validated value.

Every setting is here with its default and its bounds; etc/hwbpd.toml shows the same defaults with their reasons, and a
test compares the two.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from hwbpd.core import policy

MIB = 2**20


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer may send or hold."""

    message_bytes: Annotated[int, Meta(ge=1024, le=16 * MIB)] = 65536
    claims_per_session: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    claims_per_uid: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    legs_per_uid: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096
    sessions: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    sessions_per_uid: Annotated[int, Meta(ge=1, le=100_000)] = 64
    followers_per_uid: Annotated[int, Meta(ge=1, le=100_000)] = 8
    threads_per_uid: Annotated[int, Meta(ge=1, le=8192)] = 1024
    vms_per_session: Annotated[int, Meta(ge=1, le=100_000)] = 16
    vcpus_per_session: Annotated[int, Meta(ge=1, le=100_000)] = 1024
    vcpus_per_uid: Annotated[int, Meta(ge=1, le=100_000)] = 4096
    connections_per_uid: Annotated[int, Meta(ge=1, le=100_000)] = 128
    memory_bytes: Annotated[int, Meta(ge=64 * MIB, le=2**50)] = 1024 * MIB
    connections_per_uid_per_s: Annotated[int, Meta(ge=1, le=100_000)] = 20
    messages_queued_per_session: Annotated[int, Meta(ge=1, le=100_000)] = 256
    hits_bytes_queued_per_session: Annotated[int, Meta(ge=4096, le=1024 * MIB)] = 16 * MIB


class Rings(Struct, frozen=True, forbid_unknown_fields=True):
    """How hits are collected."""

    bytes_default: Annotated[int, Meta(ge=4096, le=1024 * MIB)] = 256 * 1024
    bytes_max: Annotated[int, Meta(ge=4096, le=1024 * MIB)] = 8 * MIB
    bytes_per_message: Annotated[int, Meta(ge=4096, le=MIB // 2)] = 128 * 1024


class Guard(Struct, frozen=True, forbid_unknown_fields=True):
    """Against floods."""

    hits_per_s: Annotated[int, Meta(ge=0, le=10**9)] = 10_000
    rearm_after_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0


class Policy(Struct, frozen=True, forbid_unknown_fields=True):
    """Who gets a slot when not everybody can."""

    reserve_slots: Annotated[int, Meta(ge=0, le=16)] = 1
    revoke_grace_s: Annotated[float, Meta(ge=0, le=60)] = 0.1
    wait_max_s: Annotated[float, Meta(ge=0, le=7 * 86400)] = 3600.0
    retry_s: Annotated[float, Meta(ge=0.01, le=3600)] = 1.0

    def for_core(self) -> policy.Policy:
        """The part of it that the core decides by."""
        return policy.Policy(self.reserve_slots, int(self.revoke_grace_s * 1e9), int(self.retry_s * 1e9))


class Metrics(Struct, frozen=True, forbid_unknown_fields=True):
    """For a Prometheus server, or whatever else reads OpenMetrics."""

    listen: Annotated[str, Meta(pattern=r"^(unix:/.{1,100}|[^/]{1,253}:[0-9]{1,5})?$")] = ""  # empty: nowhere


class Sim(Struct, frozen=True, forbid_unknown_fields=True):
    """The simulated machine, and what runs on it by itself."""

    cpus: Annotated[int, Meta(ge=1, le=8192)] = 4
    profile: Annotated[str, Meta(max_length=1000)] = ""  # which CPUs, by name; empty: so many as above, x86
    seed: Annotated[int, Meta(ge=0, le=2**62)] = 1
    processes: Annotated[int, Meta(ge=0, le=4000)] = 3
    threads: Annotated[int, Meta(ge=1, le=1000)] = 2
    accesses_per_s: Annotated[int, Meta(ge=0, le=100_000)] = 20
    outsider_slots: Annotated[int, Meta(ge=0, le=16)] = 0


def _check_rings(rings: Rings) -> None:
    for name in ("bytes_default", "bytes_max"):
        size = getattr(rings, name)
        if size & (size - 1):
            raise msgspec.ValidationError(f"{size} is not a power of two - at `$.rings.{name}`")
    if rings.bytes_default > rings.bytes_max:
        raise msgspec.ValidationError("more than `$.rings.bytes_max` - at `$.rings.bytes_default`")


def _check_metrics(metrics: Metrics) -> None:
    port = metrics.listen.rpartition(":")[2]
    if port.isdecimal() and int(port) > 65535:
        raise msgspec.ValidationError(f"there is no port {port} - at `$.metrics.listen`")


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    socket: str = ""  # empty: $HWBPD_SOCKET, $XDG_RUNTIME_DIR/hwbpd/hwbpd.sock, /run/hwbpd/hwbpd.sock
    socket_mode: Annotated[str, Meta(pattern="^0[0-7]{3}$")] = "0666"
    fast_socket: bool = True
    machine: str = "auto"
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    journal: str = ""  # empty: none
    journal_max_bytes: Annotated[int, Meta(ge=64 * 1024, le=2**50)] = 1024 * MIB
    limits: Limits = Limits()
    rings: Rings = Rings()
    guard: Guard = Guard()
    policy: Policy = Policy()
    sim: Sim = Sim()
    metrics: Metrics = Metrics()


class BadSettings(Exception):
    """The settings file cannot be used; the message says which line or field, and why."""


def load(path: Path | None) -> Settings:
    """
    Return the settings in a TOML file, or the defaults without one.

    :raises BadSettings: naming the file and the field.
    """
    if path is None:
        return Settings()
    try:
        with path.open("rb") as file:
            settings = msgspec.convert(tomllib.load(file), Settings)
            _check_rings(settings.rings)
            _check_metrics(settings.metrics)
            return settings
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as why:
        raise BadSettings(f"{path}: {why}") from None


def with_cpus(settings: Settings, cpus: int) -> Settings:
    """
    Return the settings with another number of simulated CPUs, which have no names.

    :raises BadSettings: when there cannot be so many, or another machine is asked for, whose CPUs are what they are.
    """
    if settings.machine != "sim":
        raise BadSettings(f"--cpus is for --machine sim; the machine asked for is {settings.machine!r}")
    try:
        asked = msgspec.structs.replace(settings.sim, cpus=cpus, profile="")
        return msgspec.structs.replace(settings, sim=msgspec.convert(msgspec.to_builtins(asked), Sim))
    except msgspec.ValidationError as why:
        raise BadSettings(f"--cpus {cpus}: {why}") from None


def with_profile(settings: Settings, profile: str) -> Settings:
    """
    Return the settings with other simulated CPUs, by their names. What names there are is the plugins' to know.

    :raises BadSettings: when another machine is asked for.
    """
    if settings.machine != "sim":
        raise BadSettings(f"--profile is for --machine sim; the machine asked for is {settings.machine!r}")
    return msgspec.structs.replace(settings, sim=msgspec.structs.replace(settings.sim, profile=profile))


def socket_path(asked: str) -> Path:
    """Return where the daemon listens: what was asked for, else the first of the usual places."""
    for path in (asked, os.environ.get("HWBPD_SOCKET")):
        if path:
            return Path(path)
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime_dir or "/run") / "hwbpd" / "hwbpd.sock"
