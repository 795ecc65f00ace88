"""The reader's answers, on words written by hand from docs/status-page.md."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

import hwbp
from hwbp import Answer, BadMessage, NotReachable, StatusPage, Thread, VersionMismatch, open_page
from tests.clients.fake_daemon import FakeDaemon, always, error, message

CPUS, THREADS = 4, 3
CPUS_FROM, THREADS_FROM = 512, 516
WORDS = THREADS_FROM + THREADS
OURS = 9  # our registration
ONE_ARMED, ONE_HELD = 1 << 16 | 1, 1 << 16


class Written:
    """A page of four CPUs and three threads, the second of which is registered under 9."""

    def __init__(self) -> None:
        self.words = memoryview(bytearray(8 * WORDS)).cast("Q")
        self.words[0] = struct.unpack("=Q", b"hwbpage\0")[0]
        self.words[1:7] = memoryview(struct.pack("=6Q", 1, 8 * WORDS, CPUS_FROM, CPUS, THREADS_FROM, THREADS)).cast("Q")
        self.words[9] = int(time.monotonic()) + 2
        self.thread = THREADS_FROM + 1
        self.words[self.thread] = OURS << 32

    def page(self) -> StatusPage:
        return StatusPage(self.words)

    def handle(self) -> Thread:
        return Thread(self.page(), os.getpid(), 1, OURS)


def test_only_none_is_false() -> None:
    assert [bool(answer) for answer in (Answer.NONE, Answer.YES, Answer.UNKNOWN)] == [False, True, True]


def test_a_handle_answers_for_its_cpu_and_its_thread_and_for_nothing_else() -> None:
    written = Written()
    handle = written.handle()
    assert [handle.enabled(cpu) for cpu in range(CPUS)] == [Answer.NONE] * CPUS

    for at, yes in (
        (CPUS_FROM + 2, {2}),
        (10, {0, 1, 2, 3}),
        (written.thread, {0, 1, 2, 3}),
        (written.thread + 1, set()),
        (written.thread - 1, set()),
    ):
        before = written.words[at]
        written.words[at] = before | ONE_ARMED
        assert {cpu for cpu in range(CPUS) if handle.enabled(cpu) is Answer.YES} == yes
        written.words[at] = before | ONE_HELD
        assert not any(handle.enabled(cpu) for cpu in range(CPUS)), "held and not armed is no yes"
        written.words[at] = before


def test_without_a_cpu_it_answers_for_all_it_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Written()
    handle = written.handle()
    written.words[CPUS_FROM + 2] = ONE_ARMED
    monkeypatch.setattr(os, "sched_getaffinity", lambda tid: {0, 2} if tid == handle.tid else set())
    assert handle.enabled() is Answer.YES
    monkeypatch.setattr(os, "sched_getaffinity", lambda _tid: {0, 1})
    assert handle.enabled() is Answer.NONE


@pytest.mark.parametrize("armed", [0, ONE_ARMED])
def test_a_stale_heartbeat_and_a_stopped_daemon_are_unknown(armed: int) -> None:
    written = Written()
    page, handle = written.page(), written.handle()
    written.words[CPUS_FROM] = armed
    for until_s in (0, 1, int(time.monotonic())):
        written.words[9] = until_s
        assert page.enabled(0) is handle.enabled(0) is Answer.UNKNOWN
        assert not page.is_valid
    written.words[9] = int(time.monotonic()) + 2
    assert page.enabled(0) is handle.enabled(0) is (Answer.YES if armed else Answer.NONE)


@pytest.mark.parametrize("word", [0, (OURS + 1) << 32, (OURS + 1) << 32 | ONE_ARMED])
def test_a_registration_that_is_over_is_unknown_whatever_the_cpu_has(word: int) -> None:
    written = Written()
    handle = written.handle()
    written.words[written.thread] = word
    assert handle.enabled(0) is Answer.UNKNOWN
    written.words[CPUS_FROM] = ONE_ARMED
    assert handle.enabled(0) is Answer.UNKNOWN
    assert not handle.is_registered
    assert "not registered" in repr(handle)


@pytest.mark.parametrize("cpu", [-1, CPUS, 10**6])
def test_there_is_no_such_cpu(cpu: int) -> None:
    written = Written()
    for ask in (written.page().enabled, written.handle().enabled):
        with pytest.raises(ValueError, match=f"no CPU {cpu}"):
            ask(cpu)


@pytest.mark.parametrize(("at", "value"), [(0, 1), (1, 2), (2, 8 * WORDS + 8)])
def test_what_is_no_page_or_another_layout_is_refused(at: int, value: int) -> None:
    written = Written()
    written.words[at] = value
    with pytest.raises(VersionMismatch):
        written.page()


def test_a_page_of_before_the_host_was_started_is_refused() -> None:
    written = Written()
    written.words[9] = int(time.monotonic()) + 1000
    with pytest.raises(NotReachable, match="before this host was started"):
        written.page()


def test_a_file_that_is_not_there_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotReachable, match="No such file"):
        open_page(tmp_path / "page")
    (tmp_path / "page").write_bytes(b"hwbpage\0")
    with pytest.raises(VersionMismatch):
        open_page(tmp_path / "page")


def test_a_client_registers_the_calling_thread_and_again_after_the_daemon_was_started_anew(daemon: FakeDaemon) -> None:
    # given a page beside the socket, and a daemon that has given us a word of it
    written = Written()
    file = daemon.path.with_name(daemon.path.name + ".page")
    file.write_bytes(written.words.tobytes())
    daemon.answers["thread"] = always(message("thread", index=1, registration=OURS))

    # when the thread is registered
    with hwbp.connect(daemon.path) as client:
        handle = client.thread()
        assert daemon.asked("thread")[0]["tid"] == handle.tid

        # then the handle reads that word, and another one once it is told another
        assert handle.is_registered
        assert handle.enabled(0) is Answer.NONE
        daemon.answers["thread"] = always(message("thread", index=2, registration=OURS + 1))
        client.register(handle)
        assert not handle.is_registered
        assert client.page.enabled(0) is Answer.NONE


def test_a_word_that_the_page_does_not_have_is_not_believed(daemon: FakeDaemon) -> None:
    daemon.path.with_name(daemon.path.name + ".page").write_bytes(Written().words.tobytes())
    daemon.answers["thread"] = always(message("thread", index=THREADS, registration=1))
    with hwbp.connect(daemon.path) as client, pytest.raises(BadMessage):
        client.thread()


def test_a_client_asks_the_daemon_for_a_cpu_a_thread_or_both(daemon: FakeDaemon) -> None:
    daemon.answers["enabled"] = always(message("enabled", enabled=True, armed=1, held=2))
    with hwbp.connect(daemon.path) as client:
        assert client.enabled(cpu=3, tid=5) == hwbp.Enabled(True, 1, 2)
        client.enabled(0)
        client.enabled(tid=5)
        places = [{key: asked[key] for key in ("cpu", "tid") if key in asked} for asked in daemon.asked("enabled")]
        assert places == [{"cpu": 3, "tid": 5}, {"cpu": 0}, {"tid": 5}]
        daemon.answers["enabled"] = always(error("EPERM", "not yours"))
        with pytest.raises(hwbp.NotPermitted):
            client.enabled(tid=1)
