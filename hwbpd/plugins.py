"""
Finds plugins, checks that they keep their contracts, and builds the machine and backend asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pluggy
import structlog

from hwbpd import hookspecs
from hwbpd.core.errors import NotSupported
from hwbpd.hookspecs import Backend, BackendFactory, CpuFacts, Machine, MachineFactory

log = structlog.get_logger("hwbpd")

GROUP = "hwbpd"

Factory = TypeVar("Factory", MachineFactory, BackendFactory)


class BrokenPlugin(Exception):
    """A plugin that does not keep its contract; the message says which part of it."""


class Plugins:
    """What was found. ``modules`` stand in for the entry points in tests."""

    def __init__(self, modules: Iterable[object] | None = None) -> None:
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs.HookSpecs)
        if modules is None:
            manager.load_setuptools_entrypoints(GROUP)
        else:
            for module in modules:
                manager.register(module)
        try:
            manager.check_pending()
        except pluggy.PluginValidationError as why:
            raise BrokenPlugin(str(why)) from None
        self.machines = _by_name(manager.hook.hwbpd_machines(), MachineFactory)
        self.backends = _by_name(manager.hook.hwbpd_backends(), BackendFactory)
        self.profiles = _profiles(self.backends.values())

    def machine(self, asked: str, options: Mapping[str, Any]) -> Machine:
        """
        Build the machine of that name, or for ``auto`` the first real one that this host can be.

        :raises NotSupported: with what is missing; never a simulated machine in place of a real one.
        """
        if asked != "auto":
            if asked not in self.machines:
                there_are = ", ".join(sorted(self.machines)) or "none"
                raise NotSupported(f"no machine {asked!r}; installed: {there_are}")
            return self._checked_machine(self.machines[asked], options)
        reasons = []
        for factory in self.machines.values():
            if factory.real:
                try:
                    return self._checked_machine(factory, options)
                except NotSupported as why:
                    reasons.append(f"{factory.name}: {why}")
        raise NotSupported("no real machine here: " + ("; ".join(reasons) or "no plugin brings one"))

    def is_real(self, asked: str) -> bool:
        """Whether the machine that ``machine`` builds for that name has registers."""
        return asked == "auto" or self.machines[asked].real

    def backend(self, facts: CpuFacts) -> Backend:
        """Build the backend for an architecture; raises ``NotSupported`` when no plugin brings one."""
        for factory in self.backends.values():
            if facts.architecture in factory.architectures:
                backend: Backend = factory.make(facts)
                _check(backend, Backend, factory.name)
                if not backend.slots() or min(backend.slots().values()) < 1:
                    raise BrokenPlugin(f"backend {factory.name}: slots() has no slots: {backend.slots()}")
                return backend
        known = ", ".join(sorted(name for factory in self.backends.values() for name in factory.architectures))
        raise NotSupported(f"no backend for {facts.architecture}; installed: {known or 'none'}")

    @staticmethod
    def _checked_machine(factory: MachineFactory, options: Mapping[str, Any]) -> Machine:
        machine = factory.make(options)
        _check(machine, Machine, factory.name)
        topology = machine.topology()
        if not topology.online or not set(topology.online) <= set(topology.possible):
            raise BrokenPlugin(f"machine {factory.name}: {topology} has no online cpus, or online ones it cannot have")
        return machine


def _by_name(found: Iterable[Iterable[Factory]], kind: type[Factory]) -> dict[str, Factory]:
    factories: dict[str, Factory] = {}
    for of_plugin in found:
        if not isinstance(of_plugin, Sequence):
            raise BrokenPlugin(f"a plugin returned {of_plugin!r} where a list of {kind.__name__} belongs")
    for factory in (factory for of_plugin in found for factory in of_plugin):
        if not isinstance(factory, kind):
            raise BrokenPlugin(f"a plugin returned {factory!r} where a {kind.__name__} belongs")
        if factory.name in factories:
            raise BrokenPlugin(f"two plugins bring a {kind.__name__} named {factory.name!r}")
        factories[factory.name] = factory
    return factories


def _profiles(backends: Iterable[BackendFactory]) -> dict[str, CpuFacts]:
    """The CPUs of every plugin, by name; each of an architecture that its backend is for."""
    profiles: dict[str, CpuFacts] = {}
    for factory in backends:
        for name, facts in factory.profiles.items():
            if facts.architecture not in factory.architectures:
                raise BrokenPlugin(f"backend {factory.name}: profile {name!r} is of {facts.architecture}")
            if name in profiles:
                raise BrokenPlugin(f"two backends bring a profile named {name!r}")
            profiles[name] = facts
    return profiles


def _check(thing: object, contract: type, name: str) -> None:
    """A plugin that lacks a method would be found out when a client's claim first needs it; better now."""
    if not isinstance(thing, contract):
        wanted = {part for part in vars(contract) if not part.startswith("_")} | set(contract.__annotations__)
        missing = ", ".join(sorted(part for part in wanted if not hasattr(thing, part)))
        raise BrokenPlugin(f"{contract.__name__.lower()} {name} lacks {missing}")
