"""What the owner of a claim sees: its hits, its totals, and its end."""

from __future__ import annotations

import itertools
import os

import pytest

import hwbp
from hwbp.inbox import CHANGES_MAX, Inbox
from tests.clients.fake_daemon import (
    FakeDaemon,
    always,
    error,
    final,
    gone,
    guarded,
    hits,
    message,
    notice,
    offline,
    record,
    resumed,
    revoke,
    suspended,
)

WHY = {"claim": 1, "state": "armed", "lines": []}
EVENT = "mem:0x404040/8:w"


# --- claiming --------------------------------------------------------------------------------------------------------


def test_a_claim_says_all_that_was_asked(daemon: FakeDaemon, client: hwbp.Client) -> None:
    client.claim("mem:0x404040/8:w:u", tid=4242, cpus=[0, 2], kind="ptrace", label="counter", user_chain=True)
    (request,) = daemon.asked("claim")
    del request["id"], request["epoch"], request["deadline_ns"]
    assert request == {"op": "claim", "address": 0x404040, "length": 8, "access": "w", "user": True} | {
        "kernel": False, "tid": 4242, "cpus": [0, 2], "kind": "ptrace", "label": "counter", "delivery": "hits",
        "user_chain": True, "kernel_chain": False, "ring_bytes": 0,
    }  # fmt: skip


def test_all_cpus_are_asked_for_by_leaving_cpus_out(daemon: FakeDaemon, client: hwbp.Client) -> None:
    watch = client.claim(address=0x404040, length=4, access="x", kernel=False)
    (request,) = daemon.asked("claim")
    assert "cpus" not in request
    assert request["tid"] == 0
    assert watch.pieces == (hwbp.Piece(0x404040, 4, "x", "any"),)
    assert watch.ring_bytes == 4096


def test_a_length_that_was_not_given_is_the_machines(daemon: FakeDaemon, client: hwbp.Client) -> None:
    assert client.claim("mem:0x404040:x").event == hwbp.Event(0x404040, 8, "x")
    assert client.claim("mem:0x404040").event == hwbp.Event(0x404040, 4, "rw")
    assert [request["length"] for request in daemon.asked("claim")] == [8, 4]
    assert len(daemon.asked("capabilities")) == 1


def test_a_length_the_machine_has_no_default_for_must_be_given(daemon: FakeDaemon, client: hwbp.Client) -> None:
    with pytest.raises(hwbp.BadClaim, match="'r'"):
        client.claim("mem:0x404040:r")
    assert daemon.asked("claim") == []


def test_a_claim_takes_an_event_or_an_address(client: hwbp.Client) -> None:
    with pytest.raises(TypeError):
        client.claim()
    with pytest.raises(TypeError):
        client.claim(EVENT, address=1)


