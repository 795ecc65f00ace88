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
    ARMED = "armed"  # granted
    RELEASING = "releasing"  # still counted in the books, until the machine has given the slot back
    RELEASED = "released"
    REFUSED = "refused"


class Step(enum.StrEnum):
    FITS = "fits"
    DOES_NOT_FIT = "does not fit"
    ARMED = "armed"
    ARM_FAILED = "arm failed"
    RELEASE = "release"
    DISARMED = "disarmed"


TRANSITIONS: dict[tuple[State, Step], State] = {
    (State.REQUESTED, Step.FITS): State.ARMING,
    (State.REQUESTED, Step.DOES_NOT_FIT): State.REFUSED,
    (State.ARMING, Step.ARMED): State.ARMED,
    (State.ARMING, Step.ARM_FAILED): State.REFUSED,
    (State.ARMED, Step.RELEASE): State.RELEASING,
    (State.RELEASING, Step.DISARMED): State.RELEASED,
}

ENDED = frozenset({State.RELEASED, State.REFUSED})
HOLDING = frozenset({State.ARMING, State.ARMED, State.RELEASING})  # the books count its slots


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
