"""The kernel's own nine test cases, on the rule of admission."""

from __future__ import annotations

import pytest

from hwbpd.core.admission import fits
from hwbpd.core.books import Books
from hwbpd.core.errors import NoFreeSlot
from hwbpd.core.model import Plan, Pool
from tests import kunit, strategies

TASKS = {role: strategies.task(number) for number, role in enumerate(kunit.ROLES)}
MACHINES = {
    "x86": ({Pool.ANY: 4}, Pool.ANY),
    "Arm's breakpoints": ({Pool.INST: 6, Pool.DATA: 4}, Pool.INST),
    "Arm's watchpoints": ({Pool.INST: 6, Pool.DATA: 4}, Pool.DATA),
    "the fewest slots for which every case has steps": ({Pool.ANY: 3}, Pool.ANY),
    "one slot": ({Pool.ANY: 1}, Pool.ANY),
}


@pytest.mark.parametrize("online", [(0, 1), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", kunit.CASES)
def test_the_rule_decides_every_step_as_the_kernel_does(case: str, machine: str, online: tuple[int, ...]) -> None:
    slots, pool = MACHINES[machine]
    books = Books(slots, range(6), online)
    empty = books.dump()
    taken: list[int] = []

    for step in kunit.steps(case, slots[pool], len(online)):
        match step:
            case kunit.Ask(where, admitted):
                target = where.target(TASKS, online)
                plan = Plan((strategies.piece(pool),))
                if not admitted:
                    with pytest.raises(NoFreeSlot):
                        fits(books, target, plan)
                    continue
                fits(books, target, plan)
                taken.append(len(taken))
                books.take(strategies.resource(taken[-1], target, pool))
            case kunit.Delete(nth):
                books.give_back(taken[nth])

    for resource_id in list(books.resources):
        books.give_back(resource_id)
    assert books.dump() == empty


def test_the_table_has_all_nine_cases_and_each_asks_for_what_must_be_refused() -> None:
    assert len(kunit.CASES) == 9

    for case in kunit.CASES:
        asked = [step.admitted for step in kunit.steps(case, 4, 2) if isinstance(step, kunit.Ask)]
        assert True in asked
        assert False in asked
