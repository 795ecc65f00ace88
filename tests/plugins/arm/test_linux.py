"""What Linux takes on Arm, as measured on arm64 and 32-bit kernels and as their sources have it."""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOSPC, EPERM
from itertools import product

import pytest
from msgspec.structs import replace

from hwbpd.core.model import Span
from hwbpd.hookspecs import CpuFacts
from hwbpd_arm.fit import Arm64Backend
from hwbpd_arm.identification import DebugVersion
from hwbpd_arm.linux import (
    EXECUTE,
    READ,
    READ_WRITE,
    WRITE,
    Kernel,
    Request,
    Usable,
    contents,
    open_errno,
    parse_errno,
    usable_v7,
    usable_v8,
)
from hwbpd_arm.wcr import decode, watched

ARM64 = Kernel()
V7 = Kernel(arm64=False, version=DebugVersion.V7_1, user_top=0xBF00_0000)
V7_NARROW = replace(V7, version=DebugVersion.V7, lanes=4)
AARCH32 = replace(V7, version=DebugVersion.V8)
BASE = 0x1_0000
KERNEL_64, KERNEL_32 = 0xFFFF_8000_0000_0000, 0xC000_0000


def data(offset: int, length: int, bp_type: int = READ_WRITE) -> Request:
    return Request(bp_type, BASE + offset, length)


def test_empty_and_invalid_types_are_refused_before_room_is_looked_for() -> None:
    for kernel, bp_type in product((ARM64, V7), (0, 7)):
        assert open_errno(kernel, data(0, 4, bp_type), free_slots=0) == EINVAL


def test_a_malformed_request_on_a_full_machine_says_no_room() -> None:
    for kernel in (ARM64, V7):
        assert open_errno(kernel, data(0, 16), free_slots=0) == ENOSPC
        assert open_errno(kernel, data(0, 16), free_slots=1) == EINVAL


@pytest.mark.parametrize("bp_type", [5, 6, 8, 12])
def test_mixed_types_are_refused(bp_type: int) -> None:
    for kernel in (ARM64, V7):
        assert parse_errno(kernel, data(0, 4, bp_type)) == EINVAL


def test_arm64_takes_every_length_of_data_up_to_a_doubleword() -> None:
    for length in range(20):
        assert parse_errno(ARM64, data(0, length)) == (0 if 1 <= length <= 8 else EINVAL)


def test_arm64_takes_any_execution_length_for_four() -> None:
    for length in range(12):
        request = data(0, length, EXECUTE)
        assert parse_errno(ARM64, request) == (0 if 1 <= length <= 8 else EINVAL)
        if 1 <= length <= 8:
            assert contents(ARM64, request).control >> 5 == 0xF


def test_arm64_loses_the_bytes_beyond_a_doubleword() -> None:
    for offset, length in product(range(8), range(1, 9)):
        assert parse_errno(ARM64, data(offset, length)) == 0
        held = contents(ARM64, data(offset, length))
        assert watched(decode(held.control), held.address) == Span(BASE + offset, min(length, 8 - offset))


STRICT = {(0, 1), (0, 2), (0, 4), (0, 8), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)} | {
    (4, 1), (4, 2), (4, 4), (5, 1), (5, 2), (6, 1), (6, 2), (7, 1)
}  # fmt: skip


def test_armv7_and_aarch32_tasks_want_data_within_a_word_or_an_aligned_doubleword() -> None:
    taken_v7 = {pair for pair in product(range(8), range(1, 9)) if parse_errno(V7, data(*pair)) == 0}
    # A 64-bit kernel has lengths besides, if they begin a word.
    more = {(offset, length) for offset in (0, 4) for length in (3, 5, 6, 7)}
    compat = {
        pair
        for pair in product(range(8), range(1, 9))
        if parse_errno(ARM64, replace(data(*pair), compat=True)) == 0
    }
    assert taken_v7 == STRICT
    assert compat == STRICT | more

    # In the words of ``hwbpctl caps``:
    said = "AArch32 tasks Linux takes 8 bytes at a multiple of 8, 1 to 7 at one of 4, else 1 or 2 of a word"
    assert any(said in note for note in Arm64Backend(CpuFacts("aarch64")).describe()["notes"])
    assert compat == {
        (offset, length)
        for offset, length in product(range(8), range(1, 9))
        if (length == 8 and offset == 0)
        or (length < 8 and offset % 4 == 0)
        or (length <= 2 and offset % 4 + length <= 4)
    }


