"""
The model of KVM's debug state against a real vCPU: ``python -m tests.judges.vcpu --sequences 500 --seed 7``.

Random sequences of steps on a vCPU of a fresh VM each, every step done by ``x86_view`` and by KVM. A step is one of:
the VMM debugs otherwise, or stops debugging; the guest's set is written from outside; CR4.DE changes; an exception is
injected; a few instructions are run, with or without TF and RF. The rules of a verdict:

- They must agree on errno; on what stopped the guest, with every field of it; on RIP, RFLAGS and what a MOV has read;
  and, after every step, on all that KVM_GET_DEBUGREGS returns.
- Which of the two ways of execution this host has is found out first, by ``probe``. Where ring 0 is run by the CPU,
  accesses to memory are part of the programs, too, and data breakpoints of the sets.
- A run that asked too little proves too little: each kind of stop has to be met, or there is no verdict.
- The first difference ends the run. It is told with the steps of its sequence, which is a function of the seed.

Exit status 0 and ``differences=0`` in the last line, ``sequences=N steps=M differences=0``; 1 and ``differences=1``; or
2 and ``no verdict: ...``.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from msgspec.structs import replace

from hwbpd_kvm import guest, x86_view
from hwbpd_kvm.guest import CODE, DATA, Ended, Guest
from hwbpd_kvm.probe import execution_of_ring_0
from hwbpd_kvm.vcpu import DebugExit, DebugRegisters, GuestDebug, Kvm, what_is_missing
from hwbpd_kvm.x86_view import Cpu, Data, Execution, Instruction, Move, View

STEPS = 40  # of a sequence
# What a MOV DR uses: RSP is for the frames, and RAX for accesses to memory.
REGISTERS = [n for n in range(16) if n not in (guest.RAX, guest.RSP)]
NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
FILLING = 0x5A5A_0000_0000_0000  # what is in the registers that nobody has written

# Breakpoints are set where something is executed, or next to it. One of the guest's own on its #DB handler would
# raise a #DB there, and so on for ever.
NEARBY = tuple(CODE + n for n in range(14)) + tuple(guest.handler(vector) for vector in (guest.UD, guest.GP))
VMMS = (*NEARBY, guest.handler(guest.DB), guest.handler(x86_view.BP))

NEEDED = ("ended", "told vmm", "raised 1", "raised 3", "raised 6", "raised 13", "refused", "read", "hit guest")


class Difference(Exception):
    """The two did not agree."""


class Seen(NamedTuple):
    """What running came to, in the words of both: a stop, where, RFLAGS, and what is in the registers of MOV DR."""

    stop: str
    rip: int
    rflags: int
    registers: tuple[int, ...]


class Placed(NamedTuple):
    """A program: its bytes, what is where with the register that each MOV DR uses, and what is in the registers."""

    code: bytes
    instructions: dict[int, tuple[Instruction, int]]
    initial: dict[str, int]


class Sequence:
    """One sequence on one fresh vCPU."""

    def __init__(self, machine: Guest, draw: random.Random, execution: Execution, met: Counter[str]) -> None:
        self.machine = machine
        self.draw = draw
        self.execution = execution
        self.met = met
        self.view = View()
        self.cpu = Cpu(machine.vcpu.registers().rip)
        self.told: list[str] = []

    def run(self, steps: int) -> None:
        """:raises Difference: at the first one."""
        choices: tuple[tuple[int, Callable[[], None]], ...] = (
            (4, self._debug),
            (3, self._write_from_outside),
            (1, self._change_cr4),
            (1, self._inject),
            (16, self._execute),
        )
        acts = [act for _, act in choices]
        weights = [weight for weight, _ in choices]
        for _ in range(steps):
            self.draw.choices(acts, weights)[0]()
            self._compare("KVM_GET_DEBUGREGS", x86_view.debug_registers(self.view), self.machine.vcpu.debug_registers())

    # --- steps -------------------------------------------------------------------------------------------------------

    def _debug(self) -> None:
        flags = self.draw.choice(
            (
                0,
                GuestDebug.HARDWARE_BREAKPOINTS,  # without ENABLE
                GuestDebug.ENABLE,
                GuestDebug.ENABLE | GuestDebug.SINGLE_STEP,
                GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS,
                GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS,
                GuestDebug.ENABLE | GuestDebug.HARDWARE_BREAKPOINTS | GuestDebug.SINGLE_STEP,
                GuestDebug.ENABLE | GuestDebug.SOFTWARE_BREAKPOINTS,
                self.draw.getrandbits(32) & ~(GuestDebug.INJECT_DB | GuestDebug.INJECT_BP),
            )
        )
        words = (*(self._address(VMMS) for _ in range(4)), *(self.draw.getrandbits(64) for _ in range(3)), self._dr7())
        self._ask(
            f"guest debug {int(flags):#x}, {_hex(words)}",
            lambda: x86_view.set_guest_debug(self.view, self.cpu, flags, words),
            lambda: self.machine.vcpu.set_guest_debug(flags, words),
        )

    def _write_from_outside(self) -> None:
        upper = (self.draw.random() < 0.1) << self.draw.randrange(32, 64)  # a one, or nothing
        value = DebugRegisters(
            (self._address(NEARBY), self._address(NEARBY), self._address(NEARBY), self._address(NEARBY)),
            self.draw.choice((x86_view.DR6_RESET, self.draw.getrandbits(32))) | upper * self.draw.randrange(2),
            self._dr7() | upper * self.draw.randrange(2),
            self.draw.choice((0,) * 9 + (1,)),
        )
        self._ask(
            f"set debug registers {_hex(value.db)}, {value.dr6:#x}, {value.dr7:#x}, {value.flags}",
            lambda: (x86_view.set_debug_registers(self.view, value), self.cpu),
            lambda: self.machine.vcpu.set_debug_registers(value),
        )

    def _change_cr4(self) -> None:
        extensions = not self.cpu.debugging_extensions
        self.cpu = replace(self.cpu, debugging_extensions=extensions)
        self.told.append(f"CR4.DE {extensions}")
        self.machine.set_cr4(guest.PAE | (guest.DE if extensions else 0))

    def _inject(self) -> None:
        """Queue an exception where a program is about to run, see a second one refused, and let it run."""
        program = self._start()
        which = self.draw.choice((GuestDebug.INJECT_DB, GuestDebug.INJECT_BP))
        for _ in range(self.draw.choice((1, 2))):
            flags = which | self.draw.choice((0, GuestDebug.ENABLE, GuestDebug.ENABLE | GuestDebug.SINGLE_STEP))
            self._ask(
                f"inject {int(flags):#x}",
                partial(x86_view.set_guest_debug, self.view, self.cpu, flags, (0,) * 8),
                partial(self.machine.vcpu.set_guest_debug, flags),
            )
        self._follow(program)

    def _execute(self) -> None:
        self._follow(self._start())

    # --- both sides --------------------------------------------------------------------------------------------------

    def _ask(self, what: str, model: Callable[[], tuple[View, Cpu]], real: Callable[[], None]) -> None:
        self.told.append(what)
        expected = found = 0
        try:
            self.view, self.cpu = model()
        except OSError as why:
            expected = why.errno or 0
        try:
            real()
        except OSError as why:
            found = why.errno or 0
        self.met["refused"] += expected != 0
        self._compare("errno", expected, found)

    def _start(self) -> Placed:
        program = self._program()
        rflags = guest.FIXED | self.draw.choice((0,) * 5 + (guest.TF, guest.RF, guest.RF, guest.TF | guest.RF))
        chosen = ", ".join(f"{name} {n:#x}" for name, n in program.initial.items() if n >> 16 != FILLING >> 16)
        self.told.append(f"run {program.code.hex()} with {chosen}, RFLAGS {rflags:#x}")
        self.machine.place(program.code)
        self.machine.start_at(CODE, rflags=rflags, **program.initial)
        self.view, self.cpu = x86_view.set_registers(self.view, replace(self.cpu, rip=CODE, rflags=rflags))
        return program

    def _follow(self, program: Placed) -> None:
        stop = self.machine.run()
        registers = self.machine.vcpu.registers()
        rip, rflags = registers.rip, registers.rflags
        if isinstance(stop, guest.Raised):
            rip, rflags = stop.frame.rip, stop.frame.rflags  # where the handler is by now says nothing
        found = Seen(_stop_text(stop), rip, rflags, tuple(getattr(registers, NAMES[n]) for n in REGISTERS))
        expected = self._predict(program)
        self.met[expected.stop.split(" at ")[0]] += 1
        self._compare("run", expected, found)

    def _predict(self, program: Placed) -> Seen:
        """What running comes to, by the model alone."""
        values = [program.initial[NAMES[n]] if n != guest.RSP else 0 for n in range(16)]

        def seen(stop: str, rip: int, rflags: int) -> Seen:
            return Seen(stop, rip, rflags, tuple(values[n] for n in REGISTERS))

        while True:
            cpu = self.cpu
            instruction, register = program.instructions[cpu.rip]
            if isinstance(instruction.what, Move) and instruction.what.written is not None:
                instruction = replace(instruction, what=instruction.what._replace(written=values[register]))
            if cpu.rip + len(guest.END) == CODE + len(program.code):
                stopped = x86_view.breakpoint_at(self.view, cpu, self.execution)
                if stopped is None:
                    # An OUT leaves the guest before a single step is told of.
                    self.cpu = replace(cpu, rip=cpu.rip + len(guest.END), rflags=cpu.rflags & ~guest.RF)
                    return seen("ended", self.cpu.rip, x86_view.shown_rflags(self.view, self.cpu))
                outcome = stopped
            else:
                outcome = x86_view.execute(self.view, cpu, instruction, self.execution)
            self.view, self.cpu = outcome.view, outcome.cpu
            if outcome.read is not None:
                self.met["read"] += 1
                values[register] = outcome.read
            if isinstance(outcome.stop, x86_view.Raised):
                return seen(*self._in_handler(outcome.stop))
            if outcome.stop is not None:
                return seen(_stop_text(outcome.stop), self.cpu.rip, x86_view.shown_rflags(self.view, self.cpu))

    def _in_handler(self, raised: x86_view.Raised) -> tuple[str, int, int]:
        """A handler is one OUT, before which a breakpoint may come: the VMM's, or another one of the guest's."""
        self.met["hit guest"] += raised.vector == x86_view.DB and bool(self.view.dr6 & 0xF)
        self.cpu = replace(self.cpu, rip=guest.handler(raised.vector), rflags=guest.FIXED)
        outcome = x86_view.breakpoint_at(self.view, self.cpu, self.execution)
        if outcome is None:
            self.cpu = replace(self.cpu, rip=self.cpu.rip + len(guest.END))
            return f"raised {raised.vector}", raised.rip, raised.rflags
        self.view = outcome.view
        if isinstance(outcome.stop, x86_view.Raised):
            return self._in_handler(outcome.stop)
        return _stop_text(outcome.stop), self.cpu.rip, self.cpu.rflags

    def _compare(self, what: str, expected: object, found: object) -> None:
        if expected != found:
            raise Difference(f"{what}:\n  model {_shown(expected)}\n  vcpu  {_shown(found)}")

    # --- what is drawn -----------------------------------------------------------------------------------------------

    def _address(self, nearby: tuple[int, ...]) -> int:
        if self.draw.random() < 0.5:
            return self.draw.choice(nearby)
        return self.draw.choice((DATA + self.draw.randrange(16), self.draw.getrandbits(64)))

    def _dr7(self) -> int:
        word = self.draw.getrandbits(32)
        kind = self.draw.random()
        if kind < 0.15:
            return word
        # Random words hardly ever have a slot that is armed for execution.
        word &= 0x0000_FFFF & ~(x86_view.GD if self.draw.random() < 0.8 else 0)
        for n in range(4):
            control = 0 if self.draw.random() < 0.7 else self.draw.choice((1, 3, 5, 7, 13, 15))
            word |= control << (16 + 4 * n)
        return word if kind < 0.8 else word & 0xFFFF_FF00

    def _program(self) -> Placed:
        code = b""
        instructions: dict[int, tuple[Instruction, int]] = {}
        initial = {name: FILLING | self.draw.getrandbits(16) for name in NAMES if name != "rsp"}
        for register in self.draw.sample(REGISTERS, k=6):
            initial[NAMES[register]] = self._value()
        for _ in range(self.draw.randrange(1, 5)):
            encoded, instruction, register = self._instruction()
            instructions[CODE + len(code)] = instruction, register
            code += encoded
        instructions[CODE + len(code)] = Instruction(len(guest.END)), 0
        return Placed(code + guest.END, instructions, initial)

    def _instruction(self) -> tuple[bytes, Instruction, int]:
        kind = self.draw.random()
        if kind < 0.3:
            return guest.NOP, Instruction(len(guest.NOP)), 0
        if kind < 0.85:
            number = self.draw.choice((0, 1, 2, 3, 4, 5, 6, 7, 6, 7, self.draw.randrange(16)))
            register = self.draw.choice(REGISTERS)
            if self.draw.random() < 0.5:
                encoded = guest.mov_from_dr(number, register)
                return encoded, Instruction(len(encoded), Move(number)), register
            encoded = guest.mov_to_dr(number, register)
            return encoded, Instruction(len(encoded), Move(number, 0)), register
        length, address, is_write = self.draw.choice((1, 2, 4, 8)), DATA + self.draw.randrange(16), kind < 0.93
        encoded = guest.store(address, length) if is_write else guest.load(address, length)
        return encoded, Instruction(len(encoded), Data(address, length, is_write)), 0

    def _value(self) -> int:
        return self.draw.choice(
            (self._address(NEARBY), self._dr7(), self._dr7(), self.draw.getrandbits(32), 1 << self.draw.randrange(64))
        )


def _stop_text(stop: object) -> str:
    match stop:
        case DebugExit(exception, pc, dr6, dr7):
            return f"told vmm at {pc:#x}: exception {exception}, DR6 {dr6:#x}, DR7 {dr7:#x}"
        case guest.Raised(vector, _):
            return f"raised {vector}"
        case Ended():
            return "ended"
    return str(stop)


def _shown(value: object) -> str:
    if isinstance(value, Seen):
        return f"{value.stop}; RIP {value.rip:#x}, RFLAGS {value.rflags:#x}, {_hex(value.registers)}"
    if isinstance(value, DebugRegisters):
        return f"{_hex(value.db)}, DR6 {value.dr6:#x}, DR7 {value.dr7:#x}, flags {value.flags}"
    return str(value)


def _hex(values: Iterable[int]) -> str:
    return " ".join(f"{value:x}" for value in values)


class Run(NamedTuple):
    """What a run did before it ended."""

    sequences: int
    steps: int
    met: Counter[str]


def compare(kvm: Kvm, execution: Execution, sequences: int, seed: int, steps: int = STEPS) -> Run:
    """
    Compare so many sequences.

    :raises Difference: at the first one, with the seed, the sequence and its steps.
    """
    met: Counter[str] = Counter()
    told = time.monotonic()
    for n in range(sequences):
        with Guest(kvm) as machine:
            sequence = Sequence(machine, random.Random(f"{seed} {n}"), execution, met)
            try:
                sequence.run(steps)
            except Difference as difference:
                story = "\n".join(f"  {line}" for line in sequence.told)
                raise Difference(f"seed {seed}, sequence {n}:\n{story}\n{difference}") from None
        if time.monotonic() - told >= 1:
            told = time.monotonic()
            print(f"{n + 1} of {sequences} sequences", file=sys.stderr, flush=True)
    return Run(sequences, sequences * steps, met)


def judge(sequences: int, seed: int) -> int:
    """Run, print what came of it, and return the exit status."""
    print(f"seed={seed}")
    missing = what_is_missing()
    if missing is not None or os.uname().machine != "x86_64":
        print(f"no verdict: {missing or 'this judge is for x86-64; for arm64 there is tests.judges.vcpu_arm64'}")
        return 2
    with Kvm() as kvm:
        execution = execution_of_ring_0(kvm)
        try:
            run = compare(kvm, execution, sequences, seed)
        except Difference as difference:
            print(f"{difference}\ndifferences=1")
            return 1
    met = ", ".join(f"{kind} {n}" for kind, n in sorted(run.met.items()))
    print(f"ring 0 is executed by {execution.value}; met: {met}")
    unmet = [kind for kind in NEEDED if not run.met[kind]]
    if unmet:
        print(f"no verdict: never met: {', '.join(unmet)}")
        return 2
    print(f"sequences={run.sequences} steps={run.steps} differences=0")
    return 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.judges.vcpu", description="the model against a real vCPU")
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="without, a new one, which is printed")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    sys.exit(judge(arguments.sequences, seed))


if __name__ == "__main__":
    main()
