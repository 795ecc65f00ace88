"""
The judge is judged: on a kernel in memory that can lie or serve somebody else, and a short run on the real one.

A judge that has never found anything proves nothing, so each of its three verdicts is provoked.
"""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from hwbpd.core import admission
from hwbpd.core.books import Books
from hwbpd.core.model import Plan, Pool, Target, Task
from tests.host import exclusive
from tests.judges import oracle
from tests.judges.opener import KernelOpener, Opener
from tests.judges.oracle import Oracle, judge
from tests.judges.sleepers import sleepers
from tests.slow_model import Event, SlowBooks

SOMEBODY = 99  # a thread that is not among the oracle's
TIDS = (11, 12, 21, 22)


class FakeKernel:
    """A kernel in memory, of two CPUs. It can give one false answer, and let somebody else take a slot."""

    def __init__(
        self, lie_at: int = 0, others: dict[int, int] | None = None, slots: Mapping[Pool, int] = oracle.X86_SLOTS
    ) -> None:
        self.rule = SlowBooks(slots, (0, 1), (0, 1))
        self.lie_at = lie_at  # the number of the question, from 1; probes are questions too
        self.others = others or {}  # question -> how many events somebody else has from then on
        self.asked = 0
        self.lied = False
        self.held: dict[int, Event] = {}
        self._others: list[Event] = []

    def open(self, tid: int, cpu: int, pool: Pool = Pool.ANY) -> int:
        self.asked += 1
        if self.asked in self.others:
            self._others = [Event(Task(SOMEBODY, 0), -1, Pool.ANY)] * self.others[self.asked]
        event = Event(None if tid == -1 else Task(tid, 0), cpu, pool)
        admitted = self.rule.admits(event, [*self.held.values(), *self._others])
        if self.asked == self.lie_at:
            self.lied = True
            admitted = not admitted
        if not admitted:
            raise OSError(errno.ENOSPC, "no room")
        self.held[self.asked] = event
        return self.asked

    def close(self, held: int) -> None:
        del self.held[held]


def run(kernel: Opener, operations: int, seed: int = 7, reserve: int = 1) -> int:
    return judge(Oracle(kernel, TIDS, (0, 1), (0, 1), seed, reserve), operations)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def first_claim() -> int:
    """How many questions the first look for others takes: the next one is the first claim's."""
    kernel = FakeKernel()
    judged = Oracle(kernel, TIDS, (0, 1), (0, 1), seed=7)
    judged.run(0)
    assert kernel.asked % 2 == 0  # it has looked twice: at the start and at the end
    return kernel.asked // 2 + 1


