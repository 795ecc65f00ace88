"""
A claim from request to end, as a table.

A claim moves only along this table; docs/arbitration.md draws the picture from it. Arming and disarming have states
of their own because the kernel, not we, says when a slot is taken and when it is free: until it has spoken nobody is
told anything.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    REQUESTED = "requested"
    WAITING = "waiting"  # for room; it holds nothing
    DISPLACING = "displacing"  # waiting for those of lower rank to give way
    ARMING = "arming"  # counted in the books, and the machine is asked
    ATTRIBUTING = "attributing"  # the kernel had no room although the books had; somebody looks who is in the way
    ARMED = "armed"  # granted
    GUARDED = "guarded"  # too many hits: it holds its slots and reports nothing until it is armed again
    REARMING = "rearming"
    YIELDING = "yielding"  # asked to give way; it goes on until it does, or has to
    SUSPENDING = "suspending"  # still counted in the books, until the machine has given the slots back
    SUSPENDED = "suspended"  # it holds nothing, and waits in its old place
    RESUMING = "resuming"  # counted again, and the machine is asked
    TAKING = "taking"  # its tracer takes the slot just now; the books keep it for that
    TAKEN = "taken"  # its tracer has it
    RESIDUE = "residue"  # the claim is over; the thread has the slot until it exits or runs another program
    RELEASING = "releasing"  # still counted in the books, until the machine has given the slots back
    RELEASED = "released"
    REFUSED = "refused"


class Step(enum.StrEnum):
    FITS = "fits"
    DOES_NOT_FIT = "does not fit"
    RIDES = "shares a slot"
    MUST_WAIT = "must wait"
    DISPLACES = "displaces others"
    GIVE_UP = "waited too long"
    LEAVE = "leaves the queue"
    ARMED = "armed"
    NO_ROOM = "no room in the kernel"
    ARM_FAILED = "arm failed"
    ATTRIBUTED = "attributed"
    FLOODED = "flooded"
    REARM = "rearm"
    REVOKE = "asked to give way"
    SPARED = "spared"
    SPARED_GUARDED = "spared, still silenced"
    SUSPEND = "gives way"
    RESUME = "room again"
    TAKE = "tracer takes it"
    TAKEN = "taken"
    LEFT_BEHIND = "left behind"
    REUSED = "reused"
    RELEASE = "release"
    DISARMED = "disarmed"


TRANSITIONS: dict[tuple[State, Step], State] = {
    (State.REQUESTED, Step.FITS): State.ARMING,
    (State.REQUESTED, Step.DOES_NOT_FIT): State.REFUSED,
    (State.REQUESTED, Step.RIDES): State.ARMED,
    (State.REQUESTED, Step.REUSED): State.ARMED,
    (State.REQUESTED, Step.MUST_WAIT): State.WAITING,
    (State.REQUESTED, Step.DISPLACES): State.DISPLACING,
    (State.WAITING, Step.FITS): State.ARMING,
    (State.WAITING, Step.RIDES): State.ARMED,
    (State.WAITING, Step.REUSED): State.ARMED,
    (State.WAITING, Step.GIVE_UP): State.REFUSED,
    (State.WAITING, Step.LEAVE): State.RELEASED,
    (State.DISPLACING, Step.FITS): State.ARMING,
    (State.DISPLACING, Step.RIDES): State.ARMED,
    (State.DISPLACING, Step.REUSED): State.ARMED,
    (State.DISPLACING, Step.MUST_WAIT): State.WAITING,
    (State.DISPLACING, Step.GIVE_UP): State.REFUSED,
    (State.DISPLACING, Step.LEAVE): State.RELEASED,
    (State.ARMING, Step.ARMED): State.ARMED,
    (State.ARMING, Step.TAKE): State.TAKING,  # without a placeholder
    (State.ARMING, Step.ARM_FAILED): State.REFUSED,
    (State.ARMING, Step.NO_ROOM): State.ATTRIBUTING,
    (State.ATTRIBUTING, Step.ATTRIBUTED): State.REFUSED,
    (State.ATTRIBUTING, Step.MUST_WAIT): State.WAITING,
    (State.ARMED, Step.FLOODED): State.GUARDED,
    (State.GUARDED, Step.REARM): State.REARMING,
    (State.REARMING, Step.ARMED): State.ARMED,
    (State.ARMED, Step.REVOKE): State.YIELDING,
    (State.GUARDED, Step.REVOKE): State.YIELDING,
    (State.YIELDING, Step.SPARED): State.ARMED,
    (State.YIELDING, Step.SPARED_GUARDED): State.GUARDED,
    (State.YIELDING, Step.SUSPEND): State.SUSPENDING,
    (State.SUSPENDING, Step.DISARMED): State.SUSPENDED,
    (State.SUSPENDED, Step.RESUME): State.RESUMING,
    (State.SUSPENDED, Step.RIDES): State.ARMED,
    (State.SUSPENDED, Step.REUSED): State.ARMED,
    (State.SUSPENDED, Step.LEAVE): State.RELEASED,
    (State.RESUMING, Step.ARMED): State.ARMED,
    (State.RESUMING, Step.NO_ROOM): State.SUSPENDED,
    (State.RESUMING, Step.ARM_FAILED): State.RELEASED,
    (State.ARMED, Step.TAKE): State.TAKING,
    (State.TAKING, Step.TAKEN): State.TAKEN,
    (State.TAKING, Step.LEFT_BEHIND): State.RESIDUE,
    (State.TAKING, Step.RELEASE): State.RELEASING,  # it could not be taken, or was not
    (State.TAKEN, Step.LEFT_BEHIND): State.RESIDUE,
    (State.TAKEN, Step.RELEASE): State.RELEASING,  # because the thread has gone
    (State.RESIDUE, Step.REUSED): State.RELEASED,
    (State.RESIDUE, Step.RELEASE): State.RELEASING,
    (State.ARMED, Step.RELEASE): State.RELEASING,
    (State.GUARDED, Step.RELEASE): State.RELEASING,
    (State.YIELDING, Step.RELEASE): State.RELEASING,
    (State.REARMING, Step.RELEASE): State.RELEASING,  # because it could not be armed again
    (State.RELEASING, Step.DISARMED): State.RELEASED,
}

ENDED = frozenset({State.RELEASED, State.REFUSED})
QUEUED = frozenset({State.WAITING, State.DISPLACING, State.SUSPENDED})  # in the queue, with nothing held
ARMED_BY_US = frozenset({State.ARMED, State.GUARDED, State.YIELDING})  # granted, and ours to take back
# Counted in the books. A claim may be found in one of these, or queued or attributing, between two messages, but for
# those in which the machine is being asked.
HALFWAY = frozenset({State.ARMING, State.REARMING, State.SUSPENDING, State.RESUMING, State.RELEASING})
HOLDING = HALFWAY | ARMED_BY_US | {State.TAKING, State.TAKEN, State.RESIDUE}


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
