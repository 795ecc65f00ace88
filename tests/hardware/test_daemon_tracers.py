"""Slots that a tracer takes itself, through the daemon and on real registers: kept, taken, left behind, or stolen."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

import hwbp
from examples.target import Target
from tests.hardware.daemon import MARKS, WAIT_S, Daemon, kernel_room, outside
from tests.hardware.tracer import Tracer
from tests.judges.users import wait_until

pytestmark = MARKS

SLOTS = 4

# A debugger that asks first: it has a placeholder, says that it takes the slot, pokes or not, and is then killed.
DEBUGGER = """
import signal, sys
import hwbp
from tests.hardware.tracer import Tracer
socket, tid, pokes, placeholder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with hwbp.connect(socket) as client, Tracer(tid) as tracer:
    slot = client.tracer_claim(tid, "mem:0x10000/8:w:u", placeholder=bool(placeholder))
    def poke():
        if pokes:
            tracer.poke(1)
        tracer.do("detach")
        print(slot.claim_id, flush=True)
        signal.pause()
    slot.take(poke)
"""


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def client(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect() as client:
        yield client


@pytest.fixture
def tracer(target: Target) -> Iterator[Tracer]:
    with Tracer(target.tid) as tracer:
        yield tracer


def event(target: Target) -> str:
    return f"mem:{target.variable:#x}/8:w:u"


def states(client: hwbp.Client) -> list[str]:
    """Of every claim that has a slot."""
    return [claim.state for row in client.slots().resources for claim in row.claims]


def poke(tracer: Tracer, target: Target, register: int = 0) -> Callable[[], None]:
    return lambda: tracer.poke(register, target.variable)


def over(daemon: Daemon, claim_id: int, how: str) -> None:
    daemon.logged("ended", claim_id=claim_id, how=how)


# --- kept and taken --------------------------------------------------------------------------------------------------


def test_a_placeholder_holds_the_slot_until_the_tracer_takes_it(
    client: hwbp.Client, target: Target, tracer: Tracer
) -> None:
    # given a thread of which the others are taken
    with outside(SLOTS - 1, tid=target.tid), client.tracer_claim(target.tid, event(target)) as slot:
        # then the last one is the tracer's before it touches it
        assert (states(client), kernel_room(tid=target.tid)) == (["armed"], 0)
        with pytest.raises(OSError, match="poke"):
            tracer.poke(0)

        # and it can take it when it says so
        slot.take(poke(tracer, target))
        assert (states(client), kernel_room(tid=target.tid)) == (["taken"], 0)
        tracer.do("enable 0")
        tracer.do("go")
        target.send("write 1")
        tracer.do("stop")


def test_without_a_placeholder_the_books_keep_the_place(client: hwbp.Client, target: Target, tracer: Tracer) -> None:
    slots = [client.tracer_claim(target.tid, event(target), placeholder=False) for _ in range(SLOTS)]
    assert kernel_room(tid=target.tid) == SLOTS, "nothing is taken yet"

    with pytest.raises(hwbp.NoFreeSlot):
        client.claim(event(target), tid=target.tid)

    for register, slot in enumerate(slots):
        slot.take(poke(tracer, target, register))
    assert (states(client), kernel_room(tid=target.tid)) == (["taken"] * SLOTS, 0)


def test_what_a_tracer_has_taken_nobody_can_displace(client: hwbp.Client, target: Target, tracer: Tracer) -> None:
    for register in range(SLOTS):
        client.tracer_claim(target.tid, event(target)).take(poke(tracer, target, register))

    with pytest.raises(hwbp.NoFreeSlot) as refused:
        client.claim(event(target), tid=target.tid, kind="kgdb")

    assert sum(holder.slots for holder in refused.value.holders) == SLOTS


def test_a_placeholder_can_be_displaced_and_comes_back(
    daemon: Daemon, client: hwbp.Client, target: Target, tracer: Tracer
) -> None:
    # given placeholders for every slot
    slots = [client.tracer_claim(target.tid, event(target)) for _ in range(SLOTS)]

    # when somebody of a higher rank wants one, then the youngest gives way, and cannot be taken meanwhile
    with daemon.connect() as other:
        other.claim(event(target), tid=target.tid, kind="kvm")
        assert client.wait(WAIT_S)
        wait_until(lambda: client.wait(0.01) or slots[-1].watch.state == "suspended", "it is told to give way")
        with pytest.raises(hwbp.BadClaim):
            slots[-1].take(poke(tracer, target))

    # and is there again afterwards
    while slots[-1].watch.state == "suspended":
        assert client.wait(WAIT_S)
    slots[-1].take(poke(tracer, target))
    assert sorted(states(client)) == ["armed"] * 3 + ["taken"]


# --- left behind -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["exit", "exec"])
def test_what_a_tracer_had_is_left_until_the_thread_ends(
    daemon: Daemon, client: hwbp.Client, target: Target, end: str
) -> None:
    # given a tracer that took a slot and has left
    with Tracer(target.tid) as tracer:
        slot = client.tracer_claim(target.tid, event(target))
        slot.take(poke(tracer, target))
        slot.watch.release()

    # then the slot is still taken, by nobody, and named in a refusal
    assert (states(client), kernel_room(tid=target.tid)) == (["residue"], SLOTS - 1)
    held = [client.claim("mem:0x1000/8:w:u", tid=target.tid, delivery="hold") for _ in range(SLOTS - 1)]
    with pytest.raises(hwbp.NoFreeSlot) as refused:
        client.claim(event(target), tid=target.tid)
    assert slot.claim_id in {claim for holder in refused.value.holders for claim in holder.claim_ids}
    assert f"as residue: 1 on tid {target.tid}" in str(refused.value)
    story = client.why(slot.claim_id)
    assert story.state == "residue"
    assert any("until it exits or runs another program" in line for line in story.lines)
    with pytest.raises(hwbp.HwbpError):
        client.release(slot.claim_id)
    for watch in held:
        watch.release()

    # when the thread ends or runs another program, then it is free
    if end == "exit":
        target.kill()
    else:
        target.command("exec")
    over(daemon, slot.claim_id, end)
    assert not client.slots().resources
    if end == "exec":
        assert kernel_room(tid=target.tid) == SLOTS


def test_the_next_tracer_of_the_thread_has_what_the_last_one_left(
    daemon: Daemon, client: hwbp.Client, target: Target
) -> None:
    # given a thread with one slot left behind, and the others taken for good
    with Tracer(target.tid) as first:
        slot = client.tracer_claim(target.tid, event(target))
        slot.take(poke(first, target))
        slot.watch.release()
    with outside(SLOTS - 1, tid=target.tid):
        with pytest.raises(hwbp.NoFreeSlot):
            client.claim(event(target), tid=target.tid, kind="kgdb")

        # when another tracer of that thread asks, then that is its, without room, and it works
        with Tracer(target.tid) as second, client.tracer_claim(target.tid, event(target)) as again:
            over(daemon, slot.claim_id, "reused")
            assert kernel_room(tid=target.tid) == 0
            again.take(poke(second, target))
            second.do("enable 0")
            second.do("go")
            target.send("write 1")
            second.do("stop")
            assert states(client) == ["taken"]

        # and it is left behind once more
        assert (states(client), kernel_room(tid=target.tid)) == (["residue"], 0)
        assert target.answer()["did"] == 1


@pytest.mark.parametrize("placeholder", [True, False])
@pytest.mark.parametrize("pokes", [True, False])
def test_a_tracer_that_dies_while_it_takes_its_slot_leaves_what_the_thread_has_and_nothing_else(
    daemon: Daemon, client: hwbp.Client, target: Target, pokes: bool, placeholder: bool
) -> None:
    # given an earlier tracer's slot on the thread, and a debugger that is between `taking` and `taken`
    with Tracer(target.tid) as tracer:
        client.tracer_claim(target.tid, event(target)).take(poke(tracer, target))
    arguments = [str(daemon.socket), str(target.tid), str(int(pokes)), str(int(placeholder))]
    with subprocess.Popen([sys.executable, "-c", DEBUGGER, *arguments], stdout=subprocess.PIPE) as debugger:
        assert debugger.stdout is not None
        assert select.select([debugger.stdout], [], [], WAIT_S)[0]
        claim_id = int(debugger.stdout.readline())
        assert sorted(states(client)) == ["taken", "taking"]

        # when it dies
        debugger.send_signal(signal.SIGKILL)

    # then its slot is left behind if the thread has it, and free if not
    if pokes:
        wait_until(lambda: sorted(states(client)) == ["residue", "taken"], "what it took is left behind")
        assert kernel_room(tid=target.tid) == SLOTS - 2
    else:
        over(daemon, claim_id, "session")
        assert states(client) == ["taken"]
        assert kernel_room(tid=target.tid) == SLOTS - 1


def test_a_debugger_that_dies_with_its_slot_leaves_it_to_the_thread(daemon: Daemon, target: Target) -> None:
    client = daemon.connect()
    with Tracer(target.tid) as tracer:
        slot = client.tracer_claim(target.tid, event(target))
        slot.take(poke(tracer, target))
        client.close()
        tracer.die()

    with daemon.connect() as observer:
        wait_until(lambda: states(observer) == ["residue"], "it is left behind")
        assert kernel_room(tid=target.tid) == SLOTS - 1
        target.kill()
        over(daemon, slot.claim_id, "exit")
        assert not observer.slots().resources


# --- stolen in the window --------------------------------------------------------------------------------------------


def test_who_takes_the_slot_first_is_told_to_the_tracer_and_nothing_is_left(
    client: hwbp.Client, target: Target, tracer: Tracer
) -> None:
    # given a tracer with a placeholder in the last slot
    with outside(SLOTS - 1, tid=target.tid):
        slot = client.tracer_claim(target.tid, event(target))

        # when somebody outside is faster between `take` and the poke
        with ExitStack() as thieves:

            def too_late() -> None:
                thieves.enter_context(outside(1, tid=target.tid))
                tracer.poke(0, target.variable)

            with pytest.raises(OSError, match="poke") as refused:
                slot.take(too_late)
            assert refused.value.errno == errno.ENOSPC

            # then the claim is over, and it is said who it was
            assert slot.watch.ended
            assert slot.watch.ended.reason == "take failed"
            told = slot.stolen_by(WAIT_S)
            assert told
            assert "taken first" in told.sentence
            assert os.getpid() in {holder.pid for holder in told.holders}
            assert not client.slots().resources

    # and the thread is unharmed
    tracer.do("detach")
    assert target.command("write 3")["did"] == 3
    assert kernel_room(tid=target.tid) == SLOTS
