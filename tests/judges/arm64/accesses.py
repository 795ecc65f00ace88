"""
Which access hits which slot on arm64: the debug unit's word against a CPU's and Linux's.

A case arms random breakpoints and watchpoints on a stopped child, lets it execute one instruction, and compares. There
are two ways to arm, and each shows what the other hides:

- **Seen by a tracer** (NT_ARM_HW_BREAK, NT_ARM_HW_WATCH). The child stops at the exception: whether it came, that it
  came before the access was made (the program counter, a register, the memory), and which address was reported. Which
  slot it was cannot be seen.
- **Counted by perf.** Linux works out whose hit it was, counts it and steps on; so all of what the instruction met is
  in the counts. Requests that the kernel refuses are among them, and the errno has to be the predicted one.

Where the architecture leaves more than one answer open, a case passes with each of them, and is counted apart as "at
liberty": the address that is reported may be any from the lowest byte of the access to the highest byte of it that is
watched, and so may be those it is attributed to; a Store-Exclusive that fails may be met or not; an instruction of
several accesses may have made some of them before the one that traps.

Where an access is not aligned, QEMU 7.2 looks at more bytes than it touches: of a load at the aligned words that
it lies in, of a store at all of the page before it. A case that it decides otherwise than the model, but as the model
does for those bytes, is counted apart as "emulator".
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Final

from msgspec import structs

from hwbpd.core.model import Pool
from hwbpd_arm.linux import EXECUTE, Request
from tests.judges.arm64.cases import Case, Cases, Model, Prediction
from tests.judges.arm64.instructions import program
from tests.judges.arm64.tracee import HW_BREAK, HW_WATCH, TRAP_BRKPT, TRAP_HWBKPT, Stop, Tracee
from tests.judges.arm64.verdict import Verdict, generator
from tests.judges.opener import ATTRIBUTES, EXCLUDE_KERNEL, PERF_EVENT_OPEN, PERF_FLAG_FD_CLOEXEC, PERF_TYPE_BREAKPOINT

ALL_ONES: Final = (1 << 64) - 1


def model_of_this_cpu() -> Model:
    """The model for as many registers as the kernel says there are."""
    with Tracee(program()) as child:
        breakpoints, watchpoints = child.armed(HW_BREAK)[0], child.armed(HW_WATCH)[0]
    return Model(breakpoints & 0xFF, watchpoints & 0xFF, breakpoints >> 8 & 0xFF)


class Traced:
    """Arms through the register sets, and sees where the child stops."""

    def __init__(self, model: Model, draw: random.Random) -> None:
        self._model = model
        self._draw = draw
        self.verdict = Verdict("traced")

    def run(self, cases: int) -> None:
        slots = self._model.slots
        with Tracee(program()) as child:
            drawn = Cases(self._draw, child.code, child.data)
            for _ in range(cases):
                self._judge(child, drawn.draw(watchpoints=slots[Pool.DATA], breakpoints=slots[Pool.INST], wild=False))

    def _judge(self, child: Tracee, case: Case) -> None:
        for regset, pool in ((HW_BREAK, Pool.INST), (HW_WATCH, Pool.DATA)):
            mine = [request for request in case.requests if (request.bp_type == EXECUTE) is (pool is Pool.INST)]
            unused = [(0, 0)] * (self._model.slots[pool] - len(mine))
            # All are disabled first: an armed one would be checked at its new address with its old length.
            for entries in ([(0, 0)] * self._model.slots[pool], [_entry(request) for request in mine] + unused):
                refused = child.arm(regset, entries)
                assert not refused, f"{os.strerror(refused)}: {case}"
        child.memory[:] = bytes(len(child.memory))
        stop = child.run(case.pc, x0=case.address, x1=ALL_ONES, x2=0)
        seen = _stopped(child, case, stop)
        kind, expected = _stops(case, self._model.predict(case, case.requests), stop)
        if seen != expected and case.is_unaligned:
            _, of_emulator = _stops(case, self._model.predict(case, case.requests, case.looked_at()), stop)
            if seen == of_emulator:
                kind, expected = "emulator", of_emulator
        self.verdict.decide(kind, expected, seen, case.__str__)


def _entry(request: Request) -> tuple[int, int]:
    """What asks a register set for the same: E, LSC, and BAS from its lowest bit."""
    load_store = 0 if request.bp_type == EXECUTE else request.bp_type
    return request.bp_addr, 1 | load_store << 3 | ((1 << request.bp_len) - 1) << 5


Outcome = tuple[str, str, int]  # before or after the instruction; what stopped it; the address reported


def _stops(case: Case, predicted: Prediction, stop: Stop) -> tuple[str, Outcome]:
    """What sort of case it is, and how it has to stop."""
    end: Outcome = ("after", "breakpoint", case.pc + 4) if predicted.behind else ("after", "nothing", 0)
    if predicted.fetched:
        return "breakpoint", ("before", "breakpoint", case.pc)
    if not predicted.met:
        return end[1] if end[1] == "nothing" else "behind", end
    if case.instruction.at_liberty and stop.pc != case.pc:
        return "at-liberty", end
    if stop.address != predicted.reported and stop.address in predicted.may_report:
        return "other-address", ("before", "watchpoint", stop.address)
    return "watchpoint", ("before", "watchpoint", predicted.reported)


def _stopped(child: Tracee, case: Case, stop: Stop) -> Outcome:
    """How it has stopped."""
    assert stop.signal == signal.SIGTRAP, f"{signal.Signals(stop.signal).name} at {stop.pc:#x}:\n{case}"
    if stop.code == TRAP_BRKPT:
        return "after", "nothing", 0
    assert stop.code == TRAP_HWBKPT, f"si_code {stop.code}:\n{case}"
    when = "before" if stop.pc == case.pc else "after"
    several = case.instruction.length_bytes > case.instruction.element_bytes
    if when == "before" and not several and (any(child.memory[:]) or child.now()[1] != ALL_ONES):
        when = "half-way"  # it stands before the instruction, and something was done
    return when, "breakpoint" if stop.address == stop.pc else "watchpoint", stop.address


class Counted:
    """Arms through perf_event_open, and reads what Linux has counted."""

    def __init__(self, model: Model, draw: random.Random) -> None:
        self._model = model
        self._draw = draw
        self.verdict = Verdict("counted")
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long

    def run(self, cases: int) -> None:
        slots = self._model.slots
        with Tracee(program()) as child:
            drawn = Cases(self._draw, child.code, child.data)
            for _ in range(cases):
                # One more than there are, so that some are refused for want of room.
                case = drawn.draw(watchpoints=slots[Pool.DATA] + 1, breakpoints=slots[Pool.INST] + 1, wild=True)
                self._judge(child, case)

    def _judge(self, child: Tracee, case: Case) -> None:
        armed: list[Request] = []
        events: list[int] = []
        predicted: list[int] = []
        refused: list[int] = []
        with ExitStack() as closing:
            for request in case.requests:
                predicted.append(self._model.errno(request, armed))
                event, errno = self._open(request, child.pid)
                refused.append(errno)
                if not errno:
                    closing.callback(os.close, event)
                    armed.append(request)
                    events.append(event)
            if predicted != refused:
                self.verdict.decide("refused", predicted, refused, case.__str__)
                return
            stop = child.run(case.pc, x0=case.address, x1=ALL_ONES, x2=0)
            assert (stop.code, stop.pc) == (TRAP_BRKPT, case.pc + 8), f"{stop}:\n{case}"
            counts = [struct.unpack("=Q", os.read(event, 8))[0] for event in events]
        self._compare(case, armed, counts)

    def _compare(self, case: Case, armed: Sequence[Request], counts: list[int]) -> None:
        predicted = self._model.predict(case, armed)
        kind = "attributed" if predicted.met else "refused" if len(armed) < len(case.requests) else "other"
        expected = self._counts(predicted, armed, predicted.reported)
        if counts != expected and counts in self._allowed(case, predicted, armed):
            kind, expected = "at-liberty", counts
        elif counts != expected and case.is_unaligned:
            looked_at = self._model.predict(case, armed, case.looked_at())
            if counts in self._allowed(case, looked_at, armed):
                kind, expected = "emulator", counts
        self.verdict.decide(kind, expected, counts, lambda: f"{case}\n  {predicted}")

    def _counts(self, predicted: Prediction, armed: Sequence[Request], reported: int) -> list[int]:
        """What the events count when that address is reported."""
        hit = self._model.attributed(predicted, armed, reported)
        return [sum(at in some for some in (predicted.fetched, hit, predicted.behind)) for at in range(len(armed))]

    def _allowed(self, case: Case, predicted: Prediction, armed: Sequence[Request]) -> Iterator[list[int]]:
        """What the architecture lets them count."""
        for address in predicted.may_report or (0,):
            yield self._counts(predicted, armed, address)
        if case.instruction.at_liberty:
            unmet = structs.replace(predicted, met=frozenset())
            yield self._counts(unmet, armed, 0)

    def _open(self, request: Request, pid: int) -> tuple[int, int]:
        """Return a descriptor and 0, or -1 and the errno."""
        what = (request.bp_type, request.bp_addr, request.bp_len)
        attributes = ATTRIBUTES.pack(PERF_TYPE_BREAKPOINT, ATTRIBUTES.size, 0, 1, 0, 0, EXCLUDE_KERNEL, 0, *what)
        arguments = (pid, -1, -1, PERF_FLAG_FD_CLOEXEC)
        number = ctypes.c_long(PERF_EVENT_OPEN["aarch64"])
        event = int(self._call(number, attributes, *(ctypes.c_long(value) for value in arguments)))
        return event, 0 if event >= 0 else ctypes.get_errno()


def judge(cases: int, seed: int) -> list[Verdict]:
    """Run half of the cases by either way."""
    model = model_of_this_cpu()
    traced, counted = (way(model, generator(seed, way.__name__)) for way in (Traced, Counted))
    traced.run(cases - cases // 2)
    counted.run(cases // 2)
    return [traced.verdict, counted.verdict]