def test_what_a_process_exec_and_guard_mean_is_said_only_when_asked(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given one claim that names none of them and three that do,
    client.claim(EVENT, tid=1)
    client.claim(EVENT, pid=812, across_exec=True, guard=0)
    client.claim(EVENT, only_pid=812, cpus=[1])
    client.fit(EVENT, pid=812, guard=5)

    # then a daemon that has never heard of them can still serve the first.
    new = ("pid", "only_pid", "across_exec", "guard")
    said = [{name: request[name] for name in new if name in request} for request in daemon.asked("claim")]
    assert said == [{}, {"pid": 812, "across_exec": True, "guard": 0}, {"only_pid": 812}]
    (fit,) = daemon.asked("fit")
    assert (fit["pid"], fit["guard"], fit["address"]) == (812, 5, 0x404040)


def test_a_claim_says_as_what_it_is_served(daemon: FakeDaemon, client: hwbp.Client) -> None:
    granted = message("granted", claim=1, pieces=[], ring_bytes=0, kind="perf", guard=10_000)
    daemon.answers["claim"] = always(granted)
    watch = client.claim(EVENT, tid=1, kind="kgdb")
    assert (watch.kind, watch.guard) == ("perf", 10_000)


# --- would it fit, and who else is there -----------------------------------------------------------------------------


def test_what_fits_is_told_with_its_pieces(daemon: FakeDaemon, client: hwbp.Client) -> None:
    assert client.fit(EVENT, tid=1) == hwbp.Fit(True, (hwbp.Piece(0x404040, 8, "w", "any"),), None)
    assert daemon.asked("claim") == []


def test_what_does_not_fit_is_told_with_the_refusal_and_raises_nothing(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    # Given a machine that is full,
    holder = {"pid": 812, "comm": "gdb", "slots": 4, "place": "on tid 1"}
    refusal = {"errno": "ENOSPC", "sentence": "no slot on tid 1", "holders": [holder]}
    daemon.answers["fit"] = always(message("fit", fits=False, pieces=[], **refusal))

    # when somebody asks, then the answer is the refusal that a claim would raise.
    fit = client.fit(address=0x404040, length=8, tid=1)
    assert not fit.fits
    assert isinstance(fit.refusal, hwbp.NoFreeSlot)
    assert (str(fit.refusal), fit.refusal.holders[0].pid) == ("no slot on tid 1", 812)


def test_holders_outside_the_daemon_come_with_their_evidence(daemon: FakeDaemon, client: hwbp.Client) -> None:
    found = {"pid": 97, "comm": "perf", "uid": 0, "kind": "", "slots": 1, "place": "cpu-wide on cpu 0"}
    nobody = found | {"pid": 0, "comm": "unattributed", "uid": -1, "slots": 0, "place": "somewhere"}
    daemon.answers["foreign"] = always(
        message("foreign", holders=[found | {"evidence": "perf fd"}, nobody | {"evidence": "unattributed"}])
    )
    perf, unattributed = client.foreign()
    assert perf == hwbp.Holder(97, "perf", 0, "", 1, "cpu-wide on cpu 0", (), "perf fd")
    assert str(perf) == "perf[97]: 1 cpu-wide on cpu 0, known from perf fd"
    assert str(unattributed) == "unattributed: some somewhere"


# --- hits ------------------------------------------------------------------------------------------------------------


def test_hits_come_across_messages_until_the_target_exits(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a claim whose hits come in several messages, one of them only with new totals,
    watch = client.claim(EVENT, tid=1)
    daemon.push(
        hits(1, record(1), record(2)),
        hits(1, lost=3),
        hits(1, record(3), lost=3, dropped=2),
        gone(1, hits=9, delivered=3, lost=4, dropped=2),
    )

    # when they are read without a limit of time,
    read = [hit.ip for hit in watch.hits(timeout=None)]

    # then all are there, the end is known, and so are the final counts, without asking for them.
    assert read == [1, 2, 3]
    assert watch.ended == hwbp.Ended("exit", "tid 813 exited")
    assert (watch.lost, watch.dropped, watch.discarded) == (4, 2, 0)
    assert watch.release() == watch.counts() == hwbp.Counts(9, 3, 4, 2)
    assert not daemon.asked("release")
    assert not daemon.asked("counts")


def test_hits_end_when_the_time_passes_and_may_be_read_on(daemon: FakeDaemon, client: hwbp.Client) -> None:
    watch = client.claim(EVENT, tid=1)
    assert list(watch.hits(timeout=0.01)) == []
    assert watch.ended is None
    daemon.push(hits(1, record(7)))
    assert next(watch.hits(timeout=30)).ip == 7


def test_a_claim_may_be_released_while_its_hits_are_read(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a daemon that sends the last hits before the reply to a release,
    daemon.answers["release"] = always(hits(1, record(3)), final(hits=3, delivered=3))
    watch = client.claim(EVENT, tid=1)
    daemon.push(hits(1, record(1), record(2)))

    # when the reader releases at the first hit, then it still gets all of them, and the end.
    read = []
    for hit in watch.hits(timeout=None):
        read.append(hit.ip)
        watch.release()
    assert read == [1, 2, 3]
    assert watch.ended
    assert watch.ended.reason == "released"


def test_a_target_that_exits_just_before_the_release_is_no_error(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given an exit that crosses the request,
    daemon.answers["release"] = always(gone(1, hits=2, delivered=2), error("ENOENT", "no claim 1"))
    daemon.answers["counts"] = always(gone(2, hits=4, delivered=4), error("ENOENT", "no claim 2"))
    one, two = client.claim(EVENT, tid=1), client.claim(EVENT, tid=2)

    # then the final counts are those of the notice.
    assert one.release() == hwbp.Counts(2, 2, 0, 0)
    assert two.counts() == hwbp.Counts(4, 4, 0, 0)


def test_hits_of_several_claims_are_read_together_and_in_turns(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given two claims, the first of which floods,
    one, two = client.claim(EVENT, tid=1), client.claim(EVENT, tid=2)
    flood = [hits(1, record(1)) for _ in range(3)]
    daemon.answers["why"] = always(*flood, hits(2, record(2)), gone(1), gone(2), message("why", **WHY))
    client.why(1)

    # when all are read, then the second does not wait until the first has no more.
    read = [(watch, hit.ip) for watch, hit in client.hits(timeout=None)]
    assert read == [(one, 1), (two, 2), (one, 1), (one, 1)]


def test_reading_together_ends_when_the_time_passes_or_nothing_is_claimed(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    assert list(client.hits(timeout=None)) == []
    with client.claim(EVENT, tid=1) as watch:
        assert list(client.hits(timeout=0.01)) == []
        daemon.push(hits(1, record(5)))
        assert [(of, hit.ip) for of, hit in itertools.islice(client.hits(timeout=30), 1)] == [(watch, 5)]
    assert list(client.hits(timeout=None)) == []


def test_reading_together_ends_with_the_connection_and_loses_no_hit_before_it(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    watch = client.claim(EVENT, tid=1)
    daemon.push(hits(1, record(5)))
    client.wait()
    daemon.__exit__()
    try:
        assert [(of, hit.ip) for of, hit in client.hits(timeout=None)] == [(watch, 5)]
        assert watch.ended
        assert watch.ended.reason == "connection"
        assert client.wait() is False
    finally:
        daemon.__enter__()


def test_a_wait_ends_when_a_descriptor_becomes_readable(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a pipe with a byte in it, when something is waited for without a limit,
    client.claim(EVENT, tid=1)
    readable, writable = os.pipe()
    os.write(writable, b"x")

    # then the wait ends and says that nothing came; what does come is told first.
    assert client.wait(until=readable) is False
    daemon.push(hits(1, record(5)))
    assert client.wait(timeout=30) is True
    assert client.wait(until=readable) is True
    os.close(readable)
    os.close(writable)


def test_a_watch_releases_itself_and_an_operator_may_release_by_number(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    with client.claim(EVENT, tid=1) as watch:
        pass
    assert watch.ended
    assert watch.ended.reason == "released"
    assert client.release(99) == hwbp.Counts(0, 0, 0, 0)
    own = client.claim(EVENT, tid=1)
    client.release(own.claim_id)
    assert own.ended
    assert [request["claim"] for request in daemon.asked("release")] == [1, 99, 2]


def test_an_error_inside_a_with_is_not_hidden_by_a_session_that_is_lost(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    daemon.answers["release"] = always(error("ESTALE", "another daemon"))
    with pytest.raises(ZeroDivisionError), client.claim(EVENT, tid=1):
        raise ZeroDivisionError


# --- what happens to a claim that goes on ----------------------------------------------------------------------------


def test_hits_go_on_across_changes_and_the_changes_are_kept(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a claim that is silenced, loses a CPU, reports again, and gets no room on the CPU when it is back,
    watch = client.claim(EVENT)
    reports_again = message("resumed", claim=1, sentence="it reports again")
    no_room = message("suspended", claim=1, sentence="cpu 1 is back, without it", cpu=1)
    daemon.push(
        hits(1, record(1), lost=2, dropped=1), guarded(1), offline(1, 1), reports_again, no_room,
        hits(1, record(2), lost=2), gone(1, hits=4, delivered=2, lost=2),
    )  # fmt: skip

    # when its hits are read, then none is missing, and what happened is told once, in its order.
    assert [hit.ip for hit in watch.hits(timeout=None)] == [1, 2]
    assert watch.changes() == (
        hwbp.Change("guarded", "silenced: more than 10000 hits a second"),
        hwbp.Change("offline", "cpu 1 went offline", 1),
        hwbp.Change("resumed", "it reports again"),
        hwbp.Change("suspended", "cpu 1 is back, without it", 1),
    )
    assert watch.changes() == ()


def test_a_cpu_that_goes_offline_neither_ends_a_claim_nor_touches_its_totals(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    watch = client.claim(EVENT)
    daemon.push(hits(1, record(1), lost=7), offline(1, 1))
    assert [hit.ip for hit in watch.hits(timeout=0.05)] == [1]
    assert watch.changes() == (hwbp.Change("offline", "cpu 1 went offline", 1),)
    assert watch.ended is None
    assert (watch.state, watch.lost) == ("armed", 7)


def test_a_guarded_claim_says_so_until_it_is_armed_again(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given two guarded claims,
    one, two = client.claim(EVENT, tid=1), client.claim(EVENT, tid=2)
    daemon.answers["why"] = always(guarded(1), guarded(2), message("why", **WHY))
    client.why(1)
    assert (one.state, two.state) == ("guarded", "guarded")

    # when their owner asks for one, and the other reports by itself, then both are armed; a CPU that is back is no such
    # thing, and a released claim is over.
    one.rearm()
    daemon.answers["why"] = always(
        message("resumed", claim=2, sentence="it reports again"), guarded(1),
        message("resumed", claim=1, sentence="cpu 1 is back", cpu=1), message("why", **WHY),
    )  # fmt: skip
    assert (one.state, two.state) == ("armed", "guarded")
    client.why(1)
    assert (one.state, two.state) == ("guarded", "armed")
    client.rearm(one.claim_id)
    assert one.state == "armed"
    one.release()
    assert one.state == "ended"


def test_an_operator_may_arm_a_claim_again_by_number_and_a_refusal_is_raised(
    daemon: FakeDaemon, client: hwbp.Client
) -> None:
    client.rearm(99)
    assert daemon.asked("rearm")[0]["claim"] == 99
    daemon.answers["rearm"] = always(error("EINVAL", "claim 1 is armed; only a guarded one is to be armed again"))
    with pytest.raises(hwbp.BadClaim, match="only a guarded one"):
        client.claim(EVENT, tid=1).rearm()


def test_a_claim_that_has_to_give_way_says_for_whom_and_until_when(daemon: FakeDaemon, client: hwbp.Client) -> None:
    # Given a claim that is asked to give way,
    watch = client.claim(EVENT, tid=1)
    assert (watch.revoke, watch.state) == (None, "armed")
    daemon.answers["why"] = always(revoke(1, deadline_ns=99), message("why", **WHY))
    client.why(1)
    asked = watch.revoke
    assert asked
    assert (asked.holders[0].pid, asked.deadline_ns, watch.state) == (812, 99, "yielding")

    # when it does, then it is suspended, keeps its hits, and goes on when there is room.
    daemon.answers["yield"] = always(hits(1, record(5)), message("yielded", claim=1), suspended(1))
    watch.yield_()
    client.capabilities()
    assert (watch.state, watch.revoke, watch.ended) == ("suspended", None, None)
    daemon.push(resumed(1), hits(1, record(6)))
    read = watch.hits(timeout=30)
    assert [next(read).ip, next(read).ip] == [5, 6]
    assert watch.state == "armed"
    assert [change.what for change in watch.changes()] == ["revoke", "suspended", "resumed"]


def test_a_claim_may_be_spared_and_nobody_gives_way_unasked(daemon: FakeDaemon, client: hwbp.Client) -> None:
    watch = client.claim(EVENT, tid=1)
    daemon.answers["yield"] = always(error("EINVAL", "claim 1 is armed; it was not asked to give way"))
    with pytest.raises(hwbp.BadClaim, match="not asked"):
        watch.yield_()
    spared = message("spared", claim=1, sentence="it need not give way any more")
    daemon.answers["why"] = always(revoke(1), spared, message("why", **WHY))
    client.why(1)
    assert (watch.state, watch.revoke) == ("armed", None)


@pytest.mark.parametrize("instead", [suspended(1), message("spared", claim=1, sentence="not any more")])
def test_to_give_way_too_late_is_no_error(daemon: FakeDaemon, client: hwbp.Client, instead: dict[str, object]) -> None:
    # Given a deadline that passes, or a reason that goes, while the answer is on its way,
    watch = client.claim(EVENT, tid=1)
    daemon.answers["why"] = always(revoke(1), message("why", **WHY))
    client.why(1)
    daemon.answers["yield"] = always(instead, error("EINVAL", "it was not asked to give way"))

    # then giving way has nothing left to do.
    watch.yield_()
    assert watch.revoke is None


def test_a_claim_that_ends_while_it_is_suspended_is_over(daemon: FakeDaemon, client: hwbp.Client) -> None:
    watch = client.claim(EVENT, tid=1)
    daemon.push(revoke(1), gone(1, hits=2, delivered=2))
    assert list(watch.hits(timeout=None)) == []
    assert (watch.state, watch.revoke) == ("ended", None)


def test_what_others_want_is_told_and_changes_nothing(daemon: FakeDaemon, client: hwbp.Client) -> None:
    watch = client.claim(EVENT, tid=1)
    perf = {"pid": 97, "comm": "perf", "claim_ids": [9]}
    wants = message("contended", claim=1, by=perf, sentence="perf[97] wants its room")
    daemon.answers["why"] = always(wants, notice("later", claim=1), message("why", **WHY))
    client.why(1)
    (change,) = watch.changes()
    assert (change.what, change.holders[0].claim_ids, watch.state) == ("contended", (9,), "armed")


def test_changes_that_nobody_takes_are_bounded_and_the_newest_stay() -> None:
    inbox = Inbox()
    for number in range(CHANGES_MAX + 1):
        inbox.change(hwbp.Change("offline", "gone", number))
    kept = inbox.take_changes()
    assert (len(kept), kept[0].cpu, kept[-1].cpu) == (CHANGES_MAX, 1, CHANGES_MAX)


def test_hits_of_other_processes_are_counted_apart(daemon: FakeDaemon, client: hwbp.Client) -> None:
    daemon.answers["release"] = always(final(hits=9, delivered=3, filtered=6))
    assert client.claim(EVENT, only_pid=812).release() == hwbp.Counts(9, 3, 0, 0, 6)


# --- what nobody reads -----------------------------------------------------------------------------------------------


def test_unread_hits_are_bounded_and_what_is_discarded_is_counted() -> None:
    # Given an inbox with room for two messages of one record,
    inbox = Inbox(kept_bytes_max=96)
    for ip in range(4):
        inbox.keep(record(ip), 1, lost=ip, dropped=0)

    # then the oldest two are kept, the others counted, and totals are the newest.
    assert [inbox.take(), inbox.take()] == [(record(0), 1), (record(1), 1)]
    assert (inbox.unread, inbox.discarded, inbox.lost) == (False, 2, 3)

    # And after reading there is room again; a single message always fits.
    inbox.keep(record(9) * 3, 3, lost=3, dropped=0)
    assert inbox.take() == (record(9) * 3, 3)


def test_the_first_reason_for_an_end_stays() -> None:
    inbox = Inbox()
    inbox.end(hwbp.Ended("exit", "it exited"), hwbp.Counts(1, 1, 0, 0))
    inbox.end(hwbp.Ended("connection", "lost"))
    assert inbox.ended == hwbp.Ended("exit", "it exited")
    assert inbox.final == hwbp.Counts(1, 1, 0, 0)
