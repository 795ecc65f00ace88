"""Histories as files, and the kernel's tracepoints turned into them."""

from __future__ import annotations

import json
import random

import pytest

from hwbpd_kvm.registers import CORTEX_A15, CORTEX_A57, X86
from hwbpd_kvm.state import DebugOn, Enter, Exit, GuestRead, GuestWrite, Load, OsLock, Put
from hwbpd_kvm.traces import LAYOUTS, BadTrace, Trace, dump, from_tracepoints, parse
from hwbpd_kvm.workloads import WORKLOADS, random_history

HEADER = '{"format": "hwbpd-kvm-trace", "version": 1, "cpus": ["x86", "x86"]}'


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_written_is_read_back(layout: object) -> None:
    # Given histories with every kind of event,
    assert isinstance(layout, type(X86))
    chance = random.Random(1)
    events = [
        *random_history(layout, 50, chance), *WORKLOADS["vmm-debugs"](layout, 40, chance), OsLock(True),
        DebugOn(()),
    ]  # fmt: skip
    trace = Trace((layout, layout), tuple(events))

    # when one is written to a file and read again, then nothing has changed.
    assert parse(dump(trace)) == trace


def test_people_may_write_beside_it() -> None:
    lines = ["# a remark", "", HEADER, '{"event": "load", "cpu": 1, "time_ns": 5, "note": "here"}', '{"event":"enter"}']
    assert parse(lines) == Trace((X86, X86), (Load(1), Enter()))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: not an object"),
        ('{"event": "vmexit"}', '"event" is one of load, put'),
        ('{"event": "load"}', "load has the fields cpu: see cpu"),
        ('{"event": "enter", "cpu": 0}', "enter has the fields none: see cpu"),
        ('{"event": "load", "cpu": 2}', '"cpu" cannot be 2'),
        ('{"event": "load", "cpu": true}', '"cpu" cannot be True'),
        ('{"event": "guest_read", "register": "DR9"}', "\"register\" cannot be 'DR9'"),
        ('{"event": "guest_write", "register": "DR0", "value": -1}', '"value" cannot be -1'),
        ('{"event": "guest_write", "register": "DR0", "value": 18446744073709551616}', '"value" cannot be'),
        ('{"event": "host_arm", "cpu": 0, "slot": 4, "address": 0, "control": 2}', '"slot" cannot be 4'),
        ('{"event": "host_disarm", "cpu": 0, "slot": 0, "by": "me"}', "\"by\" cannot be 'me'"),
        ('{"event": "debug_on", "values": {"DR0": "x"}}', '"values" cannot be'),
        ('{"event": "os_lock", "locked": 1}', '"locked" cannot be 1'),
    ],
)
def test_a_line_that_is_not_understood_is_refused_with_its_number(line: str, sentence: str) -> None:
    with pytest.raises(BadTrace, match="line 2: ") as refusal:
        parse([HEADER, line])
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    "header",
    [
        "",
        '{"event": "enter"}',
        HEADER.replace("1", "2"),
        HEADER.replace('"x86", "x86"', ""),
        HEADER.replace('"x86", "x86"', '"z80"'),
        HEADER.replace('"x86", "x86"', '"x86", "cortex-a15"'),
        HEADER.replace('["x86", "x86"]', "[[]]"),
    ],
)
def test_a_file_without_a_header_that_is_known_is_refused(header: str) -> None:
    with pytest.raises(BadTrace):
        parse([header])


# --- tracepoints -----------------------------------------------------------------------------------------------------

# Lines in the form in which `perf script` prints them, by the format of the kernel's tracepoints.
ENTRY = " CPU 0/KVM 4242 [{cpu:03}] 100.5: kvm:kvm_entry: vcpu {vcpu}, rip 0xffff intr_info 0x0 error_code 0x0"
EXIT = " CPU 0/KVM 4242 [{cpu:03}] 100.6: kvm:kvm_exit: vcpu {vcpu} reason {reason} rip 0xff info1 {info1} info2 0x0"


