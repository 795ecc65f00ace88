"""
The status page: what it shows of each claim, that it is never late, and that it is what the books say.

The reader here is the client library's, which shares no line with the writer.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hwbp.status_page as reader
from hwbp import Answer, StatusPage, VersionMismatch, open_page
from hwbpd import page_layout as layout
from hwbpd import status_page
from hwbpd.core.books import ClaimRecord
from hwbpd.core.errors import LimitReached
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Access, Delivery, Mode, Piece, Pool, Process, Resource, Span, Target, Task
from hwbpd.hookspecs import ArmError
from hwbpd.settings import Limits, Settings
from hwbpd.status_page import CannotMakePage, map_page
from tests.fakes import FakeBackend, FakeClient, Rig
from tests.simulation.test_simulation import TRACERS, Simulation

TID = 800  # of a process with the same number, as fakes have it


def claim(rig: Rig, client: FakeClient, **fields: Any) -> dict[str, Any]:
    return rig.ask(client, "claim", **{"address": 0x404040, "length": 8, "access": "w"} | fields)


def count(rig: Rig, client: FakeClient, **fields: Any) -> tuple[int, int]:
    """Held and armed, as the daemon answers."""
    reply = rig.ask(client, "enabled", **fields)
    assert reply["enabled"] == (reply["armed"] > 0)
    return reply["held"], reply["armed"]


def counts_in(word: int) -> tuple[int, int]:
    """Held and armed, as docs/status-page.md has them."""
    return word >> 16 & 0xFFFF, word & 0xFFFF


def on_page(rig: Rig, cpu: int) -> tuple[int, int]:
    return counts_in(rig.page_words[layout.EVERYWHERE_AT] + rig.page_words[layout.CPUS_FROM + cpu])


def word_of(rig: Rig, client: FakeClient, tid: int) -> tuple[Callable[[], int], int]:
    """Register a thread; return what reads its word, and its registration."""
    reply = rig.ask(client, "thread", tid=tid)
    return lambda: rig.page_words[layout.THREADS_FROM + reply["index"]], reply["registration"]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(cpus=2)
    rig.machine.start_task(TID)
    rig.machine.start_task(TID + 1)
    yield rig
    rig.stop()


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_client_library_has_the_same_layout() -> None:
    names = ["MAGIC", "LAYOUT", "ARMED_MASK", "REGISTRATION_SHIFT", "VALID_S"]
    names += [name for name in vars(reader) if name.endswith("_AT")]
    assert len(names) > 14
    assert {name: getattr(reader, name) for name in names} == {name: getattr(layout, name) for name in names}
    assert layout.CPUS_FROM * layout.WORD_BYTES == reader.HEADER_BYTES
    assert status_page.PAGE_SUFFIX == reader.PAGE_SUFFIX


def test_a_cpu_wide_claim_shows_on_its_cpus_and_on_no_others(rig: Rig) -> None:
    client = rig.client()

    granted = claim(rig, client, cpus=[1])

    assert (on_page(rig, 0), on_page(rig, 1)) == ((0, 0), (1, 1))
    assert (count(rig, client, cpu=0), count(rig, client, cpu=1)) == ((0, 0), (1, 1))
    rig.ask(client, "release", claim=granted["claim"])
    assert on_page(rig, 1) == (0, 0)


def test_a_claim_on_all_cpus_is_one_word(rig: Rig) -> None:
    client = rig.client()
    claim(rig, client)

    assert counts_in(rig.page_words[layout.EVERYWHERE_AT]) == (1, 1)
    assert not any(rig.page_words[layout.CPUS_FROM :])
    assert count(rig, client, cpu=0) == count(rig, client, cpu=1) == (1, 1)


def test_what_is_held_and_not_armed_is_held(rig: Rig) -> None:
    client = rig.client()
    claim(rig, client, cpus=[0], delivery="hold")
    assert on_page(rig, 0) == (1, 0)
    assert rig.ask(client, "enabled", cpu=0)["enabled"] is False


def test_a_silenced_claim_is_held_until_it_is_armed_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a claim that is flooded and does not stop by itself
    client, seen, silence = rig.client(), [], rig.machine.silence
    granted = claim(rig, client, cpus=[0], guard=10)
    rig.machine.armed[1].fuse = 10_000

    def silences(resource_id: int) -> None:
        seen.append(on_page(rig, 0))
        silence(resource_id)
        seen.append(on_page(rig, 0))

    monkeypatch.setattr(rig.machine, "silence", silences)
    rig.machine.hit(1, 1000)
    rig.turn()
    assert rig.arbiter.books.claims[granted["claim"]].state is State.GUARDED

    # then it is armed until it has been silenced, held from then on, and when it reports again, armed
    assert seen == [(1, 1), (1, 1)]
    assert on_page(rig, 0) == (1, 0)
    assert rig.ask(client, "rearm", claim=granted["claim"])["op"] == "rearmed"
    assert on_page(rig, 0) == (1, 1)


def test_a_claim_that_the_machine_refuses_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a machine that has no room for the second slot of a claim
    rig = Rig(backend=FakeBackend({Pool.ANY: 4}, piece_bytes=8))
    client, seen, arm = rig.client(), [], rig.machine.arm

    def refuses_the_second(resource_id: int, *what: Any) -> None:
        seen.append(on_page(rig, 0))
        if len(seen) == 2:
            raise ArmError(errno.ENOSPC, cpu=0)
        arm(resource_id, *what)

    monkeypatch.setattr(rig.machine, "arm", refuses_the_second)

    # when it is made
    assert claim(rig, client, length=16, cpus=[0])["errno"] == "ENOSPC"

    # then both showed before the first was armed, and nothing is left
    assert seen == [(2, 2), (2, 2)]
    assert on_page(rig, 0) == (0, 0)
    rig.stop()


def test_a_thread_sees_its_own_slots_and_those_of_its_process_and_no_others(rig: Rig) -> None:
    # given two threads of one process, and one of another
    client, other = rig.client(pid=TID), rig.client(pid=TID + 2)
    rig.machine.start_task(TID + 2)
    first, number = word_of(rig, client, TID)
    second, other_number = word_of(rig, client, TID + 1)
    foreign, _ = word_of(rig, other, TID + 2)
    assert number != other_number
    assert (first() >> 32, second() >> 32) == (number, other_number)

    # when there are claims on one, and on the process
    claim(rig, client, tid=TID)
    claim(rig, client, tid=TID, cpus=[1], delivery="hold")
    claim(rig, client, pid=TID)

    # then each shows what it has, and CPUs show nothing
    assert counts_in(first()) == (3, 2)
    assert counts_in(second()) == (1, 1)
    assert counts_in(foreign()) == (0, 0)
    assert on_page(rig, 0) == on_page(rig, 1) == (0, 0)
    assert count(rig, client, tid=TID) == (3, 2)
    assert count(rig, client, tid=TID + 1, cpu=1) == (1, 1)


def test_a_thread_that_registers_later_finds_what_there_is(rig: Rig) -> None:
    client = rig.client(pid=TID)
    claim(rig, client, pid=TID)
    claim(rig, client, tid=TID)

    word, number = word_of(rig, client, TID)

    assert word() == number << 32 | 2 << 16 | 2


def test_registering_twice_is_registering_once(rig: Rig) -> None:
    client = rig.client(pid=TID)
    first, again = rig.ask(client, "thread", tid=TID), rig.ask(client, "thread", tid=TID)
    assert (first["index"], first["registration"]) == (again["index"], again["registration"])


def test_a_number_that_another_thread_has_now_is_another_registration(rig: Rig) -> None:
    client = rig.client(pid=TID)
    word, number = word_of(rig, client, TID + 1)
    rig.machine.exit_task(TID + 1)
    rig.machine.start_task(TID + 1)

    _, number_now = word_of(rig, client, TID + 1)

    assert number_now != number
    assert word() >> 32 != number


def test_with_its_session_a_registration_ends_and_never_comes_again(rig: Rig) -> None:
    client = rig.client(pid=TID)
    word, number = word_of(rig, client, TID)

    client.cut()
    rig.turn()

    assert word() == 0
    again = rig.client(pid=TID)
    assert word_of(rig, again, TID)[1] != number


def test_a_cpu_that_goes_takes_its_slots_from_the_page(rig: Rig) -> None:
    client = rig.client()
    claim(rig, client, cpus=[1])
    rig.machine.take_cpu_offline(1)
    rig.turn()
    assert on_page(rig, 1) == (0, 0)
    rig.machine.bring_cpu_online(1)
    rig.turn()
    assert on_page(rig, 1) == (1, 1)


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_a_thread_is_registered_and_asked_about_by_its_own_process_or_by_root(rig: Rig) -> None:
    ann, root = rig.client(pid=TID, uid=1000), rig.client(pid=1)
    bob = rig.client(pid=TID + 2, uid=1001)
    assert rig.ask(ann, "thread", tid=TID + 1)["op"] == "thread"
    assert rig.ask(bob, "thread", tid=TID)["errno"] == "EPERM"
    assert rig.ask(root, "thread", tid=TID)["errno"] == "EPERM"  # it could not answer for it
    assert rig.ask(bob, "enabled", tid=TID)["errno"] == "EPERM"
    assert rig.ask(ann, "enabled", tid=TID)["op"] == "enabled"
    assert rig.ask(root, "enabled", tid=TID)["op"] == "enabled"


@pytest.mark.parametrize(
    ("fields", "errno_name"),
    [
        ({}, "EINVAL"),
        ({"cpu": 2}, "ENODEV"),
        ({"tid": 99_999}, "ESRCH"),
        ({"cpu": 8192}, "EBADMSG"),
        ({"cpu": -1}, "EBADMSG"),
        ({"tid": "800"}, "EBADMSG"),
        ({"cpu": 0, "pid": TID}, "EBADMSG"),
    ],
)
def test_a_question_that_has_no_answer_is_refused(rig: Rig, fields: dict[str, Any], errno_name: str) -> None:
    assert rig.ask(rig.client(), "enabled", **fields)["errno"] == errno_name


def test_a_user_may_register_so_many_threads_and_those_that_exited_do_not_count() -> None:
    # given a user who may register two, and has
    rig = Rig(settings=Settings(limits=Limits(threads_per_uid=2)))
    for tid in range(TID, TID + 6):
        rig.machine.start_task(tid)
    ann, more = rig.client(pid=TID, uid=1000), rig.client(pid=TID + 2, uid=1000)
    assert rig.ask(ann, "thread", tid=TID)["op"] == rig.ask(ann, "thread", tid=TID + 1)["op"] == "thread"

    # then a third is one too many, in whichever session; but one that has a word keeps it, and others have their own
    assert rig.ask(more, "thread", tid=TID + 2)["errno"] == "EDQUOT"
    assert rig.ask(ann, "thread", tid=TID)["op"] == "thread"
    assert rig.ask(rig.client(pid=TID + 4, uid=1001), "thread", tid=TID + 4)["op"] == "thread"

    # when one has exited, then there is room
    rig.machine.exit_task(TID + 1)
    assert rig.ask(more, "thread", tid=TID + 2)["op"] == "thread"
    rig.stop()


def test_a_page_without_a_free_word_refuses() -> None:
    page = status_page.StatusPage(words(), 1)
    for tid in range(layout.THREADS):
        page.register(1, Task(tid, 1, None))

    with pytest.raises(LimitReached, match=str(layout.THREADS)):
        page.register(1, Task(layout.THREADS, 1, None))

    page.unregister_all(1)
    assert page.register(2, Task(1, 1, None)).number == layout.THREADS + 1


# --- never late ------------------------------------------------------------------------------------------------------

ARMING = ("arm", "rearm", "add_cpu", "top_up", "disarm", "silence", "drop_cpu")


class NeverLate(Simulation):
    """
    The random histories of a whole daemon, in which the page is looked at right before and right after each call that
    arms or disarms: what may trap then has to be on it. After each turn, the page, the reply to the request, and what
    the books and the machine hold have to be the same.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.looks = 0
        machine = self.rig.machine
        # whoever is connected may ask about and register any thread
        self.rig.rights.may_ask_about = lambda *_, **__: None  # type: ignore[method-assign]
        for name in ARMING:
            setattr(machine, name, self.watched(getattr(machine, name)))
        self.actions.append((6, self.register))

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def with_a_look(*arguments: Any) -> Any:
            self.look_now()
            try:
                return call(*arguments)
            finally:
                self.look_now()

        return with_a_look

    def register(self) -> None:
        client = self.somebody()
        if client is not None and self.rig.machine.tasks:
            self.request(client, "thread", tid=self.rng.choice(list(self.rig.machine.tasks)))

    def look_now(self) -> None:
        self.looks += 1
        words = self.rig.page_words
        for resource_id, armed in self.rig.machine.armed.items():
            if armed.silent or armed.end is not None:
                continue
            target = armed.target
            for event in self.rig.machine.kernel.held.get(resource_id, ()):
                if event.task is None:
                    on_cpu = words[layout.EVERYWHERE_AT] | words[layout.CPUS_FROM + event.cpu]
                    assert on_cpu & 0xFFFF, f"{target} may trap on cpu {event.cpu}, and the page does not know"
            if not target.is_cpu_wide:
                for at, task in self.registered():
                    if is_for(target, task):
                        assert words[at] & 0xFFFF, f"{target} may trap, and the word of {task} does not know"

    def registered(self) -> Iterator[tuple[int, Task]]:
        for session in self.rig.sessions:
            for task in self.rig.page.registered(session.session_id):
                yield layout.THREADS_FROM + self.rig.page.register(session.session_id, task).nth, task

    def check(self) -> None:
        super().check()
        self.check_page()

    def check_page(self) -> None:
        """What the page shows is what the books hold and the machine has armed, and what a request is answered."""
        rig, words = self.rig, self.rig.page_words
        root = rig.client(pid=1)
        for cpu in rig.machine.kernel.online:
            assert on_page(rig, cpu) == self.recount(cpu=cpu), f"cpu {cpu}"
        for cpu in rig.machine.kernel.possible:
            assert count(rig, root, cpu=cpu) == on_page(rig, cpu)
        used = []
        for at, task in self.registered():
            used.append(at)
            assert counts_in(words[at]) == self.recount(task=task)
            if rig.machine.tasks.get(task.tid) == task:
                assert count(rig, root, tid=task.tid) == counts_in(words[at])
        assert [at for at in range(layout.THREADS_FROM, len(words)) if words[at]] == sorted(used)
        root.ask("goodbye")
        rig.turn()
        rig.clients.remove(root)
        os.close(root.process)

    def recount(self, cpu: int | None = None, task: Task | None = None) -> tuple[int, int]:
        """Held and armed on a CPU or for a thread, from the books, one resource after the other."""
        books = self.rig.arbiter.books
        held = armed = 0
        for resource_id, resource in books.resources.items():
            target = resource.target
            is_there = target.is_cpu_wide and cpu is not None and (
                target.cpus is None or (cpu in target.cpus and cpu not in books.absent.get(resource_id, ()))
            )
            if is_there or (task is not None and is_for(target, task)):
                riders = [books.claims[rider.claim_id] for rider in books.riders[resource_id]]
                if riders[0].state in TRACERS or resource_id in riders[0].reused:
                    continue  # what a tracer has armed is not ours to show
                held += 1
                armed += resource.mode.delivery is not Delivery.HOLD and not any(map(is_silent, riders))
        return held, armed


