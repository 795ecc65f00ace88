"""
The VMM's breakpoints on an arm64 guest, on a real vCPU: ``python -m tests.judges.vcpu_arm64 --cases 300 --seed 7``.

On an arm64 host with /dev/kvm it asks that. Anywhere else it boots a kernel under QEMU whose CPU has EL2, so that KVM
works inside, and asks there; the guest of this file is then the third machine in the other.

A case hands random breakpoints and watchpoints to KVM_SET_GUEST_DEBUG, with or without single step, and runs up to four
instructions at EL1: NOPs, loads and stores of 1 to 8 bytes. What stops the guest first, and where, has to be what the
arm64 debug unit of ``hwbpd_arm`` says:

- a breakpoint before its instruction (ESR_EL2.EC 0x30), a watchpoint before its access (0x34) with the address in FAR
  and WnR as they should be, a step behind the first instruction (0x32), or the end, which is a store to no memory;
- FAR may be any address from the start of the access to the last byte of it that is watched; how often it was another
  than the model's is told;
- registers beyond those that KVM_CHECK_EXTENSION counts are armed, too, and have no effect.

The last line is ``cases=N differences=0``, and the exit status 0, 1 for differences, or 2 for no verdict.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
from collections import Counter
from typing import Final, NamedTuple

from hwbpd.core.model import Access
from hwbpd.debug_unit import MemoryAccess, RegisterFile
from hwbpd_arm import mdscr
from hwbpd_arm.mdscr import Mdscr
from hwbpd_arm.v8_unit import Arm64DebugUnit
from hwbpd_kvm.vcpu import ArmDebugExit, Capability, GuestDebug, Kvm, MmioExit, Vcpu, what_is_missing

REGISTERS: Final = 16  # of each kind, in what KVM_SET_GUEST_DEBUG takes
MEMORY: Final = 0x4000_0000
MEMORY_BYTES: Final = 0x1_0000
CODE: Final = MEMORY + 0x1000
DATA: Final = MEMORY + 0x2000
NOWHERE: Final = 0x1000_0000  # no memory there
INSTRUCTION_BYTES: Final = 4

NOP: Final = 0xD503201F
END: Final = 0xF9000120  # STR X0, [X9]
# LDR and STR of W or X 0, [X1], by length; another base register is added in bits 5 to 9.
STORES: Final = {1: 0x39000020, 2: 0x79000020, 4: 0xB9000020, 8: 0xF9000020}
LOADS: Final = {1: 0x39400020, 2: 0x79400020, 4: 0xB9400020, 8: 0xF9400020}

_CORE: Final = 0x6030_0000_0010_0000  # KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE, plus the offset by 4
_PC: Final = _CORE + 0x40
_PSTATE: Final = _CORE + 0x42
EL1H: Final = 0x3C5  # with D, A, I and F masked; what goes to EL2 is not masked by D

BREAKPOINT, STEP, WATCHPOINT = 0x30, 0x32, 0x34  # ESR_EL2.EC
WRITE_NOT_READ: Final = 1 << 6

NEEDED: Final = ("breakpoint", "watchpoint", "step", "end")


class Done(NamedTuple):
    """One instruction of a program: its word, and the access it makes."""

    word: int
    base: int  # the address in its base register, X1 for the first instruction and so on
    access: MemoryAccess | None


class Case(NamedTuple):
    """What is armed, and what runs."""

    steps: bool
    bcr: tuple[int, ...]
    bvr: tuple[int, ...]
    wcr: tuple[int, ...]
    wvr: tuple[int, ...]
    program: tuple[Done, ...]


class Stop(NamedTuple):
    """What stopped the guest, where, and for a watchpoint the address and whether it was a write."""

    what: str
    pc: int
    address: int = 0
    is_write: bool = False


def draw(random_: random.Random) -> Case:
    """Return a random case, of which about half are stopped."""

    def control() -> int:
        return int(random_.random() < 0.4) | random_.choice((1, 1, 2, 3)) << 1

    program = []
    for _ in range(random_.randrange(1, 5)):
        length = random_.choice((1, 2, 4, 8))
        address = DATA + random_.randrange(0, 48, length)
        match random_.choice(("nop", "load", "store")):
            case "nop":
                program.append(Done(NOP, 0, None))
            case kind:
                access = Access.WRITE if kind == "store" else Access.READ
                word = (STORES if kind == "store" else LOADS)[length] + (len(program) << 5)
                program.append(Done(word, address, MemoryAccess(access, address, length, kernel=True)))
    places = range(REGISTERS)
    return Case(
        random_.random() < 0.15,
        tuple(control() | 0xF << 5 for _ in places),
        tuple(CODE + 4 * random_.randrange(-2, 16) for _ in places),
        tuple(control() | random_.randrange(1, 4) << 3 | _byte_select(random_) << 5 for _ in places),
        tuple(DATA + 8 * random_.randrange(8) for _ in places),
        tuple(program),
    )


def _byte_select(random_: random.Random) -> int:
    """Bytes of a doubleword that are next to each other, as the architecture wants them."""
    first = random_.randrange(8)
    return ((1 << random_.randrange(1, 9 - first)) - 1) << first


class Model:
    """The product's answers for a CPU with so many registers."""

    def __init__(self, breakpoints: int, watchpoints: int) -> None:
        self.counts = breakpoints, watchpoints
        self.unit = Arm64DebugUnit(breakpoints, watchpoints)

    def expected(self, case: Case) -> Stop:
        """What the model says."""
        file = self._file(case)
        for n, done in enumerate((*case.program, None)):
            pc = CODE + INSTRUCTION_BYTES * n
            fetch = MemoryAccess(Access.EXECUTE, pc, INSTRUCTION_BYTES, kernel=True)
            if self.unit.check(file, [fetch]) is not None:
                return Stop("breakpoint", pc)
            if done is None:
                break
            if done.access is not None and (trap := self.unit.check(file, [done.access])) is not None:
                is_write = bool(trap.status["ESR_EL1"] & WRITE_NOT_READ)
                return Stop("watchpoint", pc, trap.status["FAR_EL1"], is_write)
            if case.steps:
                return Stop("step", pc + INSTRUCTION_BYTES)
        return Stop("end", CODE + INSTRUCTION_BYTES * len(case.program))

    def allows(self, case: Case, expected: Stop, found: Stop) -> bool:
        """Whether all that differs is the address in FAR, and the architecture allows the one that was found."""
        if expected.what != "watchpoint" or found._replace(address=expected.address) != expected:
            return False
        access = case.program[(expected.pc - CODE) // INSTRUCTION_BYTES].access
        assert access is not None
        file, first = self._file(case), access.address
        watched = [
            byte
            for byte in range(first, first + access.length_bytes)
            if self.unit.check(file, [MemoryAccess(access.access, byte, 1, kernel=True)]) is not None
        ]
        return first <= found.address <= watched[-1]

    def _file(self, case: Case) -> RegisterFile:
        file = self.unit.write(self.unit.reset(), "OSLAR_EL1", 0)
        file = self.unit.write(file, "MDSCR_EL1", mdscr.encode(Mdscr(kernel=True, monitor=True)))
        for n in range(self.counts[0]):
            file = self.unit.write(file, f"DBGBVR{n}_EL1", case.bvr[n])
            file = self.unit.write(file, f"DBGBCR{n}_EL1", case.bcr[n])
        for n in range(self.counts[1]):
            file = self.unit.write(file, f"DBGWVR{n}_EL1", case.wvr[n])
            file = self.unit.write(file, f"DBGWCR{n}_EL1", case.wcr[n])
        return file


class Machine:
    """A vCPU at EL1 with some memory."""

    def __init__(self, vcpu: Vcpu, memory: memoryview) -> None:
        self.vcpu = vcpu
        self.memory = memory

    def found(self, case: Case) -> Stop:
        """What KVM and the CPU do."""
        words = [done.word for done in case.program] + [END]
        at = CODE - MEMORY
        self.memory[at : at + 4 * len(words)] = struct.pack(f"<{len(words)}I", *words)
        flags = GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS | (GuestDebug.SINGLE_STEP if case.steps else 0)
        self.vcpu.set_guest_debug(flags, (*case.bcr, *case.bvr, *case.wcr, *case.wvr))
        for n, done in enumerate(case.program):
            self.vcpu.set_one_register(_CORE + 2 * (n + 1), done.base)
        self.vcpu.set_one_register(_CORE + 2 * 9, NOWHERE)
        self.vcpu.set_one_register(_PC, CODE)
        self.vcpu.set_one_register(_PSTATE, EL1H)
        why = self.vcpu.run()
        pc = self.vcpu.one_register(_PC)
        if isinstance(why, MmioExit):
            self._complete()
            return Stop("end" if why.address == NOWHERE else str(why), pc)
        if isinstance(why, ArmDebugExit):
            match why.esr >> 26 & 0x3F:
                case 0x30:
                    return Stop("breakpoint", pc)
                case 0x32:
                    return Stop("step", pc)
                case 0x34:
                    return Stop("watchpoint", pc, why.far, bool(why.esr & WRITE_NOT_READ))
        return Stop(str(why), pc)

    def _complete(self) -> None:
        """Let KVM step past the store that left the guest, or it would do so from wherever the next case begins."""
        self.vcpu.set_guest_debug(0)
        self.vcpu.leave_at_once(True)
        self.vcpu.run()
        self.vcpu.leave_at_once(False)


def judge(cases: int, seed: int) -> int:
    """Ask this host; print what came of it and return the exit status."""
    missing = what_is_missing()
    if missing is not None:
        print(f"no verdict: {missing}")
        return 2
    met: Counter[str] = Counter()
    differences = 0
    with Kvm() as kvm, kvm.vm() as vm:
        counts = kvm.capability(Capability.GUEST_DEBUG_HW_BPS), kvm.capability(Capability.GUEST_DEBUG_HW_WPS)
        memory = vm.memory(MEMORY, MEMORY_BYTES)
        vcpu = vm.vcpu()
        vcpu.init_arm(vm.preferred_arm_target())
        with memoryview(memory) as view:
            model, machine = Model(*counts), Machine(vcpu, view)
            for n in range(cases):
                case = draw(random.Random(f"{seed} {n}"))
                expected, found = model.expected(case), machine.found(case)
                met[expected.what] += 1
                if expected != found and model.allows(case, expected, found):
                    met["another address in FAR"] += 1
                    continue
                if expected != found:
                    differences += 1
                    print(f"seed {seed}, case {n}: {case}\n  model {expected}\n  vcpu  {found}", flush=True)
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(met.items()))
    print(f"{counts[0]} breakpoints, {counts[1]} watchpoints; met: {told}")
    unmet = [kind for kind in NEEDED if not met[kind]]
    if unmet and not differences:
        print(f"no verdict: never met: {', '.join(unmet)}")
        return 2
    print(f"cases={cases} differences={differences}", flush=True)
    return int(differences > 0)


