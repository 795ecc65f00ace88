"""What docs/plugins.md shows of the example in tests/thirdparty."""

from __future__ import annotations

import inspect
from pathlib import Path

import hwbpd_pdq
from hwbpd_pdq import control
from hwbpd_pdq.debug_unit import PdqDebugUnit
from hwbpd_pdq.fit import PdqBackend

from hwbpd.core.model import Access, Mode, Pool, Span
from hwbpd.debug_unit import Armed
from tests.registers.writing import Fields, code, picture, write_lines


def project() -> list[str]:
    """The part of its pyproject.toml that makes it a plugin."""
    file = Path(inspect.getfile(hwbpd_pdq)).parents[1] / "pyproject.toml"
    lines = file.read_text(encoding="utf-8").splitlines()
    return code(lines[lines.index("[project]") :])


def hooks() -> list[str]:
    """Its profiles and its hook."""
    lines = inspect.getsource(hwbpd_pdq).splitlines()
    return code(lines[lines.index("from hwbpd_pdq.fit import PdqBackend") :])


def picture_of_control() -> list[str]:
    return picture(control.FIELDS, reserved=control.FIXED_ONE)


def plan_move() -> list[str]:
    """What it takes to move a watchpoint whose registers are locked while it is armed."""
    backend = PdqBackend(hwbpd_pdq.PROFILES["pdq1"])
    unit, slot = PdqDebugUnit(3), (Pool.DATA, 0)
    file = unit.reset()
    lines = []
    for span in (Span(0x1008, 8), Span(0x2000, 3)):
        (piece,) = backend.fit(span, Access.WRITE, Mode()).pieces
        writes = unit.plan(file, {slot: Armed(piece)})
        lines += [f"mem:{span.address:#x}/{span.length_bytes}:w", *write_lines(writes, _fields_of)]
        for write in writes:
            file = unit.write(file, write.register, write.value)
    return code(lines)


def _fields_of(register: str) -> Fields:
    return control.FIELDS if register == "DCTL" else ()


BLOCKS = (project, hooks, picture_of_control, plan_move)
