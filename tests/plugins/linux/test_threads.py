"""A thread is known by number and start, whatever it calls itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.errors import TargetGone
from hwbpd.core.model import Process, Task
from hwbpd_linux import threads

AFTER_THE_STATE = "1 1 1 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 5566 8192 200"
EXITING = 4


@given(st.text(alphabet="()Z 9\n", max_size=15))
def test_a_name_cannot_forge_the_other_fields(comm: str) -> None:
    assert threads.parse(f"812 ({comm}) S {AFTER_THE_STATE}") == ("S", 4194560, 5566)


def test_a_thread_is_the_same_each_time_and_differs_from_a_later_one() -> None:
    this = threads.find(threading.get_native_id())

    assert this.process == threads.find_process(os.getpid())
    assert this == threads.find(this.tid)
    assert this.tid == threading.get_native_id()
    assert this.start_ticks > 0


def test_every_thread_of_a_process_is_found_by_its_own_number() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(threads.find(threading.get_native_id()).tid))
    thread.start()
    thread.join()

    assert found == [thread.native_id]
    assert found != [os.getpid()]


def test_a_thread_and_the_first_of_its_process_name_the_same_process() -> None:
    found: list[Task] = []
    thread = threading.Thread(target=lambda: found.append(threads.find(threading.get_native_id())))
    thread.start()
    thread.join()
    first = threads.find(os.getpid())

    assert found[0].process == first.process == Process(os.getpid(), first.start_ticks)


def test_a_process_has_all_its_threads_and_a_later_one_with_its_number_has_none_of_them() -> None:
    process = threads.find_process(os.getpid())
    end = threading.Event()
    others = [threading.Thread(target=end.wait) for _ in range(3)]
    for thread in others:
        thread.start()
    found = threads.tids(process)
    end.set()
    for thread in others:
        thread.join()

    assert {os.getpid(), *(thread.native_id for thread in others)} <= set(found)
    assert threads.tids(Process(process.pid, process.start_ticks + 1)) == ()


def test_the_number_of_a_thread_is_no_process() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with pytest.raises(TargetGone, match=f"that is a thread of process {os.getpid()}"):
            threads.find_process(thread.native_id or 0)
    finally:
        end.set()
        thread.join()


def test_a_thread_that_has_begun_to_exit_is_gone() -> None:
    assert threads.Stat("R", EXITING, 5566).is_gone
    assert not threads.Stat("R", 0, 5566).is_gone


def test_a_number_that_nobody_has_is_no_thread() -> None:
    with pytest.raises(TargetGone, match=f"thread {2**22}$"):
        threads.find(2**22)


def test_a_zombie_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

        with pytest.raises(TargetGone, match="has exited"):
            threads.find(child.pid)
        with pytest.raises(TargetGone, match="has exited"):
            threads.find_process(child.pid)
