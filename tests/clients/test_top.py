"""hwbpctl top: on a terminal, with its keys and its end; as text; for programs; and with a daemon that goes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.fake_daemon import FakeDaemon, always, decision, error, final, message
from tests.clients.rows import cpu, held
from tests.clients.screen import TOP, WAIT_S, Screen, environment, top_on

NEVER = ("-d", "3600")  # what shows again does not come of a look

FREE = message("slots", pools={"any": 4}, cpus=[cpu(0), cpu(1)], resources=[], more=False)
SLOTS = FREE | {"cpus": [cpu(0, 1, 1), cpu(1, 0, 1)], "resources": [held(1, comm="first"), held(2, comm="second")]}


@pytest.fixture
def daemon(daemon: FakeDaemon) -> FakeDaemon:
    daemon.answers["slots"] = always(SLOTS)
    return daemon


@pytest.fixture
def screen(daemon: FakeDaemon) -> Iterator[Screen]:
    with top_on(daemon.path, *NEVER) as screen:
        screen.shows(">     1 first[812]", "      2 second[812]")
        yield screen


# --- keys ------------------------------------------------------------------------------------------------------------


def test_q_ends_it_and_gives_the_terminal_back(screen: Screen) -> None:
    assert not screen.is_as_before
    screen.press("q")
    assert screen.end() == 0
    assert screen.is_as_before


@pytest.mark.parametrize(
    ("down", "up"), [("j", "k"), ("\x1b[B", "\x1b[A"), ("\x1b[6~", "\x1b[5~"), ("\x1b[F", "\x1b[H")]
)
def test_keys_move_the_selection(screen: Screen, down: str, up: str) -> None:
    screen.press(down)
    screen.shows(">     2 second[812]", "      1 first[812]")
    screen.press(up)
    screen.shows(">     1 first[812]")


def test_w_tells_the_story_and_escape_closes_it(daemon: FakeDaemon, screen: Screen) -> None:
    daemon.answers["why"] = always(message("why", claim=1, state="armed", lines=["asked for", "armed after 3 ms"]))
    screen.press("w")
    screen.shows("why claim 1: armed", "armed after 3 ms")
    screen.press("\x1b")
    screen.shows("-- decisions ")


def test_r_releases_what_is_selected_after_a_question(daemon: FakeDaemon, screen: Screen) -> None:
    # Given the second claim, when its release is asked for and the question is answered with no,
    daemon.answers["release"] = always(final(claim=2, hits=12, delivered=12))
    screen.press("j")
    screen.press("r")
    screen.shows("release claim 2 of second[812]? y/n")
    screen.press("n")

    # then nothing is done;
    screen.shows("claim 2 is left as it is")
    assert daemon.asked("release") == []

    # when it is answered with yes, then it is released, once, its counts are told, and slots are looked at again.
    daemon.answers["slots"] = always(SLOTS | {"resources": SLOTS["resources"][:1]})
    screen.press("ry")
    frame = screen.shows("claim 2 released: 12 hits: 12 delivered, 0 lost, 0 dropped", ">     1 first[812]")
    assert not any("second" in line for line in frame)
    assert [request["claim"] for request in daemon.asked("release")] == [2]


def test_a_refusal_is_shown_and_ends_nothing(daemon: FakeDaemon, screen: Screen) -> None:
    daemon.answers["release"] = always(error("EPERM", "claim 1 is uid 0's"))
    daemon.answers["rearm"] = always(error("EINVAL", "claim 1 is armed"))
    screen.press("ry")
    screen.shows("EPERM: claim 1 is uid 0's")
    screen.press("a")
    screen.shows("EINVAL: claim 1 is armed")


def test_a_arms_again_s_sorts_and_the_question_mark_helps(daemon: FakeDaemon, screen: Screen) -> None:
    screen.press("a")
    screen.shows("claim 1 reports again")
    assert [request["claim"] for request in daemon.asked("rearm")] == [1]
    screen.press("ss")
    screen.shows("2 claims by owner")
    screen.press("?")
    screen.shows("-- help ", "sort by claim, rate, owner or target")
    screen.press("?")
    screen.shows("-- decisions ")


def test_without_a_claim_there_is_nothing_to_do_to_one(daemon: FakeDaemon) -> None:
    daemon.answers["slots"] = always(FREE)
    with top_on(daemon.path, *NEVER) as screen:
        screen.shows("no claims")
        for key in "wra":
            screen.press(key)
            screen.shows("there is no claim to select")
            screen.press("s")
            screen.shows("s sort")
    assert not {request["op"] for request in daemon.requests} & {"why", "release", "rearm"}


# --- what happens ----------------------------------------------------------------------------------------------------


def test_a_decision_is_shown_when_it_comes_without_another_look(daemon: FakeDaemon, screen: Screen) -> None:
    # Given a screen that has looked once and will not again for an hour, when decisions come,
    daemon.push(
        decision("granted", 7, about="mem:0x404040/8:w for tid 812 as perf"),
        decision("refused", 8, errno="ENOSPC", sentence="no slot on tid 812", missed=4),
    )

    # then they are shown, and what was missed.
    screen.shows(
        "granted  gdb[812] claim 7: mem:0x404040/8:w for tid 812 as perf",
        "refused  gdb[812] claim 8: ENOSPC: no slot on tid 812",
        "decisions (4 missed)",
    )
    assert len(daemon.asked("slots")) == 1


def test_rates_come_of_two_looks(daemon: FakeDaemon) -> None:
    # Given a claim with two hits more in each second of the daemon's time,
    seconds = iter(range(60, 10_000))

    def look(_request: object) -> list[dict[str, object]]:
        now = next(seconds)
        return [SLOTS | {"resources": [held(1, hits=2 * now, age_ns=now * 10**9)]}]

    daemon.answers["slots"] = look
    with top_on(daemon.path, "-d", "0.1") as screen:
        screen.shows(" 2.0 ")


def test_a_new_size_is_filled(screen: Screen) -> None:
    screen.resize(120, 40)
    screen.until(lambda _: len(screen.frame()) == 40)
    assert "LABEL" not in "".join(screen.frame())
    assert "UID" in "".join(screen.frame())
    screen.resize(30, 5)
    screen.until(lambda _: len(screen.frame()) == 5)
    assert max(map(len, screen.frame())) <= 30


def test_names_that_would_move_the_cursor_do_not(daemon: FakeDaemon) -> None:
    daemon.answers["slots"] = always(SLOTS | {"resources": [held(1, comm="\x1b[2J\x1b[H", label="a\nb")]})
    with top_on(daemon.path, *NEVER, columns=120) as screen:
        screen.shows("?[2J?[H[812]", "a?b")


def test_a_daemon_that_goes_and_comes_back_is_followed_again(daemon: FakeDaemon, tmp_path: Path) -> None:
    # Given a screen whose daemon goes,
    path = tmp_path / "mortal.sock"
    with FakeDaemon(path) as mortal:
        mortal.answers["slots"] = always(SLOTS)
        screens = top_on(path, "-d", "0.1")
        screen = screens.__enter__()
        screen.shows("first[812]")

    # then it says so and shows no claim as if it were there;
    try:
        frame = screen.shows("no hwbpd at", "the session is over")
        assert not any("first[812]" in line for line in frame)

        # when there is another, then it is followed without being asked to.
        with FakeDaemon(path) as heir:
            heir.answers["slots"] = always(SLOTS | {"resources": [held(1, comm="heir")]})
            screen.shows("heir[812]", "a daemon is there again")
            assert [request["op"] for request in heir.requests[:2]] == ["hello", "follow"]
            heir.push(decision("granted", 5))
            screen.shows("granted  gdb[812] claim 5")
            screen.press("q")
            assert screen.end() == 0
    finally:
        screens.__exit__(None, None, None)


def test_a_daemon_that_does_not_answer_is_told_of_and_asked_again(daemon: FakeDaemon) -> None:
    with top_on(daemon.path, "-d", "0.1") as screen:
        screen.shows("first[812]")
        daemon.answers["slots"] = always()
        screen.shows("did not answer 'slots'")
        daemon.answers["slots"] = always(SLOTS)
        frame = screen.shows("first[812]")
        assert not any("did not answer" in line for line in frame)


def test_a_daemon_that_cannot_be_followed_is_looked_at(daemon: FakeDaemon) -> None:
    daemon.answers["follow"] = always(error("EBADMSG", "not a request of protocol version 1"))
    with top_on(daemon.path, *NEVER) as screen:
        screen.shows("first[812]", "decisions are not told to us")


# --- its end, and pauses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_the_terminal_is_given_back(
    daemon: FakeDaemon, screen: Screen, number: signal.Signals
) -> None:
    screen.process.send_signal(number)
    assert screen.end() == 0
    assert screen.is_as_before
    assert "Traceback" not in screen.written
    assert daemon.requests[-1]["op"] == "goodbye"


def test_ctrl_c_ends_it(screen: Screen) -> None:
    screen.press("\x03")
    assert screen.end() == 0
    assert screen.is_as_before


def test_an_exception_gives_the_terminal_back_before_it_is_told(tmp_path: Path) -> None:
    program = "from hwbpctl.terminal import Terminal\nwith Terminal() as it:\n it.draw(['here'])\n raise LookupError"
    screen = Screen([sys.executable, "-c", program], 80, 24)
    try:
        assert screen.end() == 1
        assert screen.is_as_before
        assert screen.written.index("here") < screen.written.index("\x1b[?1049l") < screen.written.index("LookupError")
    finally:
        screen.close()


def test_ctrl_z_gives_the_terminal_to_the_shell_and_fg_takes_it_again(daemon: FakeDaemon) -> None:
    # Given top as a job of a shell,
    script = 'set -m; "$@"; echo "stopped $?"; stty -a; read line; fg; echo "over $?"'
    with top_on(daemon.path, *NEVER, before=["sh", "-c", script, "sh"]) as screen:
        screen.shows("first[812]")

        # when it is suspended, then the shell has the terminal as it was, echo and all;
        screen.press("\x1a")
        screen.until(lambda written: "stopped" in written and "iexten" in written.partition("stopped")[2])
        assert screen.is_as_before
        assert " echo " in screen.written.partition("stopped")[2]

        # when it goes on, then it draws all of its screen again and takes keys, and ends as ever.
        before = len(screen.written)
        screen.press("\n")
        screen.until(lambda written: "first[812]" in written[before:])
        screen.press("j")
        screen.shows(">     2 second[812]")
        screen.press("q")
        screen.until(lambda written: "over 0" in written)
        screen.end()
        assert screen.is_as_before


def test_so_many_frames_end_it(daemon: FakeDaemon) -> None:
    with top_on(daemon.path, "-n", "2", "-d", "0.1") as screen:
        assert screen.end() == 0
        assert screen.is_as_before
    assert len(daemon.asked("slots")) == 2


# --- elsewhere -------------------------------------------------------------------------------------------------------


def piped(path: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [*TOP, "--socket", str(path), *before, "top", *words]
    return subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_without_a_terminal_frames_are_text(daemon: FakeDaemon) -> None:
    daemon.answers["slots"] = always(decision("ended", 9, reason="exit", sentence="tid 813 exited"), SLOTS)
    done = piped(daemon.path, "-n", "2", "-d", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.strip().split("\n\n")
    assert "\x1b" not in done.stdout
    for frame in (first, second):
        assert "cpu 0 [#=..] 2 free" in frame
        assert "      1 first[812]" in frame
        assert frame.endswith("ended    gdb[812] claim 9: exit: tid 813 exited")


@pytest.mark.parametrize("before", [(), ("--json",)])
def test_for_programs_there_is_an_object_per_look(daemon: FakeDaemon, before: tuple[str, ...]) -> None:
    daemon.answers["slots"] = always(decision("granted", 9, missed=2), SLOTS)
    done = piped(daemon.path, "-n", "2", "-d", "0.1", *(() if before else ("--json",)), before=before)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["slots"]["resources"][0]["address"] == "0x404040"
    assert [(claim["claim"], claim["span"]) for claim in first["claims"]] == [(1, "0x404040/8:w"), (2, "0x404040/8:w")]
    assert [each["what"] for each in first["decisions"]] == ["granted"]
    assert (second["trouble"], second["missed"]) == ("", 2)
    assert second["at_ns"] > first["at_ns"]


def test_for_programs_a_daemon_that_went_is_an_object_too(tmp_path: Path) -> None:
    path = tmp_path / "mortal.sock"
    with FakeDaemon(path) as mortal:
        mortal.answers["slots"] = always(SLOTS)
        argv = [*TOP, "--socket", str(path), "top", "--json", "-d", "0.1"]
        process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout
        assert json.loads(process.stdout.readline())["slots"]
    with process:
        last = next(look for look in map(json.loads, process.stdout) if look["trouble"])
        assert (last["slots"], last["claims"]) == (None, [])
        process.terminate()
        assert process.wait(WAIT_S) == 0


def test_who_reads_no_more_is_not_complained_about(daemon: FakeDaemon) -> None:
    argv = [*TOP, "--socket", str(daemon.path), "top", "-d", "0.1"]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("hwbpd fake")
        process.stdout.close()
        assert process.wait(WAIT_S) == 0
        assert process.stderr.read() == ""


def test_without_a_daemon_to_begin_with_it_ends_like_every_verb(tmp_path: Path) -> None:
    done = piped(tmp_path / "nobody.sock")
    assert done.returncode == 3
    assert "no hwbpd at" in done.stderr


def test_a_dumb_terminal_gets_text(daemon: FakeDaemon) -> None:
    screen = Screen(["env", "TERM=dumb", *TOP, "--socket", str(daemon.path), "top", "-n", "1"], 80, 24)
    try:
        assert screen.end() == 0
        assert "\x1b" not in screen.written
        assert "first[812]" in screen.written
    finally:
        screen.close()
