"""A session that follows: what the library keeps of the daemon's decisions, and what it counts."""

from __future__ import annotations

import pytest

import hwbp
from hwbp.follow import Decisions
from tests.clients.fake_daemon import EPOCH, FakeDaemon, always, decision, error, gone, hits, record

WAIT_S = 10.0


def heard(client: hwbp.Client, decisions: hwbp.Decisions, count: int) -> list[hwbp.Decision]:
    """Wait for so many decisions."""
    taken: list[hwbp.Decision] = []
    while len(taken) < count:
        assert client.wait(WAIT_S), f"only {taken} came"
        taken += decisions.take()
    return taken


def test_decisions_come_after_following_and_not_before(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a daemon that tells a decision nobody asked for,
    daemon.push(decision("ended"))
    assert client.wait(WAIT_S)

    # when the client follows, twice, then it is asked for once,
    decisions = client.follow()
    assert client.follow() is decisions
    assert [request["epoch"] for request in daemon.asked("follow")] == [EPOCH]

    # and what is decided from then on is heard, with every field, and each thing once.
    daemon.push(decision("granted", 7, about="mem:0x404040/8:w for tid 812 as perf", kind="perf", later="unknown"))
    daemon.push(decision("refused", 0, errno="ENOSPC", sentence="no slot", cpu=3, missed=5))
    granted, refused = heard(client, decisions, 2)
    assert granted == hwbp.Decision(
        "granted", 1_000_000_000, 1, 812, "gdb", 0, 7, "mem:0x404040/8:w for tid 812 as perf", "perf"
    )
    assert (refused.errno, refused.sentence, refused.cpu, refused.claim) == ("ENOSPC", "no slot", 3, 0)
    assert (decisions.missed, decisions.discarded) == (5, 0)
    assert decisions.take() == ()


def test_what_came_before_a_reply_is_not_waited_for(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a decision that arrived while a reply was awaited,
    decisions = client.follow()
    why = daemon.answers["why"]
    daemon.answers["why"] = lambda request: [decision(), *why(request)]
    client.why(1)
    assert decisions.unread

    # then waiting returns at once, and hits and decisions do not get into each other's way.
    assert client.wait(WAIT_S)
    assert [each.what for each in decisions.take()] == ["granted"]
    with client.claim("mem:0x404040/8:w", tid=813) as watch:
        daemon.push(hits(1, record()), decision("ended"), gone(1, hits=1, delivered=1))
        assert len(list(watch.hits(WAIT_S))) == 1
        assert [each.what for each in heard(client, decisions, 1)] == ["ended"]


def test_a_daemon_that_refuses_is_not_followed(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["follow"] = always(error("EDQUOT", "uid 1000 follows with 8 sessions"))
    with pytest.raises(hwbp.LimitReached, match="8 sessions"):
        client.follow()

    # When it has room again, then following works after all.
    daemon.answers["follow"] = always({"op": "following"})
    decisions = client.follow()
    daemon.push(decision())
    assert len(heard(client, decisions, 1)) == 1


def test_a_decision_without_its_fields_ends_the_session(daemon: FakeDaemon, client: hwbp.Client) -> None:
    client.follow()
    daemon.push({"op": "decision", "what": "granted"})
    assert client.wait(WAIT_S)
    assert client.ended
    assert client.ended.reason == "protocol"


def test_of_what_nobody_reads_the_newest_is_kept_and_the_rest_counted() -> None:
    decisions = Decisions(kept_max=2)
    for claim in (1, 2, 3):
        decisions.keep(decision(claim=claim))
    assert [each.claim for each in decisions.take()] == [2, 3]
    assert decisions.discarded == 1