def judge_under_qemu(cases: int, seed: int) -> int:
    """Boot an arm64 kernel with EL2, and ask there."""
    from tests.judges.arm64 import debian
    from tests.judges.arm64.qemu import Board, Missing, NoAnswer, cache, missing, overlay, run

    arguments = ("-M", "virt,gic-version=3,virtualization=on", "-cpu", "neoverse-n1", "-smp", "2", "-m", "1024")
    board = Board("qemu-system-aarch64", arguments)
    path = "PYTHONPATH=/hwbpd:/hwbpd/plugins:/hwbpd/clients:/site"
    script = f"cd /hwbpd && {path} python3 -m tests.judges.vcpu_arm64 --cases {cases} --seed {seed}\n"
    last = ""
    try:
        if why := missing(board):
            raise Missing(why)
        guest = debian.provide(debian.ARM64, cache())
        with overlay(cache(), script) as files:
            for line in run(board, guest, files, 120 + 0.5 * cases):
                print(line, flush=True)
                last = line
    except (Missing, NoAnswer) as why:
        print(f"no verdict: {why}")
        return 2
    return 0 if last == f"cases={cases} differences=0" else 2 if last.startswith("no verdict") else 1


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.judges.vcpu_arm64", description="arm64's registers by KVM")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None, help="without, a new one, which is printed")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed={seed}")
    here = os.uname().machine == "aarch64"
    sys.exit(judge(arguments.cases, seed) if here else judge_under_qemu(arguments.cases, seed))


if __name__ == "__main__":
    main()
