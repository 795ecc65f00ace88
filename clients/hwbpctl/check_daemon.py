"""
What of the daemon decides about breakpoints: who answers, who may come near its socket, how many descriptors and how
much ring memory it has, and who else holds slots.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
from pathlib import Path

import hwbp
from hwbpctl.findings import Finding, broken, note, ok

FULL_USE_DESCRIPTORS = 4096  # the legs that one user may have, as the daemon comes

_CAP_IPC_LOCK = 1 << 14
_KIB = 1024


def answers(client: hwbp.Client, path: Path) -> Finding:
    """Who answers there."""
    pid = _listener(path)
    who = f"pid {pid} on {path}" if pid else str(path)
    speaks = f"{who}: protocol {client.protocol_version}, machine {client.machine}, backend {client.backend}"
    if client.machine != "linux":
        return broken("daemon", f"{speaks}: not this host's registers", "start it with: hwbpd --machine linux")
    return ok("daemon", speaks)


def socket_file(path: Path, trusted_uids: frozenset[int] = frozenset({0, os.geteuid()})) -> Finding:
    """Who may connect, and whether somebody else could put a socket of their own there."""
    file, directory = path.stat(), path.parent.stat()
    mode = stat.S_IMODE(file.st_mode)
    for what, uid in ((path, file.st_uid), (path.parent, directory.st_uid)):
        if uid not in trusted_uids:
            return broken(
                "socket",
                f"{what} belongs to uid {uid}, who may answer in the daemon's place",
                "let hwbpd listen where only root can write, as in /run/hwbpd",
            )
    is_sticky = bool(directory.st_mode & stat.S_ISVTX)
    if directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
        return broken(
            "socket",
            f"others may write to {path.parent}, and so answer in the daemon's place",
            f"chmod go-w {path.parent}",
        )
    if mode & 0o022 == 0:  # connecting takes the right to write
        return note(
            "socket",
            f"mode {mode:04o}: only uid {file.st_uid} may connect",
            'socket_mode = "0666" lets everybody ask; what they may claim is what the kernel would let them',
        )
    who = "everybody" if mode & 0o002 else f"group {file.st_gid}"
    sentence = f"mode {mode:04o}, uid {file.st_uid}: {who} may connect, and claim what the kernel would let them"
    return ok("socket", sentence)


def limits(client: hwbp.Client, path: Path, proc: Path = Path("/proc")) -> Finding:
    """Whether the daemon has descriptors and ring memory for more than a few claims; one of each per leg."""
    pid = _listener(path)
    if not pid:
        return note("limits", "the daemon is in another pid namespace; its limits cannot be seen from here")
    able = client.capabilities()
    cpus = len(able.cpus_online)
    try:
        soft = _limits(proc / str(pid))
        capabilities = _effective(proc / str(pid))
    except PermissionError:
        return note("limits", "only root can see the daemon's limits", "sudo hwbpctl doctor")
    descriptors = soft["Max open files"]
    if descriptors is not None and descriptors < FULL_USE_DESCRIPTORS:
        most = f"{descriptors // cpus} threads on {cpus} cpus"
        return note(
            "limits",
            f"{descriptors} descriptors: a process of more than {most} is refused",
            "LimitNOFILE=1048576 in the unit, or ulimit -n before starting hwbpd",
        )
    threads = "any number of threads" if descriptors is None else f"{descriptors // cpus} threads"
    room = f"descriptors for a process of {threads} on {cpus} cpus"
    rings = _rings(able, proc, soft["Max locked memory"], capabilities)
    if rings is not None and rings < cpus * sum(able.pools.values()):
        return note(
            "limits",
            f"{room}; memory for only {rings} rings of {able.limits['ring_bytes_default'] // _KIB} KiB",
            "LimitMEMLOCK=infinity in the unit, or a higher kernel.perf_event_mlock_kb",
        )
    return ok("limits", f"{room}; memory for {'any number of' if rings is None else rings} rings")


def foreign(client: hwbp.Client) -> Finding:
    """Who holds slots outside the daemon: of these the daemon cannot give any."""
    try:
        holders = client.foreign()
    except hwbp.NotPermitted as refusal:
        return note("outside", str(refusal), "sudo hwbpctl doctor")
    if not holders:
        return ok("outside", "nobody was found who holds slots outside hwbpd")
    return note("outside", "; ".join(map(str, holders)), "hwbpctl ls --foreign shows how each is known")


# --- the daemon's process --------------------------------------------------------------------------------------------


def _listener(path: Path) -> int:
    """Return who listens there; 0 for a process that our pid namespace does not have."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=3i"))
    pid, _, _ = struct.unpack("=3i", credentials)
    return int(pid)


def _limits(process: Path) -> dict[str, int | None]:
    """Return the soft limits of a process by name; None for no limit."""
    limits: dict[str, int | None] = {}
    for row in (process / "limits").read_text().splitlines()[1:]:
        name, soft, *_ = re.split(r"  +", row)
        limits[name] = None if soft == "unlimited" else int(soft)
    return limits


def _effective(process: Path) -> int:
    """Return the effective capabilities of a process, bit n for capability n."""
    lines = dict(row.partition(":")[::2] for row in (process / "status").read_text().splitlines())
    return int(lines["CapEff"], 16)


def _rings(able: hwbp.Capabilities, proc: Path, locked: int | None, capabilities: int) -> int | None:
    """
    Return how many rings of the usual size the daemon may have; None for as many as memory has room for.

    The kernel lets a user have perf_event_mlock_kb for each online CPU, and each process RLIMIT_MEMLOCK beyond that.
    """
    ring_bytes = able.limits.get("ring_bytes_default")
    if locked is None or capabilities & _CAP_IPC_LOCK or not ring_bytes:
        return None
    free_of_charge = int((proc / "sys/kernel/perf_event_mlock_kb").read_text()) * _KIB * len(able.cpus_online)
    return (free_of_charge + locked) // ring_bytes
