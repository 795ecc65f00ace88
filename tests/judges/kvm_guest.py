"""
What ptrace cannot arrange, asked of a vCPU: the part of the silicon judge that runs in ring 0.

A guest of our own sets its debug registers by MOV and runs single instructions, and its handlers tell what came. The
model says beforehand which exception comes where, what a MOV reads, and what DR0-DR3, DR6 and DR7 hold afterwards. The
questions, each with a probe, which is one case that has a plain answer:

1. MOV to and from DR0-DR7 with any value, in rings 0 and 3, with and without CR4.DE and GD.
2. Execution breakpoints armed by L, by G, by both or not at all, and RF.
3. Single steps beside them.
4. Data breakpoints at any address, aligned or not, and armed like those.
5. I/O breakpoints, with and without CR4.DE.

Who answers depends on the host. Where KVM runs ring 0 on the CPU, it is the CPU, but for what KVM intercepts; some
hosts run ring 0 in KVM's emulator of instructions, which is then an independent reading of the manual and no silicon,
and knows neither data nor I/O breakpoints. A question whose probe is not answered as the model says is left to the
manual, by name. Three things are not asked. KVM's emulator is known to differ from every CPU in two: it keeps DR7.RTM
for a vCPU without RTM, and drops a write of an upper half through DR4 or DR5 without a word. And no manual ranks GD
against an upper half that is not zero: KVM's own code for Intel has the #DB first, its emulator the #GP.

Intel SDM Vol. 3B, "Debug Registers"; Vol. 2B, "MOV: Move to/from Debug Registers"; AMD64 APM Vol. 2, "Debug Registers".
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

from hwbpd.core.model import Access
from hwbpd.debug_unit import MemoryAccess, RegisterFile, Trap
from hwbpd_kvm import guest as machine
from hwbpd_kvm.guest import CODE, DATA, DB, DE, END, GP, NOP, PAE, RAX, RF, TF, UD, Ended, Guest, Raised
from hwbpd_kvm.vcpu import DebugRegisters, IoExit, Kvm
from hwbpd_x86 import dr6, dr7
from hwbpd_x86.debug_unit import PortAccess, X86DebugUnit
from hwbpd_x86.registers import CR4_DE, Cpu, Fault

MOVES: Final = "MOV to and from debug registers"
EXECUTION: Final = "L against G"
STEPS: Final = "single steps in ring 0"
DATA_ACCESS: Final = "data breakpoints in ring 0 and at misaligned addresses"
PORTS: Final = "I/O breakpoints"
QUESTIONS: Final = (MOVES, EXECUTION, STEPS, DATA_ACCESS, PORTS)
BUS_LOCK: Final = "bus lock (DEBUGCTL is not the guest's)"

PORT: Final = 0xF0  # of no handler
GD: Final = 1 << 13
RTM: Final = 1 << 11
UPPER_HALF: Final = 1 << 32
BD: Final = dr6.to_positive(dr6.encode(dr6.Dr6(register_access=True)))
VECTORS: Final = {"#DB": DB, "#UD": UD, "#GP(0)": GP}


class Step(NamedTuple):
    """One instruction of a program."""

    code: bytes
    data: tuple[MemoryAccess, ...] = ()
    ports: tuple[PortAccess, ...] = ()


class GuestJudge:
    """One guest, and the cases it is asked; from the start of the block to its end."""

    def __init__(self, device: Kvm, source: random.Random, unit: X86DebugUnit | None = None) -> None:
        """
        :param unit: the model to judge, for a CPU without features: a vCPU that was given no CPUID has none.
        """
        self._random = source
        self._unit = unit or X86DebugUnit(Cpu())
        self._guest = Guest(device)
        self._file: RegisterFile = {}
        self._ask: dict[str, Callable[[], str | None]] = {
            MOVES: self._moves,
            EXECUTION: lambda: self._program(EXECUTION),
            STEPS: lambda: self._program(STEPS),
            DATA_ACCESS: lambda: self._program(DATA_ACCESS),
            PORTS: lambda: self._program(PORTS),
        }
        self.asked: Counter[str] = Counter()
        self.answers: tuple[str, ...] = ()  # the questions that this host's KVM answers

    def __enter__(self) -> Self:
        self.answers = tuple(question for question in QUESTIONS if self._probe(question))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._guest.close()

    def judge(self) -> str | None:
        """Ask one random case of a question that is answered here; return what differed."""
        return self.ask(self._random.choice(self.answers))

    def ask(self, question: str) -> str | None:
        """Ask one random case of this question; return what differed."""
        self.asked[question] += 1
        return self._ask[question]()

    def unanswered(self) -> list[str]:
        """The questions that this host's KVM leaves to the manual."""
        return [question for question in QUESTIONS if question not in self.answers]

    def told(self) -> str:
        """How often each question was asked."""
        return ", ".join(f"{question}: {self.asked[question]}" for question in self.answers)

    def _probe(self, question: str) -> bool:
        nops = [Step(NOP)] * 2
        write = Step(machine.store(DATA, 4), (_store(DATA, 4),))
        port = Step(machine.out(PORT), (), (PortAccess(PORT, 1),))
        if question == MOVES:
            self._start(dr7.RESET, (0, 0, 0, 0), de=False)
            return self._move(0, 0x1234, ring=0, reads=False) is None
        if question == EXECUTION:
            return self._runs(nops, (CODE + 1, 0, 0, 0), dr7.RESET | 0b10) is None
        if question == STEPS:
            return self._runs(nops, (0, 0, 0, 0), dr7.RESET, steps=True) is None
        if question == DATA_ACCESS:
            return self._runs([write, *nops], (DATA, 0, 0, 0), dr7.RESET | 0b10 | 0xD << 16) is None
        return self._runs([port, *nops], (PORT, 0, 0, 0), dr7.RESET | 0b10 | 0x2 << 16, de=True) is None

    # --- question 1 --------------------------------------------------------------------------------------------------

    def _moves(self) -> str | None:
        draw = self._random
        self._start(dr7.RESET, (0, 0, 0, 0), de=draw.random() < 0.5)
        for _ in range(draw.randrange(1, 9)):
            number = draw.randrange(8)
            value = draw.getrandbits(64)
            if number >= 4:
                upper = draw.choice((0, 0, 0, 1, 1 << 31))
                value = value % UPPER_HALF
                if number >= 6 and not self._file["DR7"] & GD:
                    value |= upper * UPPER_HALF
            if number in (5, 7):
                value = value & ~RTM & ~GD | draw.choice((0, 0, GD))
            if difference := self._move(number, value, ring=draw.choice((0, 0, 0, 3)), reads=draw.random() < 0.4):
                return difference
        return None

    def _move(self, number: int, value: int, *, ring: int, reads: bool) -> str | None:
        registers, before = self._unit.registers, self._file
        expected, read = None, value
        try:
            if reads:
                read = registers.move_from(before, number, cpl=ring)
            else:
                self._file = registers.move_to(before, number, value, cpl=ring)
        except Fault as fault:
            expected = VECTORS[fault.vector]
            if expected == DB:
                self._file = registers.raised(before, BD)
        code = machine.mov_from_dr(number, RAX) if reads else machine.mov_to_dr(number, RAX)
        self._guest.place(code + END)
        self._guest.start_at(ring=ring, rax=value)
        stop = self._guest.run()
        seen = stop.vector if isinstance(stop, Raised) else None
        rax = self._guest.vcpu.registers().rax
        at = stop.frame.rip if isinstance(stop, Raised) else CODE
        if not isinstance(stop, Ended | Raised) or (seen, rax, at) != (expected, read, CODE) or self._held_differs():
            return (
                f"  {code.hex(' ')} in ring {ring} with RAX={value:#x}, on {_written(before)}\n"
                f"  model:     vector {expected}, RAX={read:#x}, {_written(self._file)}\n"
                f"  kvm guest: {stop}, RAX={rax:#x}, {self._guest.vcpu.debug_registers()}"
            )
        return None

    # --- questions 2 to 5 --------------------------------------------------------------------------------------------

    def _program(self, question: str) -> str | None:
        """A few instructions, and breakpoints of the kind that is asked about, among others that are answered."""
        draw = self._random
        steps = [self._step(question) for _ in range(draw.randrange(1, 5))]
        starts = _starts(steps)
        control = dr7.RESET | draw.choice((0, 0x100, 0x200, 0x300)) | draw.choice((0, 0, GD))
        addresses = []
        for n in range(dr7.SLOTS):
            kind = draw.choice((EXECUTION, question))
            if kind == DATA_ACCESS:
                rw, length_code = draw.choice((1, 3)), draw.randrange(4)
                addresses.append(DATA + draw.randrange(32))
            elif kind == PORTS:
                rw, length_code = 2, draw.choice((0, 1, 3))
                addresses.append(PORT + draw.randrange(-4, 8))
            else:
                rw, length_code = 0, 0
                addresses.append(draw.choice(starts) + draw.choice((0, 0, 0, 1, -1)))
            control |= draw.randrange(4) << 2 * n | (length_code << 2 | rw) << 16 + 4 * n
        # With CR4.DE clear, R/W 2 is undefined.
        de = question == PORTS or draw.random() < 0.5
        first, second, third, fourth = addresses
        return self._runs(steps, (first, second, third, fourth), control, de=de, steps=question == STEPS)

    def _step(self, question: str) -> Step:
        draw = self._random
        if question == DATA_ACCESS and draw.random() < 0.7:
            address, length = DATA + draw.randrange(32), draw.choice((1, 2, 4, 8))
            if draw.random() < 0.5:
                return Step(machine.store(address, length), (_store(address, length),))
            return Step(machine.load(address, length), (MemoryAccess(Access.READ, address, length),))
        if question == PORTS and draw.random() < 0.7:
            port = PORT + draw.randrange(4)
            return Step(machine.out(port), (), (PortAccess(port, 1),))
        return Step(draw.choice((NOP, b"\x66\x90", b"\x0f\x1f\x00")))  # NOPs of one, two and three bytes

    def _runs(
        self,
        program: Sequence[Step],
        addresses: tuple[int, int, int, int],
        control: int,
        *,
        de: bool = False,
        steps: bool = False,
    ) -> str | None:
        """Run a program to its end, exception by exception; return what differed."""
        self._start(control, addresses, de=de)
        self._guest.place(b"".join(step.code for step in program) + END)
        how = f"  {[step.code.hex(' ') for step in program]}" + ", TF" * steps + f", on {_written(self._file)}\n"
        traps = self._predicted(program, steps=steps)
        at, flags = CODE, TF * steps
        for expected in (*traps, None):
            self._guest.start_at(at, rflags=flags, rax=CODE)  # RAX is an address that a NOP may name
            stop = self._guest.run()
            while isinstance(stop, IoExit):
                stop = self._guest.run()
            held = self._guest.vcpu.debug_registers()
            if expected is None:
                if isinstance(stop, Ended):
                    return None
                return f"{how}  model:     the end\n  kvm guest: {stop}, {held}"
            rip, file = expected
            if not isinstance(stop, Raised) or (stop.vector, stop.frame.rip) != (DB, rip) or held != _held(file):
                return f"{how}  model:     #DB at {rip:#x}, {_written(file)}\n  kvm guest: {stop}, {held}"
            # A handler returns with RF, so that a breakpoint is not met again, and with a clean DR6.
            at, flags = rip, TF * steps | RF
            self._guest.vcpu.set_debug_registers(held._replace(dr6=dr6.RESET))
        raise AssertionError("a program has an end")

    def _predicted(self, program: Sequence[Step], *, steps: bool) -> list[tuple[int, RegisterFile]]:
        """Every #DB: where it comes, and the registers then."""
        traps = []
        resume = False
        for start, step in zip(_starts(program), (*program, Step(END)), strict=True):
            accesses = (MemoryAccess(Access.EXECUTE, start, len(step.code)), *step.data)
            # An OUT leaves the vCPU before its step is told, and the end is one.
            single_step = steps and step.code != END
            trap = self._unit.check(self._file, accesses, ports=step.ports, resume=resume, single_step=single_step)
            if trap is not None and trap.before:
                traps.append((start, self._raised(trap)))
                trap = self._unit.check(self._file, accesses, ports=step.ports, resume=True, single_step=single_step)
            if trap is not None:
                traps.append((start + len(step.code), self._raised(trap)))
            # A handler has returned with RF, so a breakpoint behind a trap is not met, either.
            resume = trap is not None
        return traps

    def _raised(self, trap: Trap) -> RegisterFile:
        """The registers as the handler of this #DB finds them; it leaves them with a clean DR6."""
        raised = self._unit.registers.raised(self._file, dr6.to_positive(trap.status["DR6"]))
        self._file = {**raised, "DR6": dr6.RESET}
        return raised

    # --- both --------------------------------------------------------------------------------------------------------

    def _start(self, control: int, addresses: tuple[int, int, int, int], *, de: bool) -> None:
        """Begin with these registers, in the vCPU and in the model."""
        self._guest.set_cr4(PAE | (DE if de else 0))
        self._guest.vcpu.set_debug_registers(DebugRegisters(addresses, dr6.RESET, control))
        file = {f"DR{n}": address for n, address in enumerate(addresses)}
        self._file = {**self._unit.reset(), **file, "DR7": control, "CR4": CR4_DE if de else 0}

    def _held_differs(self) -> bool:
        return self._guest.vcpu.debug_registers() != _held(self._file)


def _held(file: RegisterFile) -> DebugRegisters:
    return DebugRegisters((file["DR0"], file["DR1"], file["DR2"], file["DR3"]), file["DR6"], file["DR7"])


def _written(file: RegisterFile) -> str:
    return ", ".join(f"{name}={value:#x}" for name, value in file.items())


def _store(address: int, length_bytes: int) -> MemoryAccess:
    return MemoryAccess(Access.WRITE, address, length_bytes)


def _starts(program: Sequence[Step]) -> list[int]:
    """The address of each instruction, and of the end."""
    starts = [CODE]
    for step in program:
        starts.append(starts[-1] + len(step.code))
    return starts
