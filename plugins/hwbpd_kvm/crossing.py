"""
The edges: what an entry and an exit do under a strategy, and what they know of the host.

Rules kept, whatever the strategy:

1. An exit is: the guest's set out of the hardware, then the host's into it, and only then what the exit was for. So a
   trapped access finds the right values in memory, and may pull the trigger again (``saves_first`` turns it round, to
   show what it is good for).
2. While the VMM debugs, its set is selected, and the guest's accesses trap, whatever the guest has done before.
3. What the CPU switches by itself is in no list of actions, and in the world nevertheless.
4. Counts are those of the CPU the vCPU is on (``moves_least`` shows what else comes of it). Registers it lacks are not
   touched, and stay in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from hwbpd_kvm.actions import TRAPS_OFF, TRAPS_ON, Action, Kind, Place, look
from hwbpd_kvm.scratch import Scratch
from hwbpd_kvm.state import Where
from hwbpd_kvm.strategy import Horizon, HostFrom, HostKnown, Scope, Small, Trigger

READ_COUNTS = Action(Kind.READ, "ID_AA64DFR0_EL1")


class Crossing(Scratch):
    """A world in which the vCPU enters and leaves the guest."""

    # --- what is known ------------------------------------------------------------------------------------------------

    def armed(self, values: Sequence[int], number: int) -> bool:
        """Whether a slot's control arms it; the switch for all slots is another matter."""
        slot = self.layout.slots[number]
        return bool(values[self.position[slot.control]] & slot.enable)

    def any_armed(self, values: Sequence[int]) -> bool:
        """Whether any slot that this CPU has is armed."""
        return any(self.armed(values, number) for number in range(len(self.layout.slots)))

    def host_slots(self) -> list[int]:
        """Return the host's armed slots here as far as the strategy can know, and order the looks it takes."""
        record = self.of(self.cpu).record
        every = range(len(self.layout.slots))
        match self.strategy.host_known:
            case HostKnown.NOT:
                return []
            case HostKnown.LOOPS | HostKnown.RESERVED as known:
                looked = self.layout.looped if known is HostKnown.LOOPS else every
                self.actions += [look(f"slot {number}") for number in looked]
                return [number for number in looked if self.armed(record, number)]
            case HostKnown.HARDWARE:
                self.read(self.cpu, dict.fromkeys(slot.control for slot in self.layout.slots), Place.NOWHERE)
                return [number for number in every if self.armed(self.of(self.cpu).hardware, number)]
            case HostKnown.ACTIVE | HostKnown.TRAPPED as known:
                self.actions.append(look(known.value))
                return [number for number in every if self.armed(record, number)]

    def host_enabled(self) -> bool:
        """hw_breakpoint_enabled: may the host have breakpoints in force here?"""
        return bool(self.host_slots())

    def fired(self, answer: bool | None) -> frozenset[Trigger]:
        """Return the triggers that are pulled now."""
        layout, found = self.layout, {Trigger.ALWAYS}
        if self.touched:
            found |= {Trigger.WRITTEN, Trigger.ACCESSED}
        if layout.master and self.guest[self.position[layout.master]] & layout.master_enable:
            found.add(Trigger.MASTER)
        if self.any_armed(self.guest) if self.strategy.enabled_recomputed else self.enabled:
            found.add(Trigger.SLOTS)
        if answer:
            found.add(Trigger.HOST)
        return frozenset(found) & self.strategy.triggers

    # --- entry and exit -----------------------------------------------------------------------------------------------

    @property
    def slots_and_extra(self) -> list[str]:
        """The registers that move with the slots on this CPU."""
        layout = self.layout
        small = () if self.strategy.small in {Small.EVERY_EDGE, Small.NEVER} else layout.small
        return [*layout.slot_registers, *layout.extra, *small]

    def movable(self, *, untrapped: bool) -> list[str]:
        """The registers of a guest's or a VMM's set that are written and read, rather than moved by the CPU."""
        layout, strategy = self.layout, self.strategy
        skipped = set(layout.by_hardware)
        if not (strategy.status_with_slots or untrapped):
            skipped.add(layout.status)
        return [name for name in self.slots_and_extra if name not in skipped]

    def enter(self) -> None:
        """Run the guest: decide, put the host's set aside, load another, set the traps."""
        strategy, cpu, answer = self.strategy, self.cpu, self.answer
        self.answer = None
        if self.debugging or self.os_locked:
            load: Place | None = Place.VMM
            untrapped = self.touched and not strategy.debug_retraps
        else:
            if answer is None and Trigger.HOST in strategy.triggers:
                answer = self.host_enabled()
            fired = self.fired(answer)
            load = Place.GUEST if fired or self.resident == cpu else None
            untrapped = bool(fired & strategy.untraps) or self.resident == cpu
        self.enter_small(load)
        if strategy.scope is Scope.ARMED:
            self.put_armed_aside(load or Place.GUEST, answer)
            load = (load or Place.GUEST) if self.aside else None
            untrapped = untrapped and load is Place.GUEST
        elif self.resident != cpu:
            self.put_host_aside(load, answer, untrapped)
        if strategy.counts_read and load is not None:
            self.actions += [READ_COUNTS] * 2  # once to save the host's set, once to load the other
        if self.traps is untrapped:
            self.traps = not untrapped
            self.actions.append(TRAPS_OFF if untrapped else TRAPS_ON)
        self.loaded, self.where = load, Where.IN
        hardware, chosen = self.of(cpu).hardware, self.vmm if load is Place.VMM else self.guest
        for name in self.layout.by_hardware:
            hardware[self.position[name]] = chosen[self.position[name]]

    def put_host_aside(self, load: Place | None, answer: bool | None, untrapped: bool) -> None:
        """Move the whole set, or, where nothing is to be loaded, see that the host's is not in force in the guest."""
        strategy, layout, cpu = self.strategy, self.layout, self.cpu
        if load is not None:
            if strategy.host_from is HostFrom.SAVED:
                self.read(cpu, self.slots_and_extra, Place.HOST)
            # No address is changed under an armed control: what the CPU switches by itself is disarmed first.
            self.write(cpu, sorted(layout.by_hardware), Place.RESET)
            self.write(cpu, self.movable(untrapped=untrapped), load)
        elif strategy.scope is Scope.ENABLES:
            for number in self.host_slots() if answer is not False else ():
                slot = layout.slots[number]
                self.read(cpu, [slot.control], Place.HOST)
                self.write(cpu, [slot.control], Place.DISARMED)
                self.aside |= 1 << number
        elif layout.by_hardware and strategy.host_known is HostKnown.ACTIVE and self.believed(answer):
            self.write(cpu, sorted(layout.by_hardware), Place.RESET)

    def believed(self, answer: bool | None) -> bool:
        """Return the answer that was given before the entry, or ask now."""
        return self.host_enabled() if answer is None else answer

    def put_armed_aside(self, load: Place, answer: bool | None) -> None:
        """Move the slots that either side has armed, and what goes with them."""
        chosen = self.vmm if load is Place.VMM else self.guest
        used = set(self.host_slots()) if answer is not False else set()
        self.actions += [look(slot.control) for slot in self.layout.slots]
        used |= {number for number in range(len(self.layout.slots)) if self.armed(chosen, number)}
        self.aside = sum(1 << number for number in used)
        names = self.aside_registers()
        self.read(self.cpu, names, Place.HOST)
        self.write(self.cpu, names, load)

    def aside_registers(self) -> list[str]:
        """The registers of the slots put aside, and the small ones if there are any."""
        slots = [slot for number, slot in enumerate(self.layout.slots) if self.aside & 1 << number]
        with_slots = self.layout.small if slots and self.strategy.small is Small.WITH_SLOTS else ()
        return list(dict.fromkeys([name for slot in slots for name in (slot.control, slot.address)] + [*with_slots]))

    def enter_small(self, load: Place | None) -> None:
        """Switch the small registers that do not wait for the slots."""
        small = self.layout.small
        if self.strategy.small is Small.EVERY_EDGE:
            self.read(self.cpu, small, Place.HOST)
            written = [name for name in small if name not in self.layout.by_hardware]
            self.write(self.cpu, written, load or Place.GUEST)
        elif self.strategy.small is Small.QUIET and self.resident == self.cpu:
            self.write(self.cpu, small, Place.GUEST)
        elif self.strategy.small is Small.QUIET and load is None:
            self.write(self.cpu, small, Place.RESET)

    def exit(self) -> None:
        """Stop running the guest: its set out of the hardware, the host's into it, triggers forgotten."""
        strategy, layout, cpu = self.strategy, self.layout, self.cpu
        hardware, untrapped = self.of(cpu).hardware, not self.traps
        # DR7 is in the VMCS by now, and reset.
        chosen = self.vmm if self.loaded is Place.VMM else self.guest
        for name in layout.by_hardware:
            place = self.position[name]
            chosen[place], hardware[place] = hardware[place], self.system.reset[place]
        if self.loaded is Place.GUEST and self.may_stay():
            self.resident = cpu
            if strategy.small is Small.QUIET:
                self.read(cpu, layout.small, Place.GUEST)
                self.write(cpu, layout.small, Place.RESET)
        else:
            self.resident = -1
            moves = [self.save, self.restore]
            for move in moves if strategy.saves_first else reversed(moves):
                move(untrapped)
            self.forget()
        if strategy.horizon is Horizon.EXIT:
            self.touched = False
        self.where = Where.LOADED
        if self.resident != cpu:
            self.loaded, self.aside, self.of(cpu).saved = None, 0, None

    def may_stay(self) -> bool:
        """Whether the guest's set may stay in the hardware while the host runs."""
        strategy = self.strategy
        if strategy.leaves is Horizon.EXIT:
            return False
        # Whoever keeps the host's record knows that the host needs its registers in force now.
        return strategy.host_known is not HostKnown.TRAPPED or not self.host_enabled()

    def save(self, untrapped: bool) -> None:
        """Read the set that was loaded back to memory, where it may have changed."""
        strategy, layout, cpu = self.strategy, self.layout, self.cpu
        if self.loaded is not None and (untrapped or strategy.saves_unchanged):
            if strategy.counts_read:
                self.actions.append(READ_COUNTS)
            names = self.movable(untrapped=untrapped)
            if strategy.scope is Scope.ARMED:
                names = self.aside_registers()
            self.read(cpu, names, self.loaded)
            if strategy.status_cleaned and layout.status in names and strategy.host_from is HostFrom.RECORD:
                self.write(cpu, [layout.status], Place.RESET)
        if strategy.small is Small.EVERY_EDGE:
            into = Place.VMM if self.loaded is Place.VMM else Place.GUEST
            self.read(cpu, [name for name in layout.small if name not in layout.by_hardware], into)

    def restore(self, _untrapped: bool) -> None:
        """Write the host's set."""
        strategy, layout, cpu = self.strategy, self.layout, self.cpu
        if strategy.host_from is HostFrom.RECORD:
            self.restore_record(cpu)
        elif strategy.scope is Scope.ARMED:
            self.write(cpu, self.aside_registers(), Place.HOST)
        elif self.loaded is not None:
            if strategy.counts_read:
                self.actions.append(READ_COUNTS)
            self.write(cpu, self.slots_and_extra, Place.HOST)
        else:
            for number, slot in enumerate(layout.slots):
                if self.aside & 1 << number:
                    self.write(cpu, [slot.control], Place.HOST)
        if strategy.small is Small.EVERY_EDGE:
            self.write(cpu, layout.small, Place.HOST)

    def restore_record(self, cpu: int) -> None:
        """Write the host's set from memory: all that may have changed, or only what is needed to be in force."""
        strategy, layout = self.strategy, self.system.moved[cpu]
        if strategy.small is Small.QUIET:
            self.write(cpu, layout.small if self.loaded is None else self.slots_and_extra, Place.RECORD)
        elif strategy.host_known is HostKnown.NOT:
            pass  # there is no record: the host has no breakpoints of its own
        elif self.host_enabled():
            # Its own DR6 is never worth keeping: the handlers have seen it.
            self.write(cpu, layout.slot_registers, Place.RECORD)
            self.write(cpu, [layout.status] if layout.status else [], Place.RESET)
            self.write(cpu, [name for name in layout.small if name != layout.status], Place.RECORD)

    def forget(self) -> None:
        """The guest's set has left the hardware: with it goes what a longer horizon remembers."""
        if self.strategy.leaves is not Horizon.EXIT:
            self.touched = False

    def leave(self) -> None:
        """Take the guest's resident set out of the hardware where it stayed."""
        cpu, self.cpu = self.cpu, self.resident
        here, self.layout = self.layout, self.system.moved[self.resident]
        # The quiet switch is off in the hardware and already in memory.
        small = self.layout.small if self.strategy.small is Small.QUIET else ()
        self.read(self.resident, [name for name in self.movable(untrapped=True) if name not in small], Place.GUEST)
        self.restore_record(self.resident)
        self.cpu, self.layout, self.resident, self.loaded = cpu, here, -1, None
        self.forget()
