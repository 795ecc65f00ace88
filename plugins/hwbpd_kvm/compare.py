"""
What the strategies cost: every preset on every CPU model and workload, in numbers.

One ``Row`` is one history under one strategy, told per interval: what the entry costs, what the exit, what the accesses
that trapped; register accesses in both directions; traps. The adaptive strategy stands beside the presets, with the
least that anybody could have paid where there was something to decide.

Besides, the figures that were argued with: ``seed_figures`` computes them again from the same layouts and prices, and
``dr_exit_share`` answers for which exits "up to 40 % of the guest's time" holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from hwbpd_kvm.actions import Action
from hwbpd_kvm.adaptive import CEILING, Balanced, Learning, Lottery, balanced_bound, lottery_bound
from hwbpd_kvm.costs import ARM64, D01, PRICE_LISTS, X86_VIRTUAL, PriceList, Tally, tally, total
from hwbpd_kvm.costs import X86 as X86_PRICES
from hwbpd_kvm.engine import Engine, NotNow
from hwbpd_kvm.fast import Table
from hwbpd_kvm.optimum import optimum
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.registers import CORTEX_A15, CORTEX_A57, X86, Layout
from hwbpd_kvm.rental import Interval, Policy, Terms, bill
from hwbpd_kvm.state import Enter, Event, Exit, GuestRead, GuestWrite, OsLock
from hwbpd_kvm.steered import ADAPTIVE, Steered, intervals, run, terms
from hwbpd_kvm.strategy import Strategy
from hwbpd_kvm.surroundings import breaks_at_home
from hwbpd_kvm.traces import Trace
from hwbpd_kvm.workloads import CPUS, WORKLOADS

INTERVALS: Final = 2_000  # in a history, by default


class Model(NamedTuple):
    """A kind of CPU: which registers, at which prices."""

    name: str
    layout: Layout
    prices: PriceList


MODELS: Final[Mapping[str, Model]] = {
    model.name: model
    for model in (
        Model("cortex-a15", CORTEX_A15, D01),
        Model("cortex-a57", CORTEX_A57, ARM64),
        Model("x86", X86, X86_PRICES),
        Model("x86-virtual", X86, X86_VIRTUAL),
    )
}


def model_of(prices: PriceList) -> Model:
    """Return the model for prices that were loaded from a file."""
    layouts = {model.prices.architecture: model.layout for model in MODELS.values()}
    return Model(prices.name, layouts[prices.architecture], prices)


class Row(Struct, frozen=True):
    """
    One history under one strategy. Costs are in ``unit`` and, as the counts, means per interval.

    ``entry`` and ``exit``: of the switches that the guest's coming and going takes. ``accesses``: what its trapped
    accesses take, with the exit and the entry that each of them is. ``rest``: the host's traps, loads and puts.
    ``breaks``: the promises that the strategy breaks where it is at home (``surroundings``); what is cheap and wrong is
    not cheap. ``optimum``: the least of what is decided about, and ``factor`` what was paid for that, as a multiple;
    None where nothing is decided about.
    """

    model: str
    workload: str
    strategy: str
    unit: str
    intervals: int
    entry: float
    exit: float
    accesses: float
    rest: float
    reads: float
    writes: float
    traps: float
    breaks: tuple[str, ...] = ()
    optimum: float | None = None
    factor: float | None = None

    @property
    def cost(self) -> float:
        """Everything, per interval."""
        return self.entry + self.exit + self.accesses + self.rest


GUEST: Final = (GuestRead, GuestWrite, OsLock)


def _row(model: Model, workload: str, strategy: str, kinds: Mapping[type[Event], Tally], count: int) -> Row:
    prices = model.prices

    def cost(wanted: Iterable[type[Event]]) -> float:
        return prices.of(total(kinds[kind] for kind in wanted if kind in kinds)) / count

    everything = total(kinds.values())
    return Row(
        model=model.name,
        workload=workload,
        strategy=strategy,
        unit=prices.unit,
        intervals=count,
        entry=cost([Enter]),
        exit=cost([Exit]),
        accesses=cost(GUEST),
        rest=cost(kinds.keys() - {Enter, Exit, *GUEST}),
        reads=everything.reads / count,
        writes=everything.writes / count,
        traps=everything.traps / count,
        breaks=tuple(promise.value for promise in breaks_at_home(strategy)),
    )


def history_rows(
    model: Model, workload: str, events: Sequence[Event], strategies: Iterable[Strategy], layouts: Sequence[Layout]
) -> Iterator[Row]:
    """Yield a row for each strategy that is for this architecture, and one for the adaptive one."""
    yield from preset_rows(model, workload, events, strategies, layouts)
    yield adaptive_row(model, workload, events, layouts)


def preset_rows(
    model: Model, workload: str, events: Sequence[Event], strategies: Iterable[Strategy], layouts: Sequence[Layout]
) -> Iterator[Row]:
    """Yield a row for each strategy that is for this architecture."""
    count = sum(isinstance(event, Enter) for event in events)
    for strategy in strategies:
        if strategy.architecture == model.prices.architecture:
            table = Table(Engine(strategy, layouts))
            yield _row(model, workload, strategy.name, table.run(table.encode(events)), count)


def adaptive_row(model: Model, workload: str, events: Sequence[Event], layouts: Sequence[Layout]) -> Row:
    """Return the row of ``Learning`` on the architecture's adaptive strategy."""
    strategy, layouts = ADAPTIVE[model.prices.architecture], list(layouts)
    price = terms(strategy, layouts, model.prices)
    kinds: dict[type[Event], list[Tally]] = {}

    def seen(event: Event, actions: tuple[Action, ...]) -> None:
        kinds.setdefault(type(event), []).append(tally(actions))

    run(Steered(strategy, layouts, Learning(price)), events, seen)
    decided = intervals(strategy, layouts, events)
    row = _row(model, workload, strategy.name, {kind: total(own) for kind, own in kinds.items()}, len(decided))
    least = optimum(decided, price)
    if least == 0:
        return row
    paid = bill(Learning(price), decided, price).cost
    return replace(row, optimum=least, factor=paid / least)