def is_silent(record: ClaimRecord) -> bool:
    return record.state is State.GUARDED or (record.state is State.YIELDING and record.was_guarded)


def is_for(target: Target, task: Task) -> bool:
    """Whether a claim for that target takes slots of that thread."""
    return target.task == task or (target.process is not None and target.process == task.process)


@pytest.mark.parametrize("seed", range(6))
def test_in_any_history_the_page_is_never_late_and_is_what_the_books_say(seed: int) -> None:
    simulation = NeverLate(seed)
    seen = simulation.run()
    assert simulation.looks > 200
    assert seen["thread"] > 5
    assert not any(simulation.rig.page_words[layout.CPUS_FROM :]), "a daemon that stopped shows nothing"
    assert simulation.rig.page_words[layout.EVERYWHERE_AT] == 0


# --- the heartbeat ---------------------------------------------------------------------------------------------------


def valid_until_s(rig: Rig) -> int:
    return rig.page_words[layout.VALID_UNTIL_S_AT]


def test_the_heartbeat_goes_on_with_the_loop_and_ends_with_it(rig: Rig) -> None:
    rig.turn()
    now_s = rig.clock.now_ns() // 10**9
    assert valid_until_s(rig) == now_s + layout.VALID_S

    rig.clock.wind(0.4)
    rig.turn()
    before = valid_until_s(rig)
    rig.clock.wind(1.0)
    rig.turn()
    assert valid_until_s(rig) == before + 1

    rig.server.stop()
    assert valid_until_s(rig) == 0
    rig.server.stop = lambda: None  # type: ignore[method-assign]


