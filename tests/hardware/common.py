"""What tests on real registers say often: a piece, a mode, a record read back."""

from __future__ import annotations

import mmap
import os
import struct
from typing import NamedTuple

from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Span
from hwbpd.hookspecs import Batch
from hwbpd_linux.machine import LinuxMachine

X86 = os.uname().machine == "x86_64"
RING_BYTES = 64 * mmap.PAGESIZE
EXECUTE_BYTES = 8 if X86 else 4
WATCHPOINT_POOL = Pool.ANY if X86 else Pool.DATA

HITS = Mode(ring_bytes=RING_BYTES)
COUNT = Mode(delivery=Delivery.COUNT)
HOLD = Mode(delivery=Delivery.HOLD)

KERNEL_CONTEXT, USER_CONTEXT = 2**64 - 128, 2**64 - 512


class Hit(NamedTuple):
    """One record, read by what docs/protocol.md says about it."""

    where: int  # 1 kernel, 2 user
    ip: int
    pid: int
    tid: int
    time_ns: int
    address: int
    cpu: int
    chain: tuple[int, ...] | None


def decode(batch: Batch) -> list[Hit]:
    """Return the hits of a batch, and see that it holds as many as it says."""
    hits = []
    records, at = batch.records, 0
    while at < len(records):
        record_type, misc, size, ip, pid, tid, time_ns, address, cpu, zero = struct.unpack_from(
            "=IHHQIIQQII", records, at
        )
        assert (record_type, zero) == (9, 0)
        chain = None
        if size > 48:
            (entries,) = struct.unpack_from("=Q", records, at + 48)
            chain = struct.unpack_from(f"={entries}Q", records, at + 56)
            assert size == 56 + 8 * entries
        hits.append(Hit(misc & 7, ip, pid, tid, time_ns, address, cpu, chain))
        at += size
    assert len(hits) == batch.hits
    return hits


def piece(address: int, letters: str) -> Piece:
    """What one slot holds, eight bytes of data or one instruction."""
    access = Access.from_letters(letters)
    execute = Access.EXECUTE in access
    pool = Pool.INST if execute and not X86 else WATCHPOINT_POOL
    return Piece(Span(address, EXECUTE_BYTES if execute else 8), access, pool)


def drain_all(machine: LinuxMachine, resource_id: int) -> Batch:
    """Drain until nothing is left, in bites smaller than a ring."""
    batches = [machine.drain(resource_id, 4096)]
    while batches[-1].more:
        batches.append(machine.drain(resource_id, 4096))
    return Batch(
        b"".join(batch.records for batch in batches),
        sum(batch.hits for batch in batches),
        sum(batch.lost for batch in batches),
        False,
    )
