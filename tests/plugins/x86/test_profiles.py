"""CPUs by name: each makes a backend and registers, and they differ where the table says so."""

from __future__ import annotations

import pytest

from hwbpd.core.model import Access, Mode, Span
from hwbpd.plugins import Plugins
from hwbpd_x86 import dr6, dr7
from hwbpd_x86.fit import X86Backend
from hwbpd_x86.linux import USER_TOP, USER_TOP_32, USER_TOP_LA57, kernel_of
from hwbpd_x86.profiles import PROFILES, TABLE


def test_the_daemon_finds_them() -> None:
    factory = Plugins().backends["x86"]
    assert factory.profiles == PROFILES
    assert {facts.architecture for facts in PROFILES.values()} <= factory.architectures


@pytest.mark.parametrize("name", PROFILES)
def test_each_says_what_it_stands_for_and_has_registers(name: str) -> None:
    assert TABLE[name].stands_for
    backend = X86Backend(PROFILES[name])
    unit = backend.debug_unit()
    assert unit.slots() == backend.slots()
    file = unit.reset()
    assert (file["DR6"], file["DR7"]) == (dr6.RESET, dr7.RESET)


@pytest.mark.parametrize(
    ("name", "longest", "rtm", "bus_lock", "user_top"),
    [
        ("i686", 4, False, False, USER_TOP_32),
        ("x86-64", 8, False, False, USER_TOP),
        ("haswell", 8, True, False, USER_TOP),
        ("ice-lake", 8, True, False, USER_TOP_LA57),
        ("sapphire-rapids", 8, True, True, USER_TOP_LA57),
        ("bulldozer", 2**32, False, False, USER_TOP),
        ("zen4", 2**32, False, False, USER_TOP_LA57),
        ("zen5", 2**32, False, True, USER_TOP_LA57),
    ],
)
def test_they_differ_in_what_decides(name: str, longest: int, rtm: bool, bus_lock: bool, user_top: int) -> None:
    backend = X86Backend(PROFILES[name])
    unit = backend.debug_unit()

    assert len(backend.fit(Span(0, longest), Access.WRITE, Mode()).pieces) == 1
    file = unit.write(unit.write(unit.reset(), "DR6", 0), "DR7", 1 << 11)
    told = dr6.decode(file["DR6"])
    assert (told.transaction, told.bus_lock) == (rtm, bus_lock), "zero means that it happened, where it can"
    assert dr7.decode(file["DR7"]).transactions == rtm
    assert kernel_of(PROFILES[name]).user_top == user_top
    assert ("DR0_ADDR_MASK" in file) == (longest > 8)
