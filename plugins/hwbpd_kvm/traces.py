"""
Histories of vCPUs as files: one JSON object a line, and what the kernel's tracepoints say turned into that.

docs/kvm-traces.md has the format, complete, and how to record one. The first line is a header; every other line is one
event of ``state.py`` under the name in ``EVENTS``. Reading is strict: a line that is not understood is refused with its
number, for a figure computed from half a trace looks like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from msgspec import Struct

from hwbpd_kvm.registers import ARM64_MOST, CORTEX_A7, CORTEX_A15, CORTEX_A53, CORTEX_A57, X86, Layout
from hwbpd_kvm.state import (
    ArmedBy,
    DebugOff,
    DebugOn,
    Enter,
    Event,
    Exit,
    GuestRead,
    GuestWrite,
    HostArm,
    HostDisarm,
    Load,
    OsLock,
    OtherVcpu,
    Put,
    Query,
)

FORMAT: Final = "hwbpd-kvm-trace"
VERSION: Final = 1
LAYOUTS: Final[Mapping[str, Layout]] = {
    layout.name: layout for layout in (CORTEX_A15, CORTEX_A7, CORTEX_A57, CORTEX_A53, ARM64_MOST, X86)
}
EVENTS: Final[Mapping[str, type[Event]]] = {
    "load": Load,
    "put": Put,
    "query": Query,
    "enter": Enter,
    "exit": Exit,
    "guest_read": GuestRead,
    "guest_write": GuestWrite,
    "os_lock": OsLock,
    "debug_on": DebugOn,
    "debug_off": DebugOff,
    "host_arm": HostArm,
    "host_disarm": HostDisarm,
    "other_vcpu": OtherVcpu,
}
_NAMES: Final = {kind: name for name, kind in EVENTS.items()}
_UNREAD: Final = frozenset({"event", "time_ns", "note"})  # for people and for other programs


class BadTrace(ValueError):
    """A file is not a trace; the sentence says where and why."""


class Trace(Struct, frozen=True):
    """One vCPU's history. ``cpus``: the layout of each CPU, by number."""

    cpus: tuple[Layout, ...]
    events: tuple[Event, ...]


def dump(trace: Trace) -> Iterator[str]:
    """Yield the lines of a file, without ends of line."""
    yield json.dumps({"format": FORMAT, "version": VERSION, "cpus": [cpu.name for cpu in trace.cpus]})
    for event in trace.events:
        fields = {name: _plain(getattr(event, name)) for name in event.__struct_fields__}
        yield json.dumps({"event": _NAMES[type(event)]} | fields)


def _plain(value: Any) -> Any:
    if isinstance(value, ArmedBy):
        return value.value
    return dict(value) if isinstance(value, tuple) else value


def parse(lines: Iterable[str]) -> Trace:
    """
    Return the trace in the lines of a file; empty lines and those that begin with ``#`` do not count.

    :raises BadTrace: with the number of the line.
    """
    cpus: tuple[Layout, ...] = ()
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise BadTrace("not an object")
            if cpus:
                events.append(_event(value, cpus))
            else:
                cpus = _header(value)
        except (json.JSONDecodeError, BadTrace) as error:
            raise BadTrace(f"line {number}: {error}") from error
    if not cpus:
        raise BadTrace("no header line")
    return Trace(cpus, tuple(events))


def _header(value: Mapping[str, Any]) -> tuple[Layout, ...]:
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise BadTrace(f'the first line is {{"format": "{FORMAT}", "version": {VERSION}, "cpus": [...]}}')
    names = value.get("cpus")
    if not isinstance(names, list) or not names or any(name not in [*LAYOUTS] for name in names):
        raise BadTrace(f'"cpus" is a list with one of {", ".join(LAYOUTS)} for each CPU')
    cpus = tuple(LAYOUTS[name] for name in names)
    if len({cpu.master for cpu in cpus}) > 1:
        raise BadTrace("CPUs of different architectures cannot share a guest")
    return cpus


def _event(value: Mapping[str, Any], cpus: tuple[Layout, ...]) -> Event:
    name = value.get("event")
    kind = EVENTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise BadTrace(f'"event" is one of {", ".join(EVENTS)}, not {name!r}')
    given = {key: field for key, field in value.items() if key not in _UNREAD}
    known = kind.__struct_fields__
    needed = known[: len(known) - len(kind.__struct_defaults__)]
    if wrong := sorted(given.keys() - set(known)) or sorted(set(needed) - given.keys()):
        raise BadTrace(f"{name} has the fields {', '.join(known) or 'none'}: see {', '.join(wrong)}")
    return kind(**{key: _field(key, field, cpus) for key, field in given.items()})


def _field(name: str, value: Any, cpus: tuple[Layout, ...]) -> Any:
    """Return one field as the event has it."""
    registers = {register for cpu in cpus for register in cpu.registers}
    match name:
        case "register" if isinstance(value, str) and value in registers:
            return value
        case "locked" if isinstance(value, bool):
            return value
        case "by" if value in [by.value for by in ArmedBy]:
            return ArmedBy(value)
        case "values" if isinstance(value, dict) and value.keys() <= registers and all(map(_is_word, value.values())):
            return tuple(value.items())
        case "cpu" if _is_word(value) and value < len(cpus):
            return value
        case "slot" if _is_word(value) and value < min(len(cpu.slots) for cpu in cpus):
            return value
        case "value" | "address" | "control" | "leftover" if _is_word(value):
            return value
        case _:
            raise BadTrace(f'"{name}" cannot be {value!r}')