def test_a_kernel_that_agrees_passes_with_every_kind_admitted_and_refused(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel()

    status = run(kernel, operations=3000)

    said = re.fullmatch(r"operations=3000 admitted=(\d+) refused=(\d+) policy=(\d+) differences=0", last_line(capsys))
    assert status == 0
    assert said is not None
    assert 0 < int(said[1]) + int(said[2]) + int(said[3]) < 3000
    assert kernel.held == {}


@pytest.mark.parametrize("reserve", [0, 1, 2, 3, 9])
def test_what_only_the_policy_refuses_is_counted_apart(reserve: int, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel()

    status = run(kernel, operations=3000, reserve=reserve)

    *table, last = capsys.readouterr().out.splitlines()
    said = re.fullmatch(r"operations=3000 admitted=(\d+) refused=(\d+) policy=(\d+) differences=0", last)
    assert status == 0
    assert said is not None
    admitted, refused, policy = map(int, said.groups())
    columns = [list(map(int, re.findall(r" (\d+)(?= |$)", line))) for line in table[1:]]
    assert [sum(column) for column in zip(*columns, strict=True)] == [admitted + refused, admitted, refused, policy]
    assert (policy > 0) == (reserve > 0)
    assert kernel.held == {}


@pytest.mark.parametrize("wrong_by", [-1, 1])
def test_a_reserve_that_is_one_too_large_or_too_small_is_a_difference(
    wrong_by: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(books: Books, target: Target, plan: Plan, reserve: int) -> None:
        admission.check_reserve(books, target, plan, reserve + wrong_by)

    monkeypatch.setattr(oracle, "check_reserve", wrong)
    kernel = FakeKernel()

    status = run(kernel, operations=3000)

    *before, last = capsys.readouterr().out.splitlines()
    assert status == 1
    assert last.endswith("differences=1")
    said = "leaves" if wrong_by < 0 else "does not leave"
    assert before[-1].endswith(f"{said} 1 free by the policy, and the kernel differs")
    assert kernel.held == {}


def test_one_false_answer_is_a_difference_with_its_history(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel(lie_at=first_claim())

    status = run(kernel, operations=3000)

    *before, last = capsys.readouterr().out.splitlines()
    assert status == 1
    assert re.fullmatch(r"operations=1 admitted=0 refused=1 policy=0 differences=1", last)
    assert re.fullmatch(r"1: claim .*: admitted by fits\(\), refused by the kernel", before[-1])
    assert kernel.held == {}


@pytest.mark.parametrize("lie_at", range(200, 260))
def test_no_false_answer_to_a_claim_of_one_slot_or_to_a_probe_ever_passes(
    lie_at: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A claim of several events may be refused for the second as well, when the first refusal was the lie.
    monkeypatch.setattr(oracle, "KINDS", oracle.KERNEL_KINDS)
    kernel = FakeKernel(lie_at)

    status = run(kernel, operations=300)

    assert kernel.lied
    last = last_line(capsys)
    if status == 1:
        assert last.endswith("differences=1")
    else:  # a lie to a probe looks like a slot that somebody else has taken, or given back
        assert status == 2
        assert last.startswith("no verdict: somebody else uses breakpoints")
    assert kernel.held == {}


@pytest.mark.parametrize(
    "others",
    [{1: 1}, {700: 1}, {700: 4}, {700: 4, 900: 0}],
    ids=["from the start", "one slot from the middle on", "every slot", "every slot for a while"],
)
def test_somebody_elses_slots_end_without_a_verdict(
    others: dict[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = FakeKernel(others=others)

    status = run(kernel, operations=3000)

    assert status == 2
    assert last_line(capsys).startswith("no verdict: somebody else uses breakpoints")
    assert kernel.held == {}


def test_a_refusal_that_somebody_else_explains_is_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel(others={first_claim(): oracle.SLOTS})  # all slots, after the look at the start

    status = run(kernel, operations=3000)

    assert status == 2
    assert last_line(capsys).startswith("no verdict: somebody else uses breakpoints")


def test_a_kernel_that_fails_in_another_way_ends_without_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    class Dead(FakeKernel):
        def open(self, tid: int, cpu: int, pool: Pool = Pool.ANY) -> int:
            raise OSError(errno.ESRCH, "no such thread")

    status = run(Dead(), operations=10)

    assert status == 2
    assert last_line(capsys) == "no verdict: the kernel did not answer the question: no such thread"


def test_a_run_that_asked_too_little_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(FakeKernel(), operations=3)

    assert status == 2
    assert last_line(capsys).startswith("no verdict: only ")


TWO_POOLS = {Pool.INST: 6, Pool.DATA: 4}


def run_arm(kernel: Opener, slots: Mapping[Pool, int] = TWO_POOLS) -> int:
    return judge(Oracle(kernel, TIDS, (0, 1), (0, 1), seed=7, reserve=1, slots=slots), 3000)


def test_two_pools_are_judged_apart(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel(slots=TWO_POOLS)

    status = run_arm(kernel)

    assert status == 0
    assert last_line(capsys).endswith("differences=0")
    assert kernel.held == {}


@pytest.mark.parametrize("pool", TWO_POOLS)
def test_a_pool_with_a_slot_more_than_was_thought_is_noticed(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    status = run_arm(FakeKernel(slots={**TWO_POOLS, pool: TWO_POOLS[pool] + 1}))

    assert status == 2
    assert re.match(rf"no verdict: .* slots free on cpu 0 \({pool}\)", last_line(capsys))


def test_the_same_seed_asks_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for seed in (7, 7, 8):
        run(FakeKernel(), operations=1500, seed=seed)
        tables.append(capsys.readouterr().out)

    assert tables[0] == tables[1] != tables[2]


# --- the running kernel ----------------------------------------------------------------------------------------------

known = pytest.mark.skipif(
    "__import__('platform').machine() not in ('x86_64', 'aarch64')", reason="the oracle knows 64-bit x86 and Arm only"
)


@pytest.mark.hardware
@known
def test_the_running_kernel_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    status = oracle.main(["--operations", "20000", "--seed", "7"])

    output = capsys.readouterr().out
    assert status == 0, output
    assert output.startswith("seed=7 ")
    assert re.fullmatch(r"operations=20000 admitted=\d+ refused=\d+ policy=\d+ differences=0", output.splitlines()[-1])


FOREIGN = """
import sys
from tests.judges.opener import KernelOpener
opener = KernelOpener()
held = opener.open(-1, int(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


class Visited:
    """The running kernel, on which another process takes one slot while we are asking."""

    def __init__(self, visit_at: int, cpu: int) -> None:
        self.kernel = KernelOpener()
        self.asked = 0
        self.visit_at = visit_at
        self.cpu = cpu
        self.visitor: subprocess.Popen[bytes] | None = None

    def open(self, tid: int, cpu: int, pool: Pool = Pool.ANY) -> int:
        self.asked += 1
        if self.asked >= self.visit_at and self.visitor is None:
            self._let_in()
        return self.kernel.open(tid, cpu, pool)

    def _let_in(self) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", FOREIGN, str(self.cpu)]
        visitor = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert visitor.stdout is not None
        if visitor.stdout.readline() == b"held\n":
            self.visitor = visitor
        else:
            visitor.communicate()  # the oracle itself had every slot just then; at the next question again

    def close(self, held: int) -> None:
        self.kernel.close(held)


@pytest.mark.hardware
@known
def test_a_slot_that_another_process_takes_meanwhile_ends_without_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    online = oracle.cpu_list(oracle.CPUS / "online")
    possible = oracle.cpu_list(oracle.CPUS / "possible")
    with exclusive(), sleepers() as tids:
        kernel = Visited(visit_at=500, cpu=online[-1])
        try:
            status = judge(Oracle(kernel, tids, possible, online, seed=7, slots=oracle.slots_here()), 5000)
        finally:
            if kernel.visitor is not None:
                kernel.visitor.communicate()

    assert kernel.visitor is not None
    assert status == 2
    assert last_line(capsys).startswith("no verdict: somebody else uses breakpoints")
