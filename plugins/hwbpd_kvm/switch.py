"""
A strategy that follows one real vCPU: the engine, driven by what a VMM does instead of by a script.

The engine's host is a model and has no breakpoints here. What the host has comes as an answer with each entry, as the
status page gives it, and stands for what hw_breakpoint_enabled would have said.
"""

from __future__ import annotations

from msgspec.structs import replace

from hwbpd_kvm.actions import TRAP, Action
from hwbpd_kvm.engine import Engine
from hwbpd_kvm.presets import PRESETS
from hwbpd_kvm.registers import CORTEX_A15, CORTEX_A57, X86, Layout
from hwbpd_kvm.state import Enter, Event, Exit, GuestRead, GuestWrite, Load, Put, Where, World

_LAYOUTS = {"x86": X86, "arm64": CORTEX_A57, "armv7": CORTEX_A15}


class Switch:
    """
    A strategy that follows one vCPU.

    :param strategy: the name of a preset.
    :param layout: the registers of the CPUs it runs on; None for some that the strategy was made for.
    :raises ValueError: for a name that is no preset's.
    """

    def __init__(self, strategy: str, layout: Layout | None = None) -> None:
        if strategy not in PRESETS:
            raise ValueError(f"no strategy {strategy!r}; there are {', '.join(PRESETS)}")
        preset = PRESETS[strategy]
        self._engine = Engine(preset, [layout or _LAYOUTS[preset.architecture]])
        self.world: World = self._engine.start()
        self.traps = 0  # of the guest's accesses

    def enter(self, host_enabled: bool) -> tuple[Action, ...]:
        """Return what is ordered before an entry; a vCPU that was put is loaded first."""
        loading = self._step(Load(0)) if self.world.vcpu.where is Where.OUT else ()
        # As after a Query, but answered by the page: the model's own host has no breakpoints.
        self.world = replace(self.world, vcpu=replace(self.world.vcpu, answer=host_enabled))
        return loading + self._step(Enter())

    def leave(self) -> tuple[Action, ...]:
        """Return what is ordered after an exit."""
        return self._step(Exit())

    def put(self) -> tuple[Action, ...]:
        """Return what is ordered when the vCPU's thread goes to sleep or elsewhere, between two entries."""
        return self._step(Put())

    def accessed(self, register: str, written: int | None = None) -> tuple[Action, ...]:
        """Return what comes of the guest's access to a debug register, within an entry; None for a read."""
        actions = self._step(GuestRead(register) if written is None else GuestWrite(register, written))
        self.traps += TRAP in actions
        return actions

    def _step(self, event: Event) -> tuple[Action, ...]:
        self.world, actions = self._engine.step(self.world, event)
        return actions