def _is_word(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


# --- from the kernel's tracepoints -----------------------------------------------------------------------------------

# As `perf script` and the file trace write events of the kvm group: ... [003] ... kvm:kvm_exit: vcpu 0 reason ...
_LINE = re.compile(r"\[(?P<cpu>\d+)\].*?(?:kvm:)?\b(?P<name>kvm_entry|kvm_exit|trap_reg): (?P<rest>.*)$")
_VCPU = re.compile(r"\bvcpu (\d+)")
_VMX = re.compile(r"\breason DR_ACCESS\b.*?\binfo1 (?:0x)?([0-9a-f]+)")
_SVM = re.compile(r"\breason (read|write)_dr([0-7])\b", re.IGNORECASE)
_ARM64 = re.compile(r"trap_([bw])([cv])r (write to|read from) reg (\d+) \((0x[0-9a-f]+)\)")
_ALIASES = {4: 6, 5: 7}


def from_tracepoints(lines: Iterable[str], layout: Layout, vcpu: int = 0) -> Trace:
    """
    Return one vCPU's history as ``kvm_entry``, ``kvm_exit`` and, on arm64, ``trap_reg`` have it.

    An access that trapped is one event, not the exit and the entry that it took. The tracepoints of x86 do not say what
    was written, so a write of DR7 is taken for one that arms nothing. What the guest did untrapped is not in a trace.
    Those of arm64 do not name the vCPU: give only its thread's.

    :raises BadTrace: when there is nothing of that vCPU.
    """
    reader = _Tracepoints()
    for line in lines:
        match = _LINE.search(line)
        if match is None:
            continue
        of = _VCPU.search(match["rest"])
        if of is not None and int(of[1]) != vcpu:
            continue
        match match["name"]:
            case "kvm_entry":
                reader.entry(int(match["cpu"]))
            case "kvm_exit":
                reader.exit(_x86_access(match["rest"]))
            case _:
                reader.trapped(_arm64_access(match["rest"]))
    if reader.cpu == -1:
        raise BadTrace(f"no kvm_entry of vcpu {vcpu}")
    events = reader.finished()
    cpus = 1 + max(event.cpu for event in events if isinstance(event, Load))
    return Trace((layout,) * cpus, tuple(events))


class _Tracepoints:
    """Puts events together. ``inside``: the guest runs, or is away for no more than an access that trapped."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.cpu = -1
        self.inside = False
        self.accesses: list[Event] = []  # that have trapped since the last entry

    def entry(self, cpu: int) -> None:
        """The guest is entered, for the first time, again, or after an access that trapped."""
        if cpu != self.cpu:
            if self.inside:
                self._leave()  # it moved while an access was being emulated
            if self.cpu != -1:
                self.events.append(Put())
            self.events.append(Load(cpu))
            self.cpu = cpu
        if not self.inside:
            self.events.append(Enter())
            self.inside = True
        self._tell_accesses()

    def exit(self, access: Event | None) -> None:
        """The guest is left, because of an access or for another reason."""
        if not self.inside:
            return  # the trace begins in the middle
        if access is not None:
            self.accesses.append(access)
        else:
            self._leave()

    def trapped(self, access: Event | None) -> None:
        """What the exit that has just been told was for."""
        if access is not None and self.events and isinstance(self.events[-1], Exit):
            self.events.pop()
            self.inside = True
            self.accesses.append(access)

    def finished(self) -> list[Event]:
        """Return all of it; a guest that still runs is taken out."""
        if self.inside:
            self._leave()
        return self.events

    def _leave(self) -> None:
        self._tell_accesses()
        self.events.append(Exit())
        self.inside = False

    def _tell_accesses(self) -> None:
        self.events += self.accesses
        self.accesses = []


def _x86_access(rest: str) -> Event | None:
    """
    Return the access that an exit is for, or None.

    Intel SDM Vol. 3C, "Exit Qualification for MOV DR": bits 2:0 the register, bit 4 set for a read.
    """
    if (vmx := _VMX.search(rest)) is not None:
        qualification = int(vmx[1], 16)
        number, is_read = qualification & 7, bool(qualification & 1 << 4)
    elif (svm := _SVM.search(rest)) is not None:
        number, is_read = int(svm[2]), svm[1].lower() == "read"
    else:
        return None
    register = f"DR{_ALIASES.get(number, number)}"
    return GuestRead(register) if is_read else GuestWrite(register, 0)


def _arm64_access(rest: str) -> Event | None:
    match = _ARM64.search(rest)
    if match is None:
        return None
    kind, part, direction, number, value = match.groups()
    register = f"DBG{kind.upper()}{part.upper()}R{number}_EL1"
    return GuestWrite(register, int(value, 16)) if direction == "write to" else GuestRead(register)