def compare(
    models: Iterable[Model],
    workloads: Iterable[str],
    strategies: Iterable[Strategy] = PRESETS.values(),
    count: int = INTERVALS,
    seed: int = 1,
) -> Iterator[Row]:
    """Yield every row: models, then workloads, then strategies."""
    wanted, strategies = list(workloads), list(strategies)
    for model in models:
        for name in wanted:
            events = WORKLOADS[name](model.layout, count, random.Random(seed))
            yield from history_rows(model, name, events, strategies, [model.layout] * CPUS)


def replay(trace: Trace, name: str, strategies: Iterable[Strategy], models: Iterable[Model]) -> Iterator[Row]:
    """
    Yield the rows of a recorded history under the name of its file: models that have such registers, then strategies.

    :raises ValueError: when there is no such model, or the history cannot have happened.
    """
    layouts = trace.cpus
    strategies = list(strategies)
    fitting = [model for model in models if model.layout.master == layouts[0].master]
    if not fitting:
        raise ValueError(f"no price list for CPUs like {layouts[0].name}")
    if not any(isinstance(event, Enter) for event in trace.events):
        raise ValueError("the guest is never entered")
    for model in fitting:
        try:
            yield from history_rows(model, name, trace.events, strategies, layouts)
        except NotNow as why:
            raise ValueError(f"the history cannot have happened: {why}") from why


# --- how near the optimum --------------------------------------------------------------------------------------------


class Standing(NamedTuple):
    """How a policy fared over many histories, as multiples of the optimum."""

    policy: str
    terms: Terms
    bound: float  # what it must not exceed; of the lottery, in the mean over its draws and where every access shows
    mean: float
    worst: float
    histories: int


def random_intervals(count: int, chance: random.Random) -> list[Interval]:
    """
    Return intervals in phases: how often the guest accesses its registers, how many times, and how much of it shows.
    """
    often, times, shows, left = 0.0, 1, 1.0, 0
    found = []
    for _ in range(count):
        if left == 0:
            often, times = chance.random() ** 2, chance.choice((1, 2, 4, 12, 40))
            shows, left = chance.choice((0, 0.5, 0.9, 1)), chance.randrange(5, 200)
        left -= 1
        accesses = chance.randint(1, times) if chance.random() < often else 0
        found.append(Interval(accesses, chance.random() < shows, chance.random() < 1 / 30))
    return found


