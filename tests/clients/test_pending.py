"""A claim that waits: its place, its grant, the ends that a wait can have, and who need not wait at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

import hwbp
from tests.clients.fake_daemon import (
    FakeDaemon,
    Message,
    always,
    error,
    final,
    gone,
    hits,
    message,
    queued,
    record,
    room,
)

EVENT = "mem:0x404040/8:w"
IN_VAIN = gone(1, "timeout") | {"sentence": "no room came for tid 813 in 5.000 s"}


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_the_wait_is_told_apart_from_the_request(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a claim that may wait a minute,
    before_ns = time.monotonic_ns()
    client.claim(EVENT, tid=1, wait=60, priority=-3)

    # then the daemon is told until when, and that the request itself is answered much sooner.
    (request,) = daemon.asked("claim")
    assert 59e9 < request["wait_until_ns"] - before_ns < 120e9
    assert request["deadline_ns"] < request["wait_until_ns"]
    assert request["priority"] == -3


def test_a_claim_that_does_not_wait_says_nothing_of_waiting(daemon: FakeDaemon, client: hwbp.Client) -> None:
    client.claim(EVENT, tid=1)
    client.queue(EVENT, tid=1, wait=0).granted()
    for request in daemon.asked("claim"):
        assert not {"wait_until_ns", "priority", "armed_by", "placeholder"} & request.keys()


@pytest.mark.parametrize("wait", [float("inf"), float("nan"), -1.0])
def test_nobody_waits_for_ever(daemon: FakeDaemon, client: hwbp.Client, wait: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        client.claim(EVENT, tid=1, wait=wait)
    assert daemon.asked("claim") == []


def test_what_no_claim_has_is_refused_before_it_is_sent(daemon: FakeDaemon, client: hwbp.Client) -> None:
    with pytest.raises(TypeError, match="gaurd"):
        client.queue(EVENT, tid=1, wait=1, gaurd=5)  # type: ignore[call-arg]
    assert daemon.asked("claim") == []


# --- its place, and its grant ----------------------------------------------------------------------------------------


def test_a_claim_that_waits_has_a_place_and_those_before_it(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["claim"] = always(queued(1, position=2))
    pending = client.queue(EVENT, tid=813, wait=30)
    assert (pending.claim_id, pending.position, pending.is_waiting) == (1, 2, True)
    assert (pending.sentence, pending.holders[0].pid) == ("no slot on tid 813: 4 of 4 held", 812)
    assert isinstance(pending.refusal, hwbp.NoFreeSlot)
    assert repr(pending) == "<Pending 1: mem:0x404040/8:w, waiting>"


def test_a_claim_that_need_not_wait_has_its_watch_at_once(daemon: FakeDaemon, client: hwbp.Client) -> None:
    with client.queue(EVENT, tid=813, wait=30) as pending:
        assert (pending.position, pending.is_waiting, pending.refusal, pending.sentence) == (0, False, None, "")
        watch = pending.granted()
    assert watch
    assert pending.granted() is watch
    assert watch.ended is None


def test_a_wait_ends_with_the_grant_and_no_hit_behind_it_is_lost(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a claim that waits, and one that is armed,
    other = client.claim(EVENT, tid=1)
    daemon.answers["claim"] = always(queued(2), hits(1, record(7)), room(2), hits(2, record(8)))

    # when its grant comes with hits around it, then all of them are there, and both are read together.
    watch = client.claim(EVENT, tid=813, wait=30)
    assert (watch.claim_id, watch.guard, watch.ring_bytes) == (2, 10_000, 4096)
    assert watch.pieces == (hwbp.Piece(0x404040, 8, "w", "any"),)
    client.capabilities()
    assert sorted((of.claim_id, hit.ip) for of, hit in client.hits(timeout=0)) == [(1, 7), (2, 8)]
    assert other.state == watch.state == "armed"


def test_other_things_may_be_asked_while_a_claim_waits(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["claim"] = always(queued(1))
    with client.queue(EVENT, tid=813, wait=30) as pending:
        assert pending.granted(timeout=0) is None
        daemon.answers["why"] = always(room(1), message("why", claim=1, state="armed", lines=[]))
        assert client.why(1).state == "armed"
        assert not pending.is_waiting
        assert pending.granted(timeout=0) is not None


def test_a_wait_for_the_grant_ends_when_a_descriptor_becomes_readable(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["claim"] = always(queued(1))
    readable, writable = os.pipe()
    os.write(writable, b"x")
    with client.queue(EVENT, tid=813, wait=30) as pending:
        assert pending.granted(until=readable) is None
        assert pending.is_waiting
    os.close(readable)
    os.close(writable)


# --- how a wait ends otherwise ---------------------------------------------------------------------------------------


def test_a_wait_in_vain_has_an_exception_of_its_own(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["claim"] = always(queued(1), IN_VAIN)
    with pytest.raises(hwbp.WaitTimedOut, match=r"no room came for tid 813 in 5\.000 s") as caught:
        client.claim(EVENT, tid=813, wait=5)
    assert (caught.value.errno_name, caught.value.claim_id) == ("ETIMEDOUT", 1)
    assert not isinstance(caught.value, hwbp.RequestTimedOut)
    assert daemon.asked("release") == [], "it is over, so there is nothing to cancel"


def test_the_end_of_a_wait_names_who_is_in_the_way(daemon: FakeDaemon, client: hwbp.Client) -> None:
    in_the_way = {"pid": 900, "comm": "gdb", "uid": 0, "kind": "ptrace", "slots": 4, "place": "on tid 813"}
    refused = gone(1, "refused") | {"sentence": "no slot", "errno": "ENOSPC", "holders": [in_the_way]}
    daemon.answers["claim"] = always(queued(1), refused)

    with pytest.raises(hwbp.NoFreeSlot) as caught:
        client.claim(EVENT, tid=813, wait=5)

    assert [holder.pid for holder in caught.value.holders] == [900]


@pytest.mark.parametrize(
    ("reason", "refusal"),
    [("exit", hwbp.TargetGone), ("exec", hwbp.TargetGone), ("forced", hwbp.NoSuchClaim), ("refused", hwbp.HwbpError)],
)
def test_the_reason_for_which_a_wait_ends_is_raised(
    daemon: FakeDaemon, client: hwbp.Client, reason: str, refusal: type[hwbp.HwbpError]
) -> None:
    daemon.answers["claim"] = always(queued(1), gone(1, reason))
    with pytest.raises(hwbp.HwbpError) as caught:
        client.claim(EVENT, tid=813, wait=5)
    assert type(caught.value) is refusal


def test_a_session_that_is_lost_ends_the_wait(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["claim"] = always(queued(1), message("closing", sentence="hwbpd ends"))
    with pytest.raises(hwbp.Stale, match="hwbpd ends"):
        client.claim(EVENT, tid=813, wait=5)


def test_a_refusal_at_once_is_raised_as_ever(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["claim"] = always(error("EINVAL", "a wait may be 3600 s (policy.wait_max_s)"))
    with pytest.raises(hwbp.BadClaim, match="wait_max_s"):
        client.queue(EVENT, tid=813, wait=10**6)


def test_a_daemon_that_lets_the_time_pass_is_not_waited_for(daemon: FakeDaemon) -> None:
    # Given a daemon that answers what is asked and forgets who waits,
    with hwbp.connect(daemon.path, timeout=0.05) as client:
        daemon.answers["claim"] = always(queued(1))

        # when the wait is over, then the client gives up and cancels.
        with pytest.raises(hwbp.RequestTimedOut, match="claim 1, whose wait is over"):
            client.claim(EVENT, tid=813, wait=0.01)
    assert [request["claim"] for request in daemon.asked("release")] == [1]


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_who_leaves_without_the_watch_cancels(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given one that waits, and one that is granted without anybody asking,
    daemon.answers["claim"] = always(queued(1))
    with client.queue(EVENT, tid=813, wait=30) as pending:
        pass
    assert pending.ended
    assert pending.ended.reason == "released"
    daemon.answers["claim"] = always(queued(2), room(2))
    with client.queue(EVENT, tid=813, wait=30):
        pass
    assert [request["claim"] for request in daemon.asked("release")] == [1, 2]

    # then whoever asks for the watch afterwards hears so.
    with pytest.raises(hwbp.NoSuchClaim, match="cancelled"):
        pending.granted()
    pending.cancel()
    assert len(daemon.asked("release")) == 2


def test_a_wait_that_ends_just_before_it_is_cancelled_is_no_error(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["claim"] = always(queued(1))
    daemon.answers["release"] = always(IN_VAIN, error("ENOENT", "claim 1 is over"))
    pending = client.queue(EVENT, tid=813, wait=5)
    pending.cancel()
    assert pending.ended
    assert pending.ended.reason == "timeout"


def test_a_granted_claim_that_is_cancelled_is_released(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["release"] = always(final(hits=3, delivered=3))
    pending = client.queue(EVENT, tid=813, wait=5)
    watch = pending.granted()
    assert watch
    pending.cancel()
    assert watch.counts() == hwbp.Counts(3, 3, 0, 0)


def test_ctrl_c_amid_a_wait_cancels_it(
    daemon: FakeDaemon, client: hwbp.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given somebody who presses Ctrl-C while a claim waits,
    daemon.answers["claim"] = always(queued(1))
    take_in: Callable[..., bool] = client._connection.wait

    def interrupted(*_: object) -> bool:
        monkeypatch.setattr(client._connection, "wait", take_in)
        raise KeyboardInterrupt

    monkeypatch.setattr(client._connection, "wait", interrupted)

    # then the claim leaves the queue, and the session goes on.
    with pytest.raises(KeyboardInterrupt):
        client.claim(EVENT, tid=813, wait=30)
    assert [request["claim"] for request in daemon.asked("release")] == [1]
    assert client.capabilities().machine == "fake"


def test_a_place_in_the_queue_that_comes_too_late_is_given_back(daemon: FakeDaemon) -> None:
    with hwbp.connect(daemon.path, timeout=0.5) as client:
        # Given a claim that nobody waits for any longer,
        daemon.answers["claim"] = always()
        with pytest.raises(hwbp.RequestTimedOut):
            client.claim(EVENT, tid=1, wait=30)
        (late,) = daemon.asked("claim")

        # when it is queued, then it is released as soon as that is read.
        daemon.push(queued(77) | {"id": late["id"]})
        assert client.wait(timeout=30)
        client.capabilities()
        assert [request["claim"] for request in daemon.asked("release")] == [77]


# --- who waits -------------------------------------------------------------------------------------------------------


def test_those_that_wait_are_listed_with_what_is_in_their_way(daemon: FakeDaemon, client: hwbp.Client) -> None:
    row: Message = {"claim": 9, "pid": 97, "comm": "perf", "uid": 0, "kind": "perf", "label": "", "priority": 5} | {
        "state": "suspended", "position": 1, "age_ns": 1, "deadline_ns": 2, "address": None, "length": 8, "access": "w",
        "target": "cpu-wide on all cpus", "blockers": [4, 5],
    }  # fmt: skip
    page = message("slots", pools={"any": 4}, cpus=[], resources=[], more=False)
    daemon.answers["slots"] = always(page | {"waiting": [row]})
    (waiting,) = client.slots().waiting
    assert (waiting.claim, waiting.state, waiting.address, waiting.blockers) == (9, "suspended", None, (4, 5))
    daemon.answers["slots"] = always(page)
    assert client.slots().waiting == ()


def test_the_story_of_a_full_machine_is_nobodys_in_particular(daemon: FakeDaemon, client: hwbp.Client) -> None:
    assert client.why(errno="ENOSPC").lines == ("tid 813: 4 of 4 slots are held", "claim 9 waits")
    client.why(7)
    asked = [{name: ask[name] for name in ("claim", "errno") if name in ask} for ask in daemon.asked("why")]
    assert asked == [{"errno": "ENOSPC"}, {"claim": 7}]


def test_what_fits_once_others_have_given_way_says_who(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["fit"] = always(message("fit", fits=True, pieces=[], sentence="once claim 4 has given way"))
    fit = client.fit(EVENT, tid=1, kind="ptrace", priority=2)
    assert (fit.fits, fit.refusal, fit.first) == (True, None, "once claim 4 has given way")
    assert daemon.asked("fit")[0]["priority"] == 2
