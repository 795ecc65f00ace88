"""
Each strategy as its source has it: what the patch, the mail or the kernel says, told as a history.
"""

from __future__ import annotations

import pytest

from hwbpd_kvm.actions import HOST_TRAP, TRAP, TRAPS_OFF, TRAPS_ON, Kind, Place
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.registers import CORTEX_A15, CORTEX_A57, X86, arm64
from hwbpd_kvm.state import (
    ArmedBy,
    DebugOff,
    DebugOn,
    Down,
    Enter,
    Exit,
    GuestRead,
    GuestWrite,
    HostArm,
    HostDisarm,
    Load,
    OsLock,
    OtherVcpu,
    Put,
    Up,
)
from tests.plugins.kvm.steps import Steps, host_arms, in_guest

MDBGEN, MDE = 1 << 15, 1 << 15


def test_every_preset_says_where_it_is_from() -> None:
    assert all(name == preset.name and preset.source for name, preset in PRESETS.items())


# --- the dirty bit on ARMv7 ------------------------------------------------------------------------------------------


def test_a_trapped_write_goes_to_memory_and_makes_the_next_run_switched_and_untrapped() -> None:
    # Given a guest that traps,
    steps = in_guest("arm-dirty-bit")

    # when it writes a register,
    steps.do(GuestWrite("DBGBVR0", 0x8000))

    # then the value is in memory, and all is switched: the host's saved, the guest's loaded, traps off.
    assert steps.guest("DBGBVR0") == steps.hardware("DBGBVR0") == 0x8000
    assert steps.actions[0] is TRAP
    assert steps.moved(Kind.READ, Place.HOST) == list(CORTEX_A15.registers)
    assert steps.moved(Kind.WRITE, Place.GUEST) == list(CORTEX_A15.registers)
    assert steps.actions[-1] is TRAPS_OFF


def test_a_trapped_read_is_answered_from_memory_and_makes_nothing_dirty() -> None:
    steps = in_guest("arm-dirty-bit")

    assert steps.do(GuestRead("DBGBVR0")) == (TRAP,)
    assert steps.world.vcpu.traps


def test_dirty_lasts_for_one_run() -> None:
    # Given a guest that has made its registers dirty with MDBGEN off,
    steps = in_guest("arm-dirty-bit")
    steps.do(GuestWrite("DBGBVR0", 0x8000))

    # when it exits,
    steps.do(Exit())

    # then its registers are saved, the host's restored, and the next run traps.
    assert steps.counts() == {Kind.READ: 21, Kind.WRITE: 21}
    assert steps.do(Enter()) == (TRAPS_ON,)


def test_a_guest_with_mdbgen_is_switched_at_every_edge() -> None:
    steps = in_guest("arm-dirty-bit")
    steps.do(GuestWrite("DBGDSCRext", MDBGEN))

    for event in (Exit(), Enter(), Exit(), Enter()):
        steps.do(event)
        assert steps.counts() == {Kind.READ: 21, Kind.WRITE: 21}


def test_an_idle_guest_costs_nothing() -> None:
    steps = Steps("arm-dirty-bit")

    assert steps.do(Enter()) == ()
    assert steps.do(Exit()) == ()


# --- the four cases, the bitmap, a part, the owner -------------------------------------------------------------------


def looks(steps: Steps) -> int:
    return steps.counts()[Kind.LOOK]


@pytest.mark.parametrize(
    ("host_has", "guest_has", "is_switched"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, True)],
    ids=["neither", "host only", "guest only", "both"],
)
def test_registers_are_switched_unless_neither_has_any(host_has: bool, guest_has: bool, is_switched: bool) -> None:
    # Given a host and a guest that have or have not configured a breakpoint,
    steps = Steps("four-cases")
    if guest_has:
        steps.do(Enter(), GuestWrite("DBGBCR0", 1), Exit())
    if host_has:
        steps.do(host_arms(CORTEX_A15))

    # when the guest is entered,
    steps.do(Enter())

    # then both sets move, or nothing does and it traps.
    assert steps.counts()[Kind.WRITE] == (21 if is_switched else 0)
    assert steps.world.vcpu.traps is not is_switched
    assert looks(steps) == 10


def test_the_query_as_first_proposed_stops_before_the_reserved_breakpoint() -> None:
    steps = Steps("four-cases-loops")
    steps.do(HostArm(0, 5, 0x7000, 1, ArmedBy.STEP), Enter())

    assert looks(steps) == 9
    assert steps.world.vcpu.traps
    assert steps.hardware("DBGBCR5") == 1  # in force in the guest


