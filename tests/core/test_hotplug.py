"""
CPUs that come and go, in the arbiter: what is free meanwhile, who gets it back in which order, and who is told.

Claims of threads and processes are not concerned: their slots go where they go.
"""

from __future__ import annotations

import errno

import pytest

from hwbpd.core import invariants
from hwbpd.core.admission import fits
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import AddLeg, Arm, Change, DropLeg, Effect, Tell
from hwbpd.core.errors import CpuOffline, NoFreeSlot
from hwbpd.core.events import CpuCameOnline, CpuWentOffline, Disarmed, LegRefused, LegTaken
from hwbpd.core.model import Plan, Pool, Target, Totals
from tests import strategies
from tests.core.steps import ANN, BOB, LATE_NS, P0, SLOTS, T0, granted, new_arbiter, refused, release, request

EVERYWHERE = Target()
ON_0, ON_1, ON_BOTH = Target(cpus=(0,)), Target(cpus=(1,)), Target(cpus=(0, 1))
ONE = Plan((strategies.piece(Pool.ANY),))


def resource_id(arm: Arm) -> int:
    (resource,) = arm.resources
    return resource.resource_id


def held(arbiter: Arbiter) -> list[int]:
    """CPU-wide slots in the books on each CPU."""
    invariants.check(arbiter.books)
    return [arbiter.books.pools[Pool.ANY].held_cpu_wide(cpu) for cpu in sorted(arbiter.books.possible)]


def leaves(arbiter: Arbiter, cpu: int = 1) -> list[Effect]:
    return arbiter.step(CpuWentOffline(LATE_NS, cpu))


def comes(arbiter: Arbiter, cpu: int = 1, refuses: tuple[int, ...] = ()) -> list[Effect]:
    """Bring a CPU back, and let the machine arm what it is asked to, but for some resources; return all effects."""
    effects = arbiter.step(CpuCameOnline(LATE_NS, cpu))
    for effect in tuple(effects):
        if isinstance(effect, AddLeg):
            of_cpu = effect.resource_id, effect.cpu
            taken = effect.resource_id not in refuses
            effects += arbiter.step(
                LegTaken(LATE_NS, *of_cpu) if taken else LegRefused(LATE_NS, *of_cpu, errno.ENOSPC)
            )
    return effects


def ended(arbiter: Arbiter, arm: Arm) -> None:
    arbiter.step(release(arm.claim.claim_id, arm.claim.owner))
    arbiter.step(Disarmed(LATE_NS, arm.claim.claim_id, Totals()))


def tells(effects: list[Effect]) -> list[tuple[int, Change, int | None]]:
    return [(effect.claim.claim_id, effect.change, effect.cpu) for effect in effects if isinstance(effect, Tell)]


def test_with_a_cpu_go_the_slots_on_it_and_their_owners_are_told() -> None:
    # given a claim on every CPU, one on each, and claims that follow a thread and a process
    arbiter = new_arbiter()
    everywhere = granted(arbiter, request(ANN, EVERYWHERE))
    on_0, on_1 = granted(arbiter, request(ANN, ON_0)), granted(arbiter, request(BOB, ON_1))
    for target in (Target(T0.task, (1,)), P0):
        granted(arbiter, request(BOB, target))
    before = arbiter.books.pools[Pool.ANY].held_by_busiest(0)
    assert held(arbiter) == [2, 2]

    # when CPU 1 goes
    effects = leaves(arbiter)

    # then the slots there are given back, each after the other with its owner told, and none elsewhere
    sentence = "cpu 1 went offline; the slot there is free, and is taken again when it is back"
    assert effects == [
        DropLeg(resource_id(everywhere), 1),
        Tell(everywhere.claim, Change.OFFLINE, sentence, 1),
        DropLeg(resource_id(on_1), 1),
        Tell(on_1.claim, Change.OFFLINE, sentence, 1),
    ]
    assert held(arbiter) == [2, 0]
    assert arbiter.books.pools[Pool.ANY].held_by_busiest(0) == before
    record = arbiter.books.claims[on_1.claim.claim_id]
    assert list(record.story.lines())[-1].endswith(sentence)
    assert on_0.claim.claim_id in arbiter.books.claims


