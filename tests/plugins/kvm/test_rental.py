"""The rules of the game, each on the smallest history that shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hwbpd_kvm.rental import Bill, Interval, Terms, bill

TERMS = Terms(trap=10, switch=3)


class Stubborn:
    """Switches at the n-th trap, stays for so many intervals, and remembers what it is told."""

    def __init__(self, at: int, stay: int) -> None:
        self._at, self._stay, self._left = at, stay, 0
        self.told: list[str] = []

    def switch_now(self) -> bool:
        self._at -= 1
        self._left = self._stay
        self.told.append("trap")
        return self._at <= 0

    def keep_switching(self, changed: bool) -> bool:
        self._left -= 1
        self.told.append("changed" if changed else "unchanged")
        return self._left >= 0

    def interval_trapped(self) -> None:
        self.told.append("trapped")


@pytest.mark.parametrize(
    ("policy", "history", "expected"),
    [
        (lambda: Stubborn(99, 0), [Interval(3), Interval(0), Interval(1)], Bill(4, 0, 0, 40)),
        (lambda: Stubborn(2, 0), [Interval(3), Interval(1)], Bill(3, 2, 0, 36)),
        (lambda: Stubborn(1, 1), [Interval(1), Interval(9), Interval(1)], Bill(2, 3, 0, 29)),
        (lambda: Stubborn(1, 9), [Interval(0), Interval(0)], Bill(0, 0, 0, 0)),
    ],
    ids=["always traps", "switches late", "stays for one", "has nothing to leave trapping at"],
)
def test_a_history_costs_its_traps_and_its_switched_intervals(
    policy: Callable[[], Stubborn], history: list[Interval], expected: Bill
) -> None:
    assert bill(policy(), history, TERMS) == expected


def test_a_forced_interval_is_neither_paid_nor_told() -> None:
    # Given somebody who switches at the first trap and stays for one interval,
    policy = Stubborn(1, 1)

    # when forced intervals with accesses lie in between,
    forced = Interval(5, forced=True)
    found = bill(policy, [forced, Interval(1), forced, Interval(0), forced, Interval(1)], TERMS)

    # then the history is the one without them,
    assert found == Bill(2, 3, 3, 29)
    # and nobody has heard of them.
    assert policy.told == ["trap", "unchanged", "unchanged", "trap", "unchanged"]


def test_a_policy_sees_traps_and_changes_and_nothing_else() -> None:
    # Given one that switches at the first trap and stays for three intervals,
    policy = Stubborn(1, 3)

    # when the guest writes something else, writes the same again, and reads,
    bill(policy, [Interval(2), Interval(4, changes=False), Interval(0), Interval(1)], TERMS)

    # then only what is different afterwards is told.
    assert policy.told == ["trap", "changed", "unchanged", "unchanged", "changed"]
