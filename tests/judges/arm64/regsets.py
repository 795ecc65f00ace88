"""
The register sets that a tracer of arm64 writes and reads, against ptrace_view.py.

Random writes to NT_ARM_HW_BREAK and NT_ARM_HW_WATCH: any number of bytes, addresses of every alignment and of the
kernel, control words that are well formed and that are not, more entries than there are slots. Each has to be taken or
refused with the predicted errno, and what is read afterwards has to be the prediction, byte for byte. Now and then the
child is replaced by a fresh one, as nothing else gives a slot back; and perf events on it take some of its slots.
"""

from __future__ import annotations

import os
import random
from contextlib import ExitStack
from typing import Final

from hwbpd.core.model import Pool
from hwbpd_arm.linux import Usable
from hwbpd_arm.ptrace_view import FRESH, REGSET_BYTES, Regset, View
from tests.judges.arm64.accesses import model_of_this_cpu
from tests.judges.arm64.cases import KERNEL_ADDRESS, Model
from tests.judges.arm64.instructions import BRK
from tests.judges.arm64.tracee import HW_BREAK, HW_WATCH, STATE_ENTRY, STATE_HEAD, Tracee
from tests.judges.arm64.verdict import Verdict, generator
from tests.judges.opener import KernelOpener

REGSETS: Final = {Pool.INST: HW_BREAK, Pool.DATA: HW_WATCH}
CHILD_WRITES: Final = 25  # so many to one child


class Writes:
    """Random writes to one child after the other."""

    def __init__(self, model: Model, draw: random.Random) -> None:
        self._model = model
        self._draw = draw
        self.verdict = Verdict("regsets")

    def run(self, cases: int) -> None:
        left = cases
        while left > 0:
            writes = min(left, CHILD_WRITES)
            self._with_child(writes)
            left -= writes

    def _with_child(self, writes: int) -> None:
        opener, slots = KernelOpener(), self._model.slots
        with Tracee([BRK]) as child, ExitStack() as others:
            free = dict(slots)
            for pool in slots:
                for _ in range(self._draw.choice((0, 0, 0, 1, 3))):
                    others.callback(os.close, opener.open(child.pid, -1, pool))
                    free[pool] -= 1
            usable = Usable(breakpoints=slots[Pool.INST], watchpoints=slots[Pool.DATA])
            view, tracer = FRESH, Regset(self._model.kernel, usable, free)
            story: list[str] = [f"  free at first: {free}"]
            for _ in range(writes):
                view = self._write(child, tracer, view, story)

    def _write(self, child: Tracee, tracer: Regset, view: View, story: list[str]) -> View:
        pool = self._draw.choice(tuple(REGSETS))
        raw = self._raw(pool)
        story.append(f"  write to {pool}: {raw.hex(' ', -8)}")
        view, expected = tracer.write(view, pool, raw)
        refused = 0
        try:
            child.write_regset(REGSETS[pool], raw)
        except OSError as refusal:
            refused = refusal.errno or -1
        kind = os.strerror(expected).replace(" ", "-") if expected else "taken"
        read = {other: child.read_regset(regset, REGSET_BYTES).hex(" ", -8) for other, regset in REGSETS.items()}
        wanted = {other: tracer.read(view, other).hex(" ", -8) for other in REGSETS}
        self.verdict.decide(kind, (expected, wanted), (refused, read), lambda: "\n".join(story))
        return view

    def _raw(self, pool: Pool) -> bytes:
        draw = self._draw
        # Nearly always as many entries as fit; all sixteen, or an entry cut in two, now and then.
        entries = draw.choice((1, 1, 1, 2, 2, 3, self._model.slots[pool], draw.randint(0, 16)))
        raw = STATE_HEAD.pack(draw.getrandbits(32), draw.getrandbits(32))
        raw += b"".join(STATE_ENTRY.pack(self._address(), self._control(pool), 0) for _ in range(entries))
        return raw[: -draw.choice((4, 8, 12, 3, 16))] if draw.random() < 0.1 else raw

    def _address(self) -> int:
        draw = self._draw
        form = draw.random()
        if form < 0.1:
            return draw.choice((0, KERNEL_ADDRESS, (1 << 64) - 8, (1 << 48) - 4, 1 << 48, draw.getrandbits(64)))
        return 0x40_0000 + draw.randrange(64)

    def _control(self, pool: Pool) -> int:
        draw = self._draw
        if draw.random() < 0.15:
            return draw.getrandbits(32)
        select = ((1 << draw.randint(1, 8)) - 1) << draw.choice((0, 0, 0, 1, 2, 4))
        load_store = draw.choice((0, 0, 0, 1)) if pool is Pool.INST else draw.choice((0, 1, 2, 3, 3))
        return draw.choice((0, 1, 1, 1)) | draw.choice((0, 2, 2, 1, 3)) << 1 | load_store << 3 | (select & 0xFF) << 5


def judge(cases: int, seed: int) -> list[Verdict]:
    """Do so many writes."""
    writes = Writes(model_of_this_cpu(), generator(seed, "regsets"))
    writes.run(cases)
    return [writes.verdict]