# --- the file --------------------------------------------------------------------------------------------------------


def words() -> memoryview:
    return memoryview(bytearray(layout.BYTES)).cast("Q")


RESOURCE = Resource(1, Piece(Span(8, 8), Access.WRITE, Pool.ANY), Target(cpus=(3,)), Mode(delivery=Delivery.COUNT))


def test_everybody_may_read_the_page_and_nobody_else_write_it(tmp_path: Path) -> None:
    path = tmp_path / "hwbpd.sock.page"
    mask = os.umask(0o077)
    try:
        map_page(path)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o7777 == 0o644
    assert path.stat().st_size == layout.BYTES
    assert path.stat().st_blocks * 512 >= layout.BYTES  # a store finds no full file system


def test_a_reader_that_opened_once_stays_right_over_daemons(tmp_path: Path) -> None:
    # given a reader and a thread on the page of a daemon that was killed
    path = tmp_path / "page"
    page = status_page.StatusPage(map_page(path), epoch=1)
    task = Task(5, 1, Process(5, 1))
    registration = page.register(1, task)
    opened = open_page(path)
    handle = hwbp_thread(opened, registration)
    page.show(RESOURCE)
    beats(page)
    assert (opened.enabled(3), opened.enabled(2), opened.epoch) == (Answer.YES, Answer.NONE, 1)
    assert handle.enabled(2) is Answer.NONE
    inode = path.stat().st_ino

    # when another daemon takes over, then nothing is known until it beats
    after = status_page.StatusPage(map_page(path), epoch=2)
    assert opened.enabled(3) is opened.enabled(2) is Answer.UNKNOWN
    beats(after)

    # and after that CPUs are right at once, and the thread once it has registered again
    assert (opened.enabled(3), opened.epoch) == (Answer.NONE, 2)
    after.show(RESOURCE)
    assert opened.enabled(3) is Answer.YES
    assert handle.enabled(2) is Answer.UNKNOWN
    assert not handle.is_registered
    again = after.register(1, task)
    assert again.number > registration.number
    assert handle.enabled(2) is Answer.UNKNOWN, "the same word, and another registration"
    handle.renew(opened, *again)
    assert (handle.enabled(2), handle.enabled(3)) == (Answer.NONE, Answer.YES)
    assert path.stat().st_ino == inode


