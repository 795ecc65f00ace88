"""
Hit records -> ``Hit``, one at a time, so that a message of many megabytes costs no more memory than itself.

The layout is that of docs/protocol.md, "Hit records": what Linux writes for ``IP | TID | TIME | ADDR | CPU``, with the
call chain behind it where one was asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from hwbp.errors import BadMessage

RECORD_BYTES = 48  # without a call chain

# type, where the CPU was, size; ip; pid, tid; time; address; cpu, 0. In the machine's byte order, without padding.
_RECORD = struct.Struct("=IHHQIIQQII")
_ENTRY = struct.Struct("=Q")
_SAMPLE = 9  # PERF_RECORD_SAMPLE
_CPU_MODE = 0b111
_IN_KERNEL = 1

_CONTEXTS = 2**64 - 4096  # chain entries from here on say where the entries after them belong
_CONTEXT_KERNEL = 2**64 - 128
_CONTEXT_USER = 2**64 - 512


class Hit(NamedTuple):
    """One access that a slot reported."""

    ip: int  # on x86 the instruction after the access for data, the instruction itself for x
    address: int  # what the slot holds; which byte of the span was touched is not known
    pid: int
    tid: int
    time_ns: int  # CLOCK_MONOTONIC
    cpu: int
    in_kernel: bool
    kernel_chain: tuple[int, ...] = ()  # innermost first
    user_chain: tuple[int, ...] = ()

    @property
    def chain(self) -> tuple[int, ...]:
        """The whole call chain, innermost first: what ran in the kernel, then what ran in user mode."""
        return self.kernel_chain + self.user_chain


def hits_of(records: bytes, count: int) -> Iterator[Hit]:
    """
    Yield the hits of one message.

    :param records: ``count`` records back to back.
    :raises BadMessage: when the bytes are not that many records; hits before the fault have been yielded.
    """
    # No record is shorter than 48 bytes, so this length means that none has a call chain.
    if len(records) == count * RECORD_BYTES:
        for kind, misc, _, ip, pid, tid, time_ns, address, cpu, _ in _RECORD.iter_unpack(records):
            if kind != _SAMPLE:
                raise BadMessage(f"a hit record is of type {kind}, not {_SAMPLE}")
            yield Hit(ip, address, pid, tid, time_ns, cpu, misc & _CPU_MODE == _IN_KERNEL)
        return
    offset = 0
    for _ in range(count):
        size = _record_size(records, offset)
        _, misc, _, ip, pid, tid, time_ns, address, cpu, _ = _RECORD.unpack_from(records, offset)
        in_kernel = misc & _CPU_MODE == _IN_KERNEL
        kernel_chain, user_chain = _chains(records, offset, size, in_kernel)
        yield Hit(ip, address, pid, tid, time_ns, cpu, in_kernel, kernel_chain, user_chain)
        offset += size
    if offset != len(records):
        raise BadMessage(f"{count} hit records end at byte {offset} of {len(records)}")


def _record_size(records: bytes, offset: int) -> int:
    if offset + RECORD_BYTES > len(records):
        raise BadMessage(f"the hit records end inside the one at byte {offset}")
    kind, _, size = _RECORD.unpack_from(records, offset)[:3]
    if kind != _SAMPLE or size < RECORD_BYTES or offset + size > len(records):
        raise BadMessage(f"the hit record at byte {offset} says type {kind} and {size} bytes")
    return int(size)


def _chains(records: bytes, offset: int, size: int, in_kernel: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the kernel's and the user's part of the call chain of one record."""
    if size == RECORD_BYTES:
        return (), ()
    entries = [entry for (entry,) in _ENTRY.iter_unpack(records[offset + RECORD_BYTES : offset + size])]
    if entries[0] != len(entries) - 1:
        raise BadMessage(f"the call chain at byte {offset} has {len(entries) - 1} entries and says {entries[0]}")
    kernel: list[int] = []
    user: list[int] = []
    elsewhere: list[int] = []  # contexts we have no name for, such as a guest's
    part = kernel if in_kernel else user
    for entry in entries[1:]:
        if entry >= _CONTEXTS:
            part = {_CONTEXT_KERNEL: kernel, _CONTEXT_USER: user}.get(entry, elsewhere)
        else:
            part.append(entry)
    return tuple(kernel), tuple(user)
