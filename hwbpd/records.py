"""
Hit records that cannot go out as they are. Layout: docs/protocol.md, "Hit records".

Most hits go through the daemon unread; only those of filtered claims, of owners without privileges, and those that are
too many for one message come here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_HEAD = struct.Struct("=IHHQI")  # kind, mode, size, instruction pointer, process
_IP_OFFSET = 8
_MODE_KERNEL, _MODE_MASK = 1, 7
_NO_IP = bytes(8)


def _each(records: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Offset, mode, size and process of each record."""
    offset = 0
    while offset < len(records):
        _, mode, size, _, pid = _HEAD.unpack_from(records, offset)
        yield offset, mode & _MODE_MASK, size, pid
        offset += size


def of_process(records: bytes, pid: int) -> tuple[bytes, int]:
    """Return the records of hits in that process, and how many they are."""
    kept = [records[offset : offset + size] for offset, _, size, of in _each(records) if of == pid]
    return b"".join(kept), len(kept)


def without_kernel_addresses(records: bytes) -> bytes:
    """Return the records with the instruction pointer of hits in the kernel set to 0: where it runs is a secret."""
    hidden = bytearray(records)
    for offset, mode, _, _ in _each(records):
        if mode == _MODE_KERNEL:
            hidden[offset + _IP_OFFSET : offset + _IP_OFFSET + 8] = _NO_IP
    return bytes(hidden)


def parts(records: bytes, count: int, bytes_most: int) -> Iterator[tuple[bytes, int]]:
    """Yield the records in pieces of whole ones, each with how many they are; a longer piece is a single record."""
    if len(records) <= bytes_most:
        yield records, count
        return
    start = in_part = 0
    for offset, _, size, _ in _each(records):
        if in_part and offset + size - start > bytes_most:
            yield records[start:offset], in_part
            start, in_part = offset, 0
        in_part += 1
    yield records[start:], in_part