def standings(price: Terms, histories: Iterable[Sequence[Interval]], seed: int = 1) -> list[Standing]:
    """Return how each policy stands; histories that cost nobody anything do not count."""
    factors: dict[str, list[float]] = {"balanced": [], "lottery": [], "learning": []}
    bounds = {"balanced": balanced_bound(price), "lottery": lottery_bound(price), "learning": CEILING}
    for number, history in enumerate(histories):
        least = optimum(history, price)
        if least == 0:
            continue
        policies: dict[str, Policy] = {
            "balanced": Balanced(price),
            "lottery": Lottery(price, random.Random(f"{seed} {number}")),
            "learning": Learning(price),
        }
        for name, policy in policies.items():
            factors[name].append(bill(policy, history, price).cost / least)
    return [
        Standing(name, price, bounds[name], sum(own) / len(own), max(own), len(own))
        for name, own in factors.items()
        if own
    ]


def all_standings(
    models: Iterable[Model], count: int = 1_000, seed: int = 1, length: int = INTERVALS // 4
) -> Iterator[tuple[Model, list[Standing]]]:
    """
    Yield, for each model, how the policies stand on all workloads, of so many intervals, and on ``count`` random
    histories together.
    """
    for model in models:
        strategy, layouts = ADAPTIVE[model.prices.architecture], [model.layout] * CPUS
        price = terms(strategy, layouts, model.prices)
        chance = random.Random(seed)
        own = [
            intervals(strategy, layouts, workload(model.layout, length, random.Random(seed)))
            for workload in WORKLOADS.values()
        ]
        costly = (history for history in _random_histories(length, chance) if optimum(history, price) > 0)
        yield model, standings(price, [*own, *islice(costly, count)], seed)


def _random_histories(length: int, chance: random.Random) -> Iterator[list[Interval]]:
    """Yield histories of several lengths, for ever."""
    while True:
        yield random_intervals(chance.choice((10, 50, length)), chance)


# --- the figures of the threads --------------------------------------------------------------------------------------


class SeedFigure(NamedTuple):
    """A number that somebody has argued with, and ours."""

    claim: str
    said: float
    computed: float


def seed_figures() -> list[SeedFigure]:
    """Return the figures of the threads beside what layouts and prices come to."""
    slots = len(CORTEX_A15.slot_registers)
    one_way = D01.of(Tally(reads=slots, writes=slots))
    return [
        SeedFigure("Cortex-A15: registers of 6 breakpoints and 4 watchpoints", 20, slots),
        SeedFigure("D01: cycles to save so many and load as many, one way", 260, one_way),
        SeedFigure("Cortex-A57: registers with MDSCR and MDCCINT", 22, len(CORTEX_A57.registers)),
    ]


class DrExits(NamedTuple):
    """A guest that saves and restores its debug registers at each task switch, all accesses trapping."""

    exit: float  # cycles
    source: str
    accesses: int  # for each task switch
    work_at_40: float  # cycles between two task switches at which 40 % of the time goes to exits
    share_untrapped: float  # of the time at that work, when only the first access of an interval of one switch traps


def dr_exit_share(exit_cycles: float, accesses: int, work: float) -> float:
    """Return the share of the time that goes to exits, with so much work in cycles between two task switches."""
    lost = exit_cycles * accesses
    return lost / (lost + work)


def forty_percent(share: float = 0.4) -> list[DrExits]:
    """
    Return for which guests the claim holds: for each exit cost that is known, the work between two task switches.

    A guest that switches tasks more often loses more than 40 %, one that does so less often loses less. The fewest
    accesses are those of a task with one breakpoint, DR0 and DR7 written on the way in and DR7 on the way out; the most
    are all six registers read and written.
    """
    strategy = ADAPTIVE["x86"]
    found = []
    for name in ("x86", "x86-virtual"):
        prices = PRICE_LISTS[name]
        switched = terms(strategy, [X86] * CPUS, prices).switch
        for accesses in (3, 12):
            lost = prices.trap.amount * accesses
            work = lost * (1 - share) / share
            after = prices.trap.amount + switched
            found.append(DrExits(prices.trap.amount, name, accesses, work, after / (after + work)))
    return found
