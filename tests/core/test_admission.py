"""
The rule of admission against ``slow_model``: at random, and in every state of every small world.

Given a history of claims and releases, when the same is asked of both, then both say the same; a refusal has changed
nothing, and those it names are those in the way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given

from hwbpd.core.admission import fits, full_places, refused_by_the_kernel
from hwbpd.core.books import Books
from hwbpd.core.errors import CpuOffline, NoFreeSlot
from hwbpd.core.model import Claim, Delivery, Mode, Plan, Pool, Process, Resource, Target, Task
from tests import slow_model, strategies
from tests.slow_model import Answer, SlowBooks
from tests.strategies import GiveBack, History, Take, World


class Pair:
    """The real books and the slow ones, of one world, doing the same."""

    def __init__(self, world: World) -> None:
        self.real = Books(world.slots, world.possible, world.online, world.slots_on)
        self.slow = SlowBooks(world.slots, world.possible, world.online, world.slots_on)
        self.claims: dict[int, list[int]] = {}  # claim -> its resources
        self.refusal: NoFreeSlot | None = None  # the last
        self._next_claim = 1
        self._next_resource = 1

    def ask(self, target: Target, plan: Plan) -> Answer:
        """Ask both; they agree, and asking has changed nothing."""
        before = self.real.dump()
        try:
            fits(self.real, target, plan)
            answer = Answer.FITS
        except NoFreeSlot as refusal:
            answer, self.refusal = Answer.FULL, refusal
        except CpuOffline:
            answer = Answer.OFFLINE
        assert answer == self.slow.ask(target, plan)
        assert self.real.dump() == before
        return answer

    def take(self, take: Take) -> Claim:
        """Hold what was asked for in both."""
        claim = strategies.claim(self._next_claim, take.owner, take.target)
        self._next_claim += 1
        ids = self.claims[claim.claim_id] = []
        for piece in take.plan.pieces:
            resource = Resource(self._next_resource, piece, take.target, Mode(delivery=Delivery.COUNT))
            self._next_resource += 1
            self.real.take(resource, claim)
            self.slow.take(resource)
            ids.append(resource.resource_id)
        return claim

    def give_back(self, claim_id: int) -> None:
        for resource_id in self.claims.pop(claim_id):
            self.real.give_back(resource_id)
            self.slow.give_back(resource_id)

    def play(self, history: History) -> None:
        """Do a whole history, each question asked of both."""
        for operation in history.operations:
            match operation:
                case GiveBack(nth):
                    if self.claims:
                        self.give_back(sorted(self.claims)[nth % len(self.claims)])
                case Take(_, target, plan):
                    if self.ask(target, plan) is Answer.FITS:
                        self.take(operation)


def one(pool: Pool = Pool.ANY, pieces: int = 1) -> Plan:
    return Plan((strategies.piece(pool),) * pieces)


@given(strategies.histories())
def test_at_random_it_agrees_with_the_slow_model_and_a_refusal_changes_nothing(history: History) -> None:
    pair = Pair(history.world)

    pair.play(history)


@given(strategies.histories())
def test_a_machine_that_got_everything_back_is_as_new(history: History) -> None:
    pair = Pair(history.world)
    pair.play(history)

    for claim_id in list(pair.claims):
        pair.give_back(claim_id)

    assert pair.real.dump() == Pair(history.world).real.dump()


# --- every small world -----------------------------------------------------------------------------------------------

SMALL_WORLDS = {
    "1 slot, 2 CPUs, 3 tasks": World({Pool.ANY: 1}, (0, 1), (0, 1), tuple(map(strategies.task, range(3)))),
    "2 slots, 2 CPUs, 2 tasks": World({Pool.ANY: 2}, (0, 1), (0, 1), tuple(map(strategies.task, range(2)))),
    "3 slots, 2 CPUs, 1 task": World({Pool.ANY: 3}, (0, 1), (0, 1), (strategies.task(0),)),
    "2 slots, 2 CPUs of which 1 is online, 2 tasks": World(
        {Pool.ANY: 2}, (0, 1), (1,), tuple(map(strategies.task, range(2)))
    ),
    "1 slot in each of 2 pools, 2 CPUs, 1 task": World(
        {Pool.INST: 1, Pool.DATA: 1}, (0, 1), (0, 1), (strategies.task(0),)
    ),
    "2 slots on one CPU and 1 on the other, 2 tasks": World(
        {Pool.ANY: 2}, (0, 1), (0, 1), tuple(map(strategies.task, range(2))), {1: {Pool.ANY: 1}}
    ),
    "3 slots on one CPU, and 1 on one that is offline, 1 task": World(
        {Pool.ANY: 1}, (0, 1), (0,), (strategies.task(0),), {0: {Pool.ANY: 3}}
    ),
}


def place_of(whose: Task | Process | None, cpu: int) -> str:
    """How a refusal names the place of an event."""
    match whose:
        case None:
            return f"cpu-wide on cpu {cpu}"
        case Process():
            return f"on pid {whose.pid}"
        case Task():
            return f"on tid {whose.tid}"


def every_request(world: World) -> Iterator[tuple[Target, Pool]]:
    """Every target there is, in every pool: each form, and each set of CPUs that exist."""
    sets: list[tuple[int, ...] | None] = [None, (0,), (1,), (0, 1)]
    assert world.possible == (0, 1)
    for pool in world.slots:
        for task in (None, *world.tasks):
            for cpus in sets:
                yield Target(task, cpus), pool
        for process in sorted({task.process for task in world.tasks if task.process}, key=lambda one: one.pid):
            yield Target(process=process), pool


def holding(world: World, requests: list[tuple[Target, Pool]], counts: Iterable[int]) -> Pair:
    """A new pair that has taken the n-th request ``counts[n]`` times."""
    pair = Pair(world)
    for (target, pool), count in zip(requests, counts, strict=True):
        for _ in range(count):
            pair.take(Take(strategies.owner(0), target, one(pool)))
    return pair


@pytest.mark.parametrize("name", SMALL_WORLDS)
def test_in_every_state_of_a_small_world_it_agrees_with_the_slow_model(name: str) -> None:
    """
    Histories of every length, not only to some depth: a state is what is held, and two things are shown for each.

    Every request is answered alike by both; and the books after any one take or release are the same as those of a
    fresh machine that took the result in another order. So how a state was reached never matters, and each state
    that can be reached at all is looked at.
    """
    world = SMALL_WORLDS[name]
    requests = list(every_request(world))
    empty = (0,) * len(requests)
    seen, to_visit = {empty}, [empty]
    while to_visit:
        state = to_visit.pop()
        pair = holding(world, requests, state)
        here = pair.real.dump()["pools"]
        for nth, (target, pool) in enumerate(requests):
            for pieces in (2, 1):
                answer = pair.ask(target, one(pool, pieces))
            if answer is not Answer.FITS:
                continue
            more = (*state[:nth], state[nth] + 1, *state[nth + 1 :])

            claim = pair.take(Take(strategies.owner(0), target, one(pool)))
            assert pair.real.dump()["pools"] == holding(world, requests, more).real.dump()["pools"]
            pair.give_back(claim.claim_id)
            assert pair.real.dump()["pools"] == here

            if more not in seen:
                seen.add(more)
                to_visit.append(more)
    assert len(seen) > len(requests)  # the world did fill up


# --- what a refusal says ---------------------------------------------------------------------------------------------


def refused_cpu(refusal: NoFreeSlot) -> int:
    """The CPU without room: the last that the sentence names before it counts."""
    return int(re.findall(r"cpu (\d+)", str(refusal).split(": ", maxsplit=1)[0])[-1])


def refused_pool(refusal: NoFreeSlot) -> Pool:
    """The pool without room: the sentence names it where a machine has more than one."""
    word = str(refusal).split(" slot on ", maxsplit=1)[0].removeprefix("no").strip()
    return Pool(word or Pool.ANY)


@given(strategies.histories(stray=False))
def test_the_holders_named_hold_what_the_refusal_says_on_the_place_refused(history: History) -> None:
    pair = Pair(history.world)
    owner_of: dict[int, int] = {}

    for operation in history.operations:
        if isinstance(operation, GiveBack):
            continue
        if pair.ask(operation.target, operation.plan) is Answer.FITS:
            owner_of[pair.take(operation).claim_id] = operation.owner.pid
            continue

        assert pair.refusal is not None
        cpu = refused_cpu(pair.refusal)
        for holder in pair.refusal.holders:
            on_place = 0
            for claim_id in holder.claim_ids:
                assert owner_of[claim_id] == holder.pid
                for event in (event for held in pair.claims[claim_id] for event in pair.slow.held[held]):
                    place = place_of(event.task, cpu)
                    counts_there = event.cpu in (cpu, slow_model.ANY_CPU) and event.pool is refused_pool(pair.refusal)
                    on_place += counts_there and holder.place == place
            assert holder.slots == on_place > 0


@given(strategies.histories(stray=False))
def test_when_those_named_give_back_the_place_refused_has_room(history: History) -> None:
    pair = Pair(history.world)

    for operation in history.operations:
        if isinstance(operation, GiveBack):
            continue
        too_many = any(
            sum(piece.pool is pool for piece in operation.plan.pieces) > history.world.has(cpu, pool)
            for pool in history.world.slots
            for cpu in history.world.possible
        )
        # A request on several CPUs may lack room on more than one, and one for a process on several of its threads;
        # each refusal names those of one place.
        threads = [task for task in history.world.tasks if task.process == operation.target.process is not None]
        refused_there: Counter[tuple[int, Pool]] = Counter()
        while pair.ask(operation.target, operation.plan) is Answer.FULL:
            assert pair.refusal is not None
            named = {claim_id for holder in pair.refusal.holders for claim_id in holder.claim_ids}
            if too_many and not named:
                break
            assert named, "a refusal that giving back could mend names nobody"
            cpu, pool = refused_cpu(pair.refusal), refused_pool(pair.refusal)
            for claim_id in named & pair.claims.keys():
                pair.give_back(claim_id)
            refused_there[cpu, pool] += 1
            if pair.ask(operation.target, operation.plan) is Answer.FULL and not too_many:
                place = refused_cpu(pair.refusal), refused_pool(pair.refusal)
                assert refused_there[place] <= len(threads), "a place had no room although those named had given back"
        else:
            pair.take(operation)


# --- the rules, one by one -------------------------------------------------------------------------------------------


def books(slots: int = 4, possible: tuple[int, ...] = (0, 1), online: tuple[int, ...] = (0, 1)) -> Books:
    return Books({Pool.ANY: slots}, possible, online)


def hold(held_in: Books, target: Target, count: int, owner: int = 0) -> list[int]:
    """Take ``count`` slots on ``target``, as they fit; return their ids."""
    ids = []
    for _ in range(count):
        resource_id = len(held_in.resources) + 1
        fits(held_in, target, one())
        taken = strategies.resource(resource_id, target, Pool.ANY)
        held_in.take(taken, strategies.claim(resource_id, strategies.owner(owner), target))
        ids.append(resource_id)
    return ids


T0, T1 = strategies.task(0), strategies.task(1)


def test_tasks_never_compete_with_each_other() -> None:
    held_in = books()

    for number in range(50):
        hold(held_in, Target(strategies.task(number)), 4)

    assert len(held_in.resources) == 200


def test_a_cpu_wide_claim_meets_the_most_demanding_task_wherever_that_runs() -> None:
    held_in = books()
    hold(held_in, Target(T0), 1)
    hold(held_in, Target(T1), 3)

    hold(held_in, Target(cpus=(1,)), 1)

    with pytest.raises(NoFreeSlot, match=r"^no slot on cpu 1: 4 of 4 held"):
        fits(held_in, Target(cpus=(1,)), one())


def test_a_claim_on_several_cpus_fits_only_as_a_whole() -> None:
    held_in = books()
    hold(held_in, Target(cpus=(1,)), 4)

    for target in (Target(), Target(cpus=(0, 1)), Target(T0), Target(T0, (0, 1))):
        with pytest.raises(NoFreeSlot, match="cpu 1"):
            fits(held_in, target, one())

    fits(held_in, Target(T0, (0,)), one())


def test_a_plan_of_several_pieces_fits_only_as_a_whole() -> None:
    held_in = books()
    hold(held_in, Target(T0), 3)

    with pytest.raises(NoFreeSlot, match="3 of 4 held, 2 wanted"):
        fits(held_in, Target(T0), one(pieces=2))

    fits(held_in, Target(T0), one())


def test_more_pieces_than_slots_are_refused_on_an_empty_machine_and_nobody_is_blamed() -> None:
    with pytest.raises(NoFreeSlot) as refused:
        fits(books(slots=4), Target(T0), one(pieces=5))

    assert refused.value.holders == ()
    assert "0 of 4 held, 5 wanted" in str(refused.value)


def test_pools_do_not_meet() -> None:
    held_in = Books({Pool.INST: 1, Pool.DATA: 1}, (0,), (0,))
    held_in.take(strategies.resource(1, Target(T0), Pool.INST))

    fits(held_in, Target(T0), one(Pool.DATA))

    with pytest.raises(NoFreeSlot, match=r"^no inst slot on "):
        fits(held_in, Target(T0), one(Pool.INST))


@pytest.mark.parametrize(("cpu", "why"), [(1, "cpu 1 is offline"), (2, "no cpu 2")])
def test_nothing_is_armed_cpu_wide_where_there_is_no_running_cpu(cpu: int, why: str) -> None:
    with pytest.raises(CpuOffline, match=why):
        fits(books(possible=(0, 1), online=(0,)), Target(cpus=(0, cpu)), one())


def test_a_task_may_be_bound_to_a_cpu_that_is_offline_but_not_to_one_that_does_not_exist() -> None:
    held_in = books(possible=(0, 1), online=(0,))

    hold(held_in, Target(T0, (1,)), 4)

    with pytest.raises(NoFreeSlot, match="cpu 1"):  # possible CPUs count for a task that may run anywhere
        fits(held_in, Target(T0), one())
    with pytest.raises(CpuOffline, match="no cpu 2"):
        fits(held_in, Target(T0, (2,)), one())


def test_a_refusal_names_each_owner_with_its_slots_and_claims() -> None:
    held_in = books()
    wide = hold(held_in, Target(cpus=(1,)), 1, owner=0)
    bound = hold(held_in, Target(T0, (1,)), 2, owner=1)
    anywhere = hold(held_in, Target(T0), 1, owner=2)
    hold(held_in, Target(T0, (0,)), 1, owner=3)  # neither this
    hold(held_in, Target(T1), 3, owner=3)  # nor this is in the way of T0 on CPU 1

    with pytest.raises(NoFreeSlot) as refused:
        fits(held_in, Target(T0, (1,)), one())

    named = {(holder.pid, holder.slots, holder.claim_ids) for holder in refused.value.holders}
    assert named == {(100, 1, tuple(wide)), (101, 2, tuple(bound)), (102, 1, tuple(anywhere))}
    assert all(str(holder) in str(refused.value) for holder in refused.value.holders)


def test_of_many_tasks_in_the_way_a_refusal_names_some_and_counts_the_others() -> None:
    held_in = books()
    tasks = [Task(number, 0) for number in range(1, 1001)]
    for number, task in enumerate(tasks):
        for slot in range(4):
            resource_id = 4 * number + slot
            target = Target(task)
            claim = strategies.claim(resource_id, strategies.owner(number), target)
            held_in.take(strategies.resource(resource_id, target, Pool.ANY), claim)

    with pytest.raises(NoFreeSlot) as refused:
        fits(held_in, Target(cpus=(0,)), one())

    named = len(refused.value.holders)
    assert 0 < named < 100
    assert f"and {1000 - named} more tasks" in str(refused.value)


@pytest.mark.parametrize(
    ("cpu_wide", "bound", "fullest"),
    [((1, 2), (1, 1), 1), ((0, 2), (0, 3), 0), ((3, 0), (1, 1), 0), ((0, 0), (0, 2), 0)],
)
def test_a_kernel_that_refuses_somewhere_is_said_to_have_done_so_where_most_is_held(
    cpu_wide: tuple[int, int], bound: tuple[int, int], fullest: int
) -> None:
    # given CPU-wide slots on both CPUs, and those of a task bound to one of them
    held_in = books()
    for cpu, count in enumerate(cpu_wide):
        hold(held_in, Target(cpus=(cpu,)), count)
    hold(held_in, Target(T0, (bound[0],)), bound[1])

    # when the kernel refuses what would fit, and does not say where, then the fullest CPU is named
    for target in (Target(), Target(T0)):
        assert refused_cpu(refused_by_the_kernel(held_in, target, one(), None, ())) == fullest


def test_no_place_is_called_full_where_there_is_room() -> None:
    # given two claims for all CPUs of which one has not come back to CPU 0, and one more on CPU 2
    held_in = books(possible=(0, 1, 2, 3), online=(0, 1, 2, 3))
    hold(held_in, Target(), 2)
    held_in.leave(1, 0)
    hold(held_in, Target(cpus=(2,)), 1)

    # when three slots more are too many for a thread on all CPUs but that one
    full = list(full_places(held_in.pools[Pool.ANY], Target(T0), 3))

    # then that one is not among them, and a place is there for the others
    assert {cpu for cpu, _ in full} >= {2}
    assert 0 not in {cpu for cpu, _ in full}


def test_books_of_a_machine_that_got_everything_back_keep_nothing() -> None:
    held_in = books()
    everybody = (Target(T0), Target(process=T1.process), Target(), Target(T0, (1,)))
    ids = [taken for target in everybody for taken in hold(held_in, target, 1)]

    for resource_id in ids:
        held_in.give_back(resource_id)

    kept = {name: value for name, value in vars(held_in).items() if isinstance(value, dict) and name != "pools"}
    assert not any(of for name, of in kept.items() if name not in ("claims", "ended", "sessions")), kept