def hwbp_thread(page: StatusPage, registration: status_page.Registration) -> reader.Thread:
    return reader.Thread(page, os.getpid(), *registration)


def beats(page: status_page.StatusPage) -> None:
    page.beat(time.monotonic_ns())


def test_a_page_of_another_layout_is_told_to_be_over_and_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "page"
    old = map_page(path)
    beats(status_page.StatusPage(old, epoch=1))
    reads = open_page(path)
    old[layout.LAYOUT_AT] = 77
    with pytest.raises(VersionMismatch, match="layout 77"):
        open_page(path)

    beats(status_page.StatusPage(map_page(path), epoch=2))

    assert reads.enabled(0) is Answer.UNKNOWN
    assert open_page(path).enabled(0) is Answer.NONE


@pytest.mark.parametrize("content", [b"no page", b"no page" * 1000, b"no page\n" * (layout.BYTES // 8)])
def test_a_file_that_is_no_page_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page"
    path.write_bytes(content)
    with pytest.raises(CannotMakePage, match="no status page"):
        map_page(path)
    assert path.read_bytes() == content
    with pytest.raises(VersionMismatch):
        open_page(path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "page").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotMakePage):
        map_page(tmp_path / "page")
    assert not (tmp_path / "elsewhere").exists()


def test_one_that_was_begun_and_not_finished_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_bytes(bytes(layout.BYTES))
    with pytest.raises(VersionMismatch):
        open_page(path)
    beats(status_page.StatusPage(map_page(path), epoch=1))
    assert open_page(path).enabled(0) is Answer.NONE
