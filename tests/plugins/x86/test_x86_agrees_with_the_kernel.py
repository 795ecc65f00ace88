"""
The backend's yes or no is the running kernel's own, over many requests: nothing, EINVAL or EOPNOTSUPP.

What the backend cuts into pieces the kernel does not take as one, and takes in those pieces.

The kernel reserves a slot before it looks at a request, and says ENOSPC when there is none. So each request is opened
on the test itself, disabled, and closed at once, while the test holds the host's breakpoints.

Kernel addresses are taken where Linux has nothing of its own: it refuses slots on its entry code and bookkeeping, which
a backend cannot know (see ``KERNEL_NOTES`` in fit.py). For execution breakpoints in the kernel that depends on kprobes,
so there we ask only that the backend refuses nothing that the kernel takes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest

from hwbpd.core.errors import HwbpError
from hwbpd.core.model import Access, Mode, Span
from hwbpd.hookspecs import CpuFacts
from hwbpd_x86.fit import X86Backend
from tests.host import HostBusy, exclusive
from tests.plugins.x86.requests import nearest_of, refusal_of

pytestmark = [
    pytest.mark.hardware,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs an x86_64 kernel: the backend is for DR0-DR3"),
]

LENGTHS = (*range(10), 12, 15, 16, 17, 24, 32, 63, 64, 128, 4096, 1 << 20, 1 << 31, 1 << 32)
ACCESSES = [Access(bits) for bits in range(8)]
NO_TYPE = (Access(0), *(access for access in ACCESSES if Access.EXECUTE in access and access != Access.EXECUTE))
WORD_BYTES = 8
OFFSETS = (*range(8), 12, 4088, 4095)

USER_BASES = (0, 0x404000, 0x7FFF_FFFF_E000)
# The first page that is not user space, and the holes above it: not canonical; the guard hole of the direct map; the
# last page of all.
KERNEL_BASES = (0x7FFF_FFFF_F000, 1 << 47, 1 << 63, 0xFFFF_8000_0000_0000, 2**64 - 4096)


@pytest.fixture(scope="module", autouse=True)
def _alone_with_the_registers() -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(exclusive())
        except HostBusy as busy:
            pytest.skip(str(busy))
        yield


@pytest.fixture(scope="module")
def backend() -> X86Backend:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return X86Backend(CpuFacts(os.uname().machine, frozenset(flags.partition(":")[2].split())))


_libc = ctypes.CDLL(None, use_errno=True)
_PERF_EVENT_OPEN = 298  # x86_64
_ATTR = struct.Struct("=IIQQQQQIIQQ")  # struct perf_event_attr up to bp_len
_PERF_TYPE_BREAKPOINT = 5
_DISABLED, _EXCLUDE_USER, _EXCLUDE_KERNEL = 1 << 0, 1 << 4, 1 << 5


def kernels_answer(span: Span, access: Access, mode: Mode) -> int:
    """Return 0 if the kernel takes this request, and the errno with which it does not."""
    flags = _DISABLED | (0 if mode.user else _EXCLUDE_USER) | (0 if mode.kernel else _EXCLUDE_KERNEL)
    bp = access.value, span.address, span.length_bytes
    attr = _ATTR.pack(_PERF_TYPE_BREAKPOINT, _ATTR.size, 0, 0, 0, 0, flags, 0, *bp)
    this_thread, any_cpu, no_group, no_flags = (ctypes.c_long(n) for n in (0, -1, -1, 0))
    fd = _libc.syscall(_PERF_EVENT_OPEN, attr, this_thread, any_cpu, no_group, no_flags)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def agree(backend: X86Backend, span: Span, access: Access, mode: Mode, *, theirs: int | None = None) -> bool:
    """
    Whether both say yes, both say no, or the one says how what the other refuses can be had.

    :param theirs: the kernel's answer, where it has been asked already.
    """
    if theirs is None:
        theirs = kernels_answer(span, access, mode)
    try:
        pieces = [piece.span for piece in backend.fit(span, access, mode).pieces]
    except HwbpError as refusal:
        # What is too long for all slots together is not told apart by errno from what is too long for one.
        return theirs == refusal.errno or (theirs != 0 and span.length_bytes > WORD_BYTES)
    if pieces == [span]:
        return theirs == 0
    return theirs != 0 and all(kernels_answer(piece, access, mode) == 0 for piece in pieces)


@pytest.mark.parametrize("base", USER_BASES + KERNEL_BASES, ids=hex)
def test_the_backend_and_the_kernel_give_the_same_answer(backend: X86Backend, base: int) -> None:
    answers = set()
    for offset, length, access, kernel in product(OFFSETS, LENGTHS, ACCESSES, (True, False)):
        if offset and access in NO_TYPE:
            continue  # both refuse these before they look at the address
        request = Span(base + offset, length), access, Mode(kernel=kernel)
        theirs = kernels_answer(*request)
        depends_on_kprobes = access == Access.EXECUTE and kernel and base in KERNEL_BASES
        agreed = agree(backend, *request, theirs=theirs) or (depends_on_kprobes and theirs == errno.EINVAL)
        assert agreed, f"{request}: backend {refusal_of(backend, request) or 'yes'}, kernel {_name(theirs)}"
        answers.add(theirs)

    # The kernel took some requests and not others, so agreeing meant something; none failed for another reason.
    assert {0, errno.EINVAL} <= answers <= {0, errno.EINVAL, errno.EOPNOTSUPP}


def test_whether_a_slot_sees_user_mode_does_not_matter_to_either(backend: X86Backend) -> None:
    for address, kernel in product((0x404000, 1 << 47), (True, False)):
        request = Span(address, 4), Access.WRITE, Mode(user=False, kernel=kernel)
        assert agree(backend, *request), request


def test_what_a_refusal_recommends_the_kernel_takes(backend: X86Backend) -> None:
    for base, offset, length, access in product(USER_BASES, range(8), range(20), ACCESSES):
        refusal = refusal_of(backend, (Span(base + offset, length), access, Mode(kernel=False)))
        if refusal is not None:
            nearest, _ = nearest_of(refusal)
            assert refusal_of(backend, nearest) is None, f"{refusal}"
            assert agree(backend, *nearest), f"{refusal}"


def _name(number: int) -> str:
    return errno.errorcode[number] if number else "yes"