def test_when_it_is_back_they_have_their_slots_again_once_the_machine_has() -> None:
    # given two claims that have lost their slots on CPU 1
    arbiter = new_arbiter()
    on_1, everywhere = granted(arbiter, request(BOB, ON_1)), granted(arbiter, request(ANN, EVERYWHERE))
    leaves(arbiter)

    # when it is back, then their slots are counted, the oldest first, and nobody is told before the machine has them
    assert arbiter.step(CpuCameOnline(LATE_NS, 1)) == [
        AddLeg(resource_id(on_1), 1),
        AddLeg(resource_id(everywhere), 1),
    ]
    assert held(arbiter) == [1, 2]
    sentence = "cpu 1 is back, and so is the slot there"
    assert arbiter.step(LegTaken(LATE_NS, resource_id(on_1), 1)) == [Tell(on_1.claim, Change.RESUMED, sentence, 1)]
    assert list(arbiter.books.claims[1].story.lines())[-1].endswith(sentence)


def test_a_slot_given_back_while_its_cpu_was_away_is_not_taken_again() -> None:
    arbiter = new_arbiter()
    gone, stays = granted(arbiter, request(ANN, EVERYWHERE)), granted(arbiter, request(BOB, EVERYWHERE))
    also_gone = granted(arbiter, request(ANN, ON_1))
    leaves(arbiter)

    ended(arbiter, gone)
    ended(arbiter, also_gone)

    assert held(arbiter) == [1, 0]
    assert tells(comes(arbiter)) == [(stays.claim.claim_id, Change.RESUMED, 1)]
    assert held(arbiter) == [1, 1]


def test_what_was_claimed_on_every_cpu_meanwhile_has_a_slot_there_when_it_comes() -> None:
    # given a claim on every CPU, made while only CPU 0 was there
    arbiter = Arbiter({Pool.ANY: SLOTS}, (0, 1), (0,))
    armed = granted(arbiter, request(ANN, EVERYWHERE))
    assert held(arbiter) == [1, 0]

    # when CPU 1 comes for the first time
    effects = comes(arbiter)

    # then it is taken there, too
    assert effects[0] == AddLeg(resource_id(armed), 1)
    assert held(arbiter) == [1, 1]


def test_room_that_others_took_meanwhile_is_theirs_and_who_comes_too_late_is_told() -> None:
    # given a CPU that went with three claims on it, and threads that took slots meanwhile
    arbiter = new_arbiter()
    first, second, third = (granted(arbiter, request(owner, ON_1)) for owner in (ANN, BOB, ANN))
    leaves(arbiter)
    task = granted(arbiter, request(BOB, T0, pieces=2))

    # when it is back
    effects = comes(arbiter)

    # then the oldest have their slots, the last has none, and hears who has
    assert tells(effects) == [
        (third.claim.claim_id, Change.SUSPENDED, 1),
        (first.claim.claim_id, Change.RESUMED, 1),
        (second.claim.claim_id, Change.RESUMED, 1),
    ]
    assert held(arbiter) == [0, 2]
    (suspended,) = (effect for effect in effects if isinstance(effect, Tell) and effect.claim == third.claim)
    assert suspended.sentence.startswith("cpu 1 is back, without it: no slot on cpu 1: 4 of 4 held (")
    assert f"{BOB} as perf: 2 on tid 800" in suspended.sentence
    assert list(arbiter.books.claims[3].story.lines())[-1].endswith(suspended.sentence)

    # and when the CPU goes and comes once more, there may be room
    ended(arbiter, task)
    assert tells(leaves(arbiter)) == [(number, Change.OFFLINE, 1) for number in (1, 2)], "it had no slot to lose"
    assert tells(comes(arbiter)) == [(number, Change.RESUMED, 1) for number in (1, 2, 3)]
    assert held(arbiter) == [0, 3]


def test_what_the_kernel_refuses_on_a_cpu_that_is_back_is_not_counted_there() -> None:
    # given a claim on every CPU, and one on both by name
    arbiter = new_arbiter()
    everywhere, on_both = granted(arbiter, request(ANN, EVERYWHERE)), granted(arbiter, request(BOB, ON_BOTH))
    leaves(arbiter)

    # when CPU 1 is back and the kernel has no room there for either
    effects = comes(arbiter, refuses=(1, 2))

    # then their slots on CPU 0 stay, and they are told
    assert tells(effects) == [(1, Change.SUSPENDED, 1), (2, Change.SUSPENDED, 1)]
    sentence = "cpu 1 is back, without it: the kernel refused with ENOSPC"
    assert [effect.sentence for effect in effects if isinstance(effect, Tell)] == [sentence] * 2
    assert held(arbiter) == [2, 0]
    for arm in (everywhere, on_both):
        assert list(arbiter.books.claims[arm.claim.claim_id].story.lines())[-1].endswith(sentence)

    # and at their end the books are as new
    for arm in (everywhere, on_both):
        ended(arbiter, arm)
    assert held(arbiter) == [0, 0]
    assert arbiter.books.dump() == new_arbiter().books.dump()