def entry(cpu: int = 0, vcpu: int = 0) -> str:
    return ENTRY.format(cpu=cpu, vcpu=vcpu)


def left(reason: str, info1: int = 0, cpu: int = 0, vcpu: int = 0) -> str:
    return EXIT.format(cpu=cpu, vcpu=vcpu, reason=reason, info1=f"0x{info1:016x}")


def test_an_access_that_trapped_is_one_event_inside_an_interval() -> None:
    # Given a guest on Intel's that reads DR6 and writes DR7 before it halts, and another vCPU in between,
    lines = [
        "# a line of perf's own",
        left("HLT"),  # the trace begins in the middle
        entry(), left("DR_ACCESS", 1 << 4 | 6), entry(), left("DR_ACCESS", 7),
        entry(vcpu=1), left("DR_ACCESS", 0, vcpu=1),
        entry(), left("HLT"),
    ]  # fmt: skip

    # when the trace of vCPU 0 is taken, then it is one interval with two accesses.
    found = from_tracepoints(lines, X86)
    assert found == Trace((X86,), (Load(0), Enter(), GuestRead("DR6"), GuestWrite("DR7", 0), Exit()))


def test_amd_names_the_register_in_the_reason() -> None:
    lines = [entry(), left("write_dr3"), entry(), left("read_dr4"), entry(), left("interrupt")]
    accesses = (GuestWrite("DR3", 0), GuestRead("DR6"))  # DR4 is another name for DR6
    assert from_tracepoints(lines, X86).events == (Load(0), Enter(), *accesses, Exit())


def test_a_vcpu_that_moves_is_put_and_loaded() -> None:
    # Given one that moves between two intervals, and again while an access of its guest is emulated,
    lines = [entry(), left("HLT"), entry(cpu=2), left("DR_ACCESS", 0, cpu=2), entry(cpu=1)]

    # when its trace is taken, then it is put and loaded both times, and what runs at the end is taken out.
    found = from_tracepoints(lines, X86)
    assert len(found.cpus) == 3
    assert found.events == (
        Load(0), Enter(), Exit(), Put(),
        Load(2), Enter(), GuestWrite("DR0", 0), Exit(), Put(),
        Load(1), Enter(), Exit(),
    )  # fmt: skip


def test_arm64_tells_the_access_after_the_exit() -> None:
    # Given a guest that arms a breakpoint by trapped accesses, and then waits,
    ends = "[001] 5.1: kvm:kvm_exit: TRAP: HSR_EC: 0x0018 (SYS64), PC: 0xffff"
    lines = [
        "vcpu [001] 5.0: kvm:kvm_entry: PC: 0xffff", ends,
        "vcpu [001] 5.2: kvm:trap_reg: trap_bvr write to reg 2 (0x0000000000008000)",
        "vcpu [001] 5.3: kvm:kvm_entry: PC: 0xffff", ends,
        "vcpu [001] 5.4: kvm:trap_reg: trap_bcr read from reg 2 (0x00000000000001e5)",
        "vcpu [001] 5.5: kvm:kvm_entry: PC: 0xffff", ends,
        "vcpu [001] 5.6: kvm:kvm_entry: PC: 0xffff", ends,
    ]  # fmt: skip

    # when its trace is taken, then the accesses lie in one interval, with what was written.
    found = from_tracepoints(lines, CORTEX_A57)
    assert found.events == (
        Load(1), Enter(), GuestWrite("DBGBVR2_EL1", 0x8000), GuestRead("DBGBCR2_EL1"), Exit(), Enter(), Exit(),
    )  # fmt: skip


def test_a_file_without_the_vcpu_is_refused() -> None:
    with pytest.raises(BadTrace, match="no kvm_entry of vcpu 3"):
        from_tracepoints([entry(), left("HLT")], X86, vcpu=3)


def test_a_line_is_json() -> None:
    trace = Trace((CORTEX_A15,), (Load(0), Enter(), Exit()))
    assert [json.loads(line)["event"] for line in list(dump(trace))[1:]] == ["load", "enter", "exit"]
