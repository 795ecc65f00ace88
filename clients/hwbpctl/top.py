"""
``hwbpctl top``: who holds what, how fast it is hit, and what is decided, as it happens.

On a terminal it is a screen with keys; elsewhere a frame of text per interval, and with ``--json`` an object per
interval. Slots are looked at once per interval, and after something was done from here; decisions are shown as they
come, but a burst of them is drawn at most ``DRAWS_PER_S`` times a second.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

import hwbp
from hwbpctl import render, top_model, top_view
from hwbpctl.following import Following
from hwbpctl.stop import Stop
from hwbpctl.terminal import Terminal
from hwbpctl.top_model import View

TOLD_MAX = 500  # decisions that are kept to be shown
DRAWS_PER_S = 20
PAGE = 10  # rows
_WIDTH = 80  # of text that goes to no terminal, unless $COLUMNS says otherwise

KEYS = (
    ("q", "quit"), ("?", "help"), ("w", "why"), ("r", "release"), ("a", "arm again"), ("s", "sort"), ("j k", "select"),
)  # fmt: skip
_MOVES = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -PAGE, "page down": PAGE, "home": -(10**9), "end": 10**9}


@dataclass(frozen=True)
class Job:
    """What the command line asked for. ``count`` frames, or for ever."""

    socket: str | None
    json: bool
    interval_s: float
    count: int | None


def run(job: Job) -> int:
    """Show frames until ``count``, ``q`` or a signal; return the exit status. Raises ``HwbpError`` without a daemon."""
    following = Following(job.socket, max(1.0, job.interval_s), TOLD_MAX)
    try:
        if not job.json and _is_screen():
            with Terminal() as terminal:
                _Screen(job, following, terminal).run()
        else:
            _print_frames(job, following)
    except BrokenPipeError:
        # Whoever read us has enough. What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        following.close()
    return 0


def _is_screen() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class _Looks:
    """One look after the other, and what two of them tell."""

    def __init__(self, following: Following) -> None:
        self._following = following
        self._before: hwbp.Slots | None = None
        self.now: hwbp.Slots | None = None
        self.rows: list[top_model.Row] = []

    def look(self) -> None:
        """Ask who holds what; nobody does where nobody answers, and what was seen before says nothing about it."""
        now = self._following.ask(lambda client: client.slots())
        self._before, self.now = self.now, now
        self.rows = [] if now is None else top_model.rows_of(now, self._before)


# --- on a terminal ---------------------------------------------------------------------------------------------------


class _Screen:
    """The state of the screen, and what the keys do to it."""

    def __init__(self, job: Job, following: Following, terminal: Terminal) -> None:
        self._job = job
        self._following = following
        self._terminal = terminal
        self._looks = _Looks(following)
        self._view = View(keys=KEYS)
        self._at = 0  # the row of the selected claim, for when it is gone
        self._asked = 0  # the claim about whose release a question stands
        self._frame: list[str] = []  # as drawn, and
        self._changes = 0  # what had befallen the terminal by then
        self._drawn_at = 0.0
        self._told: list[tuple[str, hwbp.Decision | str]] = []

    def run(self) -> None:
        frames, next_look = 0, 0.0
        while not self._terminal.ended:
            if time.monotonic() >= next_look:
                if frames == self._job.count:
                    return
                self._look()
                frames += 1
                next_look = time.monotonic() + self._job.interval_s
                self._drawn_at = 0.0  # to be drawn now
            soonest = self._drawn_at + 1 / DRAWS_PER_S
            if time.monotonic() >= soonest or self._terminal.changes != self._changes:
                self._draw()
                soonest = next_look
            self._following.wait(max(0.0, min(soonest, next_look) - time.monotonic()), self._terminal.fileno())
            for key in self._terminal.pressed():
                self._press(key)
                self._drawn_at = 0.0

    def _look(self) -> None:
        try:
            self._looks.look()
        except hwbp.HwbpError as refusal:
            self._set(note=f"{refusal.errno_name}: {refusal}")
        self._sort()

    def _sort(self) -> None:
        rows = tuple(sorted(self._looks.rows, key=top_model.ORDERS[self._view.sort]))
        selected = top_model.moved(rows, self._view.selected, 0, self._at)
        self._at = top_model.index_of(rows, selected)
        self._set(slots=self._looks.now, rows=rows, selected=selected)

    def _set(self, **changes: Any) -> None:
        self._view = dataclasses.replace(self._view, **changes)

    def _draw(self) -> None:
        changes = self._terminal.changes
        while self._following.told:
            self._told.append(self._following.told.popleft())
        del self._told[:-TOLD_MAX]
        self._set(
            daemon=self._following.daemon,
            clock=time.strftime("%H:%M:%S"),
            trouble=self._following.trouble,
            missed=self._following.missed,
            told=tuple(self._told),
        )
        width, height = self._terminal.size()
        frame = ansi(top_view.screen(self._view, width, height), width)
        if frame != self._frame or changes != self._changes:
            self._terminal.draw(frame)
            self._frame, self._changes = frame, changes
        self._drawn_at = time.monotonic()

    def _press(self, key: str) -> None:
        asked, self._asked = self._asked, 0
        self._set(note="")
        if asked:
            if key in ("y", "Y"):
                self._do(f"claim {asked} released", lambda client: render.counts(client.release(asked)))
            else:
                self._set(note=f"claim {asked} is left as it is")
            return
        match key:
            case "q":
                self._terminal.ended = True
            case "escape" | "enter":
                self._set(pane=None)
            case "?" | "h":
                is_open = self._view.pane is not None and self._view.pane[0] == "help"
                self._set(pane=None if is_open else ("help", top_view.HELP))
            case "s":
                self._set(sort=top_model.next_order(self._view.sort))
                self._sort()
            case "w" | "r" | "a" if not self._view.selected:
                self._set(note="there is no claim to select")
            case "w":
                self._why(self._view.selected)
            case "r":
                row = self._view.rows[top_model.index_of(self._view.rows, self._view.selected)]
                self._asked = row.claim
                self._set(note=f"release claim {row.claim} of {row.owner}? y/n")
            case "a":
                self._do(
                    f"claim {self._view.selected} reports again", lambda client: client.rearm(self._view.selected)
                )
            case _ if key in _MOVES:
                selected = top_model.moved(self._view.rows, self._view.selected, _MOVES[key], self._at)
                self._at = top_model.index_of(self._view.rows, selected)
                self._set(selected=selected)

    def _why(self, claim: int) -> None:
        try:
            story = self._following.ask(lambda client: client.why(claim))
        except hwbp.HwbpError as refusal:
            self._set(note=f"{refusal.errno_name}: {refusal}")
            return
        if story is not None:
            self._set(pane=(f"why claim {claim}: {story.state} (esc closes)", story.lines))

    def _do(self, done: str, order: Any) -> None:
        """Have something done about a claim, say what came of it, and look anew."""
        try:
            answer = self._following.ask(lambda client: (order(client),))
        except hwbp.HwbpError as refusal:
            self._set(note=f"{refusal.errno_name}: {refusal}")
            return
        if answer is None:
            return  # the trouble is on the screen
        self._set(note=f"{done}: {answer[0]}" if answer[0] else done)
        self._look()


def ansi(frame: Text, width: int) -> list[str]:
    """Return the lines of a frame as a terminal takes them, in as many colours as it has ($TERM, $NO_COLOR)."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    with console.capture() as capture:
        console.print(frame, end="", no_wrap=True, overflow="crop", highlight=False)
    return capture.get().split("\n")