def test_a_host_that_is_read_costs_a_read_of_every_control_register_at_every_entry() -> None:
    steps = Steps("four-cases-hardware")
    steps.do(Enter())

    assert steps.counts() == {Kind.READ: 10}


def test_the_bitmap_disarms_the_hosts_slots_and_arms_them_again() -> None:
    # Given a host with two of its slots armed,
    steps = Steps("disable-bitmap")
    steps.do(host_arms(CORTEX_A15, 1), host_arms(CORTEX_A15, 7))

    # when a guest without any runs,
    steps.do(Enter())

    # then their enable bits are off, and nothing else was touched,
    assert steps.hardware("DBGBCR1") == steps.hardware("DBGWCR1") == 0
    assert steps.hardware("DBGBVR1") == 0x7000
    assert steps.counts() == {Kind.LOOK: 10, Kind.READ: 2, Kind.WRITE: 2}
    assert steps.world.vcpu.aside == 1 << 1 | 1 << 7

    # and they are on after the exit.
    steps.do(Exit())
    assert steps.hardware("DBGBCR1") == steps.hardware("DBGWCR1") == 1
    assert steps.counts() == {Kind.WRITE: 2}


def test_a_part_is_the_slots_that_either_side_has_armed() -> None:
    steps = Steps("partial")
    steps.do(host_arms(CORTEX_A15, 1), Enter(), GuestWrite("DBGWCR2", 1))

    assert steps.moved(Kind.WRITE, Place.GUEST) == ["DBGBCR1", "DBGBVR1", "DBGWCR2", "DBGWVR2", "DBGDSCRext"]
    assert steps.world.vcpu.traps


def test_an_owner_keeps_its_registers_in_the_hardware_until_the_host_touches_them() -> None:
    # Given a guest that has touched its registers once,
    steps = in_guest("host-trapping-owner")
    steps.do(GuestWrite("DBGDSCRext", MDBGEN), GuestWrite("DBGBCR0", 1))

    # when it exits and is entered again,
    steps.do(Exit())
    exit_counts = steps.counts()
    is_off = steps.hardware("DBGDSCRext") == 0
    steps.do(Enter())

    # then only the switch for all slots was turned, off in the host and on in the guest.
    assert exit_counts == {Kind.LOOK: 1, Kind.READ: 1, Kind.WRITE: 1}
    assert is_off
    assert steps.counts() == {Kind.WRITE: 1}
    assert steps.hardware("DBGBCR0") == 1

    # And when the host arms a slot, its access traps, the guest's registers are saved and the host's come back.
    steps.do(Exit())
    steps.do(host_arms(CORTEX_A15))
    assert steps.actions[0] is HOST_TRAP
    assert steps.guest("DBGBCR0") == 1
    assert (steps.hardware("DBGBVR0"), steps.hardware("DBGDSCRext")) == (0x7000, MDBGEN)


def test_an_owner_that_comes_late_adopts_and_one_that_goes_gives_back() -> None:
    # Given a host that has armed a slot before the hypervisor came,
    steps = Steps("host-trapping-owner", loaded=False, up=False)
    steps.do(host_arms(CORTEX_A15))

    # when it comes, then it reads every register of every CPU, once;
    steps.do(Up())
    assert steps.counts() == {Kind.READ: 2 * 21}

    # and when it goes while a guest's registers are in the hardware, then the host's are put back.
    steps.do(HostDisarm(0, 0), Load(0), Enter(), GuestWrite("DBGBCR0", 1), Exit(), Put())
    steps.do(Down())
    assert steps.hardware("DBGBCR0") == 0
    assert steps.hardware("DBGDSCRext") == MDBGEN
    assert HOST_TRAP not in steps.do(host_arms(CORTEX_A15))


# --- arm64 -----------------------------------------------------------------------------------------------------------


def test_an_idle_guest_on_arm64_costs_mdscr_and_nothing_else() -> None:
    steps = Steps("arm64-lazy")

    assert [str(action) for action in steps.do(Enter())] == [
        "host.MDSCR_EL1 <- MDSCR_EL1",
        "MDSCR_EL1 <- guest.MDSCR_EL1",
    ]
    assert [str(action) for action in steps.do(Exit())] == [
        "guest.MDSCR_EL1 <- MDSCR_EL1",
        "MDSCR_EL1 <- host.MDSCR_EL1",
    ]


