"""Plugins are found, checked at start rather than at the first claim, and never taken for what they are not."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from hwbpd.core.errors import NotSupported
from hwbpd.core.model import Pool
from hwbpd.hookspecs import Backend, BackendFactory, CpuFacts, Machine, MachineFactory, Topology, hookimpl
from hwbpd.plugins import BrokenPlugin, Plugins
from tests.fakes import FakeBackend, FakeMachine

FACTS = CpuFacts("fake")


def a_machine(settings: Mapping[str, Any] = {}) -> FakeMachine:
    return FakeMachine({Pool.ANY: 4}, 2, random.Random(0))


def a_backend(facts: CpuFacts = FACTS) -> FakeBackend:
    return FakeBackend({Pool.ANY: 4})


def machine(name: str, real: bool = True, make: Callable[[Mapping[str, Any]], Any] = a_machine) -> MachineFactory:
    return MachineFactory(name, real, make)


def backend(name: str, *architectures: str, make: Callable[[CpuFacts], Any] = a_backend) -> BackendFactory:
    return BackendFactory(name, frozenset(architectures), make)


class Plugin:
    """A plugin that brings what it is told to."""

    def __init__(self, machines: Any = (), backends: Any = ()) -> None:
        self._machines = machines
        self._backends = backends

    @hookimpl
    def hwbpd_machines(self) -> Any:
        return self._machines

    @hookimpl
    def hwbpd_backends(self) -> Any:
        return self._backends


def with_machines(*machines: Any) -> Plugins:
    return Plugins([Plugin(machines)])


def missing(what: str) -> Callable[[Mapping[str, Any]], Machine]:
    """How a machine is made that this host cannot be."""

    def make(settings: Mapping[str, Any]) -> Machine:
        raise NotSupported(what)

    return make


def without(thing: object, name: str) -> object:
    """A thing that has all of another's methods but one."""
    parts = {part: getattr(thing, part) for part in dir(thing) if not part.startswith("_") and part != name}
    return type("Incomplete", (), parts)()


# --- what is found ---------------------------------------------------------------------------------------------------


def test_the_plugins_of_this_distribution_are_found_by_their_entry_points() -> None:
    plugins = Plugins()

    assert plugins.machines["linux"].real
    assert {"x86_64", "i686"} <= plugins.backends["x86"].architectures
    x86 = plugins.backend(CpuFacts("x86_64"))
    assert (x86.name, dict(x86.slots())) == ("x86", {Pool.ANY: 4})


def test_what_several_plugins_bring_is_had_by_name() -> None:
    plugins = Plugins([Plugin([machine("one")]), Plugin([machine("two", real=False)], [backend("b", "fake")])])

    assert set(plugins.machines) == {"one", "two"}
    assert isinstance(plugins.machine("two", {}), Machine)
    assert isinstance(plugins.backend(FACTS), Backend)


def test_whether_a_machine_is_real_is_known_by_the_name_it_is_asked_for() -> None:
    plugins = with_machines(machine("real"), machine("sim", real=False))

    assert plugins.is_real("real")
    assert not plugins.is_real("sim")
    assert plugins.is_real("auto"), "which takes no other"


def test_a_machine_gets_the_options_it_is_made_with() -> None:
    given: list[Mapping[str, Any]] = []

    def make(settings: Mapping[str, Any]) -> FakeMachine:
        given.append(settings)
        return a_machine()

    with_machines(machine("m", make=make)).machine("m", {"cpus": 8})

    assert given == [{"cpus": 8}]


# --- which machine ---------------------------------------------------------------------------------------------------


def test_auto_never_takes_a_simulated_machine_and_says_what_the_real_ones_lack() -> None:
    # given real machines that this host cannot be, and a simulated one that always works
    plugins = with_machines(
        machine("sim", real=False),
        machine("first", make=missing("no perf events; mount debugfs")),
        machine("second", make=missing("not this CPU")),
    )

    # when any real one will do
    with pytest.raises(NotSupported) as refused:
        plugins.machine("auto", {})

    # then there is none, and the remedies are named
    assert "first: no perf events; mount debugfs" in str(refused.value)
    assert "second: not this CPU" in str(refused.value)
    assert "sim" not in str(refused.value)

    # and the simulated one is had by asking for it
    assert plugins.machine("sim", {}).name == "fake"


def test_auto_takes_a_real_machine_that_works() -> None:
    works = a_machine()
    plugins = with_machines(machine("broken", make=missing("no")), machine("works", make=lambda _: works))

    assert plugins.machine("auto", {}) is works


def test_auto_says_so_where_no_plugin_brings_a_machine() -> None:
    with pytest.raises(NotSupported, match="no plugin brings one"):
        with_machines().machine("auto", {})


def test_a_machine_that_is_asked_for_is_not_replaced_by_another() -> None:
    plugins = with_machines(machine("linux", make=missing("no perf events")), machine("other"))

    with pytest.raises(NotSupported, match="no perf events"):
        plugins.machine("linux", {})
    with pytest.raises(NotSupported, match="no machine 'lunix'; installed: linux, other"):
        plugins.machine("lunix", {})


