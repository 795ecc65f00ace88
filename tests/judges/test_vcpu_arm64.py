"""What the judge of an arm64 vCPU expects, on cases made by hand; the vCPU itself is asked by ``make vcpu-arm64``."""

from __future__ import annotations

import random

import pytest

from hwbpd.core.model import Access
from hwbpd.debug_unit import MemoryAccess
from tests.judges.vcpu_arm64 import CODE, DATA, NOP, REGISTERS, STORES, Case, Done, Model, Stop, draw

EL1 = 1 << 1
BREAKPOINT = 1 | EL1 | 0xF << 5
STORE_OF_LAST_BYTES = 1 | EL1 | 2 << 3 | 0xC0 << 5  # bytes 6 and 7

PROGRAM = (Done(NOP, 0, None), Done(STORES[8], DATA, MemoryAccess(Access.WRITE, DATA, 8, kernel=True)))


def case(
    *, steps: bool = False, bcr: dict[int, int] | None = None, wcr: dict[int, int] | None = None, last: int = 2
) -> Case:
    """Breakpoints on the instruction with number ``last``, watchpoints on the data; controls by register."""
    controls = [tuple((given or {}).get(n, 0) for n in range(REGISTERS)) for given in (bcr, wcr)]
    at, data = (CODE + 4 * last,) * REGISTERS, (DATA,) * REGISTERS
    return Case(steps, controls[0], at, controls[1], data, PROGRAM)


@pytest.mark.parametrize(
    ("what", "stop"),
    [
        (case(), Stop("end", CODE + 8)),
        (case(bcr={5: BREAKPOINT}), Stop("breakpoint", CODE + 8)),
        (case(bcr={6: BREAKPOINT}), Stop("end", CODE + 8)),  # there are six
        (case(bcr={0: BREAKPOINT & ~1}), Stop("end", CODE + 8)),
        (case(bcr={0: BREAKPOINT ^ EL1 | 2 << 1}), Stop("end", CODE + 8)),  # for EL0
        (case(wcr={3: STORE_OF_LAST_BYTES}), Stop("watchpoint", CODE + 4, DATA + 6, True)),
        (case(wcr={4: STORE_OF_LAST_BYTES}), Stop("end", CODE + 8)),  # there are four
        (case(wcr={3: STORE_OF_LAST_BYTES ^ 3 << 3}), Stop("end", CODE + 8)),  # for loads
        (case(steps=True), Stop("step", CODE + 4)),
        (case(steps=True, bcr={0: BREAKPOINT}, last=0), Stop("breakpoint", CODE)),
        (case(steps=True, bcr={0: BREAKPOINT}, last=1), Stop("step", CODE + 4)),
    ],
)
def test_what_stops_the_guest_first(what: Case, stop: Stop) -> None:
    assert Model(6, 4).expected(what) == stop


def test_only_the_address_in_far_is_at_liberty_and_only_as_far_as_something_is_watched() -> None:
    # Given a store of eight bytes, the one before the last of which is watched,
    model, what = Model(6, 4), case(wcr={0: STORE_OF_LAST_BYTES & ~(0x80 << 5)})
    expected = model.expected(what)
    # then FAR may be any of its bytes up to the watched one, and nothing else may differ.
    allowed = [n for n in range(-1, 9) if model.allows(what, expected, expected._replace(address=DATA + n))]
    assert allowed == list(range(7))
    assert not model.allows(what, expected, expected._replace(is_write=False))
    assert not model.allows(what, expected, expected._replace(pc=CODE))


def test_every_kind_of_stop_is_drawn() -> None:
    # When so many cases are drawn as a short run has, then each kind of stop is among what is expected.
    model = Model(6, 4)
    met = {model.expected(draw(random.Random(f"7 {n}"))).what for n in range(200)}
    assert met == {"breakpoint", "watchpoint", "step", "end"}
