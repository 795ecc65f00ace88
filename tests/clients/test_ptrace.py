"""The dance of a tracer: placeholder, taking, the poke, taken or not, and who was faster."""

from __future__ import annotations

import errno

import pytest

import hwbp
from tests.clients.fake_daemon import FakeDaemon, Message, always, error, gone, message, notice

EVENT = "mem:0x404040/8:w"
PERF = {"pid": 97, "comm": "perf", "kind": "", "slots": 1, "place": "on tid 813", "evidence": "perf fd"}
ROBBED = notice("foreign", claim=1, sentence="the slot was taken first, by perf[97]", holders=[PERF])


class Poke:
    """A poke that says, to its test, what the daemon had been asked by then."""

    def __init__(self, daemon: FakeDaemon, raises: BaseException | None = None) -> None:
        self.asked_before: list[str] = []
        self._daemon = daemon
        self._raises = raises

    def __call__(self) -> None:
        self.asked_before = dance(self._daemon)
        if self._raises:
            raise self._raises


def dance(daemon: FakeDaemon) -> list[str]:
    return [ask["op"] for ask in daemon.requests if ask["op"] in ("claim", "taking", "taken", "take_failed", "release")]


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


# --- how it goes -----------------------------------------------------------------------------------------------------


def test_a_tracer_asks_says_that_it_takes_pokes_and_says_that_it_has(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a granted claim of a tracer, when it takes the slot, then each step comes in its order,
    poke = Poke(daemon)
    with client.tracer_claim(813, EVENT, label="a watchpoint") as slot:
        assert not slot.is_taken
        slot.take(poke)
        assert poke.asked_before == ["claim", "taking"]
        assert slot.is_taken

    # and the end of the with gives it back.
    assert dance(daemon) == ["claim", "taking", "taken", "release"]
    (request,) = daemon.asked("claim")
    said = {name: request[name] for name in ("tid", "kind", "armed_by", "delivery", "label")}
    assert said == {"tid": 813, "kind": "ptrace", "armed_by": "tracer", "delivery": "hold", "label": "a watchpoint"}
    assert "placeholder" not in request


def test_without_a_placeholder_the_tracer_pokes_at_once(daemon: FakeDaemon, client: hwbp.Client) -> None:
    poke = Poke(daemon)
    slot = client.tracer_claim(813, EVENT, placeholder=False, wait=5, priority=-1)
    slot.take(poke)
    assert poke.asked_before == ["claim"]
    assert dance(daemon) == ["claim", "taken"]
    (request,) = daemon.asked("claim")
    assert (request["placeholder"], request["priority"], request["wait_until_ns"] > 0) == (False, -1, True)


def test_a_daemon_that_refuses_the_take_keeps_the_tracer_from_poking(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["taking"] = always(error("EINVAL", "claim 1 is suspended"))
    poke = Poke(daemon)
    with client.tracer_claim(813, EVENT) as slot, pytest.raises(hwbp.BadClaim, match="suspended"):
        slot.take(poke)
    assert (poke.asked_before, slot.is_taken) == ([], False)


# --- how it fails ----------------------------------------------------------------------------------------------------


def test_a_poke_that_fails_is_told_with_its_errno_and_raised_on(daemon: FakeDaemon, client: hwbp.Client) -> None:
    gone_by = OSError(errno.ESRCH, "No such process")
    with client.tracer_claim(813, EVENT) as slot, pytest.raises(OSError, match="No such process") as caught:
        slot.take(Poke(daemon, gone_by))
    assert caught.value is gone_by
    assert daemon.asked("take_failed")[0]["errno"] == errno.ESRCH
    assert slot.watch.ended
    assert slot.watch.ended.reason == "take failed"
    assert daemon.asked("release") == [], "it is over"
    assert slot.stolen_by(timeout=0) is None


@pytest.mark.parametrize("told", ["before the reply", "behind the reply"])
def test_who_took_the_slot_first_is_told_after_the_end(daemon: FakeDaemon, client: hwbp.Client, told: str) -> None:
    # Given a slot that somebody outside has taken before the poke, and a daemon that says so when it has looked,
    over = gone(1, "take failed")
    reply = message("take_failed", claim=1)
    answers: list[Message] = [over, reply] if told == "before the reply" else [reply, over]
    daemon.answers["take_failed"] = always(*answers)
    slot = client.tracer_claim(813, EVENT)
    with pytest.raises(OSError, match="No space left"):
        slot.take(Poke(daemon, full()))
    assert slot.stolen_by(timeout=0) is None

    # then its tracer hears who it was, and hears it again if it asks again.
    daemon.push(ROBBED)
    stolen = slot.stolen_by(timeout=30)
    assert stolen
    assert (stolen.sentence, stolen.holders[0].pid) == ("the slot was taken first, by perf[97]", 97)
    assert slot.stolen_by() is stolen


def test_a_session_that_ends_leaves_nobody_waiting_for_the_thief(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["take_failed"] = always(message("take_failed", claim=1), message("closing", sentence="hwbpd ends"))
    slot = client.tracer_claim(813, EVENT)
    with pytest.raises(OSError, match="No space left"):
        slot.take(Poke(daemon, full()))
    assert slot.stolen_by() is None


def test_a_claim_that_ended_before_its_failure_was_told_raises_the_failure(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    # Given a thread that exits during the poke,
    daemon.answers["take_failed"] = always(gone(1, "exit"), error("ENOENT", "claim 1 is over"))
    with client.tracer_claim(813, EVENT) as slot, pytest.raises(OSError, match="No space left"):
        slot.take(Poke(daemon, full()))

    # then what ended it is known, and nothing more is expected.
    assert slot.watch.ended
    assert slot.watch.ended.reason == "exit"
    assert slot.stolen_by() is None


def test_a_tracer_that_does_not_know_is_said_to_have_taken_it(daemon: FakeDaemon, client: hwbp.Client) -> None:
    with client.tracer_claim(813, EVENT) as slot, pytest.raises(ZeroDivisionError):
        slot.take(Poke(daemon, ZeroDivisionError()))
    assert dance(daemon) == ["claim", "taking", "taken", "release"]