def test_the_order_is_that_of_the_patch_and_the_counts_are_read_four_times_a_round() -> None:
    steps = in_guest("arm64-lazy")
    steps.do(GuestWrite("MDSCR_EL1", MDE), Exit())
    counts_read = steps.moved(Kind.READ, Place.NOWHERE)
    steps.do(Enter())

    saved = steps.moved(Kind.READ, Place.HOST)
    assert saved[1:4] == ["DBGBCR5_EL1", "DBGBCR4_EL1", "DBGBCR3_EL1"]
    firsts = ("DBGBCR5_EL1", "DBGBVR5_EL1", "DBGWCR3_EL1", "DBGWVR3_EL1")
    assert [saved.index(name) for name in firsts] == [1, 7, 13, 17]
    assert saved[-1] == "MDCCINT_EL1"
    assert counts_read + steps.moved(Kind.READ, Place.NOWHERE) == ["ID_AA64DFR0_EL1"] * 4


def test_dbgvcr32_is_switched_only_for_a_32_bit_guest_that_is_dirty() -> None:
    layout = arm64(6, 4, aarch32_guest=True)
    steps = Steps("arm64-lazy", [layout])

    assert "DBGVCR32_EL2" not in {action.register for action in steps.do(Enter())}
    assert "DBGVCR32_EL2" in {action.register for action in steps.do(GuestWrite("DBGBVR0_EL1", 0x8000))}
    assert "DBGVCR32_EL2" not in CORTEX_A57.registers


def test_an_owned_guest_stays_untrapped_until_it_is_put() -> None:
    # Given a guest that has only read a register,
    steps = in_guest("arm64-owner")
    steps.do(GuestRead("DBGBVR0_EL1"))

    # when it exits and is entered again, then it still does not trap;
    steps.do(Exit(), Enter())
    assert not steps.world.vcpu.traps

    # and after it has been put, it does, and nothing but MDSCR is switched.
    steps.do(Exit(), Put(), Load(0))
    steps.do(Enter())
    assert steps.world.vcpu.traps
    assert steps.counts() == {Kind.READ: 1, Kind.WRITE: 1, Kind.TRAPS_ON: 1}


def test_the_os_lock_takes_the_guests_breakpoints_out_of_force_and_traps() -> None:
    steps = in_guest("arm64-owner")
    steps.do(GuestWrite("MDSCR_EL1", MDE), GuestWrite("DBGBCR0_EL1", 1))
    assert steps.hardware("MDSCR_EL1") == MDE

    steps.do(OsLock(True))

    assert steps.hardware("MDSCR_EL1") == 0
    assert steps.world.vcpu.traps
    assert steps.guest("MDSCR_EL1") == MDE
    steps.do(OsLock(False))
    assert (steps.hardware("MDSCR_EL1"), steps.hardware("DBGBCR0_EL1")) == (MDE, 1)


# --- x86 -------------------------------------------------------------------------------------------------------------


def test_only_the_first_access_of_a_run_exits() -> None:
    steps = in_guest("x86-wont-exit")

    assert steps.do(GuestRead("DR0"))[0] is TRAP
    assert steps.do(GuestWrite("DR1", 0x1000)) == ()
    assert steps.do(GuestRead("DR6")) == ()
    steps.do(Exit(), Enter())
    assert steps.do(GuestRead("DR0"))[0] is TRAP


def test_the_guests_registers_are_synced_before_the_hosts_are_restored_and_before_the_exit_is_handled() -> None:
    # Given a host with a breakpoint, and a guest that has written registers untrapped,
    steps = Steps("x86-wont-exit")
    steps.do(HostArm(0, 0, 0x7000, 0x3), Enter(), GuestWrite("DR0", 0x1000), GuestWrite("DR6", 0xFFFF0FF1))

    # when it exits,
    told = [str(action) for action in steps.do(Exit())]

    # then everything is read first, DR6 is cleaned, and then the host's set is written from its record.
    assert told == [
        "guest.DR3 <- DR3", "guest.DR2 <- DR2", "guest.DR1 <- DR1", "guest.DR0 <- DR0", "guest.DR6 <- DR6",
        "DR6 <- reset", "look at active",
        "DR3 <- record.DR3", "DR2 <- record.DR2", "DR1 <- record.DR1", "DR0 <- record.DR0", "DR6 <- reset",
        "DR7 <- record.DR7",
    ]  # fmt: skip
    assert (steps.guest("DR0"), steps.guest("DR6")) == (0x1000, 0xFFFF0FF1)
    assert (steps.hardware("DR0"), steps.hardware("DR6"), steps.hardware("DR7")) == (0x7000, 0xFFFF0FF0, 0x403)


