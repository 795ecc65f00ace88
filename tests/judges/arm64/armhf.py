"""
ARMv7's rules against a 32-bit kernel, as far as QEMU carries.

The packages that hwbpd needs are not built for 32-bit Arm, so the kernel is asked by a witness that needs nothing but
Python (witness.py), and judged here, on the host, by the product's own code. Orders do not depend on answers: all are
written down before the kernel is started, and each is done on a child of its own. The judges:

- ``opened``: perf_event_open with random types, lengths and addresses, as many as fit and more: who gets a slot, and
  the errno of who does not (linux.py, rules 1 to 11);
- ``numbered``: random writes through PTRACE_SETHBPREGS: the errno, and all registers read afterwards (ptrace_view.py);
- ``ran``: a child runs into watchpoints and breakpoints that its tracer has set: where it stops, before or after what
  it does, and which register is named (v7_unit.py, attribution.py).

What QEMU cannot judge is what comes after a hit of perf's: it has no mismatch breakpoints, so Linux's step never ends,
and an event counts once. Nor are accesses judged here that are not aligned.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from hwbpd.core.model import Access, Pool
from hwbpd.debug_unit import MemoryAccess, Trap
from hwbpd_arm import linux
from hwbpd_arm.attribution import reported_slots
from hwbpd_arm.linux import Kernel, Request, Usable
from hwbpd_arm.plan import Contents
from hwbpd_arm.ptrace_view import FRESH, Numbered, View
from hwbpd_arm.v7_unit import Armv7DebugUnit
from hwbpd_linux.registers import Counts, from_resource_info
from tests.judges.arm64 import qemu
from tests.judges.arm64.debian import Guest
from tests.judges.arm64.verdict import Verdict
from tests.judges.arm64.witness import READ_BACK

BASE: Final = 0x10000  # where code and data stand for the model; multiples of the pages they are on
CODE, DATA = BASE, 2 * BASE
KERNEL_ADDRESS: Final = 0xC000_8000
READ, WRITE = Access.READ, Access.WRITE

# A32 instructions that access [r0] by way of r1; each is followed by a NOP and by the word that stops a debuggee.
INSTRUCTIONS: Final = (
    ("ldrb", 0xE5D01000, READ, 1),
    ("ldrh", 0xE1D010B0, READ, 2),
    ("ldr", 0xE5901000, READ, 4),
    ("strb", 0xE5C01000, WRITE, 1),
    ("strh", 0xE1C010B0, WRITE, 2),
    ("str", 0xE5801000, WRITE, 4),
)
NOP, STOP = 0xE320F000, 0xE7F001F0
BYTES_EACH: Final = 12

Order = list[Any]


def code() -> bytes:
    """The instructions in a row."""
    return b"".join(word.to_bytes(4, "little") for row in INSTRUCTIONS for word in (row[1], NOP, STOP))


# --- orders ----------------------------------------------------------------------------------------------------------


class Orders:
    """Draws what the witness is asked."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def opened(self) -> Order:
        wanted = self._draw.choice((1, 2, 12))
        return ["open", [self._request() for _ in range(wanted)]]

    def numbered(self) -> Order:
        return ["numbered", [self._write() for _ in range(self._draw.randint(1, 12))]]

    def ran(self) -> Order:
        draw = self._draw
        index = draw.randrange(len(INSTRUCTIONS))
        length = INSTRUCTIONS[index][3]
        offset, x = BYTES_EACH * index, 64 + length * draw.randrange(16 // length)
        writes: list[list[Any]] = []
        for number in range(draw.randint(0, 4)):
            size = draw.choice((1, 2, 4, 4, 8))
            start = x + draw.randint(-8, 8)
            control = 1 | draw.choice((1, 2, 3)) << 3 | ((1 << size) - 1) << 5
            writes += [[-2 * number - 1, ["data", start - start % size]], [-2 * number - 2, control]]
        for number in range(draw.randint(0, 2) if draw.random() < 0.4 else 0):
            writes += [[2 * number + 1, ["code", offset + draw.choice((0, 4, -4))]], [2 * number + 2, 1 | 0xF << 5]]
        return ["run", offset, x, writes]

    def _request(self) -> Order:
        draw = self._draw
        where = "cpu" if draw.random() < 0.1 else "task"
        form = draw.random()
        if form < 0.5:  # most are well formed, so that slots run out
            return [3, ["data", 8 * draw.randrange(8)], draw.choice((1, 2, 4, 8)), where]
        if form < 0.8:
            return [4, ["code", 4 * draw.randrange(8)], draw.choice((4, 4, 4, 2)), where]
        address = draw.choice((["data", draw.randrange(16)], ["data", draw.randrange(16)], KERNEL_ADDRESS, 0xFFFFFFFC))
        return [draw.randrange(9), address, draw.randint(0, 9), where]

    def _write(self) -> list[Any]:
        draw = self._draw
        number = draw.choice((1, -1)) * draw.randint(1, draw.choice((4, 12, 36, 70)))
        if draw.random() < 0.03:
            return [0, draw.getrandbits(32)]
        if draw.random() < 0.1:
            return [number, draw.choice((0, KERNEL_ADDRESS, 0xFFFF_FFFF, draw.getrandbits(32)))]
        if number % 2:
            return [number, DATA + draw.randrange(64)]
        select = draw.choice((0x1, 0x3, 0xF, 0xF, 0xFF, 0x7, 0x6, 0xF0))
        return [number, draw.randint(0, 1) | draw.randrange(4) << 1 | draw.randrange(4) << 3 | select << 5]


# --- verdicts --------------------------------------------------------------------------------------------------------


class Judge:
    """The product's word on each order."""

    def __init__(self, counts: Counts, verdicts: dict[str, Verdict]) -> None:
        self._kernel = Kernel(arm64=False, version=counts.debug_version, user_top=linux.USER_TOP_32)
        self._slots = counts.slots
        self._usable = Usable(counts.slots[Pool.INST], counts.slots[Pool.DATA])
        self._unit = Armv7DebugUnit(counts.breakpoints, counts.watchpoints, version=counts.debug_version)
        self._verdicts = verdicts

    def judge(self, order: Order, answer: Any) -> None:
        verb, *rest = order
        if verb == "open":
            self._opened(rest, answer)
        elif verb == "numbered":
            self._numbered(rest, answer)
        else:
            self._ran(rest, answer)

    def _opened(self, rest: Order, answer: list[int]) -> None:
        (requests,) = rest
        free = dict(self._slots)
        expected = []
        for bp_type, address, length, where in requests:
            request = Request(bp_type, _at(address), length, of_task=where == "task")
            pool = Pool.DATA if bp_type & 3 else Pool.INST
            refused = linux.open_errno(self._kernel, request, free_slots=free[pool])
            free[pool] -= not refused
            expected.append(refused)
        kind = "full" if min(free.values()) == 0 else "room"
        self._verdicts["opened"].decide(kind, expected, answer, lambda: f"  {requests}")

    def _numbered(self, rest: Order, answer: list[Any]) -> None:
        (writes,) = rest
        tracer, view = Numbered(self._kernel, self._usable, dict(self._slots)), FRESH
        expected = []
        for number, value in writes:
            view, refused = tracer.poke(view, number, value)
            expected.append([refused, [list(tracer.peek(view, other)) for other in READ_BACK]])
        self._verdicts["numbered"].decide(
            "sequence", expected, answer, lambda: _first_that_differs(writes, expected, answer)
        )

    def _ran(self, rest: Order, answer: dict[str, Any]) -> None:
        offset, x, writes = rest
        tracer, view = Numbered(self._kernel, self._usable, dict(self._slots)), FRESH
        refused = []
        for number, value in writes:
            view, errno = tracer.poke(view, number, _at(value))
            refused.append(errno)
        kind, expected = self._stops(view, offset, x)
        seen = {name: answer[name] for name in expected}
        if kind == "watchpoint":
            seen["address"] = answer["address"][0]
        elif "breakpoint" in kind:
            seen["address"] = answer["address"][1]
        expected["refused"], seen["refused"] = refused, answer["refused"]
        self._verdicts["ran"].decide(kind, expected, seen, lambda: f"  {INSTRUCTIONS[offset // BYTES_EACH][0]} {rest}")

    def _stops(self, view: View, offset: int, x: int) -> tuple[str, dict[str, Any]]:
        """Where and how the child stops: the exception, whether it has done what it should, the register named."""
        _, _, access, length = INSTRUCTIONS[offset // BYTES_EACH]
        held = self._armed(view)
        data = MemoryAccess(access, DATA + x, length)
        for pc, made in ((offset, MemoryAccess(Access.EXECUTE, CODE + offset, 4)), (offset, data)):
            if trap := self._check(held, made):
                return self._hit(held, trap, pc, done=False)
        behind = MemoryAccess(Access.EXECUTE, CODE + offset + 4, 4)
        if trap := self._check(held, behind):
            return self._hit(held, trap, offset + 4, done=True)
        return "nothing", {"code": 1, "pc": offset + 8, "done": True}

    def _armed(self, view: View) -> dict[tuple[Pool, int], Contents]:
        """What the registers of each index hold that is enabled."""
        held = {}
        for index, event in view.events.items():
            if event.enabled:
                request = Request(event.bp_type, event.bp_addr, event.bp_len, own_handler=True)
                held[index] = linux.contents(self._kernel, request)
        return held

    def _check(self, held: dict[tuple[Pool, int], Contents], made: MemoryAccess) -> Trap | None:
        file = self._unit.write(self._unit.reset(), "DBGOSLAR", 0)
        file = self._unit.write(file, "DBGDSCR", 1 << 15)  # MDBGen
        for (pool, number), contents in held.items():
            pair = (self._unit.breakpoints if pool is Pool.INST else self._unit.watchpoints)[number]
            file = self._unit.write(
                self._unit.write(file, pair.address, contents.address), pair.control, contents.control
            )
        return self._unit.check(file, [made])

    def _hit(
        self, held: dict[tuple[Pool, int], Contents], trap: Trap, pc: int, *, done: bool
    ) -> tuple[str, dict[str, Any]]:
        pool = trap.slots[0][0]
        if pool is Pool.INST:
            number = min(number for _, number in trap.slots)
            return "breakpoint", {"code": 4, "pc": pc, "done": done, "address": pc, "number": 2 * number + 1}
        watchpoints = {number: contents for (other, number), contents in held.items() if other is Pool.DATA}
        number = min(reported_slots(watchpoints, trap.status["DFAR"]))
        address = trap.status["DFAR"] - DATA
        return "watchpoint", {"code": 4, "pc": pc, "done": False, "address": address, "number": -(2 * number + 1)}


def _at(value: Any) -> int:
    """An address as the model has it."""
    return {"code": CODE, "data": DATA}[value[0]] + value[1] if isinstance(value, list) else int(value)


def _first_that_differs(writes: Sequence[Any], expected: Sequence[Any], seen: Sequence[Any]) -> str:
    for count, (one, other) in enumerate(zip(expected, seen, strict=True)):
        if one != other:
            return f"  {writes[: count + 1]}\n  there: {one}\n     not {other}"
    return f"  {writes}"


def run(guest: Guest, work: Path, cases: int, draw: random.Random) -> Iterator[str]:
    """Ask the kernel as many questions, and give the lines of the verdicts."""
    orders_of = Orders(draw)
    orders = [draw.choice((orders_of.opened, orders_of.numbered, orders_of.ran))() for _ in range(cases)]
    text = "\n".join([code().hex(), json.dumps(["info"]), *map(json.dumps, orders)]) + "\n"
    witness = Path(__file__).with_name("witness.py").read_bytes()
    files = {"extra/witness.py": witness, "extra/orders": text.encode()}
    script = "cd /extra; python3 witness.py < orders"
    verdicts = {name: Verdict(name) for name in ("opened", "numbered", "ran")}
    with qemu.overlay(work, script, tree=False, files=files) as overlay:
        lines = list(qemu.run(qemu.ARMHF, guest, overlay, 120 + cases * 0.5))
    answers = [json.loads(line.removeprefix("answer ")) for line in lines if line.startswith("answer ")]
    if len(answers) != len(orders) + 1:
        raise qemu.NoAnswer("the witness answered too little:\n" + "\n".join(lines[-20:]))
    counts = from_resource_info(answers[0][0])
    yield f"the kernel hands out {counts.slots[Pool.INST]} breakpoints and {counts.slots[Pool.DATA]} watchpoints"
    judge = Judge(counts, verdicts)
    for order, answer in zip(orders, answers[1:], strict=True):
        judge.judge(order, answer)
    yield from (verdict.told() for verdict in verdicts.values())
