"""The adaptive strategy on real events: it orders what the game says, and the guest does not notice."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from hwbpd_kvm.actions import Action, Kind
from hwbpd_kvm.adaptive import Balanced, Learning
from hwbpd_kvm.compare import MODELS, Model
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.rental import Interval, bill
from hwbpd_kvm.state import Enter, Event, Exit, GuestRead, GuestWrite, HostArm, HostDisarm, Load
from hwbpd_kvm.steered import ADAPTIVE, Steered, intervals, run, terms
from hwbpd_kvm.workloads import CPUS, WORKLOADS, random_history

MODEL_IDS = list(MODELS)


def traps(model: Model, events: Sequence[Event]) -> tuple[int, int]:
    """How many accesses trapped outside forced intervals, by the engine and by the game."""
    strategy, layouts = ADAPTIVE[model.prices.architecture], [model.layout] * CPUS
    price = terms(strategy, layouts, model.prices)
    decided = intervals(strategy, layouts, events)
    forced = iter([interval.forced for interval in decided])
    counted = 0
    is_forced = False

    def seen(event: Event, actions: tuple[Action, ...]) -> None:
        nonlocal counted, is_forced
        if isinstance(event, Enter):
            is_forced = next(forced)
        if not is_forced:
            counted += sum(action.kind is Kind.TRAP for action in actions)

    run(Steered(strategy, layouts, Balanced(price)), events, seen)
    return counted, bill(Balanced(price), decided, price).traps


@pytest.mark.parametrize("model", MODELS.values(), ids=MODEL_IDS)
@pytest.mark.parametrize("workload", ["guest-debugger", "saves-all", "probing", "perf-comes-and-goes"])
def test_the_engine_traps_as_often_as_the_game_says(model: Model, workload: str) -> None:
    by_engine, by_game = traps(model, WORKLOADS[workload](model.layout, 40, random.Random(2)))
    assert by_engine == by_game
    assert by_game > 0 or workload == "perf-comes-and-goes"


@pytest.mark.parametrize("model", MODELS.values(), ids=MODEL_IDS)
def test_the_guest_believes_what_it_would_with_any_strategy(model: Model) -> None:
    # Given a history with everything in it,
    seed = random.randrange(2**32)
    events = random_history(model.layout, 150, random.Random(seed))
    strategy, layouts = ADAPTIVE[model.prices.architecture], [model.layout] * CPUS

    # when it is switched by a policy, and by the strategy that switches at every entry,
    price = terms(strategy, layouts, model.prices)
    steered = run(Steered(strategy, layouts, Learning(price)), events, lambda _event, _actions: None)
    plain = Engine(strategy, layouts)
    world = plain.start()
    for event in events:
        world, _ = plain.step(world, event)

    # then the guest's registers are the same, and the hosts' are as the hosts want them.
    assert steered.vcpu.guest == world.vcpu.guest, f"seed {seed}"
    for cpu in steered.cpus:
        for slot in model.layout.slots:
            place = model.layout.position[slot.control]
            assert cpu.hardware[place] & slot.enable == cpu.host[place] & slot.enable, f"seed {seed}"


def test_intervals_say_what_is_decided_about() -> None:
    # Given a guest that reads, that writes something and that writes the same again, and a host that arms a slot,
    model = MODELS["cortex-a15"]
    slot = model.layout.slots[0]
    events: list[Event] = [
        Load(0),
        Enter(), GuestRead(slot.address), GuestRead(slot.control), Exit(),
        Enter(), GuestWrite(slot.address, 0x1000), Exit(),
        Enter(), GuestWrite(slot.address, 0x1000), Exit(),
        HostArm(0, 0, 0x2000, slot.enable), Enter(), GuestRead(slot.address), Exit(),
        HostDisarm(0, 0), Enter(), Exit(),
    ]  # fmt: skip

    # when they are told as intervals, then each is what a policy needs to know of it.
    found = intervals(ADAPTIVE["armv7"], [model.layout] * CPUS, events)
    assert found == [
        Interval(2, changes=False),
        Interval(1, changes=True),
        Interval(1, changes=False),
        Interval(0, changes=False, forced=True),
        Interval(0, changes=False),
    ]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODEL_IDS)
def test_the_terms_are_what_the_engine_orders(model: Model) -> None:
    # Given a model's terms,
    price = terms(ADAPTIVE[model.prices.architecture], [model.layout] * CPUS, model.prices)

    # then a trap costs at least the trap, and a switch at least one register's way there and back.
    assert price.trap >= model.prices.trap.amount
    assert price.switch >= len(model.layout.slot_registers) * (model.prices.read.amount + model.prices.write.amount)