def test_a_cpu_with_less_than_the_others_hides_none_of_them() -> None:
    """A claim on every CPU is refused for the fullest of them, whichever lacks something of what is everywhere."""
    for less, full in ((0, 1), (1, 0)):
        # given every slot taken everywhere, but for one on a CPU that came back without it
        arbiter = new_arbiter()
        for _ in range(SLOTS):
            granted(arbiter, request(ANN, EVERYWHERE))
        leaves(arbiter, less)
        comes(arbiter, less, refuses=(SLOTS,))
        assert [held(arbiter)[less], held(arbiter)[full]] == [SLOTS - 1, SLOTS]

        # when one more is asked for, on every CPU or on the full one, then there is no room
        for target in (EVERYWHERE, Target(cpus=(full,)), ON_BOTH, T0, P0):
            with pytest.raises(NoFreeSlot, match=f"cpu {full}"):
                fits(arbiter.books, target, ONE)

        # and on the other there is
        fits(arbiter.books, Target(cpus=(less,)), ONE)
        fits(arbiter.books, Target(T0.task, (less,)), ONE)


def test_who_is_absent_from_a_cpu_is_not_in_the_way_there() -> None:
    # given CPU 1 back without the first of two claims, and full of others
    arbiter = new_arbiter()
    granted(arbiter, request(ANN, EVERYWHERE))
    granted(arbiter, request(BOB, ON_BOTH))
    leaves(arbiter)
    comes(arbiter, refuses=(1,))
    for _ in range(SLOTS - 1):
        granted(arbiter, request(BOB, ON_1))

    # when one more is asked for there
    with pytest.raises(NoFreeSlot) as refusal:
        fits(arbiter.books, ON_1, ONE)

    # then only those that are there are named
    (holder,) = refusal.value.holders
    assert (holder.pid, holder.slots, holder.claim_ids) == (BOB.pid, SLOTS, (2, 3, 4, 5))


def test_who_is_on_every_cpu_that_is_there_is_not_in_the_way_on_one_that_is_not() -> None:
    # given claims on every CPU, of which one is away, and a thread that has every slot for the time it runs there
    arbiter = new_arbiter()
    granted(arbiter, request(ANN, EVERYWHERE))
    leaves(arbiter)
    granted(arbiter, request(BOB, Target(T0.task, (1,)), pieces=SLOTS))

    # when one more is asked for there
    with pytest.raises(NoFreeSlot) as refusal:
        fits(arbiter.books, Target(T0.task, (1,)), ONE)

    # then nobody is named who has no slot there
    assert [(holder.pid, holder.slots) for holder in refusal.value.holders] == [(BOB.pid, SLOTS)]


def test_while_a_cpu_is_away_nothing_is_armed_there_and_its_slots_hinder_no_thread() -> None:
    arbiter = new_arbiter()
    for _ in range(SLOTS):
        granted(arbiter, request(ANN, ON_1))
    with pytest.raises(NoFreeSlot):
        fits(arbiter.books, T0, ONE)

    leaves(arbiter)

    assert isinstance(refused(arbiter.step(request(BOB, ON_1))).error, CpuOffline)
    fits(arbiter.books, T0, Plan(ONE.pieces * SLOTS))
    fits(arbiter.books, EVERYWHERE, Plan(ONE.pieces * SLOTS))


def test_a_cpu_without_slots_comes_and_goes_in_silence() -> None:
    arbiter = new_arbiter()
    granted(arbiter, request(ANN, ON_0))
    before = arbiter.books.dump()

    assert leaves(arbiter) == []
    assert arbiter.books.online == {0}
    assert comes(arbiter) == []
    assert arbiter.books.online == {0, 1}

    assert arbiter.books.dump() == before