def test_an_architecture_without_a_backend_is_named_with_those_that_have_one() -> None:
    plugins = Plugins([Plugin(backends=[backend("arm", "aarch64", "armv7l"), backend("x86", "x86_64")])])

    with pytest.raises(NotSupported, match="no backend for riscv64; installed: aarch64, armv7l, x86_64"):
        plugins.backend(CpuFacts("riscv64"))


# --- what is broken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", sorted({name for name in vars(Machine) if not name.startswith("_")} | {"facts", "name"})
)
def test_a_machine_that_lacks_something_is_found_out_at_start(method: str) -> None:
    plugins = with_machines(machine("half", make=lambda _: without(a_machine(), method)))

    with pytest.raises(BrokenPlugin, match=f"^machine half lacks {method}$"):
        plugins.machine("half", {})


@pytest.mark.parametrize("method", ["fit", "slots", "describe", "name"])
def test_a_backend_that_lacks_something_is_found_out_at_start(method: str) -> None:
    plugins = Plugins([Plugin(backends=[backend("half", "fake", make=lambda _: without(a_backend(), method))])])

    with pytest.raises(BrokenPlugin, match=f"^backend half lacks {method}$"):
        plugins.backend(FACTS)


@pytest.mark.parametrize("slots", [{}, {Pool.ANY: 0}, {Pool.INST: 2, Pool.DATA: 0}])
def test_a_backend_without_slots_is_broken(slots: Mapping[Pool, int]) -> None:
    plugins = Plugins([Plugin(backends=[backend("none", "fake", make=lambda _: FakeBackend(slots))])])

    with pytest.raises(BrokenPlugin, match="backend none"):
        plugins.backend(FACTS)


@pytest.mark.parametrize("topology", [Topology((0, 1), ()), Topology((0, 1), (1, 2))])
def test_a_machine_with_impossible_cpus_is_broken(topology: Topology) -> None:
    class Odd(FakeMachine):
        def topology(self) -> Topology:
            return topology

    plugins = with_machines(machine("odd", make=lambda _: Odd({Pool.ANY: 4}, 2, random.Random(0))))

    with pytest.raises(BrokenPlugin, match="machine odd"):
        plugins.machine("odd", {})


@pytest.mark.parametrize("auto", ["auto", "half"])
def test_a_broken_machine_is_not_passed_over_in_silence(auto: str) -> None:
    plugins = with_machines(machine("half", make=lambda _: object()), machine("works"))

    with pytest.raises(BrokenPlugin):
        plugins.machine(auto, {})


def test_two_of_one_name_are_broken() -> None:
    with pytest.raises(BrokenPlugin, match="two plugins bring a MachineFactory named 'm'"):
        Plugins([Plugin([machine("m")]), Plugin([machine("m")])])
    with pytest.raises(BrokenPlugin, match="two plugins bring a BackendFactory named 'b'"):
        Plugins([Plugin(backends=[backend("b", "x"), backend("b", "y")])])


def with_profiles(name: str, architecture: str, **profiles: CpuFacts) -> BackendFactory:
    return BackendFactory(name, frozenset({architecture}), a_backend, profiles)


def test_the_cpus_that_plugins_know_by_name_are_had_from_all_of_them() -> None:
    small, great = CpuFacts("a", breakpoints=1), CpuFacts("b", breakpoints=9)

    bring = [with_profiles("one", "a", small=small), with_profiles("two", "b", great=great)]
    plugins = Plugins([Plugin(backends=bring)])

    assert plugins.profiles == {"small": small, "great": great}


def test_a_name_for_two_cpus_and_one_for_a_cpu_of_others_are_broken() -> None:
    facts, theirs = CpuFacts("a"), CpuFacts("b")
    with pytest.raises(BrokenPlugin, match="two backends bring a profile named 'cpu'"):
        Plugins([Plugin(backends=[with_profiles("one", "a", cpu=facts), with_profiles("two", "b", cpu=theirs)])])
    with pytest.raises(BrokenPlugin, match="backend one: profile 'cpu' is of b"):
        Plugins([Plugin(backends=[with_profiles("one", "a", cpu=theirs)])])


@pytest.mark.parametrize(
    "returned",
    [[a_machine], [backend("b", "x")], ["linux"], machine("m"), 5],
    ids=["functions", "backends", "names", "one machine instead of a list", "a number"],
)
def test_a_hook_that_returns_something_else_is_broken(returned: Any) -> None:
    with pytest.raises(BrokenPlugin, match="MachineFactory"):
        Plugins([Plugin(returned)])


def test_a_hook_that_does_not_exist_is_broken() -> None:
    class Misspelt:
        @hookimpl
        def hwbpd_machine(self) -> Sequence[MachineFactory]:
            return []

    with pytest.raises(BrokenPlugin, match="hwbpd_machine"):
        Plugins([Misspelt()])
