"""
Which registers a switch has to move, and how many there are.
"""

from __future__ import annotations

import pytest

from hwbpd_kvm.registers import CORTEX_A15, CORTEX_A57, X86, arm64, arm_v7, least, most, x86


def test_a_cortex_a15_has_the_20_registers_that_its_switch_was_measured_with() -> None:
    assert len(CORTEX_A15.slot_registers) == 2 * 6 + 2 * 4
    assert set(CORTEX_A15.registers) - set(CORTEX_A15.slot_registers) == {"DBGDSCRext"}


def test_a_cortex_a57_has_22_registers_only() -> None:
    assert len(CORTEX_A57.registers) == 22
    assert set(CORTEX_A57.registers) - set(CORTEX_A57.slot_registers) == {"MDSCR_EL1", "MDCCINT_EL1"}


def test_x86_has_six_and_switches_one_of_them_by_itself() -> None:
    assert set(X86.registers) == {"DR0", "DR1", "DR2", "DR3", "DR6", "DR7"}
    assert X86.by_hardware == {"DR7"}
    assert X86.enables == {"DR7": 0xFF}


def test_the_loops_of_linux_leave_out_the_reserved_breakpoint() -> None:
    assert set(range(10)) - set(CORTEX_A15.looped) == {5}
    assert arm_v7(1, 1).looped == (0, 1)  # one BRP cannot be spared
    assert CORTEX_A57.looped == tuple(range(10))


def test_a_system_of_unlike_cpus_has_two_answers() -> None:
    # Given a cluster with 6 and 4, and one with 4 and 2,
    clusters = [arm64(6, 4), arm64(4, 2)]

    # then a guest may be shown what all have, and the set in memory is as wide as the widest.
    assert least(clusters) == (4, 2)
    assert most(clusters) is clusters[0]


def test_cpus_that_share_no_registers_share_no_guest() -> None:
    with pytest.raises(ValueError, match="DR0, DR1, DR6, DR7, which armv7 lacks"):
        most([arm_v7(6, 4), x86(2)])
