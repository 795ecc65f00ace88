"""
What the smallest things cost, by CPU, each with where the figure comes from and how well it is known.

Prices go by direction: reading a register and writing it differ (8 and 5 cycles on a D01), and what is cheap on bare
metal is not so one level down, where each access may be an exit. A list says so in ``grade``, figure by figure:

- MEASURED: by us or by whoever calibrated this host; says where.
- PUBLISHED: in a thread or a commit message, named by its title, and read there.
- REPORTED: attributed to a paper, named by its title, and not read there. Look it up before anything hangs on it.
- ASSUMED: nobody has published it. Chosen by the reason given, and nothing should hang on it; ``with_price`` lets a
  reader put in another and look whether anything does.

What is priced is what a debug-register strategy adds. A guest that exits for other reasons pays for these exits under
any strategy, so ``exit`` is not in a bill; it is kept because bills are read beside it.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from hwbpd_kvm.actions import Action, Kind


class Tally(NamedTuple):
    """How many of each kind of action."""

    reads: int = 0
    writes: int = 0
    toggles: int = 0  # of trapping, on or off
    looks: int = 0
    traps: int = 0
    host_traps: int = 0

    @property
    def accesses(self) -> int:
        """Register accesses of the hypervisor, in both directions."""
        return self.reads + self.writes


_COLUMN = {
    Kind.READ: 0,
    Kind.WRITE: 1,
    Kind.TRAPS_ON: 2,
    Kind.TRAPS_OFF: 2,
    Kind.LOOK: 3,
    Kind.TRAP: 4,
    Kind.HOST_TRAP: 5,
}


def tally(actions: Iterable[Action]) -> Tally:
    """Return how many there are of each kind."""
    counts = [0] * len(Tally._fields)
    for action in actions:
        counts[_COLUMN[action.kind]] += 1
    return Tally(*counts)


def total(tallies: Iterable[Tally]) -> Tally:
    """Return the sum."""
    return Tally(*map(sum, zip(Tally(), *tallies, strict=True)))


class Grade(enum.Enum):
    """How well a figure is known."""

    MEASURED = "measured"
    PUBLISHED = "published"
    REPORTED = "reported"
    ASSUMED = "assumed"


class Price(NamedTuple):
    """What one of something costs."""

    amount: float
    grade: Grade
    source: str


class PriceList(Struct, frozen=True, dict=True):
    """
    The prices of one kind of CPU, all in one unit.

    ``trap``: an access by the guest that traps: out of the guest, emulated, and back in. ``host_trap`` the same for one
    of the host's, where a hypervisor is below the host. ``toggle``: trapping switched on or off for the next entry.
    ``look``: a word of memory, read to decide. ``exit``: any exit that the kernel handles itself, and the entry after.
    """

    name: str
    architecture: str  # "armv7", "arm64" or "x86", as strategies have it
    unit: str  # "cycles" or "ns"
    read: Price
    write: Price
    toggle: Price
    look: Price
    trap: Price
    host_trap: Price
    exit: Price

    @cached_property
    def _row(self) -> tuple[float, ...]:
        """In the order of ``Tally``."""
        prices = (self.read, self.write, self.toggle, self.look, self.trap, self.host_trap)
        return tuple(price.amount for price in prices)

    def of(self, counts: Tally) -> float:
        """What so many of each cost."""
        return sum(count * amount for count, amount in zip(counts, self._row, strict=True))


PRICED = ("read", "write", "toggle", "look", "trap", "host_trap", "exit")


def with_price(prices: PriceList, **amounts: float) -> PriceList:
    """Return the list with other amounts for some of ``PRICED``, marked as assumed."""
    return replace(prices, **{name: Price(amount, Grade.ASSUMED, "put in") for name, amount in amounts.items()})


# --- lists -----------------------------------------------------------------------------------------------------------

_D01 = 'measured at EL1 and EL2 on a D01, in the thread "KVM: arm: implement dirty bit mechanism for debug registers"'
_KVM_ARM = (
    '"KVM/ARM: The Design and Implementation of the Linux ARM Hypervisor", cycle counts of a hypercall: Cortex-A15 with'
    " VGIC and timer"
)
_ARM_SERVER = '"ARM Virtualization: Performance and Architectural Implications", cycle counts of a hypercall'
_DR6 = (
    "half of what Avi Kivity's KVM commit saves that reloads DR6 only with the guest's debug registers: about 150"
    " cycles of an exit, for one read and one write"
)
_CACHED = "a word that is in the first-level cache"
_LIKE_A_WRITE = "one more system register is written"

D01 = PriceList(
    name="d01",
    architecture="armv7",
    unit="cycles",
    read=Price(8, Grade.PUBLISHED, _D01),
    write=Price(5, Grade.PUBLISHED, _D01),
    toggle=Price(5, Grade.ASSUMED, _LIKE_A_WRITE),
    look=Price(4, Grade.ASSUMED, _CACHED),
    trap=Price(5326, Grade.REPORTED, _KVM_ARM),
    host_trap=Price(5326, Grade.ASSUMED, "as for the guest's"),
    exit=Price(5326, Grade.REPORTED, _KVM_ARM),
)
ARM64 = PriceList(
    name="arm64",
    architecture="arm64",
    unit="cycles",
    read=Price(8, Grade.ASSUMED, "as on a D01"),
    write=Price(5, Grade.ASSUMED, "as on a D01"),
    toggle=Price(5, Grade.ASSUMED, _LIKE_A_WRITE),
    look=Price(4, Grade.ASSUMED, _CACHED),
    trap=Price(6500, Grade.REPORTED, f"{_ARM_SERVER}, KVM on ARM, before VHE"),
    host_trap=Price(6500, Grade.ASSUMED, "as for the guest's"),
    exit=Price(6500, Grade.REPORTED, f"{_ARM_SERVER}, KVM on ARM, before VHE"),
)
X86 = PriceList(
    name="x86",
    architecture="x86",
    unit="cycles",
    read=Price(75, Grade.ASSUMED, _DR6),
    write=Price(75, Grade.ASSUMED, _DR6),
    toggle=Price(75, Grade.ASSUMED, "one field of the VMCS is read and written; as a debug register"),
    look=Price(4, Grade.ASSUMED, _CACHED),
    trap=Price(1300, Grade.REPORTED, f"{_ARM_SERVER}, KVM on x86"),
    host_trap=Price(1300, Grade.ASSUMED, "as for the guest's"),
    exit=Price(1300, Grade.REPORTED, f"{_ARM_SERVER}, KVM on x86"),
)
_HERE = "on a virtual machine of 2.7 GHz whose kernel offers PVM, "
X86_VIRTUAL = PriceList(
    name="x86-virtual",
    architecture="x86",
    unit="cycles",
    read=Price(914, Grade.ASSUMED, "as a write"),
    write=Price(914, Grade.MEASURED, f"{_HERE}2.03 us more for KVM_RUN with a host breakpoint: six writes"),
    toggle=Price(914, Grade.ASSUMED, "as a write"),
    look=Price(4, Grade.ASSUMED, _CACHED),
    trap=Price(7425, Grade.ASSUMED, "as an exit"),
    host_trap=Price(7425, Grade.ASSUMED, "as an exit"),
    exit=Price(7425, Grade.MEASURED, f"{_HERE}2.75 us for CPUID in the guest"),
)
PRICE_LISTS: Mapping[str, PriceList] = {prices.name: prices for prices in (D01, ARM64, X86, X86_VIRTUAL)}


# --- calibrated ------------------------------------------------------------------------------------------------------

# The names in a file, which `hwbpctl kvm calibrate --json` writes.
_KEYS = {
    "read": "read_register",
    "write": "write_register",
    "toggle": "toggle_traps",
    "look": "look",
    "trap": "trap",
    "host_trap": "host_trap",
    "exit": "exit",
}
# What a calibration cannot always tell, and what stands in for it; in this order.
_STAND_IN = {"read": "write", "toggle": "write", "trap": "exit", "host_trap": "trap"}


def load(path: Path) -> PriceList:
    """
    Return the price list that a calibration has written.

    :raises ValueError: when the file is none; the sentence says what is missing or wrong.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a price list: {error}") from error
    try:
        return from_value(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_value(value: Any) -> PriceList:
    """
    Return the price list in a decoded ``{"name", "unit", "source", "prices": {...}}``; docs/kvm-traces.md has the keys.

    :raises ValueError: for anything else.
    """
    if not isinstance(value, dict) or not isinstance(value.get("prices"), dict):
        raise ValueError('a price list is an object with "name", "unit", "source" and "prices"')
    name, unit, source = (value.get(key, "") for key in ("name", "unit", "source"))
    if not all(isinstance(text, str) and text for text in (name, unit, source)):
        raise ValueError('"name", "unit" and "source" of a price list are texts, and not empty')
    if unit not in ("ns", "cycles"):
        raise ValueError(f'the unit of a price list is "ns" or "cycles", not {unit!r}')
    architecture = value.get("architecture", "x86")
    if architecture not in ("armv7", "arm64", "x86"):
        raise ValueError(f'the architecture of a price list is "armv7", "arm64" or "x86", not {architecture!r}')
    found: dict[str, Price] = {}
    for field, key in _KEYS.items():
        amount = value["prices"].get(key)
        if amount is None:
            continue
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
            raise ValueError(f'"{key}" is a number from 0 on, not {amount!r}')
        found[field] = Price(float(amount), Grade.MEASURED, source)
    for needed in ("write", "exit"):
        if needed not in found:
            raise ValueError(f'a price list needs "{_KEYS[needed]}"')
    # Where a trap or a switch costs nothing there is nothing to decide, and no bill is a multiple of nothing.
    for field in ("write", "exit", "trap"):
        if field in found and found[field].amount == 0:
            raise ValueError(f'"{_KEYS[field]}" cannot be free')
    for field, other in _STAND_IN.items():
        found.setdefault(field, Price(found[other].amount, Grade.ASSUMED, f"not measured; as {_KEYS[other]}"))
    found.setdefault("look", Price(0, Grade.ASSUMED, "not measured; left out"))
    return PriceList(name=name, architecture=architecture, unit=unit, **found)
