"""The table of a claim's life: it has no dead ends, it names what it allows, and the picture of it is true."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from hwbpd.core.lifecycle import ENDED, HOLDING, TRANSITIONS, State, Step, after, diagram

ARBITRATION = Path(__file__).resolve().parents[2] / "docs" / "arbitration.md"


def reachable_from(state: State) -> set[State]:
    """Every state that a claim can come to, the one it is in included."""
    seen, at = {state}, [state]
    while at:
        here = at.pop()
        followers = {follower for (before, _), follower in TRANSITIONS.items() if before is here} - seen
        seen |= followers
        at += followers
    return seen


def test_every_state_is_reached_from_the_first() -> None:
    assert reachable_from(State.REQUESTED) == set(State)


@pytest.mark.parametrize("state", list(State))
def test_from_every_state_an_end_can_be_reached_and_an_end_is_final(state: State) -> None:
    assert reachable_from(state) & ENDED
    assert state not in ENDED or reachable_from(state) == {state}


@pytest.mark.parametrize(("state", "step"), list(product(State, Step)))
def test_a_step_leads_where_the_table_says_or_is_our_own_mistake(state: State, step: Step) -> None:
    if (state, step) in TRANSITIONS:
        assert after(state, step) is TRANSITIONS[state, step]
    else:
        with pytest.raises(AssertionError, match=f"a claim that is {state} cannot take the step .*'{step}'"):
            after(state, step)


def test_slots_are_counted_from_before_the_machine_is_asked_until_it_has_given_them_back() -> None:
    asked_to_arm = {follower for (_, step), follower in TRANSITIONS.items() if step is Step.FITS}
    assert asked_to_arm <= HOLDING
    for (state, step), follower in TRANSITIONS.items():
        taken, given_back = state not in HOLDING, follower not in HOLDING
        if taken and not given_back:
            # To ride on what is held already, or to get what a thread has kept, the machine need not be asked.
            assert step in (Step.FITS, Step.RESUME, Step.RIDES, Step.REUSED)
        if given_back and not taken:
            # The machine has undone what it had armed when it says that there was no room.
            answers = (Step.ARM_FAILED, Step.NO_ROOM, Step.DISARMED)
            assert step in (*answers, Step.REUSED), "only the machine's answer frees a slot, or another has it now"
    assert not HOLDING & ENDED


def test_the_diagram_shows_every_transition_and_nothing_else() -> None:
    first, *lines = diagram().splitlines()

    assert first == "stateDiagram-v2"
    assert sorted(lines) == sorted(
        ["    [*] --> requested"]
        + [f"    {state.value} --> {follower.value}: {step.value}" for (state, step), follower in TRANSITIONS.items()]
        + [f"    {state.value} --> [*]" for state in ENDED]
    )


def test_the_picture_in_the_docs_is_drawn_from_the_table() -> None:
    page = ARBITRATION.read_text(encoding="utf-8")
    pictures = re.findall(r"^```mermaid\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)
    assert [picture for picture in pictures if picture.startswith("stateDiagram")] == [diagram()]