# --- elsewhere -------------------------------------------------------------------------------------------------------


def _print_frames(job: Job, following: Following) -> None:
    looks = _Looks(following)
    frames = 0
    with Stop() as stop:
        while not stop.asked():
            looks.look()
            _print_frame(job, following, looks)
            frames += 1
            if frames == job.count:
                return
            ends = time.monotonic() + job.interval_s
            while not stop.asked() and (left_s := ends - time.monotonic()) > 0:
                following.wait(left_s, stop.fileno())


def _print_frame(job: Job, following: Following, looks: _Looks) -> None:
    following.wait(0)  # what has arrived behind the answer
    told = tuple(following.told)
    following.told.clear()
    if job.json:
        print(json.dumps(_plain(following, looks, told)), flush=True)
        return
    view = View(
        daemon=following.daemon,
        clock=time.strftime("%H:%M:%S"),
        slots=looks.now,
        rows=tuple(looks.rows),
        told=told,
        missed=following.missed,
        trouble=following.trouble,
    )
    width = shutil.get_terminal_size((_WIDTH, 0)).columns
    print(top_view.batch(view, width), end="\n\n", flush=True)


def _plain(following: Following, looks: _Looks, told: tuple[tuple[str, hwbp.Decision | str], ...]) -> dict[str, Any]:
    """A frame for programs: what ``ls`` says, claims with their rates, and the decisions since the frame before."""
    return {
        "at_ns": time.monotonic_ns(),
        "trouble": following.trouble,
        "slots": render.plain(looks.now),
        "claims": [render.plain(row) for row in looks.rows],
        "decisions": [render.plain(what) for _, what in told if isinstance(what, hwbp.Decision)],
        "missed": following.missed,
    }
