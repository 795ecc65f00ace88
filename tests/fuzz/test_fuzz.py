"""
Hostile input, as much of it as fits beside the other tests; ``python -m tests.fuzz`` sends as much as one likes.

Without a process and without registers, any bytes of several clients are served by a daemon on fakes; with them,
hostile processes besiege a real one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwbpd.core import invariants
from tests.fakes import EPOCH, Rig
from tests.fuzz.judge import Broken, Judge
from tests.fuzz.on_fakes import Siege
from tests.fuzz.said import Said
from tests.hardware.daemon import MARKS

ROOT = Path(__file__).resolve().parents[2]
TID = 812
LIMIT_S = 180  # for what takes some seconds, and may have to wait for the breakpoints of this host

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {"op": st.sampled_from(["hello", "claim", "fit", "release", "rearm", "counts", "slots", "why", "goodbye"])},
    optional={
        "id": st.integers(0, 2**62) | ANYTHING,
        "epoch": st.just(EPOCH) | ANYTHING,
        "version": st.just(1) | ANYTHING,
        "address": st.integers(0, 2**64 - 1) | ANYTHING,
        "length": st.just(8) | ANYTHING,
        "access": st.sampled_from(["r", "w", "x"]) | ANYTHING,
        "tid": st.just(TID) | ANYTHING,
        "cpus": st.lists(st.integers(0, 3)) | ANYTHING,
        "claim": st.integers(0, 9) | ANYTHING,
        "label": ANYTHING,
    },
)
BYTES = st.binary(max_size=80) | FIELDS.map(msgpack.packb) | ANYTHING.map(msgpack.packb)


@given(st.lists(st.tuples(st.integers(0, 3), BYTES), max_size=30))
@settings(max_examples=100)
def test_whatever_several_clients_send_is_answered_and_the_books_stay_true(sent: list[tuple[int, bytes]]) -> None:
    # given clients of two users, one of them without a session
    rig = Rig()
    rig.machine.start_task(TID)
    clients = [rig.client(), rig.client(uid=60001), rig.client(), rig.client(hello=False)]

    # when they send these bytes
    for number, data in sent:
        clients[number].send_bytes(data)
        rig.turn()
        invariants.check(rig.arbiter.books)

    # then each message has one reply, the kernel holds what the books say, and an honest request is served
    for number, client in enumerate(clients):
        replies = [message for message in client.read() if "n" not in message]
        assert len(replies) == sum(to == number for to, _ in sent)
    assert rig.arbiter.books.resources.keys() == rig.machine.kernel.held.keys()
    assert rig.ask(rig.client(), "slots")["op"] == "slots"
    rig.stop()


@pytest.mark.parametrize("seed", range(6))
def test_an_honest_client_is_served_beside_hostile_ones(seed: int) -> None:
    # given hostile clients and an honest one, who all follow from one seed
    siege = Siege(seed)

    # when some thousand messages come; what is checked after each batch is said in on_fakes.py
    tally = siege.run(2000)

    # then it was not for want of claims
    assert tally.granted > 50
    assert tally.replies > 0.9 * tally.messages


@pytest.mark.parametrize("depth", [100, 1000, 100_000])
@pytest.mark.parametrize("nest", [b"\x91", b"\x81\xa1a", b"\xdc\x00\x01", b"\x81\x91"])
def test_however_deep_a_message_is_nested_it_is_refused(depth: int, nest: bytes) -> None:
    rig = Rig()
    client = rig.client()
    request = {"op": "slots", "id": 5, "epoch": EPOCH}

    for data in (nest * depth, bytes([0x84]) + msgpack.packb(request)[1:] + b"\xa1x" + nest * depth):
        client.send_bytes(data)
        rig.turn()

        (reply,) = client.read()
        assert (reply["op"], reply["errno"]) == ("error", "EBADMSG")
    assert rig.ask(client, "slots")["op"] == "slots"
    rig.stop()


# --- the judge itself ------------------------------------------------------------------------------------------------

SLOTS = Said(b"", frozenset({1}), "slots", right=True)
NEXT = Said(b"", frozenset({2}), "slots", right=True)
LATE = Said(b"", frozenset({3}), "foreign", right=True, may_be_late=True)
BAD = Said(b"", frozenset({4}), "slots", wrong="most")
PAGE = {"op": "slots", "pools": {}, "cpus": [], "resources": [], "more": False}
REFUSAL = {"op": "error", "errno": "EBADMSG", "sentence": "`most` is out of range"}


@pytest.mark.parametrize(
    ("said", "heard", "why"),
    [
        ([SLOTS], {"op": "what", "id": 1}, "no such reply"),
        ([], {**PAGE, "id": 9}, "nobody asked for"),
        ([SLOTS, NEXT], {**PAGE, "id": 2}, "has no reply"),
        ([SLOTS], {"op": "bye", "id": 1}, "was answered with bye"),
        ([SLOTS], {**REFUSAL, "id": 1}, "is a request of the protocol"),
        ([SLOTS], {**PAGE, "id": 1, "more": 0}, "not of type bool"),
        ([SLOTS], {**PAGE, "id": 1, "secret": 0}, "does not have"),
        ([BAD], {**PAGE, "id": 4}, "was served"),
        ([BAD], {**REFUSAL, "id": 4, "sentence": "something is wrong"}, "does not name"),
        ([BAD], {**REFUSAL, "id": 4, "errno": "EPERM"}, "has a wrong"),
        ([BAD], {**REFUSAL, "id": 4, "errno": "EWHAT"}, "no such errno"),
        ([], {"op": "closing", "n": 2, "sentence": "the end"}, "notice 2 where 1 was due"),
        ([], {"op": "hits", "n": 1, "claim": 5, "count": 0, "records": b""}, "not ours"),
    ],
)
def test_the_judge_notices(said: list[Said], heard: dict[str, object], why: str) -> None:
    judge = Judge()
    for one in said:
        judge.said(one)

    with pytest.raises(Broken, match=re.escape(why)):
        judge.hear(heard)


def test_the_judge_lets_replies_overtake_only_where_somebody_else_is_looked_at() -> None:
    judge = Judge()
    for one in (LATE, SLOTS):
        judge.said(one)

    judge.hear({**PAGE, "id": 1})
    assert judge.is_settled
    judge.hear({"op": "foreign", "id": 3, "holders": []})

    assert judge.is_settled
    assert judge.replies == 2


# --- a real daemon ---------------------------------------------------------------------------------------------------


@pytest.mark.hardware
@pytest.mark.skipif(MARKS[1].args[0] or MARKS[2].args[0], reason="the whole of it needs x86-64 and root")
def test_a_real_daemon_stands_hostile_processes() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--messages", "4000"]

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    if run.returncode == 2:
        pytest.skip(run.stderr.splitlines()[-1])
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.fullmatch(r"messages=(\d+) replies=(\d+) dropped_connections=(\d+) leaks=0", run.stdout.splitlines()[-1])
    assert found, run.stdout
    assert int(found[1]) >= 4000
    assert int(found[2]) > 500  # how many are cut off before their answers varies with the seed and the transport
