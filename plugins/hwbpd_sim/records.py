"""
A hit as the bytes that Linux writes for one: docs/protocol.md, "Hit records".

48 bytes, and with a call chain the number of its entries and the entries behind them. Where the CPU was in user mode
there is nothing of the kernel to tell, so the chain then has no kernel part.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from hwbpd.core.model import Access, Mode, Piece, Task

RECORD: Final = struct.Struct("=IHHQIIQQII")  # type, mode, size, ip, pid, tid, time, address, cpu, reserved
_SAMPLE: Final = 9  # PERF_RECORD_SAMPLE
_IN_KERNEL, _IN_USER = 1, 2  # PERF_RECORD_MISC_KERNEL, _USER
_CONTEXT_KERNEL, _CONTEXT_USER = 2**64 - 128, 2**64 - 512  # PERF_CONTEXT_KERNEL, _USER: what follows is of that mode


class Step(NamedTuple):
    """One instruction of a task, and the one thing that it touches."""

    access: Access  # READ, WRITE or both of the span; EXECUTE of the instruction, whose first byte is ``address``
    address: int
    length_bytes: int
    ip: int  # the instruction
    next_ip: int  # the one after it
    in_kernel: bool = False
    callers: tuple[int, ...] = ()  # return addresses in user space, the innermost first
    kernel_callers: tuple[int, ...] = ()  # the same in the kernel


def pack(piece: Piece, mode: Mode, step: Step, task: Task, cpu: int, now_ns: int, after: bool) -> bytes:
    """
    Return the record of a hit.

    :param after: whether this architecture reports such an access after it was made, with the next instruction.
    """
    ip = step.next_ip if after else step.ip
    pid = task.process.pid if task.process is not None else task.tid
    chain = b""
    if mode.user_chain or mode.kernel_chain:
        entries = _chain(mode, step, ip)
        chain = struct.pack(f"={1 + len(entries)}Q", len(entries), *entries)
    where = _IN_KERNEL if step.in_kernel else _IN_USER
    size = RECORD.size + len(chain)
    return RECORD.pack(_SAMPLE, where, size, ip, pid, task.tid, now_ns, piece.span.address, cpu, 0) + chain


def _chain(mode: Mode, step: Step, ip: int) -> list[int]:
    entries: list[int] = []
    if mode.kernel_chain and step.in_kernel:
        entries += (_CONTEXT_KERNEL, ip, *step.kernel_callers)
    if mode.user_chain:
        entries += (_CONTEXT_USER, *(() if step.in_kernel else (ip,)), *step.callers)
    return entries