def test_an_armed_slot_is_loaded_and_goes_on_trapping() -> None:
    steps = in_guest("x86-wont-exit")
    steps.do(GuestWrite("DR7", 0x402), Exit(), Enter())

    assert [str(action) for action in steps.actions if action.kind is Kind.WRITE] == [
        "DR7 <- reset", "DR3 <- guest.DR3", "DR2 <- guest.DR2", "DR1 <- guest.DR1", "DR0 <- guest.DR0",
    ]  # fmt: skip
    assert steps.world.vcpu.traps
    assert steps.hardware("DR7") == 0x402


def test_the_patch_as_posted_forgets_that_the_guest_has_armed_a_slot_meanwhile() -> None:
    steps = in_guest("x86-wont-exit-2014")
    steps.do(GuestRead("DR0"), GuestWrite("DR0", 0x1000), GuestWrite("DR7", 0x402), Exit(), HostArm(0, 0, 0x7000, 3))
    steps.do(Enter())

    assert (steps.hardware("DR0"), steps.hardware("DR7")) == (0x7000, 0x402)


def test_without_guest_debug_nothing_needs_to_be_intercepted_again() -> None:
    steps = in_guest("x86-never-again")
    steps.do(GuestRead("DR0"))

    steps.do(Exit(), Put(), Load(1), Enter())
    assert steps.do(GuestRead("DR0")) == ()
    steps.do(Exit(), DebugOn((("DR7", 0x402),)), Enter())
    assert steps.world.vcpu.traps


def test_xen_leaves_the_registers_where_they_are_until_another_vcpu_comes() -> None:
    # Given a guest with a register written,
    steps = in_guest("xen-vmx")
    steps.do(GuestWrite("DR0", 0x1000))

    # when it exits, is put, loaded and entered, then nothing is moved;
    for event in (Exit(), Put(), Load(0), Enter()):
        assert steps.do(event) == ()

    # and when another vCPU is switched in, then they are saved.
    steps.do(Exit(), Put())
    steps.do(OtherVcpu(0, 0x5000))
    assert steps.guest("DR0") == 0x1000
    assert steps.hardware("DR0") == 0x5000

    # A vCPU that moves fetches them from where they stayed.
    steps.do(Load(0), Enter(), GuestWrite("DR0", 0x2000), Exit(), Put())
    steps.do(Load(1))
    assert steps.guest("DR0") == 0x2000


# --- the VMM debugs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset", ["always", "arm-dirty-bit", "four-cases", "arm64-lazy", "arm64-owner", "x86-wont-exit"]
)
def test_the_vmms_set_is_selected_while_it_debugs_and_the_guests_kept_apart(preset: str) -> None:
    # Given a guest with a breakpoint of its own,
    steps = in_guest(preset)
    slot = steps.layout.slots[0]
    master = [GuestWrite(steps.layout.master, steps.layout.master_enable)] if steps.layout.master else []
    steps.do(*master, GuestWrite(slot.address, 0x1000), GuestWrite(slot.control, slot.enable), Exit())

    # when the VMM sets one there,
    values = [(slot.address, 0x2000), (slot.control, slot.enable)]
    values += [(write.register, write.value) for write in master]
    steps.do(DebugOn(tuple(values)), Enter())

    # then the VMM's is in force, and the guest traps, sees its own and may change it;
    assert steps.hardware(slot.address) == 0x2000
    assert steps.world.vcpu.traps
    steps.do(GuestWrite(slot.address, 0x3000))
    assert (steps.hardware(slot.address), steps.guest(slot.address)) == (0x2000, 0x3000)

    # and after the VMM has ended, the guest's is in force.
    steps.do(Exit(), DebugOff(), Enter())
    assert steps.hardware(slot.address) == 0x3000


def test_the_vmm_may_use_as_many_slots_as_the_cpu_has() -> None:
    steps = Steps("x86-wont-exit")
    values = tuple((slot.address, 0x1000 + nth) for nth, slot in enumerate(X86.slots))
    steps.do(DebugOn((*values, ("DR7", 0x4AA))), Enter())

    assert [steps.hardware(f"DR{nth}") for nth in range(4)] == [0x1000, 0x1001, 0x1002, 0x1003]
