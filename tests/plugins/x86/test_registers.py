"""The debug registers of a CPU: what a MOV leaves in them, when it faults instead, and what a #DB leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.debug_unit import RegisterFile
from hwbpd_x86 import dr6, dr7
from hwbpd_x86.dr6 import Dr6
from hwbpd_x86.dr7 import Dr7
from hwbpd_x86.profiles import PROFILES
from hwbpd_x86.registers import ADDRESSES, CR4_DE, MASKS, Cpu, Fault, Registers, cpu_of, masks_of

CPUS = [cpu_of(facts) for facts in PROFILES.values()]
EVERYTHING = Cpu(rtm=True, bus_lock=True, masks=True)
NOTHING = Cpu()
GD = dr7.encode(Dr7(general_detect=True))
GD_BIT = GD & ~dr7.RESET

cpus = st.sampled_from(CPUS)
numbers = st.integers(0, 7)
words = st.integers(0, 2**32 - 1)
long_words = st.one_of(words, st.integers(0, 2**64 - 1), st.integers(0, 63).map(lambda bit: 1 << bit))


def with_words(cpu: Cpu, values: dict[str, int]) -> tuple[Registers, RegisterFile]:
    registers = Registers(cpu)
    file = registers.reset()
    for register, value in values.items():
        file = registers.write(file, register, value)
    return registers, file


@pytest.mark.parametrize("cpu", CPUS)
def test_after_reset_nothing_is_armed_and_nothing_has_happened(cpu: Cpu) -> None:
    file = Registers(cpu).reset()

    assert file["DR7"] == dr7.encode(Dr7()) == 0x400
    assert file["DR6"] == dr6.encode(Dr6()) == 0xFFFF_0FF0
    assert [file[register] for register in ADDRESSES] == [0] * 4
    assert {register for register in file if "MASK" in register} == (set(MASKS) if cpu.masks else set())
    assert masks_of(file) == (0,) * 4


@given(cpus, numbers, words)
def test_what_was_written_reads_back_with_reserved_bits_as_they_read(cpu: Cpu, number: int, word: int) -> None:
    registers = Registers(cpu)
    before = registers.reset()

    after = registers.move_to(before, number, word)

    read = after[{4: "DR6", 5: "DR7"}.get(number, f"DR{number}")]
    assert (read & GD_BIT and number in (5, 7)) or registers.move_from(after, number) == read
    if number < 4:
        assert read == word
    elif number in (4, 6):
        assert read == dr6.stored(word, rtm=cpu.rtm, bus_lock=cpu.bus_lock)
    else:
        assert read == dr7.stored(word, rtm=cpu.rtm)
    changed = {register for register in before if before[register] != after[register]}
    assert changed <= {f"DR{number}", {4: "DR6", 5: "DR7"}.get(number, "")}, "no other register moved"


@given(st.sampled_from([cpu for cpu in CPUS if cpu.word_bytes == 8]), numbers, long_words)
def test_only_the_upper_halves_of_dr6_and_dr7_fault(cpu: Cpu, number: int, word: int) -> None:
    registers = Registers(cpu)
    file = registers.reset()

    if number >= 4 and word >> 32:
        with pytest.raises(Fault, match=r"^#GP\(0\): "):
            registers.move_to(file, number, word)
    else:
        registers.move_to(file, number, word)


@pytest.mark.parametrize(
    ("cpu", "dr6_one", "dr7_zero"),
    [
        (EVERYTHING, set(), set()),
        (Cpu(rtm=True), {11}, set()),
        (Cpu(bus_lock=True), {16}, {11}),
        (NOTHING, {11, 16}, {11}),
    ],
)
def test_bits_of_absent_features_are_reserved_with_their_own_polarity(
    cpu: Cpu, dr6_one: set[int], dr7_zero: set[int]
) -> None:
    registers, zeros = with_words(cpu, {"DR6": 0, "DR7": 0})
    _, ones = with_words(cpu, {"DR6": 0xFFFF_FFFF, "DR7": 0xFFFF_FFFF & ~GD_BIT})

    # What is absent from DR6 reads as one, what is absent from DR7 as zero, whatever is written.
    assert {bit for bit in (11, 16) if zeros["DR6"] >> bit & 1} == dr6_one
    assert all(ones["DR6"] >> bit & 1 for bit in (11, 16))
    assert {bit for bit in (11,) if not ones["DR7"] >> bit & 1} == dr7_zero
    assert not zeros["DR7"] >> 11 & 1
    assert registers.reset()["DR6"] == dr6.RESET


# --- faults, and which comes first -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "means"), [(4, 6), (5, 7)])
def test_dr4_and_dr5_are_other_names_until_debugging_extensions_are_on(number: int, means: int) -> None:
    registers, file = with_words(EVERYTHING, {f"DR{number}": 0x0001_0801})

    assert registers.move_from(file, number) == registers.move_from(file, means) == file[f"DR{means}"]

    file = registers.write(file, "CR4", CR4_DE)
    for access in (lambda: registers.move_from(file, number), lambda: registers.move_to(file, number, 0)):
        with pytest.raises(Fault, match=rf"^#UD: DR{number} "):
            access()
    assert registers.move_from(file, means) == file[f"DR{means}"]


@given(numbers, long_words, st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())
def test_the_first_fault_wins(number: int, word: int, cpl: int, guarded: bool, extended: bool, write: bool) -> None:
    # Given registers that are guarded or not, with or without debugging extensions,
    registers, file = with_words(EVERYTHING, {"CR4": CR4_DE if extended else 0, "DR7": GD if guarded else 0})

    # when one is accessed, then of all that is wrong the first in the order of the rules is what happens.
    wrong = [
        ("#GP(0)", cpl > 0),
        ("#UD", extended and number in (4, 5)),
        ("#DB", guarded),
        ("#GP(0)", write and number >= 4 and word >> 32 != 0),
    ]
    expected = next((vector for vector, is_wrong in wrong if is_wrong), None)
    try:
        if write:
            registers.move_to(file, number, word, cpl=cpl)
        else:
            registers.move_from(file, number, cpl=cpl)
        vector = None
    except Fault as fault:
        vector = fault.vector
    assert vector == expected


def test_masks_and_cr4_are_not_guarded() -> None:
    registers, file = with_words(EVERYTHING, {"DR7": GD})

    file = registers.write(file, "DR2_ADDR_MASK", 0xFFF)
    file = registers.write(file, "CR4", 0xFFFF)

    assert masks_of(file) == (0, 0, 0xFFF, 0)
    assert file["CR4"] == CR4_DE, "nothing else of CR4 is kept"


def test_a_mask_has_32_bits_and_exists_only_where_the_cpu_has_it() -> None:
    registers, file = with_words(EVERYTHING, {})
    assert masks_of(registers.write(file, "DR0_ADDR_MASK", 2**32 - 1))[0] == 2**32 - 1
    with pytest.raises(Fault, match=r"^#GP\(0\): DR0_ADDR_MASK "):
        registers.write(file, "DR0_ADDR_MASK", 2**32)

    registers, file = with_words(NOTHING, {})
    with pytest.raises(KeyError):
        registers.write(file, "DR0_ADDR_MASK", 0)


# --- what a #DB leaves -----------------------------------------------------------------------------------------------

flags = st.booleans()
reasons = st.builds(Dr6, st.tuples(flags, flags, flags, flags), flags, flags, flags, flags, flags)


@given(cpus, words, words, reasons)
def test_a_debug_exception_adds_its_reasons_and_drops_the_guard(
    cpu: Cpu, status: int, control: int, why: Dr6
) -> None:
    registers, file = with_words(cpu, {"DR6": status, "DR7": control & ~GD_BIT})
    file = registers.write(file, "DR7", file["DR7"] | GD_BIT)
    held = dr6.decode(file["DR6"])

    after = registers.raised(file, dr6.to_positive(dr6.encode(why)))

    told = dr6.decode(after["DR6"])
    assert after["DR7"] == file["DR7"] & ~GD_BIT
    assert told.single_step == (held.single_step or why.single_step)
    assert told.register_access == (held.register_access or why.register_access)
    assert told.bus_lock == (cpu.bus_lock and (held.bus_lock or why.bus_lock))
    assert told.transaction == (cpu.rtm and (held.transaction or why.transaction))
    if any(why.hit) or why.register_access:
        assert told.hit == why.hit, "B0-B3 are written anew"
    else:
        assert told.hit == held.hit
    assert {register: after[register] for register in ADDRESSES} == {register: file[register] for register in ADDRESSES}


def test_the_handler_may_use_the_guarded_registers() -> None:
    # Given a guard, when somebody reads a register,
    registers, file = with_words(NOTHING, {"DR0": 0x1234, "DR7": GD})
    with pytest.raises(Fault, match=r"^#DB: "):
        registers.move_from(file, 0)
    file = registers.raised(file, dr6.to_positive(dr6.encode(Dr6(register_access=True))))

    # then the handler is told so, and reads it without another.
    assert dr6.decode(registers.move_from(file, 6)).register_access
    assert registers.move_from(file, 0) == 0x1234
