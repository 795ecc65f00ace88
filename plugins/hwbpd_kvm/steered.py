"""
The engine with a policy at its two decisions: the adaptive strategy, on real registers' events.

Every trigger of a strategy that is no choice (armed slots of the guest or the host, the VMM's debugging) is left to the
engine. What is a choice is taken from it: at an access that traps, whether to switch from here on; after a switched
interval, whether to go on. ``rental`` has the rules of that game, ``adaptive`` the policies. What an interval is to
them, and which are forced, is told here from the events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final

from msgspec.structs import replace

from hwbpd_kvm.actions import Action, Kind
from hwbpd_kvm.costs import PriceList, tally
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.presets import FOUR_CASES, OWNER_STATES, WONT_EXIT
from hwbpd_kvm.registers import Layout
from hwbpd_kvm.rental import Interval, Policy, Terms
from hwbpd_kvm.state import Enter, Event, Exit, GuestRead, GuestWrite, Load, World
from hwbpd_kvm.strategy import Horizon, Strategy, Trigger

ANSWERS_MAX: Final = 4096  # kept by an engine; a world is about a kilobyte


def _by_policy(strategy: Strategy) -> Strategy:
    """Return a preset with a horizon that is somebody else's to decide."""
    return replace(
        strategy,
        name=f"adaptive-{strategy.architecture}",
        source=f"{strategy.name}, with a policy that decides when to switch and until when",
        horizon=Horizon.FOR_GOOD,
    )


ADAPTIVE: Mapping[str, Strategy] = {
    strategy.architecture: _by_policy(strategy) for strategy in (FOUR_CASES, OWNER_STATES, WONT_EXIT)
}


def _without_choice(strategy: Strategy) -> Strategy:
    """Return the strategy that never chooses to switch: only what is no choice is left."""
    choices = {Trigger.ACCESSED, Trigger.WRITTEN}
    return replace(
        strategy, triggers=strategy.triggers - choices, untraps=strategy.untraps - choices, reruns=False
    )


class _Remembering(Engine):
    """
    An engine that keeps its answers: guests repeat themselves, and looking a world up is cheaper than stepping it.

    ``fast.Table`` is faster still, but has worlds without addresses, and whether a guest has changed one matters here.
    """

    def __init__(self, strategy: Strategy, layouts: Sequence[Layout]) -> None:
        super().__init__(strategy, layouts)
        self._answer = lru_cache(maxsize=ANSWERS_MAX)(super().step)

    def step(self, world: World, event: Event) -> tuple[World, tuple[Action, ...]]:
        return self._answer(world, event)


class Steered:
    """
    A strategy of ``ADAPTIVE`` with somebody who decides; driven as ``Engine`` is.

    Three engines share the worlds: one that switches by choice, one that does not, and, for forced intervals, one that
    forgets at the exit whatever an access has made it do. The mode is kept here, and ``Vcpu.touched`` follows it.

    It keeps where its policy is, so it goes with one history, and worlds may not be taken up again.
    """

    def __init__(self, strategy: Strategy, layouts: Sequence[Layout], policy: Policy) -> None:
        self._switching = _Remembering(strategy, layouts)
        self._trapping = _Remembering(_without_choice(strategy), layouts)
        self._forced = _Remembering(replace(strategy, horizon=Horizon.EXIT), layouts)
        self._engine = self._trapping
        self._policy = policy
        self._is_switching = False
        self._before: World | None = None  # that of the entry of an interval that is decided about

    def start(self) -> World:
        """Return a world after a reset."""
        return self._switching.start()

    def step(self, world: World, event: Event) -> tuple[World, tuple[Action, ...]]:
        """Return the world after ``event``, and what was ordered; raises as ``Engine.step`` does."""
        match event:
            case Enter():
                world = self._entering(world)
            case GuestRead() | GuestWrite() if world.vcpu.traps and self._before is not None:
                self._is_switching = self._policy.switch_now()
                self._engine = self._switching if self._is_switching else self._trapping
            case _:
                pass
        after, actions = self._engine.step(world, event)
        if isinstance(event, Exit):
            self._decide(after)
        return after, actions

    def _entering(self, world: World) -> World:
        """Choose the engine of an interval; return the world with the mode in it."""
        is_forced = _is_forced(self._trapping, world)
        self._before = None if is_forced else world
        unforced = self._switching if self._is_switching else self._trapping
        self._engine = self._forced if is_forced else unforced
        return _with_touched(world, self._is_switching and not is_forced)

    def _decide(self, world: World) -> None:
        """Ask the policy about the interval that has ended."""
        before, self._before = self._before, None
        if before is None:
            return
        if self._is_switching:
            self._is_switching = self._policy.keep_switching(world.vcpu.guest != before.vcpu.guest)
        else:
            self._policy.interval_trapped()


def _with_touched(world: World, touched: bool) -> World:
    return replace(world, vcpu=replace(world.vcpu, touched=touched))


def _is_forced(trapping: Engine, world: World) -> bool:
    """Whether an entry now would load registers though nobody chooses to."""
    return trapping.step(_with_touched(world, False), Enter())[0].vcpu.loaded is not None


def intervals(strategy: Strategy, layouts: Sequence[Layout], events: Iterable[Event]) -> list[Interval]:
    """
    Return what ``rental`` needs to know of a history.

    An access that arms a slot traps for everybody who traps; what the guest does in that interval after it is forced,
    and not counted.
    """
    engine = _Remembering(_without_choice(strategy), layouts)
    world, found = engine.start(), []
    before, accesses, forced = world, 0, False
    for event in events:
        after, actions = engine.step(world, event)
        match event:
            case Enter():
                before, accesses, forced = world, 0, after.vcpu.loaded is not None
            case Exit():
                changes = after.vcpu.guest != before.vcpu.guest
                found.append(Interval(0 if forced else accesses, changes, forced))
            case _:
                accesses += sum(action.kind is Kind.TRAP for action in actions)
        world = after
    return found


def terms(strategy: Strategy, layouts: Sequence[Layout], prices: PriceList) -> Terms:
    """Return what a trap, and an interval that is switched rather than trapped, cost here."""
    switching, trapping = Engine(strategy, layouts), Engine(_without_choice(strategy), layouts)
    register = layouts[0].slots[0].address
    start = (Load(0), Enter(), GuestRead(register), Exit())

    def costs(engine: Engine) -> tuple[float, float]:
        """The access, and the interval after it."""
        world, by_event = engine.start(), []
        for event in (*start, Enter(), Exit()):
            world, actions = engine.step(world, event)
            by_event.append(prices.of(tally(actions)))
        return by_event[2], by_event[4] + by_event[5]

    trap, idle = costs(trapping)
    _, switched = costs(switching)
    return Terms(trap, switched - idle)


def run(steered: Steered, events: Iterable[Event], seen: Callable[[Event, tuple[Action, ...]], None]) -> World:
    """Let ``events`` happen; tell each with what was ordered."""
    world = steered.start()
    for event in events:
        world, actions = steered.step(world, event)
        seen(event, actions)
    return world
