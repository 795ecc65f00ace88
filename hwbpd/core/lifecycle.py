"""
A claim from request to end, as a table.

A claim moves only along this table; docs/architecture.md draws the picture from it. Arming and disarming have states
of their own because the kernel, not we, says when a slot is taken and when it is free: until it has spoken nobody is
told anything.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    REQUESTED = "requested"
    ARMING = "arming"  # counted in the books, and the machine is asked
    ATTRIBUTING = "attributing"  # the kernel had no room although the books had; somebody looks who is in the way
    ARMED = "armed"  # granted
    GUARDED = "guarded"  # too many hits: it holds its slots and reports nothing until it is armed again
    REARMING = "rearming"
    RELEASING = "releasing"  # still counted in the books, until the machine has given the slots back
    RELEASED = "released"
    REFUSED = "refused"


class Step(enum.StrEnum):
    FITS = "fits"
    DOES_NOT_FIT = "does not fit"
    ARMED = "armed"
    NO_ROOM = "no room in the kernel"
    ARM_FAILED = "arm failed"
    ATTRIBUTED = "attributed"
    FLOODED = "flooded"
    REARM = "rearm"
    RELEASE = "release"
    DISARMED = "disarmed"


TRANSITIONS: dict[tuple[State, Step], State] = {
    (State.REQUESTED, Step.FITS): State.ARMING,
    (State.REQUESTED, Step.DOES_NOT_FIT): State.REFUSED,
    (State.ARMING, Step.ARMED): State.ARMED,
    (State.ARMING, Step.ARM_FAILED): State.REFUSED,
    (State.ARMING, Step.NO_ROOM): State.ATTRIBUTING,
    (State.ATTRIBUTING, Step.ATTRIBUTED): State.REFUSED,
    (State.ARMED, Step.FLOODED): State.GUARDED,
    (State.GUARDED, Step.REARM): State.REARMING,
    (State.REARMING, Step.ARMED): State.ARMED,
    (State.ARMED, Step.RELEASE): State.RELEASING,
    (State.GUARDED, Step.RELEASE): State.RELEASING,
    (State.REARMING, Step.RELEASE): State.RELEASING,  # because it could not be armed again
    (State.RELEASING, Step.DISARMED): State.RELEASED,
}

ENDED = frozenset({State.RELEASED, State.REFUSED})
HOLDING = frozenset({State.ARMING, State.ARMED, State.GUARDED, State.REARMING, State.RELEASING})  # counted in the books
SETTLED = frozenset({State.ARMED, State.GUARDED})  # may be found so between two messages; ATTRIBUTING too


def after(state: State, step: Step) -> State:
    """Return the state that follows; a step that the table does not have is our own mistake."""
    assert (state, step) in TRANSITIONS, f"a claim that is {state} cannot take the step {step!r}"
    return TRANSITIONS[state, step]


def diagram() -> str:
    """Return the table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> requested"]
    lines += [f"    {state} --> {follower}: {step}" for (state, step), follower in TRANSITIONS.items()]
    lines += [f"    {state} --> [*]" for state in State if state in ENDED]
    return "\n".join(lines)
