"""What Linux accepts: one rule at a time, beside what the backend recommends, and against the running kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.errors import HwbpError
from hwbpd.core.model import Access, Mode, Span
from hwbpd.hookspecs import CpuFacts
from hwbpd_x86.dr7 import SLOTS
from hwbpd_x86.fit import X86Backend
from hwbpd_x86.linux import EXECUTE, READ_WRITE, WRITE, Kernel, Request, kernel_of, open_errno, parse_errno
from hwbpd_x86.profiles import PROFILES
from tests.host import HostBusy, exclusive

WIDE, MASKED, NARROW = Kernel(), Kernel(has_masks=True), kernel_of(CpuFacts("i686"))


@pytest.mark.parametrize(
    ("kernel", "request_", "expected"),
    [
        (WIDE, Request(WRITE, 0x5000, 8), 0),
        (NARROW, Request(WRITE, 0x5000, 8), errno.EOPNOTSUPP),
        (NARROW, Request(WRITE, 0x5000, 4), 0),
        (WIDE, Request(EXECUTE, 0x5001, 8), 0),
        (WIDE, Request(EXECUTE, 0x5001, 4), errno.EINVAL),
        (WIDE, Request(EXECUTE, 0x5001, 1), errno.EINVAL),
        (NARROW, Request(EXECUTE, 0x5001, 4), 0),
        (WIDE, Request(1, 0x5000, 4), errno.EINVAL),
        (WIDE, Request(EXECUTE | WRITE, 0x5000, 8), errno.EINVAL),
        (WIDE, Request(READ_WRITE, 0x5002, 4), errno.EINVAL),
        (WIDE, Request(READ_WRITE, 0x5000, 0), errno.EINVAL),
        (WIDE, Request(READ_WRITE, 0x5000, 3), errno.EINVAL),
        (WIDE, Request(READ_WRITE, 0x5000, 16), errno.EOPNOTSUPP),
        (WIDE, Request(READ_WRITE, 0x5008, 16), errno.EINVAL),
        (MASKED, Request(READ_WRITE, 0x5000, 16), 0),
        (MASKED, Request(READ_WRITE, 0, 2**33), 0),
        (MASKED, Request(EXECUTE, 0x5000, 16), errno.EINVAL),
        (WIDE, Request(WRITE, 2**47 - 4096, 1), errno.EINVAL),
        (WIDE, Request(WRITE, 2**47 - 4096, 1, exclude_kernel=False), 0),
        (WIDE, Request(WRITE, 2**64 - 8, 8, exclude_kernel=False), 0),
        (WIDE, Request(EXECUTE, 2**64 - 7, 8, exclude_kernel=False), errno.EINVAL),
        (WIDE, Request(EXECUTE, 2**47 - 4097, 8), 0),
        (WIDE, Request(EXECUTE, 2**47 - 4096, 8), errno.EINVAL),
    ],
)
def test_each_rule_has_its_errno(kernel: Kernel, request_: Request, expected: int) -> None:
    assert open_errno(kernel, request_) == expected


def test_a_request_that_can_never_fit_says_no_room_while_there_is_none() -> None:
    assert open_errno(WIDE, Request(WRITE, 0x5001, 3), free_slots=0) == errno.ENOSPC
    assert open_errno(WIDE, Request(0, 0x5000, 1), free_slots=0) == errno.EINVAL
    assert open_errno(WIDE, Request(7, 0x5000, 1), free_slots=0) == errno.EINVAL


def test_a_kernel_address_without_admin_rights_is_not_permitted() -> None:
    in_kernel = Request(WRITE, 2**63, 8, exclude_kernel=False)
    assert open_errno(WIDE, in_kernel, is_admin=False) == errno.EPERM
    assert open_errno(WIDE, Request(WRITE, 2**63, 8), is_admin=False) == errno.EINVAL
    assert open_errno(WIDE, Request(WRITE, 0x5000, 8, exclude_kernel=False), is_admin=False) == 0


edges = st.sampled_from([2**n + d for n in (12, 31, 32, 47, 56, 63) for d in range(-9, 10)])
requests = st.tuples(
    st.one_of(st.integers(0, 2**64 - 2**32), edges),
    st.one_of(st.integers(1, 70), st.sampled_from([2**n for n in range(33)])),
    st.sampled_from([Access.WRITE, Access.READ | Access.WRITE, Access.EXECUTE]),
    st.booleans(),
)


@given(st.sampled_from(sorted(PROFILES)), requests)
def test_linux_takes_every_piece_that_the_backend_plans(
    profile: str, request_: tuple[int, int, Access, bool]
) -> None:
    facts = PROFILES[profile]
    address, length, access, kernel = request_
    try:
        plan = X86Backend(facts).fit(Span(address, length), access, Mode(kernel=kernel))
    except HwbpError:
        return
    for piece in plan.pieces:
        piece_request = Request(piece.access.value, piece.span.address, piece.span.length_bytes, not kernel)
        assert parse_errno(kernel_of(facts), piece_request) == 0, piece


# --- the running kernel ----------------------------------------------------------------------------------------------

LENGTHS = (*range(18), 24, 32, 63, 64, 4096, 1 << 32, 1 << 33)
OFFSETS = (0, 1, 2, 4, 7, 8, 12, 4088, 4095)
USER_BASES = (0, 0x404000, 0x7FFF_FFFF_E000)
# Where Linux keeps nothing of its own: the first page that is not user space, holes, and the last page of all.
KERNEL_BASES = (0x7FFF_FFFF_F000, 1 << 47, 1 << 63, 0xFFFF_8000_0000_0000, 2**64 - 4096)

_libc = ctypes.CDLL(None, use_errno=True)
_PERF_EVENT_OPEN, _CAPGET, _CAPSET = 298, 125, 126  # x86_64
_ATTR = struct.Struct("=IIQQQQQIIQQ")  # struct perf_event_attr up to bp_len
_PERF_TYPE_BREAKPOINT, _DISABLED, _EXCLUDE_KERNEL = 5, 1 << 0, 1 << 5
_CAP_SYS_ADMIN = 21

live = pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs an x86_64 kernel")


def opened(request_: Request) -> int:
    """Open such an event on this thread; return its descriptor, or the negative errno."""
    flags = _DISABLED | (_EXCLUDE_KERNEL if request_.exclude_kernel else 0)
    bp = request_.bp_type, request_.bp_addr, request_.bp_len
    attr = _ATTR.pack(_PERF_TYPE_BREAKPOINT, _ATTR.size, 0, 0, 0, 0, flags, 0, *bp)
    this_thread, any_cpu, no_group, no_flags = (ctypes.c_long(n) for n in (0, -1, -1, 0))
    fd: int = _libc.syscall(_PERF_EVENT_OPEN, attr, this_thread, any_cpu, no_group, no_flags)
    return fd if fd >= 0 else -ctypes.get_errno()


def kernels_answer(request_: Request) -> int:
    fd = opened(request_)
    if fd < 0:
        return -fd
    os.close(fd)
    return 0


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """The running kernel, with all its slots."""
    with ExitStack() as held:
        try:
            held.enter_context(exclusive())
        except HostBusy as busy:
            pytest.skip(f"breakpoints of this host are in use: {busy}")
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        yield kernel_of(CpuFacts(os.uname().machine, frozenset(flags.partition(":")[2].split())))


@pytest.mark.hardware
@live
@pytest.mark.parametrize("base", USER_BASES + KERNEL_BASES, ids=hex)
def test_the_running_kernel_gives_the_same_errno(kernel: Kernel, base: int) -> None:
    answers = set()
    for offset, length, bp_type, exclude in product(OFFSETS, LENGTHS, range(10), (True, False)):
        request_ = Request(bp_type, base + offset, length, exclude)
        ours, theirs = open_errno(kernel, request_), kernels_answer(request_)
        depends_on_kprobes = bp_type == EXECUTE and not exclude and base in KERNEL_BASES
        assert ours == theirs or (depends_on_kprobes and theirs == errno.EINVAL), f"{request_}: {ours}, not {theirs}"
        answers.add(theirs)
    assert {0, errno.EINVAL} <= answers


@pytest.mark.hardware
@live
def test_the_running_kernel_looks_for_room_before_it_looks_at_the_request(kernel: Kernel) -> None:
    held = [opened(Request(WRITE, 0x404000, 1)) for _ in range(SLOTS)]
    try:
        assert min(held) >= 0
        for base, length, bp_type, exclude in product(USER_BASES + KERNEL_BASES, range(18), range(10), (True, False)):
            request_ = Request(bp_type, base, length, exclude)
            assert kernels_answer(request_) == open_errno(kernel, request_, free_slots=0), request_
    finally:
        for fd in held:
            os.close(fd)


@pytest.mark.hardware
@live
def test_the_running_kernel_keeps_its_addresses_from_those_without_admin_rights(kernel: Kernel) -> None:
    differ: list[object] = []
    asked = 0

    def ask_without_rights() -> None:
        nonlocal asked
        try:
            _drop_admin()
        except OSError as failed:
            differ.append(failed)
            return
        for base, offset, length, exclude in product(USER_BASES + KERNEL_BASES, (0, 4), (1, 4, 8, 3), (True, False)):
            request_ = Request(WRITE, base + offset, length, exclude)
            ours, theirs = open_errno(kernel, request_, is_admin=False), kernels_answer(request_)
            asked += theirs == errno.EPERM
            if ours != theirs:
                differ.append((request_, ours, theirs))

    thread = threading.Thread(target=ask_without_rights)  # capabilities are a thread's own, and end with it
    thread.start()
    thread.join()
    assert differ == []
    assert asked > 0, "the kernel has refused something for want of rights"


def _drop_admin() -> None:
    """Take CAP_SYS_ADMIN, and nothing else, from this thread."""
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    data = ctypes.create_string_buffer(24)
    if _libc.syscall(_CAPGET, header, data):
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("=6I", data.raw))
    words[0] &= ~(1 << _CAP_SYS_ADMIN)  # effective
    if _libc.syscall(_CAPSET, header, struct.pack("=6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")