def test_a_length_of_eight_needs_eight_lanes() -> None:
    assert parse_errno(V7_NARROW, data(0, 8)) == EINVAL
    assert parse_errno(V7_NARROW, data(0, 4)) == 0


@pytest.mark.parametrize(("kernel", "compat"), [(V7, False), (ARM64, True)], ids=["armv7", "compat"])
def test_an_aarch32_instruction_has_two_or_four_bytes(kernel: Kernel, compat: bool) -> None:
    taken = {
        (offset, length)
        for offset, length in product(range(4), range(1, 9))
        if parse_errno(kernel, replace(data(offset, length, EXECUTE), compat=compat)) == 0
    }
    assert taken == {(0, 2), (0, 4), (1, 2), (2, 2)}


def test_perf_on_armv7_needs_what_it_steps_with() -> None:
    for request in (data(0, 4), data(0, 4, EXECUTE)):
        assert parse_errno(V7, request) == 0
        assert parse_errno(V7, replace(request, of_task=False)) == EINVAL
        assert parse_errno(replace(V7, has_mismatch=False), request) == EINVAL
        for_kernel = replace(request, bp_addr=KERNEL_32, exclude_kernel=False)
        assert parse_errno(V7, for_kernel) == EPERM


def test_reads_or_writes_alone_are_for_ptrace_before_armv8() -> None:
    for bp_type in (READ, WRITE):
        assert parse_errno(V7, data(0, 4, bp_type)) == EINVAL
        assert parse_errno(AARCH32, data(0, 4, bp_type)) == 0
        assert parse_errno(V7, replace(data(0, 4, bp_type), own_handler=True)) == 0
        assert parse_errno(ARM64, data(0, 4, bp_type)) == 0


def test_without_monitor_debug_mode_there_is_no_device() -> None:
    assert parse_errno(replace(V7, monitor=False), data(0, 16)) == ENODEV
    assert open_errno(replace(V7, monitor=False), data(0, 4), free_slots=0) == ENOSPC


def test_arm64_takes_kernel_addresses_cpu_wide_only() -> None:
    request = Request(READ_WRITE, KERNEL_64, 8, exclude_kernel=False)
    assert parse_errno(ARM64, request) == EINVAL
    assert parse_errno(ARM64, replace(request, of_task=False)) == 0
    assert parse_errno(ARM64, replace(request, of_task=False), is_admin=False) == EPERM
    assert parse_errno(ARM64, replace(request, of_task=False, exclude_kernel=True)) == EINVAL


@pytest.mark.parametrize(
    ("kernel", "request_", "privilege"),
    [
        (ARM64, Request(READ_WRITE, BASE, 4), 2),
        (ARM64, Request(READ_WRITE, KERNEL_64, 4, of_task=False), 1),
        (V7, Request(READ_WRITE, BASE, 4), 2),
        (V7, Request(READ_WRITE, KERNEL_32, 4, own_handler=True), 3),
    ],
)
def test_the_address_says_for_whom_a_slot_is(kernel: Kernel, request_: Request, privilege: int) -> None:
    assert contents(kernel, request_).control >> 1 & 3 == privilege


@pytest.mark.parametrize(
    ("brps", "wrps", "version", "usable"),
    [
        (6, 4, DebugVersion.V7_1, Usable(5, 4)),
        (6, 4, DebugVersion.V7, Usable(5, 1)),
        (3, 2, DebugVersion.V7, Usable(2, 1)),
        (6, 2, DebugVersion.V6, Usable(6, 1)),
        (6, 4, DebugVersion.V8, Usable(5, 4)),
        (1, 1, DebugVersion.V7, Usable(1, 1)),
        (6, 4, DebugVersion.V7_MEMORY_MAPPED, Usable(0, 0)),
    ],
)
def test_a_32_bit_kernel_keeps_a_breakpoint_and_before_v7_1_all_watchpoints_but_one(
    brps: int, wrps: int, version: DebugVersion, usable: Usable
) -> None:
    assert usable_v7(brps, wrps, version) == usable


def test_arm64_keeps_nothing() -> None:
    assert usable_v8(6, 4) == Usable(6, 4)
    assert usable_v8(64, 64) == Usable(16, 16)
